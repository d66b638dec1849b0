"""Tuned models that share weights: undoing one may change weights that another needs frozen.

Nothing in a model tells which others have its parameters: tuned models are listed here by weak
references, in the order in which they were tuned or copied.
"""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable, Iterable

from torch import nn

Check = Callable[[nn.Module], bool]
"""Predicate: a model is tuned now."""

_numbers = itertools.count()
_tuned: dict[int, weakref.ref[nn.Module]] = {}


def remember(model: nn.Module) -> None:
    """List `model` as the latest of the tuned models."""
    number = next(_numbers)
    _tuned[number] = weakref.ref(model, lambda _: _tuned.pop(number, None))


def check_own_blocks(model: nn.Module, blocks: Iterable[nn.Module], is_tuned: Check) -> None:
    """Raise ValueError if a block of `model` is a block of another tuned model too.

    Args:
        model: Model that is tuned, or about to be.
        blocks: Blocks that get prompts, or lose them.
        is_tuned: Predicate: a model is tuned now.
    """
    own = {id(block) for block in blocks}
    for _, other in _others(model, is_tuned, lambda other: {*map(id, _modules(other))} & own):
        raise ValueError(
            f"blocks of this {type(model).__name__} are blocks of another tuned model too, a "
            f"{type(other).__name__}: both would change; give it copies (copy.deepcopy)"
        )


def check_latest(model: nn.Module, is_tuned: Check) -> None:
    """Raise ValueError if a model that was tuned after `model` has parameters of it."""
    own = {*map(id, model.parameters())}
    found = _others(
        model,
        is_tuned,
        lambda other: {id(p) for m in _modules(other) for p in m._parameters.values()} & own,
    )
    mine = max((number for number, known in _known() if known is model), default=-1)
    for number, other in found:
        if number > mine:
            names = {id(p): name for name, p in model.named_parameters()}
            shared = next(names[id(p)] for p in other.parameters() if id(p) in own)
            raise ValueError(
                f"{shared} is also a parameter of a {type(other).__name__} that was tuned after "
                "this one and needs it as it is; call remove_prompts on that one first"
            )


def _modules(model: nn.Module) -> list[nn.Module]:
    """Return the modules of a model, as `model.modules()` does in three times the time."""
    found, seen = [model], {id(model)}
    for module in found:
        for part in module._modules.values():
            if part is not None and id(part) not in seen:
                seen.add(id(part))
                found.append(part)
    return found


def _known() -> list[tuple[int, nn.Module]]:
    found = [(number, known()) for number, known in [*_tuned.items()]]
    return [(number, model) for number, model in found if model is not None]


def _others(
    model: nn.Module, is_tuned: Check, shares: Callable[[nn.Module], object]
) -> list[tuple[int, nn.Module]]:
    """Return number and model of the other tuned models that share something."""

    def look() -> list[tuple[int, nn.Module]]:
        known = [(number, other) for number, other in _known() if other is not model]
        return [(n, other) for n, other in known if is_tuned(other) and shares(other)]

    found = look()
    if found:
        gc.collect()  # tuned models are cycles: one without references may still be listed
        found = look()
    return found
