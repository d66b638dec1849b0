"""`vpt-fast predict`: the most probable classes of images, by one adapter or by many."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from vpt_fast.cli.common import fail, one_line_errors
from vpt_fast.cli.options import AmpDtype, Checkpoint, Device
from vpt_fast.train.common.ranking import most_probable
from vpt_fast.train.common.recipe import Recipe
from vpt_fast.train.data import images as data
from vpt_fast.train.data.pictures import load_image, reading
from vpt_fast.train.loop.evaluate import autocast, resolve_device
from vpt_fast.train.run.bank_folder import open_bank
from vpt_fast.train.run.tuned_model import load_tuned

_BATCH = 64
"""Number of images of a bank's batch."""


def predict(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="[ADAPTER] IMAGE...",
            help="Folder of an adapter, or the output folder of a run, then image files; with "
            "--bank image files only.",
        ),
    ],
    bank: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder of many adapters of one backbone, which answer side by side in one batch.",
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="With --bank: the adapter's folder for every image, in the images' order and "
            "divided by commas, or one for all of them.",
        ),
    ] = None,
    checkpoint: Checkpoint = None,
    topk: Annotated[int, typer.Option(min=1, help="How many classes to name.")] = 5,
    amp_dtype: AmpDtype = "float32",
    device: Device = "auto",
) -> None:
    """Print the most probable classes of images, one line per image.

    Probabilities sum to 1, but for an adapter of images with several labels, where each class has
    one of its own.
    """
    with one_line_errors():
        where = resolve_device(device)
        dtype = Recipe(amp_dtype=amp_dtype).autocast_dtype
        if bank is None:
            if tasks is not None:
                raise ValueError("--tasks needs --bank, the folder that holds their adapters")
            if len(paths) < 2:
                raise ValueError("predict needs an ADAPTER and at least one IMAGE")
            images = paths[1:]
            answers = _by_adapter(paths[0], images, checkpoint, where, dtype)
        else:
            images = paths
            answers = _by_bank(bank, tasks, images, checkpoint, where, dtype)
        failed = []
        for image, answer in zip(images, answers, strict=True):
            if isinstance(answer, str):
                failed.append(answer)
                continue
            found = most_probable(answer.logits, answer.class_names, topk, answer.multi_label)
            text = ", ".join(f"{name} {100 * p:.2f}%" for name, p in found)
            typer.echo(f"{image}: {text}")
        if failed:
            fail("; ".join(failed), 1)


@dataclass(frozen=True)
class _Answer:
    """Logits (classes,) of an image, and the names of the classes, if there are any.

    With `multi_label` an image may show several of them.
    """

    logits: Tensor
    class_names: Sequence[str] | None
    multi_label: bool


def _prepared(path: Path, inputs: Mapping[str, Any]) -> Tensor | str:
    """Return an image as a model takes it, or the reason that it cannot be decoded."""
    how = reading(inputs)
    try:
        image = load_image(path, **how)
    except ValueError as error:
        return str(error)
    tensor: Tensor = data.eval_transform(inputs)(image)
    return tensor


def _by_adapter(
    adapter: Path,
    images: Sequence[Path],
    checkpoint: Path | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[_Answer | str]:
    loaded = load_tuned(adapter, checkpoint, device)
    for path in images:
        image = _prepared(path, loaded.inputs)
        if isinstance(image, str):
            yield image
            continue
        with torch.no_grad(), autocast(device, dtype):
            logits = loaded.net(image[None].to(device))[0]
        yield _Answer(logits, loaded.class_names, loaded.multi_label)


def _by_bank(
    directory: Path,
    tasks: str | None,
    images: Sequence[Path],
    checkpoint: Path | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[_Answer | str]:
    names = _names(directory, tasks, len(images))
    bank, _ = open_bank(directory, list(dict.fromkeys(names)), checkpoint, device)

    left = iter(zip(images, names, strict=True))
    while batch := list(islice(left, _BATCH)):
        prepared = [_prepared(path, bank.task(name).inputs) for path, name in batch]
        whole = [image for image in prepared if isinstance(image, Tensor)]
        if len({image.shape for image in whole}) > 1:
            raise ValueError("these tasks take images of different sizes; predict them apart")
        pairs = list(zip(batch, prepared, strict=True))
        asked = [name for (_, name), image in pairs if isinstance(image, Tensor)]
        logits: Iterator[Tensor] = iter(())
        if whole:
            with autocast(device, dtype):
                logits = iter(bank(torch.stack(whole).to(device), asked))
        for (_, name), image in pairs:
            if isinstance(image, str):
                yield image
            else:
                task = bank.task(name)
                yield _Answer(next(logits), task.class_names, task.multi_label)


def _names(directory: Path, tasks: str | None, count: int) -> list[str]:
    """Return the task of every image."""
    if tasks is None:
        raise ValueError(
            f"--bank needs --tasks: the name of a folder in {directory} for every image, divided "
            "by commas, or one for all"
        )
    names = [name.strip() for name in tasks.split(",")]
    if len(names) == 1:
        return names * count
    if len(names) != count:
        raise ValueError(
            f"--tasks names {len(names)} tasks for {count} images; give one or {count}"
        )
    return names
