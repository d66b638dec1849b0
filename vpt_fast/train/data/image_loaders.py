"""From the splits of a data set to batches: transforms, workers and caching in memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from vpt_fast.backbones import build as backbones
from vpt_fast.train.common.names import CACHES
from vpt_fast.train.data import images as data
from vpt_fast.train.data.augmentation import Augmentation
from vpt_fast.train.data.image_options import ImageOptions
from vpt_fast.train.data.memory_set import LIMIT, MemoryLoader, bytes_in_memory, can_crop
from vpt_fast.train.data.pictures import reading
from vpt_fast.train.data.random_crops import RandomCrops
from vpt_fast.train.data.split import Split, SplitImages


def set_data_config(net: nn.Module, options: ImageOptions) -> dict[str, Any]:
    """Return the model's data configuration with the options, and set it in the model for adapters.

    Args:
        net: timm model; its `pretrained_cfg` is replaced.
        options: How images are resized and normalised.
    """
    config = backbones.data_config_of(net)
    changes = {**options.changes(config), "exif_transpose": options.exif}
    vit: Any = net
    vit.pretrained_cfg = {**vit.pretrained_cfg, **changes}
    return {**config, **changes, "antialias": options.antialias}


def folder_loader(
    dataset: Dataset,
    batch_size: int,
    device: torch.device,
    workers: int | None = None,
    *,
    shuffle: bool = False,
    seed: int = 0,
) -> DataLoader:
    """Return a loader of images on disk.

    Args:
        dataset: Dataset of (image, label) or SkippedImage.
        batch_size: Images per batch.
        device: Device that the batches are for.
        workers: Number of processes that load images; None takes 0 for the CPU, up to 4 for a GPU.
        shuffle: Whether the images are in a new order in every epoch.
        seed: Seed of the order.
    """
    if workers is None:
        workers = 0 if device.type == "cpu" else min(4, os.cpu_count() or 1)
    return data.make_loader(
        dataset,
        batch_size,
        shuffle=shuffle,
        seed=seed,
        workers=workers,
        pin_memory=device.type == "cuda",
    )


@dataclass(frozen=True)
class Loading:
    """Settings of loaders: transforms, workers and caching.

    Attributes:
        config: Data configuration that `set_data_config` returned.
        augmentation: Augmentation of training images.
        device: Device that cached images are stored on.
        workers: Number of processes that load images, or of threads that decode cached ones.
        cache: One of `CACHES`.

    Raises:
        ValueError: If `cache` is unknown or does not fit the augmentation, or `workers` is
            negative.
    """

    config: dict[str, Any]
    augmentation: Augmentation
    device: torch.device
    workers: int | None = None
    cache: str = "auto"

    def __post_init__(self) -> None:
        check_loading(self.workers, self.cache)
        if self.cache == "memory" and self._needs_files():
            what = "plain crops are" if self._crops_plainly() else "aa, reprob and color_jitter are"
            raise ValueError(f"{what} made of the files; choose cache auto or stream")
        if self.augmentation.per_image and not self.config.get("antialias", True):
            raise ValueError(
                "aa, reprob and color_jitter change images that are resized with antialiasing; "
                "leave --no-antialias out"
            )
        channels = self.config["input_size"][0]
        if channels != 3 and (self.augmentation.aa or self.augmentation.color_jitter):
            raise ValueError(
                f"aa and color_jitter change colours, and the model takes {channels} channels; "
                "leave them out"
            )

    def images(
        self, split: Split, class_names: Sequence[str], training: bool = False
    ) -> SplitImages:
        """Return the split with its transform, random if `training` and augmentation is on."""
        transform = self._training() if training else data.eval_transform(self.config)
        return SplitImages(split, transform, class_names, **reading(self.config))

    def loader(
        self,
        split: Split,
        class_names: Sequence[str],
        batch_size: int,
        *,
        training: bool = False,
        may_cache: bool = True,
        seed: int = 0,
    ) -> Any:
        """Return a loader of `data.Batch`.

        Args:
            split: Split of a source.
            class_names: Names of the classes, in the order of the labels.
            batch_size: Images per batch.
            training: Whether images are shuffled and augmented.
            may_cache: Whether images may be cached in memory.
            seed: Seed of the order and the augmentation.
        """
        images = self.images(split, class_names, training)
        crops = self._crops() if training else None
        if may_cache and self._caches(images, crops, training):
            return MemoryLoader(
                images,
                batch_size,
                crops=crops,
                device=self.device,
                threads=self.workers or None,
                shuffle=training,
                seed=seed,
            )
        return folder_loader(
            images, batch_size, self.device, self.workers, shuffle=training, seed=seed
        )

    def _training(self) -> data.Transform:
        augmentation, config = self.augmentation, self.config
        if augmentation.no_aug and config.get("crop_mode") == "squash":
            return data.eval_transform(config)
        more = data.more_augmentation(augmentation)
        if self._crops_plainly():
            return data.plain_crops(config, augmentation.hflip, **more)
        return data.train_transform(
            config,
            scale=augmentation.scale,
            hflip=augmentation.hflip,
            no_aug=augmentation.no_aug,
            **more,
        )

    def _crops_plainly(self) -> bool:
        return not self.augmentation.no_aug and self.augmentation.crops == "plain"

    def _needs_files(self) -> bool:
        return self._crops_plainly() or self.augmentation.per_image

    def _crops(self) -> RandomCrops | None:
        if self.augmentation.no_aug or self._needs_files():
            return None
        return RandomCrops(self.augmentation.scale, self.augmentation.hflip)

    def _caches(self, images: SplitImages, crops: RandomCrops | None, training: bool) -> bool:
        if training and self._needs_files():
            return False
        if self.cache != "auto":
            return self.cache == "memory"
        fits = bytes_in_memory(images, crops) <= LIMIT
        return fits and (crops is None or can_crop(images))


def check_loading(workers: int | None, cache: str) -> None:
    """Raise ValueError if `workers` is negative or `cache` is none of `CACHES`."""
    if workers is not None and workers < 0:
        raise ValueError(f"workers is {workers}; it must be at least 0")
    if cache not in CACHES:
        raise ValueError(f"cache is {cache!r}; choose one of {', '.join(CACHES)}")
