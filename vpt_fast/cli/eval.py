"""`vpt-fast eval`: accuracy and loss of an adapter on a data set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vpt_fast.cli.common import one_line_errors
from vpt_fast.cli.usage.groups import DATA, SPEED
from vpt_fast.cli.usage.options import (
    Adapter,
    AmpDtype,
    Checkpoint,
    DataFormat,
    Device,
    SplitName,
    ValFraction,
    Workers,
)
from vpt_fast.cli.usage.spellings import spelling
from vpt_fast.train.common.names import CLASS_ORDERS


def evaluate_adapter(
    adapter: Adapter,
    directory: Annotated[
        Path,
        typer.Argument(
            metavar="DIR",
            help="Folder with test/<class>/<image> (or val/, or class folders), or another "
            "format that train takes.",
        ),
    ],
    checkpoint: Checkpoint = None,
    split: SplitName = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", "-b", min=1, rich_help_panel=SPEED)
    ] = 64,
    data_format: DataFormat = "auto",
    val_fraction: ValFraction = None,
    class_order: Annotated[
        str | None,
        typer.Option(
            help=f"{', '.join(CLASS_ORDERS)}: how the classes of an adapter that does not name "
            "them were sorted; class10 comes before class2 as a string.",
            callback=spelling(CLASS_ORDERS),
            rich_help_panel=DATA,
        ),
    ] = None,
    no_antialias: Annotated[
        bool,
        typer.Option(
            "--no-antialias",
            help="Resize as training with this option did.",
            rich_help_panel=DATA,
        ),
    ] = False,
    amp_dtype: AmpDtype = "float32",
    workers: Workers = None,
    device: Device = "auto",
) -> None:
    """Evaluate an adapter on a folder of images."""
    with one_line_errors():
        from vpt_fast.cli.work import eval as work

        where = work.resolve_device(device)
        dtype = work.Recipe(amp_dtype=work.resolve_amp_dtype(amp_dtype, where)).autocast_dtype
        asked = work.Asked(
            directory, data_format, split, val_fraction, class_order, not no_antialias
        )
        loaded, evaluated = work.load(adapter, checkpoint, where, asked)
        work.evaluate_images(loaded, evaluated, where, dtype, batch_size, workers)
