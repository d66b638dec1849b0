"""Put an adapter of a model aside, so that the base model is left, and take it up again."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vpt_fast.models.family import Family
from vpt_fast.models.taken import Taken, put_back, take_out
from vpt_fast.models.tuned import TuneRecord
from vpt_fast.tune import classifiers_of


@dataclass
class Heads:
    """Classifiers of a model.

    Attributes:
        modules: Each with the module that it is a child of, and its name there.
        num_classes: Number of classes.
    """

    modules: list[tuple[Any, str, nn.Module]]
    num_classes: int

    def put(self, model: Any) -> None:
        """Give a model these classifiers."""
        for owner, name, module in self.modules:
            owner._modules[name] = module
            if "num_classes" in vars(owner):
                owner.num_classes = self.num_classes
        model.num_classes = self.num_classes


@dataclass
class Aside:
    """An adapter that is not active: all that makes the base model the tuned one.

    Attributes:
        record: Record of its tuning.
        heads: Its classifiers.
        tensors: Its parameters in place of the backbone's, by name.
        taken: What its method put into the model.
    """

    record: TuneRecord
    heads: Heads
    tensors: dict[str, nn.Parameter]
    taken: list[Taken]


def heads_of(model: Any) -> Heads:
    """Return the classifiers of a model, plain or tuned."""
    wanted = {id(head) for head in classifiers_of(model)}
    found = [
        (owner, name, child)
        for owner in model.modules()
        for name, child in owner._modules.items()
        if id(child) in wanted
    ]
    return Heads(found, model.num_classes)


def head_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of a model's classifiers, with a dot."""
    wanted = {id(head) for head in classifiers_of(model)}
    return tuple(f"{name}." for name, part in model.named_modules() if id(part) in wanted)


def set_aside(model: Any, family: Family, base: Mapping[str, nn.Parameter]) -> Aside:
    """Put the active adapter aside; the base model is left, but for its classifiers.

    Args:
        model: Tuned model.
        family: Record of its class.
        base: The backbone's parameters in place of which an adapter has its own, by name.
    """
    record, heads = model.tune_record, heads_of(model)
    tensors = {}
    for name in own_names(model):
        tensors[name] = exchange(model, name, base[name])
    taken = take_out(model, family.plain_parts, keep_readings=True)
    del model.tune_record
    model.__class__ = family.plain
    return Aside(record, heads, tensors, taken)


def take_up(model: Any, aside: Aside) -> None:
    """Make an adapter that was put aside the active one, of a model that has none."""
    put_back(aside.taken)
    model.tune_record = aside.record
    aside.heads.put(model)
    for name, parameter in aside.tensors.items():
        exchange(model, name, parameter)
    for part in model.trained_modules():
        part.train(model.training)


def own_names(model: Any) -> Iterator[str]:
    """Yield the names of parameters of the backbone that the active adapter trains in place."""
    heads = head_names(model)
    for name in model.tune_record.originals:
        if not name.startswith(heads):
            yield name


def check_shared(model: Any) -> None:
    """Raise ValueError if the active adapter trains a parameter that other adapters would share."""
    own = {*model.tune_record.originals, *model.added_tensors()}
    heads = head_names(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name not in own and not name.startswith(heads):
            raise ValueError(
                f"{name} of the backbone is trained (requires_grad=True) beside what "
                f"{model.tune_record.method} trains, and all adapters share it; freeze it, or "
                "choose a method that trains it"
            )


def base_heads(model: Any) -> Heads:
    """Return the classifiers that a model had before it was first tuned, as new modules.

    Raises:
        ValueError: If they cannot be made again.
    """
    found, originals = heads_of(model), model.tune_record.originals
    names = {id(part): name for name, part in model.named_modules()}
    modules, classes = [], model.num_classes
    for owner, leaf, head in found.modules:
        values = {
            name.removeprefix(f"{names[id(head)]}."): value
            for name, value in originals.items()
            if name.startswith(f"{names[id(head)]}.")
        }
        made = _with_values(head, values)
        classes = len(values["weight"]) if type(head) is nn.Linear else classes
        modules.append((owner, leaf, made))
    return Heads(modules, classes)


def copied(heads: Heads) -> Heads:
    """Return copies of classifiers at the same places."""
    modules = [(owner, name, copy.deepcopy(head)) for owner, name, head in heads.modules]
    return Heads(modules, heads.num_classes)


def _with_values(head: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    if not values:
        return head
    if type(head) is nn.Linear:
        (rows, columns), like = values["weight"].shape, head.weight
        made: nn.Module = nn.Linear(columns, rows, "bias" in values, like.device, like.dtype)
    else:
        made = copy.deepcopy(head)
    try:
        made.load_state_dict({name: values[name] for name in made.state_dict()})
    except (RuntimeError, KeyError) as error:
        raise ValueError(
            f"the classifier, a {type(head).__name__}, is not the one that was tuned: {error}; "
            "put it back"
        ) from error
    return made.requires_grad_(False).train(head.training)


def exchange(model: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
    """Give a model a parameter under a name; return the one it had."""
    place, _, leaf = name.rpartition(".")
    parameters: Any = model.get_submodule(place)._parameters
    before: nn.Parameter = parameters[leaf]
    parameters[leaf] = parameter
    return before


def base_parameter(model: nn.Module, name: str, original: Tensor) -> nn.Parameter:
    """Return a parameter with the value that one of the backbone had before tuning."""
    like = model.get_parameter(name)
    with torch.no_grad():
        return nn.Parameter(torch.empty_like(like).copy_(original), False)
