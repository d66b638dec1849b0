"""Random numbers of every image's own: the same whichever process loads it, and in which order.

Transforms draw from Python's, NumPy's and PyTorch's global random numbers. Around each item these
are set from the seed, the epoch and the image, and put back.
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
"""The epoch's number, drawn from the seed, and the image's index."""


class SeededImages(Dataset):
    """A data set whose items are drawn with random numbers of their own where a `Key` asks.

    Args:
        images: What `make_loader` takes.
    """

    def __init__(self, images: Any) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: Key | int) -> Any:
        if isinstance(key, int):
            return self.images[key]
        epoch, index = key
        with _random_numbers(_number(f"{epoch} {index}".encode())):
            return self.images[index]

    @property
    def classes(self) -> list[str]:
        """The class names, where the images have them."""
        names: list[str] = self.images.classes
        return names


class SeededBatches(Sampler[list[Key]]):
    """Batches of indices with the epoch that they are drawn in.

    Args:
        batches: Of indices.
        generator: That their order is drawn from. Its state tells the epochs apart; nothing more is
            drawn from it, so that orders stay as they are.
    """

    def __init__(self, batches: Sampler[list[int]], generator: torch.Generator) -> None:
        self.batches, self.generator = batches, generator

    def __iter__(self) -> Iterator[list[Key]]:
        epoch = _number(self.generator.get_state().numpy().tobytes())
        for batch in self.batches:
            yield [(epoch, index) for index in batch]

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]


def _number(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


@contextmanager
def _random_numbers(seed: int) -> Iterator[None]:
    """Inside, all random numbers of the CPU start from `seed`."""
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
