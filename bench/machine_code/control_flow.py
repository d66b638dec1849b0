"""Loops of a machine program: basic blocks, dominators, natural loops.

A backward branch alone is not a loop: compilers place rarely executed code at the end of a program
and jump back from it. A loop is a branch to a block that dominates it (Aho, Lam, Sethi and Ullman,
Compilers, section 9.6).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.machine_code.sass import Instruction

_JUMPS = frozenset({"BRA", "JMP", "BRX", "BRXU", "JMX"})
_ENDS = frozenset({"EXIT", "RET", "KILL"})


@dataclass(frozen=True)
class Loop:
    """One natural loop.

    Attributes:
        header: Index of its first instruction.
        body: Indices of its instructions in order, including those of inner loops.
        own: Indices in `body` that belong to no inner loop.
        parent: Index in the list of loops of the smallest enclosing loop, or None.
        line: Source line of the branch that closes it, which is that of the `for`; None if unknown.
    """

    header: int
    body: tuple[int, ...]
    own: tuple[int, ...]
    parent: int | None
    line: int | None


def _jump_target(instruction: Instruction, labels: Mapping[str, int]) -> int | None:
    """Return the index of the jump target, or None; a call of a local label is a long jump."""
    family, label = instruction.family, instruction.target
    if label is None or label not in labels:
        return None
    if family in _JUMPS or (family == "CALL" and label.startswith(".L")):
        return labels[label]
    return None


def _successors(
    instructions: Sequence[Instruction], labels: Mapping[str, int]
) -> list[tuple[int, ...]]:
    """Return the indices of the instructions that may run after each one."""
    successors: list[tuple[int, ...]] = []
    for index, instruction in enumerate(instructions):
        follows = (index + 1,) if index + 1 < len(instructions) else ()
        target = _jump_target(instruction, labels)
        family = instruction.family
        if target is not None and target < len(instructions):
            falls = follows if instruction.conditional else ()
            successors.append(tuple(dict.fromkeys((target, *falls))))
        elif family in _ENDS and not instruction.conditional:
            successors.append(())
        else:
            successors.append(follows)
    return successors


def _blocks(successors: Sequence[tuple[int, ...]]) -> list[range]:
    """Return the maximal runs of instructions entered at the first and left after the last."""
    leaders = {0}
    for index, following in enumerate(successors):
        if following != (index + 1,):
            leaders.update(following)
            leaders.add(index + 1)
    starts = sorted(start for start in leaders if start < len(successors))
    return [range(a, b) for a, b in zip(starts, [*starts[1:], len(successors)], strict=True)]


def _dominators(edges: Sequence[Sequence[int]]) -> list[int]:
    """Return for each block the set of its dominators as a bit mask; 0 if unreachable."""
    order: list[int] = []
    seen = {0}
    stack = [(0, iter(edges[0]))]
    while stack:
        block, rest = stack[-1]
        following = next((other for other in rest if other not in seen), None)
        if following is None:
            order.append(block)
            stack.pop()
        else:
            seen.add(following)
            stack.append((following, iter(edges[following])))
    order.reverse()
    before: list[list[int]] = [[] for _ in edges]
    for block in order:
        for following in edges[block]:
            before[following].append(block)
    everything = (1 << len(edges)) - 1
    dominators = [everything if block in seen else 0 for block in range(len(edges))]
    dominators[0] = 1
    changed = True
    while changed:
        changed = False
        for block in order[1:]:
            common = everything
            for previous in before[block]:
                common &= dominators[previous]
            common |= 1 << block
            if common != dominators[block]:
                dominators[block], changed = common, True
    return dominators


def find_loops(instructions: Sequence[Instruction], labels: Mapping[str, int]) -> list[Loop]:
    """Return the natural loops of a program, by address of the header, outer before inner.

    Unreachable code, such as the branch to itself behind a program, has none. All back edges to one
    header form one loop.

    Args:
        instructions: Whole program, entered at its first instruction.
        labels: Index of the instruction after each label.
    """
    successors = _successors(instructions, labels)
    blocks = _blocks(successors)
    of = {block.start: number for number, block in enumerate(blocks)}
    edges = [[of[index] for index in successors[block[-1]]] for block in blocks]
    dominators = _dominators(edges)
    into: list[list[int]] = [[] for _ in blocks]
    for block, following in enumerate(edges):
        for other in following:
            into[other].append(block)

    members: dict[int, set[int]] = {}
    closing: dict[int, int] = {}
    for block, following in enumerate(edges):
        for header in following:
            if not dominators[block] >> header & 1 or dominators[block] == 0:
                continue
            inside = members.setdefault(header, {header})
            closing[header] = max(closing.get(header, 0), blocks[block][-1])
            stack = [block]
            while stack:
                current = stack.pop()
                if current not in inside:
                    inside.add(current)
                    stack.extend(b for b in into[current] if dominators[b])

    headers = sorted(members, key=lambda header: (header, -len(members[header])))
    loops = []
    for header in headers:
        around = [h for h in headers if h != header and members[h] > members[header]]
        within = [h for h in headers if h != header and members[h] < members[header]]
        parent = min(around, key=lambda h: len(members[h]), default=None)
        inner = set().union(*(members[h] for h in within))
        body = sorted(i for block in members[header] for i in blocks[block])
        own = sorted(i for block in members[header] - inner for i in blocks[block])
        loops.append(
            Loop(
                header=blocks[header].start,
                body=tuple(body),
                own=tuple(own),
                parent=None if parent is None else headers.index(parent),
                line=instructions[closing[header]].line,
            )
        )
    return loops
