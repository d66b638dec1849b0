"""LayerNorm modules as the fused functions take them: what they are, and their tensors."""

from __future__ import annotations

from typing import Any

from timm.layers import LayerNorm, LayerNormFp32
from torch import nn

from vpt_fast.modules.hooks import has_hooks, has_own_forward
from vpt_fast.ops.block.add_norm import Norm

# A subclass may do anything.
_LAYER_NORMS = (nn.LayerNorm, LayerNorm, LayerNormFp32)


def is_layer_norm(norm: nn.Module) -> bool:
    """Whether `norm` computes a LayerNorm and nothing else."""
    return type(norm) in _LAYER_NORMS and not has_own_forward(norm)


def is_frozen_norm(norm: nn.Module) -> bool:
    """Whether `norm` is a plain, frozen LayerNorm that nobody watches."""
    return (
        is_layer_norm(norm)
        and not has_hooks(norm)
        and not any(p.requires_grad for p in norm.parameters())
    )


def norm_of(norm: Any, folded: bool = False) -> Norm:
    """Weight, bias and epsilon of a LayerNorm module; folded ones are left out."""
    return Norm(None, None, norm.eps) if folded else Norm(norm.weight, norm.bias, norm.eps)
