"""`vpt-fast predict`: the most probable classes of images, by one adapter or by many."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vpt_fast.cli.common import one_line_errors
from vpt_fast.cli.usage.groups import BACKBONE, OUTPUT
from vpt_fast.cli.usage.options import ADAPTER_HELP, AmpDtype, Checkpoint, Device, Overwrite


def predict(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="[ADAPTER] IMAGE...",
            help=f"{ADAPTER_HELP}; then image files, or folders with images in them or below "
            "them. With --bank images only.",
        ),
    ],
    bank: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder of many adapters of one backbone, which answer side by side in one batch.",
            rich_help_panel=BACKBONE,
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="With --bank: the adapter's folder for every image, in the images' order and "
            "divided by commas, or one for all of them.",
            rich_help_panel=BACKBONE,
        ),
    ] = None,
    checkpoint: Checkpoint = None,
    topk: Annotated[
        int, typer.Option(min=1, help="How many classes to name.", rich_help_panel=OUTPUT)
    ] = 5,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="A new file, *.csv or *.json, with a row for every image and class: path, rank, "
            "class and probability. By default a line per image is printed.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    overwrite: Overwrite = False,
    amp_dtype: AmpDtype = "float32",
    device: Device = "auto",
) -> None:
    """Print the most probable classes of images, one line per image, or write them to a file.

    Probabilities sum to 1, but for an adapter of images with several labels, where each class has
    one of its own.
    """
    with one_line_errors():
        from vpt_fast.cli.work import predict as work

        work.check_file(output, overwrite)
        where = work.resolve_device(device)
        dtype = work.Recipe(amp_dtype=work.resolve_amp_dtype(amp_dtype, where)).autocast_dtype
        if bank is None:
            if tasks is not None:
                raise ValueError("--tasks needs --bank, the folder that holds their adapters")
            if len(paths) < 2:
                raise ValueError("predict needs an ADAPTER and at least one IMAGE")
            images = work.image_files(paths[1:])
            answers = work.by_adapter(paths[0], images, checkpoint, where, dtype)
        else:
            images = work.image_files(paths)
            answers = work.by_bank(bank, tasks, images, checkpoint, where, dtype)
        work.report(images, answers, topk, output)
