"""`vpt-fast push`: an adapter to the Hugging Face Hub."""

from __future__ import annotations

from typing import Annotated

import typer

from vpt_fast.cli.common import one_line_errors
from vpt_fast.cli.usage.groups import OUTPUT
from vpt_fast.cli.usage.options import Adapter


def push(
    adapter: Adapter,
    name: Annotated[
        str,
        typer.Argument(
            metavar="USER/NAME",
            help="Repository on the Hub, which is created if it is missing; a branch may follow, "
            "USER/NAME@BRANCH.",
        ),
    ],
    private: Annotated[
        bool,
        typer.Option(
            "--private",
            help="Make a new repository private; by default it is as the account has it.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    message: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Message of the commit.", rich_help_panel=OUTPUT),
    ] = None,
) -> None:
    """Upload an adapter and its model card to the Hugging Face Hub, and print the address.

    The Hub's token is that of `hf auth login`.
    """
    with one_line_errors():
        from vpt_fast.cli.work import push as work

        typer.echo(work.push(adapter, name, private or None, message))
