"""Checks of attention's tensors, for the kernels and for the operators. No triton is needed.

Every message names the value and the fix. `launches` describes the shapes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..constants import MAX_HEAD_DIM

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Dtypes of tokens and prompts that the kernels take."""

_TOKEN_NAMES = (("qkv",), ("q", "kv"), ("q", "k", "v"))
_PROMPT_NAMES = ((), ("prompt kv",), ("prompt k", "prompt v"))
_PACKED = {"qkv": 3, "kv": 2, "prompt kv": 2}

# CUDA's limit on the second and third axes of a grid, which count heads and images.
_MAX_GRID = 65535


def check_shapes(tokens: Sequence[Tensor], prompts: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return the tensors by name; raise ValueError unless their shapes and devices fit."""
    if not 1 <= len(tokens) <= 3:
        raise ValueError(f"tokens must be 1, 2 or 3 tensors, not {len(tokens)}")
    if len(prompts) > 2:
        raise ValueError(f"prompts must be 0, 1 or 2 tensors, not {len(prompts)}")
    names = _TOKEN_NAMES[len(tokens) - 1] + _PROMPT_NAMES[len(prompts)]
    named = dict(zip(names, (*tokens, *prompts), strict=True))
    for name, tensor in named.items():
        _check_shape(name, tensor, names[0], tokens[0])
    if len(tokens) == 3 and tokens[1].shape[1] != tokens[2].shape[1]:
        raise ValueError(f"v has {tokens[2].shape[1]} rows where k has {tokens[1].shape[1]}")
    if len(prompts) == 2 and prompts[0].shape != prompts[1].shape:
        raise ValueError(
            f"prompt k is {tuple(prompts[0].shape)} and prompt v {tuple(prompts[1].shape)}; "
            "they must have one shape"
        )
    return named


def _check_shape(name: str, tensor: Tensor, first_name: str, first: Tensor) -> None:
    packed = _PACKED.get(name)
    layout = "(B, rows, H, d)" if packed is None else f"(B, rows, {packed}, H, d)"
    if tensor.ndim != (4 if packed is None else 5) or (packed and tensor.shape[2] != packed):
        raise ValueError(f"{name} must be {layout}, not {tuple(tensor.shape)}")
    if tensor.shape[-2:] != first.shape[-2:]:
        raise ValueError(
            f"{name} has {tensor.shape[-2]} heads of {tensor.shape[-1]} channels where "
            f"{first_name} has {first.shape[-2]} of {first.shape[-1]}"
        )
    is_prompt = name.startswith("prompt")
    if tensor.shape[0] != first.shape[0] and not (is_prompt and tensor.shape[0] == 1):
        raise ValueError(
            f"{name} has a leading dimension of {tensor.shape[0]} where {first_name} has "
            f"{first.shape[0]}" + (" (1 is also allowed)" if is_prompt else "")
        )
    if tensor.device != first.device:
        raise ValueError(f"{name} is on {tensor.device} and {first_name} on {first.device}")


def check_dtypes(named: Mapping[str, Tensor | None]) -> None:
    """Raise TypeError unless all tensors have the dtype of the first."""
    (first_name, first), *others = named.items()
    for name, tensor in others:
        if tensor is not None and first is not None and tensor.dtype != first.dtype:
            raise TypeError(f"{name} is {tensor.dtype} and {first_name} {first.dtype}; cast one")


def check_pools(
    q: Tensor,
    cached: Tensor,
    computed: Tensor,
    row_offsets: Tensor,
    counts: Tensor,
    max_prompts: int,
) -> None:
    """Raise unless pools of prompts, row offsets and counts fit the queries q (B, M, H, d).

    Raises:
        TypeError: Row offsets or counts are not int64.
        ValueError: Shapes or devices do not fit, or `max_prompts` is negative.
    """
    batch, _, heads, dim = q.shape
    for name, pool in (("cached", cached), ("computed", computed)):
        if pool.ndim != 4 or tuple(pool.shape[1:]) != (2, heads, dim):
            raise ValueError(f"{name} must be (rows, 2, {heads}, {dim}), not {tuple(pool.shape)}")
    rows = {"row_offsets": row_offsets, "counts": counts}
    for name, tensor in rows.items():
        if tensor.dtype != torch.int64:
            raise TypeError(f"{name} is {tensor.dtype}; cast it to int64")
        if tuple(tensor.shape) != (batch,):
            raise ValueError(f"{name} must be ({batch},), not {tuple(tensor.shape)}")
    for name, tensor in {"cached": cached, "computed": computed, **rows}.items():
        if tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device} and the tokens on {q.device}")
    if max_prompts < 0:
        raise ValueError(f"max_prompts is {max_prompts}; it must be 0 or more")


def check_inputs(tokens: Sequence[Tensor], prompts: Sequence[Tensor], scale: float) -> None:
    """Raise unless the kernels of prompt attention take these tensors.

    Raises:
        TypeError: A dtype is not supported, or dtypes differ.
        ValueError: Counts, shapes, strides, devices or the scale do not fit.
    """
    named = check_shapes(tokens, prompts)
    first_name, first = next(iter(named.items()))
    if first.dtype not in DTYPES:
        raise TypeError(f"{first_name} is {first.dtype}; cast it to fp32, fp16 or bf16")
    check_dtypes(named)
    batch, heads, dim = first.shape[0], first.shape[-2], first.shape[-1]
    if not 1 <= dim <= MAX_HEAD_DIM:
        raise ValueError(f"{first_name} has {dim} channels a head; use 1 to {MAX_HEAD_DIM}")
    if heads < 1 or heads > _MAX_GRID or batch > _MAX_GRID:
        raise ValueError(
            f"{first_name} has {batch} images of {heads} heads; at most {_MAX_GRID} each"
        )
    for name, tensor in named.items():
        if tensor.shape[1] < 1 and not name.startswith("prompt"):
            raise ValueError(f"{name} has no rows: {tuple(tensor.shape)}")
        if dim > 1 and tensor.stride(-1) != 1:
            raise ValueError(
                f"{name}'s last dimension has stride {tensor.stride(-1)}; call .contiguous() on it"
            )
    check_scale(scale)


def check_scale(scale: float) -> None:
    """Raise ValueError unless the kernels can multiply scores by `scale`."""
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale must be positive and finite, not {scale}; it is usually d**-0.5")


def check_saved(
    shape: tuple[int, ...],
    lse_shape: tuple[int, ...],
    like: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
) -> None:
    """Raise unless the forward's results and their gradient belong to the backward's tokens.

    Args:
        shape, lse_shape: Shapes of `out` and `grad_out`, and of `lse`.
        like: Tensor that has the dtype and device of `out` and `grad_out`; `lse` is fp32.
        out, lse, grad_out: Results of the forward pass, and the gradient of `out`.

    Raises:
        TypeError: A dtype is not the expected one.
        ValueError: A shape or device is not the expected one.
    """
    for name, tensor, expected, dtype in (
        ("out", out, shape, like.dtype),
        ("grad_out", grad_out, shape, like.dtype),
        ("lse", lse, lse_shape, torch.float32),
    ):
        if tensor.dtype != dtype:
            raise TypeError(f"{name} is {tensor.dtype} where {dtype} is expected; cast it")
        if tuple(tensor.shape) != expected:
            raise ValueError(f"{name} is {tuple(tensor.shape)} where {expected} is expected")
        if tensor.device != like.device:
            raise ValueError(f"{name} is on {tensor.device} and the queries on {like.device}")
