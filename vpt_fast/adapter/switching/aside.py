"""Put an adapter of a model aside, so that the base model is left, and take it up again."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vpt_fast.models.changes.taken import Taken, put_back, take_out
from vpt_fast.models.family import Family
from vpt_fast.models.tuned import TuneRecord, blocks_of
from vpt_fast.modules.hooks import has_own_forward
from vpt_fast.tune import classifiers_of

Parameters = dict[str, nn.Parameter]
"""Parameters by their name in the model."""


@dataclass
class Heads:
    """Classifiers of a model.

    Attributes:
        modules: Each by its name in the model.
        num_classes: Number of classes.
    """

    modules: dict[str, nn.Module]
    num_classes: int

    def put(self, model: Any) -> None:
        """Give a model these classifiers."""
        for name, module in self.modules.items():
            place, _, leaf = name.rpartition(".")
            owner = model.get_submodule(place)
            owner._modules[leaf] = module
            if "num_classes" in vars(owner):
                owner.num_classes = self.num_classes
        model.num_classes = self.num_classes


@dataclass
class Aside:
    """An adapter that is not active: all that makes the base model the tuned one.

    Attributes:
        record: Record of its tuning.
        heads: Its classifiers.
        parameters: Its own parameters in place of the backbone's.
        taken: What its method put into the model.
        blocks: Blocks that the model had.
    """

    record: TuneRecord
    heads: Heads
    parameters: Parameters
    taken: list[Taken]
    blocks: list[nn.Module]

    def modules(self) -> list[nn.Module]:
        """Return its modules: those of its method, and its classifiers."""
        own = [module for part in self.taken for module in part.modules.values()]
        return [*(m for m in own if m is not None), *self.heads.modules.values()]


def named_heads(model: Any) -> dict[str, nn.Module]:
    """Return the classifiers of a model, plain or tuned, by name."""
    wanted = {id(head) for head in classifiers_of(model)}
    return {name: part for name, part in model.named_modules() if id(part) in wanted}


def head_names(model: Any) -> tuple[str, ...]:
    """Return the names of a model's classifiers, with a dot."""
    return tuple(f"{name}." for name in named_heads(model))


def set_aside(model: Any, family: Family, base: Parameters, heads: Heads) -> Aside:
    """Put the active adapter aside; the base model is left.

    Args:
        model: Tuned model.
        family: Record of its class.
        base: The backbone's parameters in place of which the adapter has its own.
        heads: The base model's classifiers.

    Raises:
        ValueError: If one of its parameters is not in the model any more. Nothing has changed then.
    """
    record, own_heads = model.tune_record, Heads(named_heads(model), model.num_classes)
    own = exchange(model, base)
    taken = take_out(model, family.plain_parts, keep_readings=True)
    del model.tune_record
    model.__class__ = family.plain
    heads.put(model)
    return Aside(record, own_heads, own, taken, blocks_of(model))


def take_up(model: Any, family: Family, aside: Aside) -> Parameters:
    """Make an adapter that was put aside the active one, of a model that has none.

    Args:
        model: Base model.
        family: Record of its class.
        aside: The adapter.

    Returns:
        The backbone's parameters in place of which it has its own.

    Raises:
        ValueError: If the model has none of the name of one of them. Nothing has changed then.
    """
    displaced = exchange(model, aside.parameters)
    put_back(aside.taken)
    model.tune_record = aside.record
    aside.heads.put(model)
    if blocks_of(model) != aside.blocks:
        family.install(model)
    return displaced


def own_names(model: Any) -> list[str]:
    """Return the names of parameters of the backbone that the active adapter trains in place."""
    originals = model.tune_record.originals
    if all(name.startswith("head") for name in originals):
        return []
    heads = head_names(model)
    return [name for name in originals if not name.startswith(heads)]


def exchange(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Parameters:
    """Give a model other parameters, wherever it has those of these names; return them.

    Raises:
        ValueError: If it has none of one of the names. Nothing has changed then.
    """
    if not parameters:
        return {}
    known = dict(model.named_parameters(remove_duplicate=False))
    for name in parameters:
        if name not in known:
            raise ValueError(
                f"an adapter of this model trains {name}, which is not in the model any more; put "
                "back what was replaced, removed or parametrized"
            )
    places: dict[int, list[tuple[Any, str]]] = defaultdict(list)
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            places[id(parameter)].append((module._parameters, leaf))
    before = {name: known[name] for name in parameters}
    for name, parameter in parameters.items():
        for owner, leaf in places[id(before[name])]:
            owner[leaf] = parameter
    return before


def base_parameters(model: Any) -> Parameters:
    """Return the first adapter's parameters of the backbone with their values before tuning."""
    originals = model.tune_record.originals
    return {name: _base_parameter(model, name, originals[name]) for name in own_names(model)}


def _base_parameter(model: nn.Module, name: str, original: Tensor) -> nn.Parameter:
    like = model.get_parameter(name)
    # A model that was tuned on the meta device has the values that it has been given since.
    value = like.detach() if original.is_meta else original
    return nn.Parameter(torch.empty_like(like).copy_(value), False)


def base_heads(model: Any) -> Heads:
    """Return the classifiers that a model had before it was first tuned, as new modules.

    Raises:
        ValueError: If they cannot be made again.
    """
    originals, classes = model.tune_record.originals, model.num_classes
    modules = {}
    for whole, head in named_heads(model).items():
        values = {
            name.removeprefix(f"{whole}."): value
            for name, value in originals.items()
            if name.startswith(f"{whole}.")
        }
        made = modules[whole] = _with_values(head, values)
        if type(made) is nn.Linear:
            classes = made.out_features
        elif not values:
            classes = 0
    return Heads(modules, classes)


def copied(heads: Heads) -> Heads:
    """Return copies of classifiers at the same places."""
    modules = {name: copy.deepcopy(head) for name, head in heads.modules.items()}
    return Heads(modules, heads.num_classes)


def _with_values(head: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """Return a classifier like `head`, hooks included, with the values before tuning."""
    if not values:  # there was no classifier
        return nn.Identity()
    for part in head.modules():
        if has_own_forward(part):
            raise ValueError(
                f"the classifier, a {type(part).__name__}, has a forward of its own on the "
                "instance, which may refer to its weights; put it into a class"
            )
    made: Any = copy.deepcopy(head)
    if not any(value.is_meta for value in values.values()):
        if type(head) is nn.Linear:
            like = head.weight
            for leaf, value in values.items():
                made._parameters[leaf] = nn.Parameter(value.to(like.device, like.dtype), False)
            made.out_features, made.in_features = made.weight.shape
        else:
            _load(made, values)
    return made.requires_grad_(False)


def _load(head: nn.Module, values: Mapping[str, Tensor]) -> None:
    try:
        head.load_state_dict({name: values[name] for name in head.state_dict()})
    except (RuntimeError, KeyError) as error:
        raise ValueError(
            f"the classifier, a {type(head).__name__}, is not the one that was tuned: {error}; "
            "put it back"
        ) from error
