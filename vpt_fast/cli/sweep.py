"""`vpt-fast sweep`: a grid for each method, chosen on validation, then final runs over seeds."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from vpt_fast.cli.common import given_options, one_line_errors
from vpt_fast.cli.usage import spellings
from vpt_fast.cli.usage.groups import METHOD, OPTIMISATION, OUTPUT, SPEED
from vpt_fast.cli.usage.options import (
    MODEL,
    AmpDtype,
    BatchSize,
    Cache,
    Checkpoint,
    ClassOrder,
    CropKind,
    DataFormat,
    Device,
    HFlip,
    ImgSize,
    Interpolation,
    Memory,
    Model,
    NoAug,
    NoExif,
    Normalisation,
    Opt,
    Overwrite,
    PaperName,
    Pretrained,
    Resize,
    Scale,
    Settings,
    ValFraction,
    Workers,
)
from vpt_fast.cli.usage.recipe_options import (
    AutoAugment,
    BceLoss,
    ClassWeights,
    ColorJitter,
    CutmixAlpha,
    MixupAlpha,
    MixupMode,
    MixupProb,
    MixupSwitchProb,
    ModelEma,
    ModelEmaDecay,
    ModelEmaWarmup,
    Reprob,
    Smoothing,
)
from vpt_fast.cli.usage.spellings import spelling
from vpt_fast.extras import require_extra
from vpt_fast.methods import NAMES, method_names
from vpt_fast.train.common.paper_settings import (
    LEARNING_RATES,
    PROMPT_COUNTS,
    SEEDS,
    WEIGHT_DECAYS,
)


def _listed(values: Iterable[float]) -> str:
    return ",".join(f"{value:g}" for value in values)


_SEEDS = _listed(SEEDS)
_METHODS = "linear,bias,adapter,full,vpt-shallow,vpt-deep,vapt"

SweepOutput = Annotated[
    Path,
    typer.Option(
        metavar="FOLDER",
        help="Folder of the sweep: sweep.journal, sweep.csv, sweep.png and adapters/. The same "
        "command with the same folder goes on, or shares the work; with --overwrite it starts "
        "again.",
        rich_help_panel=OUTPUT,
    ),
]
SweepData = Annotated[
    Path | None,
    typer.Argument(
        metavar="DIR",
        help="Data with train, val and test images, as train takes it. Left out with --preset.",
    ),
]
Preset = Annotated[
    str | None,
    typer.Option(
        help="demo: handwritten digits, the small model that comes with this package, seven "
        "methods, three learning rates, five seeds.",
        rich_help_panel=METHOD,
    ),
]
Methods = Annotated[
    str,
    typer.Option(
        help=f"With commas, of {', '.join(NAMES)}, or package.module:Class.",
        callback=spellings.each(spelling(method_names, spellings.METHODS)),
        rich_help_panel=METHOD,
    ),
]
LearningRates = Annotated[
    str | None,
    typer.Option(
        help="Base learning rates of methods that are trained with SGD, with commas; by "
        f"default the papers' {_listed(LEARNING_RATES['sgd'])}.",
        rich_help_panel=OPTIMISATION,
    ),
]
AdamWLearningRates = Annotated[
    str | None,
    typer.Option(
        help="The same for AdamW and Adam; by default the papers' "
        f"{_listed(LEARNING_RATES['adamw'])}.",
        rich_help_panel=OPTIMISATION,
    ),
]
WeightDecays = Annotated[
    str | None,
    typer.Option(
        help=f"With commas; by default the papers' {_listed(WEIGHT_DECAYS)}.",
        rich_help_panel=OPTIMISATION,
    ),
]
PromptCounts = Annotated[
    str,
    typer.Option(
        help=f"With commas; the papers have {_listed(PROMPT_COUNTS)}. Each is a factor of time.",
        rich_help_panel=METHOD,
    ),
]
Seeds = Annotated[
    str,
    typer.Option(
        help="Of the final runs, with commas; the first is that of the selection too.",
        rich_help_panel=OPTIMISATION,
    ),
]
SweepEpochs = Annotated[
    int | None,
    typer.Option(
        help="Of every run; by default 100, or the preset's 10.", rich_help_panel=OPTIMISATION
    ),
]
Processes = Annotated[
    int,
    typer.Option(
        help="Processes on this machine that share the runs and the CPU's threads. More can be "
        "started at any time, here or on machines that see the folder.",
        rich_help_panel=SPEED,
    ),
]


def sweep(
    context: typer.Context,
    output: SweepOutput,
    directory: SweepData = None,
    preset: Preset = None,
    methods: Methods = _METHODS,
    settings: Settings = None,
    model: Model = MODEL,
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = False,
    img_size: ImgSize = None,
    lrs: LearningRates = None,
    adamw_lrs: AdamWLearningRates = None,
    weight_decays: WeightDecays = None,
    num_prompts: PromptCounts = "10",
    seeds: Seeds = _SEEDS,
    recipe: PaperName = None,
    epochs: SweepEpochs = None,
    batch_size: BatchSize = None,
    opt: Opt = None,
    scale: Scale = (0.7, 1.0),
    hflip: HFlip = 0.5,
    no_aug: NoAug = False,
    crops: CropKind = None,
    resize: Resize = None,
    data_format: DataFormat = "auto",
    val_fraction: ValFraction = None,
    class_order: ClassOrder = None,
    interpolation: Interpolation = "model",
    no_exif: NoExif = False,
    normalisation: Normalisation = "model",
    cache: Cache = "auto",
    amp_dtype: AmpDtype = "float32",
    memory: Memory = "speed",
    processes: Processes = 1,
    workers: Workers = None,
    device: Device = "auto",
    overwrite: Overwrite = False,
    aa: AutoAugment = None,
    reprob: Reprob = 0.0,
    color_jitter: ColorJitter = 0.0,
    smoothing: Smoothing = 0.0,
    mixup: MixupAlpha = 0.0,
    cutmix: CutmixAlpha = 0.0,
    mixup_prob: MixupProb = 1.0,
    mixup_switch_prob: MixupSwitchProb = 0.5,
    mixup_mode: MixupMode = "batch",
    bce_loss: BceLoss = False,
    class_weights: ClassWeights = None,
    model_ema: ModelEma = False,
    model_ema_decay: ModelEmaDecay = 0.9998,
    model_ema_warmup: ModelEmaWarmup = False,
) -> None:
    """Compare methods as the papers do: a grid chosen on val, final runs over seeds on test.

    Every method's learning rate, weight decay and number of prompts are those of the highest
    validation accuracy of one run on train; the final runs train on train and val together and are
    tested once, after the last epoch. What is done is kept: a sweep that was killed goes on with
    the same command.
    """
    with one_line_errors():
        require_extra("sweep")
        from vpt_fast.cli.work import sweep as plans

        where = plans.resolve_device(device)
        final_seeds = tuple(plans.values("seeds", seeds, int))
        if preset is not None:
            plans.check_preset(preset, directory, given_options(context))
            plan, title = plans.preset_plan(output, where, final_seeds, epochs)
        else:
            data, format = plans.data_set(directory, data_format)
            grid = plans.Grid(
                methods, lrs, adamw_lrs, weight_decays, num_prompts, tuple(settings or ())
            )
            timms = {
                "smoothing": smoothing, "mixup": mixup, "cutmix": cutmix, "mixup_prob": mixup_prob,
                "mixup_switch_prob": mixup_switch_prob, "mixup_mode": mixup_mode,
                "bce_loss": bce_loss, "model_ema": model_ema,
                "class_weights": plans.read_class_weights(class_weights),
                "model_ema_decay": model_ema_decay, "model_ema_warmup": model_ema_warmup,
            }  # fmt: skip
            amp_dtype = plans.resolve_amp_dtype(amp_dtype, where)
            runs = plans.Runs(recipe, epochs, batch_size, opt, amp_dtype, timms)
            candidates, paper = plans.candidates(grid, runs, format)
            plan = plans.SweepPlan(
                output=output, candidates=candidates, directory=data, data_format=format,
                val_fraction=val_fraction, class_order=class_order,
                model=model, checkpoint=checkpoint, pretrained=pretrained, img_size=img_size,
                seeds=final_seeds,
                augmentation=plans.augmentation(
                    paper, scale, hflip, no_aug, crops, (aa, reprob, color_jitter)
                ),
                image_options=plans.image_options(
                    paper, interpolation, True, normalisation, resize, not no_exif
                ),
                memory=memory, cache=cache, workers=workers, device=where,
            )  # fmt: skip
            title = f"{data.resolve().name}, {model}, {candidates[0].recipe.epochs} epochs"
        plans.run(plan, processes, title, overwrite)
