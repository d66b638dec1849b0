"""The frozen part before the first trained block, computed once per image instead of every epoch.

Where nothing before a block is trained and images are not augmented, what enters that block is the
same in every epoch. It is kept, and training runs the blocks from there on only.
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

from vpt_fast.train.common.parallel import PartOfBatches
from vpt_fast.train.data.images import Batch, SkippedImage
from vpt_fast.train.loop.evaluate import (
    TrainingError,
    autocast,
    device_of,
    nothing_decoded,
    progress_bar,
)

MEMORY_LIMIT = 4 * 2**30
"""Bytes of activations that are kept in memory; more go to a file."""


class SuffixModel(nn.Module):
    """A tuned model from one of its blocks on: (B, N, D), what enters the block, to logits.

    Args:
        model: A tuned timm vision transformer.
        first: The block.
    """

    def __init__(self, model: nn.Module, first: int) -> None:
        super().__init__()
        self.model = model
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes)."""
        model: Any = self.model
        return model.forward_from(x, self.first)


def frozen_blocks(model: nn.Module) -> int:
    """How many blocks there are before the first thing that is trained; 0 if it is not in a block.

    Args:
        model: A tuned timm vision transformer; of models with stages (Swin), whose blocks cannot be
            run apart, the answer is 0.
    """
    tuned: Any = model
    if not hasattr(tuned, "forward_from"):
        return 0
    blocks = list(tuned.blocks)
    after = {id(p) for p in nn.ModuleList(blocks).parameters()}
    behind = [
        getattr(tuned, name, None) for name in ("norm", "fc_norm", "attn_pool", "head_hidden")
    ]
    after |= {id(p) for module in behind if module is not None for p in module.parameters()}
    heads = tuned.get_classifier()
    for head in heads if isinstance(heads, tuple) else (heads,):
        after |= {id(p) for p in head.parameters()}
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
    """Activations (n, N, D) and labels (n,), given out as batches by lists of indices."""

    def __init__(self, activations: Tensor, labels: Tensor) -> None:
        self.activations, self.labels = activations, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: Sequence[int]) -> Batch:
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        return Batch(self.activations[chosen], self.labels[chosen], [])


def _as_it_is(batch: Any) -> Any:
    return batch


def activation_loader(
    kept: Activations, batch_size: int, shuffle: bool, generator: Any = None
) -> DataLoader:
    """A loader of `Batch` with activations, in a new order each epoch if `shuffle`."""
    data: Any = kept
    order = RandomSampler(data, generator=generator) if shuffle else SequentialSampler(data)
    return DataLoader(
        data,
        batch_size=None,
        sampler=PartOfBatches(BatchSampler(order, batch_size, drop_last=False)),
        collate_fn=_as_it_is,
        generator=generator,
    )


class PrefixCache:
    """Makes loaders of what enters a block from loaders of images.

    Args:
        model: A tuned timm vision transformer, on its device.
        first: The block; everything before it is frozen.
        amp_dtype: What torch.autocast computes in.
        folder: Where a file for more than `limit` bytes is made; it has no name there and goes with
            the process. None takes the system's folder for temporary files.
        limit: Bytes that are kept in memory, of all loaders together.
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
        """A loader of `Batch` with activations (B, N, D) in place of images.

        Args:
            images: Batches of the whole data set, in its order and without augmentation.
            count: Images of the data set.
            like: A loader of images: its batch size, order and generator are taken over.

        Raises:
            TrainingError: If no image could be decoded.
        """
        kept = self.activations(images, count)
        theirs: Any = like.batch_sampler
        while not isinstance(theirs, BatchSampler):  # around which others stand
            theirs = theirs.batches
        shuffled = isinstance(theirs.sampler, RandomSampler)
        return activation_loader(kept, theirs.batch_size, shuffled, like.generator)

    @torch.no_grad()
    def activations(self, images: Iterable[Batch], count: int) -> Activations:
        """What enters the block, of all images that can be decoded; as `loader` takes them."""
        model: Any = self.model
        device, was_training = device_of(model), model.training
        kept: Tensor | None = None
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
                if kept is None:
                    kept = self._room((count, *rows.shape[1:]), rows)
                kept[done : done + len(rows)] = rows
                labels.append(batch.labels)
                done += len(rows)
        finally:
            model.train(was_training)
        if kept is None:
            raise TrainingError(nothing_decoded(self.skipped))
        return Activations(kept[:done], torch.cat(labels))

    def _room(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Room for activations: on the model's device, or mapped from a file."""
        numbers = math.prod(shape)
        size = numbers * like.element_size()
        if size <= self.left:
            self.left -= size
            return torch.empty(shape, dtype=like.dtype, device=like.device)
        with tempfile.NamedTemporaryFile(prefix="vpt-fast-", dir=self.folder) as file:
            # Once mapped, the file needs no name: its room is free when the process ends, anyhow.
            room = torch.from_file(file.name, shared=True, size=numbers, dtype=like.dtype)
        return room.view(shape)
