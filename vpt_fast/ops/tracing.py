"""Tracing: whether what is computed is recorded or replaced, and must consist of operators."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

PLAIN = (Tensor, nn.Parameter)
"""Types of tensors that own their memory; subclasses may not."""

_dispatch_modes = torch._C._len_torch_dispatch_stack
_functorch_level = torch._C._functorch.peek_interpreter_stack
_is_batched = torch._C._functorch.is_legacy_batchedtensor
_jit_trace = torch._C._get_tracing_state
_fx = threading.local()


def is_traced(tensor: Tensor) -> bool:
    """Return whether torch.compile, export, a dispatch mode, functorch or jit.trace is at work.

    So it returns for dual numbers and subclasses of Tensor. Then computation must consist of
    PyTorch operators; otherwise their implementations are called as functions, which takes the host
    a tenth of the time.
    """
    return (
        torch.compiler.is_compiling()
        or _dispatch_modes() > 0
        or _functorch_level() is not None
        or type(tensor) not in PLAIN
        or _jit_trace() is not None
        or forward_ad._current_level >= 0
    )


def is_transformed() -> bool:
    """Return whether torch.func, forward-mode derivatives or torch.fx's tracer are at work.

    They need PyTorch's own operators: ours have first derivatives in backward mode only, and no
    batching rules; and fx's proxies have neither a shape nor a type.
    """
    if torch.compiler.is_compiling():
        return False
    return _functorch_level() is not None or forward_ad._current_level >= 0 or is_symbolic()


def is_symbolic() -> bool:
    """Return whether a model is called with proxies, within its `as_plain_operators`."""
    return getattr(_fx, "is_on", False)


@contextmanager
def as_plain_operators(x: Any) -> Iterator[None]:
    """Return a context in which PyTorch's attention has derivatives of every kind and order.

    Args:
        x: Input of a model. For a proxy of torch.fx, `is_transformed` is True in the context.
    """
    before = is_symbolic()
    _fx.is_on = before or isinstance(x, torch.fx.Proxy)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        _fx.is_on = before


def check_first_order(*grads: Tensor | None) -> None:
    """Raise RuntimeError in a backward pass that is recorded, or batched by torch.func's vmap."""
    if torch.compiler.is_compiling():
        return
    if torch.is_grad_enabled():
        raise RuntimeError(
            "tuned blocks have no second derivatives where backward is recorded "
            "(create_graph=True): take them by torch.func (grad of grad, hessian), under which "
            "blocks run in plain PyTorch; for another pass over the same graph use "
            "retain_graph=True"
        )
    if _functorch_level() is not None or any(g is not None and _is_batched(g) for g in grads):
        raise RuntimeError(
            "tuned blocks have no batched backward pass (is_grads_batched, vmap): take "
            "derivatives by torch.func (jacrev, vmap of grad) around the forward pass, under which "
            "blocks run in plain PyTorch, or loop"
        )
