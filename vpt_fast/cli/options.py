"""Options that several commands of `vpt-fast` have."""

from __future__ import annotations

from typing import Annotated

import typer

from vpt_fast.ops.memory_modes import MEMORY_MODES
from vpt_fast.train.common.paper_settings import RECIPES
from vpt_fast.train.common.recipe import OPTIMIZERS
from vpt_fast.train.data.image_options import INTERPOLATIONS, NORMALISATIONS
from vpt_fast.train.data.sources import FORMATS

MODEL = "vit_base_patch16_224.orig_in21k"

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
PaperRecipe = Annotated[
    str | None,
    typer.Option(
        help=f"The settings of a paper: {', '.join(RECIPES)}. Prompt dropout, batch size, "
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
        help=f"What blocks keep for backward, from fastest to smallest: "
        f"{', '.join(MEMORY_MODES)}; `vpt-fast memory` shows how much."
    ),
]
