"""Work of `vpt-fast methods`."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from torch import nn

from vpt_fast import LinearProbe, count_parameters, prompt_tune, remove_prompts
from vpt_fast.backbones import build as backbones
from vpt_fast.methods import Method, find_method, method_names
from vpt_fast.train.common.curves import format_table
from vpt_fast.tune import classifiers_of


def table_of_methods(model: str, num_prompts: int, img_size: int | None) -> str:
    """Return a table of all methods, with the numbers of parameters that each trains.

    Args:
        model: timm's name of the model, or "vpt_fast_demo".
        num_prompts: Number of prompts (of each block).
        img_size: Side of the images in pixels; None takes the model's own.

    Raises:
        ValueError, TypeError: If the model is not known or cannot be tuned.
    """
    name, _, model_args = backbones.resolve_name(model, None, img_size)
    net = backbones.tunable_on_meta(name, 1, LinearProbe(), model_args)
    rows = [_row(method, net, num_prompts) for method in method_names()]
    table = format_table(["method", "parameters", "paper", "prompts"], rows)
    return f"{model}, {num_prompts} prompts, parameters without the head's\n{table}"


def _row(name: str, net: nn.Module, num_prompts: int) -> list[str]:
    try:
        cls: Any = find_method(name)
        method = cls()
    except (ValueError, TypeError) as error:
        return [name, "-", "-", str(error)]
    if "num_prompts" in {field.name for field in fields(method)}:
        method = replace(method, num_prompts=num_prompts)
    try:
        trained = f"{trained_parameters(net, method):,}"
    except (ValueError, TypeError):
        trained = "not for it"
    return [name, trained, cls.paper or "-", cls.equation or "-"]


def trained_parameters(net: nn.Module, method: Method) -> int:
    """Return the number of parameters that a method trains of a plain model, beside the head.

    Raises:
        ValueError, TypeError: If the method does not fit the model.
    """
    model: Any = prompt_tune(net, method)
    try:
        heads = (p for head in classifiers_of(model) for p in head.parameters())
        return count_parameters(model)[0] - sum(p.numel() for p in heads)
    finally:
        remove_prompts(model)
