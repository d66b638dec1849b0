"""Inputs of the first trained block are computed once, and training from there is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.formulations.any_method import AnyMethod
from support.pictures import backbone
from support.training import BROKEN, pictures

from vpt_fast import DVPT, VAPT, LinearProbe, VPTDeep, VPTShallow, prompt_tune
from vpt_fast.train.common.recipe import Recipe, init_head
from vpt_fast.train.data.images import make_loader
from vpt_fast.train.loop.epochs import fit
from vpt_fast.train.loop.evaluate import TrainingError, evaluate
from vpt_fast.train.loop.prefix_cache import PrefixCache, SuffixModel, frozen_blocks

RECIPE = Recipe(epochs=3, batch_size=8, lr=2.0, warmup_epochs=0)
LAST = VPTDeep(2, blocks=range(4, 6))


def tuned(method: Any = LAST, **arguments: Any) -> Any:
    torch.manual_seed(3)
    model = backbone(seed=0, **arguments)
    init_head(model)
    return prompt_tune(model, method)


def loader(items: Any, shuffle: bool = False) -> Any:
    return make_loader(items, RECIPE.batch_size, shuffle=shuffle, seed=RECIPE.seed)


def cached(cache: PrefixCache, items: Any, shuffle: bool = False) -> Any:
    return cache.loader(loader(items), len(items), loader(items, shuffle))


@pytest.mark.parametrize(
    ("method", "blocks"),
    [
        (LAST, 4),
        (VPTDeep(2, blocks=[5]), 5),
        (VPTDeep(2, blocks=[2, 4]), 2),
        (VPTDeep(2), 0),
        (VPTDeep(2, shared=True, blocks=[5]), 0),
        (VPTShallow(2), 0),
        (VAPT(2), 0),
        (LinearProbe(), 6),
        (DVPT(2, source="feature"), 0),
        (AnyMethod(2, kind="feature", blocks=(4, 5)), 0),
    ],
    ids=repr,
)
def test_blocks_before_the_first_trained_one(method: Any, blocks: int) -> None:
    assert frozen_blocks(tuned(method)) == blocks


def test_other_trained_parameters_count() -> None:
    model = tuned()
    model.norm.weight.requires_grad_(True)
    assert frozen_blocks(model) == 4
    model.blocks[1].mlp.fc1.bias.requires_grad_(True)
    assert frozen_blocks(model) == 1
    model.pos_embed.requires_grad_(True)
    assert frozen_blocks(model) == 0


@pytest.mark.parametrize("method", [LAST, LinearProbe()], ids=repr)
@pytest.mark.parametrize("pool", ["token", "avg"])
def test_training_is_the_same(method: Any, pool: str) -> None:
    def run(with_cache: bool) -> Any:
        model = tuned(method, global_pool=pool)
        train, validation = pictures(24), pictures(13, seed=1)
        if not with_cache:
            batches = loader(train, shuffle=True)
            result = fit(model, batches, RECIPE, val_batches=loader(validation), progress=False)
            return model, result
        first = frozen_blocks(model)
        cache = PrefixCache(model, first, progress=False)
        result = fit(
            model,
            cached(cache, train, shuffle=True),
            RECIPE,
            val_batches=cached(cache, validation),
            progress=False,
            net=SuffixModel(model, first),
        )
        return model, result

    (model, result), (plain, wanted) = run(True), run(False)
    for ours, theirs in zip(result.epochs, wanted.epochs, strict=True):
        assert ours.train_loss == pytest.approx(theirs.train_loss, rel=1e-5)
        assert ours.val_loss == pytest.approx(theirs.val_loss, rel=1e-5)
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)
    found = evaluate(model, loader(pictures(13, seed=1)), progress=False)
    assert found.loss == pytest.approx(result.epochs[result.kept - 1].val_loss, rel=1e-5)


def test_the_frozen_blocks_run_once_per_image() -> None:
    model, seen = tuned(), []
    model.blocks[0].register_forward_hook(lambda *args: seen.append(len(args[1][0])))
    cache = PrefixCache(model, 4, progress=False)
    batches = cached(cache, pictures(24), shuffle=True)
    fit(model, batches, RECIPE, progress=False, net=SuffixModel(model, 4))
    assert sum(seen) == 24


def test_past_its_limit_activations_go_to_a_file(tmp_path: Path) -> None:
    model = tuned()
    inside, outside = (
        cached(PrefixCache(model, 4, folder=tmp_path, limit=limit, progress=False), pictures(24))
        for limit in (2**20, 1000)
    )
    assert list(tmp_path.iterdir()) == [], "the file has no name, and cannot be left over"
    assert not inside.dataset.activations.is_shared()
    for ours, theirs in zip(outside, inside, strict=True):
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.labels, theirs.labels)


def test_undecodable_images_are_left_out_and_named() -> None:
    cache = PrefixCache(tuned(), 4, progress=False)
    batches = cached(cache, [*pictures(9), BROKEN])
    assert len(batches.dataset) == 9 and cache.skipped == [BROKEN]
    assert sum(len(batch.labels) for batch in batches) == 9
    with pytest.raises(TrainingError, match="none of the"):
        cached(PrefixCache(tuned(), 4, progress=False), [BROKEN])


def test_a_block_behind_something_trained_is_refused() -> None:
    for first in (0, 5):
        with pytest.raises(ValueError, match=r"has 4 blocks before the first"):
            PrefixCache(tuned(), first)
