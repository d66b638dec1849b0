"""Tensors that the kernels of a batch of many tasks access, and the FLOP of their products.

Parts of tensors for `bench.counted.declared`. What an image reads depends on its row offset and
count: a view has as many rows as are read, each row once, however many images share it. For tensors
without values, every image is assumed to have its own cached rows, as many as the launch allows.

FLOP, for B images of M queries, N tokens and p_b prompts each, H heads of d channels, F features:

- ragged_forward: 2 products, 4 M (B N + sum of p_b) d H
- grouped_heads: 2 F per logit, not on tensor cores
"""

from __future__ import annotations

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from vpt_fast.kernels.runtime.launch import Launch


def _values(tensor: Tensor) -> list[int] | None:
    """Return the values of an integer tensor; None if it has none."""
    if isinstance(tensor, FakeTensor) or tensor.device.type == "meta":
        return None
    return [int(value) for value in tensor.tolist()]


def _spans(launch: Launch) -> list[tuple[int, int]] | None:
    """Return the (row offset, count) of each image; None if they have no values."""
    offsets, counts = (
        _values(launch.arguments[f"{name}_ptr"]) for name in ("row_offsets", "counts")
    )
    return None if offsets is None or counts is None else list(zip(offsets, counts, strict=True))


def _distinct(spans: list[tuple[int, int]]) -> int:
    return len({row for offset, count in spans for row in range(offset, offset + count)})


def cached_prompts(launch: Launch, pool: Tensor) -> Tensor:
    """Return a view of as many rows of the cached pool (1, rows, H, d) as are read."""
    spans = _spans(launch)
    if spans is None:
        return pool[:, : launch.arguments["num_prompts"] * launch.grid[2]]
    return pool[:, : _distinct([span for span in spans if span[0] >= 0])]


def computed_prompts(launch: Launch, pool: Tensor) -> Tensor:
    """Return a view of as many rows of the pool computed per call as are read."""
    spans = _spans(launch) or []
    return pool[:, : _distinct([(~offset, count) for offset, count in spans if offset < 0])]


def head_rows(launch: Launch, rows: Tensor) -> Tensor:
    """Return a view of as many rows of weight or bias as are read."""
    spans = _spans(launch)
    return rows if spans is None else rows[: _distinct(spans)]


def head_features(launch: Launch, features: Tensor) -> Tensor:
    """Return a view of the features of as many images as have classes."""
    spans = _spans(launch)
    return features if spans is None else features[: sum(count > 0 for _, count in spans)]


def bank_flop(launch: Launch) -> int:
    """Return the FLOP of the products of a launch (see the module)."""
    given = launch.arguments
    if launch.name == "grouped_heads":
        return int(2 * given["out_ptr"].numel() * given["features_ptr"].shape[1])
    batch, queries, heads, dim = given["q_ptr"].shape
    spans = _spans(launch)
    counts = [given["num_prompts"]] * batch if spans is None else [count for _, count in spans]
    return int(4 * queries * (batch * given["num_keys"] + sum(counts)) * dim * heads)
