"""The images of a sweep: read once, given out as batches to run after run."""

from __future__ import annotations

from typing import Any, Protocol

from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, Subset

from vpt_fast.train.data.image_loaders import Loading, folder_loader
from vpt_fast.train.data.images import make_loader
from vpt_fast.train.data.memory_set import MemoryLoader
from vpt_fast.train.data.split import ImageSource, Split

PARTS = ("train", "both", "val", "test")
"""What runs ask for; both is train and val together, of the final runs."""


class SweepData(Protocol):
    """Images by part.

    Attributes:
        augmented: whether training images change from epoch to epoch.
    """

    augmented: bool

    def count(self, part: str) -> int:
        """Images of a part."""
        ...

    def batches(self, part: str, batch_size: int, seed: int | None = None) -> Any:
        """A loader of `data.Batch`; shuffled, and augmented if images are, where there is a
        seed."""
        ...


class ArrayData:
    """Data sets in memory, of (image, label), without augmentation."""

    augmented = False

    def __init__(self, train: Dataset, val: Dataset, test: Dataset) -> None:
        self._parts: dict[str, Any] = {
            "train": train,
            "both": ConcatDataset([train, val]),
            "val": val,
            "test": test,
        }

    def count(self, part: str) -> int:
        """As `SweepData.count`."""
        return len(self._parts[part])

    def batches(self, part: str, batch_size: int, seed: int | None = None) -> Any:
        """As `SweepData.batches`."""
        shuffle = seed is not None
        return make_loader(self._parts[part], batch_size, shuffle=shuffle, seed=seed or 0)


class SourceData:
    """A data set on disk; what fits is decoded once and kept, the rest is read in every run.

    Args:
        source: with validation and test images.
        loading: how images become batches.

    Raises:
        ValueError: a split is missing.
    """

    def __init__(self, source: ImageSource, loading: Loading) -> None:
        for name in ("val", "test"):
            if name not in source.splits:
                raise ValueError(
                    f"the data has no {name} split: a sweep chooses on val and tests once on test; "
                    "split them off before"
                )
        self.source, self.loading = source, loading
        self.augmented = not loading.augmentation.no_aug
        splits = source.splits
        self._splits = {**splits, "both": joined(splits["train"], splits["val"])}
        self._kept: dict[str, Any] = {}

    def _loader(self, part: str) -> Any:
        """Of a part's images; made when they are first asked for."""
        if part not in self._kept:
            self._kept[part] = self.loading.loader(
                self._splits[part], self.source.class_names, 1, training=part == "both"
            )
        return self._kept[part]

    def count(self, part: str) -> int:
        """As `SweepData.count`."""
        return len(self._splits[part])

    def batches(self, part: str, batch_size: int, seed: int | None = None) -> Any:
        """As `SweepData.batches`."""
        shuffle, count = seed is not None, self.count(part)
        loader = self._loader("both" if part == "train" else part)
        if isinstance(loader, MemoryLoader):
            return loader.view(count, batch_size, shuffle=shuffle, seed=seed or 0)
        images = Subset(loader.dataset, range(count))
        device, workers = self.loading.device, self.loading.workers
        return folder_loader(images, batch_size, device, workers, shuffle=shuffle, seed=seed or 0)


def joined(first: Split, second: Split) -> Split:
    """The images of two splits, one after the other."""
    return Split(
        first.labels + second.labels,
        first.names + second.names,
        _OneAfterTheOther(first, second),
        (*first.refused, *second.refused),
    )


class _OneAfterTheOther:
    """Not a closure: worker processes may have to be sent it."""

    def __init__(self, first: Split, second: Split) -> None:
        self.first, self.second = first, second

    def __call__(self, index: int, channels: int, exif: bool = True) -> Image.Image:
        count = len(self.first)
        if index < count:
            return self.first.load(index, channels, exif)
        return self.second.load(index - count, channels, exif)
