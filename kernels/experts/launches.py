"""VAPT's prompt experts on a GPU; `vpt_fast.ops.experts.operator` says what is computed.

    fold_*      convolution and token-wise projector as one matrix
    mix_*       the matrix times the normalised patches of the tokens
    features_*  affine, dropouts, feature projector and norm1 of the p rows

Statistics, the matrix, the mix and all sums are fp32; tokens and prompts are in the model's dtype.
The same inputs give the same bits: there are no atomics.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..runtime.allocate import empty
from ..runtime.chunks import chunk_count
from ..runtime.launch import Launch, target_of
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
    padded: int,
    launch: Launcher | None = None,
) -> tuple[Tensor, Tensor]:
    """The folded matrix (..., p, padded) fp32, zeros past gh * gw, and its row sums (..., p).

    Leading dimensions are of blocks that are folded together; see the reference.

    Here and below tensors must be contiguous where `launch`, a launcher of their layout, is given.
    """
    if launch is None:
        _check_dtype(weight)
        weight, kernel = contiguous(weight, kernel)
        launch = launcher("fold", grid, padded, layout_of(weight), layout_of(kernel))
    rows = weight.shape[:-1]
    mix = empty((*rows, padded), torch.float32, weight.device)
    mix_sum = empty(rows, torch.float32, weight.device)
    launch(
        (weight, kernel, mix, mix_sum), lambda *_: [fold_launch(weight, kernel, grid, mix, mix_sum)]
    )
    return mix, mix_sum


def fold_backward(
    weight: Tensor,
    kernel: Tensor,
    grad_mix: Tensor,
    grad_sum: Tensor,
    grid: tuple[int, int],
    launch: Launcher | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of the projector and of the convolution, as they are."""
    if launch is None:
        weight, kernel, grad_mix, grad_sum = contiguous(weight, kernel, grad_mix, grad_sum)
        layouts = map(layout_of, (weight, kernel, grad_mix, grad_sum))
        launch = launcher("fold_backward", grid, *layouts)
    grad_weight = torch.empty_like(weight)
    shape = *weight.shape[:-1], kernel.shape[-1] ** 2
    taps = empty(shape, torch.float32, weight.device)
    launch(
        (weight, kernel, grad_mix, grad_sum, grad_weight, taps),
        lambda *_: fold_backward_launch(
            weight, kernel, grid, grad_mix, grad_sum, grad_weight, taps
        ),
    )
    return grad_weight, taps.sum(-2).to(kernel.dtype).view(kernel.shape)


def mix_forward(
    x: Tensor, mix: Tensor, patches: int, statistics: Tensor, launch: Launcher | None = None
) -> Tensor:
    """The mix (B, p, D) fp32 of x (B, N, D), whose row statistics (3, B, N) are fp32."""
    if launch is None:
        _check_dtype(x)
        x, mix, statistics = contiguous(x, mix, statistics)
        launch = launcher("mix", patches, *map(layout_of, (x, mix, statistics)))
    batch, _, width = x.shape
    mixed = empty((batch, mix.shape[0], width), torch.float32, x.device)
    launch(
        (x, mix, statistics, mixed),
        lambda *_: [mix_launch(x, mix, statistics, mixed, patches, target_of(x))],
    )
    return mixed


def mix_backward(
    x: Tensor,
    mix: Tensor,
    patches: int,
    weight: Tensor | None,
    statistics: Tensor,
    grad_y: Tensor,
    grad_mixed: Tensor,
    grad_sum: Tensor | None,
    needs_x: bool,
    needs_mix: bool,
    launch: Launcher | None = None,
) -> list[Tensor]:
    """Gradients of x, norm1's and its own included, and of the matrix's columns (p, patches)."""
    if launch is None:
        x, mix, weight, statistics = contiguous(x, mix, weight, statistics)
        grad_y, grad_mixed, grad_sum = contiguous(grad_y, grad_mixed, grad_sum)
        layouts = map(layout_of, (x, mix, weight, statistics, grad_y, grad_mixed, grad_sum))
        launch = launcher("mix_backward", patches, needs_x, needs_mix, *layouts)
    partial = None
    if needs_mix:
        shape = (chunk_count(x.shape[0]), mix.shape[0], patches)
        partial = empty(shape, torch.float32, x.device)
    grad_x = torch.empty_like(x) if needs_x else None
    launch(
        (x, mix, weight, statistics, grad_y, grad_mixed, grad_sum, grad_x, partial),
        lambda *_: [
            mix_backward_launch(
                x, mix, patches, weight, statistics, grad_y, grad_mixed, grad_sum, grad_x,
                partial, target_of(x),
            )
        ],
    )  # fmt: skip
    found = [] if grad_x is None else [grad_x]
    return found if partial is None else [*found, partial.sum(0)]


def _named(inputs: FeatureInputs, **more: Tensor | None) -> dict[str, Tensor | None]:
    """All but the mix by name."""
    return {name: t for name, t in {**inputs._asdict(), **more}.items() if name != "mixed"}


def features_forward(
    inputs: FeatureInputs,
    residual: bool,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    dtype: torch.dtype,
    launch: Launcher | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """norm1 of the prompts (B, p, D) in `dtype`, and each row's mean and rstd (B, p) fp32."""
    if launch is None:
        inputs = FeatureInputs(*contiguous(*inputs))
        norm_weight, norm_bias = contiguous(norm_weight, norm_bias)
        layouts = map(layout_of, (*inputs, norm_weight, norm_bias))
        launch = launcher("features", residual, norm_eps, dtype, *layouts)
    mixed = inputs.mixed
    out = torch.empty_like(mixed, dtype=dtype)
    mean = empty(mixed.shape[:2], torch.float32, mixed.device)
    rstd = torch.empty_like(mean)

    def build(*_: Any) -> list[Launch]:
        tensors = _named(inputs, norm_weight=norm_weight, norm_bias=norm_bias)
        target = target_of(mixed)
        return [features_launch(mixed, tensors, residual, out, mean, rstd, norm_eps, target)]

    launch((*inputs, norm_weight, norm_bias, out, mean, rstd), build)
    return out, mean, rstd


def features_backward(
    inputs: FeatureInputs,
    residual: bool,
    norm_weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    grad: Tensor,
    launch: Launcher | None = None,
) -> list[Tensor]:
    """Gradients of mixed, mix_sum, weight, shift, bias if there is one, down and up.

    All but the first are parts of two tensors.
    """
    if launch is None:
        inputs = FeatureInputs(*contiguous(*inputs))
        norm_weight, mean, rstd, grad = contiguous(norm_weight, mean, rstd, grad)
        layouts = map(layout_of, (*inputs, norm_weight, mean, rstd, grad))
        launch = launcher("features_backward", residual, *layouts)
    mixed, hidden_dim = inputs.mixed, inputs.down.shape[0]
    batch, prompts, width = mixed.shape
    rows = batch * prompts

    single, device = torch.float32, mixed.device
    grad_mixed = torch.empty_like(mixed)
    units, sums = empty((2, rows, hidden_dim), single, device), empty((4, rows), single, device)
    weights = empty((chunk_count(rows), 2 * hidden_dim + 2, width), single, device)

    def build(*_: Any) -> list[Launch]:
        tensors = _named(inputs, norm_weight=norm_weight, mean=mean, rstd=rstd)
        return features_backward_launches(
            mixed, tensors, residual, grad, grad_mixed, units, sums, weights, target_of(mixed)
        )

    launch((*inputs, norm_weight, mean, rstd, grad, grad_mixed, units, sums, weights), build)
    summed = weights.sum(0)
    if inputs.weight.dtype == inputs.shift.dtype == inputs.down.dtype == inputs.up.dtype:
        summed = summed.to(inputs.weight.dtype)  # at once
    grad_sum, grad_bias = sums[:2].view(2, batch, prompts).sum(1).unbind()
    grads = {
        "weight": summed[2 * hidden_dim],
        "shift": summed[2 * hidden_dim + 1],
        "bias": grad_bias,
        "down": summed[:hidden_dim],
        "up": summed[hidden_dim : 2 * hidden_dim].t(),
    }
    found = [grad_mixed, grad_sum]
    for name, grad in grads.items():
        parameter = getattr(inputs, name)
        if parameter is not None:
            found.append(grad if grad.dtype == parameter.dtype else grad.to(parameter.dtype))
    return found
