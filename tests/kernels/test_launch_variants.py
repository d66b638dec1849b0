"""Launches that share compiled code: the last, smaller batch of an epoch compiles nothing.

Triton's own launcher computes the specialisation of each launch; no kernel is compiled or run.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable

import pytest

from bench.machine_code.offline import gpu_target, specialise, variant
from bench.machine_code.problems.attention import AttentionProblem, attention_plan, ragged_launch
from bench.machine_code.problems.experts import ExpertProblem, expert_plan
from bench.machine_code.problems.rowwise import RowProblem, row_launch
from bench.machine_code.problems.window_attention import WindowProblem, window_plan
from bench.machine_code.reports.grouped_heads import HeadsProblem, heads_launch
from vpt_fast.kernels.runtime.launch import Launch, Target

TARGET = Target(90)
ROWS = (
    "residual_norm_scaled", "residual_norm_backward_scaled",
    "activation gelu", "activation_backward gelu",
)  # fmt: skip
WINDOWS = {7: ((28, 28), (7, 7), (3, 3)), 12: ((24, 36), (12, 12), (6, 6))}


def attention(problem: AttentionProblem) -> list[Launch]:
    plan = attention_plan(problem, TARGET)
    frozen = attention_plan(problem, TARGET, needs_tokens=False)["backward"]
    deltas = [launch for launch in frozen if launch.name == "delta"]
    ragged = [ragged_launch(problem, 90)] if problem.num_prompts else []
    return [*plan["forward"], *plan["backward"], *deltas, *ragged]


def rows(batch: int, tokens: int) -> list[Launch]:
    return [row_launch(kernel, RowProblem(rows=batch * tokens)) for kernel in ROWS]


def experts(batch: int, side: int, prompts: int) -> list[Launch]:
    return list(expert_plan(ExpertProblem((side, side), prompts, batch=batch), TARGET).values())


def windows(batch: int, window: int, prompts: int, shared: bool) -> list[Launch]:
    problem = WindowProblem(*WINDOWS[window], prompts, batch=batch, shared_prompts=shared)
    return list(window_plan(problem, TARGET, needs_table=True).values())


FAMILIES: dict[str, Callable[[int], list[Launch]]] = {
    "shared": lambda batch: attention(AttentionProblem(197, 10, batch=batch)),
    "own": lambda batch: attention(AttentionProblem(197, 10, batch=batch, shared_prompts=False)),
    "no prompts": lambda batch: attention(AttentionProblem(197, 0, batch=batch)),
    "one query": lambda batch: attention(AttentionProblem(197, 10, batch=batch, num_queries=1)),
    "few tokens": lambda batch: attention(AttentionProblem(50, 1, batch=batch)),
    "80 channels": lambda batch: attention(AttentionProblem(257, 50, 80, batch=batch)),
    "rows": lambda batch: rows(batch, 197),
    "one row": lambda batch: rows(batch, 1),
    "experts": lambda batch: experts(batch, 14, 10),
    "one prompt of experts": lambda batch: experts(batch, 7, 1),
    "windows": lambda batch: windows(batch, 7, 10, True),
    "windows, own": lambda batch: windows(batch, 7, 10, False),
    "wide windows": lambda batch: windows(batch, 12, 10, True),
    "wide windows, own": lambda batch: windows(batch, 12, 10, False),
    "heads": lambda batch: [heads_launch(HeadsProblem(batch=batch))],
}


def variants(launches: Iterable[Launch]) -> dict[str, set[tuple]]:
    """Return Triton's specialisations by the name of the launch."""
    found = defaultdict(set)
    for launch in launches:
        found[launch.name].add(variant(launch, 90))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_batch_from_1_to_70_takes_the_same_code(family):
    """With one image, shared prompts take the launch of prompts per image."""
    launches = [launch for batch in range(1, 71) for launch in FAMILIES[family](batch)]
    found = variants(launches)
    assert {name: len(different) for name, different in found.items()} == dict.fromkeys(found, 1)


def test_only_tiles_and_other_compile_time_values_make_another_variant():
    """Tokens, prompts and heads: as many variants as there are sets of compile-time values."""
    launches = []
    for tokens, prompts, shared in itertools.product(
        (16, 17, 64, 197, 256), (0, 1, 16, 50), (0, 1)
    ):
        problem = AttentionProblem(tokens, prompts, batch=3, shared_prompts=bool(shared))
        launches += attention(problem)
        launches += attention(problem._replace(num_heads=16, num_queries=1))
    for tokens, side, prompts in itertools.product((1, 16, 197), (4, 7, 16), (1, 10, 16)):
        launches += [*rows(1, tokens), *experts(2, side, prompts)]
    for window, prompts, shared in itertools.product(WINDOWS, (0, 1, 10, 16), (False, True)):
        launches += windows(2, window, prompts, shared)
    compiled = {
        repr((k.kernel.__name__, sorted(k.constexprs.items(), key=str), k.num_warps, k.num_stages))
        + repr([argument is None for argument in k.arguments.values()])
        for k in launches
    }
    assert len({variant(launch, 90) for launch in launches}) == len(compiled) > 50


def test_what_is_compile_time_makes_another_variant():
    one, other = (attention(AttentionProblem(197, p))[0] for p in (10, 50))
    assert one.constexprs["BLOCK_MIX"] != other.constexprs["BLOCK_MIX"]
    assert variant(one, 90) != variant(other, 90) != variant(other, 80)
    unaligned = AttentionProblem(197, 10, head_dim=20, num_heads=3)
    assert variant(attention(unaligned)[0], 90) != variant(one, 90)


def test_a_number_that_is_not_specialised_keeps_its_type():
    (forward, *_) = attention(AttentionProblem(16, 1, batch=1, num_heads=1))
    source, _ = specialise(forward, gpu_target(90))
    types = source.signature
    assert types["num_prompts"] == types["num_heads"] == types["num_keys"] == "i32"
    names = forward.kernel.arg_names
    aligned = {names[index] for (index,), found in source.attrs.items() if found}
    assert "q_ptr" in aligned and not {"num_queries", "num_keys"} & aligned
