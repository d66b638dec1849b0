"""Load an adapter onto the plain model that it was trained on; where none is given, build it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vpt_fast.adapter.architecture import describe
from vpt_fast.adapter.checks import check_backbone
from vpt_fast.adapter.contents import frozen_tensors, model_config
from vpt_fast.adapter.files import TENSORS_FILE, read_adapter
from vpt_fast.adapter.fingerprint import difference, fingerprint
from vpt_fast.adapter.fixed_image import different_outputs, fixed_image_outputs
from vpt_fast.adapter.hub.names import local_folder
from vpt_fast.adapter.tensors import check_tensors, expected_tensors
from vpt_fast.backbones.of_adapter import backbone_of_adapter
from vpt_fast.checks import check_model
from vpt_fast.methods import from_dict
from vpt_fast.models.changes.sharing import remember
from vpt_fast.models.interop.wrappers import inner_model
from vpt_fast.tune import apply_method, host_copy, undo_method

_EQUAL = 1e-6
"""Tolerance, relative to the norm, between fingerprints of the same weights."""


def load_adapter(
    model: Any,
    directory: str | os.PathLike[str],
    *,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Any:
    """Tune a plain timm model with a saved adapter, in place, or build the model too.

    Args:
        model: Plain model with the backbone that the adapter was trained on and a head of as many
            classes; its weights may be rounded to another dtype. None builds it, in eval mode and
            on the CPU, with the adapter's number of classes, image size and normalisation; its
            weights come from where the adapter's did, or from `checkpoint`.
        directory: Folder that `save_adapter` wrote, or "hf-hub:user/name" (with "@revision" if
            wanted), which is downloaded.
        checkpoint: File with the backbone's weights, if the model is built and they are in none
            of timm's own places.

    Returns:
        `model` itself, as `prompt_tune` leaves it, with the trained values; or the new model.

    Raises:
        FileNotFoundError: If there is no adapter, or no file `checkpoint`.
        ValueError: If the adapter is damaged, or belongs to a model of another width, depth, class
            count or other weights, or one that computes something else with them. `model` is
            unchanged then. Or if a model cannot be built, or `checkpoint` is given beside one.
        TypeError: If `model` is of a class that `prompt_tune` does not know.
        OSError: If the Hub cannot be reached.
    """
    directory = local_folder(directory)
    config, tensors = read_adapter(directory)
    if model is None:
        built: Any = backbone_of_adapter(config, checkpoint, tensors)
        built.pretrained_cfg = {**built.pretrained_cfg, **config["input"]}
        tuned_by(built, directory, config, tensors)
        remember(built)
        return built.eval()
    if checkpoint is not None:
        raise ValueError(
            f"checkpoint is {os.fspath(checkpoint)!r}, but the model is given; load it there, or "
            "pass None for the model"
        )
    inner = inner_model(model, changes=True)
    tuned_by(inner, directory, config, tensors)
    remember(inner)
    return model


def tuned_by(
    model: Any,
    directory: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    memory: str = "speed",
    cuda_graphs: bool = False,
) -> Any:
    """Tune a plain model with an adapter that was read; see `load_adapter`.

    Args:
        model: Plain model.
        directory: Folder of the adapter, for messages.
        config: Its configuration.
        tensors: Its tensors.
        memory: Memory mode.
        cuda_graphs: Whether to record the blocks as CUDA graphs.
    """
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
    known = {**dict(model.named_buffers()), **dict(model.named_parameters()), **trained}
    needed = (name for name in trained if name not in config["fingerprint"])
    check_tensors(tensors, known, needed, directory / TENSORS_FILE)
    tuned: Any = apply_method(model, method, family, memory, cuda_graphs)
    tuned.tune_record.inputs = config["input"]
    tuned.tune_record.multi_label = config.get("multi_label", False)
    tuned.tune_record.initialised = config.get("initialised")
    try:
        _fill(tuned, tensors)
        rounded = bool(difference(weights, config["fingerprint"], _EQUAL))
        _check_fixed_image(tuned, config, directory, rounded)
    except BaseException:
        undo_method(tuned, family)
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
    every = dict(model.named_buffers()) | parameters | added
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name in record.requires_grad and name not in record.originals:
                record.originals[name] = host_copy(parameters[name])
            every[name].copy_(tensor)
    for name, parameter in parameters.items():
        if name not in added:
            parameter.requires_grad_(name in tensors)
