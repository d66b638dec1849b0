"""`vpt-fast inspect`: attention to each prompt, and token mixing maps of VAPT, as pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vpt_fast.cli.common import fail, one_line_errors
from vpt_fast.cli.usage.groups import OUTPUT
from vpt_fast.cli.usage.options import Adapter, Checkpoint, Device, Overwrite
from vpt_fast.extras import require_extra


def inspect_adapter(
    adapter: Adapter,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files.")],
    output: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            help="New folder for attention.csv, mixing.csv and the pictures.",
            rich_help_panel=OUTPUT,
        ),
    ],
    overwrite: Overwrite = False,
    checkpoint: Checkpoint = None,
    device: Device = "auto",
) -> None:
    """Show what prompts do: the attention that each one gets, and the patches that VAPT mixes."""
    with one_line_errors():
        require_extra("reports")
        from vpt_fast.reports.inspection import FOLDER, inspect_images
        from vpt_fast.train.loop.evaluate import resolve_device
        from vpt_fast.train.run.tuned_model import load_tuned

        where = resolve_device(device)
        FOLDER.check(output, overwrite)
        loaded = load_tuned(adapter, checkpoint, where)
        failed = inspect_images(
            loaded.net, loaded.inputs, images, output, typer.echo, adapter, overwrite
        )
        if failed:
            fail("; ".join(failed), 1)
