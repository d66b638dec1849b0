"""`vpt-fast memory`: bytes that a training step saves for backward."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated

import typer

from vpt_fast.cli.common import make_method, one_line_errors
from vpt_fast.cli.usage.groups import METHOD, OPTIMISATION, OUTPUT
from vpt_fast.cli.usage.options import Dtype, ImgSize, MethodName, Model, Overwrite, Settings
from vpt_fast.extras import require_extra

NUM_PROMPTS = 50
PROMPTS = "0,10,50,100,200"


def memory_profile(
    model: Model = "vit_base_patch16_224",
    method: MethodName = "vpt-deep",
    settings: Settings = None,
    num_prompts: Annotated[
        int | None,
        typer.Option(
            help="Prompts of each block where the number of prompted blocks varies (vpt-deep "
            f"only); by default {NUM_PROMPTS}.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="P,P,...",
            help="Numbers of prompts where all of the method's blocks are prompted; 0 is the model "
            f"without prompts and with the gradient through all blocks. By default {PROMPTS}.",
            rich_help_panel=METHOD,
        ),
    ] = None,
    dropout: Annotated[
        float | None,
        typer.Option(help="Prompt dropout, in [0, 1); by default 0.", rich_help_panel=METHOD),
    ] = None,
    batch_size: Annotated[
        int,
        typer.Option("--batch-size", "-b", help="Images per step.", rich_help_panel=OPTIMISATION),
    ] = 64,
    img_size: ImgSize = None,
    dtype: Dtype = "bfloat16",
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="New folder for memory.csv and memory.png; by default "
            "output/memory-<model>-<method>.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Show the bytes a training step saves for backward, by prompted blocks and by prompts.

    Counted for eager PyTorch and every memory mode, without running anything, so no GPU is needed.
    With a CUDA GPU the peak memory of a real step is measured as well.
    """
    with one_line_errors():
        require_extra("reports")
        from vpt_fast.reports.memory import report_memory

        chosen = make_method(method, {"dropout": dropout}, settings or ())
        if num_prompts is not None and method != "vpt-deep":
            raise ValueError(
                f"--num-prompts is for the number of prompted blocks, which --method {method} does "
                "not vary; use --prompts"
            )
        if prompts is not None and "num_prompts" not in {field.name for field in fields(chosen)}:
            raise ValueError(f"--method {method} has no option --prompts; leave it out")
        report_memory(
            model,
            chosen,
            output or Path("output") / f"memory-{model}-{chosen.name}",
            num_prompts=NUM_PROMPTS if num_prompts is None else num_prompts,
            prompts=_numbers(PROMPTS if prompts is None else prompts),
            batch_size=batch_size,
            img_size=img_size,
            dtype=dtype,
            overwrite=overwrite,
            log=typer.echo,
        )


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(
            f"--prompts is {text!r}; give numbers with commas between them, such as {PROMPTS}"
        ) from error
