"""Looking at a module part by part: what is known is accepted, anything else is refused by name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

from torch import nn

Parts = dict[str, tuple[type, ...] | None]
"""Names of a module's parts, and their types; None for any."""


def refuse(where: str, value: Any, why: str) -> NoReturn:
    """Raise the ValueError that names what cannot be tuned."""
    raise ValueError(f"cannot tune this model: {where} is {value}; {why}")


def name_of(value: Any) -> str:
    """Name of a value's type."""
    return type(value).__name__


def check_parts(
    module: nn.Module,
    parts: Parts,
    where: str,
    optional: str = "",
    parameters: Iterable[str] = (),
) -> None:
    """Raise ValueError if a part is missing a known type, or is one too many.

    Args:
        module: what is looked at.
        parts: what it must have.
        where: its name, for the message.
        optional: a part that it may have.
        parameters: names of its own parameters.
    """
    if "forward" in vars(module):
        refuse(f"{where}.forward", "replaced on the instance", "restore the class's own")
    for name, types in parts.items():
        part = getattr(module, name)
        if types is not None and type(part) not in types:
            needed = ", ".join(sorted({t.__name__ for t in types}))
            found = f"{type(part).__module__}.{type(part).__qualname__}"
            if nn.Linear in types:
                needed += " of torch.nn; tune first, then put another in its place: it is called"
            refuse(f"{where}.{name}", found, f"known are: {needed}")
    extra = sorted(set(module._modules) - set(parts) - {optional})
    extra += sorted(set(module._parameters) - set(parameters))
    if extra:
        name = extra[0]
        refuse(f"{where}.{name}", name_of(getattr(module, name)), "timm's class has no such part")


def check_apart(blocks: Iterable[tuple[str, nn.Module]]) -> None:
    """Refuse a block that stands in two places: each has prompts of its own.

    Args:
        blocks: names and blocks, in their order.
    """
    places: dict[int, str] = {}
    for name, block in blocks:
        before = places.setdefault(id(block), name)
        if before != name:
            refuse(name, f"{before} again", "give each place a copy (copy.deepcopy)")
