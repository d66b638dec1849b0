"""`vpt-fast sweep`: on folders, shared by processes, and with wrong input."""

from __future__ import annotations

import csv

import pytest
import torch
from support.pictures import backbone, make_folders, write_checkpoint
from support.training import CONFIG
from test_cli import call, error_of

from vpt_fast import LinearProbe, VPTDeep
from vpt_fast.train.common.paper_settings import LEARNING_RATES, WEIGHT_DECAYS
from vpt_fast.train.common.recipe import Recipe
from vpt_fast.train.data.augmentation import Augmentation
from vpt_fast.train.data.image_loaders import Loading
from vpt_fast.train.data.image_options import RESIZES
from vpt_fast.train.data.sources import open_source
from vpt_fast.train.sweep.data import SourceData
from vpt_fast.train.sweep.plan import candidate
from vpt_fast.train.sweep.preset import demo_candidates
from vpt_fast.train.sweep.task import SweepTask


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp("colours"), train=8, val=3, test=4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("weights") / "tiny.pth")


def sweep(folder, checkpoint, output, *arguments):
    options = ["--methods", "linear,vpt-deep", "--lrs", "3,0.5", "--weight-decays", "0.01"]
    options += ["--num-prompts", "1,2", "--seeds", "42,44", "--epochs", 2, "-b", 8]
    options += ["--model", "test_vit", "--img-size", 32, "--checkpoint", checkpoint]
    return call("sweep", folder, *options, "--output", output, *arguments)


def rows_of(output):
    with (output / "sweep.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_sweep_on_folders_and_its_adapters(folder, checkpoint, tmp_path):
    result = sweep(folder, checkpoint, tmp_path / "sweep")
    assert result.exit_code == 0, result.output
    runs = [line for line in result.stdout.splitlines() if ", loss " in line]
    assert len(runs) == (2 + 2) + (4 + 2)
    rows = rows_of(tmp_path / "sweep")
    assert [(row["method"], row["seed"]) for row in rows] == [
        ("linear", "42"), ("linear", "44"), ("vpt-deep", "42"), ("vpt-deep", "44"),
    ]  # fmt: skip
    assert "| vpt-deep |" in result.stdout and (tmp_path / "sweep" / "sweep.png").is_file()
    for row in rows:
        adapter = tmp_path / "sweep" / "adapters" / row["method"] / f"seed-{row['seed']}"
        found = call("eval", adapter, folder, "--checkpoint", checkpoint)
        assert found.exit_code == 0, found.output
        assert f"top-1 {float(row['test_top1']):.2f}%" in found.stdout
    again = sweep(folder, checkpoint, tmp_path / "sweep")
    assert ", loss " not in again.stdout and rows_of(tmp_path / "sweep") == rows
    other = sweep(folder, checkpoint, tmp_path / "sweep", "--epochs", 3)
    assert "recipe epochs: 2, now 3" in error_of(other)


@pytest.mark.usefixtures("prepared_processes")
def test_processes_share_the_runs(folder, checkpoint, tmp_path):
    alone = sweep(folder, checkpoint, tmp_path / "one", "--no-aug")
    shared = sweep(folder, checkpoint, tmp_path / "two", "--no-aug", "--processes", 2)
    assert alone.exit_code == 0 and shared.exit_code == 0, shared.output
    one, two = rows_of(tmp_path / "one"), rows_of(tmp_path / "two")
    for ours, theirs in zip(one, two, strict=True):
        rounded = ("seconds", "test_loss", "adapter_bytes")
        same = [name for name in ours if name not in rounded]
        assert [ours[name] for name in same] == [theirs[name] for name in same]
        assert float(ours["test_loss"]) == pytest.approx(float(theirs["test_loss"]), rel=1e-4)
        # An adapter's configuration holds floats as text: with other thread counts a sum may
        # round differently and print with a digit more or less.
        assert abs(int(ours["adapter_bytes"]) - int(theirs["adapter_bytes"])) <= 8


def test_the_demo_preset_compares_seven_methods_over_five_seeds(tmp_path):
    names = [one.method.name for one in demo_candidates()]
    assert names == ["linear", "bias", "adapter", "full", "vpt-shallow", "vpt-deep", "vapt"]
    assert {one.recipe.opt for one in demo_candidates()[1:4]} == {"adamw"}
    wrong = call("sweep", "photos", "--preset", "demo", "--output", tmp_path)
    assert "has its own data; leave photos out" in error_of(wrong)
    wrong = call(
        "sweep", "--preset", "demo", "--output", tmp_path, "--epochs", 1, "--no-aug",
        "--methods", "vapt", "--set", "num_layers=3",
    )  # fmt: skip
    assert "has its own settings; leave --methods, --set, --no-aug out" in error_of(wrong)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lrs", "big"], "--lrs is 'big'; give numbers with commas between them"),
        (["--seeds", ""], "--seeds is ''; give whole numbers with commas"),
        (["--num-prompts", "1.5"], "--num-prompts is '1.5'; give whole numbers"),
        (["--methods", "linear,lora"], "--method is 'lora'; choose one of"),
        (["--processes", "0"], "processes is 0; it must be at least 1"),
        (["--recipe", "mine"], "recipe is 'mine'; choose one of vpt, vapt"),
        (["--preset", "small"], "--preset is 'small'; choose one of demo"),
        (["--cache", "disk"], "cache is 'disk'; choose one of auto, memory, stream"),
        (["--lrs", "-1"], "lr is -1.0; it must be a number that is at least 0"),
    ],
)
def test_wrong_arguments_are_named(arguments, message, folder, checkpoint, tmp_path):
    result = sweep(folder, checkpoint, tmp_path / "sweep", *arguments)
    assert message in error_of(result)
    assert not (tmp_path / "sweep" / "sweep.csv").exists()


def test_no_data_and_no_validation_images(checkpoint, tmp_path):
    assert "there is no DIR" in error_of(call("sweep", "--output", tmp_path / "sweep"))
    data = make_folders(tmp_path / "data", train=2, val=0, test=2)
    result = sweep(data, checkpoint, tmp_path / "sweep")
    assert "the data has no val split: a sweep chooses on val" in error_of(result)


def test_the_papers_grids_and_batch_sizes_are_the_defaults():
    one = candidate(VPTDeep(), Recipe(), prompts=(50, 100), paper="vpt")
    assert (one.lrs, one.weight_decays) == (LEARNING_RATES["sgd"], WEIGHT_DECAYS)
    batches = {
        prompts: one.chosen({"lr": 1.0, "weight_decay": 0.0, "num_prompts": prompts}, 1)[
            1
        ].batch_size
        for prompts in one.prompts
    }
    assert batches == {50: 128, 100: 64}
    assert candidate(LinearProbe(), Recipe(), opt="adamw").lrs == LEARNING_RATES["adamw"]


@pytest.mark.parametrize("cache", ["memory", "stream"])
def test_images_of_all_parts_are_those_of_the_data_set(cache, folder):
    source = open_source(folder)
    config = {**CONFIG, **RESIZES["squash"]}
    loading = Loading(config, Augmentation(no_aug=True), torch.device("cpu"), cache=cache)
    data = SourceData(source, loading)
    counts = {part: data.count(part) for part in ("train", "both", "val", "test")}
    assert counts == {"train": 24, "both": 33, "val": 9, "test": 12}

    def everything(part, seed=None):
        found = list(data.batches(part, 5, seed))
        return torch.cat([b.images for b in found]), torch.cat([b.labels for b in found])

    both, labels = everything("both")
    for part, rows in (("train", slice(0, 24)), ("val", slice(24, 33))):
        images, found = everything(part)
        assert torch.equal(images, both[rows]) and torch.equal(found, labels[rows])
    shuffled, found = everything("train", 7)
    assert not torch.equal(found, labels[:24])
    assert torch.equal(found.sort()[0], labels[:24].sort()[0])
    assert torch.equal(everything("train", 7)[0], shuffled)
    assert not torch.equal(everything("train", 8)[0], shuffled)


def test_frozen_blocks_are_computed_once_for_all_runs(folder, monkeypatch):
    loading = Loading(CONFIG, Augmentation(no_aug=True), torch.device("cpu"))
    task = SweepTask(backbone(), SourceData(open_source(folder), loading), progress=False)
    images = []
    patches = task.backbone.patch_embed
    patches.register_forward_hook(lambda module, args, out: images.append(len(out)))
    recipe = Recipe(epochs=3, batch_size=8, lr=1.0)
    first = task.run(LinearProbe(), recipe, final=False)
    assert sum(images) == 24 + 9
    task.run(LinearProbe(), Recipe(epochs=3, batch_size=8, lr=2.0), final=False)
    assert sum(images) == 24 + 9
    task.run(LinearProbe(), recipe, final=True)
    assert sum(images) == 24 + 9 + 33 + 12 + 1  # the fixed one of its adapter
    augmented = Loading(CONFIG, Augmentation(), torch.device("cpu"))
    other = SweepTask(backbone(), SourceData(open_source(folder), augmented), progress=False)
    assert other.run(LinearProbe(), recipe, final=False).loss != first.loss
