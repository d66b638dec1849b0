"""Save what was trained as an adapter, a folder of four files.

`adapter_model.safetensors` holds the trained tensors under their names in the model,
`adapter_config.json` what is needed to build the model again, and `adapter_fingerprint.json` what
is needed to recognise it: a fingerprint of the frozen weights (empty for `FullTuning()`, whose
adapter holds every weight, so that it fits a backbone of any values), the attributes that decide
what is computed with them, and the outputs for a fixed image. `README.md` is the model card.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save
from timm.data import resolve_model_data_config
from torch import nn

from vpt_fast.adapter.architecture import describe
from vpt_fast.adapter.atomic import atomic_folder
from vpt_fast.adapter.config import check_config
from vpt_fast.adapter.contents import frozen_tensors, model_config, trained_tensors
from vpt_fast.adapter.files import (
    CARD_FILE,
    FILES,
    FORMAT_VERSION,
    TENSORS_FILE,
    check_finite,
    config_texts,
    sha256,
)
from vpt_fast.adapter.fingerprint import fingerprint
from vpt_fast.adapter.fixed_image import fixed_image_outputs
from vpt_fast.adapter.hub.card import card_text
from vpt_fast.methods import to_dict
from vpt_fast.models.interop.wrappers import check_own_modules, inner_model, is_sharded
from vpt_fast.models.tuned import blocks_of, is_tuned
from vpt_fast.version import __version__


def save_adapter(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    class_names: Sequence[str] | None = None,
    model_args: dict[str, Any] | None = None,
    checkpoint: str | None = None,
    multi_label: bool | None = None,
    metrics: Mapping[str, float] | None = None,
    dataset: str | None = None,
    license: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write everything of `model` that requires a gradient, whole or not at all.

    An existing adapter is replaced atomically, its model card too; a link stays a link. Of a
    sharded model (`fully_shard`) every process has to call this; the first one writes.

    Args:
        model: Tuned model, or a wrapper of one.
        directory: Folder of the adapter; its parents are created.
        class_names: Label names, in the order of the classes.
        model_args: Arguments of `timm.create_model` that the model does not record itself.
        checkpoint: File that the backbone's weights came from; only the file's name is recorded.
        multi_label: Whether an image may have several labels, so that probabilities are sigmoids,
            not a softmax; None keeps what a loaded adapter says.
        metrics: Results in percent by name for the model card, such as {"test top-1": 91.5}.
        dataset: Name of the data set that they were measured on.
        license: Licence of the adapter for the model card, such as "apache-2.0".
        overwrite: Whether to replace an existing adapter.

    Returns:
        `directory` as a Path.

    Raises:
        FileExistsError: If `directory` exists and `overwrite` is False, or it holds other files.
        TypeError: If `class_names` is one string.
        ValueError: If `model` is not tuned, nothing in it is trained, one of its values is not
            finite, it holds modules that others put in, the number of names is not that of classes,
            or `load_adapter` would refuse the configuration of `model` or one of `model_args`.
        OSError: If it cannot be written; what was there is still there.
    """
    directory = Path(directory)
    tuned: Any = inner_model(model)
    _check_model(tuned, class_names)
    _check_target(directory, overwrite)
    trained = trained_tensors(tuned)
    if not trained:
        raise ValueError("nothing in this model requires a gradient; there is nothing to save")
    check_finite(trained, "the model")
    frozen = fingerprint(frozen_tensors(tuned, trained))
    for name, summary in frozen.items():
        if not math.isfinite(summary["norm"]):
            raise ValueError(f"{name} of the backbone has values that are not finite")
    tensors = {name: t.to("cpu").contiguous().clone() for name, t in trained.items()}
    content = save(tensors, metadata={"format": "pt"})
    config = {
        "format_version": FORMAT_VERSION,
        "method": to_dict(tuned.tune_record.method),
        "model": model_config(tuned, model_args, checkpoint),
        "input": _input_config(tuned),
        "class_names": None if class_names is None else [str(name) for name in class_names],
        "multi_label": tuned.tune_record.multi_label if multi_label is None else multi_label,
        "versions": _versions(),
        "architecture": describe(tuned),
        "fixed_image": fixed_image_outputs(tuned),
        "initialised": tuned.tune_record.initialised,
        "fingerprint": frozen,
        "tensors_sha256": sha256(content),
    }
    texts = _checked_texts(config)
    count = sum(tensor.numel() for tensor in tensors.values())
    texts[CARD_FILE] = card_text(config, count, metrics=metrics, dataset=dataset, license=license)
    if is_sharded(tuned) and torch.distributed.get_rank():
        return directory
    with atomic_folder(directory, replace=overwrite) as folder:
        (folder / TENSORS_FILE).write_bytes(content)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
    return directory


def _check_model(model: Any, class_names: Sequence[str] | None) -> None:
    if not is_tuned(model):
        raise ValueError(f"this {type(model).__name__} is not tuned; call prompt_tune first")
    if isinstance(class_names, str):
        raise TypeError(f"class_names must be a list of names, got {class_names!r}")
    check_own_modules(model, blocks_of(model))
    if class_names is not None and len(class_names) != model.num_classes:
        raise ValueError(f"{len(class_names)} class names for {model.num_classes} classes")


def _versions() -> dict[str, str]:
    return {
        "vpt_fast": __version__, "torch": torch.__version__, "timm": str(timm.__version__),
    }  # fmt: skip


def _input_config(tuned: Any) -> dict[str, Any]:
    """Return how images are prepared, from the adapter that was loaded or from timm."""
    own = getattr(tuned, "pretrained_cfg", None) or {}
    exif_transpose = own.get("exif_transpose", False)  # which timm does not resolve
    data = {"exif_transpose": exif_transpose, **resolve_model_data_config(tuned)}
    data |= tuned.tune_record.inputs
    return {
        "input_size": [tuned.in_chans, *tuned.patch_embed.img_size],
        "interpolation": data["interpolation"],
        "mean": [float(value) for value in data["mean"]],
        "std": [float(value) for value in data["std"]],
        "crop_pct": float(data["crop_pct"]),
        "crop_mode": data.get("crop_mode", "center"),
        "exif_transpose": data["exif_transpose"],
    }


def _checked_texts(config: dict[str, Any]) -> dict[str, str]:
    """Return the configuration's files by name; raise ValueError if it is not valid."""
    try:
        check_config(json.loads(json.dumps(config)))
    except ValueError as error:
        raise ValueError(f"this adapter could not be loaded again: {error}") from None
    return config_texts(config)


def _check_target(directory: Path, overwrite: bool) -> None:
    if not directory.exists():
        return
    if not overwrite:
        raise FileExistsError(
            f"{directory} exists; choose another directory, or pass overwrite=True"
        )
    if not directory.is_dir() or {f.name for f in directory.iterdir()} - {*FILES}:
        raise FileExistsError(f"{directory} holds more than an adapter; choose another directory")
