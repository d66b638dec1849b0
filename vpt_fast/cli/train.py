"""`vpt-fast train`: tune a pretrained model on a folder of images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vpt_fast.cli.common import block_indices, make_method, one_line_errors
from vpt_fast.cli.usage.options import (
    MODEL,
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
    MethodName,
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
from vpt_fast.cli.usage.train_options import (
    Accumulation,
    Blocks,
    CachePrefix,
    CudaGraphs,
    Dropout,
    Epochs,
    HiddenDim,
    Init,
    LearningRate,
    NoAntialias,
    NumBlocks,
    NumLayers,
    NumPrompts,
    Patience,
    Reduction,
    Resume,
    Rewind,
    RunOutput,
    Schedule,
    Seed,
    TrainingAmpDtype,
    TrainingData,
    WarmupEpochs,
    WeightDecay,
)
from vpt_fast.train.common.names import AUTO

if TYPE_CHECKING:
    import torch


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
    overwrite: Overwrite = False,
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
    with one_line_errors(), _processes(device) as where:
        from vpt_fast.cli.work import train as work

        fields: dict[str, Any] = {
            "num_prompts": num_prompts, "dropout": dropout, "num_blocks": num_blocks, "init": init,
            "reduction": reduction, "num_layers": num_layers, "hidden_dim": hidden_dim,
            "blocks": block_indices(blocks),
        }  # fmt: skip
        timms: dict[str, Any] = {
            "smoothing": smoothing, "mixup": mixup, "cutmix": cutmix, "mixup_prob": mixup_prob,
            "mixup_switch_prob": mixup_switch_prob, "mixup_mode": mixup_mode, "bce_loss": bce_loss,
            "class_weights": work.read_class_weights(class_weights), "model_ema": model_ema,
            "model_ema_decay": model_ema_decay, "model_ema_warmup": model_ema_warmup,
            "patience": patience,
        }  # fmt: skip
        tuned = make_method(method, fields, settings or ())
        paper = work.settings_of_paper(recipe, tuned, directory, data_format, fields)
        work.run(work.RunSettings(
            directory=directory, model=model, method=paper.method, memory=memory,
            output=output or Path("output") / f"{directory.resolve().name}-{tuned.name}",
            recipe=work.Recipe(
                epochs=epochs, batch_size=paper.batch_size if batch_size is None else batch_size,
                lr=lr, weight_decay=weight_decay, warmup_epochs=warmup_epochs, seed=seed,
                opt=work.default_optimizer(tuned) if opt is None else opt, schedule=schedule,
                amp_dtype=work.resolve_amp_dtype(amp_dtype, where), accumulation=accumulation,
                **timms,
            ),
            augmentation=work.augmentation(
                paper, scale, hflip, no_aug, crops, (aa, reprob, color_jitter)
            ),
            image_options=work.image_options(
                paper, interpolation, not no_antialias, normalisation, resize, not no_exif
            ),
            checkpoint=checkpoint, pretrained=pretrained, img_size=img_size, rewind=rewind,
            data_format=data_format, val_fraction=val_fraction, class_order=class_order,
            cache=cache, prefix_cache=prefix_cache, workers=workers,
            cuda_graphs=cuda_graphs, device=where, resume=resume, overwrite=overwrite,
        ))  # fmt: skip


@contextmanager
def _processes(device: str) -> Iterator[torch.device]:
    """Yield the device of this process, one of those that torchrun started, if it did."""
    from vpt_fast.train.common.parallel import process_group
    from vpt_fast.train.loop.evaluate import resolve_device

    with process_group(resolve_device(device)) as where:
        yield where
