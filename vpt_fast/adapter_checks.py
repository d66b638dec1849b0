"""Whether an adapter belongs to a backbone: its dimensions, and the weights that were frozen."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vpt_fast.fingerprint import Summary, difference


def check_dimensions(width: int, depth: int, want: Mapping[str, Any], directory: Path) -> None:
    """Raise ValueError unless an adapter is for a model of this width and depth.

    Args:
        width: channels of the model.
        depth: number of its blocks.
        want: `model` of the adapter's configuration.
        directory: of the adapter.
    """
    for key, have, what in (("width", width, "width"), ("depth", depth, "number of blocks")):
        if have != want.get(key):
            raise ValueError(
                f"the adapter in {directory} is for another model: its {what} is {want.get(key)}, "
                f"this model's is {have}; the adapter's model is {want.get('name')}"
            )


def check_weights(have: Mapping[str, Summary], config: Mapping[str, Any], directory: Path) -> None:
    """Raise ValueError unless a backbone's weights are those that were frozen.

    Args:
        have: `fingerprint` of the backbone's weights that the adapter does not hold.
        config: the adapter's configuration.
        directory: of the adapter.
    """
    different = difference(have, config["fingerprint"])
    if different:
        raise ValueError(
            f"the adapter in {directory} is for another backbone: {different}; load the weights "
            f"it was trained on ({_source(config['model'])})"
        )


def _source(model: Mapping[str, Any]) -> str:
    source = model.get("checkpoint") or model.get("pretrained_tag") or "weights of its own"
    return f"{model.get('name')}, {source}"
