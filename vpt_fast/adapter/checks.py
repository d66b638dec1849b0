"""Whether an adapter belongs to a backbone: dimensions, frozen weights, what is computed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vpt_fast.adapter.architecture import Description, different_architecture
from vpt_fast.adapter.fingerprint import Summary, difference


def check_backbone(
    dimensions: Mapping[str, Any],
    weights: Mapping[str, Summary],
    architecture: Description,
    config: Mapping[str, Any],
    directory: Path,
) -> None:
    """Raise ValueError unless an adapter was trained on this backbone.

    Args:
        dimensions: `model_config` of the model, or its `width`, `depth` and `args` alone.
        weights: `fingerprint` of the weights that the adapter does not hold.
        architecture: `describe` of the backbone.
        config: Configuration of the adapter.
        directory: Folder of the adapter.
    """
    want = config["model"]
    for key, what in (("width", "width"), ("depth", "number of blocks")):
        if dimensions[key] != want.get(key):
            raise ValueError(
                f"the adapter in {directory} is for another model: its {what} is {want.get(key)}, "
                f"this model's is {dimensions[key]}; the adapter's model is {want.get('name')}"
            )
    pool, wanted = dimensions["args"]["global_pool"], want.get("args", {}).get("global_pool")
    if wanted is not None and pool != wanted:
        raise ValueError(
            f"the adapter in {directory} was trained with global_pool={wanted!r}, this model has "
            f"{pool!r}; create it with global_pool={wanted!r}"
        )
    known = (want.get(key) for key in ("checkpoint", "source", "pretrained_tag"))
    source = f"{want.get('name')}, {next(filter(None, known), 'weights of its own')}"
    different = difference(weights, config["fingerprint"])
    if different:
        raise ValueError(
            f"the adapter in {directory} is for another backbone: {different}; load the weights "
            f"it was trained on ({source})"
        )
    # Format 1 does not describe the architecture.
    different = different_architecture(architecture, config.get("architecture", {}))
    if different:
        raise ValueError(
            f"the adapter in {directory} is for a backbone that computes something else: "
            f"{different}; create the model it was trained on ({source})"
        )
