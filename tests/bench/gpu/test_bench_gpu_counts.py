"""FLOP and bytes that are added to a GPU's results, and the plot of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from bench.compare.cases import Case
from bench.compare.collect import read
from bench.gpu.jobs.job import case_columns
from bench.gpu.results import page
from bench.gpu.results.counted import Counted
from bench.gpu.results.counts import add_counts, case_of, counted
from bench.gpu.results.record import FIELDS, write
from bench.gpu.run import main
from bench.providers.attention import AttentionCase
from bench.providers.models import GPU_PROVIDERS, OURS, PUBLISHED

SMALL = Case(model="test_vit", batch=2, prompts=3, image_size=32, dtype="bfloat16")
PNG = b"\x89PNG"


def test_counted_work_of_a_row() -> None:
    device = "NVIDIA H100 80GB HBM3"
    larger = dataclasses.replace(SMALL, image_size=64)
    cases = (SMALL, AttentionCase(3, 2, 17, 2, 32), larger)
    step, alone, more = counted([(s, OURS, "bfloat16", device) for s in cases], 0)
    assert isinstance(step, Counted) and step.eager_ms and step.graph_ms
    # Two products forward and five backward, of 17 queries with 20 keys each.
    assert isinstance(alone, Counted) and alone.eager_ms is None
    assert alone.flop >= 7 * 2 * 2 * 2 * 17 * 20 * 32
    assert isinstance(more, Counted) and more.flop > step.flop
    # The products do not depend on PyTorch's kernel for attention, or on a compiler.
    for name, plain in (("concat_cudnn", "concat"), (f"{OURS}_compiled", OURS)):
        found, wanted = counted([(SMALL, n, "bfloat16", device) for n in (name, plain)], 0)
        assert isinstance(found, Counted) and isinstance(wanted, Counted)
        assert found.flop == wanted.flop


def test_an_unknown_provider_is_reported() -> None:
    (found,) = counted([(SMALL, "unknown", "bfloat16", "a GPU")], 0)
    assert isinstance(found, str) and "unknown is not counted: " in found


@pytest.mark.parametrize(
    "case",
    [dataclasses.replace(SMALL, memory="lean", method="vapt"), AttentionCase(3, 2, 17, 2, 32)],
    ids=str,
)
def test_a_row_names_its_case(case: Any) -> None:
    row = dict.fromkeys(FIELDS, "") | {"p50_ms": "1"}
    row |= {name: str(value) for name, value in case_columns(case, "bfloat16").items()}
    wanted = {name: getattr(case, name) for name in vars(case) if name != "providers"}
    found = case_of(row)
    assert {name: getattr(found, name) for name in wanted} == wanted
    assert case_of(row | {"p50_ms": ""}) is None
    assert case_of(row | {"bench": "inference"}) is None


@pytest.mark.full
def test_counting_in_processes() -> None:
    tasks = [(SMALL, name, "bfloat16", "a GPU") for name in ("concat", OURS)]
    assert counted(tasks, 2) == counted(tasks, 0)


def test_the_page_of_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invented rows: with graphs, memory, a ceiling, an H100's name, and a row without times."""

    def row(name: str, prompts: int, times: bool = True) -> dict[str, Any]:
        columns = {
            "bench": "step", "model": "test_vit", "method": "vpt-deep", "batch": 2,
            "prompts": prompts, "dropout": 0.0, "dtype": "bfloat16", "image_size": 32,
            "provider": name, "memory": "speed", "device": "NVIDIA H100 80GB HBM3", "cuda": "13.0",
        }  # fmt: skip
        slow = 30 if name == PUBLISHED else 1
        times_of = {
            "p50_ms": 3 * slow, "graph_p50_ms": 2 * slow, "ratio_p50": slow, "peak_mib": 50,
            "tflops": 2, "tflops_ceiling": 9, "gb_per_s": 4, "gb_per_s_ceiling": 8,
        }  # fmt: skip
        return columns | (times_of if times else {"note": "check: out of memory"})

    names = (PUBLISHED, "concat", OURS)
    rows = [row(name, p) for p in (3, 5) for name in names] + [row("keys_concat", 3, times=False)]
    path = tmp_path / "made_up.csv"
    write(rows, path)
    drawn: dict[str, Any] = {}
    save = page.Figure.savefig

    def record(self: Any, where: Path) -> None:
        drawn["axes"] = self.axes
        save(self, where)

    monkeypatch.setattr(page.Figure, "savefig", record)
    assert add_counts(path, processes=0)[-2:] == [str(path), str(path.with_suffix(".png"))]
    assert path.with_suffix(".png").read_bytes().startswith(PNG)
    speedup, time, memory, tflops, rate, model = drawn["axes"]
    assert [list(line.get_xdata()) for line in speedup.lines if len(line.get_xdata())] == 3 * [
        [3, 5]
    ]
    assert [bar.get_width() for bar in time.patches] == [3, 3, 90, 2, 2, 60]
    counted = {row["provider"]: row for row in read(path) if row["prompts"] == "3"}
    assert all(float(counted[name]["tflops"]) > 0 for name in names)
    assert counted["keys_concat"]["tflops"] == "" and counted[OURS]["tflops"] != "2"
    assert "90 (cut off)" in [text.get_text().replace("90.0", "90") for text in time.texts]
    assert all(ax.axison for ax in drawn["axes"]) and len(memory.lines) == len(GPU_PROVIDERS)
    assert "dotted: the device's 9" in tflops.get_xlabel() and "GB/s" in rate.get_xlabel()
    # Six rows, eager and as a graph, and the diagonal.
    assert len(model.lines) == 13


@pytest.mark.parametrize(("text", "complaint"), [("provider\n", "has no columns"), ("", "no rows")])
def test_a_file_of_nothing_is_refused(
    text: str, complaint: str, tmp_path: Path, capsys: Any
) -> None:
    path = tmp_path / "empty.csv"
    write([], path)
    if text:
        path.write_text(text)
    with pytest.raises(SystemExit):
        main(["--count", str(path)])
    assert complaint in capsys.readouterr().err
