"""Evaluation for a report: a run's adapter on one split of its data, image by image."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from vpt_fast.reports.page.runs import RunFolder
from vpt_fast.train.common.ranking import probabilities_of
from vpt_fast.train.common.recipe import AMP_DTYPES
from vpt_fast.train.data import images as data
from vpt_fast.train.data.image_loaders import folder_loader
from vpt_fast.train.data.pictures import reading
from vpt_fast.train.data.split import Split, SplitImages
from vpt_fast.train.loop.evaluate import Evaluation, evaluate
from vpt_fast.train.run.data_of_run import open_as_trained
from vpt_fast.train.run.tuned_model import TunedModel, load_tuned

# Order of preference: splits that nothing was selected on come first.
SPLIT_ORDER = ("test", "val", "train")


@dataclass(frozen=True)
class EvaluationOptions:
    """Options of the evaluation of runs.

    Attributes:
        directory: Folder of the data, or a CSV file; None takes each run's own.
        checkpoint: File with the backbone's weights; None takes each run's own.
        split: "test", "val" or "train"; None takes the first of them that exists.
        batch_size: Images per batch.
        amp_dtype: Dtype of torch.autocast, one of `recipe.AMP_DTYPES`; None takes that of each
            run's training.
        workers: Number of processes that load images; None takes 0 on the CPU, up to 4 on a GPU.
        device: Device to evaluate on.
        max_images: Number of images over which the use of prompt experts is averaged.
        progress: Whether to show bars on a terminal.

    Raises:
        ValueError: If a value cannot be used.
        FileNotFoundError: If `directory` or `checkpoint` is given and not there.
    """

    directory: Path | None = None
    checkpoint: Path | None = None
    split: str | None = None
    batch_size: int = 64
    amp_dtype: str | None = None
    workers: int | None = None
    device: torch.device = torch.device("cpu")
    max_images: int = 64
    progress: bool = True

    def __post_init__(self) -> None:
        if self.split is not None and self.split not in SPLIT_ORDER:
            raise ValueError(f"split is {self.split!r}; choose one of {', '.join(SPLIT_ORDER)}")
        if self.amp_dtype is not None and self.amp_dtype not in AMP_DTYPES:
            known = ", ".join(AMP_DTYPES)
            raise ValueError(f"amp_dtype is {self.amp_dtype!r}; choose one of {known}")
        for name, value in (("batch_size", self.batch_size), ("max_images", self.max_images)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if self.workers is not None and self.workers < 0:
            raise ValueError(f"workers is {self.workers}; it must be at least 0")
        if self.directory is not None and not self.directory.exists():
            raise FileNotFoundError(f"there is no data folder {self.directory}")
        if self.checkpoint is not None and not self.checkpoint.is_file():
            raise FileNotFoundError(f"there is no checkpoint file {self.checkpoint}")


@dataclass(frozen=True)
class EvaluatedRun:
    """Evaluation of a run's adapter on the n images of a split that can be decoded.

    Attributes:
        tuned: Tuned model.
        directory: Folder of the data, or the CSV file.
        split_name: Name of the split: "test", "val" or "train".
        images: Images of the whole split.
        indices: Indices of the n images in the split.
        evaluation: Results with logits.
        amp_dtype: Dtype of torch.autocast.
    """

    tuned: TunedModel
    directory: Path
    split_name: str
    images: SplitImages
    indices: list[int]
    evaluation: Evaluation
    amp_dtype: str

    @cached_property
    def probabilities(self) -> Tensor:
        """Probability of each class, (n, classes); with several labels an image each its own."""
        return probabilities_of(self._logits, self.tuned.multi_label)

    @cached_property
    def losses(self) -> Tensor:
        """Cross-entropy of each image, (n,)."""
        return F.cross_entropy(self._logits, self.evaluation.labels, reduction="none")

    @property
    def split(self) -> Split:
        """Labels and names of the split."""
        return self.images.split

    def name(self, row: int) -> str:
        """Return the name of one of the n images, relative to the data folder if inside it."""
        name = self.split.names[self.indices[row]]
        folder = self.directory.parent if self.directory.is_file() else self.directory
        return name.removeprefix(f"{folder}/")

    @property
    def _logits(self) -> Tensor:
        logits = self.evaluation.logits
        if logits is None:
            raise ValueError("the evaluation has no logits; evaluate with keep_logits=True")
        return logits


def evaluate_run(run: RunFolder, options: EvaluationOptions) -> EvaluatedRun:
    """Evaluate the selected adapter of a run on all images of a split.

    Args:
        run: Folder of a run, with an adapter.
        options: Location of data and backbone where the run's record is not to be used, and options
            of the evaluation.

    Raises:
        FileNotFoundError: If data, split, adapter or backbone are missing.
        ValueError: If they do not fit each other.
        TrainingError: If no image could be decoded.
    """
    if run.adapter is None or run.config is None:
        raise FileNotFoundError(f"{run.path} has no adapter")
    directory, form = _data(run, options)
    tuned = load_tuned(run.adapter, _checkpoint(run, options), options.device)
    source = open_as_trained(directory, form, tuned.class_names, run.record)
    tuned.check_labels(directory, source.multi_label)
    tuned.class_order(directory, source.class_names)
    wanted = SPLIT_ORDER if options.split is None else (options.split,)
    name = next((name for name in wanted if name in source.splits), None)
    if name is None:
        there = ", ".join(source.splits) or "none"
        raise FileNotFoundError(f"{directory} has no {' or '.join(wanted)} split; it has {there}")
    antialias = True if run.record is None else run.record.image_options.get("antialias", True)
    images = SplitImages(
        source.splits[name],
        data.eval_transform({**tuned.inputs, "antialias": antialias}),
        source.class_names,
        **reading(tuned.inputs),
    )
    recorded = None if run.record is None else run.record.recipe.get("amp_dtype")
    amp_dtype = options.amp_dtype or (recorded if recorded in AMP_DTYPES else "float32")
    evaluation = evaluate(
        tuned.net,
        folder_loader(images, options.batch_size, options.device, options.workers),
        amp_dtype=AMP_DTYPES[amp_dtype],
        progress=options.progress,
        description=run.name,
        keep_logits=True,
    )
    missing = {item.path for item in evaluation.skipped}
    indices = [i for i, image in enumerate(images.split.names) if image not in missing]
    return EvaluatedRun(tuned, directory.resolve(), name, images, indices, evaluation, amp_dtype)


def _data(run: RunFolder, options: EvaluationOptions) -> tuple[Path, str]:
    recorded = None if run.record is None else run.record.data
    form = "auto" if recorded is None else recorded.get("format", "auto")
    if options.directory is not None:
        return options.directory, form
    if recorded is None or "directory" not in recorded:
        raise FileNotFoundError("it is not recorded where the data are; pass --data")
    directory = Path(recorded["directory"])
    if not directory.exists():
        raise FileNotFoundError(
            f"the data folder {directory} is not there; pass --data if it has moved"
        )
    return directory, form


def _checkpoint(run: RunFolder, options: EvaluationOptions) -> Path | None:
    if options.checkpoint is not None or run.record is None:
        return options.checkpoint
    recorded = run.record.model.get("checkpoint")
    # If the file has moved, the error names the adapter's checkpoint.
    return Path(recorded) if recorded and Path(recorded).is_file() else None
