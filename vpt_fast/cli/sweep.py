"""`vpt-fast sweep`: a grid for each method, chosen on validation, then final runs over seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, TypeVar

import typer
from tqdm import tqdm

from vpt_fast.cli.common import (
    AmpDtype,
    Checkpoint,
    Device,
    Workers,
    check_some_prompts,
    make_method,
    one_line_errors,
)
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
from vpt_fast.extras import require_extra
from vpt_fast.methods import METHODS
from vpt_fast.train.common.paper_settings import (
    LEARNING_RATES,
    PROMPT_COUNTS,
    SEEDS,
    WEIGHT_DECAYS,
    default_optimizer,
    paper_settings,
)
from vpt_fast.train.common.recipe import Recipe
from vpt_fast.train.data.augmentation import Augmentation
from vpt_fast.train.data.image_options import ImageOptions
from vpt_fast.train.data.sources import check_format
from vpt_fast.train.loop.evaluate import resolve_device

Value = TypeVar("Value", int, float, str)


def _listed(values: Iterable[float]) -> str:
    return ",".join(f"{value:g}" for value in values)


_SEEDS = _listed(SEEDS)
_METHODS = "linear,bias,adapter,full,vpt-shallow,vpt-deep,vapt"
_PRESETS = ("demo",)


def sweep(
    output: Annotated[
        Path,
        typer.Option(
            metavar="FOLDER",
            help="Folder of the sweep: sweep.journal, sweep.csv, sweep.png and adapters/. The same "
            "command with the same folder goes on, or shares the work.",
        ),
    ],
    directory: Annotated[
        Path | None,
        typer.Argument(
            metavar="DIR",
            help="Data with train, val and test images, as train takes it. Left out with --preset.",
        ),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            help="demo: handwritten digits, the small model that comes with this package, seven "
            "methods, three learning rates, five seeds."
        ),
    ] = None,
    methods: Annotated[str, typer.Option(help=f"With commas, of {', '.join(METHODS)}.")] = _METHODS,
    model: Model = MODEL,
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = False,
    img_size: ImgSize = None,
    lrs: Annotated[
        str | None,
        typer.Option(
            help="Base learning rates of methods that are trained with SGD, with commas; by "
            f"default the papers' {_listed(LEARNING_RATES['sgd'])}."
        ),
    ] = None,
    adamw_lrs: Annotated[
        str | None,
        typer.Option(
            help=f"The same for AdamW; by default the papers' {_listed(LEARNING_RATES['adamw'])}."
        ),
    ] = None,
    weight_decays: Annotated[
        str | None,
        typer.Option(help=f"With commas; by default the papers' {_listed(WEIGHT_DECAYS)}."),
    ] = None,
    num_prompts: Annotated[
        str,
        typer.Option(
            help=f"With commas; the papers have {_listed(PROMPT_COUNTS)}. Each is a factor of time."
        ),
    ] = "10",
    seeds: Annotated[
        str,
        typer.Option(
            help="Of the final runs, with commas; the first is that of the selection too."
        ),
    ] = _SEEDS,
    recipe: PaperRecipe = None,
    epochs: Annotated[
        int | None, typer.Option(help="Of every run; by default 100, or the preset's 10.")
    ] = None,
    batch_size: BatchSize = None,
    opt: Opt = None,
    scale: Scale = (0.7, 1.0),
    hflip: HFlip = 0.5,
    no_aug: NoAug = False,
    crops: CropKind = None,
    resize: Resize = None,
    data_format: DataFormat = "auto",
    interpolation: Interpolation = "model",
    no_exif: NoExif = False,
    normalisation: Normalisation = "model",
    cache: Cache = "auto",
    amp_dtype: AmpDtype = "float32",
    memory: Memory = "speed",
    processes: Annotated[
        int,
        typer.Option(
            help="Processes on this machine that share the runs and the CPU's threads. More can be "
            "started at any time, here or on machines that see the folder."
        ),
    ] = 1,
    workers: Workers = None,
    device: Device = "auto",
) -> None:
    """Compares methods as the papers do: a grid chosen on val, final runs over seeds on test.

    Every method's learning rate, weight decay and number of prompts are those of the highest
    validation accuracy of one run on train; the final runs train on train and val together and are
    tested once, after the last epoch. What is done is kept: a sweep that was killed goes on with
    the same command.
    """
    with one_line_errors():
        require_extra("sweep")
        # Optuna and matplotlib take a second to import, which the other commands need not wait for.
        from vpt_fast.train.sweep.plan import SweepPlan, candidate, run_plan
        from vpt_fast.train.sweep.preset import EPOCHS, demo_plan
        from vpt_fast.train.sweep.report import table, write
        from vpt_fast.train.sweep.sweep import Candidate

        where = resolve_device(device)
        final_seeds = tuple(_values("seeds", seeds, int))
        if preset is not None:
            if preset not in _PRESETS:
                raise ValueError(f"--preset is {preset!r}; choose one of {', '.join(_PRESETS)}")
            if directory is not None:
                raise ValueError(f"--preset {preset} has its own data; leave {directory} out")
            plan = demo_plan(output, where, final_seeds, EPOCHS if epochs is None else epochs)
            title = f"Handwritten digits, {plan.candidates[0].recipe.epochs} epochs"
        else:
            if directory is None:
                raise ValueError("there is no DIR; name a data set, or --preset demo")
            format = check_format(directory, data_format)
            grids = {
                name: tuple(_values(flag, text, float))
                for name, flag, text in (("sgd", "lrs", lrs), ("adamw", "adamw-lrs", adamw_lrs))
                if text is not None
            }
            decays = (
                {}
                if weight_decays is None
                else {"weight_decays": tuple(_values("weight-decays", weight_decays, float))}
            )
            prompts = tuple(_values("num-prompts", num_prompts, int))
            check_some_prompts(prompts)
            candidates: list[Candidate] = []
            for name in _values("methods", methods, str):
                tuned = make_method(name, {})
                paper = paper_settings(recipe, tuned, format)
                common = Recipe(
                    epochs=100 if epochs is None else epochs,
                    batch_size=paper.batch_size if batch_size is None else batch_size,
                    amp_dtype=amp_dtype,
                    opt=default_optimizer(tuned) if opt is None else opt,
                )
                batches = recipe if batch_size is None else None
                candidates.append(
                    candidate(
                        paper.method,
                        common,
                        grids,
                        prompts=prompts,
                        opt=opt,
                        paper=batches,
                        **decays,
                    )
                )
            plan = SweepPlan(
                output,
                tuple(candidates),
                directory,
                format,
                model,
                checkpoint,
                pretrained,
                img_size,
                final_seeds,
                Augmentation(scale, hflip, no_aug or not paper.augment, crops or paper.crops),
                ImageOptions(
                    interpolation, True, normalisation, resize or paper.resize, not no_exif
                ),
                memory,
                cache,
                workers,
                where,
            )
            title = f"{directory.resolve().name}, {model}, {candidates[0].recipe.epochs} epochs"
        try:
            results = run_plan(plan, processes, tqdm.write)
        except KeyboardInterrupt:
            typer.echo(f"interrupted; the same command goes on in {output}")
            raise typer.Exit(130) from None
        typer.echo(table(results))
        written = write(output, results, title)
        typer.echo(f"written to {output}: {', '.join(path.name for path in written)}, adapters/")


def _values(flag: str, text: str, kind: Callable[[str], Value]) -> list[Value]:
    """The values of a list with commas, each once.

    Raises:
        ValueError: If one is not of that kind, or there is none.
    """
    try:
        found = [kind(part.strip()) for part in text.split(",") if part.strip()]
    except ValueError:
        found = []
    if not found:
        what = {int: "whole numbers", float: "numbers"}.get(kind, "names")  # type: ignore[call-overload]
        raise ValueError(f"--{flag} is {text!r}; give {what} with commas between them")
    return list(dict.fromkeys(found))
