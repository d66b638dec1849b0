"""Small sets of images, decoded once and cached as uint8 on the device that trains."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data.transforms import str_to_interp_mode
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import functional as images_of

from vpt_fast.train.data.image_options import to_uint8
from vpt_fast.train.data.images import Batch, SkippedImage, batch_sampler, label_tensor
from vpt_fast.train.data.random_crops import (
    INTERPOLATIONS,
    Crops,
    RandomCrops,
    crop_and_resize,
    rescaled,
)
from vpt_fast.train.data.split import SplitImages

LIMIT = 2**30
"""Largest number of bytes that a set may take in memory with the cache "auto"."""


class MemoryLoader:
    """Loader of images in memory, with the batches and the order of `make_loader`.

    Without `crops` the images equal those of the data set's transform bit for bit. With `crops`
    each image is cropped, resized and flipped on the device, differently in every epoch. For that
    images are stored in their own size if all sizes are equal and small, else they are resized once
    to `stored_size`. All random numbers come from `generator`, and those of an image do not depend
    on the number of processes.

    Args:
        dataset: Images of a split, with a pipeline of `train_transform` or `eval_transform`.
        batch_size: Images per batch, over all processes.
        crops: Random part of the data set's transform, or None if there is none.
        shuffle: Whether images are in a new order in every epoch, from `seed`.
        seed: Seed of the order, crops and flips.
        device: Device of the stored images and the batches; labels stay on the CPU.
        threads: Number of threads that decode; None takes up to 8.

    Raises:
        ValueError: If the pipeline resizes as `random_crops` cannot, or `threads` is not positive.
    """

    def __init__(
        self,
        dataset: SplitImages,
        batch_size: int,
        *,
        crops: RandomCrops | None = None,
        shuffle: bool = False,
        seed: int = 0,
        device: torch.device | None = None,
        threads: int | None = None,
    ) -> None:
        if threads is not None and threads < 1:
            raise ValueError(f"{threads} threads cannot decode images; it must be at least 1")
        self.dataset, self.crops = dataset, crops
        self.device = device or torch.device("cpu")
        self.generator = torch.Generator().manual_seed(seed)
        self.batch_sampler = batch_sampler(dataset, batch_size, shuffle, self.generator)
        steps = pipeline_of(dataset)
        self.antialias = not isinstance(steps[0], transforms.PILToTensor)
        normalise = next(s for s in steps if isinstance(s, transforms.Normalize))
        # torchvision's own normalisation synchronises with a GPU to check these.
        self.mean, self.std = (
            torch.as_tensor(values, dtype=torch.float32, device=self.device)[:, None, None]
            for values in (normalise.mean, normalise.std)
        )
        if crops is not None and not can_crop(dataset):
            raise ValueError(
                "images in memory can be cropped at random with interpolation "
                f"{', '.join(INTERPOLATIONS)}; choose one of them, or cache 'stream'"
            )
        self.broken: dict[int, SkippedImage] = {}
        self.labels = label_tensor(dataset.targets)
        self.sizes = torch.ones(len(dataset), 2, dtype=torch.int64)
        self.images = self._decoded(threads or min(8, os.cpu_count() or 1))

    def view(self, count: int, batch_size: int, *, shuffle: bool, seed: int = 0) -> MemoryLoader:
        """Return a loader of the first `count` images, which are not decoded or copied again."""
        if not 0 < count <= len(self.dataset):
            raise ValueError(f"count is {count}; it must be from 1 to {len(self.dataset)}")
        view = copy.copy(self)
        view.generator = torch.Generator().manual_seed(seed)
        rows: Any = range(count)
        view.batch_sampler = batch_sampler(rows, batch_size, shuffle, view.generator)
        return view

    def __len__(self) -> int:
        return len(self.batch_sampler)

    @property
    def nbytes(self) -> int:
        """Bytes of the images in memory."""
        return self.images.nbytes

    def __iter__(self) -> Iterator[Batch]:
        # DataLoader draws a number here as well; without it the orders would differ.
        seed = int(torch.empty((), dtype=torch.int64).random_(generator=self.generator))
        drawn = None
        if self.crops is not None:
            boxes, flips = self.crops.draw(self.sizes, torch.Generator().manual_seed(seed))
            height, width = self.images.shape[2:]
            boxes = rescaled(boxes, self.sizes, (height, width))
            drawn = Crops(boxes.to(self.device), flips.to(self.device))
        for indices in self.batch_sampler:
            yield self._batch(indices, drawn)

    def _batch(self, indices: list[int], crops: Crops | None) -> Batch:
        skipped = [self.broken[index] for index in indices if index in self.broken]
        rows = torch.tensor([i for i in indices if i not in self.broken], dtype=torch.int64)
        if not len(rows):
            return Batch(torch.empty(0), self.labels[:0], skipped)
        here = rows.to(self.device, non_blocking=True)
        images = self.images[here]
        if crops is None:
            images = images.float()
        else:
            mine = Crops(crops.boxes[here], crops.flips[here])
            crop = crop_step(self.dataset)
            images = crop_and_resize(
                images, mine, crop.size, crop.interpolation.value, self.antialias
            )
        images.div_(255).sub_(self.mean).div_(self.std)
        return Batch(images, self.labels[rows], skipped)

    def _decoded(self, threads: int) -> Tensor:
        """Decode all images, and record their sizes and the undecodable ones."""
        prepare = self._resized if self.crops is None else self._shrunk
        with ThreadPoolExecutor(threads) as pool:
            found = list(pool.map(prepare, range(len(self.dataset))))
        good = {i: image for i, image in enumerate(found) if not isinstance(image, SkippedImage)}
        self.broken = {i: it for i, it in enumerate(found) if isinstance(it, SkippedImage)}
        del found
        if len({image.shape for image in good.values()}) > 1:
            good = {i: self._to_stored_size(image) for i, image in good.items()}
        shape = next(iter(good.values())).shape if good else (self.dataset.channels, 1, 1)
        images = torch.zeros(len(self.dataset), *shape, dtype=torch.uint8)
        for i in list(good):
            images[i] = good.pop(i)
        return images.to(self.device)

    def _load(self, index: int) -> Image.Image | SkippedImage:
        try:
            image = self.dataset.load(index)
        except ValueError as error:
            return SkippedImage(self.dataset.split.names[index], str(error))
        self.sizes[index] = torch.tensor([image.height, image.width])
        return image

    def _resized(self, index: int) -> Tensor | SkippedImage:
        image = self._load(index)
        if isinstance(image, SkippedImage):
            return image
        return to_uint8(self.dataset.transform)(image)

    def _shrunk(self, index: int) -> Tensor | SkippedImage:
        """Return an image, resized if it has more pixels than `stored_size`."""
        image = self._load(index)
        if isinstance(image, SkippedImage):
            return image
        pixels = torch.from_numpy(np.array(image))
        pixels = pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
        height, width = stored_size(self.dataset, self.crops)
        return pixels if image.width * image.height <= height * width else self._to_stored(image)

    def _to_stored_size(self, pixels: Tensor) -> Tensor:
        if tuple(pixels.shape[1:]) == stored_size(self.dataset, self.crops):
            return pixels
        return self._to_stored(images_of.to_pil_image(pixels))

    def _to_stored(self, image: Image.Image) -> Tensor:
        size = list(stored_size(self.dataset, self.crops))
        mode = crop_step(self.dataset).interpolation
        if not self.antialias:
            return images_of.resize(images_of.pil_to_tensor(image), size, mode, antialias=False)
        return images_of.pil_to_tensor(images_of.resize(image, size, mode))


def pipeline_of(dataset: SplitImages) -> list[Any]:
    """Return the steps of the data set's transform."""
    return list(getattr(dataset.transform, "transforms", []))


def crop_step(dataset: SplitImages) -> Any:
    """Return the step of the pipeline that crops at random."""
    return next(step for step in pipeline_of(dataset) if hasattr(step, "scale"))


def can_crop(dataset: SplitImages) -> bool:
    """Return whether the pipeline's random crops can be computed from cached images."""
    known = [str_to_interp_mode(name) for name in INTERPOLATIONS]
    return crop_step(dataset).interpolation in known


def stored_size(dataset: SplitImages, crops: RandomCrops | None) -> tuple[int, int]:
    """Return the height and width in pixels that images of different sizes are stored in.

    With random crops the smallest crop still has as many pixels as the result, but sides are at
    most twice those of the result.
    """
    size = dataset_size(dataset)
    if crops is None:
        return size
    factor = min(2.0, 1 / math.sqrt(crops.scale[0]))
    return math.ceil(size[0] * factor), math.ceil(size[1] * factor)


def dataset_size(dataset: SplitImages) -> tuple[int, int]:
    """Return the height and width in pixels of the images that the pipeline yields."""
    sized = [step for step in pipeline_of(dataset) if hasattr(step, "size")]
    size = sized[-1].size
    return (size, size) if isinstance(size, int) else tuple(size)


def bytes_in_memory(dataset: SplitImages, crops: RandomCrops | None) -> int:
    """Return the largest number of bytes that a `MemoryLoader` of the data set would store."""
    height, width = stored_size(dataset, crops)
    return len(dataset) * dataset.channels * height * width
