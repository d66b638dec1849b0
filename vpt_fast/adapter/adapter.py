"""Save what was trained, and load it onto a plain model.

An adapter is a directory of two files: `adapter_model.safetensors`, the trained tensors under
their names in the model, and `adapter_config.json`, what is needed to build the model again and
to know that it is the right one. That is told by a fingerprint of what was frozen (of an adapter
of `FullTuning()`, which holds every weight, it is empty, and any values fit underneath), by the
attributes that decide what is computed with it, and by what the tuned model makes of one image.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import timm
import torch
from safetensors.torch import save
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from vpt_fast.adapter.architecture import describe
from vpt_fast.adapter.atomic import atomic_folder
from vpt_fast.adapter.checks import check_computation, check_dimensions, check_weights
from vpt_fast.adapter.config import check_config
from vpt_fast.adapter.files import (
    CONFIG_FILE,
    FORMAT_VERSION,
    TENSORS_FILE,
    check_finite,
    config_sha256,
    read_adapter,
    sha256,
)
from vpt_fast.adapter.fingerprint import difference, fingerprint
from vpt_fast.adapter.fixed_image import seen_differently, seen_in_fixed_image
from vpt_fast.checks import check_model
from vpt_fast.methods import from_dict, to_dict
from vpt_fast.models.tuned import blocks_of, is_tuned
from vpt_fast.tune import host_copy, prompt_tune, remove_prompts, trainable_parameters
from vpt_fast.version import __version__

Model = TypeVar("Model", bound=nn.Module)
_EQUAL = 1e-6  # relative to the norm: between fingerprints of the same weights


def model_config(
    model: nn.Module, model_args: dict[str, Any] | None = None, checkpoint: str | None = None
) -> dict[str, Any]:
    """What `timm.create_model` needs to build `model` again, as JSON values.

    Args:
        model: a timm vision transformer, plain or tuned.
        model_args: arguments of `timm.create_model` that replace or complete the recorded ones.
        checkpoint: the file its weights came from; its name is kept.
    """
    vit: Any = model
    args = {
        key: value
        for key, value in {**getattr(vit, "_model_args", {}), **(model_args or {})}.items()
        if not key.endswith(("drop_rate", "drop_path_rate"))
    }
    args |= {
        "num_classes": vit.num_classes,
        "in_chans": vit.in_chans,
        "global_pool": vit.global_pool,
        "img_size": list(vit.patch_embed.img_size),
    }
    unrecorded = sorted(key for key, value in args.items() if not _is_json(value))
    pretrained: dict[str, Any] = getattr(vit, "pretrained_cfg", None) or {}
    return {
        "name": pretrained.get("architecture"),
        "args": {key: value for key, value in args.items() if key not in unrecorded},
        "unrecorded_args": unrecorded,
        "source": _source(pretrained),
        "pretrained_tag": pretrained.get("tag") or None,
        "checkpoint": None if checkpoint is None else os.path.basename(checkpoint),
        "width": vit.embed_dim,
        "depth": len(blocks_of(vit)),
    }


def _source(pretrained: Mapping[str, Any]) -> str | None:
    """What `timm.create_model` takes for a model that timm's own list has not."""
    if pretrained.get("source") == "hf-hub":
        return f"hf-hub:{pretrained['hf_hub_id']}"
    if pretrained.get("source") == "local-dir":
        return f"local-dir:{os.path.abspath(pretrained['file'])}"
    return None


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def _is_added(name: str) -> bool:
    """Whether a tensor is of a module that a method has added: no plain model has it."""
    return name.startswith(("prompt_", "head_hidden.")) or any(
        part in name for part in (".prompt.", ".prompt_projector.", ".adapter.")
    )


def _trained(model: nn.Module) -> dict[str, Tensor]:
    """What requires a gradient, and what was added even where it has been frozen since."""
    trained = {name for name, _ in trainable_parameters(model)}
    return {n: p.detach() for n, p in model.named_parameters() if n in trained or _is_added(n)}


def _frozen(model: nn.Module, trained: Sequence[str]) -> dict[str, Tensor]:
    return {name: t for name, t in model.state_dict().items() if name not in set(trained)}


def save_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    class_names: Sequence[str] | None = None,
    model_args: dict[str, Any] | None = None,
    checkpoint: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write everything of `model` that requires a gradient, whole or not at all.

    An adapter that is there is replaced in one moment (see `atomic_folder`); a link stays a link.

    Args:
        model: A tuned model.
        directory: The adapter's directory; its parents are created.
        class_names: Label names, in the order of the classes.
        model_args: Arguments of `timm.create_model` that the model does not record itself.
        checkpoint: The file that the backbone's weights came from; its name is kept.
        overwrite: Whether an adapter that is there is replaced.

    Returns:
        `directory` as a Path.

    Raises:
        FileExistsError: `directory` exists and `overwrite` is False, or it holds other files.
        TypeError: `class_names` is one string.
        ValueError: `model` is not tuned, nothing in it is trained, a value of it is not finite,
            the number of names is not the number of classes, or the configuration of `model` or
            one of `model_args` is nothing that `load_adapter` takes.
        OSError: It cannot be written; what was there is still there.
    """
    directory = Path(directory)
    if not is_tuned(model):
        raise ValueError(f"this {type(model).__name__} is not tuned; call prompt_tune first")
    tuned: Any = model
    if isinstance(class_names, str):
        raise TypeError(f"class_names must be a list of names, got {class_names!r}")
    if class_names is not None and len(class_names) != tuned.num_classes:
        raise ValueError(f"{len(class_names)} class names for {tuned.num_classes} classes")
    _check_target(directory, overwrite)
    trained = _trained(model)
    if not trained:
        raise ValueError("nothing in this model requires a gradient; there is nothing to save")
    check_finite(trained, "the model")
    data = {**resolve_model_data_config(model), **_told(tuned, "exif_transpose")}
    data |= tuned.tune_record.inputs
    frozen = fingerprint(_frozen(model, list(trained)))
    for name, summary in frozen.items():
        if not math.isfinite(summary["norm"]):
            raise ValueError(f"{name} of the backbone has values that are not finite")
    tensors = {name: t.to("cpu").contiguous().clone() for name, t in trained.items()}
    content = save(tensors, metadata={"format": "pt"})
    config = {
        "format_version": FORMAT_VERSION,
        "method": to_dict(tuned.tune_record.method),
        "model": model_config(model, model_args, checkpoint),
        "input": {
            "input_size": [tuned.in_chans, *tuned.patch_embed.img_size],
            "interpolation": data["interpolation"],
            "mean": [float(value) for value in data["mean"]],
            "std": [float(value) for value in data["std"]],
            "crop_pct": float(data["crop_pct"]),
            "crop_mode": data.get("crop_mode", "center"),
            "exif_transpose": data.get("exif_transpose", False),
        },
        "class_names": None if class_names is None else [str(name) for name in class_names],
        "versions": {"vpt_fast": __version__, "torch": torch.__version__, "timm": _timm()},
        "architecture": describe(model),
        "fixed_image": seen_in_fixed_image(model),
        "fingerprint": frozen,
        "tensors_sha256": sha256(content),
    }
    config["config_sha256"] = config_sha256(config)
    text = json.dumps(config, indent=2) + "\n"
    try:
        check_config(json.loads(text))
    except ValueError as error:
        raise ValueError(f"this adapter could not be loaded again: {error}") from None
    with atomic_folder(directory, replace=overwrite) as folder:
        (folder / TENSORS_FILE).write_bytes(content)
        (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
    return directory


def _told(model: Any, key: str) -> dict[str, Any]:
    """A value of the model's configuration that timm does not resolve."""
    config = getattr(model, "pretrained_cfg", None) or {}
    return {key: config[key]} if key in config else {}


def _timm() -> str:
    return str(timm.__version__)


def _check_target(directory: Path, overwrite: bool) -> None:
    if not directory.exists():
        return
    if not overwrite:
        raise FileExistsError(
            f"{directory} exists; choose another directory, or pass overwrite=True"
        )
    if not directory.is_dir() or {f.name for f in directory.iterdir()} - {
        TENSORS_FILE,
        CONFIG_FILE,
    }:
        raise FileExistsError(f"{directory} holds more than an adapter; choose another directory")


def load_adapter(model: Model, directory: str | os.PathLike[str]) -> Model:
    """Tune a plain timm model with a saved adapter, in place.

    Args:
        model: A plain model with the backbone that the adapter was trained on; rounding of its
            weights to another dtype is accepted. It needs a head of as many classes.
        directory: Folder that `save_adapter` wrote.

    Returns:
        `model` itself, as `prompt_tune` leaves it, with the trained values.

    Raises:
        FileNotFoundError: There is no adapter.
        ValueError: The adapter is damaged, or belongs to a model of another width, depth, class
            count or other weights, or one that computes something else with them. `model` is
            unchanged then.
        TypeError: `model` is of a class that `prompt_tune` does not know.
    """
    directory = Path(directory)
    config, tensors = read_adapter(directory)
    method = from_dict(config["method"])
    check_model(model, method)
    rounded = _check_backbone(model, config, list(tensors), directory)
    tuned: Any = prompt_tune(model, method)
    tuned.tune_record.inputs = config["input"]
    try:
        _fill(tuned, tensors, config["fingerprint"], directory)
        _check_fixed_image(tuned, config, directory, rounded)
    except BaseException:
        remove_prompts(tuned)
        raise
    return tuned


def _check_backbone(
    model: Any, config: dict[str, Any], trained: list[str], directory: Path
) -> bool:
    """Raise ValueError unless it is the adapter's; say whether its weights have been rounded."""
    have, want = model_config(model), config["model"]
    check_dimensions(have, want, directory)
    classes = want.get("args", {}).get("num_classes")
    if have["args"]["num_classes"] != classes:
        raise ValueError(
            f"the adapter in {directory} is for {classes} classes, this model has "
            f"{have['args']['num_classes']}; create it with num_classes={classes}"
        )
    weights = fingerprint(_frozen(model, trained))
    check_weights(weights, config, directory)
    check_computation(describe(model), config, directory)
    return bool(difference(weights, config["fingerprint"], _EQUAL))


def _check_fixed_image(
    model: nn.Module, config: Mapping[str, Any], directory: Path, rounded: bool
) -> None:
    expected = config.get("fixed_image")
    if expected is None:
        return  # of an older format, or nothing that can be compared
    have = seen_in_fixed_image(model)
    different = "not finite" if have is None else seen_differently(have, expected, rounded)
    if different:
        raise ValueError(
            f"with the adapter in {directory} this model computes something else of the same image "
            f"than the one that was saved: {different}; compare what was replaced or hooked in them"
        )


def _fill(model: Any, tensors: dict[str, Tensor], frozen: dict[str, Any], directory: Path) -> None:
    parameters = dict(model.named_parameters())
    trained = [name for name, p in parameters.items() if p.requires_grad and name not in frozen]
    for name, tensor in tensors.items():
        if name not in parameters:
            raise ValueError(f"{directory / TENSORS_FILE}: the model has no parameter {name}")
        if parameters[name].shape != tensor.shape:
            raise ValueError(
                f"{directory / TENSORS_FILE}: {name} has shape {tuple(tensor.shape)}, the model's "
                f"has {tuple(parameters[name].shape)}"
            )
    missing = [name for name in trained if name not in tensors]
    if missing:
        raise ValueError(f"{directory / TENSORS_FILE} has no {missing[0]}")
    with torch.no_grad():
        for name, tensor in tensors.items():
            if not _is_added(name) and name not in model.tune_record.originals:
                model.tune_record.originals[name] = host_copy(parameters[name])
            parameters[name].copy_(tensor)
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in tensors)
