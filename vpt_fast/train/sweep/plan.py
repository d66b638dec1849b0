"""Plan of a sweep, and its execution in one process or several."""

from __future__ import annotations

import multiprocessing
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from timm.utils import random_seed

from vpt_fast.backbones import build as backbones
from vpt_fast.backbones.demo_backbone import DEMO_ARGS, DEMO_CHECKPOINT, demo_backbone
from vpt_fast.methods import Method
from vpt_fast.train.common.class_weights import with_class_weights
from vpt_fast.train.common.output_folder import Output
from vpt_fast.train.common.paper_settings import (
    LEARNING_RATES,
    SEEDS,
    WEIGHT_DECAYS,
    default_optimizer,
)
from vpt_fast.train.common.recipe import Recipe
from vpt_fast.train.data.augmentation import Augmentation
from vpt_fast.train.data.image_loaders import Loading, set_data_config
from vpt_fast.train.data.image_options import ImageOptions
from vpt_fast.train.data.sources import open_source
from vpt_fast.train.data.split import require_one_label
from vpt_fast.train.demo.task import CLASS_NAMES, load_splits
from vpt_fast.train.loop.epochs import check_patience
from vpt_fast.train.sweep.data import ArrayData, SourceData, SweepData
from vpt_fast.train.sweep.report import PICTURE, TABLE
from vpt_fast.train.sweep.sweep import JOURNAL, Candidate, Result, Sweep
from vpt_fast.train.sweep.task import SweepTask

ADAPTERS = "adapters"
"""Folder of the final runs' adapters, in the sweep's folder."""
FOLDER = Output(
    "sweep",
    lambda folder: (folder / JOURNAL).is_file(),
    re.compile(rf"{re.escape(JOURNAL)}.*|{re.escape(TABLE)}|{re.escape(PICTURE)}|{ADAPTERS}"),
    JOURNAL,
)


@dataclass(frozen=True)
class SweepPlan:
    """Settings that a process needs to take part in a sweep.

    Attributes:
        output: Folder of the sweep.
        candidates: Methods with their grids.
        directory: Folder of the data set; None takes the demo's digits and its backbone.
        data_format: Format of the data set, one of `names.FORMATS`.
        val_fraction, class_order: Validation split and order of classes, as `open_source` takes
            them.
        model, checkpoint, pretrained, img_size: Backbone, as `RunSettings` has it.
        seeds: Seeds of the final runs.
        augmentation: Augmentation of training images.
        image_options: How images are resized and normalised.
        memory: Memory mode, as `vpt_fast.prompt_tune` takes it.
        cache, workers: Caching and workers, as `image_loaders.Loading` takes them.
        device: Device to train on.
    """

    output: Path
    candidates: tuple[Candidate, ...]
    directory: Path | None = None
    data_format: str = "auto"
    val_fraction: float | None = None
    class_order: str | None = None
    model: str = ""
    checkpoint: Path | None = None
    pretrained: bool = False
    img_size: int | None = None
    seeds: tuple[int, ...] = SEEDS
    augmentation: Augmentation = field(default_factory=Augmentation)
    image_options: ImageOptions = field(default_factory=ImageOptions)
    memory: str = "speed"
    cache: str = "auto"
    workers: int | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def identity(self) -> dict[str, Any]:
        """Return the settings that have to be equal for results to belong to one sweep."""
        # What is not given is left out, so that sweeps of earlier versions go on.
        chosen = {"val_fraction": self.val_fraction, "class_order": self.class_order}
        return {name: value for name, value in chosen.items() if value is not None} | {
            "data": "demo" if self.directory is None else self.directory.resolve().name,
            "format": self.data_format,
            "model": self.model,
            "checkpoint": self.checkpoint.name if self.checkpoint else None,
            "img_size": self.img_size,
            "augmentation": self.augmentation.settings(),
            "images": asdict(self.image_options),
        }


def candidate(
    method: Method,
    recipe: Recipe,
    lrs: Mapping[str, tuple[float, ...]] | None = None,
    weight_decays: tuple[float, ...] = WEIGHT_DECAYS,
    prompts: tuple[int, ...] = (),
    opt: str | None = None,
    paper: str | None = None,
) -> Candidate:
    """Return a method with the papers' optimizer and grids, where no others are given.

    Args:
        method: Method to train.
        recipe: Recipe whose optimizer is replaced.
        lrs: Base learning rates to choose from, by optimizer.
        weight_decays: Weight decays to choose from.
        prompts: Numbers of prompts to choose from; none takes the method's own.
        opt: Optimizer; None takes the papers'.
        paper: One of `paper_settings.PAPERS` whose batch size is used, or None.
    """
    opt = default_optimizer(method) if opt is None else opt
    grid = {**LEARNING_RATES, **(lrs or {})}
    return Candidate(method, replace(recipe, opt=opt), grid[opt], weight_decays, prompts, paper)


def run_plan(
    plan: SweepPlan,
    processes: int = 1,
    log: Callable[[str], None] = print,
    progress: bool = True,
    overwrite: bool = False,
) -> list[Result]:
    """Train what is missing of a sweep, here and in `processes - 1` more processes.

    Each process holds the backbone and the images. They share the journal, as would processes on
    other machines that are started with the same plan.

    Args:
        plan: Plan of the sweep.
        processes: Number of processes on this machine; the CPU's threads are divided among them.
        log: Function called with a line for every run.
        progress: Whether a single process shows bars on a terminal.
        overwrite: Whether an earlier sweep in the folder is removed first.

    Raises:
        FileExistsError: If the folder holds something else, and no sweep that could go on.
        ValueError: If `processes` is less than 1, or the plan does not fit the data, the model or
            the journal.
        TrainingError: If no run of a method's selection has ended.
    """
    if processes < 1:
        raise ValueError(f"processes is {processes}; it must be at least 1")
    if overwrite:
        FOLDER.check(plan.output, overwrite)
    elif not (FOLDER.is_free(plan.output) or FOLDER.is_own(plan.output)):
        raise FileExistsError(
            f"{plan.output} holds other files and no sweep that could go on; choose another "
            "--output"
        )
    with _threads(processes):
        # Before the other processes start, so that an error is reported once.
        sweep = _sweep(plan, log, progress and processes == 1, overwrite)
        context = multiprocessing.get_context("spawn")
        others = [
            context.Process(target=_take_part, args=(plan, processes), daemon=True)
            for _ in range(processes - 1)
        ]
        for other in others:
            other.start()
        try:
            results = sweep.run(plan.candidates)
        finally:
            for other in others:
                other.terminate()
                other.join()
    return results


def _take_part(plan: SweepPlan, processes: int) -> None:
    """Run one of the other processes, which writes to the journal and logs its runs."""
    with _threads(processes):
        _sweep(plan, _print_line, progress=False).run(plan.candidates)


def _print_line(line: str) -> None:
    print(line, flush=True)


@contextmanager
def _threads(processes: int) -> Iterator[None]:
    """Divide the CPU's threads among processes within a context."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before // processes))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _sweep(
    plan: SweepPlan, log: Callable[[str], None], progress: bool, overwrite: bool = False
) -> Sweep:
    task = _demo_task(plan, progress) if plan.directory is None else _task(plan, log, progress)
    if overwrite:
        FOLDER.clear(plan.output)
    return Sweep(plan.output, task, plan.seeds, log, plan.identity())


def _demo_task(plan: SweepPlan, progress: bool) -> SweepTask:
    digits = load_splits()
    random_seed(plan.seeds[0])
    net = demo_backbone(num_classes=len(CLASS_NAMES)).to(plan.device)
    options: dict[str, Any] = {"class_names": CLASS_NAMES, "model_args": DEMO_ARGS}
    options |= {"checkpoint": DEMO_CHECKPOINT.name, "dataset": "handwritten digits"}
    data = ArrayData(digits.train, digits.val, digits.test)
    return _sweep_task(plan, net, data, progress, options)


def _task(plan: SweepPlan, log: Callable[[str], None], progress: bool) -> SweepTask:
    if plan.directory is None:
        raise ValueError("the plan has no data")
    name, weights, model_args = backbones.resolve_name(plan.model, plan.checkpoint, plan.img_size)
    source = require_one_label(
        open_source(
            plan.directory,
            plan.data_format,
            val_fraction=plan.val_fraction,
            class_order=plan.class_order,
        )
    )
    classes = source.class_names
    for one in plan.candidates:
        check_patience(one.recipe, validates=False)
        with_class_weights(one.recipe, source.splits["train"].labels, classes)
    if ":" not in name:
        for one in plan.candidates:
            backbones.tunable_on_meta(name, len(classes), one.method, model_args)
    random_seed(plan.seeds[0])
    net: Any = backbones.create_backbone(
        name,
        len(classes),
        pretrained=plan.pretrained,
        checkpoint=weights,
        model_args=model_args,
    )
    config = set_data_config(net, plan.image_options)
    loading = Loading(config, plan.augmentation, plan.device, plan.workers, plan.cache)
    data = SourceData(source, loading)
    for line in source.warnings:
        log(f"warning: {line}")
    options = {
        "class_names": classes,
        "model_args": model_args,
        "checkpoint": weights.name if weights else None,
        "dataset": plan.directory.resolve().name,
    }
    return _sweep_task(plan, net.to(plan.device), data, progress, options)


def _sweep_task(
    plan: SweepPlan, net: Any, data: SweepData, progress: bool, options: dict[str, Any]
) -> SweepTask:
    adapters = plan.output / ADAPTERS
    return SweepTask(net, data, progress, adapters, options, plan.memory)
