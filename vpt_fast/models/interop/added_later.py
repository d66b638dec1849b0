"""Modules that others put into a tuned model: PEFT's layers, and what replaces a block's Linear."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn


def check_own_modules(model: Any, blocks: Iterable[nn.Module]) -> None:
    """Raise ValueError if a tuned model holds modules that `load_adapter` could not find again.

    Args:
        model: Tuned model. A classifier of another class is not looked at.
        blocks: Its blocks.
    """
    for name, module in model.named_modules():
        if type(module).__module__.partition(".")[0] == "peft":
            raise ValueError(
                f"{name} is PEFT's {type(module).__name__}, which an adapter cannot hold: save it "
                "with PEFT, and the adapter of copy.deepcopy(peft_model).unload()"
            )
    known = model.tune_record.requires_grad.keys() | model.added_tensors().keys()
    inside = {id(p) for block in blocks for p in block.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) in inside and name not in known:
            raise ValueError(
                f"{name} was put into a block after tuning, and an adapter cannot hold it: put the "
                "Linear from before back into a copy of the model, and save that"
            )


def check_not_wrapped(part: nn.Module, name: str) -> None:
    """Raise ValueError if PEFT trains a copy of a module that the blocks share, and do not read.

    Args:
        part: Module that a method added to a model.
        name: Its name.
    """
    if "modules_to_save" in part._modules and "original_module" in part._modules:
        raise ValueError(
            f"{name} is shared by the blocks, which would not read the copy that PEFT trains: leave "
            "it out of modules_to_save, and call requires_grad_(True) on what "
            "vpt_fast.trainable_parameters returned before get_peft_model"
        )
