"""Changes of a model that are made whole or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

_CONTAINERS = (dict, set, list)


@contextlib.contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Return a context in which an exception restores classes, attributes, parameters and flags.

    Values of tensors are not restored: they are written last, after all checks.
    """
    modules = [(module, type(module), *_contents(module)) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for module, kind, attributes, containers in modules:
            module.__class__ = kind
            _put_back(module, attributes, containers)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise


def _contents(module: nn.Module) -> tuple[dict[str, Any], list[tuple[Any, Any]]]:
    """Return the attributes, and those that are containers with shallow copies of them."""
    own = vars(module)
    held = [(value, value.copy()) for value in own.values() if isinstance(value, _CONTAINERS)]
    return own.copy(), held


def _put_back(
    module: nn.Module, attributes: dict[str, Any], containers: list[tuple[Any, Any]]
) -> None:
    own = vars(module)
    own.clear()
    own.update(attributes)
    for value, held in containers:
        if isinstance(value, list):
            value[:] = held
        else:
            value.clear()
            value.update(held)
