"""`run.json`: settings and outcome of a run, in its output folder.

It is written when training begins and again whenever more is known, so that the folder of a run
that was interrupted or killed is documented as well.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from vpt_fast import count_parameters
from vpt_fast.adapter.atomic import atomic_file
from vpt_fast.methods import to_dict
from vpt_fast.train.common.digest import digest
from vpt_fast.train.common.parallel import rank
from vpt_fast.train.data.split import ImageSource
from vpt_fast.train.loop.checkpoint import FILE as CHECKPOINT
from vpt_fast.train.loop.evaluate import Evaluation
from vpt_fast.train.loop.fit_result import FitResult
from vpt_fast.train.run.settings import RunSettings
from vpt_fast.version import __version__

FILE = "run.json"
FORMAT_VERSION = 1
RUNNING, FINISHED, INTERRUPTED, FAILED = "running", "finished", "interrupted", "failed"


@dataclass(frozen=True)
class RunRecord:
    """Record of a run, in JSON values.

    Attributes:
        state: RUNNING until training ends (and for ever if the run is killed); INTERRUPTED by
            Ctrl-C; FAILED if it could not continue, with `error`; else FINISHED.
        data: Data set: "directory", absolute; "format", one of `names.FORMATS`; "val_fraction",
            the part of the training images that was split off, or None; "class_order", as
            `ImageSource` has it; and a "digest" of the images' names, labels and sizes.
        images: Number of images of each split.
        class_names: Names of the classes, in the order of the labels.
        model: Backbone: "name" as the user gave it, "checkpoint" (absolute, or None), "pretrained",
            "img_size", and a digest of the "weights".
        method: Method, as `methods.to_dict` writes it.
        recipe: Fields of `Recipe`, with the learning rate and warm-up that None stands for.
        augmentation: Fields of `Augmentation`.
        image_options: Fields of `ImageOptions`.
        options: Remaining options of the run.
        parameters: Numbers of parameters, "trained" and "total".
        versions: Versions of vpt_fast, timm, torch and Python.
        kept_epoch: Epoch of the selected adapter; None while that is not known.
        test: Evaluation on test images: "loss", "top1" and "top5" in percent (with several labels
            an image "map"), and "images"; None without one.
        skipped: Number of training and validation images that could not be decoded.
        error: Reason that a run failed, or None.
        stopped_early: Whether the recipe's patience ended training.
        multi_label: Whether an image may have several labels.
    """

    state: str
    data: dict[str, Any]
    images: dict[str, int]
    class_names: list[str]
    model: dict[str, Any]
    method: dict[str, Any]
    recipe: dict[str, Any]
    augmentation: dict[str, Any]
    image_options: dict[str, Any]
    options: dict[str, Any]
    parameters: dict[str, int]
    versions: dict[str, str]
    kept_epoch: int | None = None
    test: dict[str, Any] | None = None
    skipped: int = 0
    error: str | None = None
    stopped_early: bool = False
    multi_label: bool = False

    def ended(self, result: FitResult) -> RunRecord:
        """Return the record of the run when training has ended."""
        return replace(
            self,
            state=INTERRUPTED if result.interrupted else FINISHED,
            kept_epoch=result.kept,
            skipped=len(result.skipped),
            stopped_early=result.stopped_early,
        )

    def failed(self, error: Exception) -> RunRecord:
        """Return the record of the run when training could not continue."""
        return replace(self, state=FAILED, error=str(error))

    def tested(self, test: Evaluation) -> RunRecord:
        """Return the record with the selected epoch's metrics on test images."""
        return replace(self, test=test.figures)


def new_record(
    settings: RunSettings, source: ImageSource, net: nn.Module, model: Mapping[str, Any]
) -> RunRecord:
    """Return the record of a run that begins.

    Args:
        settings: Settings of the run.
        source: Data set that was found in its directory.
        net: Tuned model.
        model: Section that `RunSettings.model_record` returns; "checkpoint" is a path or None.
    """
    checkpoint, recipe = model["checkpoint"], settings.recipe
    trained, total = count_parameters(net)
    return RunRecord(
        state=RUNNING,
        data={
            "directory": str(settings.directory.resolve()),
            "format": source.format,
            "val_fraction": settings.val_fraction,
            "class_order": source.class_order,
            "digest": data_digest(settings.directory, source),
        },
        images={name: len(split) for name, split in source.splits.items()},
        class_names=list(source.class_names),
        model={**model, "checkpoint": None if checkpoint is None else str(checkpoint.resolve())},
        method=to_dict(settings.method),
        recipe={**asdict(recipe), "lr": recipe.base_lr, "warmup_epochs": recipe.warmup},
        augmentation=asdict(settings.augmentation),
        image_options=asdict(settings.image_options),
        options=settings.options_record(),
        parameters={"trained": trained, "total": total},
        versions={
            "vpt_fast": __version__,
            "timm": str(timm.__version__),
            "torch": str(torch.__version__),
            "python": platform.python_version(),
        },
        multi_label=source.multi_label,
    )


def data_digest(directory: Path, source: ImageSource) -> str:
    """Return a digest of names, labels and sizes, which does not depend on the data's location.

    Args:
        directory: Folder of the data set, or its file.
        source: Data set that was found there.
    """
    return digest(
        {
            name: [
                [os.path.relpath(path, directory), label, _size(path)]
                for path, label in zip(split.names, split.labels, strict=True)
            ]
            for name, split in source.splits.items()
        }
    )


def _size(path: str) -> int | None:
    try:
        return os.stat(path).st_size
    except (OSError, ValueError):
        return None  # a row of a table, missing, or a name that no file can have


def write_record(folder: Path, record: RunRecord) -> None:
    """Write a record atomically: a process that is killed meanwhile leaves the earlier one.

    Args:
        folder: Existing output folder of the run.
        record: Record to write.
    """
    # Class names may hold surrogate escapes of bytes that are not UTF-8; JSON in ASCII keeps them.
    text = json.dumps({"format_version": FORMAT_VERSION, **asdict(record)}, indent=2) + "\n"
    with atomic_file(folder / FILE, "w", encoding="ascii") as file:
        file.write(text)


@contextmanager
def recording(folder: Path, record: RunRecord) -> Iterator[None]:
    """Write the record of a run on process 0, and update it if training fails.

    If training cannot continue, for whatever reason, the record says so; if it cannot begin (the
    checkpoint to resume from is of another run), the earlier record is restored.

    Args:
        folder: Existing output folder of the run.
        record: Record of the run that begins.
    """
    if rank():
        yield
        return
    path = folder / FILE
    earlier = path.read_bytes() if path.is_file() else None
    began = _last_epoch(folder)
    write_record(folder, record)
    try:
        yield
    except Exception as error:
        cannot_begin = isinstance(error, ValueError | TypeError) and began == _last_epoch(folder)
        if not cannot_begin:
            with suppress(OSError):  # on a full disk the earlier record stays
                write_record(folder, record.failed(error))
        elif earlier is None:
            path.unlink(missing_ok=True)
        else:
            with atomic_file(path, "wb") as file:
                file.write(earlier)
        raise


def _last_epoch(folder: Path) -> int | None:
    """Return the time of the checkpoint, which identifies its epoch; None without one."""
    path = folder / CHECKPOINT
    return path.stat().st_mtime_ns if path.is_file() else None


def read_record(folder: Path) -> RunRecord | None:
    """Read the record of a run; None if there is none.

    Args:
        folder: Output folder of the run.

    Raises:
        ValueError: If the file is damaged or of a newer version.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} is damaged: it holds {type(values).__name__}, not an object")
    version = values.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format {version}, this vpt_fast reads up to {FORMAT_VERSION}; upgrade it"
        )
    for name, types in _TYPES.items():
        if not isinstance(values.get(name), types):
            what = f"{name} is {values[name]!r}" if name in values else f"it has no {name!r}"
            raise ValueError(f"{path} is damaged: {what}")
    known = {field.name for field in fields(RunRecord)}
    return RunRecord(**{name: value for name, value in values.items() if name in known})


_TYPES: dict[str, Any] = {
    "state": str,
    "data": dict,
    "images": dict,
    "class_names": list,
    "kept_epoch": (int, type(None)),
    "test": (dict, type(None)),
    "error": (str, type(None)),
} | dict.fromkeys(
    (
        "model",
        "method",
        "recipe",
        "augmentation",
        "image_options",
        "options",
        "parameters",
        "versions",
    ),
    dict,
)
