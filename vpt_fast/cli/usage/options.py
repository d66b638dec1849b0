"""Options of the commands of `vpt-fast`, as types of their parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vpt_fast.cli.usage import spellings
from vpt_fast.cli.usage.groups import (
    AUGMENTATION,
    BACKBONE,
    DATA,
    METHOD,
    OPTIMISATION,
    OUTPUT,
    SPEED,
)
from vpt_fast.cli.usage.spellings import spelling
from vpt_fast.methods import NAMES, method_names
from vpt_fast.ops.memory_modes import MEMORY_MODES
from vpt_fast.train.common.names import (
    AMP_DTYPES,
    AUTO,
    CACHES,
    CLASS_ORDERS,
    CROPS,
    FORMATS,
    INTERPOLATIONS,
    NORMALISATIONS,
    OPTIMIZERS,
    RESIZES,
    SIXTEEN_BIT,
    SPLITS,
)
from vpt_fast.train.common.paper_settings import PAPERS

MODEL = "vit_base_patch16_224.orig_in21k"

DTYPES = (*AMP_DTYPES, AUTO, SIXTEEN_BIT)

ADAPTER_HELP = "Folder of an adapter, the output folder of a run, or hf-hub:user/name"

Adapter = Annotated[
    Path, typer.Argument(metavar="ADAPTER", help=f"{ADAPTER_HELP}, an adapter on the Hub.")
]
Checkpoint = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="File with the backbone's weights (.safetensors, or what torch.save wrote).",
        rich_help_panel=BACKBONE,
    ),
]
Device = Annotated[
    str,
    typer.Option(
        help="auto, cpu, cuda or cuda:<index>; auto takes a GPU if there is one.",
        callback=spellings.device,
        rich_help_panel=SPEED,
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        "--workers",
        "-j",
        help="Processes that load images; by default 0 on the CPU and up to 4 with a GPU.",
        rich_help_panel=SPEED,
    ),
]
AmpDtype = Annotated[
    str,
    typer.Option(
        help=f"Type that torch.autocast computes in: {', '.join(AMP_DTYPES)}; {SIXTEEN_BIT}, or "
        "--amp, takes the device's own of 16 bits.",
        callback=spelling(DTYPES, spellings.DTYPES),
        rich_help_panel=SPEED,
    ),
]
Model = Annotated[
    str,
    typer.Option(
        help="timm's name of a vision transformer, with or without a tag; or vpt_fast_demo, "
        "the small one for 32 x 32 pixels that comes with this package.",
        callback=spellings.model,
        rich_help_panel=BACKBONE,
    ),
]
Pretrained = Annotated[
    bool,
    typer.Option(
        "--pretrained", help="Download timm's weights of the model.", rich_help_panel=BACKBONE
    ),
]
ImgSize = Annotated[
    int | None,
    typer.Option(
        min=1, help="Image size in pixels; by default the model's.", rich_help_panel=BACKBONE
    ),
]
PaperName = Annotated[
    str | None,
    typer.Option(
        help=f"The settings of a paper: {', '.join(PAPERS)}. Prompt dropout, batch size, "
        "resizing and augmentation, where they are not given.",
        callback=spelling(PAPERS),
        rich_help_panel=OPTIMISATION,
    ),
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        "--batch-size",
        "-b",
        help="Images per step; by default 64, or --recipe's.",
        rich_help_panel=OPTIMISATION,
    ),
]
Opt = Annotated[
    str | None,
    typer.Option(
        help=f"{', '.join(OPTIMIZERS)}; by default adamw for full, partial, bias and adapter, "
        "and sgd for the others, as in the papers.",
        callback=spelling(OPTIMIZERS),
        rich_help_panel=OPTIMISATION,
    ),
]
Scale = Annotated[
    tuple[float, float],
    typer.Option(
        metavar="LOW HIGH",
        help="Part of the area that random crops keep.",
        rich_help_panel=AUGMENTATION,
    ),
]
HFlip = Annotated[
    float, typer.Option(help="Probability of a horizontal flip.", rich_help_panel=AUGMENTATION)
]
NoAug = Annotated[
    bool,
    typer.Option(
        "--no-aug",
        help="No augmentation: resize and crop the centre. What enters the first block that is "
        "trained or has prompts is then computed once per image.",
        rich_help_panel=AUGMENTATION,
    ),
]
CropKind = Annotated[
    str | None,
    typer.Option(
        help="Random crops: scaled, a part of the area, resized; or plain, the model's size, "
        "out of the image as it is resized for evaluation. By default scaled.",
        callback=spelling(CROPS),
        rich_help_panel=AUGMENTATION,
    ),
]
Resize = Annotated[
    str | None,
    typer.Option(
        help="model, its own way; squash, both sides to the model's size; or crop, the "
        "shorter side to 256 / 224 of it. By default model.",
        callback=spelling(RESIZES),
        rich_help_panel=DATA,
    ),
]
ValFraction = Annotated[
    float | None,
    typer.Option(
        help="Part of each class's training images that becomes the val split of data without "
        "one: the same for every seed, recorded, and found again by eval and report.",
        rich_help_panel=DATA,
    ),
]
ClassOrder = Annotated[
    str | None,
    typer.Option(
        help=f"{', '.join(CLASS_ORDERS)}: how class names are sorted; class10 comes before class2 "
        "as a string. By default strings, or a list of classes in the data.",
        callback=spelling(CLASS_ORDERS),
        rich_help_panel=DATA,
    ),
]
DataFormat = Annotated[
    str,
    typer.Option(
        "--format",
        help=f"Of DIR: {', '.join(FORMATS)}.",
        callback=spelling(FORMATS, spellings.FORMATS),
        rich_help_panel=DATA,
    ),
]
Interpolation = Annotated[
    str,
    typer.Option(
        help=f"Of resizing: {', '.join(INTERPOLATIONS)}.",
        callback=spelling(INTERPOLATIONS),
        rich_help_panel=DATA,
    ),
]
Normalisation = Annotated[
    str,
    typer.Option(
        help=f"{', '.join(NORMALISATIONS)}.",
        callback=spelling(NORMALISATIONS),
        rich_help_panel=DATA,
    ),
]
NoExif = Annotated[
    bool,
    typer.Option(
        "--no-exif",
        help="Take images as they are stored, as timm does; by default they are turned as their "
        "EXIF orientation says. The adapter records it, and the other commands keep to that.",
        rich_help_panel=DATA,
    ),
]
Cache = Annotated[
    str,
    typer.Option(
        help="Training and validation images are decoded once and kept (memory) or again in "
        "every epoch (stream); auto keeps up to 1 GiB of each.",
        callback=spelling(CACHES),
        rich_help_panel=SPEED,
    ),
]
Memory = Annotated[
    str,
    typer.Option(
        help=f"What blocks save for backward, from fastest to smallest: "
        f"{', '.join(MEMORY_MODES)}; `vpt-fast memory` shows how much.",
        callback=spelling(MEMORY_MODES),
        rich_help_panel=SPEED,
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Replace what an earlier run of this command wrote there.",
        rich_help_panel=OUTPUT,
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        help=f"Of weights and images: {', '.join(AMP_DTYPES)}.",
        callback=spelling(AMP_DTYPES, spellings.DTYPES),
    ),
]
SplitName = Annotated[
    str | None,
    typer.Option(
        "--split",
        help="test, val or train; by default test, else val.",
        callback=spelling(SPLITS, spellings.SPLITS),
        rich_help_panel=DATA,
    ),
]
MethodName = Annotated[
    str,
    typer.Option(
        help=f"{', '.join(NAMES)}; one of an installed package, or package.module:Class.",
        callback=spelling(method_names, spellings.METHODS),
        rich_help_panel=METHOD,
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="Another field of the method, such as --set rank=4; repeat it for more.",
        rich_help_panel=METHOD,
    ),
]
