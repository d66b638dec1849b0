"""Pretrained timm models from a name and the source of their weights."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from timm.models import load_state_dict
from torch import nn

from vpt_fast.backbones.demo_backbone import DEMO_ARGS, DEMO_CHECKPOINT, DEMO_MODEL
from vpt_fast.methods import Method
from vpt_fast.tune import prompt_tune, remove_prompts

DEMO_NAME = "vpt_fast_demo"
"""Name of the small backbone that this package ships."""


def check_model_name(name: str) -> None:
    """Check that timm has the model.

    Args:
        name: Architecture with or without a pretrained tag, such as
            "vit_base_patch16_224.orig_in21k".

    Raises:
        ValueError: If the architecture or the tag is unknown, with names that are close.
    """
    if ":" in name:
        # hf-hub:owner/model and local-dir:path are not in timm's own list.
        return
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        close = difflib.get_close_matches(architecture, timm.list_models("*vit*"), n=3)
        close = close or difflib.get_close_matches(architecture, timm.list_models(), n=3)
        hint = f"did you mean {', '.join(close)}?" if close else "timm.list_models() has the names"
        raise ValueError(f"timm has no model {name!r}; {hint}")
    known = timm.list_pretrained(f"{architecture}.*")
    if tag and name not in known:
        hint = f"it has {', '.join(known)}" if known else "it has none"
        raise ValueError(f"timm's {architecture} has no pretrained tag {tag!r}; {hint}")


def resolve_name(
    name: str, checkpoint: Path | None = None, img_size: int | None = None
) -> tuple[str, Path | None, dict[str, Any]]:
    """Return timm's name, the checkpoint and the model arguments of the user's choice.

    Args:
        name: Name of a timm model, or `DEMO_NAME`.
        checkpoint: File with the backbone's weights, if they come from one.
        img_size: Image size in pixels; None takes the model's own.

    Raises:
        ValueError: If `img_size` is not that of the demo's model.
    """
    if name == DEMO_NAME:
        if img_size not in (None, DEMO_ARGS["img_size"]):
            raise ValueError(
                f"--img-size is {img_size}, but the demo's model has one size, "
                f"{DEMO_ARGS['img_size']}; leave it out, or name another --model"
            )
        return DEMO_MODEL, checkpoint or DEMO_CHECKPOINT, dict(DEMO_ARGS)
    if img_size is None:
        return name, checkpoint, {}
    # timm's data configuration comes from the model's configuration, which img_size leaves as is.
    overlay = {"input_size": [3, img_size, img_size]}
    return name, checkpoint, {"img_size": img_size, "pretrained_cfg_overlay": overlay}


def tunable_on_meta(
    name: str, num_classes: int, method: Method, model_args: Mapping[str, Any] | None = None
) -> nn.Module:
    """Create a timm model on the meta device, and refuse a model that cannot be tuned.

    Args:
        name: Name of a timm model, with or without a tag.
        num_classes: Number of outputs of its head.
        method: Method to tune it with.
        model_args: Further arguments of timm.create_model.

    Returns:
        The plain model.

    Raises:
        ValueError: If the name is unknown, timm refuses the arguments, the method does not fit,
            or the model takes no images of the size that its configuration names.
        TypeError: If the model is of a class that cannot be tuned.
    """
    check_model_name(name)
    with torch.device("meta"):
        try:
            model: nn.Module = timm.create_model(
                name, num_classes=num_classes, **dict(model_args or {})
            )
        except Exception as error:  # timm raises nearly anything for arguments it does not take
            raise ValueError(f"timm.create_model({name!r}) failed: {error}") from error
        remove_prompts(prompt_tune(model, method))
        size = tuple(data_config_of(model)["input_size"])
        try:
            model(torch.empty(1, *size))
        except Exception as error:  # timm asserts that the image fits
            raise ValueError(f"{name} takes no images of size {size}: {error}") from error
    return model


def create_backbone(
    name: str,
    num_classes: int,
    *,
    pretrained: bool = False,
    checkpoint: str | Path | None = None,
    model_args: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Create a pretrained timm model with a new head.

    Args:
        name: Name of a timm model, with or without a tag.
        num_classes: Number of outputs of the new head.
        pretrained: Whether to download timm's weights of that name and tag.
        checkpoint: File with weights instead (safetensors, or a file of torch.save). Its head is
            ignored.
        model_args: Further arguments of timm.create_model, such as {"img_size": 448}.

    Returns:
        The model, on the CPU.

    Raises:
        ValueError: If the name is unknown, if neither or both of `pretrained` and `checkpoint`
            are given, if timm refuses the arguments, or if the checkpoint cannot be read or
            belongs to another model.
        FileNotFoundError: If there is no file `checkpoint`.
    """
    check_model_name(name)
    if pretrained == (checkpoint is not None):
        what = "both --pretrained and --checkpoint" if pretrained else "no weights for the backbone"
        raise ValueError(
            f"{what}; pass --pretrained to download timm's weights of {name}, "
            "or --checkpoint FILE for weights on disk"
        )
    if checkpoint is not None and not Path(checkpoint).is_file():
        raise FileNotFoundError(f"there is no checkpoint file {checkpoint}")
    try:
        model: nn.Module = timm.create_model(
            name, pretrained=pretrained, num_classes=num_classes, **dict(model_args or {})
        )
    except Exception as error:  # timm and the hub raise nearly anything here
        hint = " (without network access, pass --checkpoint FILE)" if pretrained else ""
        raise ValueError(
            f"timm.create_model({name!r}) failed: {type(error).__name__}: {error}{hint}"
        ) from error
    if checkpoint is not None:
        load_backbone_weights(model, checkpoint, name)
    return model


def load_backbone_weights(model: nn.Module, checkpoint: str | Path, name: str) -> None:
    """Load all weights but the head's from a file.

    Args:
        model: timm model; changed in place.
        checkpoint: File that timm's loaders read; its head is ignored.
        name: Name of the model, for messages.

    Raises:
        ValueError: If the file cannot be read or does not hold the model's weights.
    """
    if Path(checkpoint).suffix.lower() in (".npz", ".npy"):
        try:
            loader: Any = model
            loader.load_pretrained(str(checkpoint))
        except Exception as error:
            raise ValueError(f"checkpoint {checkpoint} cannot be read: {error}") from error
        return
    try:
        state = load_state_dict(str(checkpoint))
        filter_fn = getattr(_module_of(model), "checkpoint_filter_fn", None)
        state = filter_fn(state, model) if filter_fn else state
        shapes = {key: tuple(value.shape) for key, value in state.items()}
    except Exception as error:  # damaged files raise what their format's reader happens to raise
        raise ValueError(
            f"checkpoint {checkpoint} cannot be read as weights of {name} "
            f"({type(error).__name__}: {error}); it should be a .safetensors file or a state dict "
            "that torch.save wrote"
        ) from error
    own = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    heads = _head_names(model)
    missing = [key for key in own if key not in shapes and not key.startswith(heads)]
    # Weights of parts that the model lacks altogether (a decoder, a mask token) do no harm, but
    # without an extra weight of one of its own parts it would compute something else.
    parts = {key.partition(".")[0] for key in own}
    extra = [
        key
        for key in shapes
        if key not in own and not key.startswith(heads) and key.partition(".")[0] in parts
    ]
    wrong = [
        key
        for key in own
        if key in shapes and shapes[key] != own[key] and not key.startswith(heads)
    ]
    if missing or extra or wrong:
        details = []
        if missing:
            details.append(f"it lacks {len(missing)} of {len(own)} weights, such as {missing[0]}")
        if extra:
            details.append(f"it has {len(extra)} that the model lacks, such as {extra[0]}")
        if wrong:
            key = wrong[0]
            details.append(f"its {key} has shape {shapes[key]}, the model's {own[key]}")
        raise ValueError(
            f"checkpoint {checkpoint} does not belong to {name}: {'; '.join(details)}. "
            "Pass the --model (and --img-size) that it was trained with"
        )
    with torch.no_grad():
        wanted = {key: state[key] for key in own if not key.startswith(heads)}
        model.load_state_dict(wanted, strict=False)


def weights_without_head(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return all weights but the head's, by name."""
    heads = _head_names(model)
    return {k: value for k, value in model.state_dict().items() if not k.startswith(heads)}


def data_config_of(model: nn.Module) -> dict[str, Any]:
    """Return timm's image size, normalisation, interpolation and crop for `model`."""
    return dict(resolve_model_data_config(model))


def _module_of(model: nn.Module) -> Any:
    return sys.modules[type(model).__module__]


def _head_names(model: nn.Module) -> tuple[str, ...]:
    classifier = getattr(model, "pretrained_cfg", {}).get("classifier") or "head"
    names = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    return tuple(f"{name}." for name in names)
