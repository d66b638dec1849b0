"""The adapters of a model: the active one, those that wait, and the base model's tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from vpt_fast.adapter.switching.aside import (
    Aside,
    Heads,
    Parameters,
    base_heads,
    base_parameters,
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
        displaced: The backbone's parameters in place of which the active one has its own.
        known: Names of the parameters that the base model had when it was tuned.
        others: Those that wait, by name.
    """

    active: str
    heads: Heads
    displaced: Parameters
    known: frozenset[str]
    others: dict[str, Aside] = field(default_factory=dict)

    def leave(self, model: Any, family: Family, shares: bool = True) -> Aside:
        """Put the active adapter aside; the base model is left.

        Args:
            model: Tuned model.
            family: Record of its class.
            shares: Whether other adapters will share the backbone.

        Raises:
            ValueError: If the active adapter trains what all adapters would share, or one of its
                parameters is not in the model any more. Nothing has changed then.
        """
        aside = set_aside(model, family, self.displaced, self.heads)
        self.displaced = {}
        if shares and any(p.requires_grad for p in model.parameters()):
            named = model.named_parameters()
            trained = [name for name, p in named if p.requires_grad and name in self.known]
            if trained:
                method = aside.record.method
                self.displaced = take_up(model, family, aside)
                raise ValueError(
                    f"{trained[0]} of the backbone is trained (requires_grad=True) beside what "
                    f"{method} trains, and all adapters would share it; freeze it, or choose a "
                    "method that trains it"
                )
        return aside

    def switch(self, model: Any, name: str, shares: bool = True) -> None:
        """Make an adapter that waits the active one; folded weights stay folded.

        Raises:
            ValueError: As of `leave`, or if the other one does not fit the model any more. Nothing
                has changed then.
        """
        family: Any = family_of(model)
        record = model.tune_record
        aside = self.leave(model, family, shares)
        try:
            self.displaced = take_up(model, family, self.others[name])
        except ValueError:
            self.displaced = take_up(model, family, aside)
            raise
        for module in self.others.pop(name).modules():
            module.train(model.training)
        self.others[self.active] = aside
        self.active = name
        model.tune_record.fold, record.fold = record.fold, None

    def keep_first(self, model: Any) -> None:
        """Make the first adapter active and drop the others: it has the base model's tensors."""
        if self.active != FIRST:
            self.switch(model, FIRST, shares=False)
        del model.tune_adapters

    def convert(self, *args: Any, **kwargs: Any) -> None:
        """Convert all tensors that are not in the model, as its `_apply` does."""
        asides = self.others.values()
        modules = [*self.heads.modules.values(), *(m for aside in asides for m in aside.modules())]
        stores: list[dict[str, Any]] = [self.displaced, *(a.parameters for a in asides)]
        stores += [part.parameters for aside in asides for part in aside.taken]
        for store in stores:
            holder = nn.Module()  # which may replace parameters in the store
            holder._parameters = store
            modules.append(holder)
        for module in {id(module): module for module in modules}.values():
            module._apply(*args, **kwargs)


def adapters_of(model: Any) -> Adapters:
    """Return the adapters of a tuned model, which has one or more."""
    found: Adapters | None = vars(model).get("tune_adapters")
    if found is None:
        # Made under inference_mode, tensors could not serve training later.
        with torch.inference_mode(False), torch.no_grad():
            known = frozenset(model.tune_record.requires_grad)
            found = Adapters(FIRST, base_heads(model), base_parameters(model), known)
        model.tune_adapters = found
    return found
