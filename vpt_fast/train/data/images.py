"""Images for training and evaluation: class folders on disk, or arrays in memory."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler
from torchvision import transforms

from vpt_fast.train.common.names import SPLITS
from vpt_fast.train.common.parallel import PartOfBatches
from vpt_fast.train.data.augmentation import Augmentation
from vpt_fast.train.data.formats import class_folders
from vpt_fast.train.data.image_options import without_antialias
from vpt_fast.train.data.pictures import FORMATS, as_picture, load_image
from vpt_fast.train.data.seeded_images import SeededBatches, SeededImages

Transform = Callable[[Image.Image], torch.Tensor]


class SkippedImage(NamedTuple):
    """Image that could not be decoded, and the reason."""

    path: str
    reason: str


class Batch(NamedTuple):
    """Batch of the loaders: images (B, C, H, W) float, labels, skipped files.

    Labels are class indices (B,), int64; or 0 and 1 (B, classes), fp32, where an image may have
    several.
    """

    images: torch.Tensor
    labels: torch.Tensor
    skipped: list[SkippedImage]


class ImageFolders(Dataset):
    """Dataset of `root/<class>/*` with a given class order that reports undecodable files.

    Items are (image, label), or a SkippedImage for a file that cannot be decoded.

    Attributes:
        classes: Names of the classes, in the order of the labels.
        samples: Path and label of each image, sorted by folder and then by path.
        warnings: Messages about files that are not read.

    Args:
        root: Folder with one folder per class; hidden folders are no classes.
        transform: Function from a PIL image to a tensor (C, H, W).
        class_names: Names of the classes in the order of the labels; None takes the folder names,
            sorted.
        channels: Number of channels: 3 for RGB, 1 for grey.
        exif: Whether images are rotated as their EXIF orientation says.

    Raises:
        FileNotFoundError: If `root` is missing, or holds no image.
        ValueError: If a folder's name is not among `class_names`; if `class_names` is None and
            there are fewer than two classes or one of them has no image.
    """

    def __init__(
        self,
        root: str | Path,
        transform: Transform,
        class_names: Sequence[str] | None = None,
        channels: int = 3,
        exif: bool = True,
    ) -> None:
        self.root, self.transform = Path(root), transform
        self.channels, self.exif = channels, exif
        names = class_folders.class_names(self.root)
        if not names:
            raise FileNotFoundError(f"no class folders in {root}; it should hold <class>/*")
        self.classes = names if class_names is None else list(class_names)
        self._check_known(names)
        found = {name: class_folders.find_images(self.root / name) for name in names}
        rank = {name: label for label, name in enumerate(self.classes)}
        self.samples = [(path, rank[name]) for name in names for path in found[name].images]
        self.targets = [label for _, label in self.samples]
        self.warnings = self._unread(found)
        if not self.samples:
            there = "; ".join(self.warnings) or "they are empty"
            raise FileNotFoundError(
                f"no images in the class folders of {root} ({there}); "
                f"expected {root}/<class>/<image>, an image being {', '.join(FORMATS)}"
            )
        if class_names is None:
            self._check_classes(found)

    def _check_known(self, found: Sequence[str]) -> None:
        unknown = [name for name in found if name not in set(self.classes)]
        if unknown:
            names = self.classes
            raise ValueError(
                f"{self.root} has class folders that training does not know: "
                f"{', '.join(unknown[:5])}{', ...' if len(unknown) > 5 else ''}; "
                f"known: {', '.join(names[:10])}{', ...' if len(names) > 10 else ''}. "
                "Rename or remove them, or add them to the training images"
            )

    def _unread(self, found: Mapping[str, class_folders.Found]) -> list[str]:
        lines = []
        unread = sum((entry.unread for entry in found.values()), Counter[str]())
        if unread:
            lines.append(
                f"{self.root}: files of types that are not read: {class_folders.counted(unread)}"
            )
        loose = sum(
            class_folders.is_image(entry.name) and not class_folders.is_hidden(entry.name)
            for entry in self.root.iterdir()
            if not entry.is_dir()
        )
        if loose:
            lines.append(f"{self.root}: images in no class folder, which are not read: {loose}")
        return lines

    def _check_classes(self, found: Mapping[str, class_folders.Found]) -> None:
        if len(self.classes) < 2:
            raise ValueError(
                f"{self.root} has one class folder ({self.classes[0]}); "
                "a classifier needs at least two"
            )
        empty = [
            f"{name} ({class_folders.counted(unread)})" if unread else name
            for name, (images, unread) in found.items()
            if not images
        ]
        if empty:
            raise ValueError(
                f"class folders without an image in {self.root}: {', '.join(empty[:5])}"
                f"{', ...' if len(empty) > 5 else ''}; add images or remove the folders"
            )

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        path, label = self.samples[index]
        try:
            image = load_image(path, self.channels, self.exif)
        except ValueError as error:
            return SkippedImage(path, str(error))
        return self.transform(image), label


class ArrayImages(Dataset):
    """Dataset of images in memory, transformed once; for transforms without randomness.

    Args:
        images: (n, H, W) or (n, H, W, 3), uint8.
        labels: (n,) integers.
        transform: Function from an RGB PIL image to a tensor (C, H, W).
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, transform: Transform) -> None:
        pictures = (as_picture(Image.fromarray(image)) for image in images)
        self.images = torch.stack([transform(picture) for picture in pictures])
        self.labels = torch.as_tensor(labels, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.images[index], int(self.labels[index])


def find_split(directory: str | Path, split: str) -> Path | None:
    """Return the folder of "train", "val" or "test" in `directory`, or None.

    Folders `validation` and `valid` count as `val`.
    """
    folders = (Path(directory) / name for name in SPLITS[split])
    return next((folder for folder in folders if folder.is_dir()), None)


def require_split(directory: str | Path, split: str) -> Path:
    """Return the folder of a split that is required.

    Raises:
        FileNotFoundError: If `directory` or the split's folder is missing.
    """
    if not Path(directory).is_dir():
        raise FileNotFoundError(f"there is no data folder {directory}")
    folder = find_split(directory, split)
    if folder is None:
        raise FileNotFoundError(
            f"{directory} has no folder {split!r}; "
            f"expected {directory}/{split}/<class>/<image>, and the same for train, val and test"
        )
    return folder


def train_transform(
    data_config: dict[str, Any],
    *,
    scale: tuple[float, float] = (0.7, 1.0),
    hflip: float = 0.5,
    no_aug: bool = False,
    **more: Any,
) -> Transform:
    """Return timm's training transform; by default close to the papers' for natural images.

    The papers resize to 256, crop 224 x 224 at random (0.77 of the area) and flip. Here timm
    crops `scale` of the area at random, resizes and flips; colours stay.

    Args:
        data_config: Data configuration that timm.data.resolve_model_data_config returns. With
            "antialias": False, tensors are resized; see `ImageOptions`.
        scale: Smallest and largest part of the image's area that is cropped.
        hflip: Probability of a horizontal flip; 0 for images that a flip changes, such as text.
        no_aug: Whether to resize and crop the centre only.
        **more: Augmentation that `more_augmentation` returns.
    """
    keys = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    config = {key: data_config[key] for key in keys if key in data_config}
    config |= {"scale": scale, "hflip": hflip, "color_jitter": None, **more}
    return _resizing(create_transform(**config, is_training=True, no_aug=no_aug), data_config)


def eval_transform(data_config: Mapping[str, Any]) -> Transform:
    """Return timm's evaluation transform for `data_config` (resize, centre crop, normalise).

    With "antialias": False in `data_config`, tensors are resized; see `ImageOptions`.
    """
    keys = ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")
    config = {key: data_config[key] for key in keys if key in data_config}
    return _resizing(create_transform(**config), data_config)


def more_augmentation(augmentation: Augmentation) -> dict[str, Any]:
    """Return the arguments of timm.data.create_transform for all but crops and flips."""
    found: dict[str, Any] = {}
    if augmentation.aa:
        found["auto_augment"] = augmentation.aa
    if augmentation.color_jitter:
        found["color_jitter"] = augmentation.color_jitter
    if augmentation.reprob:
        found["re_prob"] = augmentation.reprob
    return found


def plain_crops(data_config: dict[str, Any], hflip: float = 0.5, **more: Any) -> Transform:
    """Return a transform that resizes as for evaluation, then crops the model's size and flips.

    Args:
        data_config: Data configuration, as `train_transform` takes it.
        hflip: Probability of a horizontal flip.
        **more: Augmentation that `more_augmentation` returns.
    """
    colours: list[Any] = []
    erasing: list[Any] = []
    if more:
        timms: Any = train_transform(data_config, separate=True, **more)
        colours, erasing = timms[1].transforms, timms[2].transforms[2:]  # after Normalize
    pipeline: Any = eval_transform(data_config)
    steps: list[Any] = []
    for step in pipeline.transforms:
        if isinstance(step, transforms.CenterCrop):
            crop = transforms.RandomCrop(step.size, pad_if_needed=True)
            steps += [crop, transforms.RandomHorizontalFlip(hflip), *colours]
        else:
            steps.append(step)
    return transforms.Compose([*steps, *erasing])


def _resizing(pipeline: Any, data_config: Mapping[str, Any]) -> Transform:
    return pipeline if data_config.get("antialias", True) else without_antialias(pipeline)


def _collate(items: Sequence[Any]) -> Batch:
    skipped = [item for item in items if isinstance(item, SkippedImage)]
    good = [item for item in items if not isinstance(item, SkippedImage)]
    images = torch.stack([image for image, _ in good]) if good else torch.empty(0)
    return Batch(images, label_tensor([label for _, label in good]), skipped)


def label_tensor(labels: Sequence[Any]) -> torch.Tensor:
    """Return class indices (n,), int64; or rows of 0 and 1 (n, classes), fp32."""
    if len(labels) and isinstance(labels[0], Sequence | torch.Tensor | np.ndarray):
        return torch.stack([torch.as_tensor(row, dtype=torch.float32) for row in labels])
    return torch.tensor(labels, dtype=torch.int64)


def _ignore_interrupt(_worker: int) -> None:
    # Ctrl-C reaches every process of the terminal; only the main one should act on it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def batch_sampler(
    dataset: Dataset, batch_size: int, shuffle: bool, generator: torch.Generator
) -> PartOfBatches:
    """Return a sampler of this process's part of every batch, reordered each epoch if `shuffle`."""
    images: Any = dataset
    order = RandomSampler(images, generator=generator) if shuffle else SequentialSampler(images)
    return PartOfBatches(BatchSampler(order, batch_size, drop_last=False))


def make_loader(
    dataset: Dataset,
    batch_size: int,
    *,
    shuffle: bool = False,
    seed: int = 0,
    workers: int = 0,
    pin_memory: bool = False,
) -> DataLoader:
    """Build a loader of `Batch`.

    Args:
        dataset: Dataset of (image, label) or SkippedImage.
        batch_size: Images per batch, over all processes (see `parallel`); the last batch may be
            smaller.
        shuffle: Whether images are in a new order in every epoch, from `seed`, and each image is
            drawn with random numbers of its own (see `SeededImages`), so that results do not
            depend on `workers`.
        seed: Seed of the order and of the images' random numbers.
        workers: Number of processes that load images; 0 loads them in this one.
        pin_memory: Whether batches are in pinned memory, for faster copies to a GPU.

    Raises:
        ValueError: If `workers` is negative.
    """
    if workers < 0:
        raise ValueError(f"workers is {workers}; it must be at least 0")
    generator = torch.Generator().manual_seed(seed)
    batches: Any = batch_sampler(dataset, batch_size, shuffle, generator)
    return DataLoader(
        SeededImages(dataset) if shuffle else dataset,
        batch_sampler=SeededBatches(batches, generator) if shuffle else batches,
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
        generator=generator,
        worker_init_fn=_ignore_interrupt if workers else None,
    )
