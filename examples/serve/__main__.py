"""`python -m examples.serve --bank FOLDER`: serves the adapters in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from examples.serve.app import create_app
from examples.serve.connections import make_server
from examples.serve.settings import Settings
from vpt_fast.cli.common import CHECKPOINT_HELP, Device
from vpt_fast.train.common.recipe import AMP_DTYPES
from vpt_fast.train.loop.evaluate import resolve_device
from vpt_fast.train.run.bank_folder import open_bank

LIMITS = "Limits"
DEFAULTS = Settings()


def serve(
    bank: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Its folders are adapters: one task each.")
    ],
    checkpoint: Annotated[Path | None, typer.Option(metavar="FILE", help=CHECKPOINT_HELP)] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    device: Device = "auto",
    dtype: Annotated[
        str, typer.Option(help=f"Of the weights: {', '.join(AMP_DTYPES)}.")
    ] = "float32",
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads of the model; PyTorch's choice if none.")
    ] = None,
    memory_limit: Annotated[
        int | None,
        typer.Option(
            min=1, metavar="MIB", help="Of the tasks; those that do not fit stay in their files."
        ),
    ] = None,
    access_log: Annotated[bool, typer.Option("--access-log", help="Log every request.")] = False,
    max_upload_bytes: Annotated[
        int, typer.Option(help="Of a request's body.", rich_help_panel=LIMITS)
    ] = DEFAULTS.max_upload_bytes,
    max_pixels: Annotated[
        int, typer.Option(help="Width times height.", rich_help_panel=LIMITS)
    ] = DEFAULTS.max_pixels,
    max_requests: Annotated[
        int, typer.Option(help="Predictions in progress.", rich_help_panel=LIMITS)
    ] = DEFAULTS.max_requests,
    max_queue: Annotated[
        int, typer.Option(help="Images that wait for the bank.", rich_help_panel=LIMITS)
    ] = DEFAULTS.max_queue,
    max_batch: Annotated[
        int, typer.Option(help="Images of a batch.", rich_help_panel=LIMITS)
    ] = DEFAULTS.max_batch,
    max_wait: Annotated[
        float, typer.Option(help="Seconds that an image waits for others.", rich_help_panel=LIMITS)
    ] = DEFAULTS.max_wait,
    upload_seconds: Annotated[
        float, typer.Option(help="For the upload.", rich_help_panel=LIMITS)
    ] = DEFAULTS.upload_seconds,
    request_seconds: Annotated[
        float, typer.Option(help="From the upload to the answer.", rich_help_panel=LIMITS)
    ] = DEFAULTS.request_seconds,
    decode_threads: Annotated[
        int, typer.Option(help="That decode images.", rich_help_panel=LIMITS)
    ] = DEFAULTS.decode_threads,
    max_connections: Annotated[
        int, typer.Option(help="Open at once.", rich_help_panel=LIMITS)
    ] = DEFAULTS.max_connections,
) -> None:
    """Serves predictions of many tasks of one backbone, batched together."""
    try:
        if dtype not in AMP_DTYPES:
            raise ValueError(f"--dtype is {dtype!r}; choose one of {', '.join(AMP_DTYPES)}")
        settings = Settings(
            max_upload_bytes=max_upload_bytes,
            max_pixels=max_pixels,
            max_requests=max_requests,
            max_queue=max_queue,
            max_batch=max_batch,
            max_wait=max_wait,
            upload_seconds=upload_seconds,
            request_seconds=request_seconds,
            decode_threads=decode_threads,
            max_connections=max_connections,
        )
        if threads is not None:
            torch.set_num_threads(threads)
        where, limit = resolve_device(device), None if memory_limit is None else memory_limit << 20
        opened, refused = open_bank(bank, None, checkpoint, where, AMP_DTYPES[dtype], limit)
    except (ValueError, TypeError, OSError) as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from None
    for line in refused:
        typer.echo(f"warning: {line}", err=True)
    typer.echo(f"{len(opened.tasks)} tasks on {where}: {', '.join(opened.tasks)}", err=True)
    app = create_app(opened, settings, where, AMP_DTYPES[dtype])
    make_server(app, settings, host, port, access_log).run()


if __name__ == "__main__":
    typer.run(serve)
