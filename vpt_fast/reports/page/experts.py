"""Share of the attention that goes to each prompt, averaged over a sample of images."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Subset

from vpt_fast.analysis.shares import attention_shares, query_name, stacked, uniform_share
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
    """

    blocks: list[int]
    shares: np.ndarray
    uniform: float
    images: int
    query: str

    @property
    def rows(self) -> list[dict[str, float]]:
        """Values of each block: block, prompts, all, largest, smallest, and these two's indices."""
        found = []
        for block, shares, effective in zip(self.blocks, self.shares, self.effective, strict=True):
            own = shares[~np.isnan(shares)]
            most, least = int(own.argmax()), int(own.argmin())
            found.append(
                {"block": block, "prompts": len(own), "all": own.sum(), "effective": effective,
                 "most": most, "largest": own[most], "least": least, "smallest": own[least]}
            )  # fmt: skip
        return found

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
    return ExpertUse(blocks, total / count, uniform_share(net), count, query_name(net))
