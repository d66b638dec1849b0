"""Frozen weights of a block at their addresses in memory, and what is derived from them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from operator import attrgetter, is_
from typing import NamedTuple

import torch
from torch import Tensor

from vpt_fast.ops.block.core import BlockSteps
from vpt_fast.ops.block.parts import BlockWeights, contiguous
from vpt_fast.ops.tracing import PLAIN

_MOST_LAYOUTS = 32
"""Number of layouts of inputs whose steps are cached."""

_address, _dtype = Tensor.data_ptr, attrgetter("dtype")
_requires_grad = attrgetter("requires_grad")
_size, _is_contiguous = Tensor.numel, Tensor.is_contiguous


class Memory:
    """Tensors and the memory they had: assignments to `.data` change it at any time.

    Args:
        tensors: Tensors, or None in place of one.
    """

    __slots__ = ("_addresses", "_contiguous", "_dtypes", "_present", "_sizes", "tensors")

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        self.tensors = tensors
        self._present = [t for t in tensors if t is not None]
        self._addresses = [*map(_address, self._present)]
        self._dtypes = [*map(_dtype, self._present)]
        self._sizes = [*map(_size, self._present)]
        self._contiguous = [*map(_is_contiguous, self._present)]

    def is_of(self, tensors: Sequence[Tensor | None]) -> bool:
        """Return whether `tensors`, as many, are these, with the memory that they had."""
        return (
            False not in map(is_, tensors, self.tensors)
            and [*map(_address, self._present)] == self._addresses
            and [*map(_dtype, self._present)] == self._dtypes
            and [*map(_size, self._present)] == self._sizes
            and [*map(_is_contiguous, self._present)] == self._contiguous
        )

    def is_being_trained(self) -> bool:
        """Return whether one of them requires a gradient while gradients are recorded."""
        return torch.is_grad_enabled() and True in map(_requires_grad, self._present)


class BlockSettings(NamedTuple):
    """Settings of a block that are read from its modules; see `vpt_fast.ops.block.parts`."""

    heads: int
    scale: float
    eps1: float
    eps2: float
    activation: str
    rotate_half: bool = False
    gate: str = ""
    mlp_eps: float | None = None
    attn_eps: float | None = None
    centred: bool = True


class _Cast(NamedTuple):
    """Weights in another dtype.

    Attributes:
        key: The dtype, and the versions of the matrices that were cast.
        weights: The copies.
        matrices: The originals, kept alive: no other weight gets their address.
    """

    key: tuple[torch.dtype, list[int]]
    weights: BlockWeights
    matrices: list[Tensor]


class _CachedSteps(NamedTuple):
    """Steps for inputs of one layout, and the tensors that they were built from."""

    weights: BlockWeights
    scale: Tensor | None
    rope: Tensor | None
    steps: BlockSteps


def _matrices_of(weights: BlockWeights) -> list[Tensor]:
    """Return the weights and biases of the Linears, operands of matrix products."""
    w = weights
    pairs = (
        (w.qkv_weight, w.qkv_bias), (w.proj_weight, w.proj_bias), (w.fc1_weight, w.fc1_bias),
        (w.fc2_weight, w.fc2_bias), (w.value_weight, w.value_bias), (w.q_weight, w.q_bias),
        (w.k_weight, w.k_bias), (w.v_weight, w.v_bias),
    )  # fmt: skip
    return [t for pair in pairs for t in pair if t is not None]


class WeightsReading:
    """Weights of a block; valid until one is replaced, or gets other memory.

    Args:
        weights: Frozen weights of the block.
        settings: Settings of the block.

    Attributes:
        weights: The same.
        settings: The same.
        memory: Memory of the weights.
        plain: Whether every weight owns its memory, so that kernels may read it.
        layout: Shapes and dtypes, None where a weight is None: they decide a launch's pointers.
        steps: Steps that run the block, by layout of its input.
    """

    def __init__(self, weights: BlockWeights, settings: BlockSettings) -> None:
        present = [w for w in weights if w is not None]
        self.weights, self.settings, self.memory = weights, settings, Memory(weights)
        self.plain = all(type(w) in PLAIN for w in present)
        self._contiguous = all(w.is_contiguous() for w in present)
        dtypes = {w.dtype for w in _matrices_of(weights)}
        as_they_are = len(dtypes) == 1 and not weights.joins_bias
        self._matrix_dtype = dtypes.pop() if as_they_are else None
        self.layout: Hashable = tuple(None if w is None else (w.shape, w.dtype) for w in weights)
        self._cast: _Cast | None = None
        self.steps: dict[Hashable, _CachedSteps] = {}

    def in_dtype(self, dtype: torch.dtype) -> BlockWeights:
        """Return the weights with operands of matrix products in `dtype`.

        The copy is cached until a weight is changed in place. Inference tensors have no version
        that would show a change, so that a copy of them is not cached.
        """
        if not self._contiguous:
            return BlockWeights._make(map(contiguous, self.weights)).to(dtype)
        if self._matrix_dtype == dtype:
            if self._cast is not None:
                self._keep(None)
            return self.weights
        matrices = _matrices_of(self.weights)
        if True in map(Tensor.is_inference, matrices):
            return self.weights.to(dtype)
        key = (dtype, [w._version for w in matrices])
        cast = self._cast  # read once: another thread may replace it
        if cast is None or cast.key != key:
            # Cast under inference_mode, the copy could not serve training later.
            with torch.inference_mode(False), torch.no_grad():
                cast = _Cast(key, self.weights.to(dtype), [w.detach() for w in matrices])
            self._keep(cast)
        return cast.weights

    def _keep(self, cast: _Cast | None) -> None:
        """Cache this copy alone; steps of other layouts may hold the one before."""
        self._cast = cast
        self.steps.clear()

    def held(self) -> object:
        """Return the cached copy, or None; a recording of its addresses must keep it alive."""
        return self._cast

    def remember(
        self,
        layout: Hashable,
        weights: BlockWeights,
        scale: Tensor | None,
        rope: Tensor | None,
        steps: BlockSteps,
    ) -> None:
        """Cache the steps for one layout."""
        if len(self.steps) >= _MOST_LAYOUTS:
            self.steps.clear()
        self.steps[layout] = _CachedSteps(weights, scale, rope, steps)
