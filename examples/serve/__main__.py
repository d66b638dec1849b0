"""`python -m examples.serve --bank FOLDER`: serves the adapters in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from examples.serve.app import create_app
from examples.serve.connections import make_server
from examples.serve.settings import Settings
from vpt_fast.train.common.recipe import AMP_DTYPES
from vpt_fast.train.loop.evaluate import resolve_device
from vpt_fast.train.run.bank_folder import open_bank

LIMITS = "Limits"
DEFAULTS = Settings()


Bank = Annotated[
    Path, typer.Option(metavar="FOLDER", help="Its folders are adapters: one task each.")
]
Checkpoint = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="File with the backbone's weights (.safetensors, or what torch.save wrote).",
    ),
]
Host = Annotated[str, typer.Option(help="Address to listen on.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")]
Device = Annotated[
    str, typer.Option(help="auto, cpu, cuda or cuda:<index>; auto takes a GPU if there is one.")
]
DType = Annotated[str, typer.Option(help=f"Of the weights: {', '.join(AMP_DTYPES)}.")]
Threads = Annotated[
    int | None, typer.Option(min=1, help="CPU threads of the model; PyTorch's choice if none.")
]
MemoryLimit = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="MIB", help="Of the tasks; those that do not fit stay in their files."
    ),
]
AccessLog = Annotated[bool, typer.Option("--access-log", help="Log every request.")]


def _limit(text: str) -> Any:
    return typer.Option(help=text, rich_help_panel=LIMITS)


def serve(
    bank: Bank,
    checkpoint: Checkpoint = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    device: Device = "auto",
    dtype: DType = "float32",
    threads: Threads = None,
    memory_limit: MemoryLimit = None,
    access_log: AccessLog = False,
    max_upload_bytes: Annotated[int, _limit("Of a request's body.")] = DEFAULTS.max_upload_bytes,
    max_pixels: Annotated[int, _limit("Width times height.")] = DEFAULTS.max_pixels,
    max_requests: Annotated[int, _limit("Predictions in progress.")] = DEFAULTS.max_requests,
    max_queue: Annotated[int, _limit("Images that wait for the bank.")] = DEFAULTS.max_queue,
    max_batch: Annotated[int, _limit("Images of a batch.")] = DEFAULTS.max_batch,
    max_wait: Annotated[float, _limit("Seconds that an image waits for others.")] = (
        DEFAULTS.max_wait
    ),
    upload_seconds: Annotated[float, _limit("For the upload.")] = DEFAULTS.upload_seconds,
    request_seconds: Annotated[float, _limit("From the upload to the answer.")] = (
        DEFAULTS.request_seconds
    ),
    decode_threads: Annotated[int, _limit("That decode images.")] = DEFAULTS.decode_threads,
    max_connections: Annotated[int, _limit("Open at once.")] = DEFAULTS.max_connections,
) -> None:
    """Serve predictions of many tasks of one backbone, batched together."""
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
