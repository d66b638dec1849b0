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
from vpt_fast.adapter.hub.names import is_on_hub, local_folder
from vpt_fast.backbones.build import data_config_of
from vpt_fast.train.common.names import CLASS_ORDERS
from vpt_fast.train.common.recipe import head_layers
from vpt_fast.train.data.formats.class_folders import natural
from vpt_fast.train.loop.fit_result import BEST, LAST


@dataclass(frozen=True)
class TunedModel:
    """Tuned model in eval mode, with its input configuration and class names, if it has any.

    With `multi_label` an image may have several of the classes.
    """

    net: nn.Module
    inputs: dict[str, Any]
    num_classes: int
    class_names: list[str] | None
    multi_label: bool = False

    def check_labels(self, directory: Path, multi_label: bool) -> None:
        """Raise ValueError unless a data set has as many labels an image as the adapter answers.

        Args:
            directory: Folder of the data set, for the message.
            multi_label: Whether its images may have several labels.
        """
        if multi_label != self.multi_label:
            words = {True: "several labels an image", False: "one label an image"}
            raise ValueError(
                f"{directory} has {words[multi_label]}, and the adapter was trained on "
                f"{words[self.multi_label]}; evaluate it on data of its own kind"
            )

    def class_order(
        self, directory: Path, names: Sequence[str], order: str | None = None
    ) -> list[str]:
        """Return the classes of a data set in the order of the adapter's outputs.

        Args:
            directory: Folder of the data set, for messages.
            names: Classes of the data set, in its order.
            order: One of `names.CLASS_ORDERS`, for an adapter that does not name its classes;
                None takes the data set's order if both of them agree.

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
    """Return the folder of a run's selected adapter; `path` itself if it holds no such folder.

    An adapter on the Hub, `hf-hub:user/name`, is downloaded.
    """
    if is_on_hub(path):
        return local_folder(path)
    candidates = (path, path / BEST, path / LAST)
    found = next((c for c in candidates if (c / CONFIG_FILE).is_file()), None)
    return local_folder(path) if found is None else found


def load_tuned(adapter: Path, checkpoint: Path | None, device: torch.device) -> TunedModel:
    """Build the backbone of an adapter and load the adapter.

    Args:
        adapter: Folder of an adapter, the output folder of a run, or `hf-hub:user/name`.
        checkpoint: File with the backbone's weights; None takes timm's, or those of this package.
        device: Device of the model.

    Raises:
        FileNotFoundError: If there is no adapter or no checkpoint.
        ValueError: If the adapter is damaged, or is not for this backbone.
        OSError: If the Hub cannot be reached.
    """
    folder = adapter_folder(adapter)
    config = read_config(folder)
    net: Any = load_adapter(None, folder, checkpoint=checkpoint)
    inputs = {**data_config_of(net), **config["input"]}
    num_classes = head_layers(net)[0].out_features
    multi_label = config.get("multi_label", False)
    return TunedModel(net.to(device), inputs, num_classes, config["class_names"], multi_label)
