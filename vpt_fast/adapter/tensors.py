"""Names and shapes of an adapter's tensors, from its method built on the meta device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vpt_fast.methods import Method
from vpt_fast.models.family import Family
from vpt_fast.tune import apply_method

Shapes = Mapping[str, torch.Size]


def expected_tensors(model: nn.Module, method: Method, family: Family) -> Shapes:
    """Return the shapes of what `prompt_tune` would train or add, by name; change nothing.

    Args:
        model: Plain timm model.
        method: Method that fits it.
        family: Record that `check_model` returned for both.
    """
    tuned: Any = apply_method(_meta_copy(model, {}), method, family)
    trained = {name: p.shape for name, p in tuned.named_parameters() if p.requires_grad}
    return trained | {name: tensor.shape for name, tensor in tuned.added_tensors().items()}


def check_tensors(
    tensors: Mapping[str, Tensor], known: Shapes, needed: Iterable[str], file: Path
) -> None:
    """Raise ValueError unless an adapter's tensors are those of a model and method.

    Args:
        tensors: Tensors of the adapter by name.
        known: Shapes that they may have, by name.
        needed: Names of those that must be there.
        file: File that holds them, for the message.
    """
    cure = "load an adapter that was saved from this model and method"
    for name, tensor in tensors.items():
        if name not in known:
            raise ValueError(f"{file} has {name}, which this model and method do not train; {cure}")
        if tensor.shape != known[name]:
            raise ValueError(
                f"{file}: {name} has shape {tuple(tensor.shape)}, this model and method need "
                f"{tuple(known[name])}; {cure}"
            )
    for name in needed:
        if name not in tensors:
            raise ValueError(f"{file} has no {name}; {cure}")


def _meta_copy(part: Any, copies: dict[int, Any]) -> Any:
    """Return a copy of a module in which parameters and buffers have no values.

    Unlike `copy.deepcopy` it neither reads weights nor copies what else modules refer to.

    Args:
        part: A module, parameter or buffer of the model, or None.
        copies: Copies by the id of their original; shared parts stay shared.
    """
    if part is None or id(part) in copies:
        return copies.get(id(part))
    if isinstance(part, nn.Module):
        found = copies[id(part)] = object.__new__(type(part))
        for name, value in vars(part).items():
            vars(found)[name] = value.copy() if isinstance(value, dict | list | set) else value
        for kind in ("_modules", "_parameters", "_buffers"):
            children = vars(part)[kind].items()
            vars(found)[kind] = {name: _meta_copy(child, copies) for name, child in children}
        return found
    values = torch.empty(part.shape, dtype=part.dtype, device="meta")
    is_parameter = isinstance(part, nn.Parameter)
    copies[id(part)] = nn.Parameter(values, part.requires_grad) if is_parameter else values
    return copies[id(part)]
