"""Whether somebody watches a module, or has taken its call over: it must not be passed by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.utils.hooks import RemovableHandle

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS: tuple[Any, ...] = tuple(getattr(nn_module, f"_global{name}") for name in _HOOKS)

hooks_of = itemgetter(*_HOOKS)
"""The hooks of a module, by kind, from its `__dict__`."""


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


class HookWatch:
    """Whether modules are hooked, looked for again only when somebody has registered a hook."""

    def __init__(self) -> None:
        # Versions of hooks: at which there were none, and of the last look for any.
        self._unhooked = self._looked = -1

    def found(self, attributes: Callable[[], Iterable[dict[str, Any]]]) -> bool:
        """Whether one of the modules, or every module, has a hook.

        Args:
            attributes: gives the modules' `__dict__`, always of the same modules.
        """
        version = hooks_version()
        if version == self._unhooked:
            return False
        if any(_GLOBAL_HOOKS) or any(chain.from_iterable(map(hooks_of, attributes()))):
            return True
        # Another thread may have made a handle whose hook is not in place yet: only what two calls
        # have found counts.
        self._unhooked = version if version == self._looked else -1
        self._looked = version
        return False


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


def is_watched(*parts: nn.Module | None) -> bool:
    """Whether one of the parts, or a module below it, carries a hook."""
    return any(has_hooks(module) for part in parts for module in with_descendants(part))


def has_compiled_call(module: nn.Module) -> bool:
    """Whether `module.compile()` was called, so that its call runs compiled code.

    Where somebody traces what the module is part of, it does not.
    """
    return module._compiled_call_impl is not None and not torch.compiler.is_compiling()


def is_taken_over(module: nn.Module) -> bool:
    """Whether somebody would notice that a module is not called: by a hook, or in its place."""
    return has_hooks(module) or has_own_forward(module) or has_compiled_call(module)


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
