"""Work of `vpt-fast sweep`: from its options to a plan, from its results to a table and files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import typer
from tqdm import tqdm

from vpt_fast.cli.common import check_some_prompts, make_method, settings_of_each
from vpt_fast.cli.work.train import augmentation, image_options
from vpt_fast.train.common.class_weights import read_class_weights
from vpt_fast.train.common.paper_settings import (
    PaperSettings,
    default_optimizer,
    paper_settings,
)
from vpt_fast.train.common.recipe import Recipe, resolve_amp_dtype
from vpt_fast.train.data.sources import check_format
from vpt_fast.train.loop.evaluate import resolve_device
from vpt_fast.train.sweep.plan import SweepPlan, candidate, run_plan
from vpt_fast.train.sweep.preset import EPOCHS, demo_plan
from vpt_fast.train.sweep.report import table, write
from vpt_fast.train.sweep.sweep import Candidate

__all__ = [
    "Grid",
    "Runs",
    "SweepPlan",
    "augmentation",
    "candidates",
    "check_preset",
    "data_set",
    "image_options",
    "preset_plan",
    "read_class_weights",
    "resolve_amp_dtype",
    "resolve_device",
    "run",
    "values",
]

Value = TypeVar("Value", int, float, str)

_PRESETS = ("demo",)
_WITH_PRESET = (
    "--preset",
    "--output",
    "--seeds",
    "--epochs",
    "--processes",
    "--device",
    "--overwrite",
)


@dataclass(frozen=True)
class Grid:
    """Values to choose from, as texts with commas; None takes the papers'.

    Attributes:
        methods: Names of methods.
        lrs: Base learning rates of methods that are trained with SGD.
        adamw_lrs: Base learning rates of methods that are trained with AdamW.
        weight_decays: Weight decays.
        num_prompts: Numbers of prompts.
        settings: Fields, "name=value", of those methods that have them.
    """

    methods: str
    lrs: str | None
    adamw_lrs: str | None
    weight_decays: str | None
    num_prompts: str
    settings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Runs:
    """Options that all runs of a sweep share; None takes the default.

    Attributes:
        paper: One of `paper_settings.PAPERS`.
        epochs: Number of epochs of a run.
        batch_size: Images per step.
        opt: Optimizer.
        amp_dtype: Type that torch.autocast computes in.
        more: Further fields of `Recipe`, by name.
    """

    paper: str | None
    epochs: int | None
    batch_size: int | None
    opt: str | None
    amp_dtype: str
    more: Mapping[str, Any] = field(default_factory=dict)


def check_preset(preset: str, directory: Path | None, given: Iterable[str]) -> None:
    """Raise ValueError if a preset is not known, or an option is given that it sets itself.

    Args:
        preset: Name of the preset.
        directory: Data that the user named; there must be none.
        given: Options on the command line.
    """
    if preset not in _PRESETS:
        raise ValueError(f"--preset is {preset!r}; choose one of {', '.join(_PRESETS)}")
    if directory is not None:
        raise ValueError(f"--preset {preset} has its own data; leave {directory} out")
    others = [option for option in given if option not in _WITH_PRESET]
    if others:
        raise ValueError(
            f"--preset {preset} has its own settings; leave {', '.join(others)} out: it takes "
            f"{', '.join(_WITH_PRESET[1:])}"
        )


def preset_plan(
    output: Path, device: torch.device, seeds: tuple[int, ...], epochs: int | None
) -> tuple[SweepPlan, str]:
    """Return the plan of the preset, and the title of its picture.

    Args:
        output: Folder of the sweep.
        device: Device to train on.
        seeds: Seeds of the final runs.
        epochs: Number of epochs of a run; None takes the preset's.
    """
    plan = demo_plan(output, device, seeds, EPOCHS if epochs is None else epochs)
    return plan, f"Handwritten digits, {plan.candidates[0].recipe.epochs} epochs"


def data_set(directory: Path | None, data_format: str) -> tuple[Path, str]:
    """Return the folder of the data and its format, one of `names.FORMATS` but "auto".

    Raises:
        ValueError: If there is no directory, or its format is not known.
    """
    if directory is None:
        raise ValueError("there is no DIR; name a data set, or --preset demo")
    return directory, check_format(directory, data_format)


def candidates(
    grid: Grid, runs: Runs, data_format: str
) -> tuple[tuple[Candidate, ...], PaperSettings]:
    """Return every method with its grid, and the paper's settings for the images.

    Args:
        grid: Values to choose from.
        runs: Options that all runs share.
        data_format: Format of the data set.

    Raises:
        ValueError, TypeError: If a value cannot be used.
    """
    grids = {
        name: tuple(values(flag, text, float))
        for name, flag, text in (
            ("sgd", "lrs", grid.lrs),
            ("adamw", "adamw-lrs", grid.adamw_lrs),
            ("adam", "adamw-lrs", grid.adamw_lrs),
        )
        if text is not None
    }
    decays: dict[str, Any] = (
        {}
        if grid.weight_decays is None
        else {"weight_decays": tuple(values("weight-decays", grid.weight_decays, float))}
    )
    prompts = tuple(values("num-prompts", grid.num_prompts, int))
    check_some_prompts(prompts)
    found: list[Candidate] = []
    names = values("methods", grid.methods, str)
    for name, settings in zip(names, settings_of_each(names, grid.settings), strict=True):
        tuned = make_method(name, {}, settings)
        paper = paper_settings(runs.paper, tuned, data_format)
        recipe = Recipe(
            epochs=100 if runs.epochs is None else runs.epochs,
            batch_size=paper.batch_size if runs.batch_size is None else runs.batch_size,
            amp_dtype=runs.amp_dtype,
            opt=default_optimizer(tuned) if runs.opt is None else runs.opt,
            **runs.more,
        )
        found.append(
            candidate(
                paper.method,
                recipe,
                grids,
                prompts=prompts,
                opt=runs.opt,
                paper=runs.paper if runs.batch_size is None else None,
                **decays,
            )
        )
    return tuple(found), paper


def run(plan: SweepPlan, processes: int, title: str, overwrite: bool = False) -> None:
    """Train what is missing of a sweep, print its table and write its files.

    Args:
        plan: Plan of the sweep.
        processes: Number of processes that share the runs.
        title: Title of the picture.
        overwrite: Whether an earlier sweep in the folder is removed first.
    """
    try:
        results = run_plan(plan, processes, tqdm.write, overwrite=overwrite)
    except KeyboardInterrupt:
        typer.echo(f"interrupted; the same command goes on in {plan.output}")
        raise typer.Exit(130) from None
    typer.echo(table(results))
    written = write(plan.output, results, title)
    typer.echo(f"written to {plan.output}: {', '.join(path.name for path in written)}, adapters/")


def values(flag: str, text: str, kind: Callable[[str], Value]) -> list[Value]:
    """Return the distinct values of a list with commas, in order.

    Args:
        flag: Name of the option without its dashes, for messages.
        text: The list.
        kind: Type of the values: int, float or str.

    Raises:
        ValueError: If a value is not of that kind, or there is none.
    """
    try:
        found = [kind(part.strip()) for part in text.split(",") if part.strip()]
    except ValueError:
        found = []
    if not found:
        what = {int: "whole numbers", float: "numbers"}.get(kind, "names")  # type: ignore[call-overload]
        raise ValueError(f"--{flag} is {text!r}; give {what} with commas between them")
    return list(dict.fromkeys(found))
