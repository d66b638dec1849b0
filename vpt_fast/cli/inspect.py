"""`vpt-fast inspect`: attention to each prompt, and token mixing maps of VAPT, as pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vpt_fast.cli.common import fail, one_line_errors
from vpt_fast.cli.options import Adapter, Checkpoint, Device
from vpt_fast.extras import require_extra
from vpt_fast.train.loop.evaluate import resolve_device
from vpt_fast.train.run.tuned_model import load_tuned


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
    """Show what prompts do: the attention that each one gets, and the patches that VAPT mixes."""
    with one_line_errors():
        require_extra("reports")
        # matplotlib takes long to import, and the other commands do not draw.
        from vpt_fast.reports.inspection import FOLDER, inspect_images

        where = resolve_device(device)
        FOLDER.check(output)
        loaded = load_tuned(adapter, checkpoint, where)
        failed = inspect_images(loaded.net, loaded.inputs, images, output, typer.echo, adapter)
        if failed:
            fail("; ".join(failed), 1)
