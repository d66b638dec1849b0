"""Which modules compute a LayerNorm and nothing else."""

from __future__ import annotations

from timm.layers import LayerNorm, LayerNormFp32
from torch import nn

from vpt_fast.modules.hooks import has_own_forward

# Exactly these classes: a subclass may compute anything.
_LAYER_NORMS = (nn.LayerNorm, LayerNorm, LayerNormFp32)


def is_layer_norm(norm: nn.Module) -> bool:
    """Return whether `norm` computes a LayerNorm and nothing else."""
    return type(norm) in _LAYER_NORMS and not has_own_forward(norm)
