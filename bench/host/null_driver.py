"""A null driver, which launches nothing, to time what the host does without a GPU.

Inside `null_driver()` Triton compiles for sm_90 and its launches do nothing, and vpt_fast uses its
kernels for tensors on the CPU. Everything up to the compiled kernel's own launcher runs as it does
on a GPU: operators, checks, tiles, strides, allocation, Triton's look-up of the compiled kernel.
Outputs are uninitialised memory.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

import vpt_fast
from vpt_fast import kernels
from vpt_fast.kernels.constants import MAX_HEAD_DIM
from vpt_fast.kernels.runtime.launch import Target

CAPABILITY = 90
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class NullLauncher:
    """Launcher of a compiled kernel that launches nothing.

    Attributes:
        launches: Number of launches so far, of all kernels.
    """

    launches = 0

    def __init__(self, src: Any, metadata: Any) -> None:
        pass

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        NullLauncher.launches += 1


class _Utils:
    def load_binary(self, *args: Any) -> tuple[int, int, int, int, int]:
        """Return module, function, registers, spills and the most threads."""
        return 0, 0, 32, 0, 1024

    def unload_module(self, *args: Any) -> None:
        pass

    def get_device_properties(self, device: int) -> dict[str, int]:
        """Return the properties of an H100 that Triton asks for."""
        return {
            "max_shared_mem": 232448, "multiprocessor_count": 132, "max_num_regs": 65536,
            "warpSize": 32,
        }  # fmt: skip


class NullDriver:
    """The interface that Triton 3.4 to 3.8 expect of a driver."""

    launcher_cls = NullLauncher
    utils = _Utils()
    target = GPUTarget("cuda", CAPABILITY, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        # Not a real device, so that a launch on one does not find what is compiled here.
        return -1

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        return torch.cpu

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind

    def get_benchmarker(self) -> Callable[..., list[float]]:
        return lambda function, quantiles=None, **kwargs: [1.0, 1.0, 1.0]

    @staticmethod
    def is_active() -> bool:
        return True


def _takes_kernels(tensor: Tensor, head_dim: int = 0) -> bool:
    return tensor.dtype in _DTYPES and head_dim <= MAX_HEAD_DIM


def _target_of(tensor: Tensor) -> Target:
    return _TARGET


_TARGET = Target(CAPABILITY)
_STAND_INS = {"uses_kernels": _takes_kernels, "target_of": _target_of}


def _modules() -> list[ModuleType]:
    """Load and return the modules of vpt_fast that use one of the stand-ins."""
    found = []
    # In a source tree the kernels are not below the package that they belong to.
    for package in (vpt_fast, kernels):
        root = Path(package.__path__[0])
        for path in sorted(root.rglob("*.py")):
            if any(name in path.read_text(encoding="utf-8") for name in _STAND_INS):
                parts = path.relative_to(root).with_suffix("").parts
                name = ".".join((package.__name__, *parts)).removesuffix(".__init__")
                found.append(importlib.import_module(name))
    return list(dict.fromkeys(found))


@contextlib.contextmanager
def null_driver() -> Iterator[None]:
    """Let vpt_fast use its kernels for CPU tensors, and launch nothing.

    Raises:
        RuntimeError: If no module uses `uses_kernels` any more.
    """
    driver = triton.runtime.driver
    # Triton 3.4 has an unstarted driver there; later releases start it when `active` is read.
    before = driver._active if hasattr(driver, "_active") else driver.active
    with contextlib.ExitStack() as stack:
        patched = dict.fromkeys(_STAND_INS, 0)
        for module in _modules():
            for name, stand_in in _STAND_INS.items():
                if name in vars(module):
                    stack.enter_context(mock.patch.object(module, name, stand_in))
                    patched[name] += 1
        if not all(patched.values()):
            raise RuntimeError(f"vpt_fast's modules have these to replace: {patched}; update this")
        driver.set_active(NullDriver())
        stack.callback(driver.set_active, before)
        yield
