"""`vpt-fast export`: an adapter's model as one file that needs torch alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vpt_fast.cli.common import one_line_errors
from vpt_fast.cli.usage.groups import OUTPUT
from vpt_fast.cli.usage.options import Adapter, Checkpoint, Device, Dtype, Overwrite


def export(
    adapter: Adapter,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="The new file, *.pt2.",
            rich_help_panel=OUTPUT,
        ),
    ],
    checkpoint: Checkpoint = None,
    dtype: Dtype = "float32",
    overwrite: Overwrite = False,
    device: Device = "auto",
) -> None:
    """Write an adapter and its backbone as one program that PyTorch runs without this package.

    The file also holds task.json: class names, and how images are resized and normalised.
    """
    with one_line_errors():
        from vpt_fast.cli.work import export as work

        work.export(adapter, output, checkpoint, dtype, overwrite, device)
