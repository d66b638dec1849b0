"""Images of a sweep, read once and shared by its runs."""

from __future__ import annotations

from typing import Any, Protocol

from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, Subset

from vpt_fast.train.data.image_loaders import Loading, folder_loader
from vpt_fast.train.data.images import make_loader
from vpt_fast.train.data.memory_set import MemoryLoader
from vpt_fast.train.data.split import ImageSource, Split

PARTS = ("train", "both", "val", "test")
"""Parts of the data; both is train and val together, for the final runs."""


class SweepData(Protocol):
    """Images of a sweep by part.

    Attributes:
        augmented: Whether training images change from epoch to epoch.
    """

    augmented: bool

    def count(self, part: str) -> int:
        """Return the number of images of a part."""
        ...

    def labels(self, part: str) -> list[int]:
        """Return the class index of each image of a part."""
        ...

    def batches(self, part: str, batch_size: int, seed: int | None = None) -> Any:
        """Return a loader of `Batch`, shuffled and augmented if there is a seed."""
        ...


class ArrayData:
    """Data of a sweep in memory: datasets of (image, label), without augmentation."""

    augmented = False

    def __init__(self, train: Dataset, val: Dataset, test: Dataset) -> None:
        self._parts: dict[str, Any] = {
            "train": train,
            "both": ConcatDataset([train, val]),
            "val": val,
            "test": test,
        }

    def count(self, part: str) -> int:
        """Return the number of images of a part."""
        return len(self._parts[part])

    def labels(self, part: str) -> list[int]:
        """Return the class index of each image of a part."""
        return [label for _, label in self._parts[part]]

    def batches(self, part: str, batch_size: int, seed: int | None = None) -> Any:
        """Return a loader of `Batch`, shuffled and augmented if there is a seed."""
        shuffle = seed is not None
        return make_loader(self._parts[part], batch_size, shuffle=shuffle, seed=seed or 0)


class SourceData:
    """Data of a sweep on disk: what fits is decoded once and cached, the rest read in every run.

    Args:
        source: Data set with validation and test images.
        loading: Settings of the loaders.

    Raises:
        ValueError: If a split is missing.
    """

    def __init__(self, source: ImageSource, loading: Loading) -> None:
        for name in ("val", "test"):
            if name not in source.splits:
                raise ValueError(
                    f"the data has no {name} split: a sweep chooses on val and tests once on test; "
                    "split them off before (--val-fraction 0.2 does so for val)"
                )
        self.source, self.loading = source, loading
        self.augmented = not loading.augmentation.no_aug
        splits = source.splits
        self._splits = {**splits, "both": joined(splits["train"], splits["val"])}
        self._loaders: dict[str, Any] = {}

    def _loader(self, part: str) -> Any:
        """Return the loader of a part, created when it is first asked for."""
        if part not in self._loaders:
            self._loaders[part] = self.loading.loader(
                self._splits[part], self.source.class_names, 1, training=part == "both"
            )
        return self._loaders[part]

    def count(self, part: str) -> int:
        """Return the number of images of a part."""
        return len(self._splits[part])

    def labels(self, part: str) -> list[int]:
        """Return the class index of each image of a part."""
        return self._splits[part].labels

    def batches(self, part: str, batch_size: int, seed: int | None = None) -> Any:
        """Return a loader of `Batch`, shuffled and augmented if there is a seed."""
        shuffle, count = seed is not None, self.count(part)
        loader = self._loader("both" if part == "train" else part)
        if isinstance(loader, MemoryLoader):
            return loader.view(count, batch_size, shuffle=shuffle, seed=seed or 0)
        images = Subset(loader.dataset, range(count))
        device, workers = self.loading.device, self.loading.workers
        return folder_loader(images, batch_size, device, workers, shuffle=shuffle, seed=seed or 0)


def joined(first: Split, second: Split) -> Split:
    """Return the images of two splits, one after the other."""
    return Split(
        first.labels + second.labels,
        first.names + second.names,
        _Concatenated(first, second),
        (*first.refused, *second.refused),
    )


class _Concatenated:
    """Decoder of two splits; not a closure, so that it can be pickled for worker processes."""

    def __init__(self, first: Split, second: Split) -> None:
        self.first, self.second = first, second

    def __call__(self, index: int, channels: int, exif: bool = True) -> Image.Image:
        count = len(self.first)
        if index < count:
            return self.first.load(index, channels, exif)
        return self.second.load(index - count, channels, exif)
