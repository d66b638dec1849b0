"""Training and evaluation: results, the chosen epoch, files, interruptions and failures."""

from __future__ import annotations

import csv
import math
import signal
import threading

import pytest
import torch
from support.pictures import backbone
from support.training import BROKEN, pictures, save, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional as F

from vpt_fast import LinearProbe, VPTDeep, load_adapter, prompt_tune
from vpt_fast.train.common.interrupts import uninterrupted
from vpt_fast.train.common.recipe import Recipe, init_head
from vpt_fast.train.data.images import SkippedImage, make_loader
from vpt_fast.train.loop.checkpoint import load_checkpoint
from vpt_fast.train.loop.epochs import fit
from vpt_fast.train.loop.evaluate import TrainingError, evaluate, resolve_device
from vpt_fast.train.loop.loss_watch import CHECK_INTERVAL, LossWatch
from vpt_fast.train.loop.step import TrainStep


def tuned(method=None, seed=0):
    model = backbone(seed=seed)
    init_head(model)
    return prompt_tune(model, method or VPTDeep(2, dropout=0.1))


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_training_learns_and_does_not_change_the_backbone():
    model = tuned()
    before = state(model)
    recipe = Recipe(epochs=6, batch_size=8, lr=3.0)
    result = train(model, recipe, val_batches=make_loader(pictures(12, seed=1), 12))
    assert [row.epoch for row in result.epochs] == list(range(1, 7))
    assert result.epochs[-1].train_loss < 0.5 * result.epochs[0].train_loss
    assert max(row.val_top1 for row in result.epochs) > 90
    assert result.images_per_second > 0
    for name, value in state(model).items():
        trained = "prompt" in name or name.startswith("head.")
        assert torch.equal(value, before[name]) != trained, name


def test_the_learning_rate_of_each_epoch_is_the_recipes():
    result = train(tuned(), Recipe(epochs=4, warmup_epochs=2, batch_size=8, lr=3.2))
    half = 0.05
    assert [row.lr for row in result.epochs] == pytest.approx([0, half, 0.1, half])


def test_the_same_seed_gives_the_same_bits_and_another_does_not():
    def run(seed):
        model = tuned()
        train(model, Recipe(epochs=2, batch_size=8, lr=1.0, seed=seed))
        return state(model)

    first, again, other = run(1), run(1), run(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_the_best_epoch_on_validation_is_restored_and_saved(tmp_path):
    model = tuned(LinearProbe())
    val = make_loader(pictures(30, seed=1), 30)
    # The learning rate is far too high, so that the accuracy oscillates.
    recipe = Recipe(epochs=6, batch_size=8, lr=300.0, warmup_epochs=0)
    result = train(model, recipe, val_batches=val, output=tmp_path, save=save)
    best = max(result.epochs, key=lambda row: (row.val_top1, -row.val_loss))
    assert result.kept == best.epoch
    assert best.epoch != result.epochs[-1].epoch
    assert evaluate(model, val, progress=False).top1 == best.val_top1
    loaded = load_adapter(backbone(), tmp_path / "best")
    assert evaluate(loaded, val, progress=False).top1 == best.val_top1
    last = load_adapter(backbone(), tmp_path / "last")
    assert evaluate(last, val, progress=False).loss == pytest.approx(result.epochs[-1].val_loss)


def test_a_rising_loss_is_warned_of_once(tmp_path):
    lines = []
    recipe = Recipe(epochs=4, batch_size=8, lr=3000.0, warmup_epochs=0)
    result = train(tuned(LinearProbe()), recipe, output=tmp_path, save=save, log=lines.append)
    messages = [line for line in lines if line.startswith("warning")]
    assert messages == [f"warning: {result.warning}"]
    assert "smaller --lr than 3000" in result.warning
    assert max(row.train_loss for row in result.epochs) > 6 * math.log(3)
    calm = train(tuned(LinearProbe()), Recipe(epochs=4, batch_size=8, lr=0.01))
    assert calm.warning == ""


@pytest.fixture
def handled_ctrl_c():
    """Handle SIGINT as Python does; where a shell runs the tests in the background, none does."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_waits_for_files_that_are_being_written(handled_ctrl_c, tmp_path):
    """Files of the epoch are complete after an interruption while they are written."""
    pressed = []

    def pressing(model, directory):
        if not pressed:
            pressed.append(directory)
            signal.raise_signal(signal.SIGINT)
        return save(model, directory)

    model = tuned()
    result = train(model, Recipe(epochs=3, batch_size=8, lr=1.0), output=tmp_path, save=pressing)
    assert result.interrupted and [row.epoch for row in result.epochs] == [1]
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 2
    assert load_checkpoint(tmp_path)["epoch"] == 1
    load_adapter(backbone(), tmp_path / "last")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_is_not_handled_outside_the_main_thread(handled_ctrl_c):
    found = []

    def inside():
        with uninterrupted():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]


def test_without_validation_the_last_epoch_is_chosen(tmp_path):
    model = tuned()
    result = train(model, Recipe(epochs=2, batch_size=8), output=tmp_path, save=save)
    assert result.kept == 2
    assert result.epochs[-1].val_top1 is None
    assert not (tmp_path / "best").exists()
    loaded = load_adapter(backbone(), tmp_path / "last")
    assert torch.equal(loaded.head.weight, model.head.weight)


def test_metrics_are_written_as_csv_and_for_tensorboard(tmp_path):
    val = make_loader(pictures(6, seed=1), 6)
    recipe = Recipe(epochs=3, batch_size=8)
    result = train(tuned(), recipe, val_batches=val, output=tmp_path, save=save)
    with open(tmp_path / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3]
    for row, want in zip(rows, result.epochs, strict=True):
        for column, value in (
            ("train_loss", want.train_loss),
            ("train_top1", want.train_top1),
            ("eval_loss", want.val_loss),
            ("eval_top1", want.val_top1),
            ("lr", want.lr),
        ):
            assert float(row[column]) == pytest.approx(value), column
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    points = events.Scalars("val/top1")
    assert [point.step for point in points] == [1, 2, 3]
    assert [p.value for p in points] == pytest.approx([row.val_top1 for row in result.epochs])
    assert {"train/loss", "train/top1", "val/loss", "lr"} <= set(events.Tags()["scalars"])


def test_a_loss_that_is_not_finite_stops_and_leaves_the_last_good_adapter(tmp_path):
    model = tuned()
    # Epoch 1 has learning rate 0; the first step of epoch 2 ruins the weights.
    recipe = Recipe(epochs=5, warmup_epochs=1, batch_size=8, lr=1e38)
    before = state(model)
    with pytest.raises(TrainingError, match=r"epoch 2, step 2 of 3.*epoch 1 is in .*last.*rate"):
        train(model, recipe, output=tmp_path, save=save)
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())
    loaded = load_adapter(backbone(), tmp_path / "last")
    assert torch.equal(loaded.head.weight, before["head.weight"])
    with open(tmp_path / "metrics.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == 1


def test_weights_that_are_ruined_by_the_last_step_are_not_saved(tmp_path):
    recipe = Recipe(epochs=1, batch_size=24, lr=1e38, weight_decay=1e3)
    with pytest.raises(TrainingError, match="weights are not finite after epoch 1; no epoch had"):
        train(tuned(LinearProbe()), recipe, output=tmp_path, save=save)
    assert not (tmp_path / "last").exists()


def test_the_watch_names_the_first_bad_step():
    good, bad = torch.tensor(1.0), torch.tensor(math.nan)
    watch = LossWatch(3)
    assert [watch.add(loss) for loss in (good, good, good, good, bad, bad)] == [None] * 5 + [5]
    assert watch.check() is None
    assert watch.add(bad) is None
    assert watch.check() == 7
    assert CHECK_INTERVAL > 1


class Interrupting:
    """A loader that raises SIGINT during its `at`-th batch."""

    def __init__(self, loader, at):
        self.loader, self.at, self.seen = loader, at, 0

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        for batch in self.loader:
            self.seen += 1
            if self.seen == self.at:
                raise KeyboardInterrupt
            yield batch


@pytest.mark.parametrize(("at", "epochs", "kept"), [(2, 0, None), (5, 1, 1)])
def test_ctrl_c_leaves_a_usable_adapter(tmp_path, at, epochs, kept):
    model = tuned()
    loader = Interrupting(make_loader(pictures(), 8), at)
    val = make_loader(pictures(6, seed=1), 6)
    recipe = Recipe(epochs=4, batch_size=8, warmup_epochs=0)
    result = fit(model, loader, recipe, val_batches=val, output=tmp_path, save=save, progress=False)
    assert result.interrupted
    assert (len(result.epochs), result.kept) == (epochs, kept)
    assert (tmp_path / "best").exists() == (epochs > 0)
    loaded = load_adapter(backbone(), tmp_path / "last")
    assert evaluate(loaded, val, progress=False).images == 6


def test_undecodable_images_are_skipped_counted_and_named():
    lines = []
    items = [*pictures(10), BROKEN, BROKEN._replace(path="b.png")]
    val = make_loader([*pictures(3), SkippedImage("v.png", "v.png cannot be decoded")], 4)
    result = train(
        tuned(), Recipe(epochs=2, batch_size=4), items, val_batches=val, log=lines.append
    )
    assert set(result.skipped) == {"broken.png", "b.png", "v.png"}
    messages = [line for line in lines if "skipped" in line]
    assert len(messages) == 1
    assert messages[0].startswith("skipped 3 images that cannot be decoded: ")
    assert "broken.png" in messages[0] and "v.png" in messages[0]


def test_a_data_set_without_a_good_image_is_an_error():
    with pytest.raises(TrainingError, match="none of the 2 images.*broken.png cannot be decoded"):
        train(tuned(), Recipe(epochs=1), [BROKEN, BROKEN])
    with pytest.raises(TrainingError, match="none of the 1 images"):
        evaluate(tuned(), make_loader([BROKEN], 1), progress=False)


def test_evaluation_is_the_plain_mean_over_images():
    model = tuned().train()
    items = pictures(10)
    result = evaluate(model, make_loader([*items, BROKEN], 4), progress=False)
    assert model.training
    model.eval()
    labels = torch.tensor([label for _, label in items])
    with torch.no_grad():
        logits = model(torch.stack([image for image, _ in items]))
    assert result.images == 10
    assert result.skipped == (BROKEN,)
    assert torch.equal(result.labels, labels)
    assert torch.equal(result.predictions, logits.argmax(1))
    assert result.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert result.top1 == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item())
    assert result.top5 == 100


@pytest.mark.parametrize("amp_dtype", ["bfloat16", "float16"])
def test_mixed_precision_trains_too(amp_dtype):
    model = tuned()
    recipe = Recipe(epochs=4, batch_size=8, lr=3.0, amp_dtype=amp_dtype, warmup_epochs=0)
    logits = []
    model.head.register_forward_hook(lambda module, inputs, output: logits.append(output.dtype))
    result = train(model, recipe)
    assert set(logits) == {recipe.autocast_dtype}
    assert result.epochs[-1].train_loss < 0.7 * result.epochs[0].train_loss
    assert model.head.weight.dtype == torch.float32


def test_devices_are_checked_by_name():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type in ("cpu", "cuda")
    absent = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(ValueError, match=f"'{absent}', but PyTorch sees .* use --device cpu"):
        resolve_device(absent)
    for name in ("gpu", "mps", "meta", ""):
        with pytest.raises(ValueError, match=f"device is '{name}'; choose auto"):
            resolve_device(name)


def test_the_loss_watch_waits_for_the_device_once_per_check(monkeypatch):
    asked = []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__"):
        own = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda t, own=own, name=name: asked.append(name) or own(t)
        )
    watch = LossWatch(20)
    assert [watch.add(torch.tensor(float(step))) for step in range(20)] == [None] * 20
    assert asked == ["tolist"]
    watch.add(torch.tensor(math.nan))
    assert watch.add(torch.tensor(1.0)) is None and asked == ["tolist"]
    assert watch.check() == 21
    assert watch.check() is None and len(asked) == 2


def test_a_step_does_not_wait_for_the_device(monkeypatch):
    model = tuned()
    step = TrainStep(model.train(), Recipe(batch_size=8, lr=1.0), 3)
    batches = list(make_loader(pictures(), 8))
    step(batches[0])  # creates the optimizer's state

    def waits(tensor, *_):
        raise AssertionError("a GPU would be waited for")

    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, waits)
    found = step(batches[1])
    monkeypatch.undo()
    assert found[2] == 8


@pytest.mark.parametrize("multithreading", [True, False])
def test_the_backward_pass_is_in_the_calling_thread(multithreading):
    """On a GPU PyTorch would run it in another; the caller's setting is restored afterwards."""
    model, seen = tuned(), []
    step = TrainStep(model.train(), Recipe(batch_size=8, lr=1.0), 3)
    model.head.weight.register_hook(lambda grad: seen.append(torch._C._is_multithreading_enabled()))
    with torch.autograd.set_multithreading_enabled(multithreading):
        step(next(iter(make_loader(pictures(), 8))))
        assert torch._C._is_multithreading_enabled() is multithreading
    assert seen == [False]
