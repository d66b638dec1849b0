"""A run that is killed and resumed ends with the same bits as an uninterrupted run."""

from __future__ import annotations

import os
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.adapters.flipped_bits import flipped_bits
from support.pictures import backbone
from support.processes import started
from support.training import Stopped, endings, pictures, stopped_after

from vpt_fast import (
    VAPT,
    PromptMethod,
    PromptModule,
    VPTDeep,
    initialise,
    prompt_tune,
    register_method,
    save_adapter,
)
from vpt_fast.train.common.digest import digest
from vpt_fast.train.common.recipe import Recipe, init_head
from vpt_fast.train.data.images import Batch, make_loader
from vpt_fast.train.loop.checkpoint import FILE, load_checkpoint, save_checkpoint
from vpt_fast.train.loop.epochs import fit

RECIPE = Recipe(epochs=5, batch_size=7, lr=2.0, warmup_epochs=1, accumulation=2)


class Noisy(torch.utils.data.Dataset):
    """Pictures with augmentation from the global random generators, like torchvision's."""

    def __init__(self) -> None:
        self.items = pictures(24)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image, label = self.items[index]
        return image + random.random() + torch.rand(()), label


@dataclass(frozen=True)
class Averaged(PromptMethod):
    """Prompts beside a running average of images, which start as means of tokens."""


@register_method("averaged", Averaged)
class AveragedPrompts(PromptModule):
    """Prompts of one block."""

    reads = "tokens"

    def __init__(self, method: Any, block: Any) -> None:
        super().__init__()
        self.tokens = block.new_parameter(2, block.width)
        self.register_buffer("average", torch.zeros(block.width))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return prompts (B, p, D)."""
        if self.training:
            self.average.lerp_(x.detach().mean((0, 1)), 0.1)
            self.steps += 1
        return self.tokens + self.average * x[:, :1].sigmoid()

    def initialise(self, inputs: torch.Tensor, weights: Any) -> None:
        """Set the prompts to means of tokens."""
        self.tokens.copy_(inputs.mean((0, 1)))


def run(folder: Path, method: Any = None, resume: bool = False, **changes: Any) -> Any:
    """Train in `folder`, with dropout, augmentation and validation."""
    torch.manual_seed(3)
    model = backbone(seed=0)
    init_head(model)
    prompt_tune(model, method or VPTDeep(2, dropout=0.1))
    if not resume:
        initialise(model, torch.stack([image for image, _ in pictures(6)]))
    recipe = Recipe(**{**RECIPE.__dict__, **changes})
    loader = make_loader(Noisy(), recipe.batch_size, shuffle=True, seed=recipe.seed)
    result = fit(
        model,
        loader,
        recipe,
        val_batches=make_loader(pictures(12, seed=1), 12),
        output=folder,
        save=lambda model, where: save_adapter(model, where, overwrite=True),
        progress=False,
        resume=resume,
    )
    return model, result


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], Any]:
    folder = tmp_path_factory.mktemp("whole")
    _, result = run(folder)
    return endings(folder), result


@pytest.mark.parametrize("after", [1, 4, 9, 17])
def test_a_resumed_run_ends_with_the_same_bits(
    after: int, tmp_path: Path, uninterrupted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with stopped_after(after, monkeypatch):
        run(tmp_path)
    torch.rand(after), random.random()  # the next process starts anywhere
    model, result = run(tmp_path, resume=True)
    bits, whole = uninterrupted
    assert endings(tmp_path) == bits
    assert [row.epoch for row in result.epochs] == [1, 2, 3, 4, 5]
    assert result.kept == whole.kept
    assert [row.train_loss for row in result.epochs] == [row.train_loss for row in whole.epochs]
    lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["epoch", "1", "2", "3", "4", "5"]


def test_vapts_dropouts_and_adamw_resume_too(tmp_path: Path) -> None:
    changes = {"opt": "adamw", "lr": 0.01, "schedule": "step", "epochs": 2}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    run(whole, VAPT(2), **changes)
    run(parts, VAPT(2), **changes)
    state = load_checkpoint(parts)
    assert state is not None and state["epoch"] == 2
    run(parts, VAPT(2), resume=True, **changes)  # nothing is left to do
    assert endings(whole) == endings(parts)


def test_buffers_and_what_prompts_started_from_resume_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vpt_fast.train.loop import step

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
    model, _ = run(whole, Averaged(2), lr=0.1)
    assert model.tune_record.initialised == {"images": 6}
    call, steps = step.TrainStep.__call__, 0

    def stopping(self: Any, batch: Batch) -> Any:
        nonlocal steps
        steps += 1
        if steps > 9:
            raise Stopped
        return call(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(step.TrainStep, "__call__", stopping)
        with pytest.raises(Stopped):
            run(parts, Averaged(2), lr=0.1)
    again, _ = run(parts, Averaged(2), resume=True, lr=0.1)
    assert endings(whole) == endings(parts)
    assert again.tune_record.initialised == {"images": 6}
    first, second = (m.blocks[1].prompt for m in (model, again))
    assert torch.equal(first.average, second.average) and int(first.steps) == int(second.steps) > 9


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    run(tmp_path, epochs=1, warmup_epochs=0)
    for changes, message in (
        ({"lr": 3.0}, r"recipe has lr 2.0, not 3.0"),
        ({"seed": 1}, r"recipe has seed 42, not 1"),
    ):
        with pytest.raises(ValueError, match=message):
            run(tmp_path, resume=True, **{"epochs": 1, "warmup_epochs": 0, **changes})
    for method, message in (
        (VPTDeep(3, dropout=0.1), "method has num_prompts 2, not 3"),
        (VPTDeep(2, dropout=0.9), "method has dropout 0.1, not 0.9"),
    ):
        with pytest.raises(ValueError, match=message):
            run(tmp_path, method, resume=True, epochs=1, warmup_epochs=0)


@pytest.mark.parametrize("flips", [100, pytest.param(1000, marks=pytest.mark.full)])
def test_flipped_bits_of_a_checkpoint(flips: int, tmp_path: Path) -> None:
    """Refused, or the same bits, since padding between a file's values has no meaning."""
    run(tmp_path, epochs=1, warmup_epochs=0)
    path = tmp_path / FILE
    content, expected = path.read_bytes(), digest(load_checkpoint(tmp_path))
    refused = 0
    for damaged in flipped_bits(content, flips):
        path.write_bytes(damaged)
        try:
            state = load_checkpoint(tmp_path)
        except ValueError as error:
            assert FILE in str(error)
            refused += 1
        else:
            assert digest(state) == expected
    assert refused > flips / 2


def test_a_checkpoint_is_complete_or_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load_checkpoint(tmp_path) is None
    save_checkpoint(tmp_path, {"epoch": 1})
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            save_checkpoint(tmp_path, {"epoch": 2})
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    state = load_checkpoint(tmp_path)
    assert state is not None and state["epoch"] == 1
    (tmp_path / f".{FILE}.writing-left").write_bytes(b"cut")
    (tmp_path / FILE).write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"checkpoint.pt is damaged"):
        load_checkpoint(tmp_path)
    save_checkpoint(tmp_path, {"epoch": 3})
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    torch.save({"version": 0}, tmp_path / FILE)
    with pytest.raises(ValueError, match=r"not a checkpoint of this version"):
        load_checkpoint(tmp_path)


def start_or_resume(folder: Path) -> None:
    run(folder, resume=True)


def killed(folder: Path, seconds: float) -> bool:
    """Run in a process and kill it after `seconds`; return whether it was still running."""
    process = started(start_or_resume, folder)
    process.join(seconds)
    process.kill()
    process.join()
    return bool(process.exitcode == -signal.SIGKILL)


@pytest.mark.parametrize("moments", [1, pytest.param(20, marks=pytest.mark.full, id="twenty")])
def test_killed_at_random_moments_it_ends_the_same(moments: int, tmp_path: Path) -> None:
    """Each run is killed once and then resumed to its end, in new processes."""
    whole = tmp_path / "whole"
    whole.mkdir()
    start = time.perf_counter()
    assert not killed(whole, 600)
    lasts, wanted = time.perf_counter() - start, endings(whole)
    dice, were_killed = random.Random(0), 0
    for number in range(moments):
        folder = tmp_path / str(number)
        folder.mkdir()
        were_killed += killed(folder, dice.uniform(0.5, 1.0) * lasts)
        assert not killed(folder, 600)
        assert endings(folder) == wanted, number
    assert were_killed >= moments // 2
