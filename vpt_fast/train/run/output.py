"""Output folder of a run."""

from __future__ import annotations

import re
from pathlib import Path

from vpt_fast.train.common.metrics import FILE as METRICS
from vpt_fast.train.common.output_folder import Output
from vpt_fast.train.loop.checkpoint import FILE as CHECKPOINT
from vpt_fast.train.loop.fit_result import BEST, LAST
from vpt_fast.train.run.record import FILE as RECORD
from vpt_fast.train.run.settings import RunSettings


def _is_run(folder: Path) -> bool:
    return (folder / RECORD).is_file() or (folder / CHECKPOINT).is_file()


RUN = Output(
    "train",
    _is_run,
    re.compile(f"{BEST}|{LAST}|tensorboard|{re.escape(METRICS)}|{RECORD}|{CHECKPOINT}"),
    RECORD,
    ", go on in it with --resume",
)


def check_output(settings: RunSettings) -> None:
    """Check that a run can be written to its output folder, or go on in it.

    Raises:
        FileExistsError: If the folder holds something else, or a run that may not be replaced.
        ValueError: If the settings contradict each other.
    """
    output = settings.output
    if not settings.resume:
        RUN.check(output, settings.overwrite)
        rewound = settings.rewind
        if rewound is not None and output.resolve() in (
            rewound.resolve(),
            *rewound.resolve().parents,
        ):
            raise ValueError(f"--rewind {rewound} is in --output, which is overwritten")
    elif settings.overwrite:
        raise ValueError("--resume goes on and --overwrite starts again; leave one out")
    elif not RUN.is_free(output) and not _is_run(output):
        raise FileExistsError(
            f"the output folder {output} holds other files and no run that could go on; choose "
            "another with --output"
        )
