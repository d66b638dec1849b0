"""What the kernels of a batch of many tasks touch of their tensors, and the FLOP of their products.

Parts of tensors for `bench.counted.declared`. What an image reads depends on its `starts` and
`counts`: a view stands for as many rows as are read, each row once, however many images share it.
On tensors without values every image is taken to have rows of its own, at rest, and as many as the
launch is made for.

FLOP, for B images of M queries, N tokens and p_b prompts each, H heads of d channels, F features:

- ragged_forward: 2 products, 4 M (B N + sum of p_b) d H
- grouped_heads: 2 F for each logit, which go to no tensor core
"""

from __future__ import annotations

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from vpt_fast.kernels.runtime.launch import Launch


def _values(tensor: Tensor) -> list[int] | None:
    """Of a tensor of places; None where it has none."""
    if isinstance(tensor, FakeTensor) or tensor.device.type == "meta":
        return None
    return [int(value) for value in tensor.tolist()]


def _runs(launch: Launch) -> list[tuple[int, int]] | None:
    """(start, count) of each image; None where they have no values."""
    starts, counts = (_values(launch.arguments[f"{name}_ptr"]) for name in ("starts", "counts"))
    return None if starts is None or counts is None else list(zip(starts, counts, strict=True))


def _distinct(runs: list[tuple[int, int]]) -> int:
    return len({row for start, count in runs for row in range(start, start + count)})


def cached_prompts(launch: Launch, pool: Tensor) -> Tensor:
    """As many rows of a pool (1, rows, H, d) as are read of the one at rest."""
    runs = _runs(launch)
    if runs is None:
        return pool[:, : launch.arguments["num_prompts"] * launch.grid[2]]
    return pool[:, : _distinct([run for run in runs if run[0] >= 0])]


def computed_prompts(launch: Launch, pool: Tensor) -> Tensor:
    """The same of those that were made for the batch."""
    runs = _runs(launch) or []
    return pool[:, : _distinct([(~start, count) for start, count in runs if start < 0])]


def head_rows(launch: Launch, rows: Tensor) -> Tensor:
    """As many rows of weight or bias as are read."""
    runs = _runs(launch)
    return rows if runs is None else rows[: _distinct(runs)]


def head_features(launch: Launch, features: Tensor) -> Tensor:
    """Features of as many images as have classes."""
    runs = _runs(launch)
    return features if runs is None else features[: sum(count > 0 for _, count in runs)]


def bank_flop(launch: Launch) -> int:
    """FLOP of the products of a launch (see the module)."""
    given = launch.arguments
    if launch.name == "grouped_heads":
        return int(2 * given["out_ptr"].numel() * given["features_ptr"].shape[1])
    batch, queries, heads, dim = given["q_ptr"].shape
    runs = _runs(launch)
    counts = [given["num_prompts"]] * batch if runs is None else [count for _, count in runs]
    return int(4 * queries * (batch * given["num_keys"] + sum(counts)) * dim * heads)
