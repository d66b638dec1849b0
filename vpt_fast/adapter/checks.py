"""Whether an adapter belongs to a backbone: dimensions, frozen weights, what they are used for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vpt_fast.adapter.architecture import Description, different_architecture
from vpt_fast.adapter.fingerprint import Summary, difference


def check_dimensions(have: Mapping[str, Any], want: Mapping[str, Any], directory: Path) -> None:
    """Raise ValueError unless an adapter is for a model of this width, depth and pooling.

    Args:
        have: `model_config` of the model, or its `width`, `depth` and `args` alone.
        want: the same of the adapter's configuration.
        directory: of the adapter.
    """
    for key, what in (("width", "width"), ("depth", "number of blocks")):
        if have[key] != want.get(key):
            raise ValueError(
                f"the adapter in {directory} is for another model: its {what} is {want.get(key)}, "
                f"this model's is {have[key]}; the adapter's model is {want.get('name')}"
            )
    pool, wanted = have["args"]["global_pool"], want.get("args", {}).get("global_pool")
    if wanted is not None and pool != wanted:
        raise ValueError(
            f"the adapter in {directory} was trained with global_pool={wanted!r}, this model has "
            f"{pool!r}; create it with global_pool={wanted!r}"
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


def check_computation(have: Description, config: Mapping[str, Any], directory: Path) -> None:
    """Raise ValueError unless a backbone computes what the adapter's did with equal weights.

    Args:
        have: `describe` of the backbone.
        config: the adapter's configuration; one of an older format does not say.
        directory: of the adapter.
    """
    different = different_architecture(have, config.get("architecture", {}))
    if different:
        raise ValueError(
            f"the adapter in {directory} is for a backbone that computes something else: "
            f"{different}; create the model it was trained on ({_source(config['model'])})"
        )


def _source(model: Mapping[str, Any]) -> str:
    known = (model.get(key) for key in ("checkpoint", "source", "pretrained_tag"))
    source = next(filter(None, known), "weights of its own")
    return f"{model.get('name')}, {source}"
