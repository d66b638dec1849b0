"""`vpt-fast methods`: all methods, with what they train of a model."""

from __future__ import annotations

from typing import Annotated

import typer

from vpt_fast.cli.common import one_line_errors
from vpt_fast.cli.usage.options import MODEL, ImgSize, Model


def list_methods(
    model: Model = MODEL,
    num_prompts: Annotated[int, typer.Option(min=1, help="Prompts (of each block).")] = 10,
    img_size: ImgSize = None,
) -> None:
    """List all methods: what each trains of a model beside the head, its paper and its equation."""
    with one_line_errors():
        from vpt_fast.cli.work import methods as work

        typer.echo(work.table_of_methods(model, num_prompts, img_size))
