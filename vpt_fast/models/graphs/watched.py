"""Dependencies of recorded work beside its input: modules, weights, modes and hooks.

A recording contains addresses, and the branches that were taken. All that can change in a model is
compared before every replay.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from vpt_fast.models.fusion.block_reading import copies_of
from vpt_fast.modules.hooks import hooks_of

# Attributes of modules that are probabilities of dropout.
_PROBABILITIES = ("p", "drop_prob", "dropout", "channel_dropout")


class Trained(NamedTuple):
    """A parameter that requires a gradient.

    Attributes:
        parameter: The parameter.
        entries: Dictionary of a module's parameters, and the key, wherever a module has it.
    """

    parameter: nn.Parameter
    entries: tuple[tuple[dict[str, Any], str], ...]


class Watched:
    """State of some parts of a model.

    Args:
        owner: Model.
        names: Names of children and parameters; missing ones are ignored.

    Attributes:
        tensors: Parameters and buffers.
        trains: Whether one of them requires a gradient.
    """

    def __init__(self, owner: nn.Module, names: Iterable[str]) -> None:
        self._owner, self._names = owner, tuple(names)
        roots = [part for part in self._roots() if isinstance(part, nn.Module)]
        modules = {id(m): m for root in roots for m in root.modules()}
        self._modules = list(modules.values())
        self._dicts = [vars(module) for module in self._modules]
        self._dropouts = [
            (every, name)
            for every in self._dicts
            for name in _PROBABILITIES
            if isinstance(every.get(name), float | int)
        ]
        self._identities = self._now()
        tensors = {id(t): t for t in self._values() if isinstance(t, Tensor)}
        self.tensors = [t for t in tensors.values() if not t.is_inference()]
        self._grads = [t.requires_grad for t in self.tensors]
        self.trains = any(self._grads)
        self._frozen = [t for t in self.tensors if not t.requires_grad]
        self._addresses = [t.data_ptr() for t in self.tensors]
        self._versions = [t._version for t in self._frozen]

    def _roots(self) -> list[Any]:
        every = vars(self._owner)
        return [
            found
            for name in self._names
            for found in (every["_modules"].get(name), every["_parameters"].get(name))
            if found is not None
        ]

    def _values(self) -> list[Any]:
        """Return all children, parameters and buffers, in a fixed order."""
        values = self._roots()
        for every in self._dicts:
            values += every["_modules"].values()
            values += every["_parameters"].values()
            values += every["_buffers"].values()
        return values

    def _now(self) -> list[int]:
        return [id(value) for value in self._values()]

    def is_same(self) -> bool:
        """Return whether modules, tensors, addresses, flags and frozen values have not changed."""
        return (
            self._now() == self._identities
            and [t.requires_grad for t in self.tensors] == self._grads
            and [t.data_ptr() for t in self.tensors] == self._addresses
            and [t._version for t in self._frozen] == self._versions
        )

    def versions(self) -> list[int]:
        """Return the version of each parameter and buffer."""
        return [t._version for t in self.tensors]

    def modes(self) -> tuple[Any, ...]:
        """Return the mode and the dropout of each module."""
        trains = [every["training"] for every in self._dicts]
        return (*trains, *[every.get(name) for every, name in self._dropouts])

    def is_hooked(self) -> bool:
        """Return whether a module has a hook or a forward of its own, which a replay would skip."""
        return (
            any(map(any, map(hooks_of, self._dicts)))
            or nn_module._has_any_global_hook()
            or any("forward" in every for every in self._dicts)
        )

    def casts(self) -> list[Any]:
        """Return the cached copies of frozen weights, which a recording must keep alive.

        A block drops its copy when it computes in another dtype.
        """
        return copies_of(self._dicts)

    def trained(self) -> list[Trained]:
        """Return the parameters that require a gradient."""
        entries: dict[int, tuple[nn.Parameter, list[tuple[dict[str, Any], str]]]] = {}
        for every in (vars(self._owner), *self._dicts):
            own = every is vars(self._owner)
            for name, parameter in every["_parameters"].items():
                if parameter is None or not parameter.requires_grad:
                    continue
                if not own or name in self._names:
                    _, found = entries.setdefault(id(parameter), (parameter, []))
                    found.append((every["_parameters"], name))
        return [Trained(parameter, tuple(found)) for parameter, found in entries.values()]


def numeric_modes() -> tuple[Any, ...]:
    """Return PyTorch's settings that decide which kernels run."""
    return torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
