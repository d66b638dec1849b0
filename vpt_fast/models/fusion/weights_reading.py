"""The frozen weights of a block as they lie in memory, and what is worked out from them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor

from vpt_fast.ops.block.core import BlockSteps
from vpt_fast.ops.block.parts import BlockWeights, contiguous
from vpt_fast.ops.tracing import PLAIN

_MOST_LAYOUTS = 32
"""Layouts of inputs whose steps are remembered."""

_address, _dtype = Tensor.data_ptr, attrgetter("dtype")
_requires_grad = attrgetter("requires_grad")
_size, _is_contiguous = Tensor.numel, Tensor.is_contiguous


class Memory:
    """Tensors, and where their elements are: through `.data` they may become others at any time.

    Args:
        tensors: None where there is none.
    """

    __slots__ = ("_addresses", "_contiguous", "_dtypes", "_sizes", "_there", "tensors")

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        self.tensors = tensors
        self._there = [t for t in tensors if t is not None]
        self._addresses = [*map(_address, self._there)]
        self._dtypes = [*map(_dtype, self._there)]
        self._sizes = [*map(_size, self._there)]
        self._contiguous = [*map(_is_contiguous, self._there)]

    def is_of(self, tensors: Sequence[Tensor | None]) -> bool:
        """Whether `tensors`, as many, are these, and their elements where and as many as before."""
        return (
            False not in map(is_, tensors, self.tensors)
            and [*map(_address, self._there)] == self._addresses
            and [*map(_dtype, self._there)] == self._dtypes
            and [*map(_size, self._there)] == self._sizes
            and [*map(_is_contiguous, self._there)] == self._contiguous
        )

    def is_being_trained(self) -> bool:
        """Whether one of them requires a gradient, where gradients are recorded."""
        return torch.is_grad_enabled() and True in map(_requires_grad, self._there)


def _matrices_of(weights: BlockWeights) -> list[Tensor]:
    """What matrix products read: the Linears' weights and biases."""
    w = weights
    pairs = (
        (w.qkv_weight, w.qkv_bias), (w.proj_weight, w.proj_bias), (w.fc1_weight, w.fc1_bias),
        (w.fc2_weight, w.fc2_bias),
    )  # fmt: skip
    return [t for pair in pairs for t in pair if t is not None]


class WeightsReading:
    """A block's weights as they are, until another tensor or other memory takes the place of one.

    Args:
        weights: of the block, frozen.
        scalars: heads, scale, eps1, eps2 and the activation of the block.

    Attributes:
        weights, scalars: the same.
        memory: of the weights.
        plain: whether their memory is their own, so that kernels may read it.
        layout: their shapes and dtypes, with gaps: these decide which pointers a launch has.
        steps: what runs the block on inputs of one layout, for `fused_block`.
    """

    def __init__(self, weights: BlockWeights, scalars: tuple[Any, ...]) -> None:
        there = [w for w in weights if w is not None]
        self.weights, self.scalars, self.memory = weights, scalars, Memory(weights)
        self.plain = all(type(w) in PLAIN for w in there)
        self._contiguous = all(w.is_contiguous() for w in there)
        dtypes = {w.dtype for w in _matrices_of(weights)}
        self._matrices = dtypes.pop() if len(dtypes) == 1 else None  # their dtype, if it is one
        self.layout: Hashable = tuple(None if w is None else (w.shape, w.dtype) for w in weights)
        self._cast: tuple[Any, BlockWeights, list[Tensor]] | None = None
        self.steps: dict[Hashable, tuple[BlockWeights, Tensor | None, BlockSteps]] = {}

    def in_dtype(self, dtype: torch.dtype) -> BlockWeights:
        """The weights with the matrices in `dtype`: themselves, or one copy that is kept.

        The copy is of the weights as they are: it is made again when one has been changed in place.
        Inference tensors have no version that would tell, so that no copy of them is kept.
        """
        if not self._contiguous:
            return BlockWeights._make(map(contiguous, self.weights)).to(dtype)
        if self._matrices == dtype:
            if self._cast is not None:
                self._keep(None)
            return self.weights
        matrices = _matrices_of(self.weights)
        if True in map(Tensor.is_inference, matrices):
            return self.weights.to(dtype)
        made_of = (dtype, [w._version for w in matrices])
        cast = self._cast  # once: another thread may put another one in its place
        if cast is None or cast[0] != made_of:
            # Whatever mode is on now, the copy serves training later.
            with torch.inference_mode(False), torch.no_grad():
                # The memory is held with it: no other weight comes to lie at the same address.
                cast = made_of, self.weights.to(dtype), [w.detach() for w in matrices]
            self._keep(cast)
        return cast[1]

    def _keep(self, cast: tuple[Any, BlockWeights, list[Tensor]] | None) -> None:
        """Keep this copy and no other, which the steps of other layouts may hold."""
        self._cast = cast
        self.steps.clear()

    def held(self) -> Any:
        """The copy that is read now, or None: whoever records addresses has to hold it."""
        return self._cast

    def remember(
        self, layout: Hashable, weights: BlockWeights, scale: Tensor | None, steps: BlockSteps
    ) -> None:
        """Put something into `steps`, of which there are not more than a few."""
        if len(self.steps) >= _MOST_LAYOUTS:
            self.steps.clear()
        self.steps[layout] = weights, scale, steps
