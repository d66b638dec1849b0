"""Blocks that can be fused, as they were read from their modules, and whether that still holds.

Modules are read once. Every call then looks whether anything has changed that the fused function
depends on or would pass by: modules and their types, hooks, forwards put on instances, dropout,
flags, scalars, and the weights themselves. That look takes some microseconds a block, fewer where
several are looked at together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain, repeat
from operator import contains, is_not, itemgetter
from typing import Any, NamedTuple

from torch import Tensor

from vpt_fast.hooks import HookWatch, with_descendants
from vpt_fast.ops.block_body import BlockWeights
from vpt_fast.weights_reading import Memory, WeightsReading

_NOTHING: dict[str, Any] = {}

# Where each field of BlockWeights is: container, module, parameter.
_PLACES = {
    "norm1": ("", "norm1"), "qkv": ("attn", "qkv"), "proj": ("attn", "proj"),
    "scale1": ("", "ls1"), "norm2": ("", "norm2"), "fc1": ("mlp", "fc1"), "fc2": ("mlp", "fc2"),
    "scale2": ("", "ls2"),
}  # fmt: skip

Attributes = dict[str, Any]
"""A dictionary of a module: its own, or that of its children or parameters."""

_trains, _children = itemgetter("training"), itemgetter("_modules")


def weight_slots(block: Any) -> list[tuple[Attributes, str]]:
    """Dictionary and key of every field of `BlockWeights`, in order; folded ones have none."""
    passed = block.__dict__.get("folded", ())
    slots: list[tuple[Attributes, str]] = []
    for field in BlockWeights._fields:
        if field == "position_bias":
            slots.append((block._modules["attn"]._parameters, "relative_position_bias_table"))
            continue
        module, _, leaf = field.partition("_")
        if module not in _PLACES:  # the branch's scale belongs to another block
            slots.append((_NOTHING, field))
            continue
        container, name = _PLACES[module]
        parts = block._modules if not container else block._modules[container]._modules
        part = None if name in passed else parts.get(name)
        slots.append((_NOTHING if part is None else part._parameters, leaf or "gamma"))
    return slots


class _Parts(NamedTuple):
    """Everything of blocks that is looked at; nothing in it holds a block, which holds it."""

    containers: list[Attributes]  # children of the block, of its attention and of its MLP
    modules: list[Any]  # in the containers
    types: list[type]
    attributes: list[Attributes]  # of every module inside
    droppers: list[Attributes]  # of those of them that may drop something
    scalars: list[Attributes]
    scalar_names: list[str]
    scalar_values: list[Any]
    slots: list[Attributes]  # of the weights
    slot_names: list[str]
    folded: list[Any]  # names of the modules that are folded into others
    passed: list[Attributes]  # their parameters


def _parts_of(block: Any) -> _Parts:
    parts = block._modules
    attn, mlp, folded = parts["attn"], parts["mlp"], block.__dict__.get("folded")
    containers = [parts, attn._modules, mlp._modules]
    modules = [*chain.from_iterable(map(dict.values, containers))]
    attributes = [m.__dict__ for part in parts.values() for m in with_descendants(part)]
    act = mlp._modules["act"]
    scalars = [(attn, "num_heads"), (attn, "scale"), (parts["norm1"], "eps")]
    scalars += [(parts["norm2"], "eps"), (act, "approximate")]
    slots = weight_slots(block)
    return _Parts(
        containers, modules, [*map(type, modules)], attributes,
        [d for d in attributes if "p" in d or "drop_prob" in d],
        [module.__dict__ for module, _ in scalars], [name for _, name in scalars],
        [module.__dict__.get(name) for module, name in scalars],
        [place for place, _ in slots], [name for _, name in slots],
        [folded], [parts[name]._parameters for name in folded or ()],
    )  # fmt: skip


class _Reading:
    """Blocks as they were read.

    Args:
        parts: of one block, or of several, those of one after those of the other.
    """

    def __init__(self, parts: _Parts) -> None:
        self._parts, self._hooks = parts, HookWatch()

    def __deepcopy__(self, memo: Any) -> None:
        """Copies of a block are read anew."""
        return

    def __reduce__(self) -> Any:
        """Pickled blocks are read anew."""
        return type(None), ()

    def tensors(self, blocks: Iterable[Any]) -> list[Tensor | None] | None:
        """All weights of the blocks that were read; None if these have to be read anew."""
        p = self._parts
        modules = [*chain.from_iterable(map(dict.values, p.containers))]
        if (
            modules != p.modules
            or [*map(type, modules)] != p.types
            or self._hooks.found(lambda: self._watched(blocks))
            or True in map(contains, p.attributes, repeat("forward"))
            or [*map(dict.get, p.scalars, p.scalar_names)] != p.scalar_values
            or [block.__dict__.get("folded") for block in blocks] != p.folded
            or (True in map(_trains, p.droppers) and any(map(_drops, p.droppers)))
        ):
            return None
        for passed in p.passed:
            if any(w is not None and w.requires_grad for w in passed.values()):
                return None
        return [*map(dict.get, p.slots, p.slot_names)]

    def _watched(self, blocks: Iterable[Any]) -> list[Attributes]:
        """Of the modules that nobody may hook."""
        return self._parts.attributes


def _drops(module: Attributes) -> bool:
    return bool(module["training"] and (module.get("p") or module.get("drop_prob")))


class BlockReading(_Reading):
    """What the fused function reads of one block.

    Args:
        block: one that `fused_block.can_fuse`.
        activation: of its MLP, one of `vpt_fast.ops.activation.KINDS`.
    """

    def __init__(self, block: Any, activation: str) -> None:
        super().__init__(_parts_of(block))
        self._scalars = (*self._parts.scalar_values[:4], activation)
        self.known: WeightsReading | None = None

    @property
    def parts(self) -> _Parts:
        """For a reading of several blocks."""
        return self._parts

    def now(self, block: Any) -> WeightsReading | None:
        """The block's weights; None if it has to be read anew, or one of them is trained.

        Args:
            block: the one that was read, which a reading does not hold: it is held by it.
        """
        found, known = self.tensors((block,)), self.known
        if found is None:
            return None
        if known is None or not known.memory.is_of(found):
            self.known = known = WeightsReading(BlockWeights._make(found), self._scalars)
        return known if known.plain and not known.memory.is_trained() else None


class BlocksReading(_Reading):
    """What is read of several blocks, and of whether each may be called past its own `forward`.

    Args:
        blocks: without hooks, forwards, compiled calls and prompt rows of their own.
        readings: of the blocks, in the same order.

    Attributes:
        weights: of each block.
        prompts: module of each block, or None.
        adapted: whether one has an adapter.
        made: what is worked out from `weights`, for whoever uses the reading.
    """

    def __init__(self, blocks: Sequence[Any], readings: Sequence[BlockReading]) -> None:
        lists = zip(*(reading.parts for reading in readings), strict=True)
        super().__init__(_Parts._make([*chain.from_iterable(found)] for found in lists))
        self.weights: list[Any] = [reading.known for reading in readings]
        self._memory = Memory([*chain.from_iterable(read.weights for read in self.weights)])
        own = [*map(vars, blocks)]
        self._children = [*map(_children, own)]
        self._types = [*map(type, blocks)]
        self._rows = [d.get("rows") for d in own]
        self.prompts = [children.get("prompt") for children in self._children]
        self.adapted = any("adapter" in children for children in self._children)
        self.made: dict[Any, Any] = {}

    def now(self, blocks: Sequence[Any]) -> list[WeightsReading] | None:
        """The blocks' weights; None if one of them has to be looked at by itself.

        Args:
            blocks: as many as were read.
        """
        own = [*map(vars, blocks)]
        if (
            True in map(is_not, map(_children, own), self._children)
            or [*map(type, blocks)] != self._types
            or [d.get("rows") for d in own] != self._rows
            or True in map(contains, own, repeat("forward"))
            or True in map(contains, own, repeat("_compiled_call_impl"))
        ):
            return None
        found, memory = self.tensors(blocks), self._memory
        if found is None or not memory.is_of(found) or memory.is_trained():
            return None
        return self.weights

    def _watched(self, blocks: Iterable[Any]) -> list[Attributes]:
        return [*self._parts.attributes, *(block.__dict__ for block in blocks)]


def forget(block: Any) -> None:
    """Let go of everything that was read of a block, and of those that were read with it."""
    block.__dict__.pop("_reading", None)
    block.__dict__.pop("_together", None)
