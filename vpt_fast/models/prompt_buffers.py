"""Buffers of prompts, which may count or average, while a block is computed again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from vpt_fast.models.tuned import UPDATE
from vpt_fast.modules.prompt_module import PromptModule


def with_the_same_buffers(module: nn.Module, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function; from its second call on it finds buffers of prompts as at its first.

    What it then writes to them is lost: a module that counts or averages does so once.
    """
    places = [sub._buffers for part in modules_of_prompts(module) for sub in part.modules()]
    places = [buffers for buffers in places if buffers]
    before: list[dict[str, Tensor | None]] = []

    def same(*args: Any) -> Any:
        if not before:
            before.extend(map(_copies, places))
            return function(*args)
        now = [dict(buffers) for buffers in places]
        try:
            for buffers, values in zip(places, before, strict=True):
                buffers.update(_copies(values))
            return function(*args)
        finally:
            for buffers, values in zip(places, now, strict=True):
                buffers.update(values)

    return same if places else function


def _copies(buffers: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: t if t is None or t.requires_grad else t.clone() for name, t in buffers.items()}


def modules_of_prompts(module: nn.Module) -> list[nn.Module]:
    """Return the modules of a block that make or change prompts, and what they share."""
    made = [part for part in module.modules() if isinstance(part, PromptModule)]
    shared = [part.shared for part in made if part.shared is not None]
    update = module._modules.get(UPDATE)
    return [*made, *shared, *([] if update is None else [update])]
