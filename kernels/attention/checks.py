"""Checks of what is given to prompt attention: every message names the value and the fix."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..constants import MAX_HEAD_DIM

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""Dtypes of tokens and prompts."""

# CUDA's limit on the second and third axes of a grid, which count heads and images.
_MAX_GRID = 65535


def check_inputs(
    tokens: Sequence[torch.Tensor], prompts: Sequence[torch.Tensor], scale: float
) -> None:
    """Raise unless prompt attention can take these tensors (see launches.py for the shapes).

    Raises:
        TypeError: a dtype that is not supported, or dtypes that differ.
        ValueError: counts, shapes, strides, devices or a scale that do not fit.
    """
    if not 1 <= len(tokens) <= 3:
        raise ValueError(f"tokens must be 1, 2 or 3 tensors, not {len(tokens)}")
    if len(prompts) > 2:
        raise ValueError(f"prompts must be 0, 1 or 2 tensors, not {len(prompts)}")
    token_names = (["qkv"], ["q", "kv"], ["q", "k", "v"])[len(tokens) - 1]
    prompt_names = ([], ["prompt kv"], ["prompt k", "prompt v"])[len(prompts)]
    named = dict(zip(token_names + prompt_names, (*tokens, *prompts), strict=True))
    first = tokens[0]
    if first.dtype not in DTYPES:
        raise TypeError(f"{token_names[0]} is {first.dtype}; cast it to fp32, fp16 or bf16")
    for name, tensor in named.items():
        _check_tensor(name, tensor, token_names[0], first)
    rows = None
    for name, tensor in named.items():
        if name.startswith("prompt") or name == "q":
            continue
        rows = rows if rows is not None else tensor.shape[1]
        if tensor.shape[1] != rows:
            raise ValueError(f"{name} has {tensor.shape[1]} rows where k has {rows}")
    if len(prompts) == 2 and prompts[0].shape != prompts[1].shape:
        raise ValueError(
            f"prompt k is {tuple(prompts[0].shape)} and prompt v {tuple(prompts[1].shape)}; "
            "they must have one shape"
        )
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale must be positive and finite, not {scale}; it is usually d**-0.5")


def _check_tensor(name: str, tensor: torch.Tensor, first_name: str, first: torch.Tensor) -> None:
    packed = {"qkv": 3, "kv": 2, "prompt kv": 2}.get(name)
    batch, heads, dim = first.shape[0], first.shape[-2], first.shape[-1]
    if tensor.dtype != first.dtype:
        raise TypeError(f"{name} is {tensor.dtype} and {first_name} {first.dtype}; cast one")
    if tensor.device != first.device:
        raise ValueError(f"{name} is on {tensor.device} and {first_name} on {first.device}")
    layout = "(B, rows, H, d)" if packed is None else f"(B, rows, {packed}, H, d)"
    if tensor.ndim != (4 if packed is None else 5) or (packed and tensor.shape[2] != packed):
        raise ValueError(f"{name} must be {layout}, not {tuple(tensor.shape)}")
    if tensor.shape[-2:] != first.shape[-2:]:
        raise ValueError(
            f"{name} has {tensor.shape[-2]} heads of {tensor.shape[-1]} channels where "
            f"{first_name} has {heads} of {dim}"
        )
    is_prompt = name.startswith("prompt")
    if tensor.shape[0] != batch and not (is_prompt and tensor.shape[0] == 1):
        raise ValueError(
            f"{name} has a leading dimension of {tensor.shape[0]} where {first_name} has {batch}"
            + (" (1 is also allowed)" if is_prompt else "")
        )
    if not 1 <= dim <= MAX_HEAD_DIM:
        raise ValueError(f"{name} has {dim} channels a head; 1 to {MAX_HEAD_DIM} are supported")
    if heads < 1 or heads > _MAX_GRID or batch > _MAX_GRID:
        raise ValueError(f"{name} has {batch} images of {heads} heads; at most {_MAX_GRID} each")
    if tensor.shape[1] < 1 and not is_prompt:
        raise ValueError(f"{name} has no rows: {tuple(tensor.shape)}")
    if dim > 1 and tensor.stride(-1) != 1:
        raise ValueError(
            f"{name}'s last dimension has stride {tensor.stride(-1)}; call .contiguous() on it"
        )


def check_saved(
    q: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, grad_out: torch.Tensor
) -> None:
    """Raise unless the forward's results and the gradient belong to the queries q (B, M, H, d).

    Raises:
        TypeError: a dtype that is not the one expected.
        ValueError: a shape that is not the one expected.
    """
    batch, num_queries, heads, dim = q.shape
    shape = (batch, num_queries, heads * dim)
    for name, tensor, expected, dtype in (
        ("out", out, shape, q.dtype),
        ("grad_out", grad_out, shape, q.dtype),
        ("lse", lse, (batch, heads, num_queries), torch.float32),
    ):
        if tensor.dtype != dtype:
            raise TypeError(f"{name} is {tensor.dtype} where {dtype} is expected; cast it")
        if tuple(tensor.shape) != expected:
            raise ValueError(f"{name} is {tuple(tensor.shape)} where {expected} is expected")
        if tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device} and the queries on {q.device}")
