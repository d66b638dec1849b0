"""LayerNorm modules that fused functions can compute, and their tensors."""

from __future__ import annotations

from typing import Any

from timm.layers import LayerNorm, LayerNormFp32
from torch import nn

from vpt_fast.modules.hooks import has_hooks, has_own_forward
from vpt_fast.ops.block.add_norm import Norm

# Exactly these classes: a subclass may compute anything.
_LAYER_NORMS = (nn.LayerNorm, LayerNorm, LayerNormFp32)


def is_layer_norm(norm: nn.Module) -> bool:
    """Return whether `norm` computes a LayerNorm and nothing else."""
    return type(norm) in _LAYER_NORMS and not has_own_forward(norm)


def is_frozen_norm(norm: nn.Module) -> bool:
    """Return whether `norm` is a plain, frozen LayerNorm without hooks."""
    return (
        is_layer_norm(norm)
        and not has_hooks(norm)
        and not any(p.requires_grad for p in norm.parameters())
    )


def norm_of(norm: Any, folded: bool = False) -> Norm:
    """Return weight, bias and epsilon of a LayerNorm module; no weight and bias if `folded`."""
    return Norm(None, None, norm.eps) if folded else Norm(norm.weight, norm.bias, norm.eps)
