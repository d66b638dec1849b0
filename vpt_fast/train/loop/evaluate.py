"""Evaluation of a model on images, and helpers that training shares with it."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any

import torch
from timm.utils import accuracy
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from vpt_fast.train.common.average_precision import mean_average_precision
from vpt_fast.train.common.parallel import gathered, rank
from vpt_fast.train.data.images import SkippedImage


class TrainingError(RuntimeError):
    """Training or evaluation cannot go on; the message says where it stopped and what is left."""


@dataclass(frozen=True)
class Evaluation:
    """Results on a set of images.

    Attributes:
        loss: Mean cross-entropy over the images that could be decoded; with several labels an image
            the mean binary cross-entropy over them and over classes.
        top1: Accuracy over them in percent; NaN with several labels an image.
        top5: Share of them whose class is among the five most probable ones, in percent; or NaN.
        images: Number of images that could be decoded.
        predictions: (images,) class indices, int64; or (images, classes) bool, where a class has a
            probability over 1/2.
        labels: (images,) class indices, int64; or (images, classes) 0 and 1, fp32.
        skipped: Images that could not be decoded.
        logits: (images, classes), fp32 on the CPU, or None if they were not asked for.
        mean_ap: Mean average precision in percent, with several labels an image; else None.
    """

    loss: float
    top1: float
    top5: float
    images: int
    predictions: torch.Tensor
    labels: torch.Tensor
    skipped: tuple[SkippedImage, ...] = ()
    logits: torch.Tensor | None = None
    mean_ap: float | None = None

    @property
    def score(self) -> float:
        """Figure that epochs are compared by, in percent: top-1 accuracy, or mAP."""
        return self.top1 if self.mean_ap is None else self.mean_ap

    @property
    def figures(self) -> dict[str, Any]:
        """Loss, top1 and top5 or map in percent, and number of images, by these names."""
        rates = {"top1": self.top1, "top5": self.top5}
        if self.mean_ap is not None:
            rates = {"map": self.mean_ap}
        return {"loss": self.loss, **rates, "images": self.images}


def resolve_device(name: str = "auto") -> torch.device:
    """Return the device that `name` ("auto", "cpu", "cuda", "cuda:1") stands for.

    Raises:
        ValueError: If `name` is none of these, or CUDA is asked for and absent.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device is {name!r}; choose auto, cpu, cuda or cuda:<index>")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device is {name!r}, but PyTorch sees {torch.cuda.device_count()} CUDA GPUs; "
            "use --device cpu, or install a driver and a PyTorch build that match the GPU"
        )
    return device


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Return torch.autocast for `dtype`, switched off for float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter."""
    return next(model.parameters()).device


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: DataLoader,
    *,
    amp_dtype: torch.dtype = torch.float32,
    progress: bool = True,
    description: str = "evaluating",
    keep_logits: bool = False,
) -> Evaluation:
    """Evaluate `model` in eval mode and restore the mode that it was in.

    Several processes evaluate a part each, and each returns the results of all; predictions, labels
    and logits are then in the order of the processes.

    Args:
        model: Model on the device to run on.
        batches: Batches of `make_loader`.
        amp_dtype: Dtype of torch.autocast.
        progress: Whether to show a bar on a terminal.
        description: Label of the bar.
        keep_logits: Whether the logits of all images are returned too.

    Raises:
        TrainingError: If no image could be decoded; or if images may have several labels and none
            has one.
    """
    device, was_training = device_of(model), model.training
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    predictions: list[torch.Tensor] = []
    labels: list[torch.Tensor] = []
    stored: list[torch.Tensor] = []
    skipped: list[SkippedImage] = []
    try:
        for batch in progress_bar(batches, description, progress and not rank(), leave=False):
            skipped.extend(batch.skipped)
            if not len(batch.labels):
                continue
            target = batch.labels.to(device, non_blocking=True)
            with autocast(device, amp_dtype):
                logits = model(batch.images.to(device, non_blocking=True))
            logits = logits.float()
            means = _means(logits, target)
            sums += len(target) * torch.stack([torch.as_tensor(m, device=device) for m in means])
            predictions.append(logits.argmax(dim=1) if target.ndim == 1 else logits > 0)
            labels.append(batch.labels)
            if keep_logits or target.ndim == 2:
                stored.append(logits.cpu())
    finally:
        model.train(was_training)
    found = gathered((sums.cpu(), [some.cpu() for some in predictions], labels, stored, skipped))
    all_labels = [some for _, _, theirs, *_ in found for some in theirs]
    all_logits = [some for *_, theirs, _ in found for some in theirs]
    all_skipped = [item for *_, items in found for item in items]
    if not all_labels:
        raise TrainingError(nothing_decoded(all_skipped))
    count = sum(map(len, all_labels))
    loss, top1, top5 = (float(v) / count for v in sum(theirs for theirs, *_ in found))
    mean_ap = _mean_ap(all_logits, all_labels)
    return Evaluation(
        loss=loss,
        top1=top1,
        top5=top5,
        images=count,
        predictions=torch.cat([some for _, theirs, *_ in found for some in theirs]),
        labels=torch.cat(all_labels),
        skipped=tuple(all_skipped),
        logits=torch.cat(all_logits) if keep_logits else None,
        mean_ap=mean_ap,
    )


def _means(logits: torch.Tensor, target: torch.Tensor) -> list[Any]:
    """Return mean loss, top-1 and top-5 accuracy in percent; NaN for these with several labels."""
    if target.ndim == 2:
        return [F.binary_cross_entropy_with_logits(logits, target), math.nan, math.nan]
    return [F.cross_entropy(logits, target), *accuracy(logits, target, topk=(1, 5))]


def _mean_ap(logits: list[torch.Tensor], labels: list[torch.Tensor]) -> float | None:
    """Return the mean average precision in percent; None for images with one label each."""
    if labels[0].ndim == 1:
        return None
    try:
        return 100 * mean_average_precision(torch.cat(logits), torch.cat(labels))
    except ValueError as error:
        raise TrainingError(str(error)) from None


def progress_bar(
    batches: Any, description: str, progress: bool, leave: bool, total: int | None = None
) -> tqdm:
    """Return a tqdm bar on stderr, which is silent without a terminal or without `progress`."""
    return tqdm(
        batches,
        total=total,
        desc=description,
        leave=leave,
        dynamic_ncols=True,
        disable=None if progress else True,
        file=sys.stderr,
    )


def nothing_decoded(skipped: list[SkippedImage]) -> str:
    """Return the message for a data set without an image that can be decoded."""
    first = f"; the first: {skipped[0].reason}" if skipped else ""
    return f"none of the {len(skipped)} images could be decoded{first}"
