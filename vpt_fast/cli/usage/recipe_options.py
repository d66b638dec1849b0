"""Options of `train` and `sweep` with the names of timm's train.py; all are off by default."""

from __future__ import annotations

from typing import Annotated

import typer

from vpt_fast.cli.usage.groups import AUGMENTATION, OPTIMISATION
from vpt_fast.cli.usage.spellings import spelling
from vpt_fast.train.common.names import BALANCED, MIXUP_MODES

Smoothing = Annotated[
    float, typer.Option(help="Label smoothing, in [0, 1).", rich_help_panel=OPTIMISATION)
]
MixupAlpha = Annotated[
    float,
    typer.Option(
        "--mixup",
        help="Alpha of Mixup of training images; 0 is off.",
        rich_help_panel=AUGMENTATION,
    ),
]
CutmixAlpha = Annotated[
    float,
    typer.Option(
        "--cutmix",
        help="Alpha of CutMix of training images; 0 is off.",
        rich_help_panel=AUGMENTATION,
    ),
]
MixupProb = Annotated[
    float, typer.Option(help="Probability of Mixup or CutMix.", rich_help_panel=AUGMENTATION)
]
MixupSwitchProb = Annotated[
    float,
    typer.Option(
        help="Probability of CutMix in place of Mixup, with both.", rich_help_panel=AUGMENTATION
    ),
]
MixupMode = Annotated[
    str,
    typer.Option(
        help=f"Mixed alike: each {', '.join(MIXUP_MODES)}.",
        callback=spelling(MIXUP_MODES),
        rich_help_panel=AUGMENTATION,
    ),
]
AutoAugment = Annotated[
    str | None,
    typer.Option(
        "--aa",
        help="RandAugment or another policy of timm's: rand-m9-mstd0.5-inc1.",
        rich_help_panel=AUGMENTATION,
    ),
]
Reprob = Annotated[
    float,
    typer.Option(help="Probability that a rectangle is erased.", rich_help_panel=AUGMENTATION),
]
ColorJitter = Annotated[
    float,
    typer.Option(
        help="Random factor of brightness, contrast and saturation.", rich_help_panel=AUGMENTATION
    ),
]
BceLoss = Annotated[
    bool,
    typer.Option(
        "--bce-loss",
        help="Binary cross-entropy also of one label an image.",
        rich_help_panel=OPTIMISATION,
    ),
]
ClassWeights = Annotated[
    str | None,
    typer.Option(
        metavar="WEIGHTS",
        help="Of the classes in the loss: balanced, by inverse frequency in the training images; "
        "numbers as 1,2.5,1 in the order of the classes; or a file with a JSON list of them.",
        callback=spelling((BALANCED,)),
        rich_help_panel=OPTIMISATION,
    ),
]
ModelEma = Annotated[
    bool,
    typer.Option(
        "--model-ema",
        help="Validation, test and adapters have an exponential moving average of what is trained.",
        rich_help_panel=OPTIMISATION,
    ),
]
ModelEmaDecay = Annotated[
    float,
    typer.Option(help="Share of the average that a step keeps.", rich_help_panel=OPTIMISATION),
]
ModelEmaWarmup = Annotated[
    bool,
    typer.Option(
        "--model-ema-warmup",
        help="That share grows from 0 with the steps.",
        rich_help_panel=OPTIMISATION,
    ),
]
