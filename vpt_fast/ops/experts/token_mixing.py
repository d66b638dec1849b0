"""The mix of VAPT's experts as operators of PyTorch's; they have no autograd of their own.

    mix_tokens           a matrix times the normalised patches
    mix_tokens_backward  its gradients, with norm1's and the residual's of the same tokens

"Revisit Visual Prompt Tuning: The Expressiveness of Prompt Experts" (ICLR 2026, arXiv 2501.18936),
section 4. The patches are never normalised in memory: the reciprocal standard deviations go into
the matrix, and the means are subtracted from the p sums.
"""

from __future__ import annotations

import functools

from torch import Tensor

from vpt_fast.ops.experts import reference
from vpt_fast.ops.operation import Function, Operation
from vpt_fast.ops.registration import operator


@operator("vpt_fast::mix_tokens")
def mix_tokens(x: Tensor, mix: Tensor, patches: int, statistics: Tensor) -> Tensor:
    """A matrix times the normalised patches.

    Args:
        x: tokens (B, N, D), the last `patches` of them patches.
        mix: (p, at least `patches`), further columns 0.
        patches: number of patches.
        statistics: row statistics (3, B, N) of x as `residual_norm` returns them.

    Returns:
        (B, p, D), fp32 at least.
    """
    return MIX.on(x)(x, mix, patches, statistics)


@mix_tokens.register_fake
def _(x: Tensor, mix: Tensor, patches: int, statistics: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], mix.shape[0], x.shape[-1], dtype=statistics.dtype)


@operator("vpt_fast::mix_tokens_backward")
def mix_tokens_backward(
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
    """Gradients of the tokens and of the matrix.

    Args:
        x, mix, patches, statistics: what the forward was given.
        weight: norm1's, (D,) or None.
        grad_y: gradient of norm1's result, (B, N, D).
        grad_mixed: gradient of the mix, (B, p, D), fp32 at least.
        grad_sum: the tokens' own gradient, (B, N, D), or None for 0.
        needs_x, needs_mix: which gradients are asked for.

    Returns:
        Those asked for: of x, from the mix, norm1 and `grad_sum` together; of the matrix's columns
        that are not 0, (p, patches).
    """
    return MIX_BACKWARD.on(x)(
        x, mix, patches, weight, statistics, grad_y, grad_mixed, grad_sum, needs_x, needs_mix
    )


@mix_tokens_backward.register_fake
def _(
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
    grads = [x.new_empty(x.shape)] if needs_x else []
    if needs_mix:
        grads.append(mix.new_empty(mix.shape[0], patches))
    return grads


@functools.cache
def _kernels() -> dict[str, Function]:
    from vpt_fast.kernels.experts import launches

    return {"mix": launches.mix_forward, "mix_backward": launches.mix_backward}


MIX = Operation("mix", _kernels, reference.mix_forward, mix_tokens)
MIX_BACKWARD = Operation("mix_backward", _kernels, reference.mix_backward, mix_tokens_backward)
