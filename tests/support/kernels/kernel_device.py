"""The device that kernel tests run on: a CUDA GPU, or the CPU under ttsem's sanitizer.

ttsem executes the compiler's own IR of every launch on the CPU. It finds accesses out of bounds,
races between programs and, because `torch.empty` is filled with NaN, outputs that are not written.
A test module sets `pytest_plugins = ("support.kernels.kernel_device",)`, requests the fixture
`kernel_device` and allocates its tensors on it. With a GPU the kernels run there, and memory that
PyTorch allocates without values is filled with NaN too, also in operators.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from bench.gpu.jobs.keys import stable_keys
from support.kernels.on_device import poisoned_empty

# Evaluated once: in a session of ttsem, torch reports a GPU.
HAS_GPU = torch.cuda.is_available()

# Accesses of one launch that are stored to look for races: enough for the largest shapes, which
# take minutes.
_LARGE_BUDGET = 50_000_000
# The GPU that kernels are compiled for when there is none.
CPU_CAPABILITY = 90
# The IR of every variant of a kernel that the process has executed, by its key, and what was parsed
# of it, by its text; ttsem only reads it.
_TEXTS: dict[Any, Any] = {}
_MODULES: dict[Any, Any] = {}
_TYPES: dict[Any, Any] = {}


@contextlib.contextmanager
def sanitized_kernels(
    capability: int = CPU_CAPABILITY, access_budget: int | None = None
) -> Iterator[Any]:
    """Run Triton's launches inside on the CPU under ttsem; "cuda" means the CPU there.

    Args:
        capability: Compute capability that kernels are compiled for, times ten.
        access_budget: Accesses of a launch that are stored to look for races; ttsem's by default.

    Yields:
        ttsem's session, with `launches`, and with `races_unchecked`, the number of launches that
        were too large to be checked for races.
    """
    from ttsem import _fakedriver, harness, memory, mlir, sanitize

    def ir_up_to(record: Any, stage: str, target: Any) -> str:
        variant = harness._specialize(record.fn, record.args, record.kwargs, target)
        key = f"{record.fn_name} {record.fn.cache_key} {stage} {target} {variant}"
        if key not in _TEXTS:
            _TEXTS[key] = mlir.to_generic(harness._stage_text(record, stage, target), None)
        return _TEXTS[key]

    mlir.enable_generic_printing()
    with pytest.MonkeyPatch.context() as patch:
        # ttsem compiles each kernel to machine code and then reads an early stage. Stopping at that
        # stage gives the same text, for fp32 kernels hundreds of times faster.
        patch.setattr(harness, "ir_for_launch", ir_up_to)
        patch.setattr(mlir, "parse", _once(mlir.parse, _MODULES))
        types = mlir.Parser._parse_type_from_text
        patch.setattr(mlir.Parser, "_parse_type_from_text", _once(types, _TYPES))
        patch.setattr(memory, "ACCESS_BUDGET", access_budget or memory.ACCESS_BUDGET)
        try:
            with sanitize.session(cc=capability) as session:
                yield session
        finally:
            _fakedriver.unstub_torch_cuda()


def _once(function: Callable[..., Any], results: dict[Any, Any]) -> Callable[..., Any]:
    """Return a function that calls another once for each value of its last argument."""

    def call(*arguments: Any) -> Any:
        key = arguments[-1]
        if key not in results:
            results[key] = function(*arguments)
        return results[key]

    return call


@pytest.fixture
def kernel_device_sm80() -> Iterator[torch.device]:
    """Yield `kernel_device` with the kernels that an A100 would run; only without a GPU."""
    if HAS_GPU:
        pytest.skip("a GPU runs its own kernels")
    _need_ttsem()
    with sanitized_kernels(80) as session:
        yield torch.device("cuda")
        assert session.races_unchecked == 0, "launches too large to be checked for races"


@pytest.fixture
def kernel_device() -> Iterator[torch.device]:
    """Yield the device of a kernel's tensors; without a GPU its launches are sanitized."""
    yield from _device(None)


@pytest.fixture
def kernel_device_large() -> Iterator[torch.device]:
    """Yield `kernel_device` for launches too large for ttsem's own budget; they take minutes."""
    yield from _device(_LARGE_BUDGET)


def _device(access_budget: int | None) -> Iterator[torch.device]:
    if HAS_GPU:
        stable_keys()
        with poisoned_empty():
            yield torch.device("cuda")
        return
    _need_ttsem()
    with sanitized_kernels(access_budget=access_budget) as session:
        yield torch.device("cuda")  # which is the CPU while the session is open
        assert session.races_unchecked == 0, "launches too large to be checked for races"


def _need_ttsem() -> None:
    pytest.importorskip("ttsem", reason="neither a GPU nor ttsem, which runs kernels on the CPU")
