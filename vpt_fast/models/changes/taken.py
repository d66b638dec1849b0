"""Take out of a model what a method put into it, and put it back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from vpt_fast.models.fusion.block_reading import forget
from vpt_fast.models.tuned import ADDED, SHARED, UPDATE

_OF_MODELS = ADDED, ("prompt_tokens",), ("_head_reading", "_rope_tables")
_OF_PARTS = (
    ("prompt", "adapter", "prompt_projector", SHARED, UPDATE),
    (),
    ("prompt", "rows", "memory", "tables"),
)  # fmt: skip
"""Names of modules, parameters and plain attributes."""


@dataclass
class Taken:
    """What a method put into one part of a model.

    Attributes:
        part: The part; the model itself is one.
        kind: Class that the method gave it.
        modules, parameters, attributes: What it had besides, by name.
    """

    part: nn.Module
    kind: type
    modules: dict[str, Any]
    parameters: dict[str, Any]
    attributes: dict[str, Any]


def take_out(
    model: nn.Module, plain: Mapping[type, type], keep_readings: bool = False
) -> list[Taken]:
    """Remove what a method added, and restore the classes of parts, not the model's own.

    Args:
        model: Tuned model.
        plain: Original class of each part by its tuned class.
        keep_readings: Whether readings of the frozen weights stay, as they will be used again.
    """
    found = [_taken(model, *_OF_MODELS)]
    for part in [*model.modules()]:  # wrapped by other modules or not
        if not keep_readings:
            forget(part)
        if type(part) in plain:
            found.append(_taken(part, *_OF_PARTS))
            part.__class__ = plain[type(part)]
    return found


def put_back(taken: Iterable[Taken]) -> None:
    """Give parts back what was taken out of them, and their classes."""
    for each in taken:
        own = vars(each.part)
        own["_modules"].update(each.modules)
        own["_parameters"].update(each.parameters)
        own.update(each.attributes)
        each.part.__class__ = each.kind


def _taken(part: nn.Module, *names: Iterable[str]) -> Taken:
    own = vars(part)
    places = own["_modules"], own["_parameters"], own
    found = [
        {name: place.pop(name) for name in wanted if name in place}
        for place, wanted in zip(places, names, strict=True)
    ]
    return Taken(part, type(part), *found)
