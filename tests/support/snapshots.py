"""Snapshots by identity: a model after a failure consists of the same objects as before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_HOOKS = [name for name in vars(nn.Module()) if "hooks" in name]


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Return a model's modules, attributes, hooks, parameters and buffers by identity.

    Values enter as a sum of each tensor, so that models on meta have a snapshot, too.
    """
    return {
        "modules": [(n, id(m), type(m), m.training) for n, m in model.named_modules()],
        "attributes": [
            (n, {k: id(v) for k, v in vars(m).items()}) for n, m in model.named_modules()
        ],
        "hooks": [
            [[*map(id, getattr(m, hooks).values())] for hooks in _HOOKS if hasattr(m, hooks)]
            for m in model.modules()
            if isinstance(m, nn.Module)
        ],
        "parameters": [(n, id(p), p.requires_grad) for n, p in model.named_parameters()],
        "buffers": [(n, id(b)) for n, b in model.named_buffers()],
        "values": {n: _value(v) for n, v in model.state_dict().items()},
    }


def _value(tensor: Tensor) -> Any:
    return str(tensor.shape) if tensor.is_meta else tensor.double().sum().item()


def assert_same_model(model: nn.Module, before: dict[str, Any]) -> None:
    """Assert that a model equals its snapshot."""
    now = snapshot(model)
    for what, value in before.items():
        assert now[what] == value, what


class Failing(torch.utils._python_dispatch.TorchDispatchMode):
    """A mode in which one operation fails, as when memory runs out.

    Attributes:
        left: Number of operations before the failing one.
    """

    def __init__(self, number: int, error: type[Exception] = torch.OutOfMemoryError) -> None:
        super().__init__()
        self.left, self.error = number, error

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.left -= 1
        if self.left == -1:
            raise self.error("out of memory, simulated by a test")
        return function(*args, **(kwargs or {}))
