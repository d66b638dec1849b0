"""State of a training run: one epoch, its validation, the adapters and the checkpoint."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from vpt_fast import trainable_parameters
from vpt_fast.methods import to_dict
from vpt_fast.models.tuned import Tuned, is_tuned
from vpt_fast.train.common.differences import first_difference
from vpt_fast.train.common.metrics import Epoch
from vpt_fast.train.common.parallel import gathered, rank, world_size
from vpt_fast.train.common.recipe import Recipe, head_layers
from vpt_fast.train.data.images import SkippedImage
from vpt_fast.train.loop.checkpoint import (
    State,
    random_state,
    restore_random_state,
    save_checkpoint,
)
from vpt_fast.train.loop.evaluate import TrainingError, device_of, evaluate, nothing_decoded
from vpt_fast.train.loop.fit_result import BEST, LAST, FitResult
from vpt_fast.train.loop.frozen_cast import FrozenCast
from vpt_fast.train.loop.loss_watch import CHECK_INTERVAL, LossWatch
from vpt_fast.train.loop.step import TrainStep
from vpt_fast.train.loop.trained_average import TrainedAverage

SaveAdapter = Callable[[nn.Module, Path], Any]

RISE_FACTOR = 6
"""Ratio of an epoch's loss to the lowest one from which a warning is given."""


class RunState:
    """State of one call of `fit`.

    Args:
        model: Tuned timm model, on its device.
        batches: Training batches.
        recipe: Optimizer, schedule, precision, seed, average of what is trained, and patience.
        output: Existing folder for adapters and checkpoint; None writes nothing.
        save: Function that writes an adapter, called as `save(model, directory)`.
        bar: Progress bar, advanced once per batch.
        net: Module that maps what batches hold to logits; `model` or one around it.
        step: Training step of `net`.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: DataLoader,
        recipe: Recipe,
        output: Path | None,
        save: SaveAdapter | None,
        bar: tqdm,
        net: nn.Module,
        step: TrainStep,
    ) -> None:
        self.net = net
        self.model, self.batches, self.recipe, self.bar = model, batches, recipe, bar
        self.output, self.save = output, save
        self.device = device_of(model)
        # With the buffers of what a method added: prompts may depend on them.
        self.tensors: list[torch.Tensor] = [t for _, t in trainable_parameters(model)]
        added = model.added_tensors().values() if isinstance(model, Tuned) else ()
        self.tensors += [t for t in added if not isinstance(t, nn.Parameter)]
        self.step = step
        self.average = TrainedAverage(model, recipe) if recipe.model_ema else None
        self.finished_average = self.averages()
        self.cast = FrozenCast(model, recipe.autocast_dtype)
        self.result = FitResult()
        self.finished = self.best = self.snapshot()
        self.best_score = (-math.inf, -math.inf)
        self.best_epoch: int | None = None
        # Cross-entropy of uniform predictions.
        self.lowest_loss = math.log(max(2, head_layers(model)[0].out_features))
        self.lowest_loss *= step.objective.largest_weight

    def snapshot(self) -> list[torch.Tensor]:
        """Return a copy of all trained parameters, and of the buffers beside them."""
        return [tensor.detach().clone() for tensor in self.tensors]

    @torch.no_grad()
    def restore(self, values: list[torch.Tensor]) -> None:
        """Set the trained parameters and buffers to what `snapshot` returned."""
        for tensor, value in zip(self.tensors, values, strict=True):
            tensor.copy_(value)

    def averages(self) -> list[torch.Tensor]:
        """Return a copy of the averages of what is trained; empty without any."""
        return [] if self.average is None else [value.clone() for value in self.average.values]

    def averaged(self) -> AbstractContextManager[None]:
        """Return a context in which the model has the averages of what is trained, if any."""
        return nullcontext() if self.average is None else self.average.in_model()

    def restore_finished(self) -> None:
        """Set the model to what the last finished epoch left, and the averages likewise."""
        self.restore(self.finished)
        if self.average is not None:
            self.average.load(self.finished_average)

    def select(self) -> None:
        """Give the model the weights of the selected epoch, for good."""
        if self.best_epoch is not None:
            self.restore(self.best)
        elif self.average is not None:
            self.average.write()

    def is_out_of_patience(self) -> bool:
        """Return whether as many epochs as the recipe allows have not been better."""
        patience, best = self.recipe.patience, self.best_epoch
        if patience is None or best is None:
            return False
        return self.result.epochs[-1].epoch - best >= patience

    def is_finite(self) -> bool:
        """Return whether all trained parameters and buffers are finite."""
        found = [torch.isfinite(tensor).all() for tensor in self.tensors]
        return bool(torch.stack(found).all())

    def save_as(self, name: str) -> None:
        """Write the adapter to the folder `name` in the output folder, on process 0."""
        if self.output is not None and self.save is not None and rank() == 0:
            with self.cast.originals(), self.averaged():
                self.save(self.model, self.output / name)

    def fail(self, what: str) -> NoReturn:
        """Restore the weights of the last finished epoch and raise TrainingError."""
        self.restore_finished()
        if not self.result.epochs:
            left = "no epoch had ended, so no adapter is kept"
        elif self.output is not None and self.save is not None:
            left = f"the adapter of epoch {self.result.epochs[-1].epoch} is in {self.output / LAST}"
        else:
            left = f"the model has the weights of epoch {self.result.epochs[-1].epoch} again"
        if self.average is not None:
            self.average.write()
        raise TrainingError(f"{what}; {left}. Try a smaller learning rate")

    def train_epoch(self, epoch: int) -> tuple[float, float | None, float]:
        """Train for one epoch and return the mean loss, the accuracy in percent and images/s.

        With several labels an image there is no accuracy, but None.
        """
        self.model.train()
        watch = LossWatch(1 if self.device.type == "cpu" else CHECK_INTERVAL)
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
                if self.average is not None:
                    self.average.update(self.step.taken)
                first = found if first is None else first
                self.check_step(watch.add(found[0]), epoch)
        self.check_step(watch.check(), epoch)
        skipped = [item for items in gathered(skipped) for item in items]
        self.result.skipped.update(dict(skipped))
        loss, correct, count = sums.tolist()
        if not count or first is None:
            raise TrainingError(nothing_decoded(skipped))
        self.compare_loss(loss / count, float(first[0] / first[2]), epoch)
        top1 = None if math.isnan(correct) else 100 * correct / count
        return loss / count, top1, count / (time.perf_counter() - start)

    def compare_loss(self, loss: float, first: float, epoch: int) -> None:
        """Set a warning if an epoch's mean loss is many times that of guessing or the lowest yet.

        Args:
            loss: Mean loss of the epoch.
            first: Mean loss of the epoch's first step.
            epoch: Number of the epoch, from 1.
        """
        self.lowest_loss = min(self.lowest_loss, first)
        if loss > RISE_FACTOR * self.lowest_loss and not self.result.warning:
            self.result.warning = (
                f"the loss is {loss:.3g} in epoch {epoch}, and {self.lowest_loss:.3g} before or by "
                f"guessing; try a smaller --lr than {self.recipe.base_lr:g}, or warm-up"
            )
        self.lowest_loss = min(self.lowest_loss, loss)

    def check_step(self, bad_step: int | None, epoch: int) -> None:
        """Raise TrainingError if a step of the epoch had a loss that is not finite."""
        if bad_step is not None:
            steps = len(self.batches)
            self.fail(f"the loss is not finite in epoch {epoch}, step {bad_step} of {steps}")

    def run_epoch(self, epoch: int, val_batches: DataLoader | None) -> Epoch:
        """Train for one epoch, validate, and return the metrics."""
        lr = self.step.lr
        train_loss, train_top1, rate = self.train_epoch(epoch)
        if not self.is_finite():
            self.fail(f"the trained weights are not finite after epoch {epoch}")
        row = Epoch(epoch, lr, train_loss, train_top1, rate)
        if val_batches is not None:
            with self.averaged():
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
            top1 = validation.top1 if validation.mean_ap is None else None
            row = replace(row, val_loss=validation.loss, val_top1=top1, val_map=validation.mean_ap)
        return row

    def end_epoch(self, row: Epoch) -> None:
        """Write adapters and checkpoint after an epoch, and set the next learning rate."""
        epoch = row.epoch
        self.finished = self.snapshot()
        self.finished_average = self.averages()
        self.result.epochs.append(row)
        self.save_as(LAST)
        if row.score is not None and row.val_loss is not None:
            score = (row.score, -row.val_loss)
            if score > self.best_score:
                with self.averaged():
                    best = self.finished if self.average is None else self.snapshot()
                self.best_score, self.best_epoch, self.best = score, epoch, best
                self.save_as(BEST)
        self.step.end_epoch(epoch)
        self.checkpoint(epoch)

    def checkpoint(self, epoch: int) -> None:
        """Write everything that the next epoch depends on."""
        if self.output is None:
            return
        states = gathered(random_state(self.batches))
        if rank():
            return
        state: State = {
            "epoch": epoch,
            "run": self.identity(),
            "values": self.finished,
            "average": self.finished_average,
            "best": self.best if self.best_epoch is not None else None,
            "best_epoch": self.best_epoch,
            "best_score": list(self.best_score),
            "step": self.step.state_dict(),
            "random": states,
            "epochs": [asdict(row) for row in self.result.epochs],
            "skipped": self.result.skipped,
            "warning": self.result.warning,
            "lowest_loss": self.lowest_loss,
            "initialised": self._initialised,
        }
        save_checkpoint(self.output, state)

    @property
    def _initialised(self) -> dict[str, int] | None:
        """What prompts were initialised from."""
        found = self.model.tune_record.initialised if isinstance(self.model, Tuned) else None
        return None if found is None else dict(found)

    def identity(self) -> State:
        """Return what has to be equal for a run to be resumed."""
        trained = trainable_parameters(self.model)
        return {
            "method": _method(self.model),
            "recipe": self.recipe.settings(),
            "trained": {name: list(parameter.shape) for name, parameter in trained},
            "steps of an epoch": len(self.batches),
            "processes": world_size(),
        }

    def resume(self, state: State) -> int:
        """Restore a checkpoint's state and return the number of its epoch.

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
        self.finished = self.best = self.snapshot()
        self.finished_average = [value.to(self.device) for value in state.get("average", [])]
        if self.average is not None:
            self.average.load(self.finished_average)
        self.best_epoch, self.best_score = state["best_epoch"], tuple(state["best_score"])
        if state["best"] is not None:
            self.best = [value.to(self.device) for value in state["best"]]
        self.step.load_state_dict(state["step"])
        self.result.epochs = [Epoch(**row) for row in state["epochs"]]
        self.result.skipped = dict(state["skipped"])
        self.result.warning, self.lowest_loss = state["warning"], state["lowest_loss"]
        if state.get("initialised") is not None:
            record: Any = self.model.tune_record
            record.initialised = state["initialised"]
        restore_random_state(state["random"][rank()], self.batches)
        return int(state["epoch"])


def _method(model: Any) -> State | None:
    """Return the method of a tuned model as a dictionary, or None for a plain one."""
    return to_dict(model.tune_record.method) if is_tuned(model) else None
