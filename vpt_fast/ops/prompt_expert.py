"""VAPT's prompt experts as operators of PyTorch's.

    fold_convolution   convolution and token-wise projector as one (p, gh * gw) matrix
    mix_tokens         norm1 of the tokens, and that matrix times their normalised patches
    project_features   affine, dropouts, feature projector and norm1 of the p rows

"Revisit Visual Prompt Tuning: The Expressiveness of Prompt Experts" (ICLR 2026, arXiv 2501.18936),
section 4. CUDA tensors go to the Triton kernels of `vpt_fast.kernels.prompt_expert`, anything else
to `prompt_expert_reference`. Statistics and everything of the prompts are fp32 at least.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from vpt_fast.kernels.expert_inputs import FeatureInputs
from vpt_fast.ops import prompt_expert_reference as reference
from vpt_fast.ops.backend import statistics_dtype, uses_kernels

_KERNEL_COLUMNS = 64
"""The kernels read the folded matrix in tiles without masks: its rows are padded with zeros."""


def _implementation(tensor: Tensor) -> ModuleType:
    if uses_kernels(tensor):
        from vpt_fast.kernels import prompt_expert as kernels  # triton is not everywhere

        return kernels
    return reference


def _in_full_precision(tensor: Tensor) -> AbstractContextManager[None]:
    """Autocast would round the prompts' matrix products."""
    return torch.autocast(tensor.device.type, enabled=False)


# --- folding ---------------------------------------------------------------------------------


@torch.library.custom_op("vpt_fast::fold_convolution", mutates_args=())
def _fold(
    weight: Tensor, kernel: Tensor, rows: int, columns: int, padded: int
) -> tuple[Tensor, Tensor]:
    return _implementation(weight).fold_forward(weight, kernel, (rows, columns), padded)


@_fold.register_fake
def _(
    weight: Tensor, kernel: Tensor, rows: int, columns: int, padded: int
) -> tuple[Tensor, Tensor]:
    dtype, prompts = statistics_dtype(weight.dtype), weight.shape[0]
    return (
        weight.new_empty(prompts, padded, dtype=dtype),
        weight.new_empty(prompts, dtype=dtype),
    )


@torch.library.custom_op("vpt_fast::fold_convolution_backward", mutates_args=())
def _fold_backward(
    weight: Tensor, kernel: Tensor, grad_mix: Tensor, grad_sum: Tensor, rows: int, columns: int
) -> tuple[Tensor, Tensor]:
    return _implementation(weight).fold_backward(
        weight, kernel, grad_mix, grad_sum, (rows, columns)
    )


@_fold_backward.register_fake
def _(
    weight: Tensor, kernel: Tensor, grad_mix: Tensor, grad_sum: Tensor, rows: int, columns: int
) -> tuple[Tensor, Tensor]:
    return weight.new_empty(weight.shape), kernel.new_empty(kernel.shape)


def _fold_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    weight, kernel, ctx.rows, ctx.columns, _ = inputs
    ctx.save_for_backward(weight, kernel)


def _fold_gradients(ctx, grad_mix, grad_sum):  # type: ignore[no-untyped-def]
    weight, kernel = ctx.saved_tensors
    with _in_full_precision(weight):
        grads = _fold_backward(
            weight, kernel, grad_mix.contiguous(), grad_sum.contiguous(), ctx.rows, ctx.columns
        )
    return *grads, None, None, None


_fold.register_autograd(_fold_gradients, setup_context=_fold_setup)


def fold_convolution(
    weight: Tensor, kernel: Tensor, grid: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Fold a convolution over the patch grid and a projector of its output into one matrix.

    Args:
        weight: the token-wise projector, (p, gh' * gw') with gh' = gh - K + 1, gw' = gw - K + 1.
        kernel: the convolution, (1, 1, K, K): stride 1, no padding, one for all channels.
        grid: (gh, gw).

    Returns:
        The matrix (p, at least gh * gw), fp32 at least, whose further columns are 0, and its row
        sums (p,).
    """
    count = grid[0] * grid[1]
    step = _KERNEL_COLUMNS if uses_kernels(weight) else 1
    with _in_full_precision(weight):
        return _fold(weight, kernel, grid[0], grid[1], -(-count // step) * step)


# --- mixing ----------------------------------------------------------------------------------


@torch.library.custom_op("vpt_fast::mix_tokens", mutates_args=())
def _mix(
    x: Tensor,
    mix: Tensor,
    patches: int,
    weight: Tensor | None,
    bias: Tensor | None,
    norm_eps: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return _implementation(x).mix_forward(x, mix, patches, weight, bias, norm_eps, eps)


@_mix.register_fake
def _(
    x: Tensor,
    mix: Tensor,
    patches: int,
    weight: Tensor | None,
    bias: Tensor | None,
    norm_eps: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    (batch, rows, width), wide = x.shape, statistics_dtype(x.dtype)
    return (
        x.new_empty(batch, rows, width),
        x.new_empty(batch, mix.shape[0], width, dtype=wide),
        x.new_empty(3, batch, rows, dtype=wide),
    )


@torch.library.custom_op("vpt_fast::mix_tokens_backward", mutates_args=())
def _mix_backward(
    x: Tensor,
    mix: Tensor,
    patches: int,
    weight: Tensor | None,
    statistics: Tensor,
    grad_y: Tensor,
    grad_mixed: Tensor,
    needs_x: bool,
    needs_mix: bool,
) -> list[Tensor]:
    return _implementation(x).mix_backward(
        x, mix, patches, weight, statistics, grad_y, grad_mixed, needs_x, needs_mix
    )


@_mix_backward.register_fake
def _(
    x: Tensor,
    mix: Tensor,
    patches: int,
    weight: Tensor | None,
    statistics: Tensor,
    grad_y: Tensor,
    grad_mixed: Tensor,
    needs_x: bool,
    needs_mix: bool,
) -> list[Tensor]:
    asked = [*([x] if needs_x else []), *([mix] if needs_mix else [])]
    return [t.new_empty(t.shape) for t in asked]


def _mix_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, mix, ctx.patches, weight, _, _, _ = inputs
    _, _, statistics = output
    ctx.mark_non_differentiable(statistics)
    ctx.save_for_backward(x, mix, weight, statistics)


def _mix_gradients(ctx, grad_y, grad_mixed, *_):  # type: ignore[no-untyped-def]
    x, mix, weight, statistics = ctx.saved_tensors
    needs_x, needs_mix = ctx.needs_input_grad[:2]
    if any(ctx.needs_input_grad[3:5]):
        raise RuntimeError("mix_tokens has no gradient of norm1's weight and bias")
    with _in_full_precision(x):
        grads = _mix_backward(
            x, mix, ctx.patches, weight, statistics, grad_y.contiguous(), grad_mixed.contiguous(),
            needs_x, needs_mix,
        )  # fmt: skip
    grad_x = grads.pop(0) if needs_x else None
    grad_mix = grads.pop(0) if needs_mix else None
    return grad_x, grad_mix, None, None, None, None, None


_mix.register_autograd(_mix_gradients, setup_context=_mix_setup)


def mix_tokens(
    x: Tensor,
    mix: Tensor,
    patches: int,
    weight: Tensor | None,
    bias: Tensor | None,
    norm_eps: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """LayerNorm of the tokens, and a matrix times their patches normalised without affine.

    Row statistics are taken once. The patches are never normalised in memory: the reciprocal
    standard deviations go into the matrix, and the means are subtracted from the p sums.

    Args:
        x: tokens (B, N, D), the last `patches` of them patches; contiguous.
        mix: (p, at least `patches`), further columns 0.
        patches: number of patches.
        weight, bias: norm1's, (D,) or None; constants.
        norm_eps: norm1's epsilon.
        eps: epsilon of the normalisation that is mixed.

    Returns:
        norm1(x) (B, N, D) in x's dtype, and the mix (B, p, D), fp32 at least.

    Raises:
        ValueError: shapes do not fit each other.
    """
    if x.ndim != 3 or mix.ndim != 2 or not 0 < patches <= min(x.shape[1], mix.shape[1]):
        raise ValueError(
            f"x {tuple(x.shape)} and mix {tuple(mix.shape)} must be (B, N, D) and (p, columns) "
            f"with at least {patches} patches each"
        )
    with _in_full_precision(x):
        y, mixed, _ = _mix(x.contiguous(), mix, patches, weight, bias, norm_eps, eps)
    return y, mixed


# --- features --------------------------------------------------------------------------------


@torch.library.custom_op("vpt_fast::project_features", mutates_args=())
def _project(
    mixed: Tensor,
    mix_sum: Tensor,
    weight: Tensor,
    shift: Tensor,
    bias: Tensor | None,
    channels: Tensor | None,
    down: Tensor,
    up: Tensor,
    hidden: Tensor | None,
    residual: bool,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = FeatureInputs(mixed, mix_sum, weight, shift, bias, channels, down, up, hidden)
    return _implementation(mixed).features_forward(
        inputs, residual, norm_weight, norm_bias, norm_eps, dtype
    )


@_project.register_fake
def _(mixed: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, dtype = others
    rows = mixed.shape[:2]
    return mixed.new_empty(mixed.shape, dtype=dtype), mixed.new_empty(rows), mixed.new_empty(rows)


@torch.library.custom_op("vpt_fast::project_features_backward", mutates_args=())
def _project_backward(
    mixed: Tensor,
    mix_sum: Tensor,
    weight: Tensor,
    shift: Tensor,
    bias: Tensor | None,
    channels: Tensor | None,
    down: Tensor,
    up: Tensor,
    hidden: Tensor | None,
    residual: bool,
    norm_weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    grad: Tensor,
) -> list[Tensor]:
    inputs = FeatureInputs(mixed, mix_sum, weight, shift, bias, channels, down, up, hidden)
    return _implementation(mixed).features_backward(inputs, residual, norm_weight, mean, rstd, grad)


@_project_backward.register_fake
def _(*arguments: Any) -> list[Tensor]:
    inputs = FeatureInputs(*arguments[: len(FeatureInputs._fields)])
    trained = inputs._replace(channels=None, hidden=None)
    return [t.new_empty(t.shape) for t in trained if t is not None]


def _project_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.residual, norm_weight, _, _, _ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(*tensors, norm_weight, mean, rstd)


def _project_gradients(ctx, grad, *_):  # type: ignore[no-untyped-def]
    *tensors, norm_weight, mean, rstd = ctx.saved_tensors
    if any(ctx.needs_input_grad[10:12]):
        raise RuntimeError("project_features has no gradient of norm1's weight and bias")
    with _in_full_precision(mean):
        grads = _project_backward(
            *tensors, ctx.residual, norm_weight, mean, rstd, grad.contiguous()
        )
    if tensors[4] is None:  # the projector's bias
        grads.insert(4, None)
    *before, grad_down, grad_up = grads
    return *before, None, grad_down, grad_up, *[None] * 6


_project.register_autograd(_project_gradients, setup_context=_project_setup)


def project_features(
    mixed: Tensor,
    mix_sum: Tensor,
    affine: tuple[Tensor, Tensor],
    bias: Tensor | None,
    channels: Tensor | None,
    projector: tuple[Tensor, Tensor],
    hidden: Tensor | None,
    residual: bool,
    norm: tuple[Tensor | None, Tensor | None, float] | None,
    dtype: torch.dtype,
) -> Tensor:
    """From mixed patches to prompts: P = g + up(relu(down g)), and norm1(P).

    g = (mixed * weight + mix_sum * shift) * channels + bias, where weight and shift are the affine
    of the LayerNorm whose rows were mixed without it.

    Args:
        mixed: (B, p, D), fp32 or fp64.
        mix_sum: row sums of the mixing matrix, (p,), in the same dtype.
        affine: weight and shift, (D,) each.
        bias: of the token-wise projector, (p,), or None.
        channels: mask of the channel dropout (B, D), scaled, or None.
        projector: down (r, D) and up (D, r).
        hidden: mask of the hidden layer's dropout (B, p, r), scaled, or None.
        residual: whether g is added.
        norm: weight (D,), bias (D,) and epsilon of the block's norm1, constants; None returns P.
        dtype: of the result.

    Returns:
        (B, p, D).
    """
    inputs = FeatureInputs(mixed, mix_sum, *affine, bias, channels, *projector, hidden)
    with _in_full_precision(mixed):
        if norm is None:
            return reference.features(inputs, residual).to(dtype)
        return _project(*inputs, residual, *norm, dtype)[0]
