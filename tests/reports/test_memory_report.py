"""The memory report: its points, its table and plot, and peaks from a stand-in for a GPU."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vpt_fast import VAPT, LinearProbe, VPTDeep, VPTShallow
from vpt_fast.analysis.activation_memory import EAGER, PLAIN, PROVIDERS
from vpt_fast.analysis.memory_profile import Point, points_of, words
from vpt_fast.methods import Method
from vpt_fast.reports import memory as memory_report
from vpt_fast.reports.memory import HEADER, report_memory
from vpt_fast.reports.memory_picture import _apart

OPTIONS: dict[str, Any] = {"img_size": 32, "batch_size": 4, "progress": False}


def report(method: Method, output: Path, **options: Any) -> tuple[str, list[dict[str, str]]]:
    """Write a report; return its printed text and the rows of its table."""
    lines: list[str] = []
    options = {"num_prompts": 3, "prompts": [0, 5], **OPTIONS, **options, "log": lines.append}
    report_memory("test_vit", method, output, **options)
    assert sorted(path.name for path in output.iterdir()) == ["memory.csv", "memory.png"]
    with (output / "memory.csv").open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        assert tuple(reader.fieldnames or ()) == HEADER
        return "\n".join(lines), list(reader)


def assert_drawn(path: Path) -> None:
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"), dtype=np.int64)
    white = (pixels == 255).all(axis=-1)
    assert 0.5 < white.mean() < 0.99
    # Nothing is cut off at the edges.
    for edge in (white[:8], white[-8:], white[:, :8], white[:, -8:]):
        assert edge.all()


def test_points_of_deep_prompts_are_depths_from_both_ends_and_numbers() -> None:
    points = points_of(VPTDeep(dropout=0.1), 4, 3, [5, 0, 5])
    assert [words(*item) for item in points.items()] == [
        "0 prompts, all 4 blocks",
        "5 prompts, all 4 blocks",
        *(f"3 prompts, first {name}" for name in ("block", "2 blocks", "3 blocks")),
        *(f"3 prompts, last {name}" for name in ("block", "2 blocks", "3 blocks")),
        "3 prompts, all 4 blocks",
    ]
    assert points[Point(3, 2, "last")] == VPTDeep(3, dropout=0.1, blocks=[2, 3])
    assert points[Point(3, 2, "first")] == VPTDeep(3, dropout=0.1, blocks=[0, 1])
    assert points[Point(3, 4, "all")] == VPTDeep(3, dropout=0.1)
    # A number that is given twice is one point.
    assert len(points_of(VPTDeep(), 4, 5, [5])) == 7
    assert list(points_of(VPTDeep(), 1, 3, [3])) == [Point(3, 1, "all")]


def test_points_of_other_methods_are_numbers_of_prompts() -> None:
    assert list(points_of(VPTShallow(), 4, 3, [1, 2])) == [
        Point(1, 1, "first"),
        Point(2, 1, "first"),
    ]
    assert list(points_of(VAPT(), 4, 3, [0])) == [Point(0, 4, "all")]
    assert points_of(LinearProbe(), 4, 3, [1]) == {Point(0, 0, "all"): LinearProbe()}
    with pytest.raises(ValueError, match="there are no numbers of prompts; give at least one"):
        points_of(VAPT(), 4, 3, [])
    with pytest.raises(ValueError, match="num_prompts must be at least 0, got -1"):
        points_of(VPTShallow(), 4, 3, [-1])


def test_report_of_deep_prompts(tmp_path: Path) -> None:
    printed, rows = report(VPTDeep(), tmp_path / "out")
    # The model without prompts; 0 and 5 prompts; 3 prompts in 1 to 5 blocks from each end, and 6.
    assert len(rows) == 1 + (2 + 2 * 5 + 1) * len(PROVIDERS)
    assert rows[0]["provider"] == PLAIN
    assert Counter(row["provider"] for row in rows[1:]) == dict.fromkeys(PROVIDERS, 13)
    same = {
        "kind": "counted", "model": "test_vit", "method": "vpt-deep", "batch_size": "4",
        "dtype": "bfloat16", "image_height": "32", "image_width": "32", "dropout": "0.0",
        "torch": torch.__version__, "device": "fake tensors",
    }  # fmt: skip
    for row in rows:
        assert {key: row[key] for key in same} == same
        assert float(row["mib"]) == pytest.approx(int(row["bytes"]) / 2**20, abs=0.01)
    assert (
        "test_vit, vpt-deep, batch 4, bfloat16, 32 x 32 px: saved for backward, counted" in printed
    )
    for text in ("0 prompts, all 6 blocks", "3 prompts, first block", "3 prompts, last 4 blocks"):
        assert f"| {text} " in printed
    assert f"written to {tmp_path / 'out'}: memory.csv (all 66 rows), memory.png" in printed
    assert_drawn(tmp_path / "out" / "memory.png")


@pytest.mark.parametrize(
    ("method", "count"),
    [(LinearProbe(), 6), (VPTShallow(dropout=0.1), 11), (VAPT(), 11)],
    ids=lambda value: getattr(value, "name", ""),
)
def test_report_of_other_methods(tmp_path: Path, method: Method, count: int) -> None:
    printed, rows = report(method, tmp_path / "out", dtype="float32")
    assert len(rows) == count
    assert {row["dtype"] for row in rows} == {"float32"}
    assert ("prompt dropout 0.1" in printed) == (method.name == "vpt-shallow")
    assert_drawn(tmp_path / "out" / "memory.png")


class SmallGPU:
    """A stand-in for a GPU with too little memory for one step."""

    def bytes_of(self, method: Method, provider: str, batch_size: int) -> int:
        if provider == EAGER and method.num_prompts == 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 11 * 2**30 + method.num_prompts


def test_peaks_are_measured_where_there_is_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_report, "gpu_meter", lambda *args: SmallGPU())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a stand-in")
    printed, rows = report(VPTDeep(), tmp_path / "out")
    assert Counter(row["kind"] for row in rows) == {"counted": 66, "measured": 65}
    assert {row["device"] for row in rows if row["kind"] == "measured"} == {"a stand-in"}
    assert "measured: eager, 5 prompts, all 6 blocks: out of memory, left out" in printed
    assert "peak of a training step, measured on a stand-in, in MiB" in printed
    assert_drawn(tmp_path / "out" / "memory.png")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU")
def test_nothing_is_measured_without_a_gpu() -> None:
    assert memory_report.gpu_meter("test_vit", {}, (3, 32, 32), torch.bfloat16) is None


def test_only_files_of_an_earlier_report_are_overwritten(tmp_path: Path) -> None:
    output = tmp_path / "out"
    printed, rows = report(LinearProbe(), output)
    with pytest.raises(FileExistsError, match="of an earlier memory; choose another --output, or"):
        report(LinearProbe(), output)
    assert report(LinearProbe(), output, overwrite=True) == (printed, rows)
    (output / "memory.csv").write_text("mine")
    with pytest.raises(FileExistsError, match="is not of an earlier memory; choose another"):
        report(LinearProbe(), output, overwrite=True)
    assert (output / "memory.csv").read_text() == "mine"
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"\(it holds notes.txt\)"):
        report(LinearProbe(), other)


def test_numbers_below_an_axis_do_not_touch() -> None:
    assert _apart([0, 10, 50, 100, 200]) == [0, 10, 50, 100, 200]
    assert _apart([0, 1, 10, 50, 100, 200]) == [0, 10, 50, 100, 200]
    assert _apart(list(range(1, 13))) == list(range(1, 13))
    assert _apart(list(range(1, 41)))[:3] == [1, 3, 5]
