"""Load an adapter onto the plain model that it was trained on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vpt_fast.adapter.architecture import describe
from vpt_fast.adapter.checks import check_backbone
from vpt_fast.adapter.contents import frozen_tensors, model_config
from vpt_fast.adapter.files import TENSORS_FILE, read_adapter
from vpt_fast.adapter.fingerprint import difference, fingerprint
from vpt_fast.adapter.fixed_image import different_outputs, fixed_image_outputs
from vpt_fast.adapter.tensors import check_tensors, expected_tensors
from vpt_fast.checks import check_model
from vpt_fast.methods import from_dict
from vpt_fast.tune import apply_method, host_copy, remove_prompts

Model = TypeVar("Model", bound=nn.Module)
_EQUAL = 1e-6
"""Tolerance, relative to the norm, between fingerprints of the same weights."""


def load_adapter(model: Model, directory: str | os.PathLike[str]) -> Model:
    """Tune a plain timm model with a saved adapter, in place.

    Args:
        model: Plain model with the backbone that the adapter was trained on and a head of as many
            classes; its weights may be rounded to another dtype.
        directory: Folder that `save_adapter` wrote.

    Returns:
        `model` itself, as `prompt_tune` leaves it, with the trained values.

    Raises:
        FileNotFoundError: If there is no adapter.
        ValueError: If the adapter is damaged, or belongs to a model of another width, depth, class
            count or other weights, or one that computes something else with them. `model` is
            unchanged then.
        TypeError: If `model` is of a class that `prompt_tune` does not know.
    """
    directory = Path(directory)
    config, tensors = read_adapter(directory)
    method = from_dict(config["method"])
    family = check_model(model, method)
    have, weights = model_config(model), fingerprint(frozen_tensors(model, tensors))
    check_backbone(have, weights, describe(model), config, directory)
    classes = config["model"].get("args", {}).get("num_classes")
    if have["args"]["num_classes"] != classes:
        raise ValueError(
            f"the adapter in {directory} is for {classes} classes, this model has "
            f"{have['args']['num_classes']}; create it with num_classes={classes}"
        )
    trained = expected_tensors(model, method, family)
    known = {**dict(model.named_parameters()), **trained}
    needed = (name for name in trained if name not in config["fingerprint"])
    check_tensors(tensors, known, needed, directory / TENSORS_FILE)
    tuned: Any = apply_method(model, method, family)
    tuned.tune_record.inputs = config["input"]
    tuned.tune_record.multi_label = config.get("multi_label", False)
    tuned.tune_record.initialised = config.get("initialised")
    try:
        _fill(tuned, tensors)
        rounded = bool(difference(weights, config["fingerprint"], _EQUAL))
        _check_fixed_image(tuned, config, directory, rounded)
    except BaseException:
        remove_prompts(tuned)
        raise
    return tuned


def _check_fixed_image(
    model: nn.Module, config: Mapping[str, Any], directory: Path, rounded: bool
) -> None:
    expected = config.get("fixed_image")
    if expected is None:
        return  # format 1, or values that were not finite
    have = fixed_image_outputs(model)
    different = "not finite" if have is None else different_outputs(have, expected, rounded)
    if different:
        raise ValueError(
            f"with the adapter in {directory} this model computes something else of the same image "
            f"than the model that was saved: {different}; compare which modules were replaced or "
            "hooked in either"
        )


def _fill(model: Any, tensors: Mapping[str, Tensor]) -> None:
    """Copy an adapter's tensors into a tuned model, and train these parameters only."""
    record, parameters = model.tune_record, dict(model.named_parameters())
    added = model.added_tensors()
    every = parameters | added
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name in record.requires_grad and name not in record.originals:
                record.originals[name] = host_copy(parameters[name])
            every[name].copy_(tensor)
    for name, parameter in parameters.items():
        if name not in added:
            parameter.requires_grad_(name in tensors)
