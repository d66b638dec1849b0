"""`vpt-fast train`: tune a pretrained model on a folder of images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer
from tqdm import tqdm

from vpt_fast.cli.common import (
    accuracy,
    block_indices,
    make_method,
    one_line_errors,
    report_skipped,
)
from vpt_fast.cli.options import (
    MODEL,
    Accumulation,
    AutoAugment,
    BatchSize,
    BceLoss,
    Blocks,
    Cache,
    CachePrefix,
    Checkpoint,
    ClassOrder,
    ClassWeights,
    ColorJitter,
    CropKind,
    CudaGraphs,
    CutmixAlpha,
    DataFormat,
    Device,
    Dropout,
    Epochs,
    HFlip,
    HiddenDim,
    ImgSize,
    Init,
    Interpolation,
    LearningRate,
    Memory,
    MethodName,
    MixupAlpha,
    MixupMode,
    MixupProb,
    MixupSwitchProb,
    Model,
    ModelEma,
    ModelEmaDecay,
    ModelEmaWarmup,
    NoAntialias,
    NoAug,
    NoExif,
    Normalisation,
    NumBlocks,
    NumLayers,
    NumPrompts,
    Opt,
    PaperName,
    Patience,
    Pretrained,
    Reduction,
    Reprob,
    Resize,
    Resume,
    Rewind,
    RunOutput,
    Scale,
    Schedule,
    Seed,
    Settings,
    Smoothing,
    TrainingAmpDtype,
    TrainingData,
    ValFraction,
    WarmupEpochs,
    WeightDecay,
    Workers,
)
from vpt_fast.train.common.class_weights import read_class_weights
from vpt_fast.train.common.paper_settings import default_optimizer, paper_settings
from vpt_fast.train.common.parallel import process_group, rank
from vpt_fast.train.common.recipe import AUTO, Recipe, resolve_amp_dtype
from vpt_fast.train.data.augmentation import Augmentation
from vpt_fast.train.data.image_options import ImageOptions
from vpt_fast.train.data.sources import check_format
from vpt_fast.train.loop.evaluate import resolve_device
from vpt_fast.train.run.folder_run import RunResult, tune_on_folder
from vpt_fast.train.run.settings import RunSettings


def train(
    directory: TrainingData,
    model: Model = MODEL,
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = False,
    img_size: ImgSize = None,
    method: MethodName = "vpt-deep",
    recipe: PaperName = None,
    num_prompts: NumPrompts = None,
    dropout: Dropout = None,
    blocks: Blocks = None,
    num_blocks: NumBlocks = None,
    reduction: Reduction = None,
    num_layers: NumLayers = None,
    hidden_dim: HiddenDim = None,
    init: Init = None,
    rewind: Rewind = None,
    settings: Settings = None,
    epochs: Epochs = 100,
    batch_size: BatchSize = None,
    lr: LearningRate = None,
    weight_decay: WeightDecay = 1e-4,
    opt: Opt = None,
    warmup_epochs: WarmupEpochs = None,
    scale: Scale = (0.7, 1.0),
    hflip: HFlip = 0.5,
    no_aug: NoAug = False,
    crops: CropKind = None,
    resize: Resize = None,
    data_format: DataFormat = "auto",
    val_fraction: ValFraction = None,
    class_order: ClassOrder = None,
    interpolation: Interpolation = "model",
    no_antialias: NoAntialias = False,
    no_exif: NoExif = False,
    normalisation: Normalisation = "model",
    cache: Cache = "auto",
    schedule: Schedule = "epoch",
    accumulation: Accumulation = 1,
    amp_dtype: TrainingAmpDtype = AUTO,
    seed: Seed = 42,
    output: RunOutput = None,
    memory: Memory = "speed",
    cuda_graphs: CudaGraphs = None,
    prefix_cache: CachePrefix = True,
    resume: Resume = False,
    workers: Workers = None,
    device: Device = "auto",
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
    patience: Patience = None,
) -> None:
    """Tune a pretrained model on a folder of images.

    Ctrl-C ends training early and leaves a usable adapter. On several GPUs: torchrun
    --nproc-per-node 2 -m vpt_fast train ...; --batch-size is that of all GPUs together.
    """
    with one_line_errors(), process_group(resolve_device(device)) as where:
        fields: dict[str, Any] = {
            "num_prompts": num_prompts, "dropout": dropout, "num_blocks": num_blocks, "init": init,
            "reduction": reduction, "num_layers": num_layers, "hidden_dim": hidden_dim,
        }  # fmt: skip
        fields["blocks"] = block_indices(blocks)
        timms: dict[str, Any] = {
            "smoothing": smoothing, "mixup": mixup, "cutmix": cutmix, "mixup_prob": mixup_prob,
            "mixup_switch_prob": mixup_switch_prob, "mixup_mode": mixup_mode,
            "bce_loss": bce_loss, "class_weights": read_class_weights(class_weights),
            "model_ema": model_ema, "model_ema_decay": model_ema_decay,
            "model_ema_warmup": model_ema_warmup, "patience": patience,
        }  # fmt: skip
        tuned = make_method(method, fields, settings or ())
        paper = paper_settings(recipe, tuned, check_format(directory, data_format), _given(fields))
        run = RunSettings(
            directory=directory, model=model, method=paper.method,
            output=output or Path("output") / f"{directory.resolve().name}-{tuned.name}",
            recipe=Recipe(
                epochs=epochs, batch_size=paper.batch_size if batch_size is None else batch_size,
                lr=lr, weight_decay=weight_decay, warmup_epochs=warmup_epochs, seed=seed,
                opt=default_optimizer(tuned) if opt is None else opt, accumulation=accumulation,
                amp_dtype=resolve_amp_dtype(amp_dtype, where), schedule=schedule, **timms,
            ),
            augmentation=Augmentation(
                scale, hflip, no_aug or not paper.augment, crops or paper.crops, aa, reprob,
                color_jitter,
            ),
            image_options=ImageOptions(
                interpolation, not no_antialias, normalisation, resize or paper.resize, not no_exif
            ),
            checkpoint=checkpoint, pretrained=pretrained, img_size=img_size, rewind=rewind,
            data_format=data_format, val_fraction=val_fraction, class_order=class_order,
            memory=memory, cache=cache, prefix_cache=prefix_cache,
            cuda_graphs=cuda_graphs, workers=workers, device=where, resume=resume,
        )  # fmt: skip
        _report(tune_on_folder(run, log=tqdm.write), epochs)


def _given(fields: Mapping[str, Any]) -> frozenset[str]:
    return frozenset(name for name, value in fields.items() if value is not None)


def _report(result: RunResult, epochs: int) -> None:
    """Print how a run ended, on process 0; exit with status 130 if Ctrl-C ended the run."""
    if rank():
        return
    rows, adapter = result.fit.epochs, result.adapter
    if result.fit.warning:
        typer.echo(f"warning: {result.fit.warning}", err=True)
    if result.fit.interrupted:
        typer.echo(f"interrupted after {len(rows)} of {epochs} epochs; adapter: {adapter}")
        raise typer.Exit(130)
    kept = next(row for row in rows if row.epoch == result.fit.kept)
    metric = "" if kept.val_map is None else "mAP "
    score = "" if kept.score is None else f", {metric}{kept.score:.2f}% on val"
    stopped = f" of {len(rows)}, stopped early" if result.fit.stopped_early else ""
    typer.echo(f"kept epoch {kept.epoch}{stopped}{score}")
    if result.test is not None:
        typer.echo(accuracy("test", result.test))
    typer.echo(f"adapter: {adapter}")
    if result.fit.skipped:
        count = len(result.fit.skipped)
        typer.echo(f"images skipped in training, as they cannot be decoded: {count}", err=True)
    if result.test is not None:
        report_skipped(result.test.skipped)
