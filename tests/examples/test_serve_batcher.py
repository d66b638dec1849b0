"""The queue of examples/serve: batches, waiting, cancellation and shutdown."""

from __future__ import annotations

import time
from concurrent.futures import CancelledError
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from support.serving import Held, make_bank, wait_until
from typer import Typer
from typer.testing import CliRunner

from examples.serve.__main__ import serve
from examples.serve.batcher import BatchDone, Batcher
from examples.serve.refusals import Refusal
from examples.serve.settings import Settings
from examples.serve.trial import write_adapters
from vpt_fast import PromptBank, VPTShallow, prompt_tune, save_adapter
from vpt_fast.backbones.demo_backbone import DEMO_ARGS, DEMO_CHECKPOINT, demo_backbone
from vpt_fast.train.run.bank_folder import open_bank


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> PromptBank:
    return make_bank(tmp_path_factory.mktemp("adapters"))


def image(seed: int = 0) -> torch.Tensor:
    return torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(seed))


def test_a_batch_mixes_tasks_up_to_its_size(bank: PromptBank) -> None:
    held, done = Held(bank), list[BatchDone]()
    batcher = Batcher(held, Settings(max_batch=4, max_wait=0.0), on_batch=done.append)  # type: ignore[arg-type]
    first = batcher.submit(image(), bank.task("task-0"))
    assert held.entered.wait(10)
    names = [f"task-{i % 3}" for i in range(6)]
    futures = [batcher.submit(image(i), bank.task(name)) for i, name in enumerate(names)]
    assert batcher.waiting == 6 and batcher.busy_seconds > 0
    held.go.set()
    predictions = [future.result(10) for future in futures]
    assert [p.batch_size for p in predictions] == [4, 4, 4, 4, 2, 2]
    assert first.result().batch_size == 1
    assert held.seen == [("task-0",), tuple(names[:4]), tuple(names[4:])]
    for i, (name, prediction) in enumerate(zip(names, predictions, strict=True)):
        torch.testing.assert_close(
            prediction.logits, bank(image(i)[None], [name])[0], atol=1e-5, rtol=1e-5
        )
    batcher.close()
    assert [(one.images, one.tasks) for one in done] == [(1, 1), (4, 3), (2, 2)]
    assert not batcher.alive and batcher.busy_seconds == 0


def test_the_first_image_waits_for_others(bank: PromptBank) -> None:
    held = Held(bank)
    held.go.set()
    batcher = Batcher(held, Settings(max_batch=3, max_wait=0.3))  # type: ignore[arg-type]
    began = time.monotonic()
    futures = [batcher.submit(image(i), bank.task("task-0")) for i in range(2)]
    assert [future.result(10).batch_size for future in futures] == [2, 2]
    assert time.monotonic() - began >= 0.3
    batcher.close()


def test_a_full_batch_does_not_wait(bank: PromptBank) -> None:
    batcher = Batcher(bank, Settings(max_batch=3, max_wait=3600.0))
    futures = [batcher.submit(image(i), bank.task("task-0")) for i in range(3)]
    assert [future.result(30).batch_size for future in futures] == [3, 3, 3]
    batcher.close()


def test_cancelled_images_leave_the_queue(bank: PromptBank) -> None:
    held = Held(bank)
    batcher = Batcher(held, Settings(max_queue=1, max_wait=0.0))  # type: ignore[arg-type]
    first = batcher.submit(image(), bank.task("task-0"))
    assert held.entered.wait(10)
    second = batcher.submit(image(), bank.task("task-1"))
    with pytest.raises(Refusal, match="waiting already") as refusal:
        batcher.submit(image(), bank.task("task-2"))
    assert refusal.value.headers == {"Retry-After": "1"}
    assert second.cancel() and batcher.waiting == 0
    third = batcher.submit(image(), bank.task("task-2"))
    assert not first.cancel()  # it is being computed
    held.go.set()
    assert third.result(10).batch_size == 1
    with pytest.raises(CancelledError):
        second.result()
    assert held.seen == [("task-0",), ("task-2",)]
    batcher.close()


def test_closing_answers_queued_images(bank: PromptBank) -> None:
    held = Held(bank)
    held.go.set()
    batcher = Batcher(held, Settings(max_wait=60.0))  # type: ignore[arg-type]
    future = batcher.submit(image(), bank.task("task-0"))
    batcher.close()
    assert future.result(0).batch_size == 1 and not batcher.alive
    with pytest.raises(Refusal, match="shutting down"):
        batcher.submit(image(), bank.task("task-0"))


def test_closing_refuses_images_that_a_stuck_bank_cannot_answer(bank: PromptBank) -> None:
    held = Held(bank)
    batcher = Batcher(held, Settings(max_wait=0.0))  # type: ignore[arg-type]
    batcher.submit(image(), bank.task("task-0"))
    assert held.entered.wait(10)
    future = batcher.submit(image(), bank.task("task-1"))
    batcher.close(0.1)
    with pytest.raises(Refusal, match="before this image's turn"):
        future.result(0)
    assert batcher.alive
    held.go.set()
    wait_until(lambda: not batcher.alive)


def test_limits_are_checked() -> None:
    for field in fields(Settings):
        wrong: Any = -1 if field.name == "max_wait" else 0
        with pytest.raises(ValueError, match=f"{field.name} is {wrong}"):
            Settings(**{field.name: wrong})
    with pytest.raises(ValueError, match="request_seconds is inf"):
        Settings(request_seconds=float("inf"))


def test_a_folder_becomes_a_bank(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no folder"):
        open_bank(tmp_path / "none")
    with pytest.raises(ValueError, match="holds no adapters"):
        open_bank(tmp_path)
    write_adapters(tmp_path, 2)
    (tmp_path / "notes").mkdir()
    shallow = prompt_tune(demo_backbone(3), VPTShallow(num_prompts=2))
    best = tmp_path / "shallow" / "best"  # where a run saves it
    save_adapter(shallow, best, model_args=DEMO_ARGS, checkpoint=DEMO_CHECKPOINT.name)
    bank, refused = open_bank(tmp_path)
    assert bank.tasks == ("task-0", "task-1")
    assert len(refused) == 1 and refused[0].startswith("shallow is left out: ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bank", "nowhere"], "there is no folder nowhere"),
        (["--bank", ".", "--max-queue", "0"], "max_queue is 0; it must be at least 1"),
        (["--bank", ".", "--dtype", "int8"], "--dtype is 'int8'; choose one of float32"),
    ],
)
def test_the_command_names_wrong_arguments(options: list[str], message: str) -> None:
    app = Typer()
    app.command()(serve)
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 2 and message in result.stderr and "Traceback" not in result.stderr
