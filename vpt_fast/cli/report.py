"""`vpt-fast report`: a self-contained HTML page about runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vpt_fast.cli.common import one_line_errors, report_skipped
from vpt_fast.cli.options import Checkpoint, Device, Workers
from vpt_fast.extras import require_extra
from vpt_fast.train.common.recipe import AMP_DTYPES
from vpt_fast.train.loop.evaluate import resolve_device


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Output folders of train, or of a sweep."),
    ],
    output: Annotated[
        Path,
        typer.Option(metavar="FILE", help="The page: a new file, or that of an earlier report."),
    ] = Path("output/report.html"),
    directory: Annotated[
        Path | None,
        typer.Option("--data", metavar="DIR", help="The data, if they are not where they were."),
    ] = None,
    checkpoint: Checkpoint = None,
    split: Annotated[
        str | None,
        typer.Option(help="test, val or train; by default test, else val, else train."),
    ] = None,
    max_images: Annotated[
        int,
        typer.Option(min=1, help="Images over which the use of prompts is averaged."),
    ] = 64,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1)] = 64,
    amp_dtype: Annotated[
        str | None,
        typer.Option(
            help=f"Type that torch.autocast computes in: {', '.join(AMP_DTYPES)}; by default what "
            "each run was trained with."
        ),
    ] = None,
    workers: Workers = None,
    device: Device = "auto",
) -> None:
    """Write a page about runs: curves, mistakes by class and image, use of the prompts.

    Each run is evaluated once. What is missing, such as the data of a run, is said on the page.
    """
    with one_line_errors():
        require_extra("reports")
        # matplotlib takes long to import, and the other commands do not draw.
        from vpt_fast.reports.page.evaluation import EvaluationOptions
        from vpt_fast.reports.page.page import write_page

        options = EvaluationOptions(
            directory=directory,
            checkpoint=checkpoint,
            split=split,
            batch_size=batch_size,
            amp_dtype=amp_dtype,
            workers=workers,
            device=resolve_device(device),
            max_images=max_images,
        )
        written = write_page(runs, output, options, typer.echo)
        report_skipped(written.skipped)
