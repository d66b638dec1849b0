"""Options of `vpt-fast train` alone, as types of its parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vpt_fast.cli.usage import spellings
from vpt_fast.cli.usage.groups import DATA, METHOD, OPTIMISATION, OUTPUT, SPEED
from vpt_fast.cli.usage.options import DTYPES
from vpt_fast.cli.usage.spellings import spelling
from vpt_fast.methods import INITS
from vpt_fast.train.common.names import (
    AMP_DTYPES,
    DEFAULT_LR,
    SCHEDULES,
    SGD_LR_WITHOUT_WARMUP,
    SIXTEEN_BIT,
)

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
        "training images.",
        callback=spelling(INITS),
        rich_help_panel=METHOD,
    ),
]
Rewind = Annotated[
    Path | None,
    typer.Option(
        metavar="RUN",
        help="Finished run of e2vpt: its least important prompts and pieces of prompts are pruned "
        "(--set prune_tokens=0.2, prune_pieces=0.2), and the rest is trained again from the "
        "initial values of this seed.",
        rich_help_panel=METHOD,
    ),
]
NumPrompts = Annotated[
    int | None, typer.Option(help="Prompts (of each block); by default 10.", rich_help_panel=METHOD)
]
Dropout = Annotated[
    float | None,
    typer.Option(help="Prompt dropout, in [0, 1); by default 0.", rich_help_panel=METHOD),
]
Blocks = Annotated[
    str | None,
    typer.Option(
        help="Blocks that get prompts (vpt-deep), such as 9-11 or 0,6; by default all.",
        rich_help_panel=METHOD,
    ),
]
NumBlocks = Annotated[
    int | None,
    typer.Option(
        help="Last blocks that are trained (partial); by default 1.", rich_help_panel=METHOD
    ),
]
Reduction = Annotated[
    int | None,
    typer.Option(
        help="Model width over the adapters' (adapter); by default 8.", rich_help_panel=METHOD
    ),
]
NumLayers = Annotated[
    int | None,
    typer.Option(help="Layers of the classifier (mlp-head); by default 3.", rich_help_panel=METHOD),
]
HiddenDim = Annotated[
    int | None,
    typer.Option(
        help="Hidden width: of the feature projector (vapt), or of mlp-head.",
        rich_help_panel=METHOD,
    ),
]
Epochs = Annotated[
    int, typer.Option(help="Passes over the training images.", rich_help_panel=OPTIMISATION)
]
LearningRate = Annotated[
    float | None,
    typer.Option(
        help="Base learning rate as in the papers: multiplied by batch size / 256. By default "
        + ", ".join(f"{value:g} ({name})" for name, value in DEFAULT_LR.items())
        + f", {SGD_LR_WITHOUT_WARMUP:g} (sgd without warm-up); worth choosing on val/.",
        rich_help_panel=OPTIMISATION,
    ),
]
WeightDecay = Annotated[
    float,
    typer.Option(help="For all that is trained but the head's bias.", rich_help_panel=OPTIMISATION),
]
WarmupEpochs = Annotated[
    int | None,
    typer.Option(
        help="Epochs of linear warm-up from 0; by default a tenth of --epochs, none of less "
        "than ten.",
        rich_help_panel=OPTIMISATION,
    ),
]
NoAntialias = Annotated[
    bool, typer.Option("--no-antialias", help="Resize without antialiasing.", rich_help_panel=DATA)
]
Schedule = Annotated[
    str,
    typer.Option(
        help="The learning rate changes after each epoch, as published, or step.",
        callback=spelling(SCHEDULES),
        rich_help_panel=OPTIMISATION,
    ),
]
Accumulation = Annotated[
    int,
    typer.Option(help="Parts that a batch is computed in, for less memory.", rich_help_panel=SPEED),
]
TrainingAmpDtype = Annotated[
    str,
    typer.Option(
        help=f"Type that torch.autocast computes in: {', '.join(AMP_DTYPES)}; {SIXTEEN_BIT}, or "
        "--amp, takes the device's own of 16 bits. What is trained stays float32. By default "
        "auto, bfloat16 on a GPU that has it.",
        callback=spelling(DTYPES, spellings.DTYPES),
        rich_help_panel=SPEED,
    ),
]
Seed = Annotated[
    int,
    typer.Option(
        help="Of initial values, order, augmentation and dropout.", rich_help_panel=OPTIMISATION
    ),
]
RunOutput = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="New folder for the adapters best/ and last/, metrics.csv and tensorboard/; by "
        "default output/<DIR's name>-<method>.",
        rich_help_panel=OUTPUT,
    ),
]
CudaGraphs = Annotated[
    bool | None,
    typer.Option(
        "--cuda-graphs/--no-cuda-graphs",
        help="Replay a step's forward, loss and backward as one CUDA graph. By default on a "
        "GPU with one process; where it cannot be done steps run as without, and a warning "
        "says why.",
        rich_help_panel=SPEED,
    ),
]
CachePrefix = Annotated[
    bool,
    typer.Option(
        help="With --no-aug: compute what enters the first block that is trained or has "
        "prompts once per image.",
        rich_help_panel=SPEED,
    ),
]
Resume = Annotated[
    bool,
    typer.Option(
        "--resume",
        help="Go on in --output after the last epoch that ended there, if any.",
        rich_help_panel=OUTPUT,
    ),
]
Patience = Annotated[
    int | None,
    typer.Option(
        metavar="EPOCHS",
        help="Stop after so many epochs without a better score on val/.",
        rich_help_panel=OPTIMISATION,
    ),
]
