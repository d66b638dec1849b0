"""VAPT's prompt experts on a GPU; `vpt_fast.ops.prompt_expert` says what is computed.

    fold_*      convolution and token-wise projector as one matrix
    mix_*       the matrix times the normalised patches of the tokens
    features_*  affine, dropouts, feature projector and norm1 of the p rows

Statistics, the matrix, the mix and all sums are fp32; tokens and prompts are in the model's dtype.
The same inputs give the same bits: there are no atomics.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .chunks import chunk_count
from .expert_features import features_backward_launches, features_launch
from .expert_fold import fold_backward_launch, fold_launch
from .expert_inputs import FeatureInputs
from .expert_mix import mix_launch
from .expert_mix_backward import mix_backward_launch
from .launch import run, target_of

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _check_dtype(tensor: Tensor) -> None:
    if tensor.dtype not in _DTYPES:
        raise TypeError(
            f"prompt experts on a GPU take float32, float16 or bfloat16, not {tensor.dtype}"
        )


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def fold_forward(
    weight: Tensor, kernel: Tensor, grid: tuple[int, int], padded: int
) -> tuple[Tensor, Tensor]:
    """The folded matrix (p, padded) fp32, zeros past gh * gw, and its row sums (p,)."""
    _check_dtype(weight)
    weight, kernel = weight.contiguous(), kernel.contiguous()
    mix = torch.empty((len(weight), padded), dtype=torch.float32, device=weight.device)
    mix_sum = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    run([fold_launch(weight, kernel, grid, mix, mix_sum)], weight.device)
    return mix, mix_sum


def fold_backward(
    weight: Tensor, kernel: Tensor, grad_mix: Tensor, grad_sum: Tensor, grid: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Gradients of the projector and of the convolution, as they are."""
    weight, kernel = weight.contiguous(), kernel.contiguous()
    grad_weight = torch.empty_like(weight)
    taps = torch.empty((len(weight), kernel.numel()), dtype=torch.float32, device=weight.device)
    launch = fold_backward_launch(weight, kernel, grid, grad_mix, grad_sum, grad_weight, taps)
    run([launch], weight.device)
    return grad_weight, taps.sum(0).to(kernel.dtype).view(kernel.shape)


def mix_forward(x: Tensor, mix: Tensor, patches: int, statistics: Tensor) -> Tensor:
    """The mix (B, p, D) fp32 of x (B, N, D), whose row statistics (3, B, N) are fp32."""
    _check_dtype(x)
    batch, _, width = x.shape
    mixed = torch.empty((batch, len(mix), width), dtype=torch.float32, device=x.device)
    run([mix_launch(x.contiguous(), mix, statistics, mixed, patches, target_of(x))], x.device)
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
) -> list[Tensor]:
    """Gradients of x, norm1's and its own included, and of the matrix: those asked for."""
    x, grad_y, grad_mixed = x.contiguous(), grad_y.contiguous(), grad_mixed.contiguous()
    partial = grad_mix = None
    if needs_mix:
        shape = (chunk_count(len(x)), len(mix), patches)
        partial = torch.empty(shape, dtype=torch.float32, device=x.device)
        grad_mix = torch.zeros_like(mix)
    grad_x = torch.empty_like(x) if needs_x else None
    weight, grad_sum = _contiguous(weight, grad_sum)
    launch = mix_backward_launch(
        x,
        mix,
        patches,
        weight,
        statistics,
        grad_y,
        grad_mixed,
        grad_sum,
        grad_x,
        partial,
        target_of(x),
    )
    run([launch], x.device)
    if grad_mix is not None and partial is not None:
        grad_mix[:, :patches] = partial.sum(0)
    return [g for g in (grad_x, grad_mix) if g is not None]


def _tensors(inputs: FeatureInputs, **more: Tensor | None) -> dict[str, Tensor | None]:
    """All but the mix by name, contiguous."""
    named = {**inputs._asdict(), **more}
    return {n: t if t is None else t.contiguous() for n, t in named.items() if n != "mixed"}


def features_forward(
    inputs: FeatureInputs,
    residual: bool,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """norm1 of the prompts (B, p, D) in `dtype`, and each row's mean and rstd (B, p) fp32."""
    mixed = inputs.mixed
    tensors = _tensors(inputs, norm_weight=norm_weight, norm_bias=norm_bias)
    out = torch.empty(mixed.shape, dtype=dtype, device=mixed.device)
    mean, rstd = (
        torch.empty(mixed.shape[:2], dtype=torch.float32, device=mixed.device) for _ in range(2)
    )
    launch = features_launch(mixed, tensors, residual, out, mean, rstd, norm_eps)
    run([launch], mixed.device)
    return out, mean, rstd


def features_backward(
    inputs: FeatureInputs,
    residual: bool,
    norm_weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    grad: Tensor,
) -> list[Tensor]:
    """Gradients of mixed, mix_sum, weight, shift, bias if there is one, down and up."""
    mixed, weight, shift, bias = inputs.mixed, inputs.weight, inputs.shift, inputs.bias
    down, up = inputs.down, inputs.up
    tensors = _tensors(inputs, norm_weight=norm_weight, mean=mean, rstd=rstd)
    batch, prompts, width = mixed.shape
    rows, hidden_dim = batch * prompts, len(down)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=mixed.device)

    grad_mixed = empty(*mixed.shape)
    sums = empty(4, rows)
    weights = empty(chunk_count(rows), 2 * hidden_dim + 2, width)
    launches = features_backward_launches(
        mixed, tensors, residual, grad, grad_mixed,
        empty(2, rows, hidden_dim), sums, weights, target_of(mixed),
    )  # fmt: skip
    run(launches, mixed.device)
    grad_down, grad_up, grad_weight, grad_shift = weights.sum(0).split(
        [hidden_dim, hidden_dim, 1, 1]
    )
    grad_sum, grad_bias = sums[:2].view(2, batch, prompts).sum(1)
    return [
        grad_mixed,
        grad_sum.clone(),
        grad_weight[0].to(weight.dtype, copy=True),
        grad_shift[0].to(shift.dtype, copy=True),
        *([] if bias is None else [grad_bias.to(bias.dtype, copy=True)]),
        grad_down.to(down.dtype, copy=True),
        grad_up.T.to(up.dtype, copy=True, memory_format=torch.contiguous_format),
    ]
