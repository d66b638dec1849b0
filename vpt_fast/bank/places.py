"""Where a batch's images find their tasks' prompts and heads."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vpt_fast.bank.memory import Resident, State
from vpt_fast.bank.row_pool import Extent, RowPool
from vpt_fast.bank.task_experts import ExpertGroup, expert_groups


@dataclass(frozen=True)
class Places:
    """Whose prompts and heads are where, for one batch.

    Attributes:
        rest: keys and values (rows, 2, H, d).
        starts: (blocks, B), row of an image's first prompt in `rest`; ~row in what the block's
            experts make.
        counts: (blocks, B), number of an image's prompts.
        most: of each block, the largest of its counts.
        groups: images whose prompts are made in the call, in the order in which they are made.
        head_weight: (rows, F).
        head_bias: (rows,).
        heads: (3, B): an image's first row of the head, number of rows, and the sum of the numbers
            before it.
        classes: number of rows of each image, on the host.
    """

    rest: Tensor
    starts: Tensor
    counts: Tensor
    most: tuple[int, ...]
    groups: tuple[ExpertGroup, ...]
    head_weight: Tensor
    head_bias: Tensor
    heads: Tensor
    classes: list[int]


def find_places(
    state: State, residents: Sequence[Resident], depth: int, dtype: torch.dtype
) -> Places:
    """The places of a batch's prompts and heads.

    Args:
        state: of the bank.
        residents: every image's task.
        depth: number of blocks.
        dtype: that keys and heads are needed in; if it is not the pools', the batch's tasks are
            copied.
    """
    keys, key_starts = _in_dtype(state.keys, [r.keys for r in residents], dtype)
    heads, head_starts = _in_dtype(state.heads, [r.heads for r in residents], dtype)
    device = keys[0].device
    _share_with_stream((*keys, *heads), residents)
    groups = expert_groups([r.experts for r in residents], device)
    made: dict[int, int] = {}
    at = 0
    for group in groups:
        for image in group.members:
            made[image] = ~at
            at += group.num_prompts
    starts, counts = [], []
    for block in range(depth):
        row, number = [], []
        for image, resident in enumerate(residents):
            count = resident.task.method.num_prompts
            if block in resident.blocks:
                row.append(key_starts[image] + resident.blocks.index(block) * count)
                number.append(count)
            else:
                row.append(made.get(image, 0))
                number.append(count if image in made else 0)
        starts.append(row)
        counts.append(number)
    classes = [r.heads.count for r in residents]
    before = [0, *itertools.accumulate(classes[:-1])]
    # One copy to the device, before anything of the call is queued there.
    every = torch.tensor([*starts, *counts, head_starts, classes, before], device=device)
    return Places(
        keys[0],
        every[:depth],
        every[depth : 2 * depth],
        tuple(map(max, counts)),
        groups,
        heads[0],
        heads[1],
        every[2 * depth :],
        classes,
    )


def _in_dtype(
    pool: RowPool, extents: Sequence[Extent], dtype: torch.dtype
) -> tuple[tuple[Tensor, ...], list[int]]:
    """Tensors that hold these rows in `dtype`, and the first row of each extent there."""
    if pool.tensors[0].dtype == dtype:
        return pool.tensors, [extent.start for extent in extents]
    distinct = {id(extent): extent for extent in extents}
    starts, at = {}, 0
    for key, extent in distinct.items():
        starts[key] = at
        at += extent.count
    parts = zip(*(pool.read(extent) for extent in distinct.values()), strict=True)
    tensors = tuple(torch.cat(rows).to(dtype) for rows in parts)
    return tensors, [starts[id(extent)] for extent in extents]


def _share_with_stream(tensors: Sequence[Tensor], residents: Sequence[Resident]) -> None:
    """Keep memory from being given away while this call's stream may still read it."""
    if not tensors[0].is_cuda:
        return
    stream = torch.cuda.current_stream(tensors[0].device)
    experts = {id(r.experts): r.experts for r in residents if r.experts is not None}
    for tensor in (*tensors, *(t for e in experts.values() for t in e.tensors)):
        tensor.record_stream(stream)
