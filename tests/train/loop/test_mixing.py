"""Mixup and CutMix against timm's, and their random numbers."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.pictures import backbone
from support.processes import in_ranks
from support.training import pictures
from timm.data import Mixup

from vpt_fast import VPTDeep, prompt_tune, trainable_parameters
from vpt_fast.train.common.recipe import Recipe, init_head
from vpt_fast.train.data.images import make_loader
from vpt_fast.train.data.seeded_images import number_of, random_numbers
from vpt_fast.train.loop import mixing
from vpt_fast.train.loop.epochs import fit
from vpt_fast.train.loop.mixing import Mixing

ITEMS = pictures(25)


def images(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, 16, 16, generator=rng), torch.arange(count) % 5


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_images_and_shares_are_timms(mode: str) -> None:
    recipe = Recipe(mixup=0.8, cutmix=1.0, smoothing=0.1, mixup_mode=mode, mixup_prob=0.9)
    x, labels = images(6)
    given = x.clone()
    timms = Mixup(0.8, 1.0, prob=0.9, mode=mode, label_smoothing=0.1, num_classes=5)
    for step in range(5):
        found = Mixing(recipe, 5)(x, labels, step)
        with random_numbers(number_of(f"mixing 42 {step} 0".encode())):
            wanted = timms(given.clone(), labels)
        assert torch.equal(x, given), "the batch itself stays as it is"
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
        torch.testing.assert_close(found[1].sum(1), torch.ones(6))


def test_the_last_of_an_odd_number_is_not_mixed() -> None:
    x, labels = images(5)
    mixing = Mixing(Recipe(mixup=1.0, smoothing=0.2), 5)
    mixed, shares = mixing(x, labels, 0)
    assert torch.equal(mixed[4], x[4]) and not torch.equal(mixed[:4], x[:4])
    torch.testing.assert_close(shares[4], torch.tensor([0.04, 0.04, 0.04, 0.04, 0.84]))
    one, alone = mixing(x[:1], labels[:1], 0)
    assert torch.equal(one, x[:1]) and alone.argmax() == 0


def test_random_numbers_are_those_of_seed_step_and_process(monkeypatch: Any) -> None:
    x, labels = images(8)
    np.random.seed(7)
    before = random.getstate(), torch.get_rng_state()

    def shares(seed: int, step: int, rank: int) -> float:
        monkeypatch.setattr(mixing, "rank", lambda: rank)
        return float(Mixing(Recipe(mixup=1.0, seed=seed), 5)(x, labels, step)[1][0, 0])

    keys = [(1, 0, 0), (1, 1, 0), (1, 0, 1), (2, 0, 0)]
    found = [shares(*key) for key in keys]
    assert len(set(found)) == 4
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])
    assert np.random.rand() == np.random.RandomState(7).rand()
    assert [shares(*key) for key in keys] == found, "whatever the global generators hold"


def several() -> list[tuple[float, float, float]]:
    """Train on rows of labels; of 25 images one process lacks the last."""
    torch.manual_seed(3)
    model = backbone(depth=1)
    init_head(model)
    prompt_tune(model, VPTDeep(2))
    rows: Any = [(image, [int(k != i % 3) for k in range(3)]) for i, (image, _) in enumerate(ITEMS)]
    result = fit(
        model,
        make_loader(rows, 8, shuffle=True),
        Recipe(epochs=2, batch_size=8, lr=3.0, class_weights=(1.0, 2.0, 0.5)),
        val_batches=make_loader(rows[:13], 5),
        progress=False,
    )
    return [(row.train_loss, row.val_loss or 0.0, row.val_map or 0.0) for row in result.epochs]


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        torch.manual_seed(3)
        model = backbone(depth=1)
        init_head(model)
        prompt_tune(model, VPTDeep(2))
        recipe = Recipe(
            epochs=2, batch_size=8, mixup=0.8, cutmix=1.0, model_ema=True, model_ema_decay=0.5
        )
        loader = make_loader(pictures(25), 8, shuffle=True)  # one process lacks the last image
        result = fit(model, loader, recipe, progress=False)
        weights = [p.detach().clone() for _, p in trainable_parameters(model)]
        torch.save((weights, [row.train_loss for row in result.epochs]), f"{folder}/{rank}.pt")
        torch.save(several(), f"{folder}/several{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_processes_agree_on_weights_and_their_average(tmp_path: Path) -> None:
    in_ranks(worker, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first[1] == second[1] and all(np.isfinite(first[1]))
    assert all(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True))
    found = [torch.load(tmp_path / f"several{rank}.pt") for rank in (0, 1)]
    assert found[0] == found[1]
    for ours, alone in zip(found[0], several(), strict=True):
        assert ours == pytest.approx(alone, rel=1e-4)
