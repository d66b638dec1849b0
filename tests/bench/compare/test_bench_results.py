"""From a benchmark run to its CSV file, plots and the page's tables."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bench.compare import collect, plots, tables
from bench.compare.collect import read, rows_of
from bench.compare.facts import facts, file_stem
from bench.compare.interleave import interleave
from bench.compare.recorded import RecordedClock
from bench.counted import saved_bytes
from bench.providers.models import EAGER, OURS

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run small benchmarks in a process of their own, as `make bench` does; return their file."""
    path = tmp_path_factory.mktemp("run") / "run.json"
    command = [
        sys.executable, "-m", "pytest", "bench/compare/bench_step.py",
        "bench/compare/bench_inference.py", "-q",
        "--benchmark-enable", f"--benchmark-json={path}", "--rounds", "3",
        "--models", "test_vit", "--batches", "2", "3", "--prompts", "2", "4", "--image-sizes", "32",
        "-k", "not (p4 and b3)",
    ]  # fmt: skip
    # pytest-benchmark switches itself off in a process of pytest-xdist.
    env = {key: value for key, value in os.environ.items() if "XDIST" not in key}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return path


@pytest.fixture(scope="module")
def results(run_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saved_bytes, "MODEL", "vit_tiny_patch16_224")
        assert collect.main([str(run_file), "--output", str(folder)]) == 0
    (path,) = folder.iterdir()
    return path


def test_a_row_for_every_comparison_and_provider(results: Path) -> None:
    rows = [row for row in read(results) if row["kind"] == "measured"]
    assert len(rows) == 2 * 3 * len(EAGER)
    for row in rows:
        assert float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"])
        assert int(row["rounds"]) == 3 and 0 < float(row["error"]) < 1e-3
        assert row["torch"] == facts()["torch"] and row["date"] and row["commit"]
        if row["provider"] == OURS:
            assert row["ratio_p20"] == row["ratio_p50"] == row["ratio_p80"] == "1.000"


def test_ratios_are_of_the_same_round(run_file: Path) -> None:
    run = json.loads(run_file.read_text())
    for benchmark in run["benchmarks"]:
        theirs = benchmark["extra_info"]["provider"] != OURS
        benchmark["stats"]["data"] = [2.0, 4.0, 40.0] if theirs else [1.0, 2.0, 20.0]
    ratios = {(r["provider"] == OURS, r["ratio_p20"], r["ratio_p80"]) for r in rows_of(run)}
    assert ratios == {(True, "1.000", "1.000"), (False, "2.000", "2.000")}


def test_memory_rows_are_counted(results: Path) -> None:
    rows = [row for row in read(results) if row["bench"] == "memory"]
    assert {row["kind"] for row in rows} == {"counted"} and not any(row["p50_ms"] for row in rows)
    by = {(row["provider"], int(row["blocks"])): float(row["kept_mib"]) for row in rows}
    assert by[OURS, 12] < by["without_prompts", 0] < by["concat", 12]
    assert by[OURS, 1] < by[OURS, 2]


def test_the_file_is_named_after_machine_and_versions() -> None:
    known = {
        "device": "Some CPU @ 2 GHz",
        "threads": "4",
        "torch": "2.14.1+cu130",
        "timm": "1.0.31",
    }
    assert file_stem(known) == "some-cpu-2-ghz_cpu-4-threads_torch-2.14.1-cu130_timm-1.0.31"
    assert "_gpu_" in file_stem({**known, "cuda": "13.0"})


def test_the_plots_show_every_series(results: Path, tmp_path: Path) -> None:
    rows = read(results)
    found = plots.panels(rows)
    assert [panel.x for panel in found] == ["prompts", "batch", "blocks"]
    assert {row["provider"] for row in found[0].rows} == set(EAGER) - {OURS}
    assert {row["provider"] for row in found[1].rows} == set(EAGER)
    path = tmp_path / "plots.png"
    assert plots.main([str(results), "--output", str(path)]) == 0
    assert min(Image.open(path).size) > 400


def test_the_page_gets_every_comparison(results: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n")
    assert tables.main([str(results), "--page", str(page), "--check"]) == 1
    assert tables.main([str(results), "--page", str(page)]) == 0
    assert tables.main([str(results), "--page", str(page), "--check"]) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert text.count("| test_vit, 32 px, vpt-deep, batch ") == 2 * 3
    some = next(row for row in read(results) if row["provider"] == "concat")
    low, middle, high = (f"{float(some[f'ratio_p{n}']):.2f}" for n in (20, 50, 80))
    assert f"| {middle} ({low} - {high}) |" in text


def test_models_and_image_sizes_are_told_apart() -> None:
    names = {
        "vit_small_patch16_224": "ViT-S/16", "vit_small_patch16_dinov3": "DINOv3-S/16",
        "vit_small_patch14_dinov2": "vit_small_patch14_dinov2",
        "swin_tiny_patch4_window7_224": "Swin-T",
    }  # fmt: skip
    rows = [
        {
            "bench": "step", "model": name, "image_size": size, "method": "vpt-deep", "batch": "8",
            "dtype": "float32", "dropout": "0.0", "prompts": "50", "provider": provider,
            "ratio_p20": "1", "ratio_p50": "1", "ratio_p80": "1", "p50_ms": "2",
        }
        for name in names for size in ("224", "256") for provider in ("concat", OURS)
    ]  # fmt: skip
    found: Any = tables.table(rows, "step")
    sizes = ("", ", 256 px")
    right = [f"{n}{size}, vpt-deep, batch 8" for n in names.values() for size in sizes]
    assert [row[0] for row in found["rows"]] == right


def test_the_page_of_the_project_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    """Its tables and plot come from the same results file."""
    text = (ROOT / "docs" / "benchmarks" / "cpu.md").read_text()
    (name,) = re.findall(r"bench/results/(\S+_cpu-\S+)\.png\)", text)
    results = collect.RESULTS / f"{name}.csv"
    assert tables.main([str(results), "--check"]) == 0, capsys.readouterr().out


@pytest.mark.parametrize("tool", [plots, tables])
def test_files_that_are_no_results_are_refused(
    tool: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "other.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(SystemExit):
        tool.main([str(path)])
    assert "has no columns" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tool.main([str(tmp_path / "none.csv")])


def test_files_that_are_no_runs_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.json"
    for text, message in (("{}", "machine_info"), ("{", "run.json"), (None, "No such file")):
        if text is not None:
            path.write_text(text)
        else:
            path.unlink()
        with pytest.raises(SystemExit):
            collect.main([str(path)])
        assert message in capsys.readouterr().err


def test_a_page_without_marks_is_refused(results: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("no marks")
    with pytest.raises(SystemExit):
        tables.main([str(results), "--page", str(page)])
    assert page.read_text() == "no marks"


def test_the_clock_replays_recorded_times() -> None:
    clock = RecordedClock([1.0, 2.5])
    first, second, third, fourth = (clock() for _ in range(4))
    assert (second - first, fourth - third) == (1.0, 2.5)


def test_rounds_are_interleaved_in_changing_order() -> None:
    ran: list[str] = []
    functions = {name: lambda name=name: ran.append(name) for name in "abc"}
    times = interleave(functions, rounds=20, warmup=1)
    rounds = [tuple(ran[i : i + 3]) for i in range(0, len(ran), 3)]
    assert len(rounds) == 21 and all(sorted(order) == list("abc") for order in rounds)
    assert len(set(rounds)) > 2
    assert {len(taken.seconds) for taken in times.values()} == {20}
