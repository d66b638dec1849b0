"""How much of the last block's output a model's head reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.models.deit import VisionTransformerDistilled
from torch import nn
from torch.nn.modules import module as nn_module

from vpt_fast.hooks import has_hooks, with_descendants

_AFTER_BLOCKS = ("norm", "fc_norm", "head_drop", "head_hidden", "head", "head_dist")


def rows_read(
    model: Any, last: type[nn.Module], is_watched: Callable[[nn.Module], bool] = has_hooks
) -> int | None:
    """Rows of the last block's output that the head reads, if they are its first and nobody looks.

    Args:
        model: a timm VisionTransformer, plain or of our classes.
        last: the class that its last block must have to compute these rows alone.
        is_watched: whether somebody would notice that a module sees these rows only.

    Returns:
        Their number; None if all rows have to be computed.
    """
    if model.global_pool != "token" or model.attn_pool is not None or not len(model.blocks):
        return None
    block = model.blocks[-1]
    if type(block) is not last or nn_module._has_any_global_hook():
        return None
    modules = model._modules
    after = [modules[name] for name in _AFTER_BLOCKS if modules.get(name) is not None]
    watched = [model.blocks, *(m for module in (block, *after) for m in with_descendants(module))]
    if True in map(is_watched, watched):
        return None
    return 2 if isinstance(model, VisionTransformerDistilled) else 1
