"""Which tensors of a model an adapter holds, and how it describes the model."""

from __future__ import annotations

import json
import os
from collections.abc import Container, Mapping
from typing import Any

from torch import Tensor, nn

from vpt_fast.models.interop.wrappers import whole
from vpt_fast.models.tuned import Tuned, blocks_of
from vpt_fast.tune import classifiers_of, trainable_parameters


def model_config(
    model: nn.Module, model_args: dict[str, Any] | None = None, checkpoint: str | None = None
) -> dict[str, Any]:
    """Return what `timm.create_model` needs to build `model` again, as JSON values.

    Args:
        model: Timm vision transformer, plain or tuned.
        model_args: Arguments of `timm.create_model` that replace or complete the recorded ones.
        checkpoint: File that its weights came from; only the file's name is recorded.
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
    """Return where `timm.create_model` finds a model that is not on timm's own list."""
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


def trained_tensors(model: Tuned) -> dict[str, Tensor]:
    """Return the values of what is trained or was added, by name; what was added may be frozen.

    Buffers of the classifiers, such as running means, change with what is trained.
    """
    added = model.added_tensors()
    trained = {name for name, _ in trainable_parameters(model)} | added.keys()
    found: dict[str, Tensor] = {n: p for n, p in model.named_parameters() if n in trained}
    heads = {id(buffer) for head in classifiers_of(model) for buffer in head.buffers()}
    saved = model.state_dict().keys() if heads else ()
    found |= {n: b for n, b in model.named_buffers() if id(b) in heads and n in saved}
    return {name: whole(tensor.detach()) for name, tensor in (found | added).items()}


def frozen_tensors(model: nn.Module, trained: Container[str]) -> dict[str, Tensor]:
    """Return the values that an adapter does not hold, by name."""
    return {name: t for name, t in model.state_dict().items() if name not in trained}
