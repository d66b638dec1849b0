"""Work of `vpt-fast train`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer
from tqdm import tqdm

from vpt_fast.cli.common import accuracy, report_skipped
from vpt_fast.methods import Method
from vpt_fast.train.common.class_weights import read_class_weights
from vpt_fast.train.common.paper_settings import PaperSettings, default_optimizer, paper_settings
from vpt_fast.train.common.parallel import rank
from vpt_fast.train.common.recipe import Recipe, resolve_amp_dtype
from vpt_fast.train.data.augmentation import Augmentation
from vpt_fast.train.data.image_options import ImageOptions
from vpt_fast.train.data.sources import check_format
from vpt_fast.train.run.folder_run import RunResult, tune_on_folder
from vpt_fast.train.run.settings import RunSettings

__all__ = [
    "Recipe",
    "RunSettings",
    "augmentation",
    "default_optimizer",
    "image_options",
    "read_class_weights",
    "resolve_amp_dtype",
    "run",
    "settings_of_paper",
]


def settings_of_paper(
    name: str | None, method: Method, directory: Path, data_format: str, fields: Mapping[str, Any]
) -> PaperSettings:
    """Return the settings of a paper for a method and a data set.

    Args:
        name: One of `paper_settings.PAPERS`, or None.
        method: Method to train.
        directory: Folder of the data set.
        data_format: Its format, one of `names.FORMATS`.
        fields: Options of the method; None where one is not given.
    """
    given = frozenset(name for name, value in fields.items() if value is not None)
    return paper_settings(name, method, check_format(directory, data_format), given)


def augmentation(
    paper: PaperSettings,
    scale: tuple[float, float],
    hflip: float,
    no_aug: bool,
    crops: str | None,
    more: tuple[str | None, float, float],
) -> Augmentation:
    """Return the augmentation that was asked for, or the paper's.

    Args:
        paper: Settings of the paper.
        scale, hflip, no_aug: Fields of `Augmentation`.
        crops: One of `names.CROPS`; None takes the paper's.
        more: Fields `aa`, `reprob` and `color_jitter`.
    """
    return Augmentation(scale, hflip, no_aug or not paper.augment, crops or paper.crops, *more)


def image_options(
    paper: PaperSettings,
    interpolation: str,
    antialias: bool,
    normalisation: str,
    resize: str | None,
    exif: bool,
) -> ImageOptions:
    """Return how images are resized and normalised, as was asked for, or as in the paper."""
    return ImageOptions(interpolation, antialias, normalisation, resize or paper.resize, exif)


def run(settings: RunSettings) -> None:
    """Tune a model on a folder and print how the run ended."""
    _report(tune_on_folder(settings, log=tqdm.write), settings)


def _report(result: RunResult, settings: RunSettings) -> None:
    """Print how a run ended, on process 0; exit with status 130 if Ctrl-C ended the run."""
    if rank():
        return
    rows, adapter = result.fit.epochs, result.adapter
    if result.fit.warning:
        typer.echo(f"warning: {result.fit.warning}", err=True)
    if result.fit.interrupted:
        typer.echo(
            f"interrupted after {len(rows)} of {settings.recipe.epochs} epochs; adapter: {adapter}"
        )
        raise typer.Exit(130)
    kept = next(row for row in rows if row.epoch == result.fit.kept)
    metric = "" if kept.val_map is None else "mAP "
    score = "" if kept.score is None else f", {metric}{kept.score:.2f}% on val"
    stopped = f" of {len(rows)}, stopped early" if result.fit.stopped_early else ""
    typer.echo(f"kept epoch {kept.epoch}{stopped}{score}")
    if result.test is not None:
        typer.echo(accuracy("test", result.test))
    typer.echo(f"adapter: {adapter}")
    if result.fit.skipped:
        count = len(result.fit.skipped)
        typer.echo(f"images skipped in training, as they cannot be decoded: {count}", err=True)
    if result.test is not None:
        report_skipped(result.test.skipped)
