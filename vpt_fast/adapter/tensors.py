"""Names, shapes and types of an adapter's tensors, from its method built on the meta device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vpt_fast.methods import Method
from vpt_fast.models.family import Family
from vpt_fast.tune import apply_method


def expected_tensors(model: nn.Module, method: Method, family: Family) -> dict[str, Tensor]:
    """Return what `prompt_tune` would train or add, by name, without values; change nothing.

    Args:
        model: Plain timm model.
        method: Method that fits it.
        family: Record that `check_model` returned for both.
    """
    tuned: Any = apply_method(_meta_copy(model, {}), method, family)
    trained = {name: p for name, p in tuned.named_parameters() if p.requires_grad}
    return {**trained, **tuned.added_tensors()}


def check_tensors(
    tensors: Mapping[str, Tensor], known: Mapping[str, Tensor], needed: Iterable[str], file: Path
) -> None:
    """Raise ValueError unless an adapter's tensors are those of a model and method.

    Args:
        tensors: Tensors of the adapter by name.
        known: Tensors of the same names with the shapes that these need; types of floating-point
            numbers may be others.
        needed: Names of those that must be there.
        file: File that holds them, for the message.
    """
    cure = "load an adapter that was saved from this model and method"
    for name, tensor in tensors.items():
        if name not in known:
            raise ValueError(f"{file} has {name}, which this model and method do not train; {cure}")
        want = known[name]
        if tensor.shape != want.shape:
            raise ValueError(
                f"{file}: {name} has shape {tuple(tensor.shape)}, this model and method need "
                f"{tuple(want.shape)}; {cure}"
            )
        numbers = tensor.is_floating_point() and want.is_floating_point()
        if tensor.dtype != want.dtype and not numbers:
            raise ValueError(
                f"{file}: {name} is {tensor.dtype}, this model and method need {want.dtype}; {cure}"
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
