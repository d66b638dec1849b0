"""timm's rotary position embeddings, whose tables are made once for each patch grid.

timm makes a table in every forward pass where images may have any size (DINOv3), or where its
frequencies are parameters (mixed), on the CPU for DINOv3. The frequencies are frozen here.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from timm.layers import (
    RotaryEmbeddingCat,
    RotaryEmbeddingDinoV3,
    RotaryEmbeddingMixed,
    RotaryEmbeddingMRope,
)
from torch import Tensor, nn

from vpt_fast.ops.tracing import is_traced

_MOST_GRIDS = 16
"""Number of tables that a model keeps."""


class _Tables:
    """Tables that were made, by the arguments; copies and pickles start empty."""

    def __init__(self) -> None:
        self.made: dict[Any, tuple[Tensor, int]] = {}
        self.of: Any = None
        self.sources: list[Tensor] = []  # held: their addresses are not given to others

    def __deepcopy__(self, memo: Any) -> _Tables:
        return _Tables()

    def __reduce__(self) -> Any:
        return _Tables, ()


_Timms: Any = nn.Module
"""Stands for timm's class, whose methods mypy cannot see."""


class _Cached(_Timms):
    """Mixed into timm's class of an embedding."""

    def get_embed(self, shape: Any = None, dtype: torch.dtype | None = None) -> Tensor:
        """Return timm's table for a patch grid; the same tensor for the same grid.

        Args:
            shape: Height and width of the grid; None for that of the model.
            dtype: Dtype of the table; None for timm's choice.
        """
        own = [t for t in (*self._parameters.values(), *self._buffers.values()) if t is not None]
        given = (shape,) if dtype is None else (shape, dtype)  # timm 1.0.29 has the first alone
        draws = self.training and getattr(self, "aug_active", False)
        trained = torch.is_grad_enabled() and any(t.requires_grad for t in own)
        if draws or trained or any(is_traced(t) or t.is_inference() for t in own):
            table: Tensor = super().get_embed(*given)
            return table
        state = self._state(own)
        tables: _Tables = self.__dict__.setdefault("tables", _Tables())
        if tables.of != state or len(tables.made) >= _MOST_GRIDS:
            tables.made, tables.of = {}, copy.deepcopy(state)
            tables.sources = [t.detach() for t in own]
        key = (None if shape is None else tuple(shape), dtype)
        known = tables.made.get(key)
        if known is None or known[0]._version != known[1]:
            # Made under inference_mode, a table could not serve training later.
            with torch.inference_mode(False), torch.no_grad():
                table = super().get_embed(*given).detach()
            known = tables.made[key] = (table, table._version)
        return known[0]

    def _state(self, own: list[Tensor]) -> Any:
        """Return all that a table depends on beside the arguments."""
        settings = {
            name: value
            for name, value in vars(self).items()
            if not name.startswith("_") and name not in ("training", "tables")
        }
        return [(id(t), t.data_ptr(), t._version) for t in own], settings


class CachedCat(_Cached, RotaryEmbeddingCat):
    """timm's axial embedding."""


class CachedDinoV3(_Cached, RotaryEmbeddingDinoV3):
    """timm's embedding of DINOv3."""


class CachedMixed(_Cached, RotaryEmbeddingMixed):
    """timm's embedding with frequencies of each block and head."""


class CachedMRope(_Cached, RotaryEmbeddingMRope):
    """timm's interleaved multimodal embedding."""


CACHED: dict[type[nn.Module], type[nn.Module]] = {
    RotaryEmbeddingCat: CachedCat,
    RotaryEmbeddingDinoV3: CachedDinoV3,
    RotaryEmbeddingMixed: CachedMixed,
    RotaryEmbeddingMRope: CachedMRope,
}
"""Class that an embedding of a tuned model is given, by timm's."""
