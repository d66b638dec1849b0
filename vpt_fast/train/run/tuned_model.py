"""Tuned model for evaluation, from the folder of an adapter or a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vpt_fast import load_adapter
from vpt_fast.adapter.files import CONFIG_FILE, read_config
from vpt_fast.train.backbones import build as backbones
from vpt_fast.train.common.names import CLASS_ORDERS
from vpt_fast.train.common.recipe import head_layers
from vpt_fast.train.data.formats.class_folders import natural
from vpt_fast.train.loop.fit_result import BEST, LAST


@dataclass(frozen=True)
class TunedModel:
    """Tuned model in eval mode, with its input configuration and class names, if it has any."""

    net: nn.Module
    inputs: dict[str, Any]
    num_classes: int
    class_names: list[str] | None

    def class_order(
        self, directory: Path, names: Sequence[str], order: str | None = None
    ) -> list[str]:
        """Return the classes of a data set in the order of the adapter's outputs.

        Args:
            directory: Folder of the data set, for messages.
            names: Classes of the data set, in its order.
            order: One of `CLASS_ORDERS`, for an adapter that does not name its classes; None takes
                the data set's order if both of them agree.

        Raises:
            ValueError: If the adapter has other classes, or the order of its outputs is not known.
        """
        if order is not None and order not in CLASS_ORDERS:
            raise ValueError(f"--class-order is {order!r}; choose one of {', '.join(CLASS_ORDERS)}")
        if self.class_names is not None:
            if order is not None:
                raise ValueError("the adapter names its classes; leave --class-order out")
            return list(names)
        if len(names) != self.num_classes:
            raise ValueError(
                f"{directory} has {len(names)} classes, but the adapter has {self.num_classes} "
                "classes and no names of them"
            )
        by_value, sorted_names = natural(names), sorted(names)
        # Any other order is the data set's own, such as numbers from 0.
        if order is None and list(names) == sorted_names != by_value:
            first = next(
                i for i, pair in enumerate(zip(names, by_value, strict=True)) if len(set(pair)) > 1
            )
            raise ValueError(
                f"the adapter does not name its classes, and class {first} of {directory} is "
                f"{names[first]!r} by strings and {by_value[first]!r} by numbers in names; say how "
                "they were sorted with eval --class-order strings or natural"
            )
        return {"strings": sorted_names, "natural": by_value}.get(order or "", list(names))


def adapter_folder(path: Path) -> Path:
    """Return the folder of a run's selected adapter; `path` itself if it holds no such folder."""
    candidates = (path, path / BEST, path / LAST)
    return next((c for c in candidates if (c / CONFIG_FILE).is_file()), path)


def load_tuned(adapter: Path, checkpoint: Path | None, device: torch.device) -> TunedModel:
    """Build the backbone of an adapter and load the adapter.

    Args:
        adapter: Folder of an adapter, or the output folder of a run.
        checkpoint: File with the backbone's weights; None takes timm's, or those of this package.
        device: Device of the model.

    Raises:
        FileNotFoundError: If there is no adapter or no checkpoint.
        ValueError: If the adapter is damaged, or is not for this backbone.
    """
    folder = adapter_folder(adapter)
    config = read_config(folder)
    net = load_adapter(backbones.backbone_of_adapter(config, checkpoint), folder)
    inputs = {**backbones.data_config_of(net), **config["input"]}
    num_classes = head_layers(net)[0].out_features
    return TunedModel(net.to(device).eval(), inputs, num_classes, config["class_names"])
