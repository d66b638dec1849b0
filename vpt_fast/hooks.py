"""Whether somebody watches a module, or has taken its call over: it must not be passed by."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


def has_hooks(module: nn.Module) -> bool:
    """True if `module` itself carries a forward or backward hook."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def hooks_version() -> int:
    """A number that grows whenever somebody registers a hook, of whatever kind, anywhere.

    So a module that had none at a version has none at the same version.
    """
    return RemovableHandle.next_id


def has_own_forward(module: nn.Module) -> bool:
    """Whether somebody has put a `forward` on this instance, in place of its class's."""
    return "forward" in vars(module)


def with_descendants(module: nn.Module | None) -> Iterator[nn.Module]:
    """The module and all below it, of None nothing.

    `module.modules()` takes several times as long, and this runs in every forward pass.
    """
    if module is not None:
        yield module
        for child in module._modules.values():
            yield from with_descendants(child)


def has_compiled_call(module: nn.Module) -> bool:
    """Whether `module.compile()` was called, so that its call runs compiled code.

    Where somebody traces what the module is part of, it does not.
    """
    return module._compiled_call_impl is not None and not torch.compiler.is_compiling()


def call_compiled(module: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Call a module that `has_compiled_call`."""
    hint_sizes(x)
    return module(x, *args, **kwargs)


def hint_sizes(x: Tensor) -> None:
    """Tell the compiler that the batch of x is no constant, and that all its other sizes are.

    Blocks share one compiled function, which has a variant for each kind of block. Left to itself
    the compiler makes all of them again when it meets the second batch size.
    """
    torch._dynamo.maybe_mark_dynamic(x, 0)
    torch._dynamo.mark_static(x, list(range(1, x.ndim)))
