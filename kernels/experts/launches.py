"""VAPT's prompt experts on a GPU; `vpt_fast.ops.experts.operator` has the formulas.

    fold_*      convolution and token-wise projector folded into the mixing weight
    mix_*       token mixing: the mixing weight times the normalised patches
    features_*  affine, dropout, feature projector and norm1 of the p rows

Statistics, mixing weight, token mixing and all sums are fp32; tokens and prompts are in the model's
dtype. There are no atomics: the same inputs give the same bits.

`launch` is a launcher of the tensors' layout. Where it is given, all tensors must be contiguous.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..runtime.allocate import empty
from ..runtime.chunks import chunk_count
from ..runtime.launch import target_of
from ..runtime.launch_plan import Launcher, contiguous, launcher, layout_of
from .features import features_launch
from .features_backward import features_backward_launches
from .fold import fold_backward_launch, fold_launch
from .inputs import FeatureInputs
from .mix import mix_launch
from .mix_backward import mix_backward_launch

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _check_dtype(tensor: Tensor) -> None:
    if tensor.dtype not in _DTYPES:
        raise TypeError(
            f"prompt experts on a GPU take float32, float16 or bfloat16, not {tensor.dtype}"
        )


def fold_forward(
    weight: Tensor,
    kernel: Tensor,
    grid: tuple[int, int],
    padded_columns: int,
    launch: Launcher | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the mixing weight (..., p, padded_columns) fp32 and its row sums (..., p).

    Columns past gh * gw are zeros. Leading dimensions are blocks that are folded together.
    """
    if launch is None:
        _check_dtype(weight)
        weight, kernel = contiguous(weight, kernel)
        launch = launcher("fold", grid, padded_columns, layout_of(weight), layout_of(kernel))
    rows = weight.shape[:-1]
    mixing_weight = empty((*rows, padded_columns), torch.float32, weight.device)
    mixing_sum = empty(rows, torch.float32, weight.device)
    launch((weight, kernel, mixing_weight, mixing_sum), fold_launch, grid)
    return mixing_weight, mixing_sum


def fold_backward(
    weight: Tensor,
    kernel: Tensor,
    grad_mixing_weight: Tensor,
    grad_mixing_sum: Tensor,
    grid: tuple[int, int],
    launch: Launcher | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the token-wise projector and of the convolution."""
    given = [weight, kernel, grad_mixing_weight, grad_mixing_sum]
    if launch is None:
        given = contiguous(*given)
        launch = launcher("fold_backward", grid, *map(layout_of, given))
    grad_weight = torch.empty_like(given[0])
    shape = *weight.shape[:-1], kernel.shape[-1] ** 2
    grad_kernel = empty(shape, torch.float32, weight.device)
    launch((*given, grad_weight, grad_kernel), fold_backward_launch, grid)
    return grad_weight, grad_kernel.sum(-2).to(kernel.dtype).view(kernel.shape)


def mix_forward(
    x: Tensor,
    mixing_weight: Tensor,
    patches: int,
    statistics: Tensor,
    launch: Launcher | None = None,
) -> Tensor:
    """Return the token mixing (B, p, D) fp32 of x (B, N, D) with row statistics (3, B, N) fp32."""
    if launch is None:
        _check_dtype(x)
        x, mixing_weight, statistics = contiguous(x, mixing_weight, statistics)
        launch = launcher("mix", patches, *map(layout_of, (x, mixing_weight, statistics)))
    batch, _, width = x.shape
    mixing = empty((batch, mixing_weight.shape[0], width), torch.float32, x.device)
    tensors = x, mixing_weight, statistics, mixing
    launch(tensors, lambda *_: mix_launch(*tensors, patches, target_of(x)))
    return mixing


def mix_backward(
    x: Tensor,
    mixing_weight: Tensor,
    patches: int,
    norm1_weight: Tensor | None,
    statistics: Tensor,
    grad_y: Tensor,
    grad_mixing: Tensor,
    grad_sum: Tensor | None,
    needs_x: bool,
    needs_mixing_weight: bool,
    launch: Launcher | None = None,
) -> list[Tensor]:
    """Return the gradients of x and of the mixing weight's columns (p, patches), those asked for.

    That of x includes norm1's and `grad_sum`.
    """
    given = x, mixing_weight, norm1_weight, statistics, grad_y, grad_mixing, grad_sum
    if launch is None:
        given = contiguous(*given)
        layouts = map(layout_of, given)
        launch = launcher("mix_backward", patches, needs_x, needs_mixing_weight, *layouts)
    partial = None
    if needs_mixing_weight:
        shape = (chunk_count(x.shape[0]), mixing_weight.shape[0], patches)
        partial = empty(shape, torch.float32, x.device)
    grad_x = torch.empty_like(given[0]) if needs_x else None
    tensors = *given, grad_x, partial
    launch(tensors, lambda *_: mix_backward_launch(*tensors, patches, target_of(x)))
    found = [] if grad_x is None else [grad_x]
    return found if partial is None else [*found, partial.sum(0)]


def features_forward(
    inputs: FeatureInputs,
    residual: bool,
    norm1_weight: Tensor | None,
    norm1_bias: Tensor | None,
    norm1_eps: float,
    dtype: torch.dtype,
    launch: Launcher | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return norm1 of the prompts (B, p, D) in `dtype`, and the rows' mean and rstd (B, p) fp32."""
    if launch is None:
        inputs = FeatureInputs(*contiguous(*inputs))
        norm1_weight, norm1_bias = contiguous(norm1_weight, norm1_bias)
        layouts = map(layout_of, (*inputs, norm1_weight, norm1_bias))
        launch = launcher("features", residual, norm1_eps, dtype, *layouts)
    mixing = inputs.mixing
    out = torch.empty_like(mixing, dtype=dtype)
    mean = empty(mixing.shape[:2], torch.float32, mixing.device)
    tensors = norm1_weight, norm1_bias, out, mean, torch.empty_like(mean)
    launch(
        (*inputs, *tensors),
        lambda *_: features_launch(inputs, *tensors, residual, norm1_eps, target_of(mixing)),
    )
    return tensors[2:]


def features_backward(
    inputs: FeatureInputs,
    residual: bool,
    norm1_weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    grad: Tensor,
    launch: Launcher | None = None,
) -> list[Tensor]:
    """Return the gradients of `FeatureInputs` but the masks, of those tensors that there are.

    All but the first are views of two tensors.
    """
    if launch is None:
        inputs = FeatureInputs(*contiguous(*inputs))
        norm1_weight, mean, rstd, grad = contiguous(norm1_weight, mean, rstd, grad)
        layouts = map(layout_of, (*inputs, norm1_weight, mean, rstd, grad))
        launch = launcher("features_backward", residual, *layouts)
    mixing, hidden_dim = inputs.mixing, inputs.down.shape[0]
    batch, prompts, width = mixing.shape
    rows = batch * prompts

    single, device = torch.float32, mixing.device
    grad_mixing = torch.empty_like(mixing)
    units, sums = empty((2, rows, hidden_dim), single, device), empty((4, rows), single, device)
    weights = empty((chunk_count(rows), 2 * hidden_dim + 2, width), single, device)
    tensors = norm1_weight, mean, rstd, grad, grad_mixing, units, sums, weights
    launch(
        (*inputs, *tensors),
        lambda *_: features_backward_launches(inputs, *tensors, residual, target_of(mixing)),
    )
    summed = weights.sum(0)
    if inputs.norm_weight.dtype == inputs.norm_bias.dtype == inputs.down.dtype == inputs.up.dtype:
        summed = summed.to(inputs.norm_weight.dtype)  # one conversion for four gradients
    grad_sum, grad_bias = sums[:2].view(2, batch, prompts).sum(1).unbind()
    grads = {
        "norm_weight": summed[2 * hidden_dim],
        "norm_bias": summed[2 * hidden_dim + 1],
        "projector_bias": grad_bias,
        "down": summed[:hidden_dim],
        "up": summed[hidden_dim : 2 * hidden_dim].t(),
    }
    found = [grad_mixing, grad_sum]
    for name, grad in grads.items():
        parameter = getattr(inputs, name)
        if parameter is not None:
            found.append(grad if grad.dtype == parameter.dtype else grad.to(parameter.dtype))
    return found
