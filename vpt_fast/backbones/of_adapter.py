"""The plain backbone that an adapter was trained on, from the adapter's configuration."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from vpt_fast.backbones.build import check_model_name, create_backbone
from vpt_fast.backbones.demo_backbone import DEMO_CHECKPOINT


def backbone_of_adapter(
    config: Mapping[str, Any],
    checkpoint: str | os.PathLike[str] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Build the plain backbone that an adapter was trained on.

    Args:
        config: Configuration that `vpt_fast.adapter.files.read_config` returns.
        checkpoint: File with the backbone's weights; None takes those that the adapter was trained
            on, from the hub, folder or list of timm's that they came from. An adapter of
            `FullTuning()` holds every weight and needs none.
        tensors: Tensors of the adapter, to compare before the model takes memory.

    Raises:
        ValueError: If `create_backbone` refuses, or the adapter was trained on a checkpoint file
            and `checkpoint` is None.
        FileNotFoundError: If there is no file `checkpoint`.
    """
    model = config["model"]
    stored = model.get("checkpoint")
    complete = not config["fingerprint"]
    if checkpoint is None and stored == DEMO_CHECKPOINT.name:
        checkpoint = DEMO_CHECKPOINT
    if checkpoint is None and stored and not complete:
        raise ValueError(
            f"this adapter was trained on the weights in {stored}; pass --checkpoint with its path "
            "(checkpoint= in Python)"
        )
    name, tag, source = (model.get(key) for key in ("name", "pretrained_tag", "source"))
    if checkpoint is None and source is not None:
        name, tag = source, None
    if name is None:
        raise ValueError(
            "this adapter's model has no name that timm knows; build it and call load_adapter"
        )
    if checkpoint is None and tag and "." not in name:
        name = f"{name}.{tag}"
    args = dict(model.get("args") or {})
    num_classes = args.pop("num_classes", None) or len(config["class_names"] or [])
    _check_sizes(model, args)
    if name != source:
        _check_shapes(name, num_classes, args, config["fingerprint"], tensors or {})
        if complete:
            return _created(name, num_classes, args)
    return create_backbone(
        name,
        num_classes,
        pretrained=checkpoint is None,
        checkpoint=None if checkpoint is None else Path(checkpoint),
        model_args=args,
    )


def _check_sizes(model: Mapping[str, Any], args: Mapping[str, Any]) -> None:
    """Raise ValueError if arguments contradict the width and the number of blocks."""
    depths = args.get("depths", [args.get("depth", model["depth"])])
    for key, found, right in (
        ("depth", sum(depths), model["depth"]),
        ("embed_dim", args.get("embed_dim", model["width"]), model["width"]),
    ):
        if found != right:
            raise ValueError(f"this adapter contradicts itself: its {key} is {found}, and {right}")


def _check_shapes(
    name: str,
    num_classes: int,
    args: Mapping[str, Any],
    expected: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> None:
    """Raise ValueError, before allocating, if the model's weights have unexpected shapes."""
    check_model_name(name)
    with torch.device("meta"):
        model = _created(name, num_classes, args)
    own = {key: list(value.shape) for key, value in model.state_dict().items()}
    for key, summary in expected.items():
        if own.get(key) != summary["shape"]:
            raise ValueError(
                f"this adapter contradicts itself: timm's {name} with its arguments has {key} of "
                f"shape {own.get(key)}, its fingerprint {summary['shape']}"
            )
    for key, tensor in tensors.items():
        # Heads of several layers replace the model's.
        known = key in own and not key.startswith("head")
        if known and own[key] != list(tensor.shape):
            raise ValueError(
                f"this adapter contradicts itself: timm's {name} with its arguments has {key} of "
                f"shape {own[key]}, the adapter {list(tensor.shape)}"
            )


def _created(name: str, num_classes: int, args: Mapping[str, Any]) -> nn.Module:
    try:
        model: nn.Module = timm.create_model(name, num_classes=num_classes, **args)
    except Exception as error:
        raise ValueError(f"timm.create_model({name!r}) failed: {error}") from error
    return model
