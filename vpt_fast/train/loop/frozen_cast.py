"""Frozen weights in the dtype of autocast, cast once instead of at every use.

torch.autocast caches the casts of trained weights until its context ends, and repeats the casts of
frozen weights at every use. This module casts before the first step what autocast would cast: the
weights and biases of frozen Linears and convolutions, and nothing else, so that a step gives the
same bits. Norms, position embeddings, LayerScale and trained parameters stay as they are.
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
    """Context in which the frozen Linears and convolutions of a model have another dtype.

    The original weights stay in memory and are restored when the context ends; there is one copy
    beside them. Within the context the model runs under `torch.autocast` of `dtype` only.

    Args:
        model: Tuned timm model, on its device.
        dtype: Dtype of torch.autocast; with float32 nothing is done.
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
        self._install_casts()
        return self

    def __exit__(self, *_: object) -> None:
        self._restore_originals()
        self._weights = []

    @contextmanager
    def originals(self) -> Iterator[None]:
        """Restore the original weights within a context, for whoever reads or saves them."""
        self._restore_originals()
        try:
            yield
        finally:
            self._install_casts()

    @property
    def nbytes(self) -> int:
        """Bytes of the copy."""
        return sum(copy.nbytes for _, _, copy in self._weights)

    def _install_casts(self) -> None:
        for weight, original, copy in self._weights:
            if weight.data_ptr() == original.data_ptr():
                weight.data = copy

    def _restore_originals(self) -> None:
        for weight, original, copy in self._weights:
            # Weights that were replaced or moved since belong to whoever did so.
            if weight.data_ptr() == copy.data_ptr():
                weight.data = original


def frozen_weights(model: nn.Module) -> list[nn.Parameter]:
    """Return the fp32 weights of frozen Linears and convolutions, which autocast casts at each use.

    Modules that the method has added are left out, and so is the attention of a last block that
    projects none of its keys and values (see `ops.absorbed_attention`).
    """
    excluded = _excluded(model)
    found: dict[int, nn.Parameter] = {}
    used_elsewhere: set[int] = set()
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is None:
                continue
            if isinstance(module, (nn.Linear, _ConvNd)) and id(module) not in excluded:
                if parameter.dtype == torch.float32 and not parameter.requires_grad:
                    found[id(parameter)] = parameter
            else:
                used_elsewhere.add(id(parameter))
    return [weight for key, weight in found.items() if key not in used_elsewhere]


def _excluded(model: Any) -> set[int]:
    """Return the ids of modules whose weights autocast does not cast."""
    if not is_tuned(model):
        return set()
    added = {id(part) for module in model.trained_modules() for part in module.modules()}
    rows_read = getattr(model, "_rows_read", None)
    if rows_read is not None and rows_read() is not None:
        last = blocks_of(model)[-1].attn
        if not (is_normed(last) or uses_kernels(last.proj.weight)):
            parts = (last._modules.get(name) for name in ("qkv", "k_proj", "v_proj"))
            added |= {id(part) for part in parts if part is not None}
    return added
