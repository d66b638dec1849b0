"""From VAPT's mixed patches to normalised prompts: affine, dropouts, feature projector and norm1.

    g = (mixed * weight + mix_sum * shift) * channels + bias
    P = g + up (relu(down g) * hidden)                        y = norm1(P)

A program holds whole rows, in fp32.
"""

# mypy: disallow-untyped-defs=False

from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl

from ..runtime.launch import Launch, Target
from .tiles import feature_tiles


@triton.jit
def mixed_to_features(
    mixed_ptr, mix_sum_ptr, weight_ptr, shift_ptr, bias_ptr, channels_ptr,
    rows,  # [BLOCK_M], of B * P, int64
    image,  # [BLOCK_M], of each row
    prompt,  # [BLOCK_M], of each row
    dims,  # [BLOCK_D]
    exists,  # [BLOCK_M]
    WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CHANNELS: tl.constexpr,
):  # fmt: skip
    """g [BLOCK_M, BLOCK_D] fp32, and what is needed to differentiate it; 0 outside."""
    channel = dims < WIDTH
    mask = exists[:, None] & channel[None, :]
    mixed = tl.load(mixed_ptr + rows[:, None] * WIDTH + dims[None, :], mask=mask, other=0.0)
    weight = tl.load(weight_ptr + dims, mask=channel, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + dims, mask=channel, other=0.0).to(tl.float32)
    mix_sum = tl.load(mix_sum_ptr + prompt, mask=exists, other=0.0)
    kept = tl.full([rows.shape[0], dims.shape[0]], 1.0, tl.float32)
    if HAS_CHANNELS:
        kept = tl.load(
            channels_ptr + image.to(tl.int64)[:, None] * WIDTH + dims[None, :], mask=mask, other=0.0
        )
    g = (mixed * weight[None, :] + mix_sum[:, None] * shift[None, :]) * kept
    if HAS_BIAS:
        bias = tl.load(bias_ptr + prompt, mask=exists, other=0.0).to(tl.float32)
        g = tl.where(mask, g + bias[:, None], 0.0)
    return g, mixed, weight, shift, mix_sum, kept


@triton.jit
def hidden_unit(
    g, j, rows, dims, exists, down_ptr, hidden_ptr, HIDDEN_DIM,
    WIDTH: tl.constexpr, HAS_HIDDEN: tl.constexpr,
):  # fmt: skip
    """Unit j before its relu, its factor (dropout, and 0 where relu is), and down's row j."""
    down = tl.load(down_ptr + j * WIDTH + dims, mask=dims < WIDTH, other=0.0).to(tl.float32)
    before = tl.sum(g * down[None, :], 1)
    factor = tl.where(before > 0, 1.0, 0.0)
    if HAS_HIDDEN:
        factor *= tl.load(hidden_ptr + rows * HIDDEN_DIM + j, mask=exists, other=0.0)
    return before, factor, down


@triton.jit(do_not_specialize=("num_rows", "num_prompts"))
def features_kernel(
    mixed_ptr,  # (B, P, D) fp32, contiguous
    mix_sum_ptr,  # (P,) fp32
    weight_ptr,  # (D,)
    shift_ptr,  # (D,)
    bias_ptr,  # (P,)
    channels_ptr,  # (B, D) fp32
    down_ptr,  # (HIDDEN_DIM, D), contiguous
    up_ptr,  # (D, HIDDEN_DIM), contiguous
    hidden_ptr,  # (B, P, HIDDEN_DIM) fp32
    norm_weight_ptr,  # (D,)
    norm_bias_ptr,  # (D,)
    out_ptr,  # (B, P, D)
    mean_ptr,  # (B * P,) fp32
    rstd_ptr,  # (B * P,) fp32
    num_rows,  # B * P
    num_prompts,
    norm_eps,
    WIDTH: tl.constexpr,
    HIDDEN_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CHANNELS: tl.constexpr,
    HAS_HIDDEN: tl.constexpr,
    RESIDUAL: tl.constexpr,
    HAS_NORM_WEIGHT: tl.constexpr,
    HAS_NORM_BIAS: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    exists = rows < num_rows
    image, prompt = rows // num_prompts, rows % num_prompts
    rows = rows.to(tl.int64)
    channel = dims < WIDTH
    g, mixed, weight, shift, mix_sum, kept = mixed_to_features(
        mixed_ptr, mix_sum_ptr, weight_ptr, shift_ptr, bias_ptr, channels_ptr,
        rows, image, prompt, dims, exists, WIDTH, HAS_BIAS, HAS_CHANNELS,
    )  # fmt: skip
    prompts = g if RESIDUAL else tl.zeros_like(g)
    for j in range(HIDDEN_DIM):
        before, factor, _ = hidden_unit(
            g, j, rows, dims, exists, down_ptr, hidden_ptr, HIDDEN_DIM, WIDTH, HAS_HIDDEN
        )
        up = tl.load(up_ptr + dims * HIDDEN_DIM + j, mask=channel, other=0.0).to(tl.float32)
        prompts += (before * factor)[:, None] * up[None, :]
    mean = tl.sum(prompts, 1) / WIDTH
    centred = tl.where(channel[None, :], prompts - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, 1) / WIDTH + norm_eps)
    y = centred * rstd[:, None]
    if HAS_NORM_WEIGHT:
        y *= tl.load(norm_weight_ptr + dims, mask=channel, other=0.0).to(tl.float32)[None, :]
    if HAS_NORM_BIAS:
        y += tl.load(norm_bias_ptr + dims, mask=channel, other=0.0).to(tl.float32)[None, :]
    mask = exists[:, None] & channel[None, :]
    out = out_ptr + rows[:, None] * WIDTH + dims[None, :]
    tl.store(out, y.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + rows, mean, mask=exists)
    tl.store(rstd_ptr + rows, rstd, mask=exists)


def feature_inputs(
    mixed: torch.Tensor, tensors: Mapping[str, torch.Tensor | None]
) -> tuple[dict[str, Any], dict[str, bool]]:
    """Pointers by name and whether optional tensors are there; `mixed` stands in for those."""
    optional = {"bias", "channels", "hidden", "norm_weight", "norm_bias"}
    pointers = {f"{name}_ptr": mixed if t is None else t for name, t in tensors.items()}
    flags = {f"HAS_{name.upper()}": tensors[name] is not None for name in optional & tensors.keys()}
    return {"mixed_ptr": mixed, **pointers}, flags


def features_launch(
    mixed: torch.Tensor,
    tensors: Mapping[str, torch.Tensor | None],
    residual: bool,
    out: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    norm_eps: float,
    target: Target,
) -> Launch:
    """The launch that fills `out` (B, p, D), `mean` and `rstd` (B, p) fp32.

    Args:
        mixed: (B, p, D) fp32.
        tensors: mix_sum, weight, shift, bias, channels, down, up, hidden, norm_weight, norm_bias.
        residual: whether g is added.
        out, mean, rstd: outputs.
        norm_eps: norm1's epsilon.
        target: what to tune for.
    """
    batch, prompts, width = mixed.shape
    tiles = feature_tiles(width, target)
    pointers, flags = feature_inputs(mixed, tensors)
    down: Any = tensors["down"]
    return Launch(
        name="features",
        kernel=features_kernel,
        grid=(triton.cdiv(batch * prompts, tiles.rows), 1, 1),
        arguments={
            **pointers, "out_ptr": out, "mean_ptr": mean, "rstd_ptr": rstd,
            "num_rows": batch * prompts, "num_prompts": prompts, "norm_eps": norm_eps,
        },
        constexprs={
            **flags, "WIDTH": width, "HIDDEN_DIM": down.shape[0],
            "BLOCK_M": tiles.rows, "BLOCK_D": tiles.width, "RESIDUAL": residual,
        },
        num_warps=tiles.num_warps,
        num_stages=1,
    )  # fmt: skip
