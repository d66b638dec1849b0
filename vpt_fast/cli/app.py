"""`vpt-fast`: tune a timm vision transformer on a folder of images, evaluate it, predict with it,
look at what its prompts do, and at the memory that tuning takes."""

from __future__ import annotations

import io
import sys
from typing import Annotated

import typer

from vpt_fast.cli.common import import_modules, one_line_errors
from vpt_fast.cli.eval import evaluate_adapter
from vpt_fast.cli.export import export
from vpt_fast.cli.inspect import inspect_adapter
from vpt_fast.cli.memory import memory_profile
from vpt_fast.cli.methods import list_methods
from vpt_fast.cli.predict import predict
from vpt_fast.cli.push import push
from vpt_fast.cli.report import report
from vpt_fast.cli.sweep import sweep
from vpt_fast.cli.train import train
from vpt_fast.cli.usage.command import Command
from vpt_fast.version import __version__

app = typer.Typer(
    name="vpt-fast",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"vpt-fast {__version__}")
        raise typer.Exit


@app.callback(help=__doc__)
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
    modules: Annotated[
        list[str] | None,
        typer.Option(
            "--import",
            metavar="MODULE",
            help="Import a module that registers a method of your own; repeat it for more.",
        ),
    ] = None,
) -> None:
    """Parse the options of `vpt-fast` itself."""
    if modules:
        with one_line_errors():
            import_modules(modules)


for name, function in (
    ("train", train),
    ("eval", evaluate_adapter),
    ("predict", predict),
    ("inspect", inspect_adapter),
    ("export", export),
    ("push", push),
    ("memory", memory_profile),
    ("methods", list_methods),
    ("report", report),
    ("sweep", sweep),
):
    app.command(name, cls=Command)(function)


def main() -> None:
    """Run the command line."""
    for stream in (sys.stdout, sys.stderr):
        # Names of files may have no valid encoding, and a run must not fail when it prints one.
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")
    app(prog_name="vpt-fast")
