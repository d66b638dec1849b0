"""Two processes train as one process with the whole batch, and one of them writes files."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.pictures import backbone, make_folders
from support.processes import in_ranks
from support.training import BROKEN, pictures
from torch.utils.data import BatchSampler, SequentialSampler

from vpt_fast import VPTDeep, prompt_tune, save_adapter
from vpt_fast.train.common.parallel import PartOfBatches, gathered, process_group, summed
from vpt_fast.train.common.recipe import Recipe, init_head
from vpt_fast.train.data.images import make_loader
from vpt_fast.train.loop.epochs import fit
from vpt_fast.train.loop.evaluate import evaluate

RECIPE = Recipe(epochs=3, batch_size=8, lr=2.0, warmup_epochs=0)
ITEMS: dict[str, Any] = {
    # 25 images in batches of 8: one process has no image of the last batch.
    "uneven": pictures(25),
    "broken": [*pictures(12), BROKEN, *pictures(11, seed=2)],
}


def run(output: Path | None, items: str, accumulation: int) -> dict[str, Any]:
    torch.manual_seed(3)
    model = backbone(seed=0)
    init_head(model)
    prompt_tune(model, VPTDeep(2))
    recipe = Recipe(**{**RECIPE.__dict__, "accumulation": accumulation})
    validation = make_loader(pictures(13, seed=1), 5)
    result = fit(
        model,
        make_loader(ITEMS[items], recipe.batch_size, shuffle=True, seed=recipe.seed),
        recipe,
        val_batches=validation,
        output=output,
        save=lambda model, where: save_adapter(model, where, overwrite=True),
        progress=False,
    )
    found = evaluate(model, validation, progress=False)
    return {
        "epochs": [(row.train_loss, row.train_top1, row.val_loss) for row in result.epochs],
        "weights": {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad},
        "skipped": result.skipped,
        "found": (found.loss, found.top1, found.top5, found.images),
        "counts": torch.bincount(found.labels).tolist(),
    }


RUNS = {"uneven": 1, "broken": 2}
"""Items of a run, and its accumulation."""


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        for items, accumulation in RUNS.items():
            output = Path(folder) / items
            output.mkdir(exist_ok=True)
            torch.save(run(output, items, accumulation), Path(folder) / f"{items}{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run everything of `RUNS` in two processes; return the folder of their results."""
    folder = tmp_path_factory.mktemp("two")
    in_ranks(worker, folder)
    return folder


@pytest.mark.parametrize("items", RUNS)
def test_two_processes_equal_one(items: str, ran: Path) -> None:
    alone = run(None, items, 1)
    first, second = (torch.load(ran / f"{items}{rank}.pt", weights_only=False) for rank in (0, 1))
    for name, value in first["weights"].items():
        assert torch.equal(value, second["weights"][name]), name
        torch.testing.assert_close(value, alone["weights"][name], rtol=1e-4, atol=1e-5)
    assert first["epochs"] == second["epochs"]
    for ours, theirs in zip(first["epochs"], alone["epochs"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
    assert first["found"] == second["found"] == pytest.approx(alone["found"], rel=1e-4)
    assert first["counts"] == alone["counts"] and first["skipped"] == alone["skipped"]
    with (ran / items / "metrics.csv").open() as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2", "3"]


def test_parts_make_up_every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    from vpt_fast.train.common import parallel

    batches = BatchSampler(SequentialSampler(range(10)), 3, drop_last=False)
    assert list(PartOfBatches(batches)) == list(batches)
    monkeypatch.setattr(parallel, "world_size", lambda: 2)
    parts = []
    for rank in (0, 1):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        parts.append(list(PartOfBatches(batches)))
    assert parts == [[[0, 2], [3, 5], [6, 8], [9]], [[1], [4], [7], []]]
    assert len(PartOfBatches(batches)) == 4


def test_one_process_needs_no_group() -> None:
    with process_group(torch.device("cpu")) as device:
        assert device == torch.device("cpu") and not dist.is_initialized()
    assert gathered(3) == [3]
    assert torch.equal(summed(torch.ones(2)), torch.ones(2))


def test_torchrun_trains_on_a_folder(tmp_path: Path) -> None:
    make_folders(tmp_path / "data", train=4, val=2, test=2)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone",
        "-m", "vpt_fast.cli", "train", str(tmp_path / "data"), "--model", "vpt_fast_demo",
        "--epochs", "2", "--batch-size", "6", "--no-aug", "--device", "cpu",
        "--output", str(tmp_path / "run"),
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("adapter: ") == 1, "one process talks"
    assert (tmp_path / "run" / "last" / "adapter_config.json").is_file()
