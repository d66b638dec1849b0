"""Streamed images do not depend on the number of processes that load them."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from vpt_fast.train.data.images import make_loader


class Drawn(torch.utils.data.Dataset):
    """Items drawn from all global random generators, as transforms draw theirs."""

    classes = ("a", "b")

    def __len__(self) -> int:
        return 11

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        numbers = [index, random.random(), np.random.rand(), float(torch.rand(()))]
        return torch.tensor(numbers, dtype=torch.float64), index


def epochs(workers: int, seed: int = 3, count: int = 2) -> list[torch.Tensor]:
    loader = make_loader(Drawn(), 3, shuffle=True, seed=seed, workers=workers)
    return [torch.cat([batch.images for batch in loader]) for _ in range(count)]


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(workers: int) -> None:
    for ours, theirs in zip(epochs(0), epochs(workers), strict=True):
        assert torch.equal(ours, theirs)


def test_epochs_seeds_and_images_have_random_numbers_of_their_own() -> None:
    first, second = epochs(0)
    other = epochs(0, seed=4)[0]
    drawn = [some[some[:, 0].argsort()][:, 1:] for some in (first, second, other)]
    assert len(torch.cat(drawn).flatten().unique()) == 3 * 11 * 3


def test_global_generators_do_not_change() -> None:
    def state() -> list[Any]:
        return [
            random.getstate(),
            torch.get_rng_state().tolist(),
            np.random.get_state()[1].tolist(),
        ]

    before = state()
    epochs(0)
    assert state() == before


def test_validation_is_not_seeded() -> None:
    loader = make_loader(Drawn(), 3)
    assert isinstance(loader.dataset, Drawn)
    shuffled: Any = make_loader(Drawn(), 3, shuffle=True)
    assert shuffled.dataset.classes == ("a", "b") and len(shuffled.dataset) == 11
    assert shuffled.dataset[4][1] == 4
