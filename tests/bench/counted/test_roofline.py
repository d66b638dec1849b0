"""The roofline: its formula, what it prints, and measured and modelled times."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import pytest

from bench.counted import roofline, roofline_page
from bench.counted.gpus import DEFAULT, GPUS, Assumptions, gpu_of
from bench.counted.roofline import figures_by_provider, main, measured_steps
from bench.counted.step_model import (
    DEVICE,
    HOST,
    Case,
    HostTimes,
    Modelled,
    case_ops,
    host_ms,
    modelled,
    modelled_case,
    work,
)
from bench.counted.trace import Op, Region
from bench.host import host
from bench.host import page as host_page
from bench.providers.models import COMPILED, PROVIDERS

TINY = "vit_tiny_patch16_224"
H100 = GPUS["H100"]
EXACT = Assumptions(gemm=0.5, attention=0.25, memory=1.0, driver_us=10, replay_us=0, gap_us=0)

# Invented milliseconds of the host, 12 blocks.
MADE_UP = {
    "vit-without_prompts": 6.0, "vit-concat-vpt-deep": 9.0, "vit-keys_concat-vpt-deep": 8.0,
    "vit-vpt_fast-vpt-deep": 4.0, "swin-without_prompts": 10.0, "swin-concat-vpt-deep": 20.0,
    "swin-vpt_fast-vpt-deep": 9.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def host_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("host") / "host_made_up.csv"
    of_all = {"bench": "host", "part": "whole", "device": "Some CPU", "torch": "2.99"}
    rows = [
        {**dict.fromkeys(host.FIELDS, ""), **of_all, "subject": name, "least_ms": str(value)}
        for name, value in MADE_UP.items()
    ]
    host.write(rows, path)
    return path


@pytest.fixture(scope="module")
def hosts(host_file: Path) -> HostTimes:
    return HostTimes(host_file)


def op(kind: str, flop: float, megabytes: float, **more: object) -> Op:
    nbytes = int(megabytes * 1e6)
    region = Region(0, (), nbytes, nbytes)
    return Op("op", kind, (region,), (), int(flop), **more)  # type: ignore[arg-type]


def test_a_launch_takes_as_long_as_the_slower_of_compute_and_memory() -> None:
    product = op("gemm", 989.4e9, 1)  # 1 ms at the peak, 2 at half of it
    assert modelled([product], H100, EXACT, 0).graph == pytest.approx(2.0)
    attention = op("attention", 989.4e9, 1)
    assert modelled([attention], H100, EXACT, 0).graph == pytest.approx(4.0)
    traffic = op("elementwise", 0, 3350)
    assert modelled([traffic], H100, EXACT, 0).graph == pytest.approx(1.0)
    assert modelled([product, attention, traffic], H100, EXACT, 0).graph == pytest.approx(7.0)
    in_fp32 = op("gemm", 66.9e9, 1, fp32=True)
    assert modelled([in_fp32], H100, EXACT, 0).graph == pytest.approx(2.0)


def test_a_step_is_bound_by_the_longer_of_host_and_device() -> None:
    small = [op("elementwise", 0, 0.001)] * 100
    times = modelled(small, H100, EXACT, 2.0)  # and 10 us of the driver for each launch
    assert times.eager == pytest.approx(3.0) and times.graph < 0.01
    assert (times.eager_bound, times.graph_bound) == (HOST, DEVICE)
    replayed = modelled(small, H100, dataclasses.replace(EXACT, replay_us=500), 2.0)
    assert replayed.graph == pytest.approx(0.5) and replayed.graph_bound == HOST
    long = [op("elementwise", 0, 33500)]
    assert modelled(long, H100, EXACT, 2.0) == pytest.approx((10.0, 10.0, DEVICE, DEVICE))
    gap = dataclasses.replace(EXACT, gap_us=2.0)
    three = [op("elementwise", 0, 0, launches=3)]
    times = modelled(three, H100, gap, 0)
    assert times.graph == pytest.approx(0.006) and times.eager == pytest.approx(0.03)


def test_attention_reaches_the_gpus_own_part_of_the_peak() -> None:
    attention, device_only = op("attention", 1e12, 0), Assumptions(driver_us=0, gap_us=0)
    for name, part in (("H100", 0.29), ("A100", 0.42)):
        times = modelled([attention], GPUS[name], device_only, 0)
        assert times.eager == pytest.approx(1e3 / (GPUS[name].tensor * part))
    half = dataclasses.replace(device_only, attention=0.5)
    assert modelled([attention], H100, half, 0).eager == pytest.approx(1e3 / (H100.tensor * 0.5))


def test_the_hosts_time_is_scaled_to_the_number_of_blocks(hosts: HostTimes) -> None:
    assert host_ms(hosts, "vit_base_patch16_224", "vpt_fast") == 4.0
    assert host_ms(hosts, "vit_large_patch16_224", "vpt_fast") == 8.0
    assert host_ms(hosts, "swin_base_patch4_window12_384", "without_prompts") == 20.0
    assert host_ms(hosts, TINY, "without_prompts", "vapt") == 6.0
    assert host_ms(hosts, TINY, "published") == host_ms(hosts, TINY, "concat") == 9.0
    assert {host_ms(hosts, TINY, name) for name in COMPILED} == {0.0}
    with pytest.raises(ValueError, match="have no vit-vpt_fast-vapt; measure them again"):
        host_ms(hosts, TINY, "vpt_fast", "vapt")


def test_results_that_are_not_the_hosts_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.csv"
    path.write_text("bench,device\nstep,x\n", encoding="utf-8")
    with pytest.raises(ValueError, match="not a results file of bench.host"):
        HostTimes(path)
    with pytest.raises(ValueError, match="`python -m bench.host` creates one"):
        host_page.latest(tmp_path)


@pytest.mark.parametrize("provider", ["published", "keys_concat_compiled", "vpt_fast"])
def test_more_work_or_a_slower_gpu_takes_no_less(provider: str, hosts: HostTimes) -> None:
    case = Case(TINY, 16, 10, "bfloat16", provider)
    assumed = Assumptions()

    def times(case: Case, gpu: str = "H100", assumed: Assumptions = assumed) -> Modelled:
        return modelled_case(case, GPUS[gpu], assumed, hosts)

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
    slow = times(case, assumed=Assumptions(driver_us=60))
    assert slow.eager > base.eager and slow.graph == base.graph and slow.eager_bound == HOST
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
    # prompts cost ours their kv, once for the batch, and keys in each window's attention
    gemm = {name: float(row["gemm_gflop_counted"]) for name, row in rows.items()}
    assert gemm["vpt_fast"] < gemm["without_prompts"] < gemm["concat"]
    attention = {name: float(row["attention_gflop_counted"]) for name, row in rows.items()}
    assert attention["without_prompts"] < attention["vpt_fast"] < attention["concat"]
    assert float(rows["vpt_fast"]["H100_graph_ms_modelled"]) > 0


def test_work_saved_on_vit_b(hosts: HostTimes) -> None:
    case = Case("vit_base_patch16_224", 64, 50, "bfloat16", "vpt_fast")
    found = figures_by_provider(case, H100, Assumptions(), hosts)
    gemm = found["GEMM GFLOP, counted"]
    assert gemm["vpt_fast"] < 0.75 * gemm["concat"] == 0.75 * gemm["concat_compiled"]
    # the tokens' products alone: 11 blocks of 12 and the last block's kv, without the first block's
    # gradient
    tokens = 2 * 64 * 197 * 12 * 768**2 / 1e9
    assert gemm["vpt_fast"] == pytest.approx(tokens * (11 + 11 + 4 / 12 - 3 / 12), rel=0.02)
    elementwise = found["elementwise MB, counted"]
    assert all(
        elementwise["vpt_fast"] < value for n, value in elementwise.items() if n != "vpt_fast"
    )
    # our backward pass computes the scores twice: no fewer FLOP than one kernel over the same keys
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
    """Write a CSV of invented rows."""
    rows = [{**ROW, **change} for change in changes]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_measured_rows_come_with_their_modelled_times(tmp_path: Path, hosts: HostTimes) -> None:
    path = made_up(
        tmp_path / "made_up.csv",
        {},
        {"provider": "concat_compiled", "device": "NVIDIA L4", "p50_ms": "9"},
        {"device": "Some GPU"},
        {"device": "Some GPU", "prompts": "50"},
    )
    found, unknown = measured_steps(path, Assumptions(), hosts)
    assert [(b.case.provider, b.gpu.name, b.measured) for b in found] == [
        ("vpt_fast", "H100", 2.5),
        ("concat_compiled", "L4", 9.0),
    ]
    case = Case(TINY, 16, 10, "bfloat16", "vpt_fast")
    assert found[0].modelled == modelled_case(case, H100, Assumptions(), hosts)
    assert unknown == ["Some GPU"]


def test_of_a_gpus_results_only_vpt_deep_is_modelled(tmp_path: Path, hosts: HostTimes) -> None:
    step = {"bench": "step", "method": "vpt-deep"}
    path = made_up(
        tmp_path / "made_up.csv",
        {**step},
        {**step, "provider": "concat_cudnn"},
        {**step, "provider": "vpt_fast_compiled"},
        {**step, "p50_ms": ""},
        {**step, "method": "vapt"},
        {**step, "bench": "inference"},
        {**step, "bench": "attention", "model": "", "batch": "64"},
    )
    found, unknown = measured_steps(path, Assumptions(), hosts)
    assert [b.case.provider for b in found] == ["vpt_fast", "concat"] and unknown == []


def test_the_report_states_its_assumptions_and_that_it_is_modelled(
    tmp_path: Path, host_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured = made_up(tmp_path / "made_up.csv", {}, {"device": "Some GPU"})
    output = tmp_path / "roofline.csv"
    arguments = ["--model", TINY, "--batch", "16", "--prompts", "10", "--gemm", "0.5"]
    arguments += ["--measured", str(measured), "--output", str(output), "--host", str(host_file)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    for text in (
        "Nothing was run on a GPU", "products 50% of the peak", "L2 are not modelled", "989.4",
        "29% of the peak on H100", "42% of the peak on A100", "on Some CPU with torch 2.99",
        "ideal fusion, a lower bound for torch.compile", "ms, modelled", "measured      2.50",
        "no published peaks here for 'Some GPU'",
    ):  # fmt: skip
        assert text in printed
    rows = list(csv.DictReader(output.open()))
    assert [row["provider"] for row in rows] == list(PROVIDERS)
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16"}
    assert all(name.endswith(("_counted", "_modelled")) for name in list(rows[0])[5:])
    assert all(float(rows[0][f"{gpu}_eager_ms_modelled"]) > 0 for gpu in DEFAULT)
    ours = next(r for r in rows if r["provider"] == "vpt_fast")
    # Small products: 4 ms measured for the host and 6 us for each launch are the longer.
    assert ours["H100_eager_bound_by_modelled"] == HOST and " host / " in printed
    assert ours["H100_graph_bound_by_modelled"] == DEVICE
    longer = 4.0 + 0.006 * int(ours["launches_counted"])
    assert float(ours["H100_eager_ms_modelled"]) == pytest.approx(longer, abs=0.01)
    with pytest.raises(SystemExit):
        main(arguments)
    assert "exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [({"provider": "magic"}, "provider is 'magic'"), ({"dtype": "int8"}, "dtype is 'int8'")],
)
def test_a_measured_row_that_cannot_be_modelled_is_refused(
    change: dict[str, str], message: str, tmp_path: Path, hosts: HostTimes
) -> None:
    with pytest.raises(ValueError, match=message):
        measured_steps(made_up(tmp_path / "made_up.csv", change), Assumptions(), hosts)


def test_a_table_without_a_column_is_refused(tmp_path: Path, hosts: HostTimes) -> None:
    path = tmp_path / "short.csv"
    path.write_text("model,batch\n", encoding="utf-8")
    with pytest.raises(ValueError, match="has no column prompts, dtype, provider, device, p50_ms"):
        measured_steps(path, Assumptions(), hosts)


@pytest.mark.parametrize(
    "arguments", [["--model", "resnet18"], ["--memory", "2"], ["--gpu", "TPU"], ["--batch", "0"]]
)
def test_a_case_that_cannot_be_modelled_ends_with_a_message(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        roofline.main([*arguments, "--prompts", "10"])
    assert "error" in capsys.readouterr().err


def test_the_page_names_the_bound_of_a_step(
    tmp_path: Path, host_file: Path, hosts: HostTimes, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert roofline_page.main(["--check"]) == 0
    monkeypatch.setattr(roofline_page, "CASES", ((TINY, 16),))
    page = tmp_path / "page.md"
    page.write_text("\n".join(roofline_page.MARKS), encoding="utf-8")
    arguments = ["--page", str(page), "--host", str(host_file)]
    assert roofline_page.main([*arguments, "--check"]) == 1
    assert roofline_page.main(arguments) == roofline_page.main([*arguments, "--check"]) == 0
    case = Case(TINY, 16, 50, "bfloat16", "vpt_fast")
    times = modelled_case(case, H100, Assumptions(), hosts)
    (line,) = (text for text in page.read_text().splitlines() if "vpt_fast" in text)
    assert f"| {times.eager:.1f} | **host** | {times.graph:.1f} | device |" in line
