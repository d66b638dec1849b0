"""Images with several labels each, as a source that no format reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vpt_fast.train.data.split import ImageSource, Split, split_of_files

NAMES = ["blue", "green", "red"]


def several_labels(folder: Path, **counts: int) -> ImageSource:
    """Write images whose bright channels are their labels; counts[split] images of each split."""
    splits = {}
    for seed, (name, count) in enumerate(counts.items()):
        splits[name] = _split(folder / name, count, seed)
    return ImageSource("folders", NAMES, splits, multi_label=True)


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
        monkeypatch.setattr(module, "open_source", lambda *_: source)
        if hasattr(module, "check_format"):
            monkeypatch.setattr(module, "check_format", lambda *_: "json")
