"""A kernel launch as a value, so that what runs can also be compiled and read without a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import triton.language as tl

from ..constants import LARGEST_TILE

_TYPE_NAMES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
}


class Target(NamedTuple):
    """What a launch is tuned for: a CUDA compute capability (80, 90, ...) or an AMD GPU."""

    capability: int
    hip: bool = False

    @property
    def is_hopper(self) -> bool:
        """Whether times measured on an H200 are times of this architecture."""
        return self.capability == 90 and not self.hip


def target_of(tensor: torch.Tensor) -> Target:
    """The target of the device that holds `tensor`; sm_80 for tensors that are on no GPU."""
    if tensor.device.type != "cuda":
        return Target(80)
    if torch.version.hip is not None:
        return Target(0, hip=True)
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return Target(10 * major + minor)


def exact_precision(target: Target) -> str:
    """How fp32 products are taken as exactly as in fp32: three tf32 products, where there are."""
    return "ieee" if target.hip else "tf32x3"


@dataclass(frozen=True)
class Launch:
    """One launch of one kernel.

    Attributes:
        name: what it computes, for reports.
        kernel: the `triton.jit` function.
        grid: programs along the three axes.
        arguments: tensors and numbers by parameter name, all of them but the constexprs; None for a
            pointer that the constexprs leave no use of.
        constexprs: compile-time values by parameter name.
        num_warps: warps of a program.
        num_stages: stages of the software pipeline of its loops.
        trips: how often each loop over tiles runs in one program, by name, in source order. Loops
            that the constexprs compile away are absent.
    """

    name: str
    kernel: Any
    grid: tuple[int, int, int]
    arguments: Mapping[str, Any]
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int
    trips: Mapping[str, int] = field(default_factory=dict)

    def run(self) -> Any:
        """Launch on the current stream of the device that is current; the compiled kernel."""
        return self.kernel[self.grid](
            **self.arguments,
            **self.constexprs,
            num_warps=self.num_warps,
            num_stages=self.num_stages,
        )

    def compile_constexprs(self) -> dict[str, Any]:
        """Compile-time values by name: the constexprs, and None and 1 as Triton folds them."""
        general = {p.name for p in self.kernel.params if p.do_not_specialize}
        folded = {
            name: value
            for name, value in self.arguments.items()
            if value is None or (isinstance(value, int) and value == 1 and name not in general)
        }
        return {**self.constexprs, **folded}

    def signature(self) -> dict[str, str]:
        """Triton's type of each parameter, in order: "*bf16", "i32", "i64", "fp32", "constexpr"."""
        constexprs = self.compile_constexprs()
        types = {}
        for name in self.kernel.arg_names:
            value = self.arguments.get(name)
            if name in constexprs:
                types[name] = "constexpr"
            elif isinstance(value, torch.Tensor):
                types[name] = "*" + _TYPE_NAMES[value.dtype]
            elif isinstance(value, int):
                types[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            else:
                types[name] = "fp32"
        return types

    def divisible_by_16(self) -> list[str]:
        """Parameters that the launcher specialises as multiples of 16 (pointers: in bytes)."""
        constexprs = self.compile_constexprs()
        general = {
            p.name
            for p in self.kernel.params
            if p.do_not_specialize or p.do_not_specialize_on_alignment
        }
        return [
            name
            for name, value in self.arguments.items()
            if name not in constexprs
            and name not in general
            and (
                value.data_ptr() % 16 == 0
                if isinstance(value, torch.Tensor)
                else isinstance(value, int) and value % 16 == 0
            )
        ]


def run(launches: Iterable[Launch], device: torch.device) -> list[tuple[Launch, Any]]:
    """Run launches in order on `device`; those of an empty batch have nothing to do.

    Returns:
        What was launched, with the compiled kernels.
    """
    on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with on_device:
        return [(launch, launch.run()) for launch in launches if min(launch.grid) > 0]


def row_strides(view: torch.Tensor) -> tuple[int, int, int]:
    """Strides of (image, row, head) in elements; 0 along an axis of length 1."""
    batch, rows, heads = (
        s if n > 1 else 0 for s, n in zip(view.stride(), view.shape[:3], strict=False)
    )
    return batch, rows, heads


def alignment(*views: torch.Tensor) -> int:
    """Largest power of two, at most 16, that divides every row's address in bytes."""
    bits = 16
    for view in views:
        bits |= view.data_ptr()
        for stride in row_strides(view):
            bits |= stride * view.element_size()
    return bits & -bits


def stride_arguments(**views: torch.Tensor) -> dict[str, int]:
    """Stride arguments of (B, rows, H, d) views: `k=view` gives stride_kb, stride_kn, stride_kh.

    The rows of q and dq are called m, those of anything else n.
    """
    return {
        f"stride_{name}{dim}": stride
        for name, view in views.items()
        for dim, stride in zip(
            "bmh" if name.endswith("q") else "bnh", row_strides(view), strict=True
        )
    }


def common_meta(*views: torch.Tensor, images: int = 1, rows: int = 0) -> dict[str, Any]:
    """The constexprs that every kernel takes, from all the (B, rows, H, d) views that it reads.

    Args:
        images: how many images' rows a program numbers through.
        rows: how many packed keys and values of no view it numbers through.
    """
    head_dim = views[0].shape[-1]
    largest = max(
        (images * view.shape[1] + LARGEST_TILE) * view.stride(1 if view.shape[1] > 1 else 0)
        for view in views
    )
    largest = max(largest, (rows + LARGEST_TILE) * 2 * views[0].shape[2] * head_dim)
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_D": power_of_2_at_least(head_dim),
        "ALIGNMENT": alignment(*views),
        "INDEX": tl.int32 if largest < 2**31 else tl.int64,
    }


def power_of_2_at_least(size: int, smallest: int = 16) -> int:
    """The smallest power of two that is no smaller than `size` and `smallest`."""
    return max(smallest, 1 << (size - 1).bit_length())


def packed_offset(*pairs: tuple[torch.Tensor, torch.Tensor]) -> int | None:
    """Elements from a row of k to that of v if every pair (k, v) is packed alike, else None."""
    offsets: set[int] = set()
    for k, v in pairs:
        one_tensor = k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
        offset = int(v.storage_offset() - k.storage_offset())
        offsets.add(offset if one_tensor and row_strides(k) == row_strides(v) else 0)
    return offsets.pop() if len(offsets) == 1 and 0 not in offsets else None


def key_trips(num_keys: int, num_prompts: int, step: int, tail: int) -> dict[str, int]:
    """How often a query tile runs its loops: full prompt tiles, full token tiles, mixed tiles."""
    left = num_prompts % step + num_keys % step
    trips = {"prompts": num_prompts // step, "tokens": num_keys // step, "mixed": -(-left // tail)}
    if num_prompts < step:
        del trips["prompts"]
    return trips
