"""Share of the attention that goes to each prompt, averaged over a sample of images."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import Subset

from vpt_fast.analysis.shares import (
    attention_shares,
    mixing_maps,
    query_name,
    stacked,
    uniform_share,
)
from vpt_fast.reports.equal_maps import equal_prompts, numbered
from vpt_fast.reports.page.evaluation import EvaluatedRun, EvaluationOptions
from vpt_fast.train.data.image_loaders import folder_loader

SEED = 0
"""Seed of the sample."""
# For heads that pool, the scores of all patch queries are in memory at once.
_BATCH = 32


@dataclass(frozen=True)
class ExpertUse:
    """Shares of attention, averaged over heads and a sample of images.

    Attributes:
        blocks: Index of each block whose keys include prompts.
        shares: Share of each prompt, (blocks, p); NaN for prompts that a block lacks.
        uniform: Share of all prompts of the first block together under uniform attention.
        images: Number of images of the sample.
        query: Name of the query.
        equal: Groups of two or more prompts with equal token mixing maps, by block.
    """

    blocks: list[int]
    shares: np.ndarray
    uniform: float
    images: int
    query: str
    equal: dict[int, list[list[int]]] = field(default_factory=dict)

    @property
    def drawn(self) -> np.ndarray:
        """Shares (blocks, p) with the mean in place of each of prompts with equal maps."""
        drawn = self.shares.copy()
        for row, block in enumerate(self.blocks):
            for group in self.equal.get(block, []):
                drawn[row, group] = drawn[row, group].mean()
        return drawn

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Values of each block: block, prompts, all, largest, smallest, and whose these two are."""
        found = []
        for block, shares, effective in zip(self.blocks, self.drawn, self.effective, strict=True):
            own = shares[~np.isnan(shares)]
            most, least = int(own.argmax()), int(own.argmin())
            found.append(
                {"block": block, "prompts": len(own), "all": own.sum(), "effective": effective,
                 "most": self._whose(block, most), "largest": own[most],
                 "least": self._whose(block, least), "smallest": own[least]}
            )  # fmt: skip
        return found

    @property
    def equal_in_words(self) -> list[str]:
        """What is drawn once, such as "blocks 1-11: prompts 0-9 the same"."""
        blocks: dict[str, list[int]] = {}
        for block, groups in self.equal.items():
            same = "; ".join(numbered("prompt", group) for group in groups)
            blocks.setdefault(f"{same} the same", []).append(block)
        return [f"{numbered('block', those)}: {same}" for same, those in blocks.items()]

    def _whose(self, block: int, prompt: int) -> str:
        groups = (group for group in self.equal.get(block, []) if prompt in group)
        return numbered("prompt", next(groups, [prompt]))

    @property
    def effective(self) -> np.ndarray:
        """Effective number of prompts of each block, from 1 to p.

        It is exp of the entropy of the prompts' shares, normalised to sum to 1.
        """
        shares = np.nan_to_num(self.shares)
        parts = shares / shares.sum(axis=1, keepdims=True)
        logs = np.log(parts, out=np.zeros_like(parts), where=parts > 0)
        return np.asarray(np.exp(-(parts * logs).sum(axis=1)))


def expert_use(run: EvaluatedRun, options: EvaluationOptions) -> ExpertUse:
    """Average shares over a sample of the images that could be decoded, drawn with `SEED`.

    Raises:
        ValueError, TypeError: If the model has no prompts.
    """
    net, count = run.tuned.net, min(options.max_images, len(run.indices))
    generator = torch.Generator().manual_seed(SEED)
    rows = torch.randperm(len(run.indices), generator=generator)[:count].sort().values
    sample: Subset = Subset(run.images, [run.indices[row] for row in rows])
    weight = next(net.parameters())
    blocks: list[int] = []
    total: np.ndarray | None = None
    batches = folder_loader(
        sample, min(options.batch_size, _BATCH), options.device, options.workers
    )
    for batch in batches:
        found = attention_shares(net, batch.images.to(weight.device, weight.dtype))
        blocks = [record.block for record in found]
        sums = stacked([r.prompts.double().mean(dim=1).sum(dim=0).cpu().numpy() for r in found])
        total = sums if total is None else total + sums
    if total is None:
        raise ValueError("there are no images")
    equal = {
        block: groups
        for block, weights in mixing_maps(net).items()
        if (groups := [g for g in equal_prompts(weights.cpu().numpy()) if len(g) > 1])
    }
    return ExpertUse(blocks, total / count, uniform_share(net), count, query_name(net), equal)
