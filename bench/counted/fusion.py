"""Ideal fusion of a trace: a lower bound for what torch.compile achieves on eager PyTorch.

Matrix products and attention stay as they are. Between two of them, all memory passes that share a
tensor become one launch. It reads once what was produced outside of it, and writes only what is
read outside of it, or by nothing, since that is a result of the step. A compiler may do worse
(sums over rows and over the batch do not always fit in one kernel); it can do better only where it
moves a pass to the other side of a product, or recomputes it instead of saving its result.
"""

from __future__ import annotations

from collections.abc import Sequence

from bench.counted.trace import Op, Region

NAME = "ideal fusion, a lower bound for torch.compile"

Readers = dict[tuple[int, int], set[int]]
"""Operators that read what an operator wrote to an allocation, keyed by (operator, allocation)."""


def fused(ops: Sequence[Op]) -> list[Op]:
    """Return the launches of a whole step after ideal fusion (see the module).

    Args:
        ops: Operators of a whole step, in order, including all that read what is written.
    """
    producers = _producers(ops)
    result: list[Op] = []
    run: list[int] = []
    readers = _readers(ops, producers)
    for index, op in enumerate(ops):
        if op.kind == "elementwise":
            run.append(index)
            continue
        result += _fuse_run(ops, run, producers, readers)
        result.append(op)
        run = []
    return result + _fuse_run(ops, run, producers, readers)


def _producers(ops: Sequence[Op]) -> list[list[set[int]]]:
    """Return, for every region that an operator reads, the operators that wrote it."""
    written: dict[int, list[tuple[int, Region]]] = {}
    found = []
    for index, op in enumerate(ops):
        found.append([_writers(written.get(r.storage, []), r) for r in op.reads])
        for region in op.writes:
            written.setdefault(region.storage, []).append((index, region))
    return found


def _writers(history: list[tuple[int, Region]], region: Region) -> set[int]:
    """Return the operators that wrote a region, back to the last one that wrote all of it."""
    found = set()
    for index, written in reversed(history):
        found.add(index)
        if written.layout == region.layout or written.nbytes == written.whole:
            break
    return found


def _readers(ops: Sequence[Op], producers: list[list[set[int]]]) -> Readers:
    found: Readers = {}
    for reader, op in enumerate(ops):
        for region, produced_by in zip(op.reads, producers[reader], strict=True):
            for producer in produced_by:
                found.setdefault((producer, region.storage), set()).add(reader)
    return found


def _fuse_run(
    ops: Sequence[Op],
    run: list[int],
    producers: list[list[set[int]]],
    readers: Readers,
) -> list[Op]:
    return [_kernel(ops, group, producers, readers) for group in _groups(ops, run)]


def _groups(ops: Sequence[Op], run: list[int]) -> list[list[int]]:
    """Return the operators of a run in groups that share tensors, each in order."""
    groups: list[tuple[set[int], list[int]]] = []
    for index in run:
        touched = {r.storage for r in (*ops[index].reads, *ops[index].writes)}
        members = [index]
        for group in [g for g in groups if g[0] & touched]:
            groups.remove(group)
            touched |= group[0]
            members = group[1] + members
        groups.append((touched, members))
    return [sorted(members) for _, members in groups]


def _kernel(
    ops: Sequence[Op],
    group: list[int],
    producers: list[list[set[int]]],
    readers: Readers,
) -> Op:
    """Return one launch in place of a group."""
    if len(group) == 1:
        return ops[group[0]]
    inside = set(group)
    reads = tuple(
        region
        for index in group
        for region, produced_by in zip(ops[index].reads, producers[index], strict=True)
        if not produced_by or produced_by - inside
    )
    writes = tuple(
        region
        for index in group
        for region in ops[index].writes
        if not (read_by := readers.get((index, region.storage))) or read_by - inside
    )
    return Op("fused", "elementwise", reads, writes)
