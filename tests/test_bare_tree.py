"""The source tree alone is enough: a GPU that is lent for minutes comes with nothing installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.kernels.on_device import differs_by_one_rounding, poisoned_empty

from vpt_fast.kernels.runtime import allocate

ROOT = Path(__file__).parent.parent


def test_a_bare_tree_finds_its_kernels(tmp_path: Path) -> None:
    """In an interpreter without the packages that are installed beside PyTorch's."""
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("bench", "kernels", "vpt_fast"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=ignore)
    code = (
        "import sys\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in str(f).lower()]\n"
        "sys.modules.update(dict.fromkeys(('optuna', 'fastapi', 'ttsem')))\n"
        "import bench.gpu, vpt_fast.kernels.runtime.launch as launch; print(launch.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    # A link to kernels/ in a clone, a copy of them in a source distribution.
    found = tmp_path / "vpt_fast" / "kernels" / "runtime" / "launch.py"
    assert Path(done.stdout.strip()).resolve() == found.resolve()


def allocated(like: torch.Tensor) -> torch.Tensor:
    return allocate.empty((2,), like.dtype, like.device)


@pytest.mark.parametrize(
    "make", [torch.empty_like, lambda t: t.new_empty(2), allocated, torch.Tensor.mul]
)
def test_unwritten_memory_is_poisoned(make: object) -> None:
    """Inside of operators as well: PyTorch's own allocations are filled."""
    with poisoned_empty():
        empty = torch.empty(2)
        made = make(empty) if make is not torch.Tensor.mul else empty * 2  # type: ignore[operator]
        whole = torch.empty(2, dtype=torch.int64)
    assert made.isnan().all() and (whole == torch.iinfo(torch.int64).max).all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_one_rounding_is_no_more() -> None:
    want = torch.tensor([1.0, 0.3], dtype=torch.bfloat16)
    assert differs_by_one_rounding(want * (1 + 2**-8), want)
    assert not differs_by_one_rounding(want * (1 + 2**-6), want)
    assert not differs_by_one_rounding(want * float("nan"), want)
