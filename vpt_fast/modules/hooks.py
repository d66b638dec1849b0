"""Tests whether a module is hooked or its call replaced, so that it must not be bypassed."""

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
"""Function that returns the hooks of a module, by kind, from its `__dict__`."""


def has_hooks(module: nn.Module) -> bool:
    """Return whether `module` itself carries a forward or backward hook."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def hooks_version() -> int:
    """Return a number that grows whenever a hook of any kind is registered on any module.

    While it stays the same, a module without hooks has none.
    """
    return RemovableHandle.next_id


class HookWatch:
    """Search of modules for hooks, repeated only after a hook was registered."""

    def __init__(self) -> None:
        # Hook versions: of the last search that found no hooks, and of the last search.
        self._unhooked = self._looked = -1

    def found(self, attributes: Callable[[], Iterable[dict[str, Any]]]) -> bool:
        """Return whether one of the modules has a hook, or a global hook is registered.

        Args:
            attributes: Function that returns the modules' `__dict__`, always of the same modules.
        """
        version = hooks_version()
        if version == self._unhooked:
            return False
        if any(_GLOBAL_HOOKS) or any(chain.from_iterable(map(hooks_of, attributes()))):
            return True
        # Another thread may have created a handle whose hook is not registered yet, so that two
        # calls have to find none.
        self._unhooked = version if version == self._looked else -1
        self._looked = version
        return False


def has_own_forward(module: nn.Module) -> bool:
    """Return whether this instance has a `forward` in place of its class's."""
    return "forward" in vars(module)


def with_descendants(module: nn.Module | None) -> Iterator[nn.Module]:
    """Yield the module and its descendants; nothing for None.

    `module.modules()` takes several times as long, and this runs in every forward pass.
    """
    if module is not None:
        yield module
        for child in module._modules.values():
            yield from with_descendants(child)


def is_watched(*parts: nn.Module | None) -> bool:
    """Return whether one of the parts or their descendants carries a hook."""
    return any(has_hooks(module) for part in parts for module in with_descendants(part))


def has_compiled_call(module: nn.Module) -> bool:
    """Return whether calling the module runs code from `module.compile()`; not while compiling."""
    return module._compiled_call_impl is not None and not torch.compiler.is_compiling()


def is_taken_over(module: nn.Module) -> bool:
    """Return whether bypassing a module would skip a hook, its own `forward` or compiled code."""
    return has_hooks(module) or has_own_forward(module) or has_compiled_call(module)


def call_compiled(module: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Call a module for which `has_compiled_call` is True."""
    hint_sizes(x)
    return module(x, *args, **kwargs)


def hint_sizes(x: Tensor) -> None:
    """Tell the compiler that only the batch size of x varies.

    Blocks share one compiled function, with a variant for each kind of block. Without this hint the
    compiler recompiles all of them for the second batch size.
    """
    torch._dynamo.maybe_mark_dynamic(x, 0)
    torch._dynamo.mark_static(x, list(range(1, x.ndim)))
