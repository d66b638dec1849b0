"""VAPT's prompt experts as operators of PyTorch's.

    fold_convolution   convolution and token-wise projector as one (p, gh * gw) matrix
    project_features   affine, dropouts, feature projector and norm1 of the p rows

"Revisit Visual Prompt Tuning: The Expressiveness of Prompt Experts" (ICLR 2026, arXiv 2501.18936),
section 4. CUDA tensors go to the Triton kernels of `vpt_fast.kernels.experts.launches`, anything
else to the reference. Statistics and everything of the prompts are fp32 at least.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vpt_fast.kernels.experts.inputs import FeatureInputs
from vpt_fast.ops.backend import in_full_precision, statistics_dtype, uses_kernels
from vpt_fast.ops.experts import reference
from vpt_fast.ops.frozen import of_first_order
from vpt_fast.ops.operation import Function, Operation
from vpt_fast.ops.registration import operator
from vpt_fast.ops.tracing import is_transformed

_KERNEL_COLUMNS = 64
"""The kernels read the folded matrix in tiles without masks: its rows are padded with zeros."""


@functools.cache
def _kernels() -> dict[str, Function]:
    from vpt_fast.kernels.experts import launches

    return {
        "fold": launches.fold_forward,
        "fold_backward": launches.fold_backward,
        "features": launches.features_forward,
        "features_backward": launches.features_backward,
    }


# --- folding ---------------------------------------------------------------------------------


@operator("vpt_fast::fold_convolution")
def fold_operator(
    weight: Tensor, kernel: Tensor, rows: int, columns: int, padded: int
) -> tuple[Tensor, Tensor]:
    """The matrix and its row sums of `fold_convolution`; `padded` columns."""
    return FOLD.on(weight)(weight, kernel, (rows, columns), padded)


@fold_operator.register_fake
def _(
    weight: Tensor, kernel: Tensor, rows: int, columns: int, padded: int
) -> tuple[Tensor, Tensor]:
    dtype, prompts = statistics_dtype(weight.dtype), weight.shape[0]
    return (
        weight.new_empty(prompts, padded, dtype=dtype),
        weight.new_empty(prompts, dtype=dtype),
    )


@operator("vpt_fast::fold_convolution_backward")
def fold_operator_backward(
    weight: Tensor, kernel: Tensor, grad_mix: Tensor, grad_sum: Tensor, rows: int, columns: int
) -> tuple[Tensor, Tensor]:
    """Gradients of the projector and of the convolution."""
    return FOLD_BACKWARD.on(weight)(weight, kernel, grad_mix, grad_sum, (rows, columns))


@fold_operator_backward.register_fake
def _(
    weight: Tensor, kernel: Tensor, grad_mix: Tensor, grad_sum: Tensor, rows: int, columns: int
) -> tuple[Tensor, Tensor]:
    return weight.new_empty(weight.shape), kernel.new_empty(kernel.shape)


def _fold_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    weight, kernel, ctx.rows, ctx.columns, _ = inputs
    ctx.save_for_backward(weight, kernel)


def _fold_gradients(ctx, grad_mix, grad_sum):  # type: ignore[no-untyped-def]
    weight, kernel = ctx.saved_tensors
    with in_full_precision(weight):
        grads = fold_operator_backward(
            weight, kernel, grad_mix.contiguous(), grad_sum.contiguous(), ctx.rows, ctx.columns
        )
    return *grads, None, None, None


fold_operator.register_autograd(of_first_order(_fold_gradients), setup_context=_fold_setup)


FOLD = Operation(
    "fold", _kernels, reference.fold_forward,
    lambda weight, kernel, grid, padded: fold_operator(weight, kernel, *grid, padded),
)  # fmt: skip
FOLD_BACKWARD = Operation(
    "fold_backward", _kernels, reference.fold_backward,
    lambda *tensors_and_grid: fold_operator_backward(*tensors_and_grid[:-1], *tensors_and_grid[-1]),
)  # fmt: skip


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
    with in_full_precision(weight):
        if is_transformed():
            return _folded_plainly(weight, kernel, grid)
        return fold_operator(weight, kernel, *grid, folded_columns(weight, grid))


def _folded_plainly(weight: Tensor, kernel: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """As `fold_convolution`, by PyTorch's transposed convolution."""
    wide = statistics_dtype(weight.dtype)
    inner = weight.to(wide).unflatten(1, [n - kernel.shape[-1] + 1 for n in grid])
    matrix = F.conv_transpose2d(inner.unsqueeze(1), kernel.to(wide)).flatten(1)
    matrix = F.pad(matrix, (0, folded_columns(weight, grid) - matrix.shape[1]))
    return matrix, matrix.sum(-1)


def folded_columns(weight: Tensor, grid: tuple[int, int]) -> int:
    """Columns of the folded matrix: one a patch, and on a GPU zeros up to a full tile."""
    count = grid[0] * grid[1]
    step = _KERNEL_COLUMNS if uses_kernels(weight) else 1
    return -(-count // step) * step


# --- features --------------------------------------------------------------------------------


@operator("vpt_fast::project_features")
def features_operator(
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
    """norm1(P) of `project_features`, and the mean and rstd (B, p) of each prompt."""
    inputs = FeatureInputs(mixed, mix_sum, weight, shift, bias, channels, down, up, hidden)
    return FEATURES.on(mixed)(inputs, residual, norm_weight, norm_bias, norm_eps, dtype)


@features_operator.register_fake
def _(mixed: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, dtype = others
    rows = mixed.shape[:2]
    return mixed.new_empty(mixed.shape, dtype=dtype), mixed.new_empty(rows), mixed.new_empty(rows)


@operator("vpt_fast::project_features_backward")
def features_operator_backward(
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
    """Gradients of `mixed`, `mix_sum` and the parameters that there are, in that order."""
    inputs = FeatureInputs(mixed, mix_sum, weight, shift, bias, channels, down, up, hidden)
    grads = FEATURES_BACKWARD.on(mixed)(inputs, residual, norm_weight, mean, rstd, grad)
    return [_apart(g) for g in grads]


def _apart(tensor: Tensor) -> Tensor:
    """The tensor, copied if it is a part of another: an operator's results may share no memory."""
    if tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


@features_operator_backward.register_fake
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
    with in_full_precision(mean):
        grads = features_operator_backward(
            *tensors, ctx.residual, norm_weight, mean, rstd, grad.contiguous()
        )
    if tensors[4] is None:  # the projector's bias
        grads.insert(4, None)
    *before, grad_down, grad_up = grads
    return *before, None, grad_down, grad_up, *[None] * 6


features_operator.register_autograd(
    of_first_order(_project_gradients), setup_context=_project_setup
)


FEATURES = Operation(
    "features", _kernels, reference.features_forward,
    lambda inputs, *others: features_operator(*inputs, *others),
)  # fmt: skip
FEATURES_BACKWARD = Operation(
    "features_backward", _kernels, reference.features_backward,
    lambda inputs, *others: features_operator_backward(*inputs, *others),
)  # fmt: skip


def project_features(
    inputs: FeatureInputs,
    residual: bool,
    norm: tuple[Tensor | None, Tensor | None, float] | None,
    dtype: torch.dtype,
) -> Tensor:
    """From mixed patches to prompts: P = g + up(relu(down g)), and norm1(P).

    g = (mixed * weight + mix_sum * shift) * channels + bias, where weight and shift are the affine
    of the LayerNorm whose rows were mixed without it.

    Args:
        inputs: the mix (B, p, D), fp32 or fp64, and what is applied to it.
        residual: whether g is added.
        norm: weight (D,), bias (D,) and epsilon of the block's norm1, constants; None returns P.
        dtype: of the result.

    Returns:
        (B, p, D).
    """
    with in_full_precision(inputs.mixed):
        if norm is None:
            return reference.features(inputs, residual).to(dtype)
        return features_operator(*inputs, residual, *norm, dtype)[0]
