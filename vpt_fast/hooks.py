"""Whether somebody watches a module: rows that pass beside it would be missed."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def has_hooks(module: nn.Module) -> bool:
    """True if `module` itself carries a forward or backward hook."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


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
