"""Changes of a model that are made whole or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn


@contextlib.contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Return a context in which an exception restores classes, attributes, parameters and flags.

    Values of tensors are not restored: they are written last, after all checks.
    """
    modules = [(module, type(module), _contents(module)) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for module, kind, contents in modules:
            module.__class__ = kind
            _put_back(module, contents)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise


def _contents(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Return every attribute, and a shallow copy of it if it is a container."""
    return {
        name: (value, value.copy() if isinstance(value, dict | set | list) else None)
        for name, value in vars(module).items()
    }


def _put_back(module: nn.Module, contents: dict[str, tuple[Any, Any]]) -> None:
    own = vars(module)
    own.clear()
    for name, (value, held) in contents.items():
        own[name] = value
        if isinstance(value, list):
            value[:] = held
        elif held is not None:
            value.clear()
            value.update(held)
