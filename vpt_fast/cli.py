"""`vpt-fast`: tune a timm vision transformer on a folder of images, evaluate it, predict with it,
look at what its prompts do, and at the memory that tuning takes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from vpt_fast.cli_adapters import evaluate_adapter, inspect_adapter, predict
from vpt_fast.cli_common import (
    AmpDtype,
    Checkpoint,
    Device,
    Workers,
    accuracy,
    block_indices,
    make_method,
    one_line_errors,
    report_skipped,
)
from vpt_fast.cli_memory import memory_profile
from vpt_fast.cli_report import report
from vpt_fast.cli_sweep import sweep
from vpt_fast.methods import METHODS
from vpt_fast.ops.memory_modes import MEMORY_MODES
from vpt_fast.train.augmentation import Augmentation
from vpt_fast.train.evaluate import resolve_device
from vpt_fast.train.image_options import INTERPOLATIONS, NORMALISATIONS, ImageOptions
from vpt_fast.train.parallel import process_group, rank
from vpt_fast.train.recipe import DEFAULT_LR, OPTIMIZERS, Recipe
from vpt_fast.train.recipes import RECIPES, default_optimizer, paper_settings
from vpt_fast.train.run import tune_on_folder
from vpt_fast.train.sources import FORMATS, check_format


def train(
    directory: Annotated[
        Path,
        typer.Argument(
            metavar="DIR",
            help="Folder with train/<class>/<image>, and if you have them val/ and test/; or a "
            "VTAB-1k set, FGVC json files, or a saved Hugging Face dataset. With "
            "val/ the epoch that is best on it is kept, without it the last one; test/ is "
            "evaluated once, with the kept epoch.",
        ),
    ],
    model: Annotated[
        str,
        typer.Option(
            help="timm's name of a vision transformer, with or without a tag; or vpt_fast_demo, "
            "the small one for 32 x 32 pixels that comes with this package."
        ),
    ] = "vit_base_patch16_224.orig_in21k",
    checkpoint: Checkpoint = None,
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Download timm's weights of the model.")
    ] = False,
    img_size: Annotated[
        int | None, typer.Option(min=1, help="Image size in pixels; by default the model's.")
    ] = None,
    method: Annotated[str, typer.Option(help=f"{', '.join(METHODS)}.")] = "vpt-deep",
    recipe: Annotated[
        str | None,
        typer.Option(
            help=f"The settings of a paper: {', '.join(RECIPES)}. Prompt dropout, batch size, "
            "resizing and augmentation, where they are not given."
        ),
    ] = None,
    num_prompts: Annotated[
        int | None, typer.Option(help="Prompts (of each block); by default 10.")
    ] = None,
    dropout: Annotated[
        float | None, typer.Option(help="Prompt dropout, in [0, 1); by default 0.")
    ] = None,
    blocks: Annotated[
        str | None,
        typer.Option(
            help="Blocks that get prompts (vpt-deep), such as 9-11 or 0,6; by default all."
        ),
    ] = None,
    num_blocks: Annotated[
        int | None, typer.Option(help="Last blocks that are trained (partial); by default 1.")
    ] = None,
    reduction: Annotated[
        int | None, typer.Option(help="Model width over the adapters' (adapter); by default 8.")
    ] = None,
    num_layers: Annotated[
        int | None, typer.Option(help="Layers of the classifier (mlp-head); by default 3.")
    ] = None,
    hidden_dim: Annotated[
        int | None,
        typer.Option(help="Hidden width: of the feature projector (vapt), or of mlp-head."),
    ] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the training images.")] = 100,
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", "-b", help="Images per step; by default 64, or --recipe's."),
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            help="Base learning rate as in the papers: multiplied by batch size / 256. By default "
            + ", ".join(f"{value:g} ({name})" for name, value in DEFAULT_LR.items())
            + "; worth choosing on val/."
        ),
    ] = None,
    weight_decay: Annotated[
        float, typer.Option(help="For all that is trained but the head's bias.")
    ] = 1e-4,
    opt: Annotated[
        str | None,
        typer.Option(
            help=f"{', '.join(OPTIMIZERS)}; by default adamw for full, partial, bias and adapter, "
            "and sgd for the others, as in the papers."
        ),
    ] = None,
    warmup_epochs: Annotated[
        int | None,
        typer.Option(help="Epochs of linear warm-up from 0; by default a tenth of --epochs."),
    ] = None,
    scale: Annotated[
        tuple[float, float],
        typer.Option(metavar="LOW HIGH", help="Part of the area that random crops keep."),
    ] = (0.7, 1.0),
    hflip: Annotated[float, typer.Option(help="Probability of a horizontal flip.")] = 0.5,
    no_aug: Annotated[
        bool, typer.Option("--no-aug", help="No augmentation: resize and crop the centre.")
    ] = False,
    crops: Annotated[
        str | None,
        typer.Option(
            help="Random crops: scaled, a part of the area, resized; or plain, the model's size, "
            "out of the image as it is resized for evaluation. By default scaled."
        ),
    ] = None,
    resize: Annotated[
        str | None,
        typer.Option(
            help="model, its own way; squash, both sides to the model's size; or crop, the "
            "shorter side to 256 / 224 of it. By default model."
        ),
    ] = None,
    data_format: Annotated[
        str, typer.Option("--format", help=f"Of DIR: {', '.join(FORMATS)}.")
    ] = "auto",
    interpolation: Annotated[
        str, typer.Option(help=f"Of resizing: {', '.join(INTERPOLATIONS)}.")
    ] = "model",
    no_antialias: Annotated[
        bool, typer.Option("--no-antialias", help="Resize without antialiasing.")
    ] = False,
    normalisation: Annotated[str, typer.Option(help=f"{', '.join(NORMALISATIONS)}.")] = "model",
    cache: Annotated[
        str,
        typer.Option(
            help="Training and validation images are decoded once and kept (memory) or again in "
            "every epoch (stream); auto keeps up to 1 GiB of each."
        ),
    ] = "auto",
    schedule: Annotated[
        str,
        typer.Option(help="The learning rate changes after each epoch, as published, or step."),
    ] = "epoch",
    accumulation: Annotated[
        int, typer.Option(help="Parts that a batch is computed in, for less memory.")
    ] = 1,
    amp_dtype: AmpDtype = "float32",
    seed: Annotated[
        int, typer.Option(help="Of initial values, order, augmentation and dropout.")
    ] = 42,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="New folder for the adapters best/ and last/, metrics.csv and tensorboard/; by "
            "default output/<DIR's name>-<method>.",
        ),
    ] = None,
    memory: Annotated[
        str,
        typer.Option(
            help=f"What blocks keep for backward, from fastest to smallest: "
            f"{', '.join(MEMORY_MODES)}; `vpt-fast memory` shows how much."
        ),
    ] = "speed",
    prefix_cache: Annotated[
        bool,
        typer.Option(
            help="With --no-aug: compute what enters the first block that is trained or has "
            "prompts once per image."
        ),
    ] = True,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on in --output after the last epoch that ended there, if any."
        ),
    ] = False,
    workers: Workers = None,
    device: Device = "auto",
) -> None:
    """Tunes a pretrained model on a folder of images.

    Ctrl-C ends training early and leaves a usable adapter. On several GPUs: torchrun
    --nproc-per-node 2 -m vpt_fast.cli train ...; --batch-size is that of all GPUs together.
    """
    with one_line_errors(), process_group(resolve_device(device)) as where:
        tuned = make_method(
            method,
            {
                "num_prompts": num_prompts,
                "dropout": dropout,
                "blocks": block_indices(blocks),
                "num_blocks": num_blocks,
                "reduction": reduction,
                "num_layers": num_layers,
                "hidden_dim": hidden_dim,
            },
        )
        chosen = frozenset() if dropout is None else frozenset({"dropout"})
        paper = paper_settings(recipe, tuned, check_format(directory, data_format), chosen)
        result = tune_on_folder(
            directory,
            output or Path("output") / f"{directory.resolve().name}-{method}",
            model,
            paper.method,
            Recipe(
                epochs=epochs,
                batch_size=paper.batch_size if batch_size is None else batch_size,
                lr=lr,
                weight_decay=weight_decay,
                opt=default_optimizer(tuned) if opt is None else opt,
                warmup_epochs=warmup_epochs,
                amp_dtype=amp_dtype,
                seed=seed,
                schedule=schedule,
                accumulation=accumulation,
            ),
            checkpoint=checkpoint,
            pretrained=pretrained,
            img_size=img_size,
            augmentation=Augmentation(
                scale, hflip, no_aug or not paper.augment, crops or paper.crops
            ),
            memory=memory,
            workers=workers,
            device=where,
            resume=resume,
            prefix_cache=prefix_cache,
            log=tqdm.write,
            data_format=data_format,
            image_options=ImageOptions(
                interpolation, not no_antialias, normalisation, resize or paper.resize
            ),
            cache=cache,
        )
        if rank():
            return
        rows, adapter = result.fit.epochs, result.adapter
        if result.fit.interrupted:
            typer.echo(f"interrupted after {len(rows)} of {epochs} epochs; adapter: {adapter}")
            raise typer.Exit(130)
        kept = next(row for row in rows if row.epoch == result.fit.kept)
        score = "" if kept.val_top1 is None else f", {kept.val_top1:.2f}% on val"
        typer.echo(f"kept epoch {kept.epoch}{score}")
        if result.test is not None:
            typer.echo(accuracy("test", result.test))
        typer.echo(f"adapter: {adapter}")
        if result.fit.skipped:
            count = len(result.fit.skipped)
            typer.echo(f"images skipped in training, as they cannot be decoded: {count}", err=True)
        if result.test is not None:
            report_skipped(result.test.skipped)


app = typer.Typer(
    name="vpt-fast",
    help=__doc__,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command()(train)
app.command(name="eval")(evaluate_adapter)
app.command()(predict)
app.command(name="inspect")(inspect_adapter)
app.command(name="memory")(memory_profile)
app.command()(report)
app.command()(sweep)


def main() -> None:
    """Entry point of the `vpt-fast` command."""
    app(prog_name="vpt-fast")


if __name__ == "__main__":
    main()
