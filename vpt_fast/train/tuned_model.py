"""A tuned model as the evaluating commands need it, from the folder of an adapter or a run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vpt_fast import load_adapter
from vpt_fast.adapter_files import CONFIG_FILE, read_config
from vpt_fast.train import backbone as backbones
from vpt_fast.train.loop import BEST, LAST
from vpt_fast.train.recipe import head_layers


@dataclass(frozen=True)
class TunedModel:
    """A tuned model in eval mode, its input configuration and its class names, if it has any."""

    net: nn.Module
    inputs: dict[str, Any]
    num_classes: int
    class_names: list[str] | None

    def check_classes(self, directory: Path, count: int) -> None:
        """Raises ValueError unless a data set of `count` classes has as many as the adapter."""
        if count != self.num_classes:
            raise ValueError(
                f"{directory} has {count} classes, but the adapter has {self.num_classes} classes "
                "and no names of them"
            )


def adapter_folder(path: Path) -> Path:
    """The folder of the adapter that a run kept; `path` itself if it is one, or holds none."""
    candidates = (path, path / BEST, path / LAST)
    return next((c for c in candidates if (c / CONFIG_FILE).is_file()), path)


def load_tuned(adapter: Path, checkpoint: Path | None, device: torch.device) -> TunedModel:
    """Builds the backbone of an adapter and loads it.

    Args:
        adapter: Folder of an adapter, or the output folder of a run.
        checkpoint: The backbone's weights; None takes timm's, or those of this package.
        device: Where the model is to run.

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
