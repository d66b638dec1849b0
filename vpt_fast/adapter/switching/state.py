"""The adapters of a model: the active one, those that wait, and the base model's tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from vpt_fast.adapter.switching.aside import (
    Aside,
    Heads,
    base_heads,
    base_parameter,
    own_names,
    set_aside,
    take_up,
)
from vpt_fast.models.family import Family, family_of

FIRST = "default"
"""Name of the adapter of `prompt_tune` or `load_adapter`."""


@dataclass
class Adapters:
    """All adapters of a tuned model.

    Attributes:
        active: Name of the active one.
        heads: The base model's classifiers.
        parameters: The base model's parameters that an adapter has its own of, by name.
        others: Those that wait, by name.
    """

    active: str
    heads: Heads
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    others: dict[str, Aside] = field(default_factory=dict)

    def leave(self, model: Any, family: Family) -> Aside:
        """Put the active adapter aside; the base model is left.

        Raises:
            ValueError: If the active adapter trains what all adapters would share.
        """
        originals, method = model.tune_record.originals, model.tune_record.method
        for name in own_names(model):
            if name not in self.parameters:
                self.parameters[name] = base_parameter(model, name, originals[name])
        aside = set_aside(model, family, self.parameters, self.heads)
        if any(p.requires_grad for p in model.parameters()):
            trained = next(name for name, p in model.named_parameters() if p.requires_grad)
            take_up(model, aside)
            raise ValueError(
                f"{trained} of the backbone is trained (requires_grad=True) beside what {method} "
                "trains, and all adapters would share it; freeze it, or choose a method that "
                "trains it"
            )
        return aside

    def switch(self, model: Any, name: str) -> None:
        """Make an adapter that waits the active one; folded weights stay folded."""
        family: Any = family_of(model)
        record = model.tune_record
        self.others[self.active] = self.leave(model, family)
        take_up(model, self.others.pop(name))
        model.tune_record.fold, record.fold = record.fold, None
        self.active = name

    def keep_first(self, model: Any) -> None:
        """Make the first adapter active and drop the others: it has the base model's tensors."""
        if self.active != FIRST:
            self.switch(model, FIRST)
        del model.adapters

    def convert(self, *args: Any, **kwargs: Any) -> None:
        """Convert all tensors that are not in the model, as its `_apply` does."""
        asides = self.others.values()
        modules = [*self.heads.all(), *(m for aside in asides for m in aside.modules())]
        parameters = [self.parameters, *(aside.tensors for aside in asides)]
        parameters += [part.parameters for aside in asides for part in aside.taken]
        loose: Any = nn.Module()  # so that parameters are converted as a module's are
        loose._parameters = dict(enumerate(p for found in parameters for p in found.values()))
        for module in (loose, *{id(module): module for module in modules}.values()):
            module._apply(*args, **kwargs)


def adapters_of(model: Any) -> Adapters:
    """Return the adapters of a tuned model, which has one or more."""
    found: Adapters | None = vars(model).get("adapters")
    if found is None:
        found = model.adapters = Adapters(FIRST, base_heads(model))
    return found
