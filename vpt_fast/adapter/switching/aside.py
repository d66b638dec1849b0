"""Put an adapter of a model aside, so that the base model is left, and take it up again."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vpt_fast.models.changes.taken import Taken, put_back, take_out
from vpt_fast.models.family import Family
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

    def all(self) -> list[nn.Module]:
        """Return the classifiers."""
        return [head for _, _, head in self.modules]

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

    def modules(self) -> list[nn.Module]:
        """Return its modules: those of its method, and its classifiers."""
        own = [module for part in self.taken for module in part.modules.values()]
        return [module for module in own if module is not None] + self.heads.all()


def named_heads(model: Any) -> dict[str, nn.Module]:
    """Return the classifiers of a model, plain or tuned, by name."""
    wanted = {id(head) for head in classifiers_of(model)}
    return {name: part for name, part in model.named_modules() if id(part) in wanted}


def heads_of(model: Any) -> Heads:
    """Return the classifiers of a model, plain or tuned."""
    found = []
    for name, head in named_heads(model).items():
        place, _, leaf = name.rpartition(".")
        found.append((model.get_submodule(place), leaf, head))
    return Heads(found, model.num_classes)


def head_names(model: Any) -> tuple[str, ...]:
    """Return the names of a model's classifiers, with a dot."""
    return tuple(f"{name}." for name in named_heads(model))


def set_aside(model: Any, family: Family, base: Mapping[str, nn.Parameter], heads: Heads) -> Aside:
    """Put the active adapter aside; the base model is left.

    Args:
        model: Tuned model.
        family: Record of its class.
        base: The backbone's parameters in place of which an adapter has its own, by name.
        heads: The base model's classifiers.
    """
    record, own_heads = model.tune_record, heads_of(model)
    tensors = {name: exchange(model, name, base[name]) for name in own_names(model)}
    taken = take_out(model, family.plain_parts, keep_readings=True)
    del model.tune_record
    model.__class__ = family.plain
    heads.put(model)
    return Aside(record, own_heads, tensors, taken)


def take_up(model: Any, aside: Aside) -> None:
    """Make an adapter that was put aside the active one, of a model that has none."""
    put_back(aside.taken)
    model.tune_record = aside.record
    aside.heads.put(model)
    for name, parameter in aside.tensors.items():
        exchange(model, name, parameter)
    for part in aside.modules():
        part.train(model.training)


def own_names(model: Any) -> list[str]:
    """Return the names of parameters of the backbone that the active adapter trains in place."""
    originals = model.tune_record.originals
    if all(name.startswith("head") for name in originals):
        return []
    heads = head_names(model)
    return [name for name in originals if not name.startswith(heads)]


def base_heads(model: Any) -> Heads:
    """Return the classifiers that a model had before it was first tuned, as new modules.

    Raises:
        ValueError: If they cannot be made again.
    """
    originals, classes = model.tune_record.originals, model.num_classes
    modules = []
    places = zip(named_heads(model), heads_of(model).modules, strict=True)
    for whole, (owner, leaf, head) in places:
        values = {
            name.removeprefix(f"{whole}."): value
            for name, value in originals.items()
            if name.startswith(f"{whole}.")
        }
        modules.append((owner, leaf, _with_values(head, values)))
        classes = len(values["weight"]) if type(head) is nn.Linear else classes
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
