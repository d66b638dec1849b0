"""Resizing and normalisation of images, where they differ from the model's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from timm.data.constants import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
)
from timm.data.transforms import (
    MaybeToTensor,
    RandomResizedCropAndInterpolation,
    str_to_interp_mode,
)
from torchvision import transforms

from vpt_fast.train.common import names
from vpt_fast.train.common.names import INTERPOLATIONS

_MEANS_AND_DEVIATIONS = (
    None,
    (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    (IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD),
    ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
)
NORMALISATIONS = dict(zip(names.NORMALISATIONS, _MEANS_AND_DEVIATIONS, strict=True))
"""Means and standard deviations of the channels of images in [0, 1]."""
_CHANGES: tuple[dict[str, Any], ...] = (
    {},
    {"crop_mode": "squash", "crop_pct": 1.0},
    {"crop_mode": "center", "crop_pct": 224 / 256},
)
RESIZES = dict(zip(names.RESIZES, _CHANGES, strict=True))
"""Changes to timm's data configuration. squash: both sides to the model's size, as in the papers
for VTAB-1k; crop: the shorter side to 256 / 224 of it and the centre crop, as for FGVC."""


@dataclass(frozen=True)
class ImageOptions:
    """Resizing and normalisation of images; the defaults are the model's own.

    Attributes:
        interpolation: Interpolation of resizing, one of `INTERPOLATIONS`.
        antialias: Whether resizing filters with antialiasing, as Pillow always does. Off resizes
            tensors, as torchvision does with antialias=False.
        normalisation: One of `NORMALISATIONS`: imagenet, its mean and standard deviation;
            inception, from -1 to 1; none, from 0 to 1.
        resize: One of `RESIZES`.
        exif: Whether images are rotated as their EXIF orientation says. Off takes them as they are
            stored, as timm does.

    Raises:
        ValueError: If a name is unknown.
    """

    interpolation: str = "model"
    antialias: bool = True
    normalisation: str = "model"
    resize: str = "model"
    exif: bool = True

    def __post_init__(self) -> None:
        chosen: list[tuple[str, Any]] = [
            ("interpolation", INTERPOLATIONS),
            ("normalisation", NORMALISATIONS),
            ("resize", RESIZES),
        ]
        for name, known in chosen:
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name} is {value!r}; choose one of {', '.join(known)}")

    def changes(self, data_config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the entries of a model's data configuration that change.

        Args:
            data_config: Data configuration that timm.data.resolve_model_data_config returns.

        Raises:
            ValueError: If ImageNet's normalisation is asked for a model without three channels.
        """
        changed: dict[str, Any] = dict(RESIZES[self.resize])
        if self.interpolation != "model":
            changed["interpolation"] = self.interpolation
        values = NORMALISATIONS[self.normalisation]
        if values is not None:
            channels = data_config["input_size"][0]
            if self.normalisation == "imagenet" and channels != 3:
                raise ValueError(
                    f"normalisation 'imagenet' is for 3 channels and the model takes {channels}; "
                    "choose model, inception or none"
                )
            # The other normalisations are equal in all channels.
            pairs = values if channels == 3 else [v[:1] * channels for v in values]
            changed["mean"], changed["std"] = pairs
        return changed


def without_antialias(pipeline: transforms.Compose) -> transforms.Compose:
    """Return a timm pipeline that resizes tensors, without antialiasing, instead of images.

    Raises:
        ValueError: If the pipeline has a step, or the model an interpolation, for which PyTorch
            has no such resizing.
    """
    resizing = [s for s in pipeline.transforms if hasattr(s, "interpolation")]
    if any(s.interpolation == transforms.InterpolationMode.NEAREST for s in resizing):
        return pipeline  # nearest takes one pixel either way
    steps: list[Any] = [transforms.PILToTensor()]
    for step in pipeline.transforms:
        if hasattr(step, "interpolation") and str(step.interpolation) not in _TENSOR_MODES:
            raise ValueError(
                "without antialiasing, choose interpolation bilinear, bicubic or nearest"
            )
        if isinstance(step, transforms.Resize):
            step = transforms.Resize(step.size, step.interpolation, antialias=False)
        elif isinstance(step, RandomResizedCropAndInterpolation):
            step = transforms.RandomResizedCrop(
                step.size, step.scale, step.ratio, step.interpolation, antialias=False
            )
        elif isinstance(step, MaybeToTensor):
            step = transforms.ConvertImageDtype(torch.float32)
        elif not isinstance(step, _TENSOR_STEPS):
            raise ValueError(f"antialiasing cannot be switched off for {step}; leave it on")
        steps.append(step)
    return transforms.Compose(steps)


_TENSOR_STEPS = (transforms.CenterCrop, transforms.RandomHorizontalFlip, transforms.Normalize)
_TENSOR_MODES = [str(str_to_interp_mode(name)) for name in ("bilinear", "bicubic")]


def to_uint8(pipeline: transforms.Compose) -> transforms.Compose:
    """Return the pipeline without normalisation: from a PIL image to (C, H, W), uint8."""
    last = (MaybeToTensor, transforms.ConvertImageDtype, transforms.Normalize)
    steps = [step for step in pipeline.transforms if not isinstance(step, last)]
    if not any(isinstance(step, transforms.PILToTensor) for step in steps):
        steps.append(transforms.PILToTensor())
    return transforms.Compose(steps)
