"""Options of the commands of `vpt-fast`, as types of their parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vpt_fast.methods import INITS, METHODS
from vpt_fast.ops.memory_modes import MEMORY_MODES
from vpt_fast.train.common.paper_settings import PAPERS
from vpt_fast.train.common.recipe import (
    AMP_DTYPES,
    DEFAULT_LR,
    MIXUP_MODES,
    OPTIMIZERS,
    SGD_LR_WITHOUT_WARMUP,
)
from vpt_fast.train.data.formats.class_folders import CLASS_ORDERS
from vpt_fast.train.data.image_options import INTERPOLATIONS, NORMALISATIONS
from vpt_fast.train.data.sources import FORMATS

MODEL = "vit_base_patch16_224.orig_in21k"

Adapter = Annotated[
    Path,
    typer.Argument(metavar="ADAPTER", help="Folder of an adapter, or the output folder of a run."),
]
Checkpoint = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="File with the backbone's weights (.safetensors, or what torch.save wrote).",
    ),
]
Device = Annotated[
    str,
    typer.Option(help="auto, cpu, cuda or cuda:<index>; auto takes a GPU if there is one."),
]
Workers = Annotated[
    int | None,
    typer.Option(
        "--workers",
        "-j",
        help="Processes that load images; by default 0 on the CPU and up to 4 with a GPU.",
    ),
]
AmpDtype = Annotated[
    str, typer.Option(help=f"Type that torch.autocast computes in: {', '.join(AMP_DTYPES)}.")
]
Model = Annotated[
    str,
    typer.Option(
        help="timm's name of a vision transformer, with or without a tag; or vpt_fast_demo, "
        "the small one for 32 x 32 pixels that comes with this package."
    ),
]
Pretrained = Annotated[
    bool, typer.Option("--pretrained", help="Download timm's weights of the model.")
]
ImgSize = Annotated[
    int | None, typer.Option(min=1, help="Image size in pixels; by default the model's.")
]
PaperName = Annotated[
    str | None,
    typer.Option(
        help=f"The settings of a paper: {', '.join(PAPERS)}. Prompt dropout, batch size, "
        "resizing and augmentation, where they are not given."
    ),
]
BatchSize = Annotated[
    int | None,
    typer.Option("--batch-size", "-b", help="Images per step; by default 64, or --recipe's."),
]
Opt = Annotated[
    str | None,
    typer.Option(
        help=f"{', '.join(OPTIMIZERS)}; by default adamw for full, partial, bias and adapter, "
        "and sgd for the others, as in the papers."
    ),
]
Scale = Annotated[
    tuple[float, float],
    typer.Option(metavar="LOW HIGH", help="Part of the area that random crops keep."),
]
HFlip = Annotated[float, typer.Option(help="Probability of a horizontal flip.")]
NoAug = Annotated[
    bool,
    typer.Option(
        "--no-aug",
        help="No augmentation: resize and crop the centre. What enters the first block that is "
        "trained or has prompts is then computed once per image.",
    ),
]
CropKind = Annotated[
    str | None,
    typer.Option(
        help="Random crops: scaled, a part of the area, resized; or plain, the model's size, "
        "out of the image as it is resized for evaluation. By default scaled."
    ),
]
Resize = Annotated[
    str | None,
    typer.Option(
        help="model, its own way; squash, both sides to the model's size; or crop, the "
        "shorter side to 256 / 224 of it. By default model."
    ),
]
ValFraction = Annotated[
    float | None,
    typer.Option(
        help="Part of each class's training images that becomes the val split of data without "
        "one: the same for every seed, recorded, and found again by eval and report."
    ),
]
ClassOrder = Annotated[
    str | None,
    typer.Option(
        help=f"{', '.join(CLASS_ORDERS)}: how class names are sorted; class10 comes before class2 "
        "as a string. By default strings, or a list of classes in the data."
    ),
]
DataFormat = Annotated[str, typer.Option("--format", help=f"Of DIR: {', '.join(FORMATS)}.")]
Interpolation = Annotated[str, typer.Option(help=f"Of resizing: {', '.join(INTERPOLATIONS)}.")]
Normalisation = Annotated[str, typer.Option(help=f"{', '.join(NORMALISATIONS)}.")]
NoExif = Annotated[
    bool,
    typer.Option(
        "--no-exif",
        help="Take images as they are stored, as timm does; by default they are turned as their "
        "EXIF orientation says. The adapter records it, and the other commands keep to that.",
    ),
]
Cache = Annotated[
    str,
    typer.Option(
        help="Training and validation images are decoded once and kept (memory) or again in "
        "every epoch (stream); auto keeps up to 1 GiB of each."
    ),
]
Memory = Annotated[
    str,
    typer.Option(
        help=f"What blocks save for backward, from fastest to smallest: "
        f"{', '.join(MEMORY_MODES)}; `vpt-fast memory` shows how much."
    ),
]

# Of `train` alone.
TrainingData = Annotated[
    Path,
    typer.Argument(
        metavar="DIR",
        help="Folder with train/<class>/<image>, and if you have them val/ and test/; class "
        "folders without splits; a CSV of paths and labels; or another of --format. With "
        "val/ the epoch that is best on it is kept, without it the last one; test/ is "
        "evaluated once, with the kept epoch.",
    ),
]
Init = Annotated[
    str | None,
    typer.Option(
        help=f"Initial prompts (vpt-deep): {', '.join(INITS)}; all but the first are made of "
        "training images."
    ),
]
Rewind = Annotated[
    Path | None,
    typer.Option(
        metavar="RUN",
        help="Finished run of e2vpt: its least important prompts and pieces of prompts are pruned "
        "(--set prune_tokens=0.2, prune_pieces=0.2), and the rest is trained again from the "
        "initial values of this seed.",
    ),
]
MethodName = Annotated[
    str,
    typer.Option(
        help=f"{', '.join(METHODS)}; one of an installed package, or package.module:Class."
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="Another field of the method, such as --set rank=4; repeat it for more.",
    ),
]
NumPrompts = Annotated[int | None, typer.Option(help="Prompts (of each block); by default 10.")]
Dropout = Annotated[float | None, typer.Option(help="Prompt dropout, in [0, 1); by default 0.")]
Blocks = Annotated[
    str | None,
    typer.Option(help="Blocks that get prompts (vpt-deep), such as 9-11 or 0,6; by default all."),
]
NumBlocks = Annotated[
    int | None, typer.Option(help="Last blocks that are trained (partial); by default 1.")
]
Reduction = Annotated[
    int | None, typer.Option(help="Model width over the adapters' (adapter); by default 8.")
]
NumLayers = Annotated[
    int | None, typer.Option(help="Layers of the classifier (mlp-head); by default 3.")
]
HiddenDim = Annotated[
    int | None,
    typer.Option(help="Hidden width: of the feature projector (vapt), or of mlp-head."),
]
Epochs = Annotated[int, typer.Option(help="Passes over the training images.")]
LearningRate = Annotated[
    float | None,
    typer.Option(
        help="Base learning rate as in the papers: multiplied by batch size / 256. By default "
        + ", ".join(f"{value:g} ({name})" for name, value in DEFAULT_LR.items())
        + f", {SGD_LR_WITHOUT_WARMUP:g} (sgd without warm-up); worth choosing on val/."
    ),
]
WeightDecay = Annotated[float, typer.Option(help="For all that is trained but the head's bias.")]
WarmupEpochs = Annotated[
    int | None,
    typer.Option(
        help="Epochs of linear warm-up from 0; by default a tenth of --epochs, none of less "
        "than ten."
    ),
]
NoAntialias = Annotated[bool, typer.Option("--no-antialias", help="Resize without antialiasing.")]
Schedule = Annotated[
    str, typer.Option(help="The learning rate changes after each epoch, as published, or step.")
]
Accumulation = Annotated[
    int, typer.Option(help="Parts that a batch is computed in, for less memory.")
]
TrainingAmpDtype = Annotated[
    str,
    typer.Option(
        help=f"Type that torch.autocast computes in: {', '.join(AMP_DTYPES)}; what is trained "
        "stays float32. By default auto, bfloat16 on a GPU that has it."
    ),
]
Seed = Annotated[int, typer.Option(help="Of initial values, order, augmentation and dropout.")]
RunOutput = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="New folder for the adapters best/ and last/, metrics.csv and tensorboard/; by "
        "default output/<DIR's name>-<method>.",
    ),
]
CudaGraphs = Annotated[
    bool | None,
    typer.Option(
        "--cuda-graphs/--no-cuda-graphs",
        help="Replay a step's forward, loss and backward as one CUDA graph. By default on a "
        "GPU with one process; where it cannot be done steps run as without, and a warning "
        "says why.",
    ),
]
CachePrefix = Annotated[
    bool,
    typer.Option(
        help="With --no-aug: compute what enters the first block that is trained or has "
        "prompts once per image."
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume", help="Go on in --output after the last epoch that ended there, if any."
    ),
]

# Of `train` and `sweep`, with the names of timm's train.py; all are off by default.
Smoothing = Annotated[float, typer.Option(help="Label smoothing, in [0, 1).")]
MixupAlpha = Annotated[
    float, typer.Option("--mixup", help="Alpha of Mixup of training images; 0 is off.")
]
CutmixAlpha = Annotated[
    float, typer.Option("--cutmix", help="Alpha of CutMix of training images; 0 is off.")
]
MixupProb = Annotated[float, typer.Option(help="Probability of Mixup or CutMix.")]
MixupSwitchProb = Annotated[
    float, typer.Option(help="Probability of CutMix in place of Mixup, with both.")
]
MixupMode = Annotated[str, typer.Option(help=f"Mixed alike: each {', '.join(MIXUP_MODES)}.")]
AutoAugment = Annotated[
    str | None,
    typer.Option("--aa", help="RandAugment or another policy of timm's: rand-m9-mstd0.5-inc1."),
]
Reprob = Annotated[float, typer.Option(help="Probability that a rectangle is erased.")]
ColorJitter = Annotated[
    float, typer.Option(help="Random factor of brightness, contrast and saturation.")
]
BceLoss = Annotated[
    bool, typer.Option("--bce-loss", help="Binary cross-entropy also of one label an image.")
]
ClassWeights = Annotated[
    str | None,
    typer.Option(
        metavar="WEIGHTS",
        help="Of the classes in the loss: balanced, by inverse frequency in the training images; "
        "numbers as 1,2.5,1 in the order of the classes; or a file with a JSON list of them.",
    ),
]
ModelEma = Annotated[
    bool,
    typer.Option(
        "--model-ema",
        help="Validation, test and adapters have an exponential moving average of what is trained.",
    ),
]
ModelEmaDecay = Annotated[float, typer.Option(help="Share of the average that a step keeps.")]
ModelEmaWarmup = Annotated[
    bool, typer.Option("--model-ema-warmup", help="That share grows from 0 with the steps.")
]
Patience = Annotated[
    int | None,
    typer.Option(
        metavar="EPOCHS", help="Stop after so many epochs without a better score on val/."
    ),
]
