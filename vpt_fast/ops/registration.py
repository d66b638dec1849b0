"""How our operators are registered with PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.library import CustomOpDef, Library

_LIBRARY = Library("vpt_fast", "FRAGMENT")

_BACKENDS = ("CPU", "CUDA")


def operator(
    name: str, mutates_args: Sequence[str] = ()
) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Decorate a function as `torch.library.custom_op` does, for calls that cost the host less.

    custom_op's own kernel stands behind layers of Python that compare every result with every
    argument in each call. Compiled code calls an operator a dozen times per block; its function is
    registered as the backends' kernel too, which the dispatcher prefers. Fake tensors, autograd and
    counting of in-place changes are custom_op's.

    Args:
        name: `vpt_fast::` and the operator's name.
        mutates_args: arguments that the function changes in place.
    """

    def define(function: Callable[..., Any]) -> CustomOpDef:
        defined = torch.library.custom_op(name, function, mutates_args=mutates_args)
        # Called between two compiled graphs, the function is not to be traced itself.
        kernel = torch.compiler.disable(function)
        for backend in _BACKENDS:
            _LIBRARY.impl(name, kernel, backend)
        return defined

    return define
