"""Whether somebody records or replaces what is computed, so that it has to go through operators."""

from __future__ import annotations

import torch
from torch import Tensor, nn

PLAIN = (Tensor, nn.Parameter)
"""Types of tensors whose memory is their own."""

_dispatch_modes = torch._C._len_torch_dispatch_stack
_functorch_level = torch._C._functorch.peek_interpreter_stack
_jit_trace = torch._C._get_tracing_state


def is_traced(tensor: Tensor) -> bool:
    """True under torch.compile and export, dispatch modes, functorch and torch.jit.trace.

    There, and for subclasses of Tensor, computation must consist of operators of PyTorch's.
    Anywhere else their implementations may be called as the functions that they are, which takes
    the host a tenth of the time.
    """
    return (
        torch.compiler.is_compiling()
        or _dispatch_modes() > 0
        or _functorch_level() is not None
        or type(tensor) not in PLAIN
        or _jit_trace() is not None
    )
