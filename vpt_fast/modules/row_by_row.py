"""Modules that compute each row by itself, so that dead rows may be left out."""

from __future__ import annotations

from timm import layers
from timm.models.vision_transformer import LayerScale
from torch import nn

from vpt_fast.modules.baseline_layers import BottleneckAdapter
from vpt_fast.modules.hooks import has_own_forward, with_descendants


def _there(module: object, *names: str) -> tuple[type[nn.Module], ...]:
    """Return the classes of these names that the installed version has."""
    return tuple(getattr(module, name) for name in names if hasattr(module, name))


ROW_NORMS = (
    *_there(
        layers,
        *("LayerNorm", "LayerNormFp32", "RmsNorm", "RmsNormFp32", "SimpleNorm", "SimpleNormFp32"),
    ),
    *_there(nn, "LayerNorm", "RMSNorm", "Identity"),
)
"""Normalisations that compute each row by itself."""

_KNOWN = frozenset(
    (
        *ROW_NORMS,
        *_there(nn, "Linear", "Dropout", "GELU", "SiLU", "ReLU", "Tanh", "Sigmoid", "Hardswish"),
        *_there(layers, "GELU", "GELUTanh", "QuickGELU", "Swish", "DropPath"),
        *_there(layers, "Mlp", "GluMlp", "SwiGLU"),
        LayerScale,
        BottleneckAdapter,
    )
)


def treats_rows_apart(*parts: nn.Module | None) -> bool:
    """Return whether all parts and their descendants are known to compute each row by itself.

    Modules of other classes, or with a `forward` of their own, may compute anything.
    """
    return all(
        type(module) in _KNOWN and not has_own_forward(module)
        for part in parts
        for module in with_descendants(part)
    )
