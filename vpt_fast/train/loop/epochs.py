"""The training loop: one epoch after another, evaluation, and what is kept of a run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from timm.utils import random_seed
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from vpt_fast import trainable_parameters
from vpt_fast.methods import to_dict
from vpt_fast.models.tuned import is_tuned
from vpt_fast.train.common.differences import first_difference
from vpt_fast.train.common.interrupts import uninterrupted
from vpt_fast.train.common.metrics import Epoch, MetricsWriter
from vpt_fast.train.common.parallel import gathered, rank, world_size
from vpt_fast.train.common.recipe import Recipe, head_layers
from vpt_fast.train.data.images import SkippedImage
from vpt_fast.train.data.split import some
from vpt_fast.train.loop.checkpoint import (
    State,
    load_checkpoint,
    random_state,
    restore_random_state,
    save_checkpoint,
)
from vpt_fast.train.loop.evaluate import (
    TrainingError,
    device_of,
    evaluate,
    nothing_decoded,
    progress_bar,
)
from vpt_fast.train.loop.frozen_cast import FrozenCast
from vpt_fast.train.loop.loss_watch import LOOK_EVERY, LossWatch
from vpt_fast.train.loop.step import TrainStep

SaveAdapter = Callable[[nn.Module, Path], Any]

# The adapters of a run, in its output folder.
BEST, LAST = "best", "last"

RISE = 6
"""How many times the lowest loss an epoch's is to be said."""


@dataclass
class FitResult:
    """What a run did.

    Attributes:
        epochs: A row per finished epoch.
        kept: The epoch whose weights the model has now (best on validation, else the last one).
        interrupted: Whether Ctrl-C ended the run.
        skipped: Images that could not be decoded.
        warning: That the loss has risen, and what may help; "" if it has not.
    """

    epochs: list[Epoch] = field(default_factory=list)
    kept: int | None = None
    interrupted: bool = False
    skipped: dict[str, str] = field(default_factory=dict)
    warning: str = ""

    @property
    def images_per_second(self) -> float:
        """The median throughput of the training epochs."""
        rates = sorted(epoch.images_per_second for epoch in self.epochs)
        return rates[len(rates) // 2] if rates else math.nan


class _Run:
    """The state of one call of `fit`."""

    def __init__(
        self,
        model: nn.Module,
        batches: DataLoader,
        recipe: Recipe,
        output: Path | None,
        save: SaveAdapter | None,
        bar: tqdm,
        net: nn.Module,
        cuda_graphs: bool | None,
    ) -> None:
        self.net = net
        self.model, self.batches, self.recipe, self.bar = model, batches, recipe, bar
        self.output, self.save = output, save
        self.device = device_of(model)
        self.parameters = [parameter for _, parameter in trainable_parameters(model)]
        self.step = TrainStep(model, recipe, len(batches), net, cuda_graphs)
        self.cast = FrozenCast(model, recipe.autocast_dtype)
        self.result = FitResult()
        self.good = self.best = self.snapshot()
        self.best_score = (-math.inf, -math.inf)
        self.best_epoch: int | None = None
        self.lowest_loss = math.log(max(2, head_layers(model)[0].out_features))  # of guessing

    def snapshot(self) -> list[torch.Tensor]:
        return [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def restore(self, values: list[torch.Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)

    def is_finite(self) -> bool:
        found = [torch.isfinite(parameter).all() for parameter in self.parameters]
        return bool(torch.stack(found).all())

    def save_as(self, name: str) -> None:
        if self.output is not None and self.save is not None and rank() == 0:
            with self.cast.originals():
                self.save(self.model, self.output / name)

    def fail(self, what: str) -> NoReturn:
        self.restore(self.good)
        if not self.result.epochs:
            kept = "no epoch had ended, so no adapter is kept"
        elif self.output is not None and self.save is not None:
            kept = f"the adapter of epoch {self.result.epochs[-1].epoch} is in {self.output / LAST}"
        else:
            kept = f"the model has the weights of epoch {self.result.epochs[-1].epoch} again"
        raise TrainingError(f"{what}; {kept}. Try a smaller learning rate")

    def train_epoch(self, epoch: int) -> tuple[float, float, float]:
        """Trains for one epoch; returns the mean loss, the accuracy in percent and images/s."""
        self.model.train()
        watch = LossWatch(1 if self.device.type == "cpu" else LOOK_EVERY)
        sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        skipped: list[SkippedImage] = []
        first: torch.Tensor | None = None
        start = time.perf_counter()
        for batch in self.batches:
            self.bar.update()
            skipped.extend(batch.skipped)
            found = self.step(batch)
            if found is not None:
                sums += found
                first = found if first is None else first
                self.check_step(watch.add(found[0]), epoch)
        self.check_step(watch.look(), epoch)
        skipped = [item for items in gathered(skipped) for item in items]
        self.result.skipped.update(dict(skipped))
        loss, correct, count = sums.tolist()
        if not count or first is None:
            raise TrainingError(nothing_decoded(skipped))
        self.compare_loss(loss / count, float(first[0] / first[2]), epoch)
        return loss / count, 100 * correct / count, count / (time.perf_counter() - start)

    def compare_loss(self, loss: float, first: float, epoch: int) -> None:
        """Notes that an epoch's mean loss is many times the lowest: of guessing, or so far."""
        self.lowest_loss = min(self.lowest_loss, first)
        if loss > RISE * self.lowest_loss and not self.result.warning:
            self.result.warning = (
                f"the loss is {loss:.3g} in epoch {epoch}, and {self.lowest_loss:.3g} before or by "
                f"guessing; try a smaller --lr than {self.recipe.base_lr:g}, or warm-up"
            )
        self.lowest_loss = min(self.lowest_loss, loss)

    def check_step(self, bad_step: int | None, epoch: int) -> None:
        if bad_step is not None:
            steps = len(self.batches)
            self.fail(f"the loss is not finite in epoch {epoch}, step {bad_step} of {steps}")

    def run_epoch(self, epoch: int, val_batches: DataLoader | None) -> Epoch:
        """Trains and validates."""
        lr = self.step.lr
        train_loss, train_top1, rate = self.train_epoch(epoch)
        if not self.is_finite():
            self.fail(f"the trained weights are not finite after epoch {epoch}")
        row = Epoch(epoch, lr, train_loss, train_top1, rate)
        if val_batches is not None:
            validation = evaluate(
                self.net,
                val_batches,
                amp_dtype=self.recipe.autocast_dtype,
                progress=not self.bar.disable,
                description="validating",
            )
            if not math.isfinite(validation.loss):
                self.fail(f"the validation loss is not finite after epoch {epoch}")
            self.result.skipped.update(dict(validation.skipped))
            row = replace(row, val_loss=validation.loss, val_top1=validation.top1)
        return row

    def keep(self, row: Epoch) -> None:
        """Keeps and saves what is worth it of an epoch that has ended."""
        epoch = row.epoch
        self.good = self.snapshot()
        self.result.epochs.append(row)
        self.save_as(LAST)
        if row.val_top1 is not None and row.val_loss is not None:
            score = (row.val_top1, -row.val_loss)
            if score > self.best_score:
                self.best_score, self.best_epoch, self.best = score, epoch, self.good
                self.save_as(BEST)
        self.step.end_epoch(epoch)
        self.checkpoint(epoch)

    def checkpoint(self, epoch: int) -> None:
        """Writes all that the next epoch depends on."""
        if self.output is None:
            return
        states = gathered(random_state(self.batches))
        if rank():
            return
        state: State = {
            "epoch": epoch,
            "run": self.identity(),
            "values": self.good,
            "best": self.best if self.best_epoch is not None else None,
            "best_epoch": self.best_epoch,
            "best_score": list(self.best_score),
            "step": self.step.state_dict(),
            "random": states,
            "epochs": [asdict(row) for row in self.result.epochs],
            "skipped": self.result.skipped,
            "warning": self.result.warning,
            "lowest_loss": self.lowest_loss,
        }
        save_checkpoint(self.output, state)

    def identity(self) -> State:
        """What has to be the same for a run to go on."""
        trained = trainable_parameters(self.model)
        return {
            "method": _method(self.model),
            "recipe": asdict(self.recipe),
            "trained": {name: list(parameter.shape) for name, parameter in trained},
            "steps of an epoch": len(self.batches),
            "processes": world_size(),
        }

    def resume(self, state: State) -> int:
        """Takes up a checkpoint's state; returns its epoch.

        Raises:
            ValueError: If the checkpoint is of another run.
        """
        for name, mine in self.identity().items():
            theirs = state["run"].get(name)
            if mine != theirs:
                what, before, now = first_difference(theirs, mine)
                differs = f"has {what} {before}, not {now}" if what else f"is {before}, not {now}"
                raise ValueError(
                    f"the checkpoint is of another run: its {name} {differs}; "
                    "resume with the options that the run was started with"
                )
        self.restore(state["values"])
        self.good = self.best = self.snapshot()
        self.best_epoch, self.best_score = state["best_epoch"], tuple(state["best_score"])
        if state["best"] is not None:
            self.best = [value.to(self.device) for value in state["best"]]
        self.step.load_state_dict(state["step"])
        self.result.epochs = [Epoch(**row) for row in state["epochs"]]
        self.result.skipped = dict(state["skipped"])
        self.result.warning, self.lowest_loss = state["warning"], state["lowest_loss"]
        restore_random_state(state["random"][rank()], self.batches)
        return int(state["epoch"])


def _method(model: Any) -> State | None:
    """What a tuned model was tuned with."""
    return to_dict(model.tune_record.method) if is_tuned(model) else None


def fit(
    model: nn.Module,
    batches: DataLoader,
    recipe: Recipe,
    *,
    val_batches: DataLoader | None = None,
    output: str | Path | None = None,
    save: SaveAdapter | None = None,
    progress: bool = True,
    description: str = "training",
    log: Callable[[str], None] | None = None,
    resume: bool = False,
    net: nn.Module | None = None,
    cuda_graphs: bool | None = None,
) -> FitResult:
    """Trains what `prompt_tune` left trainable in `model`.

    With `val_batches` the epoch of the highest validation accuracy (then of the lowest loss) is
    kept, without them the last one; the model has the kept weights afterwards. Ctrl-C ends the
    run early and keeps what there is. The same seed, device and thread count give the same bits.
    Under autocast frozen weights are cast once (`FrozenCast`); `save` sees the original ones.

    Args:
        model: A prompted timm model, on the device to train on.
        batches: Training batches of `make_loader`, shuffled.
        recipe: Optimizer, schedule, precision and seed.
        val_batches: Validation batches.
        output: An existing folder for `metrics.csv`, `tensorboard/` and the adapters `last/` and,
            with validation, `best/`; and `checkpoint.pt`, replaced after every epoch. None writes
            nothing.
        save: Called as `save(model, directory)` for each adapter; it replaces what is there.
        progress: Whether to show a bar on a terminal.
        description: The bar's label.
        log: Called with one line per epoch, and with the files that could not be decoded.
        resume: Whether to go on from the checkpoint in `output`, if there is one.
        net: What maps the batches' images to logits and holds `model`; `model` itself by default.
        cuda_graphs: As `TrainStep` takes it.

    Raises:
        ValueError: If the checkpoint is damaged or of another run, or `cuda_graphs` is True with
            several processes.
        TrainingError: If a loss is not finite (the model gets the weights of the last finished
            epoch back), or if no image could be decoded.
    """
    random_seed(recipe.seed, rank())
    folder = None if output is None else Path(output)
    state = load_checkpoint(folder) if resume and folder is not None else None
    total = recipe.epochs * len(batches)
    with progress_bar(None, description, progress and not rank(), leave=True, total=total) as bar:
        net = model if net is None else net
        run = _Run(model, batches, recipe, folder, save, bar, net, cuda_graphs)
        done = 0 if state is None else run.resume(state)
        bar.update(done * len(batches))
        metrics = MetricsWriter(None if rank() else folder, run.result.epochs)
        with closing(metrics), run.cast:
            _train(run, done, val_batches, metrics, log)
    run.result.kept = run.result.epochs[-1].epoch if run.result.epochs else None
    if run.best_epoch is not None:
        run.restore(run.best)
        run.result.kept = run.best_epoch
    return run.result


def _train(
    run: _Run,
    done: int,
    val_batches: DataLoader | None,
    metrics: MetricsWriter,
    log: Callable[[str], None] | None,
) -> None:
    """All epochs after `done`, or until Ctrl-C."""
    epochs = run.recipe.epochs
    try:
        for epoch in range(done + 1, epochs + 1):
            known, warned = len(run.result.skipped), run.result.warning
            row = run.run_epoch(epoch, val_batches)
            with uninterrupted():
                run.keep(row)
                metrics.add(row)
            run.bar.set_postfix_str(_summary(row), refresh=False)
            if log is not None:
                log(f"epoch {epoch}/{epochs}  {_summary(row)}")
                if run.result.warning != warned:
                    log(f"warning: {run.result.warning}")
                new = list(run.result.skipped)[known:]
                if new:
                    why = some([run.result.skipped[name] for name in new], 10)
                    log(f"skipped {len(new)} images that cannot be decoded: {why}")
    except KeyboardInterrupt:
        run.result.interrupted = True
        if run.is_finite():
            with uninterrupted():
                run.save_as(LAST)
        else:
            run.restore(run.good)


def _summary(row: Epoch) -> str:
    text = f"loss {row.train_loss:.3f}, top-1 {row.train_top1:.1f}%"
    if row.val_top1 is not None:
        text += f", val loss {row.val_loss:.3f}, val top-1 {row.val_top1:.1f}%"
    return f"{text}, {row.images_per_second:.0f} images/s"
