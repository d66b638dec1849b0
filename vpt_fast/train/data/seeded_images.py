"""Random numbers per image, which depend neither on the process nor on the order of loading.

Transforms draw from the global generators of Python, NumPy and PyTorch. Around each item these are
seeded from the seed, the epoch and the image, and restored.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

Key = tuple[int, int]
"""Number of the epoch, drawn from the seed, and index of the image."""


class SeededImages(Dataset):
    """Dataset that draws items with random numbers of their own when indexed by a `Key`.

    Args:
        images: Dataset of (image, label) or SkippedImage.
    """

    def __init__(self, images: Any) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: Key | int) -> Any:
        if isinstance(key, int):
            return self.images[key]
        epoch, index = key
        with random_numbers(number_of(f"{epoch} {index}".encode())):
            return self.images[index]

    @property
    def classes(self) -> list[str]:
        """Names of the classes, if the images have them."""
        names: list[str] = self.images.classes
        return names


class SeededBatches(Sampler[list[Key]]):
    """Sampler of batches of indices with the epoch that they are drawn in.

    Args:
        batches: Sampler of batches of indices.
        generator: Generator of their order. Its state identifies the epoch; nothing is drawn from
            it here, so that the order does not change.
    """

    def __init__(self, batches: Sampler[list[int]], generator: torch.Generator) -> None:
        self.batches, self.generator = batches, generator

    def __iter__(self) -> Iterator[list[Key]]:
        epoch = number_of(self.generator.get_state().numpy().tobytes())
        for batch in self.batches:
            yield [(epoch, index) for index in batch]

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]


def number_of(content: bytes) -> int:
    """Return a number of 64 bits that stands for `content`."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


@contextmanager
def random_numbers(seed: int) -> Iterator[None]:
    """Seed all generators of the CPU within a context, and restore them."""
    python, numpy = random.getstate(), np.random.get_state()
    generator = torch.default_generator
    state = generator.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    generator.manual_seed(seed % 2**63)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        generator.set_state(state)
