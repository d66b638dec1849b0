"""A block that can be fused, as it was read from its modules, and whether that still holds.

Modules are read once. Every call then looks whether anything has changed that the fused function
depends on or would pass by: modules and their types, hooks, forwards put on instances, dropout,
flags, scalars, and the weights themselves. That look takes a few microseconds.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import chain, repeat
from operator import attrgetter, contains, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.modules import module as nn_module

from vpt_fast.hooks import hooks_version, with_descendants
from vpt_fast.ops.block_body import BlockConfig, BlockWeights, contiguous
from vpt_fast.ops.operators import Sites
from vpt_fast.ops.tracing import PLAIN

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

_GLOBAL_HOOKS: tuple[Any, ...] = tuple(getattr(nn_module, f"_global{name}") for name in _HOOKS)

_MOST_LAYOUTS = 32
"""Layouts of inputs that a reading remembers."""

_NOTHING: dict[str, Any] = {}

# Where each field of BlockWeights is: container, module, parameter.
_PLACES = {
    "norm1": ("", "norm1"), "qkv": ("attn", "qkv"), "proj": ("attn", "proj"),
    "scale1": ("", "ls1"), "norm2": ("", "norm2"), "fc1": ("mlp", "fc1"), "fc2": ("mlp", "fc2"),
    "scale2": ("", "ls2"),
}  # fmt: skip

Slot = tuple[dict[str, Any], str]

_address, _dtype = Tensor.data_ptr, attrgetter("dtype")
_requires_grad = attrgetter("requires_grad")
_hooks_of = itemgetter(*_HOOKS)


def weight_slots(block: Any) -> list[Slot]:
    """Dictionary and key of every field of `BlockWeights`, in order; folded ones have none."""
    passed = block.__dict__.get("folded", ())
    slots: list[Slot] = []
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


class KeyValueWeights(NamedTuple):
    """What makes keys and values: weight (2 A, D), the same transposed, and bias (2 A,) or None."""

    weight: Tensor
    transposed: Tensor
    bias: Tensor | None


def _matrices_of(weights: Sequence[Tensor | None]) -> list[Tensor]:
    """What matrix products read: the Linears' weights and biases."""
    return [w for w in (*weights[2:6], *weights[9:13]) if w is not None]


class BlockReading:
    """What the fused function reads of one block.

    Args:
        block: one that `fused_block.can_fuse`.
        activation: of its MLP, one of `vpt_fast.ops.activation.KINDS`.

    Attributes:
        scalars: heads, scale, eps1, eps2 and the activation.
        layouts: what is worked out for inputs of one layout, for whoever uses the reading.
    """

    def __init__(self, block: Any, activation: str) -> None:
        parts = block._modules
        attn, mlp = parts["attn"], parts["mlp"]
        self._containers = (parts, attn._modules, mlp._modules)
        self._modules = [*parts.values(), *attn._modules.values(), *mlp._modules.values()]
        self._types = list(map(type, self._modules))
        inside = [m for part in parts.values() for m in with_descendants(part)]
        self._attributes = [m.__dict__ for m in inside]
        self._droppers = [d for d in self._attributes if "p" in d or "drop_prob" in d]
        self._folded = block.__dict__.get("folded")
        self._passed = [parts[name]._parameters for name in self._folded or ()]
        names = {"num_heads": attn, "scale": attn}
        self._scalars = [(module.__dict__, name) for name, module in names.items()]
        self._scalars += [(parts[name].__dict__, "eps") for name in ("norm1", "norm2")]
        act = mlp._modules["act"].__dict__
        self._approximate = (act, act.get("approximate"))
        self._known_scalars = [place[name] for place, name in self._scalars]
        self.scalars = (*self._known_scalars, activation)
        self._slots = weight_slots(block)
        self._addresses: list[int] = []
        self._dtypes: list[torch.dtype] = []
        # Versions of hooks: at which there were none, and of the last look for any.
        self._unhooked = self._looked = -1
        self._contiguous = self._plain = True
        self._matrices: torch.dtype | None = None  # their dtype, if it is one
        self._cast: tuple[Any, BlockWeights] | None = None
        self._views: tuple[Tensor, Tensor | None, KeyValueWeights] | None = None
        self.weights_layout: Hashable = None
        self.layouts: dict[Hashable, tuple[BlockConfig, Sites]] = {}

    def __deepcopy__(self, memo: Any) -> None:
        """Copies of a block are read anew."""
        return

    def __reduce__(self) -> Any:
        """Pickled blocks are read anew."""
        return type(None), ()

    def weights(self, block: Any) -> BlockWeights | None:
        """The block's weights; None if it has to be read anew, or one of them is trained.

        Args:
            block: the one that was read, which a reading does not hold: it is held by it.
        """
        parts, attn, mlp = self._containers
        modules = [*parts.values(), *attn.values(), *mlp.values()]
        act, approximate = self._approximate
        if (
            modules != self._modules
            or [*map(type, modules)] != self._types
            or (hooks_version() != self._unhooked and self._is_hooked())
            or True in map(contains, self._attributes, repeat("forward"))
            or [place[name] for place, name in self._scalars] != self._known_scalars
            or block.__dict__.get("folded") is not self._folded
            or act.get("approximate") != approximate
        ):
            return None
        for d in self._droppers:
            if d["training"] and (d.get("p") or d.get("drop_prob")):
                return None
        for passed in self._passed:
            if any(w is not None and w.requires_grad for w in passed.values()):
                return None
        found = [place.get(name) for place, name in self._slots]
        there = [w for w in found if w is not None]
        if True in map(_requires_grad, there):
            return None
        addresses, dtypes = [*map(_address, there)], [*map(_dtype, there)]
        if addresses != self._addresses or dtypes != self._dtypes:
            self._look_at(found)
            self._addresses, self._dtypes = addresses, dtypes
        if not self._plain:
            return None
        if not self._contiguous:
            found = [contiguous(w) for w in found]
        return BlockWeights._make(found)

    def _is_hooked(self) -> bool:
        """Whether a module inside, or every module, has a hook."""
        version = hooks_version()
        if any(_GLOBAL_HOOKS) or any(chain.from_iterable(map(_hooks_of, self._attributes))):
            return True
        # Another thread may have made a handle whose hook is not in place yet: only what two calls
        # have found counts.
        self._unhooked = version if version == self._looked else -1
        self._looked = version
        return False

    def _look_at(self, weights: list[Tensor | None]) -> None:
        """Types and layouts of weights that are not those of the last time."""
        self._views = None  # the parameters may have got other memory
        there = [w for w in weights if w is not None]
        self._plain = all(type(w) in PLAIN for w in there)
        self._contiguous = all(w.is_contiguous() for w in there)
        dtypes = {w.dtype for w in _matrices_of(weights)}
        self._matrices = dtypes.pop() if len(dtypes) == 1 else None
        # With its gaps: they decide which pointers a launch has.
        layout = tuple(None if w is None else (w.shape, w.dtype) for w in weights)
        if layout != self.weights_layout:
            self.weights_layout = layout
            self.layouts.clear()

    def in_dtype(self, weights: BlockWeights, dtype: torch.dtype) -> BlockWeights:
        """With the matrices in `dtype`: the weights themselves, or one copy that is kept.

        The copy is of these weights as they are: it is made again when one has been replaced or
        changed in place. Of weights whose changes nothing tells of none is kept.
        """
        if self._matrices == dtype:
            self._cast = None
            return weights
        matrices = _matrices_of(weights)
        if not self._contiguous or True in map(Tensor.is_inference, matrices):
            return weights.to(dtype)  # versions are those of copies, or there are none
        made_of = (dtype, self._addresses, [w._version for w in matrices])
        cast = self._cast  # once: another thread may put another one in its place
        if cast is None or cast[0] != made_of:
            # Whatever mode is on now, the copy serves training later.
            with torch.inference_mode(False), torch.no_grad():
                cast = made_of, weights.to(dtype)
            self._cast = cast
        return cast[1]

    def keys_and_values(self, weights: BlockWeights) -> KeyValueWeights:
        """The part of the qkv projection that makes keys and values.

        Args:
            weights: from `in_dtype`, of which the result is views.
        """
        weight, bias, known = weights.qkv_weight, weights.qkv_bias, self._views
        if known is None or known[0] is not weight or known[1] is not bias:
            width = weight.shape[0] // 3
            with torch.inference_mode(False), torch.no_grad():
                part = weight[width:]
                views = KeyValueWeights(part, part.t(), None if bias is None else bias[width:])
            self._views = known = weight, bias, views
        return known[2]

    def remember(self, key: Hashable, value: tuple[BlockConfig, Sites]) -> None:
        """Put something into `layouts`, of which there are not more than a few."""
        if len(self.layouts) >= _MOST_LAYOUTS:
            self.layouts.clear()
        self.layouts[key] = value
