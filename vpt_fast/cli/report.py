"""`vpt-fast report`: a self-contained HTML page about runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vpt_fast.cli.common import one_line_errors, report_skipped
from vpt_fast.cli.usage import spellings
from vpt_fast.cli.usage.groups import DATA, OUTPUT, SPEED
from vpt_fast.cli.usage.options import DTYPES, Checkpoint, Device, Overwrite, Workers
from vpt_fast.cli.usage.spellings import spelling
from vpt_fast.extras import require_extra
from vpt_fast.train.common.names import AMP_DTYPES, SPLITS


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            help="Output folders of train, or of a sweep; or adapters, in folders or as "
            "hf-hub:user/name.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(metavar="FILE", help="The page, a new file.", rich_help_panel=OUTPUT),
    ] = Path("output/report.html"),
    overwrite: Overwrite = False,
    directory: Annotated[
        Path | None,
        typer.Option(
            "--data",
            metavar="DIR",
            help="The data, if they are not where they were.",
            rich_help_panel=DATA,
        ),
    ] = None,
    checkpoint: Checkpoint = None,
    split: Annotated[
        str | None,
        typer.Option(
            help="test, val or train; by default test, else val, else train.",
            callback=spelling(SPLITS, spellings.SPLITS),
            rich_help_panel=DATA,
        ),
    ] = None,
    max_images: Annotated[
        int,
        typer.Option(min=1, help="Images over which the use of prompts is averaged."),
    ] = 64,
    batch_size: Annotated[
        int, typer.Option("--batch-size", "-b", min=1, rich_help_panel=SPEED)
    ] = 64,
    amp_dtype: Annotated[
        str | None,
        typer.Option(
            help=f"Type that torch.autocast computes in: {', '.join(AMP_DTYPES)}; by default what "
            "each run was trained with.",
            callback=spelling(DTYPES, spellings.DTYPES),
            rich_help_panel=SPEED,
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
        from vpt_fast.reports.page.evaluation import EvaluationOptions
        from vpt_fast.reports.page.page import write_page
        from vpt_fast.train.common.recipe import resolve_amp_dtype
        from vpt_fast.train.loop.evaluate import resolve_device

        where = resolve_device(device)

        options = EvaluationOptions(
            directory=directory,
            checkpoint=checkpoint,
            split=split,
            batch_size=batch_size,
            amp_dtype=amp_dtype and resolve_amp_dtype(amp_dtype, where),
            workers=workers,
            device=where,
            max_images=max_images,
        )
        written = write_page(runs, output, options, typer.echo, overwrite)
        report_skipped(written.skipped)
