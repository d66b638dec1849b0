"""A kernel launch as a value, which can also be compiled and read without a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import triton.language as tl

from ..constants import LARGEST_TILE


class Target(NamedTuple):
    """Target to tune a launch for: a CUDA compute capability (80, 90, ...) or an AMD GPU."""

    capability: int
    hip: bool = False

    @property
    def is_hopper(self) -> bool:
        """Whether times that were measured on an H200 hold for this target."""
        return self.capability == 90 and not self.hip


def target_of(tensor: torch.Tensor) -> Target:
    """Return the target of a tensor's device; sm_80 where that is no GPU."""
    if tensor.device.type != "cuda":
        return Target(80)
    if torch.version.hip is not None:
        return Target(0, hip=True)
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return Target(10 * major + minor)


def exact_precision(target: Target) -> str:
    """Return the input precision of exact fp32 products: three tf32 products, or IEEE on AMD."""
    return "ieee" if target.hip else "tf32x3"


@dataclass(frozen=True)
class Launch:
    """One launch of one kernel.

    Attributes:
        name: Name for reports.
        kernel: `triton.jit` function.
        grid: Programs along the three axes.
        arguments: Tensors and numbers by parameter name, without the constexprs; None for a pointer
            that is not used with these constexprs.
        constexprs: Compile-time values by parameter name.
        num_warps: Warps of a program.
        num_stages: Stages of the software pipeline of its loops.
        trips: Trip count of each loop over tiles in one program, by name, in source order. Loops
            that the constexprs remove are absent.
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
        """Launch on the current device and stream; return the compiled kernel."""
        return self.kernel[self.grid](
            **self.arguments,
            **self.constexprs,
            num_warps=self.num_warps,
            num_stages=self.num_stages,
        )


def run(launches: Iterable[Launch], device: torch.device) -> list[tuple[Launch, Any]]:
    """Run launches in order on `device`, without those that have no programs.

    Returns:
        The launches that ran, and their compiled kernels.
    """
    on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with on_device:
        return [(launch, launch.run()) for launch in launches if min(launch.grid) > 0]


def row_strides(view: torch.Tensor) -> tuple[int, int, int]:
    """Return the strides of (image, row, head) in elements; 0 along an axis of length 1."""
    batch, rows, heads = (
        s if n > 1 else 0 for s, n in zip(view.stride(), view.shape[:3], strict=False)
    )
    return batch, rows, heads


def alignment(*views: torch.Tensor) -> int:
    """Return the largest power of two, at most 16, that divides every row's address in bytes."""
    bits = 16
    for view in views:
        bits |= view.data_ptr()
        for stride in row_strides(view):
            bits |= stride * view.element_size()
    return bits & -bits


def stride_arguments(**views: torch.Tensor) -> dict[str, int]:
    """Return the stride arguments of (B, rows, H, d) views: stride_kb, stride_kn, stride_kh of `k`.

    Rows of q and dq have the index m, all others n.
    """
    return {
        f"stride_{name}{dim}": stride
        for name, view in views.items()
        for dim, stride in zip(
            "bmh" if name.endswith("q") else "bnh", row_strides(view), strict=True
        )
    }


def common_meta(*views: torch.Tensor, images: int = 1, rows: int = 0) -> dict[str, Any]:
    """Return the constexprs that every kernel takes.

    Args:
        views: All (B, rows, H, d) views that the kernel reads.
        images: Number of images whose rows a program indexes from one pointer.
        rows: Rows of packed keys and values without a view that it indexes from one pointer.
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


def power_of_2_at_least(size: int) -> int:
    """Return the smallest power of two that is at least `size` and 16."""
    return max(16, 1 << (size - 1).bit_length())


def packed_offset(*pairs: tuple[torch.Tensor, torch.Tensor]) -> int | None:
    """Return the elements from k to v if all pairs (k, v) are packed with one offset, else None."""
    offsets: set[int] = set()
    for k, v in pairs:
        one_tensor = k.untyped_storage().data_ptr() == v.untyped_storage().data_ptr()
        offset = int(v.storage_offset() - k.storage_offset())
        offsets.add(offset if one_tensor and row_strides(k) == row_strides(v) else 0)
    return offsets.pop() if len(offsets) == 1 and 0 not in offsets else None


def key_trips(num_keys: int, num_prompts: int, step: int, tail: int) -> dict[str, int]:
    """Return the trip counts of a query tile's loops over full prompt, full token, mixed tiles."""
    left = num_prompts % step + num_keys % step
    trips = {"prompts": num_prompts // step, "tokens": num_keys // step, "mixed": -(-left // tail)}
    if num_prompts < step:
        del trips["prompts"]
    return trips
