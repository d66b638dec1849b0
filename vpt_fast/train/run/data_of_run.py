"""Data of a run, opened again as it was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from vpt_fast.train.data.holdout import split_off
from vpt_fast.train.data.sources import open_source
from vpt_fast.train.data.split import ImageSource
from vpt_fast.train.loop.fit_result import BEST, LAST
from vpt_fast.train.run.record import RunRecord, data_digest, read_record


def record_of(adapter: Path) -> RunRecord | None:
    """Return the record of the run that an adapter is of; None where there is none.

    Args:
        adapter: Output folder of the run, or folder of its adapter.

    Raises:
        ValueError: If the record is damaged or of a newer version.
    """
    folder = adapter.resolve()
    return read_record(folder.parent if folder.name in (BEST, LAST) else folder)


def open_as_trained(
    directory: Path,
    format: str,
    known: Sequence[str] | None,
    record: RunRecord | None,
    val_fraction: float | None = None,
) -> ImageSource:
    """Open a data set, with the validation split that a run drew from the same images.

    Args:
        directory: Folder of the data set, or its file.
        format: One of `names.FORMATS`.
        known: Class names of the adapter, or None.
        record: Record of the run, or None.
        val_fraction: Part of the training images to split off, whatever the record says.

    Raises:
        FileNotFoundError, ValueError: As `open_source`.
    """
    source = open_source(directory, format, known, val_fraction=val_fraction)
    part = None if record is None else record.data.get("val_fraction")
    if record is None or part is None or val_fraction is not None:
        return source
    if "train" in source.splits and "val" not in source.splits:
        held = split_off(source, part)
        if data_digest(directory, held) == record.data.get("digest"):
            return held
        if str(directory.resolve()) == record.data.get("directory"):
            line = (
                f"{directory} has other images than at the run's time, so that those which it held "
                "out are not known"
            )
            return replace(source, warnings=[*source.warnings, line])
    return source
