"""Readings of blocks that can be fused, and whether they are still valid.

A block's modules are read once. Every call then checks all that the fused function depends on or
would skip: modules and their types, hooks, forwards of instances, dropout, flags, settings, and the
weights themselves. A check takes some microseconds a block, fewer for several blocks together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain, repeat
from operator import attrgetter, contains, is_not, itemgetter
from typing import Any, NamedTuple

from torch import Tensor

from vpt_fast.models.fusion.weights_reading import BlockSettings, Memory, WeightsReading
from vpt_fast.modules.hooks import HookWatch, with_descendants
from vpt_fast.ops.block.parts import BlockWeights

_NO_PARAMETERS: dict[str, Any] = {}

# Container and module of each field of BlockWeights.
_MODULE_OF = {
    "norm1": ("", "norm1"), "qkv": ("attn", "qkv"), "proj": ("attn", "proj"),
    "scale1": ("", "ls1"), "norm2": ("", "norm2"), "fc1": ("mlp", "fc1"), "fc2": ("mlp", "fc2"),
    "scale2": ("", "ls2"), "value": ("mlp", "fc1_x"), "mlpnorm": ("mlp", "norm"),
    "q": ("attn", "q_proj"), "k": ("attn", "k_proj"), "v": ("attn", "v_proj"),
    "attnnorm": ("attn", "norm"),
}  # fmt: skip

# Parameters and buffers of timm's EvaBlock and its attention.
_OF_THE_BLOCK = {"scale1": "gamma_1", "scale2": "gamma_2"}
_OF_ATTENTION = ("q_bias", "k_bias", "v_bias")

Attributes = dict[str, Any]
"""Dictionary of a module: its own, its children's or its parameters'."""

_trains, _children = itemgetter("training"), itemgetter("_modules")
_known = attrgetter("known")


def weight_slots(block: Any) -> list[tuple[Attributes, str]]:
    """Return dictionary and key of every field of `BlockWeights`, in order.

    Folded weights, and what belongs to another module, have an empty dictionary.
    """
    return [_slot(block, field) for field in BlockWeights._fields]


def _slot(block: Any, field: str) -> tuple[Attributes, str]:
    modules, attn = block._modules, block._modules["attn"]
    if field == "position_bias":
        return attn._parameters, "relative_position_bias_table"
    if field in _OF_ATTENTION and attn._modules.get("qkv") is not None:
        return attn._buffers if field in attn._buffers else attn._parameters, field
    if _OF_THE_BLOCK.get(field) in block._parameters:
        return block._parameters, _OF_THE_BLOCK[field]
    module, _, leaf = field.partition("_")
    if module not in _MODULE_OF:  # belongs to another block, or to the model
        return _NO_PARAMETERS, field
    container, name = _MODULE_OF[module]
    parts = modules if not container else modules[container]._modules
    if module == "fc1" and "fc1_g" in parts:
        name = "fc1_g"
    part = None if name in block.__dict__.get("folded", ()) else parts.get(name)
    return _NO_PARAMETERS if part is None else part._parameters, leaf or "gamma"


class _Parts(NamedTuple):
    """All of the blocks that is checked. It has no reference to a block, which refers to it."""

    containers: list[Attributes]  # children of the block, of its attention and of its MLP
    modules: list[Any]  # in the containers
    types: list[type]
    attributes: list[Attributes]  # of every module inside
    droppers: list[Attributes]  # of those modules that may drop elements or paths
    scalars: list[Attributes]
    scalar_names: list[str]
    scalar_values: list[Any]
    slots: list[Attributes]  # of the weights
    slot_names: list[str]
    folded: list[Any]  # names of the modules that are folded into others
    folded_parameters: list[Attributes]


def _parts_of(block: Any) -> _Parts:
    parts = block._modules
    attn, mlp, folded = parts["attn"], parts["mlp"], block.__dict__.get("folded")
    containers = [parts, attn._modules, mlp._modules]
    modules = [*chain.from_iterable(map(dict.values, containers))]
    attributes = [m.__dict__ for part in parts.values() for m in with_descendants(part)]
    called = [*map(parts.get, ("prompt", "prompt_update"))]
    prompts = {id(m.__dict__) for part in called for m in with_descendants(part)}
    act, inner = mlp._modules["act"], mlp._modules["norm"]
    scalars = [(attn, "num_heads"), (attn, "scale"), (parts["norm1"], "eps")]
    scalars += [(parts["norm2"], "eps"), (act, "approximate"), (attn, "head_dim")]
    scalars += [(attn, "fused_attn"), (attn, "training"), (attn, "rotate_half")]
    scalars += [(mlp, "gate_last"), (mlp, "chunk_dim"), (inner, "eps")]
    if attn._modules.get("norm") is not None:
        scalars.append((attn._modules["norm"], "eps"))
    slots = weight_slots(block)
    return _Parts(
        containers, modules, [*map(type, modules)], attributes,
        [d for d in attributes if ("p" in d or "drop_prob" in d) and id(d) not in prompts],
        [module.__dict__ for module, _ in scalars], [name for _, name in scalars],
        [module.__dict__.get(name) for module, name in scalars],
        [parameters for parameters, _ in slots], [name for _, name in slots],
        [folded], [parts[name]._parameters for name in folded or ()],
    )  # fmt: skip


class _Reading:
    """Reading of blocks.

    Args:
        parts: Parts of one block, or of several blocks in order.
    """

    def __init__(self, parts: _Parts) -> None:
        self._parts, self._hooks = parts, HookWatch()

    def __deepcopy__(self, memo: Any) -> None:
        """Return None: a copy of a block is read anew."""
        return

    def __reduce__(self) -> Any:
        """Pickle as None: a pickled block is read anew."""
        return type(None), ()

    def tensors(self, blocks: Iterable[Any]) -> list[Tensor | None] | None:
        """Return all weights of the blocks that were read; None if the reading is not valid."""
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
        for parameters in p.folded_parameters:
            if any(w is not None and w.requires_grad for w in parameters.values()):
                return None
        return [*map(dict.get, p.slots, p.slot_names)]

    def _watched(self, blocks: Iterable[Any]) -> list[Attributes]:
        """Return the attributes of the modules whose hooks prevent fusion."""
        return self._parts.attributes


def _drops(module: Attributes) -> bool:
    return bool(module["training"] and (module.get("p") or module.get("drop_prob")))


class BlockReading(_Reading):
    """Reading of one block.

    Args:
        block: Block that `fused_block.can_fuse`.
        settings: Its settings.
        before: Weights of an earlier reading, or None.

    Attributes:
        known: Weights at the last check, or None.
    """

    def __init__(
        self, block: Any, settings: BlockSettings, before: WeightsReading | None = None
    ) -> None:
        super().__init__(_parts_of(block))
        self._settings = settings
        same = before is not None and before.settings == settings
        self.known: WeightsReading | None = before if same else None

    @property
    def parts(self) -> _Parts:
        """Parts of the block."""
        return self._parts

    def current(self, block: Any) -> WeightsReading | None:
        """Return the block's weights; None if the reading is not valid, or a weight is trained.

        Args:
            block: The block that was read; it refers to its reading, and not the reverse.
        """
        weights, known = self.tensors((block,)), self.known
        if weights is None:
            return None
        if known is None or not known.memory.is_of(weights):
            self.known = known = WeightsReading(BlockWeights._make(weights), self._settings)
        return known if known.plain and not known.memory.is_being_trained() else None


class BlocksReading(_Reading):
    """Reading of several blocks that run as one function, without calls of their `forward`.

    Args:
        blocks: Blocks without hooks, forwards, compiled calls, prompt rows and adapters.
        readings: Reading of each block.
        weights: Weights of each block.

    Attributes:
        weights: The same.
        prompts: Module of each block that computes its prompts, or None.
        static_kv: Blocks whose K_p and V_p are computed together, cached by `look_ahead`.
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
        self.static_kv: Any = None

    def holds(self, blocks: Sequence[Any]) -> bool:
        """Return whether these are the blocks, and nothing has changed since they were read."""
        own = [*map(vars, blocks)]
        if (
            len(own) != len(self._children)
            or True in map(is_not, map(_children, own), self._children)
            # Each block's own reading: there is one copy of its weights, not two.
            or True in map(is_not, [d.get("_reading") for d in own], self._readings)
            or True in map(is_not, map(_known, self._readings), self.weights)
            or [*map(type, blocks)] != self._types
            or [d.get("rows") for d in own] != self._rows
            or True in map(contains, own, repeat("forward"))
            or True in map(contains, own, repeat("_compiled_call_impl"))
        ):
            return False
        weights, memory = self.tensors(blocks), self._memory
        return weights is not None and memory.is_of(weights) and not memory.is_being_trained()

    def _watched(self, blocks: Iterable[Any]) -> list[Attributes]:
        return [*self._parts.attributes, *(block.__dict__ for block in blocks)]


def read_together(
    blocks: Sequence[Any], read: Callable[[Any], BlockReading | None]
) -> BlocksReading | None:
    """Return a valid reading of several blocks; None if one of them does not run with the others.

    Args:
        blocks: One or more blocks.
        read: Function that returns a block's reading, just checked; None if it has none.
    """
    # The last block refers to it, so that a block taken out of a model does not hold the others.
    own = blocks[-1].__dict__
    known: BlocksReading | None = own.get("_together")
    if known is not None:
        if known.holds(blocks):
            return known
        own.pop("_together", None)  # frees cached copies, also if no block is fused any more
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
    """Drop the reading of a block, and that of the blocks of which it is the last."""
    block.__dict__.pop("_reading", None)
    block.__dict__.pop("_together", None)


def copies_of(attributes: Iterable[Attributes]) -> list[Any]:
    """Return the cached copies of weights that blocks read.

    Args:
        attributes: `__dict__` of the blocks.
    """
    found: list[WeightsReading] = []
    for own in attributes:
        reading, together = own.get("_reading"), own.get("_together")
        if reading is not None and reading.known is not None:
            found.append(reading.known)
        if together is not None:
            found += together.weights
    return [known.held() for known in found]
