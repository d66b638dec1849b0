"""Linears whose weight is made of other tensors, as torchao's quantised ones are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from vpt_fast.ops.tracing import PLAIN


def holds_other_tensors(weight: Any) -> bool:
    """Return whether a weight is a subclass of Tensor that is made of other tensors.

    Such a weight need not know any operation but the product of its Linear.
    """
    if torch.compiler.is_dynamo_compiling():  # whose tracer finds no wrapper
        return type(weight) not in PLAIN
    return is_traceable_wrapper_subclass(weight)


def is_plain_linear(module: Any) -> bool:
    """Return whether a module is a Linear whose weight can be read as a matrix."""
    return type(module) is nn.Linear and not holds_other_tensors(module.weight)


def dequantised(tensor: Tensor) -> Tensor:
    """Return the values that a quantised tensor stands for; any other tensor itself."""
    own: Any = type(tensor)
    if holds_other_tensors(tensor) and own.dequantize is not Tensor.dequantize:
        found: Tensor = tensor.dequantize()
        return found
    return tensor


def form_of(weight: Tensor) -> Tensor:
    """Return a tensor with the device and dtype that a weight's products have; itself if plain."""
    if holds_other_tensors(weight):
        return torch.empty(0, device=weight.device, dtype=weight.dtype)
    return weight
