"""Families: one record per timm class, looked up once and handed down."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vpt_fast.methods import Method
from vpt_fast.models.isotropic.block import PromptedBlock
from vpt_fast.models.tuned import Tuned

# Imported for a model of the class, so that the core does not import its options.
_MODULES = {
    "timm.models.vision_transformer.VisionTransformer": "vpt_fast.models.vit.family",
    "timm.models.deit.VisionTransformerDistilled": "vpt_fast.models.vit.family",
    "timm.models.eva.Eva": "vpt_fast.models.eva.family",
    "timm.models.swin_transformer.SwinTransformer": "vpt_fast.models.swin.family",
}

KNOWN = tuple(name.rpartition(".")[2] for name in _MODULES)
"""Names of the timm classes that can be tuned."""


def _own_name(model: Any, name: str) -> str:
    return name


@dataclass(eq=False)
class Family:
    """A timm class and its tuned form.

    Attributes:
        plain: timm's class of the model.
        tuned: Class that a tuned model is given.
        plain_parts: timm's class of each part of a tuned model, by the class that it is given.
        check: Raises where a model of this class and a method do not fit each other.
        install: Gives the blocks of a model their classes and prompt rows.
        places: Owner of what blocks of one width share (the model, or a stage), and height and
            width of the grid of tokens, of each block of a model.
        plain_inputs: Inputs (B, N, D) of each block in turn in a tuned model without its prompts,
            for batches of images.
        block: Class that tuned blocks are given, of models of one width; None for blocks in stages
            of different widths, with attention in windows.
        name_as_block: A parameter's name as a model without stages has it, `blocks.{i}.`.
    """

    plain: type[nn.Module]
    tuned: type[Tuned]
    plain_parts: Mapping[type, type]
    check: Callable[[Any, Method], None]
    install: Callable[[Any], None]
    places: Callable[[Any], Sequence[tuple[Any, Sequence[int]]]]
    plain_inputs: Callable[[Any, Sequence[Tensor]], Iterator[list[Tensor]]]
    block: type[PromptedBlock] | None
    name_as_block: Callable[[Any, str], str] = _own_name

    @property
    def in_stages(self) -> bool:
        """Whether blocks stand in stages."""
        return self.block is None


def family_of(model: Any) -> Family | None:
    """Return the record of a plain or tuned model's class; None for any other class.

    The class is looked up exactly: a subclass may compute anything.
    """
    plain = getattr(type(model), "plain_class", type(model))
    module = _MODULES.get(f"{plain.__module__}.{plain.__qualname__}")
    if module is None:
        return None
    families: Mapping[type, Family] = importlib.import_module(module).FAMILIES
    return families.get(plain)
