"""Rows of the last block's output that a model's head reads."""

from __future__ import annotations

from itertools import chain, repeat
from operator import contains
from typing import Any

import torch
from timm.models.deit import VisionTransformerDistilled
from torch import nn
from torch.nn.modules import module as nn_module

from vpt_fast.modules.hooks import HookWatch, has_hooks, has_own_forward, with_descendants
from vpt_fast.modules.row_by_row import ROW_NORMS

_AFTER_BLOCKS = ("norm", "fc_norm", "head_drop", "head_hidden", "head", "head_dist")

_CONTAINERS = (nn.Sequential, nn.ModuleList)


def rows_read(model: Any, last: type[nn.Module]) -> int | None:
    """Return the number of first rows of the last block's output that are to be computed.

    Args:
        model: timm VisionTransformer or Eva, plain, tuned or baked.
        last: Class of a last block that can compute its first rows alone.

    Returns:
        Number of rows; None for all, as where the head reads others, or a hook would see them.
    """
    if not _reads_first(model, last) or nn_module._has_any_global_hook():
        return None
    return None if True in map(_is_watched, _watched(model)) else _count(model)


def _reads_first(model: Any, last: type[nn.Module]) -> bool:
    """Return whether the head reads first rows only, and the last block can compute them alone."""
    if model.global_pool != "token" or model.attn_pool is not None:
        return False
    own = vars(model)
    if "forward_head" in own or "pool" in own or "forward_features" in own:
        return False  # put on this instance: they may read any row
    if type(model._modules["norm"]) not in ROW_NORMS:
        return False
    # In its dictionary: this runs in every call, and nn.Module's attribute access is slow.
    all_blocks = model._modules["blocks"]
    if "_compiled_call_impl" in all_blocks.__dict__ or type(all_blocks) not in _CONTAINERS:
        return False  # they are called as one module
    blocks = all_blocks._modules
    if not blocks:
        return False
    block = next(reversed(blocks.values()))
    # Prompt rows that stand before these would be read in their place.
    rows = block.__dict__.get("rows")
    return type(block) is last and (rows is None or rows.prefix >= _count(model))


def _is_watched(module: nn.Module) -> bool:
    """Return whether a hook or a replaced forward would see that a module gets these rows only."""
    return has_hooks(module) or has_own_forward(module)


def _count(model: Any) -> int:
    return 2 if isinstance(model, VisionTransformerDistilled) else 1


def _watched(model: Any) -> list[nn.Module]:
    """Return the modules that get first rows only, or the last block's output."""
    modules = model._modules
    after = [modules[name] for name in _AFTER_BLOCKS if modules.get(name) is not None]
    inside = (m for module in (model.blocks[-1], *after) for m in with_descendants(module))
    return [model.blocks, *inside]


class HeadReading:
    """`rows_read`, cached until something that it depends on changes.

    Args:
        last: As for `rows_read`.
    """

    def __init__(self, last: type[nn.Module]) -> None:
        self._last, self._hooks = last, HookWatch()
        self._own: list[dict[str, Any]] = []
        self._containers: list[dict[str, Any]] = []
        self._children: list[Any] = []

    def __deepcopy__(self, memo: Any) -> HeadReading:
        """Return an empty cache: a copied model has modules of its own."""
        return HeadReading(self._last)

    def __reduce__(self) -> Any:
        """Pickle as an empty cache."""
        return HeadReading, (self._last,)

    def rows(self, model: Any) -> int | None:
        """Return `rows_read` of the model."""
        if torch.compiler.is_compiling():
            return rows_read(model, self._last)
        if not _reads_first(model, self._last):
            return None
        containers = self._containers
        if (
            not containers
            or containers[0] is not model._modules
            or [*chain.from_iterable(map(dict.values, containers))] != self._children
        ):
            self._read(model)
        if self._hooks.found(lambda: self._own):
            return None
        return None if True in map(contains, self._own, repeat("forward")) else _count(model)

    def _read(self, model: Any) -> None:
        modules = _watched(model)
        self._hooks = HookWatch()  # first: other threads may read while this one writes
        self._own = [vars(module) for module in modules]
        self._containers = [model._modules, *(module._modules for module in modules)]
        self._children = [*chain.from_iterable(map(dict.values, self._containers))]
