"""Blocks that can be fused, as they were read from their modules, and whether that still holds.

Modules are read once. Every call then looks whether anything has changed that the fused function
depends on or would pass by: modules and their types, hooks, forwards put on instances, dropout,
flags, scalars, and the weights themselves. That look takes some microseconds a block, fewer where
several are looked at together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain, repeat
from operator import attrgetter, contains, is_not, itemgetter
from typing import Any, NamedTuple

from torch import Tensor

from vpt_fast.models.fusion.weights_reading import Memory, WeightsReading
from vpt_fast.modules.hooks import HookWatch, with_descendants
from vpt_fast.ops.block.parts import BlockWeights

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
_known = attrgetter("known")


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
    """Everything of blocks that is looked at. Nothing in it holds a block: blocks hold it."""

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
    scalars += [(parts["norm2"], "eps"), (act, "approximate"), (attn, "head_dim")]
    scalars += [(attn, "fused_attn"), (attn, "training")]
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
        activation: of its MLP, one of `vpt_fast.ops.rowwise.activation.KINDS`.
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
        return known if known.plain and not known.memory.is_being_trained() else None


class BlocksReading(_Reading):
    """What is read of several blocks, and of whether each may be called past its own `forward`.

    Args:
        blocks: without hooks, forwards, compiled calls, prompt rows and adapters of their own.
        readings: of the blocks, in the same order.

    Attributes:
        weights: of each block.
        prompts: module of each block, or None.
        prompt_kv: what makes keys of prompts, worked out from `weights` by `look_ahead`.
    """

    def __init__(
        self,
        blocks: Sequence[Any],
        readings: Sequence[BlockReading],
        weights: Sequence[WeightsReading],
    ) -> None:
        lists = zip(*(reading.parts for reading in readings), strict=True)
        super().__init__(_Parts._make([*chain.from_iterable(found)] for found in lists))
        self.weights, self._readings = list(weights), list(readings)
        self._memory = Memory([*chain.from_iterable(read.weights for read in self.weights)])
        own = [*map(vars, blocks)]
        self._children = [*map(_children, own)]
        self._types = [*map(type, blocks)]
        self._rows = [d.get("rows") for d in own]
        self.prompts = [children.get("prompt") for children in self._children]
        self.prompt_kv: Any = None

    def holds(self, blocks: Sequence[Any]) -> bool:
        """Whether these are the blocks, and all is as it was read; if not, each is to be read."""
        own = [*map(vars, blocks)]
        if (
            len(own) != len(self._children)
            or True in map(is_not, map(_children, own), self._children)
            # What each is read as by itself: there is one copy of its weights, not two.
            or True in map(is_not, [d.get("_reading") for d in own], self._readings)
            or True in map(is_not, map(_known, self._readings), self.weights)
            or [*map(type, blocks)] != self._types
            or [d.get("rows") for d in own] != self._rows
            or True in map(contains, own, repeat("forward"))
            or True in map(contains, own, repeat("_compiled_call_impl"))
        ):
            return False
        found, memory = self.tensors(blocks), self._memory
        return found is not None and memory.is_of(found) and not memory.is_being_trained()

    def _watched(self, blocks: Iterable[Any]) -> list[Attributes]:
        return [*self._parts.attributes, *(block.__dict__ for block in blocks)]


def read_together(
    blocks: Sequence[Any], read: Callable[[Any], BlockReading | None]
) -> BlocksReading | None:
    """Blocks as they are; None if one of them runs by itself.

    Args:
        blocks: one or more.
        read: a block's reading, of which `now` has just found the weights; None if it has none.
    """
    # The last block holds it: one that is taken out of a model lets go of the others.
    own = blocks[-1].__dict__
    known: BlocksReading | None = own.get("_together")
    if known is not None:
        if known.holds(blocks):
            return known
        own.pop("_together", None)  # copies that are held there are of no use, fused or not
    readings, weights = [], []
    for block in blocks:
        reading = read(block)
        found = None if reading is None else reading.known
        if reading is None or found is None:
            return None
        readings.append(reading)
        weights.append(found)
    known = own["_together"] = BlocksReading(blocks, readings, weights)
    return known


def forget(block: Any) -> None:
    """Let go of what was read of a block, and of the row of blocks that it is the last one of."""
    block.__dict__.pop("_reading", None)
    block.__dict__.pop("_together", None)


def copies_of(attributes: Iterable[Attributes]) -> list[Any]:
    """The copies of weights that blocks read now, by the modules' `__dict__`."""
    found: list[WeightsReading] = []
    for own in attributes:
        reading, together = own.get("_reading"), own.get("_together")
        if reading is not None and reading.known is not None:
            found.append(reading.known)
        if together is not None:
            found += together.weights
    return [known.held() for known in found]
