"""VAPT's feature projector, forward: from the token mixing to normalised prompts.

    g = (mixing * norm_weight + mixing_sum * norm_bias) * channel_mask + projector_bias
    P = g + up (relu(down g) * hidden_mask)                   y = norm1(P)

A program holds whole rows, in fp32.
"""

# mypy: disallow-untyped-defs=False

import triton
import triton.language as tl
from torch import Tensor

from ..runtime.launch import Launch, Target
from .inputs import FeatureInputs
from .tiles import feature_tiles


@triton.jit
def projector_output(
    mixing_ptr, mixing_sum_ptr, norm_weight_ptr, norm_bias_ptr, projector_bias_ptr,
    channel_mask_ptr,
    rows,  # [BLOCK_M], of B * P, int64
    image,  # [BLOCK_M], of each row
    prompt,  # [BLOCK_M], of each row
    dims,  # [BLOCK_D]
    exists,  # [BLOCK_M]
    WIDTH: tl.constexpr, HAS_PROJECTOR_BIAS: tl.constexpr, HAS_CHANNEL_MASK: tl.constexpr,
):  # fmt: skip
    """Return g [BLOCK_M, BLOCK_D] fp32, 0 outside, and the factors of its derivatives."""
    channel = dims < WIDTH
    mask = exists[:, None] & channel[None, :]
    mixing = tl.load(mixing_ptr + rows[:, None] * WIDTH + dims[None, :], mask=mask, other=0.0)
    norm_weight = tl.load(norm_weight_ptr + dims, mask=channel, other=0.0).to(tl.float32)
    norm_bias = tl.load(norm_bias_ptr + dims, mask=channel, other=0.0).to(tl.float32)
    mixing_sum = tl.load(mixing_sum_ptr + prompt, mask=exists, other=0.0)
    channel_mask = tl.full([rows.shape[0], dims.shape[0]], 1.0, tl.float32)
    if HAS_CHANNEL_MASK:
        mask_rows = channel_mask_ptr + image.to(tl.int64)[:, None] * WIDTH
        channel_mask = tl.load(mask_rows + dims[None, :], mask=mask, other=0.0)
    g = (mixing * norm_weight[None, :] + mixing_sum[:, None] * norm_bias[None, :]) * channel_mask
    if HAS_PROJECTOR_BIAS:
        projector_bias = tl.load(projector_bias_ptr + prompt, mask=exists, other=0.0).to(tl.float32)
        g = tl.where(mask, g + projector_bias[:, None], 0.0)
    return g, mixing, norm_weight, norm_bias, mixing_sum, channel_mask


@triton.jit
def hidden_unit(
    g, j, rows, dims, exists, down_ptr, hidden_mask_ptr, HIDDEN_DIM,
    WIDTH: tl.constexpr, HAS_HIDDEN_MASK: tl.constexpr,
):  # fmt: skip
    """Return unit j before relu, its factor (derivative of relu times mask), and down's row j."""
    down = tl.load(down_ptr + j * WIDTH + dims, mask=dims < WIDTH, other=0.0).to(tl.float32)
    before = tl.sum(g * down[None, :], 1)
    factor = tl.where(before > 0, 1.0, 0.0)
    if HAS_HIDDEN_MASK:
        factor *= tl.load(hidden_mask_ptr + rows * HIDDEN_DIM + j, mask=exists, other=0.0)
    return before, factor, down


@triton.jit(do_not_specialize=("num_rows", "num_prompts"))
def features_kernel(
    mixing_ptr,  # (B, P, D) fp32, contiguous
    mixing_sum_ptr,  # (P,) fp32
    norm_weight_ptr,  # (D,)
    norm_bias_ptr,  # (D,)
    projector_bias_ptr,  # (P,)
    channel_mask_ptr,  # (B, D) fp32
    down_ptr,  # (HIDDEN_DIM, D), contiguous
    up_ptr,  # (D, HIDDEN_DIM), contiguous
    hidden_mask_ptr,  # (B, P, HIDDEN_DIM) fp32
    norm1_weight_ptr,  # (D,)
    norm1_bias_ptr,  # (D,)
    out_ptr,  # (B, P, D)
    mean_ptr,  # (B * P,) fp32
    rstd_ptr,  # (B * P,) fp32
    num_rows,  # B * P
    num_prompts, norm1_eps, WIDTH: tl.constexpr, HIDDEN_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr, HAS_PROJECTOR_BIAS: tl.constexpr, HAS_CHANNEL_MASK: tl.constexpr,
    HAS_HIDDEN_MASK: tl.constexpr, RESIDUAL: tl.constexpr, HAS_NORM1_WEIGHT: tl.constexpr,
    HAS_NORM1_BIAS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    exists = rows < num_rows
    image, prompt = rows // num_prompts, rows % num_prompts
    rows = rows.to(tl.int64)
    channel = dims < WIDTH
    g, mixing, norm_weight, norm_bias, mixing_sum, channel_mask = projector_output(
        mixing_ptr, mixing_sum_ptr, norm_weight_ptr, norm_bias_ptr, projector_bias_ptr,
        channel_mask_ptr, rows, image, prompt, dims, exists, WIDTH, HAS_PROJECTOR_BIAS,
        HAS_CHANNEL_MASK,
    )  # fmt: skip
    prompts = g if RESIDUAL else tl.zeros_like(g)
    for j in range(HIDDEN_DIM):
        before, factor, _ = hidden_unit(
            g, j, rows, dims, exists, down_ptr, hidden_mask_ptr, HIDDEN_DIM, WIDTH, HAS_HIDDEN_MASK
        )
        up = tl.load(up_ptr + dims * HIDDEN_DIM + j, mask=channel, other=0.0).to(tl.float32)
        prompts += (before * factor)[:, None] * up[None, :]
    mean = tl.sum(prompts, 1) / WIDTH
    centred = tl.where(channel[None, :], prompts - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(centred * centred, 1) / WIDTH + norm1_eps)
    y = centred * rstd[:, None]
    if HAS_NORM1_WEIGHT:
        y *= tl.load(norm1_weight_ptr + dims, mask=channel, other=0.0).to(tl.float32)[None, :]
    if HAS_NORM1_BIAS:
        y += tl.load(norm1_bias_ptr + dims, mask=channel, other=0.0).to(tl.float32)[None, :]
    mask = exists[:, None] & channel[None, :]
    out = out_ptr + rows[:, None] * WIDTH + dims[None, :]
    tl.store(out, y.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + rows, mean, mask=exists)
    tl.store(rstd_ptr + rows, rstd, mask=exists)


_OPTIONAL = ("projector_bias", "channel_mask", "hidden_mask", "norm1_weight", "norm1_bias")


def feature_arguments(
    inputs: FeatureInputs, **others: Tensor | None
) -> tuple[dict[str, Tensor], dict[str, bool]]:
    """Return pointers by name, `mixing` in place of None, and the flags of optional tensors."""
    tensors = {**inputs._asdict(), **others}
    pointers = {f"{name}_ptr": inputs.mixing if t is None else t for name, t in tensors.items()}
    flags = {f"HAS_{n.upper()}": tensors[n] is not None for n in _OPTIONAL if n in tensors}
    return pointers, flags


def features_launch(
    inputs: FeatureInputs,
    norm1_weight: Tensor | None,
    norm1_bias: Tensor | None,
    out: Tensor,
    mean: Tensor,
    rstd: Tensor,
    residual: bool,
    norm1_eps: float,
    target: Target,
) -> Launch:
    """Return the launch that fills `out` (B, p, D), `mean` and `rstd` (B, p) fp32.

    Args:
        inputs: Inputs of the feature projector.
        norm1_weight, norm1_bias: Weight and bias of norm1, (D,) or None.
        out, mean, rstd: Normalised prompts and the statistics of their rows; written.
        residual: Whether g is added to the feature projector's output.
        norm1_eps: Epsilon of norm1.
        target: Target to tune for.
    """
    batch, prompts, width = inputs.mixing.shape
    tiles = feature_tiles(width, target)
    pointers, flags = feature_arguments(inputs, norm1_weight=norm1_weight, norm1_bias=norm1_bias)
    return Launch(
        name="features",
        kernel=features_kernel,
        grid=(triton.cdiv(batch * prompts, tiles.rows), 1, 1),
        arguments={
            **pointers, "out_ptr": out, "mean_ptr": mean, "rstd_ptr": rstd,
            "num_rows": batch * prompts, "num_prompts": prompts, "norm1_eps": norm1_eps,
        },
        constexprs={
            **flags, "WIDTH": width, "HIDDEN_DIM": inputs.down.shape[0],
            "BLOCK_M": tiles.rows, "BLOCK_D": tiles.width, "RESIDUAL": residual,
        },
        num_warps=tiles.num_warps, num_stages=1,
    )  # fmt: skip
