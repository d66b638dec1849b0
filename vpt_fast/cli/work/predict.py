"""Work of `vpt-fast predict`."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor

from vpt_fast.adapter.atomic import atomic_file
from vpt_fast.cli.common import fail
from vpt_fast.train.common.output_folder import Output, starts_with
from vpt_fast.train.common.ranking import most_probable, percent
from vpt_fast.train.common.recipe import Recipe, resolve_amp_dtype
from vpt_fast.train.data import images as data
from vpt_fast.train.data.formats.class_folders import counted, find_images
from vpt_fast.train.data.pictures import load_image, reading
from vpt_fast.train.loop.evaluate import autocast, resolve_device
from vpt_fast.train.run.bank_folder import open_bank
from vpt_fast.train.run.tuned_model import load_tuned

__all__ = [
    "Recipe",
    "by_adapter",
    "by_bank",
    "check_file",
    "image_files",
    "report",
    "resolve_amp_dtype",
    "resolve_device",
]

_BATCH = 64
"""Number of images of a bank's batch."""
COLUMNS = ("path", "rank", "class", "probability")
_JSON_START = b'[\n{"path": '


@dataclass(frozen=True)
class Answer:
    """Logits (classes,) of an image, and the names of the classes, if there are any.

    With `multi_label` an image may show several of them.
    """

    logits: Tensor
    class_names: Sequence[str] | None
    multi_label: bool


def _is_json(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_JSON_START)) == _JSON_START


_FILES = {
    ".csv": Output("predict", starts_with(COLUMNS)),
    ".json": Output("predict", _is_json),
}
"""Files by their suffix."""


def check_file(output: Path | None, overwrite: bool) -> None:
    """Check that predictions can be written to a file.

    Raises:
        ValueError: If the name of the file says no format, or there is nothing to overwrite.
        FileExistsError: If it exists and may not be replaced.
    """
    if output is None:
        if overwrite:
            raise ValueError("--overwrite needs --output, the file that is replaced")
        return
    kind = _FILES.get(output.suffix.lower())
    if kind is None:
        raise ValueError(f"--output is {output}; its name must end in {' or '.join(_FILES)}")
    kind.check(output, overwrite)


def image_files(paths: Iterable[Path]) -> list[Path]:
    """Return files as they are, and all images in and below folders in place of the folders.

    Raises:
        FileNotFoundError: If there is no such file, or a folder has no images.
    """
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"there is no image {path}")
        if not path.is_dir():
            found.append(path)
            continue
        images, unread = find_images(path)
        if not images:
            other = f"; it has {counted(unread)}" if unread else ""
            raise FileNotFoundError(f"{path} has no images in it or below it{other}")
        found += map(Path, images)
    return found


def report(
    images: Sequence[Path], answers: Iterable[Answer | str], topk: int, output: Path | None
) -> None:
    """Print the most probable classes of images, or write them to a file.

    Ends the command with status 1 if there are images that cannot be decoded.

    Args:
        images: Image files.
        answers: Answer for each of them, or the reason that there is none.
        topk: Largest number of classes to name.
        output: File to write, *.csv or *.json; None prints a line per image.
    """
    failed: list[str] = []
    rows: list[dict[str, Any]] = []
    for image, answer in zip(images, answers, strict=True):
        if isinstance(answer, str):
            failed.append(answer)
            continue
        found = most_probable(answer.logits, answer.class_names, topk, answer.multi_label)
        if output is None:
            typer.echo(f"{image}: {', '.join(f'{name} {percent(p)}' for name, p in found)}")
        for rank, (name, probability) in enumerate(found, 1):
            values = (str(image), rank, name, probability)
            rows.append(dict(zip(COLUMNS, values, strict=True)))
    if output is not None and rows:
        _write(output, rows)
        typer.echo(f"written to {output}: {len(images) - len(failed)} images, {len(rows)} rows")
    if failed:
        fail("; ".join(failed), 1)


def _write(output: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows atomically; bytes of file names that are not UTF-8 stay as they are in CSV."""
    output.parent.mkdir(parents=True, exist_ok=True)
    text: dict[str, Any] = {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}
    with atomic_file(output, "w", **text) as file:
        if output.suffix.lower() == ".csv":
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.write("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


def _prepared(path: Path, inputs: Mapping[str, Any]) -> Tensor | str:
    """Return an image as a model takes it, or the reason that it cannot be decoded."""
    how = reading(inputs)
    try:
        image = load_image(path, **how)
    except ValueError as error:
        return str(error)
    tensor: Tensor = data.eval_transform(inputs)(image)
    return tensor


def by_adapter(
    adapter: Path,
    images: Sequence[Path],
    checkpoint: Path | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[Answer | str]:
    """Yield the answer of an adapter for each image, or the reason that it cannot be decoded.

    Args:
        adapter: Folder of the adapter.
        images: Image files.
        checkpoint: File with the backbone's weights, or None.
        device: Device to compute on.
        dtype: Dtype of torch.autocast.
    """
    loaded = load_tuned(adapter, checkpoint, device)
    for path in images:
        image = _prepared(path, loaded.inputs)
        if isinstance(image, str):
            yield image
            continue
        with torch.no_grad(), autocast(device, dtype):
            logits = loaded.net(image[None].to(device))[0]
        yield Answer(logits, loaded.class_names, loaded.multi_label)


def by_bank(
    directory: Path,
    tasks: str | None,
    images: Sequence[Path],
    checkpoint: Path | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[Answer | str]:
    """Yield the answer of its task for each image, or the reason that it cannot be decoded.

    Args:
        directory: Folder of adapters.
        tasks: Name of the adapter for each image, divided by commas, or one for all of them.
        images: Image files.
        checkpoint: File with the backbone's weights, or None.
        device: Device to compute on.
        dtype: Dtype of torch.autocast.
    """
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
                yield Answer(next(logits), task.class_names, task.multi_label)


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
