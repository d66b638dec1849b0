"""Small image folders and backbones for the tests of training and the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from torch import nn

CLASSES = ("blue", "green", "red")
IMG_SIZE = 32


def write_image(path: Path, label: int, seed: int) -> None:
    """Write a noisy picture whose colour is its class."""
    noise = np.random.default_rng(seed).integers(0, 120, (36, 40, 3))
    noise[..., 2 - label] += 130
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise.astype(np.uint8)).save(path)


def make_folders(root: Path, classes: tuple[str, ...] = CLASSES, **counts: int) -> Path:
    """Write `root/<split>/<class>/<i>.png`, counts[split] images of each class."""
    for split, count in counts.items():
        for label, name in enumerate(classes):
            for i in range(count):
                write_image(root / split / name / f"{i}.png", label, 1000 * label + i)
    return root


def backbone(num_classes: int = 3, seed: int = 0, **arguments: object) -> nn.Module:
    """Return timm's smallest vision transformer at 32 px: 4 patches and a [CLS] token."""
    torch.manual_seed(seed)
    arguments = {"img_size": IMG_SIZE, "num_classes": num_classes, **arguments}
    overlay = {"input_size": [3, IMG_SIZE, IMG_SIZE]}
    return timm.create_model("test_vit", pretrained_cfg_overlay=overlay, **arguments)


def write_checkpoint(path: Path, seed: int = 0) -> Path:
    """Save the weights of `backbone(seed=seed)`, head included."""
    torch.save(backbone(seed=seed).state_dict(), path)
    return path
