"""Content of a run's output folder, for a report; the run may have ended at any point."""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from vpt_fast.adapter.files import read_config
from vpt_fast.adapter.hub.card import trained_scalars
from vpt_fast.adapter.hub.names import is_on_hub
from vpt_fast.train.common.curves import directory_size
from vpt_fast.train.common.metrics import Epoch
from vpt_fast.train.loop.fit_result import FitResult
from vpt_fast.train.run.record import FINISHED, INTERRUPTED, RunRecord, read_record
from vpt_fast.train.run.tuned_model import adapter_folder

METRICS_FILE = "metrics.csv"
# Fields of `Epoch` and their columns in the header that timm's writer writes.
_COLUMNS = {
    "epoch": "epoch",
    "lr": "lr",
    "train_loss": "train_loss",
    "train_top1": "train_top1",
    "images_per_second": "train_images_per_second",
    "val_loss": "eval_loss",
    "val_top1": "eval_top1",
    "val_map": "eval_map",
}

_OPTIONAL = ("val_loss", "val_top1", "val_map", "train_top1")


@dataclass(frozen=True)
class RunFolder:
    """Content of a run's folder.

    Attributes:
        path: Path of the folder.
        name: Unique name of the run on the page.
        record: Content of `run.json`; None for a run without it.
        epochs: A row per finished epoch.
        adapter: Folder of the selected adapter; None if there is none.
        config: Configuration of the adapter; None if there is none.
        notes: Sentences about missing or damaged files.
    """

    path: Path
    name: str
    record: RunRecord | None
    epochs: list[Epoch]
    adapter: Path | None
    config: dict[str, Any] | None
    notes: tuple[str, ...]

    @property
    def method(self) -> dict[str, Any]:
        """Name and fields of the method; empty if it is not known."""
        if self.record is not None:
            return self.record.method
        return {} if self.config is None else self.config["method"]

    @property
    def model(self) -> str:
        """timm's name of the model, with its tag if that is known; empty if it is not known."""
        if self.record is not None:
            return str(self.record.model.get("name", ""))
        if self.config is None:
            return ""
        model = self.config["model"]
        tag = model.get("pretrained_tag")
        return f"{model.get('name')}.{tag}" if tag else str(model.get("name"))

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes in the order of the labels; None if they are not known."""
        if self.record is not None:
            return self.record.class_names
        return None if self.config is None else self.config["class_names"]

    @property
    def kept(self) -> Epoch | None:
        """Row of the selected epoch; without a record, selected by the rule of training."""
        if not self.epochs:
            return None
        if self.record is not None and self.record.kept_epoch is not None:
            rows = {row.epoch: row for row in self.epochs}
            return rows.get(self.record.kept_epoch)
        scored = [row for row in self.epochs if row.score is not None]
        if not scored:
            return self.epochs[-1]
        # Ties go to the first epoch, as in training.
        return max(scored, key=lambda row: (row.score or 0.0, -(row.val_loss or 0.0)))

    @property
    def images_per_second(self) -> float | None:
        """Median throughput of the training epochs."""
        rate = FitResult(self.epochs).images_per_second
        return None if math.isnan(rate) else rate

    @cached_property
    def trained(self) -> int | None:
        """Number of trained parameters; None if neither record nor adapter tells it."""
        if self.record is not None and "trained" in self.record.parameters:
            return self.record.parameters["trained"]
        if self.adapter is None:
            return None
        try:
            return trained_scalars(self.adapter)
        except SafetensorError:
            return None  # evaluation reports the damage

    @cached_property
    def adapter_bytes(self) -> int | None:
        """Size of the adapter's files."""
        return None if self.adapter is None else directory_size(self.adapter)

    @property
    def state(self) -> str:
        """End of the run in words."""
        done = f"{len(self.epochs)} epochs" if len(self.epochs) != 1 else "1 epoch"
        if self.record is None:
            return f"{done}; how it ended is not recorded"
        of = self.record.recipe.get("epochs")
        if self.record.state == FINISHED:
            early = f" of {of}, stopped early" if self.record.stopped_early else ""
            return f"finished, {done}{early}"
        if self.record.state == INTERRUPTED:
            return f"interrupted after {done} of {of}"
        if self.record.error:
            return f"failed after {done} of {of}: {self.record.error}"
        return f"not ended: {done} of {of} so far; it was killed, or is still being trained"


def read_runs(folders: Sequence[Path]) -> list[RunFolder]:
    """Read the output folders of runs, without loading a model or an image.

    Args:
        folders: Output folders of `vpt-fast train`, or adapters alone, in folders or on the Hub
            (`hf-hub:user/name`); what is given twice counts once.

    Raises:
        FileNotFoundError: If a folder is missing, or holds nothing of a run.
        OSError: If the Hub cannot be reached.
    """
    resolved = list(dict.fromkeys(f if is_on_hub(f) else f.resolve() for f in folders))
    return [_read(folder, name) for folder, name in zip(resolved, _names(resolved), strict=True)]


def _read(folder: Path, name: str) -> RunFolder:
    if not (is_on_hub(folder) or folder.is_dir()):
        raise FileNotFoundError(f"there is no run folder {folder}")
    selected = adapter_folder(folder)
    notes: list[str] = []
    record, config, adapter = None, None, None
    try:
        record = read_record(folder)
        if record is None:
            notes.append(
                "There is no run.json, so its recipe and where its data are is not known; "
                "pass --data to evaluate it."
            )
    except ValueError as error:
        notes.append(f"{error}.")
    epochs = _read_metrics(folder / METRICS_FILE, notes)
    try:
        config, adapter = read_config(selected), selected
    except FileNotFoundError:
        notes.append("There is no adapter, so nothing can be evaluated.")
    except ValueError as error:
        notes.append(f"{error}.")
    if record is None and config is None and not epochs:
        raise FileNotFoundError(
            f"{folder} is no run: it has no run.json, no {METRICS_FILE} and no adapter; give the "
            "--output folder of vpt-fast train"
        )
    return RunFolder(folder, name, record, epochs, adapter, config, tuple(notes))


def _read_metrics(path: Path, notes: list[str]) -> list[Epoch]:
    if not path.is_file():
        notes.append(f"There is no {METRICS_FILE}, so there are no learning curves.")
        return []
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        rows = list(csv.DictReader(file))
    epochs = []
    for row in rows:
        try:
            epochs.append(_epoch(row))
        except (KeyError, TypeError, ValueError):
            # A run that was killed while writing leaves an incomplete line.
            notes.append(f"Line {len(epochs) + 2} of {METRICS_FILE} is damaged and left out.")
            break
    return epochs


def _epoch(row: dict[str, Any]) -> Epoch:
    values: dict[str, Any] = {name: row.get(column) for name, column in _COLUMNS.items()}
    number = int(values.pop("epoch"))
    floats = {
        name: None if value in (None, "") and name in _OPTIONAL else float(value)
        for name, value in values.items()
    }
    return Epoch(number, **floats)  # type: ignore[arg-type]


def _names(folders: Sequence[Path]) -> list[str]:
    """Return the shortest suffix of each path that distinguishes it from the others."""
    names = [folder.name for folder in folders]
    for depth in range(2, max((len(folder.parts) for folder in folders), default=0) + 1):
        counts = Counter(names)
        names = [
            name if counts[name] == 1 else "/".join(folder.parts[-depth:])
            for name, folder in zip(names, folders, strict=True)
        ]
    return names
