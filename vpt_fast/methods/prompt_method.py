"""Base of the prompt methods' settings."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

from vpt_fast.methods.fields import check_count, check_dropout


@dataclass(frozen=True)
class PromptMethod:
    """Settings of a prompt method: a frozen dataclass, which `vpt_fast.register_method` registers.

    Fields are numbers, strings, bools, None, and tuples of these: adapters store them as JSON. A
    class that checks fields of its own does so in `__post_init__`, after `super().__post_init__()`;
    `prompt_tune` checks that they have the types that they are declared with.

    Args:
        num_prompts: Number of prompts p of each block, at least 0.
        dropout: Probability of prompt dropout, an independent mask per image and block; in [0, 1).

    Attributes:
        name: Name under which the method is registered.
        paper: Where it was published, for lists of methods.
        equation: What its prompts are, for lists of methods.

    Raises:
        TypeError: If a field is of the wrong type.
        ValueError: If a field is out of range.
    """

    num_prompts: int = 10
    dropout: float = 0.0

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    equation: ClassVar[str] = ""

    def __post_init__(self) -> None:
        check_count("num_prompts", self.num_prompts, 0)
        check_dropout("dropout", self.dropout)

    def prompted_blocks(self, depth: int) -> tuple[int, ...]:
        """Return the indices of those of `depth` blocks that get prompts, ascending: all of them.

        Where an unprompted block follows a prompted one, prompt rows pass through it as tokens.
        """
        return tuple(range(depth)) if self.num_prompts else ()


def prompted_blocks(method: Any, depth: int) -> tuple[int, ...]:
    """Return which of `depth` blocks get prompts of a method.

    Raises:
        ValueError: They are not indices of blocks in ascending order.
    """
    blocks = method.prompted_blocks(depth)
    try:
        found = tuple(map(operator.index, blocks))
    except TypeError:
        found = (-1,)
    if list(found) != sorted({*found} & {*range(depth)}):
        raise ValueError(
            f"method {method.name!r}: prompted_blocks({depth}) is {blocks!r}; return a tuple of "
            f"indices from 0 to {depth - 1} in ascending order"
        )
    return found
