"""VAPT's prompt experts as operators of PyTorch.

    fold_convolution   convolution and token-wise projector folded into the mixing weight
    project_features   affine, dropout, feature projector and norm1 of the p rows

"Revisit Visual Prompt Tuning: The Expressiveness of Prompt Experts" (ICLR 2026, arXiv 2501.18936),
section 4. CUDA tensors go to the Triton kernels of `vpt_fast.kernels.experts.launches`, others to
the reference. Statistics, mixing weight and the feature projector's sums are fp32 at least.
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
"""The kernels read the mixing weight in tiles without masks: its rows are padded with zeros."""


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
    weight: Tensor, kernel: Tensor, rows: int, columns: int, padded_columns: int
) -> tuple[Tensor, Tensor]:
    """Return the results of `fold_convolution`, with `padded_columns` columns."""
    return FOLD.on(weight)(weight, kernel, (rows, columns), padded_columns)


@fold_operator.register_fake
def _(weight: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    shape, dtype = (weight.shape[0], arguments[-1]), statistics_dtype(weight.dtype)
    return weight.new_empty(shape, dtype=dtype), weight.new_empty(shape[0], dtype=dtype)


@operator("vpt_fast::fold_convolution_backward")
def fold_operator_backward(
    weight: Tensor,
    kernel: Tensor,
    grad_mixing_weight: Tensor,
    grad_mixing_sum: Tensor,
    rows: int,
    columns: int,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the token-wise projector and of the convolution."""
    grads = grad_mixing_weight, grad_mixing_sum
    return FOLD_BACKWARD.on(weight)(weight, kernel, *grads, (rows, columns))


@fold_operator_backward.register_fake
def _(weight: Tensor, kernel: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return weight.new_empty(weight.shape), kernel.new_empty(kernel.shape)


def _fold_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    weight, kernel, ctx.rows, ctx.columns, _ = inputs
    ctx.save_for_backward(weight, kernel)


def _fold_gradients(ctx, *grads):  # type: ignore[no-untyped-def]
    weight, kernel = ctx.saved_tensors
    with in_full_precision(weight):
        found = fold_operator_backward(
            weight, kernel, *[g.contiguous() for g in grads], ctx.rows, ctx.columns
        )
    return *found, None, None, None


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
        weight: Token-wise projector, (p, gh' * gw') with gh' = gh - K + 1, gw' = gw - K + 1.
        kernel: Convolution kernel (1, 1, K, K), shared by all channels; stride 1, no padding.
        grid: Rows gh and columns gw of patches.

    Returns:
        Mixing weight M (p, at least gh * gw), fp32 at least, with zeros in further columns; and its
        row sums (p,).
    """
    with in_full_precision(weight):
        if is_transformed():
            return _folded_plainly(weight, kernel, grid)
        return fold_operator(weight, kernel, *grid, folded_columns(weight, grid))


def _folded_plainly(weight: Tensor, kernel: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return the results of `fold_convolution`, by PyTorch's transposed convolution."""
    wide = statistics_dtype(weight.dtype)
    inner = weight.to(wide).unflatten(1, [n - kernel.shape[-1] + 1 for n in grid])
    mixing_weight = F.conv_transpose2d(inner.unsqueeze(1), kernel.to(wide)).flatten(1)
    padding = folded_columns(weight, grid) - mixing_weight.shape[1]
    mixing_weight = F.pad(mixing_weight, (0, padding))
    return mixing_weight, mixing_weight.sum(-1)


def folded_columns(weight: Tensor, grid: tuple[int, int]) -> int:
    """Return the columns of the mixing weight: one per patch, on a GPU rounded up to full tiles."""
    count = grid[0] * grid[1]
    step = _KERNEL_COLUMNS if uses_kernels(weight) else 1
    return -(-count // step) * step


# --- features --------------------------------------------------------------------------------


@operator("vpt_fast::project_features")
def features_operator(
    mixing: Tensor,
    mixing_sum: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    projector_bias: Tensor | None,
    channel_mask: Tensor | None,
    down: Tensor,
    up: Tensor,
    hidden_mask: Tensor | None,
    residual: bool,
    norm1_weight: Tensor | None,
    norm1_bias: Tensor | None,
    norm1_eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return norm1(P), P = g + up(relu(down g)), and the mean and rstd (B, p) of each prompt.

    g is the token mixing with the affine of the experts' LayerNorm; see `FeatureInputs`.

    Args:
        mixing, mixing_sum, norm_weight, norm_bias, projector_bias, channel_mask, down, up,
            hidden_mask: Fields of `FeatureInputs`.
        residual: Whether g is added to the feature projector's output.
        norm1_weight, norm1_bias, norm1_eps: Frozen norm1 of the block.
        dtype: Dtype of norm1(P), (B, p, D).
    """
    inputs = FeatureInputs(
        mixing, mixing_sum, norm_weight, norm_bias, projector_bias, channel_mask, down, up,
        hidden_mask,
    )  # fmt: skip
    return FEATURES.on(mixing)(inputs, residual, norm1_weight, norm1_bias, norm1_eps, dtype)


@features_operator.register_fake
def _(mixing: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    out = mixing.new_empty(mixing.shape, dtype=others[-1])
    return out, mixing.new_empty(mixing.shape[:2]), mixing.new_empty(mixing.shape[:2])


@operator("vpt_fast::project_features_backward")
def features_operator_backward(
    mixing: Tensor,
    mixing_sum: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    projector_bias: Tensor | None,
    channel_mask: Tensor | None,
    down: Tensor,
    up: Tensor,
    hidden_mask: Tensor | None,
    residual: bool,
    norm1_weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    grad: Tensor,
) -> list[Tensor]:
    """Return the gradients of the tensors before `residual` that there are, without the masks'."""
    inputs = FeatureInputs(
        mixing, mixing_sum, norm_weight, norm_bias, projector_bias, channel_mask, down, up,
        hidden_mask,
    )  # fmt: skip
    grads = FEATURES_BACKWARD.on(mixing)(inputs, residual, norm1_weight, mean, rstd, grad)
    return [_without_view(g) for g in grads]


def _without_view(tensor: Tensor) -> Tensor:
    """Return the tensor, copied if it is a view: an operator's results may share no memory."""
    if tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


@features_operator_backward.register_fake
def _(*arguments: Any) -> list[Tensor]:
    inputs = FeatureInputs(*arguments[: len(FeatureInputs._fields)])
    trained = inputs._replace(channel_mask=None, hidden_mask=None)
    return [t.new_empty(t.shape) for t in trained if t is not None]


FEATURES = Operation(
    "features", _kernels, reference.features_forward,
    lambda inputs, *others: features_operator(*inputs, *others),
)  # fmt: skip
FEATURES_BACKWARD = Operation(
    "features_backward", _kernels, reference.features_backward,
    lambda inputs, *others: features_operator_backward(*inputs, *others),
)  # fmt: skip
