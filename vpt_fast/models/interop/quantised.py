"""Linears whose weight is made of other tensors, as torchao's quantised ones are."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
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


def linear_part(x: Tensor, weight: Tensor, bias: Tensor | None, part: slice) -> Tensor:
    """Return the outputs `part` of a Linear for x (..., D); all are computed where need be."""
    if holds_other_tensors(weight):
        return F.linear(x, weight, bias)[..., part]
    return F.linear(x, weight[part], None if bias is None else bias[part])


def form_of(weight: Tensor) -> Tensor:
    """Return a weight, or where it is no plain tensor an empty one of its device and dtype."""
    if holds_other_tensors(weight):
        return torch.empty(0, device=weight.device, dtype=weight.dtype)
    return weight


def cannot_fold(where: str, module: nn.Module) -> ValueError:
    """Return the error of what would be folded into a module that is no plain Linear.

    Args:
        where: Name of the module.
        module: Module, of another class or with a weight that is no plain tensor.
    """
    weight, kind = getattr(module, "weight", None), type(module).__name__
    kind += f" of {type(weight).__name__}" if holds_other_tensors(weight) else ""
    return ValueError(
        f"cannot fold {where}: it computes more than its weights tell, it is a {kind}; merge it "
        "into a plain Linear, or do not fold"
    )
