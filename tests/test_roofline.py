"""The roofline: its formula, what it prints, and modelled beside measured times."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import pytest

from bench import roofline
from bench.gpus import DEFAULT, GPUS, Assumptions, gpu_of
from bench.providers import PROVIDERS
from bench.roofline import Case, Modelled, beside, case_ops, main, modelled, shrinks, work
from bench.trace import Op, Region

TINY = "vit_tiny_patch16_224"
H100 = GPUS["H100"]
EXACT = Assumptions(gemm=0.5, attention=0.25, memory=1.0, eager_us=10, triton_us=100, gap_us=0)


def op(kind: str, flop: float, megabytes: float, **more: object) -> Op:
    nbytes = int(megabytes * 1e6)
    region = Region(0, (), nbytes, nbytes)
    return Op("op", kind, (region,), (), int(flop), **more)  # type: ignore[arg-type]


def test_a_launch_takes_as_long_as_the_slower_of_compute_and_memory() -> None:
    product = op("gemm", 989.4e9, 1)  # 1 ms at the peak, 2 at half of it
    assert modelled([product], H100, EXACT).graph == pytest.approx(2.0)
    attention = op("attention", 989.4e9, 1)
    assert modelled([attention], H100, EXACT).graph == pytest.approx(4.0)
    traffic = op("elementwise", 0, 3350)
    assert modelled([traffic], H100, EXACT).graph == pytest.approx(1.0)
    assert modelled([product, attention, traffic], H100, EXACT).graph == pytest.approx(7.0)
    in_fp32 = op("gemm", 66.9e9, 1, fp32=True)
    assert modelled([in_fp32], H100, EXACT).graph == pytest.approx(2.0)


def test_an_eager_step_is_no_faster_than_its_launches() -> None:
    small = [op("elementwise", 0, 0.001)] * 100
    assert modelled(small, H100, EXACT).eager == pytest.approx(1.0)
    assert modelled(small, H100, EXACT).graph < 0.01
    ours = [op("elementwise", 0, 0.001, ours=True)] * 100
    assert modelled(ours, H100, EXACT).eager == pytest.approx(10.0)
    gap = dataclasses.replace(EXACT, gap_us=2.0)
    three = [op("elementwise", 0, 0, launches=3)]
    assert modelled(three, H100, gap).graph == pytest.approx(0.006)


@pytest.mark.parametrize("provider", ["published", "keys_concat_compiled", "vpt_fast"])
def test_more_work_or_a_slower_gpu_takes_no_less(provider: str) -> None:
    case = Case(TINY, 16, 10, "bfloat16", provider)
    assumed = Assumptions()

    def times(case: Case, gpu: str = "H100", assumed: Assumptions = assumed) -> Modelled:
        return modelled(case_ops(case), GPUS[gpu], assumed)

    base = times(case)
    assert 0 < base.graph <= base.eager
    slower = [
        times(case._replace(batch=64)),
        times(case, "A100"),
        times(case, "L4"),
        times(case, assumed=Assumptions(gemm=0.3, attention=0.1, memory=0.2)),
        times(case, assumed=Assumptions(gap_us=5)),
    ]
    assert all(s.graph > base.graph and s.eager >= base.eager for s in slower)
    host = times(case, assumed=Assumptions(eager_us=60, triton_us=250))
    assert host.eager > base.eager and host.graph == base.graph
    assert times(case._replace(prompts=100)).graph > base.graph


def test_compiled_providers_are_the_eager_ones_after_ideal_fusion() -> None:
    for name in ("concat", "keys_concat"):
        eager, compiled = (
            work(case_ops(Case(TINY, 16, 10, "bfloat16", n))) for n in (name, f"{name}_compiled")
        )
        assert compiled.flop == eager.flop
        assert compiled.nbytes["gemm"] == eager.nbytes["gemm"]
        assert compiled.nbytes["elementwise"] < eager.nbytes["elementwise"]
        assert compiled.launches < eager.launches


def test_the_published_form_is_counted_in_fp32() -> None:
    case = Case(TINY, 16, 10, "bfloat16", "published")
    assert case_ops(case) == case_ops(case._replace(dtype="float32"))


SWIN = "swin_tiny_patch4_window7_224"


def test_swin_has_a_row_for_each_of_its_providers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "swin.csv"
    assert main(["--model", SWIN, "--prompts", "50", "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "ms, modelled" in printed and "keys_concat" not in printed
    rows = {row["provider"]: row for row in csv.DictReader(output.open())}
    assert list(rows) == ["published", "concat", "concat_compiled", "vpt_fast", "without_prompts"]
    # prompts cost ours their keys and values, once for the batch, and keys of each window
    gemm = {name: float(row["gemm_gflop_counted"]) for name, row in rows.items()}
    assert gemm["vpt_fast"] < gemm["without_prompts"] < gemm["concat"]
    attention = {name: float(row["attention_gflop_counted"]) for name, row in rows.items()}
    assert attention["without_prompts"] < attention["vpt_fast"] < attention["concat"]
    assert float(rows["vpt_fast"]["H100_graph_ms_modelled"]) > 0


def test_what_shrinks_on_vit_b() -> None:
    found = shrinks(
        Case("vit_base_patch16_224", 64, 50, "bfloat16", "vpt_fast"), H100, Assumptions()
    )
    gemm = found["GEMM GFLOP, counted"]
    assert gemm["vpt_fast"] < 0.75 * gemm["concat"] == 0.75 * gemm["concat_compiled"]
    # the tokens' products alone, over 11 blocks of 12 and without the first one's gradient
    tokens = 2 * 64 * 197 * 12 * 768**2 / 1e9
    assert gemm["vpt_fast"] == pytest.approx(tokens * (11 + 11 - 3 / 12), rel=0.02)
    elementwise = found["elementwise MB, counted"]
    assert all(
        elementwise["vpt_fast"] < value for n, value in elementwise.items() if n != "vpt_fast"
    )
    # our backward pass makes the scores twice: no fewer FLOP than one kernel over the same keys
    attention = found["attention GFLOP, counted"]
    assert attention["keys_concat"] < attention["vpt_fast"] < attention["concat"]


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-40GB", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA L40S", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("x86_64", None),
    ],
)
def test_a_gpu_is_found_by_the_name_of_the_device(device: str, name: str | None) -> None:
    assert gpu_of(device) is (None if name is None else GPUS[name])


@pytest.mark.parametrize("change", [{"gemm": 0.0}, {"memory": 1.5}, {"gap_us": -1.0}])
def test_assumptions_out_of_range_are_refused(change: dict[str, float]) -> None:
    (name,) = change
    with pytest.raises(ValueError, match=f"{name} is "):
        Assumptions(**change)


ROW = {
    "model": TINY, "batch": "16", "prompts": "10", "dtype": "bfloat16", "provider": "vpt_fast",
    "device": "NVIDIA H100 80GB HBM3", "p50_ms": "2.5", "rounds": "9",
}  # fmt: skip


def made_up(path: Path, *changes: dict[str, str]) -> Path:
    """A CSV of rows that nobody measured."""
    rows = [{**ROW, **change} for change in changes]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_measured_rows_stand_beside_what_is_modelled_for_them(tmp_path: Path) -> None:
    path = made_up(
        tmp_path / "made_up.csv",
        {},
        {"provider": "concat_compiled", "device": "NVIDIA L4", "p50_ms": "9"},
        {"device": "Some GPU"},
        {"device": "Some GPU", "prompts": "50"},
    )
    found, unknown = beside(path, Assumptions())
    assert [(b.case.provider, b.gpu.name, b.measured) for b in found] == [
        ("vpt_fast", "H100", 2.5),
        ("concat_compiled", "L4", 9.0),
    ]
    case = Case(TINY, 16, 10, "bfloat16", "vpt_fast")
    assert found[0].modelled == modelled(case_ops(case), H100, Assumptions())
    assert unknown == ["Some GPU"]


def test_the_report_states_its_assumptions_and_says_modelled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = made_up(tmp_path / "made_up.csv", {}, {"device": "Some GPU"})
    output = tmp_path / "roofline.csv"
    arguments = ["--model", TINY, "--batch", "16", "--prompts", "10", "--gemm", "0.5"]
    arguments += ["--measured", str(measured), "--output", str(output)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    for text in (
        "Nothing was run on a GPU", "products 50% of the peak", "L2 are not modelled", "989.4",
        "ideal fusion, a lower bound for torch.compile", "ms, modelled", "measured      2.50",
        "no published peaks here for 'Some GPU'",
    ):  # fmt: skip
        assert text in printed
    rows = list(csv.DictReader(output.open()))
    assert [row["provider"] for row in rows] == list(PROVIDERS)
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16"}
    assert all(name.endswith(("_counted", "_modelled")) for name in list(rows[0])[5:])
    assert all(float(rows[0][f"{gpu}_eager_ms_modelled"]) > 0 for gpu in DEFAULT)
    with pytest.raises(SystemExit):
        main(arguments)
    assert "exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [({"provider": "magic"}, "provider is 'magic'"), ({"dtype": "int8"}, "dtype is 'int8'")],
)
def test_a_measured_row_that_cannot_be_modelled_is_refused(
    change: dict[str, str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        beside(made_up(tmp_path / "made_up.csv", change), Assumptions())


def test_a_table_without_a_column_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "short.csv"
    path.write_text("model,batch\n", encoding="utf-8")
    with pytest.raises(ValueError, match="has no column prompts, dtype, provider, device, p50_ms"):
        beside(path, Assumptions())


@pytest.mark.parametrize(
    "arguments", [["--model", "resnet18"], ["--memory", "2"], ["--gpu", "TPU"], ["--batch", "0"]]
)
def test_what_cannot_be_modelled_ends_with_a_message(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        roofline.main([*arguments, "--prompts", "10"])
    assert "error" in capsys.readouterr().err
