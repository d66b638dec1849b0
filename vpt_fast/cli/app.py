"""`vpt-fast`: tune a timm vision transformer on a folder of images, evaluate it, predict with it,
look at what its prompts do, and at the memory that tuning takes."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from vpt_fast.cli.adapters import evaluate_adapter, inspect_adapter
from vpt_fast.cli.common import (
    Checkpoint,
    Device,
    Workers,
    accuracy,
    block_indices,
    check_some_prompts,
    make_method,
    one_line_errors,
    report_skipped,
)
from vpt_fast.cli.export import export
from vpt_fast.cli.memory import memory_profile
from vpt_fast.cli.options import (
    MODEL,
    BatchSize,
    Cache,
    CropKind,
    DataFormat,
    HFlip,
    ImgSize,
    Interpolation,
    Memory,
    Model,
    NoAug,
    NoExif,
    Normalisation,
    Opt,
    PaperRecipe,
    Pretrained,
    Resize,
    Scale,
)
from vpt_fast.cli.predict import predict
from vpt_fast.cli.report import report
from vpt_fast.cli.sweep import sweep
from vpt_fast.methods import METHODS
from vpt_fast.train.common.paper_settings import default_optimizer, paper_settings
from vpt_fast.train.common.parallel import process_group, rank
from vpt_fast.train.common.recipe import (
    AMP_DTYPES,
    AUTO,
    DEFAULT_LR,
    SGD_LR_WITHOUT_WARMUP,
    Recipe,
    resolve_amp_dtype,
)
from vpt_fast.train.data.augmentation import Augmentation
from vpt_fast.train.data.image_options import ImageOptions
from vpt_fast.train.data.sources import check_format
from vpt_fast.train.loop.evaluate import resolve_device
from vpt_fast.train.run.folder_run import tune_on_folder
from vpt_fast.version import __version__


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
    model: Model = MODEL,
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = False,
    img_size: ImgSize = None,
    method: Annotated[str, typer.Option(help=f"{', '.join(METHODS)}.")] = "vpt-deep",
    recipe: PaperRecipe = None,
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
    batch_size: BatchSize = None,
    lr: Annotated[
        float | None,
        typer.Option(
            help="Base learning rate as in the papers: multiplied by batch size / 256. By default "
            + ", ".join(f"{value:g} ({name})" for name, value in DEFAULT_LR.items())
            + f", {SGD_LR_WITHOUT_WARMUP:g} (sgd without warm-up); worth choosing on val/."
        ),
    ] = None,
    weight_decay: Annotated[
        float, typer.Option(help="For all that is trained but the head's bias.")
    ] = 1e-4,
    opt: Opt = None,
    warmup_epochs: Annotated[
        int | None,
        typer.Option(
            help="Epochs of linear warm-up from 0; by default a tenth of --epochs, none of less "
            "than ten."
        ),
    ] = None,
    scale: Scale = (0.7, 1.0),
    hflip: HFlip = 0.5,
    no_aug: NoAug = False,
    crops: CropKind = None,
    resize: Resize = None,
    data_format: DataFormat = "auto",
    interpolation: Interpolation = "model",
    no_antialias: Annotated[
        bool, typer.Option("--no-antialias", help="Resize without antialiasing.")
    ] = False,
    no_exif: NoExif = False,
    normalisation: Normalisation = "model",
    cache: Cache = "auto",
    schedule: Annotated[
        str,
        typer.Option(help="The learning rate changes after each epoch, as published, or step."),
    ] = "epoch",
    accumulation: Annotated[
        int, typer.Option(help="Parts that a batch is computed in, for less memory.")
    ] = 1,
    amp_dtype: Annotated[
        str,
        typer.Option(
            help=f"Type that torch.autocast computes in: {', '.join(AMP_DTYPES)}; what is trained "
            "stays float32. By default auto, bfloat16 on a GPU that has it."
        ),
    ] = AUTO,
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
    memory: Memory = "speed",
    cuda_graphs: Annotated[
        bool | None,
        typer.Option(
            "--cuda-graphs/--no-cuda-graphs",
            help="Replay a step's forward, loss and backward as one CUDA graph. By default on a "
            "GPU with one process; where it cannot be done steps run as without, and a warning "
            "says why.",
        ),
    ] = None,
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
    --nproc-per-node 2 -m vpt_fast train ...; --batch-size is that of all GPUs together.
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
        check_some_prompts([num_prompts])
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
                amp_dtype=resolve_amp_dtype(amp_dtype, where),
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
            cuda_graphs=cuda_graphs,
            log=tqdm.write,
            data_format=data_format,
            image_options=ImageOptions(
                interpolation,
                not no_antialias,
                normalisation,
                resize or paper.resize,
                not no_exif,
            ),
            cache=cache,
        )
        if rank():
            return
        rows, adapter = result.fit.epochs, result.adapter
        if result.fit.warning:
            typer.echo(f"warning: {result.fit.warning}", err=True)
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
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _say_version(asked: bool) -> None:
    if asked:
        typer.echo(f"vpt-fast {__version__}")
        raise typer.Exit


@app.callback(help=__doc__)
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_say_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Options of `vpt-fast` itself."""


app.command()(train)
app.command(name="eval")(evaluate_adapter)
app.command()(predict)
app.command(name="inspect")(inspect_adapter)
app.command()(export)
app.command(name="memory")(memory_profile)
app.command()(report)
app.command()(sweep)


def main() -> None:
    """Entry point of the `vpt-fast` command."""
    for stream in (sys.stdout, sys.stderr):
        # Names of files may be in no encoding: a run must not end for naming one.
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")
    app(prog_name="vpt-fast")
