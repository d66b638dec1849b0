"""Frozen weights in the type that autocast computes in, cast once instead of at every use.

torch.autocast keeps the casts of weights that are trained until its context ends, and casts those
that are frozen again at every use. What it would cast is cast here before the first step: the
weights and biases of frozen Linears and convolutions, and nothing else, so that a step gives the
same bits. Norms, position embeddings, LayerScale and everything that is trained stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from vpt_fast.models.attention_inputs import is_normed
from vpt_fast.models.tuned import blocks_of, is_tuned
from vpt_fast.ops.backend import uses_kernels


class FrozenCast:
    """A context in which the frozen Linears and convolutions of a model are in another type.

    The original weights stay where they are and are the model's again when it ends: beside them
    there is one copy. The model can be run under `torch.autocast` of `dtype` only meanwhile.

    Args:
        model: A tuned timm model, on its device.
        dtype: What torch.autocast computes in; with float32 nothing is done.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.model, self.dtype = model, dtype
        self._weights: list[tuple[nn.Parameter, Tensor, Tensor]] = []

    def __enter__(self) -> FrozenCast:
        if self.dtype != torch.float32:
            self._weights = [
                (weight, weight.data, weight.data.to(self.dtype))
                for weight in frozen_weights(self.model)
            ]
        self._place()
        return self

    def __exit__(self, *_: object) -> None:
        self._take_back()
        self._weights = []

    @contextmanager
    def originals(self) -> Iterator[None]:
        """Inside, the model has its original weights, for whoever reads or keeps them."""
        self._take_back()
        try:
            yield
        finally:
            self._place()

    @property
    def nbytes(self) -> int:
        """What the copy takes."""
        return sum(copy.nbytes for _, _, copy in self._weights)

    def _place(self) -> None:
        for weight, original, copy in self._weights:
            if weight.data_ptr() == original.data_ptr():
                weight.data = copy

    def _take_back(self) -> None:
        for weight, original, copy in self._weights:
            # Weights that somebody has replaced or moved since are theirs.
            if weight.data_ptr() == copy.data_ptr():
                weight.data = original


def frozen_weights(model: nn.Module) -> list[nn.Parameter]:
    """The fp32 weights that torch.autocast casts at every use: of frozen Linears and convolutions.

    Those of modules that the method has added are left out, and so is the attention of a last block
    that projects none of its keys and values (see `ops.absorbed_attention`).
    """
    apart = _apart(model)
    found: dict[int, nn.Parameter] = {}
    used_elsewhere: set[int] = set()
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is None:
                continue
            if isinstance(module, (nn.Linear, _ConvNd)) and id(module) not in apart:
                if parameter.dtype == torch.float32 and not parameter.requires_grad:
                    found[id(parameter)] = parameter
            else:
                used_elsewhere.add(id(parameter))
    return [weight for key, weight in found.items() if key not in used_elsewhere]


def _apart(model: Any) -> set[int]:
    """The modules whose weights are not used by what autocast casts."""
    if not is_tuned(model):
        return set()
    added = {id(part) for module in model.trained_modules() for part in module.modules()}
    rows_read = getattr(model, "_rows_read", None)
    if rows_read is not None and rows_read() is not None:
        last = blocks_of(model)[-1].attn
        if not (is_normed(last) or uses_kernels(last.qkv.weight)):
            added.add(id(last.qkv))
    return added
