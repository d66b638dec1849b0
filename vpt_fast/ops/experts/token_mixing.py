"""VAPT's token mixing as operators of PyTorch, without autograd of their own.

    mix_tokens           the mixing weight times the normalised patches
    mix_tokens_backward  its gradients, added to norm1's and the residual's of the same tokens

"Revisit Visual Prompt Tuning: The Expressiveness of Prompt Experts" (ICLR 2026, arXiv 2501.18936),
section 4. Normalised patches are not stored: the mixing weight is multiplied by their reciprocal
standard deviations, and the means are subtracted from the p sums.
"""

from __future__ import annotations

import functools

from torch import Tensor

from vpt_fast.ops.experts import reference
from vpt_fast.ops.operation import Function, Operation
from vpt_fast.ops.registration import operator


@operator("vpt_fast::mix_tokens")
def mix_tokens(x: Tensor, mixing_weight: Tensor, patches: int, statistics: Tensor) -> Tensor:
    """Multiply the mixing weight by the normalised patches.

    Args:
        x: Tokens (B, N, D), the last `patches` of them patches.
        mixing_weight: Matrix M, (p, at least `patches`), with zeros in further columns.
        patches: Number of patches.
        statistics: Row statistics (3, B, N) of x, as `residual_norm` returns them.

    Returns:
        Token mixing (B, p, D), fp32 at least.
    """
    return MIX.on(x)(x, mixing_weight, patches, statistics)


@mix_tokens.register_fake
def _(x: Tensor, mixing_weight: Tensor, patches: int, statistics: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], mixing_weight.shape[0], x.shape[-1], dtype=statistics.dtype)


@operator("vpt_fast::mix_tokens_backward")
def mix_tokens_backward(
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
) -> list[Tensor]:
    """Return the gradients of the tokens and of the mixing weight.

    Args:
        x, mixing_weight, patches, statistics: Arguments of `mix_tokens`.
        norm1_weight: Weight of norm1, (D,) or None.
        grad_y: Gradient of norm1's result, (B, N, D).
        grad_mixing: Gradient of the token mixing, (B, p, D), fp32 at least.
        grad_sum: Gradient of x from the residual stream, (B, N, D), or None for 0.
        needs_x, needs_mixing_weight: Whether each gradient is computed.

    Returns:
        Those that are needed: of x, from the token mixing, norm1 and `grad_sum` together; of the
        mixing weight's first `patches` columns, (p, patches).
    """
    return MIX_BACKWARD.on(x)(
        x, mixing_weight, patches, norm1_weight, statistics, grad_y, grad_mixing, grad_sum,
        needs_x, needs_mixing_weight,
    )  # fmt: skip


@mix_tokens_backward.register_fake
def _(x, mixing_weight, patches, *others):  # type: ignore[no-untyped-def]
    needs_x, needs_mixing_weight = others[-2:]
    grads = [x.new_empty(x.shape)] if needs_x else []
    if needs_mixing_weight:
        grads.append(mixing_weight.new_empty(mixing_weight.shape[0], patches))
    return grads


@functools.cache
def _kernels() -> dict[str, Function]:
    from vpt_fast.kernels.experts import launches

    return {"mix": launches.mix_forward, "mix_backward": launches.mix_backward}


MIX = Operation("mix", _kernels, reference.mix_forward, mix_tokens)
MIX_BACKWARD = Operation("mix_backward", _kernels, reference.mix_backward, mix_tokens_backward)
