"""Modules that PEFT puts in the place of those that a method added."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def not_wrapped(added: Iterable[tuple[str, nn.Module]]) -> list[nn.Module]:
    """Return the modules that a method added.

    Args:
        added: Names and modules.

    Raises:
        ValueError: If PEFT trains a copy of one, which the blocks do not read.
    """
    found = []
    for name, part in added:
        if "modules_to_save" in part._modules and "original_module" in part._modules:
            raise ValueError(
                f"{name} is shared by the blocks, which would not read the copy that PEFT trains: "
                "leave it out of modules_to_save, and call requires_grad_(True) on what "
                "vpt_fast.trainable_parameters returned before get_peft_model"
            )
        found.append(part)
    return found
