"""Small training runs: items, damaged files, several labels, and the adapters of a run."""

from __future__ import annotations

import io
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from support.pictures import CLASSES
from vpt_fast import save_adapter
from vpt_fast.adapter.files import TENSORS_FILE
from vpt_fast.train.data.images import SkippedImage, make_loader
from vpt_fast.train.data.split import ImageSource, Split, split_of_files
from vpt_fast.train.loop.epochs import fit
from vpt_fast.train.loop.step import TrainStep

BROKEN = SkippedImage("broken.png", "broken.png cannot be decoded (cut)")


def pictures(count=24, seed=0):
    """Return (image, label) items; images (3, 32, 32) whose mean colour is their class."""
    rng = torch.Generator().manual_seed(seed)
    labels = [i % 3 for i in range(count)]
    noise = torch.randn(count, 3, 32, 32, generator=rng)
    for image, label in zip(noise, labels, strict=True):
        image[label] += 2
    return list(zip(noise, labels, strict=True))


def save(model, directory):
    return save_adapter(model, directory, overwrite=True)


def train(model, recipe, items=None, **arguments):
    loader = make_loader(items or pictures(), recipe.batch_size, shuffle=True, seed=recipe.seed)
    return fit(model, loader, recipe, progress=False, **arguments)


CONFIG = {
    "input_size": (3, 32, 32),
    "interpolation": "bicubic",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "crop_pct": 0.9,
    "crop_mode": "center",
}


def damaged_files(folder):
    """Write a text file, an empty file, cut PNG, JPEG and TIFF files, and a broken PNG chunk."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    files = {"text.png": b"not an image", "empty.jpg": b""}
    for name, form in (("cut.png", "PNG"), ("cut.jpg", "JPEG"), ("cut.tiff", "TIFF")):
        stream = io.BytesIO()
        picture.save(stream, form)
        data = stream.getvalue()
        files[name] = data[: len(data) // 2]
        if form == "PNG":
            files["chunk.png"] = data[:60] + b"\0\0\0\0\0\0\0\0" + data[68:]
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return [folder / name for name in files]


def endings(folder: Path) -> dict[str, bytes]:
    """Return the tensor files of the adapters that a run writes, which hold no time stamps."""
    return {name: (folder / name / TENSORS_FILE).read_bytes() for name in ("best", "last")}


class Stopped(Exception):
    """Raised to end a run as if its process had been killed."""


def several_labels(folder: Path, **counts: int) -> ImageSource:
    """Write images whose bright channels are their labels; counts[split] images of each split."""
    splits = {}
    for seed, (name, count) in enumerate(counts.items()):
        splits[name] = _split(folder / name, count, seed)
    return ImageSource("folders", list(CLASSES), splits, multi_label=True)


def _split(folder: Path, count: int, seed: int) -> Split:
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    paths, labels = [], []
    for i in range(count):
        row = [i >> bit & 1 for bit in range(3)]  # every combination, none among them
        noise = rng.integers(0, 100, (36, 40, 3)) + 130 * np.array(row[::-1])
        paths.append(folder / f"{i}.png")
        Image.fromarray(noise.astype(np.uint8)).save(paths[-1])
        labels.append(row)
    return split_of_files(paths, labels)


def open_instead(monkeypatch: Any, source: ImageSource, *modules: Any) -> None:
    """Let `open_source` and `check_format` of some modules find a source."""
    for module in modules:
        if hasattr(module, "open_source"):
            monkeypatch.setattr(module, "open_source", lambda *_, **__: source)
        if hasattr(module, "check_format"):
            monkeypatch.setattr(module, "check_format", lambda *_: "json")


@contextmanager
def stopped_after(steps, monkeypatch):
    """Return a context in which training is stopped, as by a kill, after some steps."""
    call, taken = TrainStep.__call__, 0

    def stopping(self, batch):
        nonlocal taken
        taken += 1
        if taken > steps:
            raise Stopped
        return call(self, batch)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(TrainStep, "__call__", stopping)
        yield
