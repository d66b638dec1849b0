"""The commands of `vpt-fast` that look at an adapter: eval and inspect."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vpt_fast.cli.common import (
    AmpDtype,
    Checkpoint,
    Device,
    Workers,
    accuracy,
    fail,
    one_line_errors,
    report_skipped,
)
from vpt_fast.extras import require_extra
from vpt_fast.train.common.recipe import Recipe
from vpt_fast.train.data import images as data
from vpt_fast.train.data.class_folders import CLASS_ORDERS
from vpt_fast.train.data.pictures import reading
from vpt_fast.train.data.sources import FORMATS, check_format, open_source
from vpt_fast.train.data.split import ImageSource, SplitImages
from vpt_fast.train.loop.evaluate import evaluate, resolve_device
from vpt_fast.train.run.folder_run import folder_loader
from vpt_fast.train.run.tuned_model import load_tuned

Adapter = Annotated[
    Path,
    typer.Argument(metavar="ADAPTER", help="Folder of an adapter, or the output folder of a run."),
]


def evaluate_adapter(
    adapter: Adapter,
    directory: Annotated[
        Path,
        typer.Argument(
            metavar="DIR",
            help="Folder with test/<class>/<image> (or val/, or class folders), or of another "
            "format that train takes.",
        ),
    ],
    checkpoint: Checkpoint = None,
    split: Annotated[
        str | None, typer.Option(help="test, val or train; by default test, else val.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1)] = 64,
    data_format: Annotated[
        str, typer.Option("--format", help=f"Of DIR: {', '.join(FORMATS)}.")
    ] = "auto",
    class_order: Annotated[
        str | None,
        typer.Option(
            help=f"{', '.join(CLASS_ORDERS)}: how the classes of an adapter that does not name "
            "them were sorted; class10 comes before class2 as a string."
        ),
    ] = None,
    no_antialias: Annotated[
        bool, typer.Option("--no-antialias", help="Resize as training with this option did.")
    ] = False,
    amp_dtype: AmpDtype = "float32",
    workers: Workers = None,
    device: Device = "auto",
) -> None:
    """Evaluates an adapter on a folder of images."""
    with one_line_errors():
        where = resolve_device(device)
        dtype = Recipe(amp_dtype=amp_dtype).autocast_dtype
        format = check_format(directory, data_format)
        name, folder = split or "", directory
        if format == "folders":
            name, folder = _eval_folder(directory, split)
        loaded = load_tuned(adapter, checkpoint, where)
        transform = data.eval_transform({**loaded.inputs, "antialias": not no_antialias})
        how = reading(loaded.inputs)
        images: Any
        refused: tuple[data.SkippedImage, ...] = ()
        if format == "folders":
            images = data.ImageFolders(folder, transform, loaded.class_names, **how)
            order = loaded.class_order(folder, images.classes, class_order)
            if order != images.classes:
                images = data.ImageFolders(folder, transform, order, **how)
            warnings = images.warnings
        else:
            source = open_source(directory, format, loaded.class_names)
            order = loaded.class_order(directory, source.class_names, class_order)
            if order != source.class_names:
                source = open_source(directory, format, order)
            name = _eval_split(source, directory, split)
            refused, warnings = source.splits[name].refused, source.warnings
            images = SplitImages(source.splits[name], transform, source.class_names, **how)
        for line in warnings:
            typer.echo(f"warning: {line}", err=True)
        result = evaluate(
            loaded.net, folder_loader(images, batch_size, where, workers), amp_dtype=dtype
        )
        typer.echo(accuracy(name, result))
        report_skipped((*refused, *result.skipped))


def _eval_split(source: ImageSource, directory: Path, split: str | None) -> str:
    if split is not None and split not in data.SPLITS:
        raise ValueError(f"--split is {split!r}; choose one of {', '.join(data.SPLITS)}")
    for name in ("test", "val") if split is None else (split,):
        if name in source.splits:
            return name
    there = ", ".join(source.splits)
    raise FileNotFoundError(f"{directory} has no {split or 'test or val'} split; it has {there}")


def _eval_folder(directory: Path, split: str | None) -> tuple[str, Path]:
    if split is not None:
        if split not in data.SPLITS:
            raise ValueError(f"--split is {split!r}; choose one of {', '.join(data.SPLITS)}")
        return split, data.require_split(directory, split)
    if not directory.is_dir():
        raise FileNotFoundError(f"there is no data folder {directory}")
    for name in ("test", "val"):
        folder = data.find_split(directory, name)
        if folder is not None:
            return name, folder
    if data.find_split(directory, "train") is not None:
        raise FileNotFoundError(f"{directory} has no test/ or val/; --split train takes train/")
    return directory.name, directory


def inspect_adapter(
    adapter: Adapter,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files.")],
    output: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            help="Folder for attention.csv, mixing.csv and the pictures: new, empty or of an "
            "earlier inspect, whose files are replaced.",
        ),
    ],
    checkpoint: Checkpoint = None,
    device: Device = "auto",
) -> None:
    """Shows what prompts do: the attention that each one gets, and the patches that VAPT mixes."""
    with one_line_errors():
        require_extra("reports")
        # matplotlib takes long to import, and the other commands do not draw.
        from vpt_fast.reports.inspection import FOLDER, inspect_images

        where = resolve_device(device)
        FOLDER.check(output)
        loaded = load_tuned(adapter, checkpoint, where)
        failed = inspect_images(loaded.net, loaded.inputs, images, output, typer.echo)
        if failed:
            fail("; ".join(failed), 1)
