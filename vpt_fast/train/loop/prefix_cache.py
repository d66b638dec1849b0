"""Cache of the first trained block's input, computed once per image instead of every epoch.

Where nothing before a block is trained and images are not augmented, the input of that block is
the same in every epoch. It is cached, and training runs only the blocks from there on.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler

from vpt_fast.models.tuned import reads_feature
from vpt_fast.train.common.parallel import PartOfBatches
from vpt_fast.train.data.images import Batch, SkippedImage
from vpt_fast.train.loop.evaluate import (
    TrainingError,
    autocast,
    device_of,
    nothing_decoded,
    progress_bar,
)
from vpt_fast.tune import classifiers_of

MEMORY_LIMIT = 4 * 2**30
"""Bytes of activations that are cached in memory; more go to a file."""


class SuffixModel(nn.Module):
    """Tuned model from one of its blocks on: from the block's input (B, N, D) to logits.

    Args:
        model: Tuned timm vision transformer.
        first: Index of the block.
    """

    def __init__(self, model: nn.Module, first: int) -> None:
        super().__init__()
        self.model = model
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, classes)."""
        model: Any = self.model
        return model.forward_from(x, self.first)


def frozen_blocks(model: nn.Module) -> int:
    """Return how many blocks precede the first one that is trained or has prompts.

    The answer is 0 if something before the blocks, or shared by them, is trained.

    Args:
        model: Tuned timm vision transformer; for models with stages (Swin), whose blocks cannot be
            run separately, the answer is 0.
    """
    tuned: Any = model
    if not hasattr(tuned, "forward_from"):
        return 0
    blocks = list(tuned.blocks)
    if reads_feature(blocks):
        return 0  # of what enters the first block
    after = {id(p) for p in nn.ModuleList(blocks).parameters()}
    behind = [
        getattr(tuned, name, None) for name in ("norm", "fc_norm", "attn_pool", "head_hidden")
    ]
    after |= {id(p) for module in behind if module is not None for p in module.parameters()}
    after |= {id(p) for head in classifiers_of(tuned) for p in head.parameters()}
    if any(p.requires_grad and id(p) not in after for p in tuned.parameters()):
        return 0  # an embedding, or what all blocks share
    for index, block in enumerate(blocks):
        if any(p.requires_grad for p in block.parameters()) or _has_prompts(block):
            return index
    return len(blocks)


def _has_prompts(block: Any) -> bool:
    rows = getattr(block, "rows", None)
    return getattr(block, "prompt", None) is not None or bool(
        rows and (rows.entering or rows.leaving)
    )


class Activations(Dataset):
    """Dataset of activations (n, N, D) and labels (n,), indexed by lists of indices."""

    def __init__(self, activations: Tensor, labels: Tensor) -> None:
        self.activations, self.labels = activations, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: Sequence[int]) -> Batch:
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        return Batch(self.activations[chosen], self.labels[chosen], [])


def _identity(batch: Any) -> Any:
    return batch


def activation_loader(
    activations: Activations, batch_size: int, shuffle: bool, generator: Any = None
) -> DataLoader:
    """Return a loader of `Batch` with activations, in a new order each epoch if `shuffle`."""
    data: Any = activations
    order = RandomSampler(data, generator=generator) if shuffle else SequentialSampler(data)
    return DataLoader(
        data,
        batch_size=None,
        sampler=PartOfBatches(BatchSampler(order, batch_size, drop_last=False)),
        collate_fn=_identity,
        generator=generator,
    )


class PrefixCache:
    """Cache of a block's inputs, which turns loaders of images into loaders of activations.

    Args:
        model: Tuned timm vision transformer, on its device.
        first: Index of the block; everything before it is frozen.
        amp_dtype: Dtype of torch.autocast.
        folder: Folder for a file with more than `limit` bytes, which is unlinked at once and
            freed with the process. None takes the system's folder for temporary files.
        limit: Bytes that are cached in memory, over all loaders.
        progress: Whether to show bars on a terminal.

    Attributes:
        skipped: Images that could not be decoded.

    Raises:
        ValueError: If something before the block is trained.
    """

    def __init__(
        self,
        model: nn.Module,
        first: int,
        *,
        amp_dtype: torch.dtype = torch.float32,
        folder: Path | None = None,
        limit: int = MEMORY_LIMIT,
        progress: bool = True,
    ) -> None:
        frozen = frozen_blocks(model)
        if not 0 < first <= frozen:
            raise ValueError(
                f"first is block {first}, but this model has {frozen} blocks before the first that "
                "is trained or has prompts; take one from 1 to that"
            )
        self.model, self.first = model, first
        self.amp_dtype, self.folder, self.progress = amp_dtype, folder, progress
        self.left = limit
        self.skipped: list[SkippedImage] = []

    def loader(self, images: Iterable[Batch], count: int, like: DataLoader) -> DataLoader:
        """Return a loader of `Batch` with activations (B, N, D) in place of images.

        Args:
            images: Batches of the whole data set, in its order and without augmentation.
            count: Number of images of the data set.
            like: Loader of images whose batch size, order and generator are used.

        Raises:
            TrainingError: If no image could be decoded.
        """
        activations = self.activations(images, count)
        theirs: Any = like.batch_sampler
        while not isinstance(theirs, BatchSampler):  # wrapped in others
            theirs = theirs.batches
        shuffled = isinstance(theirs.sampler, RandomSampler)
        return activation_loader(activations, theirs.batch_size, shuffled, like.generator)

    @torch.no_grad()
    def activations(self, images: Iterable[Batch], count: int) -> Activations:
        """Return the block's inputs for all images that can be decoded.

        Args:
            images: Batches of the whole data set, in its order and without augmentation.
            count: Number of images of the data set.

        Raises:
            TrainingError: If no image could be decoded.
        """
        model: Any = self.model
        device, was_training = device_of(model), model.training
        cached: Tensor | None = None
        labels: list[Tensor] = []
        done = 0
        model.eval()
        try:
            for batch in progress_bar(images, "frozen blocks", self.progress, leave=False):
                self.skipped.extend(batch.skipped)
                if not len(batch.labels):
                    continue
                with autocast(device, self.amp_dtype):
                    rows = model.forward_until(batch.images.to(device), self.first)
                if cached is None:
                    cached = self._allocate((count, *rows.shape[1:]), rows)
                cached[done : done + len(rows)] = rows
                labels.append(batch.labels)
                done += len(rows)
        finally:
            model.train(was_training)
        if cached is None:
            raise TrainingError(nothing_decoded(self.skipped))
        return Activations(cached[:done], torch.cat(labels))

    def _allocate(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Return an empty tensor for activations: on the model's device, or mapped from a file."""
        numbers = math.prod(shape)
        size = numbers * like.element_size()
        if size <= self.left:
            self.left -= size
            return torch.empty(shape, dtype=like.dtype, device=like.device)
        with tempfile.NamedTemporaryFile(prefix="vpt-fast-", dir=self.folder) as file:
            # Once mapped, the file needs no name, and its space is freed however the process ends.
            mapped = torch.from_file(file.name, shared=True, size=numbers, dtype=like.dtype)
        return mapped.view(shape)
