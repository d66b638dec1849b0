"""Training loop: one epoch after another, until the last one or Ctrl-C."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from timm.utils import random_seed
from torch import nn
from torch.utils.data import DataLoader

from vpt_fast.train.common.interrupts import uninterrupted
from vpt_fast.train.common.metrics import Epoch, MetricsWriter
from vpt_fast.train.common.parallel import rank
from vpt_fast.train.common.recipe import Recipe
from vpt_fast.train.data.split import some
from vpt_fast.train.loop.checkpoint import load_checkpoint
from vpt_fast.train.loop.evaluate import progress_bar
from vpt_fast.train.loop.fit_result import LAST, FitResult
from vpt_fast.train.loop.run_state import RunState, SaveAdapter
from vpt_fast.train.loop.step import TrainStep


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
    """Train the parameters that `prompt_tune` left trainable in `model`.

    With `val_batches` the epoch of the highest validation accuracy, or mAP with several labels an
    image (then of the lowest loss), is selected, without them the last one; the model has the
    selected weights afterwards. Ctrl-C ends the run early and leaves the adapters that there are.
    The same seed, device and thread count give the same bits. Under autocast frozen weights are
    cast once (`FrozenCast`); `save` sees the original ones.

    Args:
        model: Tuned timm model, on the device to train on.
        batches: Training batches of `make_loader`, shuffled.
        recipe: Optimizer, schedule, precision, seed and loss, with class weights as numbers.
        val_batches: Validation batches.
        output: Existing folder for `metrics.csv`, `tensorboard/` and the adapters `last/` and,
            with validation, `best/`; and `checkpoint.pt`, replaced after every epoch. None writes
            nothing.
        save: Function called as `save(model, directory)` for each adapter; it replaces what is
            there.
        progress: Whether to show a bar on a terminal.
        description: Label of the bar.
        log: Function called with one line per epoch, and with the files that could not be decoded.
        resume: Whether to continue from the checkpoint in `output`, if there is one.
        net: Module that maps the batches' images to logits and holds `model`; `model` itself by
            default.
        cuda_graphs: Whether steps are replayed as CUDA graphs, as `TrainStep` takes it.

    Returns:
        A row of metrics per epoch, and how the run ended.

    Raises:
        ValueError: If the checkpoint is damaged or of another run, `cuda_graphs` is True with
            several processes, or the recipe does not fit the labels or lacks validation.
        TrainingError: If a loss is not finite (the model gets the weights of the last finished
            epoch back), or if no image could be decoded.
    """
    check_patience(recipe, val_batches is not None)
    random_seed(recipe.seed, rank())
    folder = None if output is None else Path(output)
    state = load_checkpoint(folder) if resume and folder is not None else None
    total = recipe.epochs * len(batches)
    with progress_bar(None, description, progress and not rank(), leave=True, total=total) as bar:
        net = model if net is None else net
        step = TrainStep(model, recipe, len(batches), net, cuda_graphs)
        run = RunState(model, batches, recipe, folder, save, bar, net, step)
        done = 0 if state is None else run.resume(state)
        bar.update(done * len(batches))
        metrics = MetricsWriter(None if rank() else folder, run.result.epochs)
        with closing(metrics), run.cast:
            _train(run, done, val_batches, metrics, log)
    run.result.kept = run.result.epochs[-1].epoch if run.result.epochs else None
    run.select()
    if run.best_epoch is not None:
        run.result.kept = run.best_epoch
    return run.result


def check_patience(recipe: Recipe, validates: bool) -> None:
    """Raise ValueError if a recipe has patience and there is no validation to wait for."""
    if recipe.patience is not None and not validates:
        raise ValueError(
            "patience counts epochs without a better validation score, and there is no val split; "
            "leave --patience out, or split off validation images"
        )


def _train(
    run: RunState,
    done: int,
    val_batches: DataLoader | None,
    metrics: MetricsWriter,
    log: Callable[[str], None] | None,
) -> None:
    """Run all epochs after number `done`, or until Ctrl-C."""
    epochs = run.recipe.epochs
    try:
        for epoch in range(done + 1, epochs + 1):
            if run.is_out_of_patience():
                run.result.stopped_early = True
                if log is not None:
                    patience = run.recipe.patience
                    log(f"stopped after epoch {epoch - 1}: none better on val for {patience}")
                break
            known, warned = len(run.result.skipped), run.result.warning
            row = run.run_epoch(epoch, val_batches)
            with uninterrupted():
                run.end_epoch(row)
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
            run.restore_finished()


def _summary(row: Epoch) -> str:
    text = f"loss {row.train_loss:.3f}"
    if row.train_top1 is not None:
        text += f", top-1 {row.train_top1:.1f}%"
    if row.score is not None:
        metric = "top-1" if row.val_map is None else "mAP"
        text += f", val loss {row.val_loss:.3f}, val {metric} {row.score:.1f}%"
    return f"{text}, {row.images_per_second:.0f} images/s"
