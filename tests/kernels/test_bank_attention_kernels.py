"""The ragged forward kernel against softmax attention over a real concatenation, in fp64.

Rows of the pools that belong to no image of the batch are NaN: reading one shows. A kernel may be
no further from fp64 than plain PyTorch in the same dtype, plus about one rounding of the result.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import triton
from support.kernels.error_budget import MAX_SLACK
from support.kernels.on_device import differs_by_one_rounding
from torch import Tensor

from bench.machine_code import offline
from vpt_fast.kernels.attention import ragged as kernels
from vpt_fast.kernels.attention.launches import attention_forward
from vpt_fast.kernels.attention.layouts import split
from vpt_fast.kernels.runtime.launch import Target
from vpt_fast.ops import operation
from vpt_fast.ops.attention.ragged import bank_attention

pytest_plugins = ("support.kernels.kernel_device",)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
HEAD_DIMS = (32, 48, 64, 72, 80, 88, 96, 104, 112, 128)
LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class Case:
    """One call; `tasks` are (start, count) of each image, `layout` is packed, kv or apart."""

    tasks: tuple[tuple[int, int], ...]
    tokens: int = 17
    head_dim: int = 32
    dtype: torch.dtype = BF16
    queries: int | None = None
    heads: int = 2
    layout: str = "packed"
    cached: int = 140
    computed: int = 40

    def __str__(self) -> str:
        tasks = "_".join(f"{start}.{count}" for start, count in self.tasks)
        name = f"{tasks}-N{self.tokens}-d{self.head_dim}-{str(self.dtype)[6:]}-{self.layout}"
        return name + (f"-M{self.queries}" if self.queries else "")

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    @property
    def max_prompts(self) -> int:
        return max(count for _, count in self.tasks)


@dataclass
class Problem:
    """What the kernel takes."""

    tokens: list[Tensor]
    cached: Tensor
    computed: Tensor
    row_offsets: Tensor
    counts: Tensor
    max_prompts: int

    def arguments(self) -> tuple[Any, ...]:
        return (
            self.tokens,
            self.cached,
            self.computed,
            self.row_offsets,
            self.counts,
            self.max_prompts,
        )

    def image(self, b: int) -> tuple[list[Tensor], Tensor]:
        """Return the tokens of an image, and its prompts (1, p, 2, H, d)."""
        start, count = int(self.row_offsets[b]), int(self.counts[b])
        pool, first = (self.computed, ~start) if start < 0 else (self.cached, start)
        return [t[b : b + 1] for t in self.tokens], pool[first : first + count].unsqueeze(0)


def make_problem(case: Case, device: torch.device) -> Problem:
    """Return random tensors; rows of the pools that must not be read are NaN."""
    generator = torch.Generator().manual_seed(case.tokens * 1000 + case.head_dim)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(case.dtype)

    batch, heads, dim = len(case.tasks), case.heads, case.head_dim
    rows = case.queries or case.tokens
    if case.layout == "packed":
        tokens = [rand(batch, case.tokens, 3, heads, dim)]
    elif case.layout == "kv":
        tokens = [rand(batch, rows, heads, dim), rand(batch, case.tokens, 2, heads, dim)]
    else:  # q and k as a norm over heads leaves them: (B, H, rows, d) in memory
        q = rand(batch, heads, rows, dim).transpose(1, 2)
        k = rand(batch, heads, case.tokens, dim).transpose(1, 2)
        tokens = [q, k, rand(batch, case.tokens, 3, heads, dim)[:, :, 2]]
    pools = [rand(n, 2, heads, dim) for n in (case.cached, case.computed)]
    for pool, sign in zip(pools, (1, -1), strict=True):
        read = torch.zeros(len(pool), dtype=torch.bool)
        for start, count in case.tasks:
            if (start < 0) == (sign < 0):
                first = ~start if start < 0 else start
                read[first : first + count] = True
        pool[~read] = float("nan")
    row_offsets, counts = (torch.tensor(column) for column in zip(*case.tasks, strict=True))
    return Problem(
        [t.to(device) for t in tokens],
        *(t.to(device) for t in (*pools, row_offsets, counts)),
        case.max_prompts,
    )


def by_hand(problem: Problem, case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Compute attention image by image in `dtype`, and the base-2 log-sum-exp."""
    outs, sums = [], []
    for b in range(len(case.tasks)):
        tokens, prompts = problem.image(b)
        q, k, v = (t.to(dtype) for t in split(tokens))
        prompt_k, prompt_v = prompts.to(dtype).unbind(2)
        keys = torch.cat([prompt_k, k], 1).transpose(1, 2)
        values = torch.cat([prompt_v, v], 1).transpose(1, 2)
        scores = q.transpose(1, 2) @ keys.transpose(2, 3) * case.scale
        outs.append((scores.softmax(-1) @ values).transpose(1, 2).flatten(2))
        sums.append(scores.logsumexp(-1) * LOG2_E)
    return torch.cat(outs), torch.cat(sums)


def assert_as_exact_as_eager(case: Case, device: torch.device) -> None:
    problem = make_problem(case, device)
    out, lse = kernels.bank_attention_forward(*problem.arguments(), case.scale)
    assert out.is_contiguous() and out.dtype == case.dtype and lse.dtype == FP32
    exact, exact_lse = by_hand(problem, case, torch.float64)
    eager, _ = by_hand(problem, case, case.dtype)
    epsilon = torch.finfo(case.dtype).eps
    slack = MAX_SLACK[case.dtype] * epsilon * exact.abs().max()
    assert (out.double() - exact).abs().max() <= (eager.double() - exact).abs().max() + slack
    tolerance = epsilon * (2 * exact_lse.abs().max() if case.dtype == FP32 else 0.5)
    assert (lse.double() - exact_lse).abs().max() <= tolerance


# Both pools, no prompts, one task twice, more than a whole tile of keys, the pools' last rows.
TASKS = ((3, 5), (60, 0), (~2, 9), (3, 5), (70, 70), (~37, 3))


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_head_dimension(
    head_dim: int, dtype: torch.dtype, kernel_device: torch.device
) -> None:
    assert_as_exact_as_eager(
        Case(TASKS[2:5], head_dim=head_dim, dtype=dtype, heads=1), kernel_device
    )


CASES = [
    Case(TASKS),
    Case(TASKS, 197, 64, heads=1),
    Case(TASKS, 65, 64, FP16, layout="apart"),
    Case(TASKS, 50, 64, queries=1, layout="kv"),
    Case(TASKS, 50, 80, FP32, queries=1, layout="kv", heads=3),
    Case(TASKS, 64, 64, queries=2, layout="kv"),
    Case(((~0, 7),), 37, 33),
    Case(((5, 1),), 1, 8),
    Case(((5, 1), (0, 1), (~0, 1)), 5, 16, cached=6, computed=1),
    Case(((0, 6), (3, 3)), 20, 32, cached=6, computed=0),
    Case(((~0, 6), (~3, 3)), 20, 32, cached=0, computed=6),
    Case(((0, 0), (9, 0)), 20, 32),
    Case(((0, 0), (9, 0)), 20, 32, cached=0, computed=0),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_mixed_counts_layouts_and_pools(case: Case, kernel_device: torch.device) -> None:
    assert_as_exact_as_eager(case, kernel_device)


@pytest.mark.parametrize("case", [Case(TASKS, 65, 64), Case(TASKS, 20, 80, FP32, heads=1)], ids=str)
def test_sm80(case: Case, kernel_device_sm80: torch.device) -> None:
    """The launch table chooses other tiles for an A100."""
    assert_as_exact_as_eager(case, kernel_device_sm80)


@pytest.mark.full
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("tokens", [1, 17, 50, 197, 257])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_grid(head_dim: int, tokens: int, dtype: torch.dtype, kernel_device: torch.device) -> None:
    assert_as_exact_as_eager(Case(TASKS[1:5], tokens, head_dim, dtype, heads=1), kernel_device)


@pytest.mark.parametrize("count", [10, 70])
def test_is_prompt_attention_bit_for_bit(count: int, kernel_device: torch.device) -> None:
    """An image with the most prompts of its batch is computed as if it were alone."""
    case = Case(((5, count), (80, 3), (2, count)), 50, 64, cached=120)
    problem = make_problem(case, kernel_device)
    out, lse = kernels.bank_attention_forward(*problem.arguments(), case.scale)
    for b in (0, 2):
        tokens, prompts = problem.image(b)
        alone = attention_forward(tokens, [prompts], case.scale)
        assert torch.equal(out[b : b + 1], alone[0]) and torch.equal(lse[b : b + 1], alone[1])


def test_same_inputs_same_bits(kernel_device: torch.device) -> None:
    case = Case(TASKS)
    first, second = (
        kernels.bank_attention_forward(*make_problem(case, kernel_device).arguments(), case.scale)
        for _ in range(2)
    )
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_most_is_only_a_hint(kernel_device: torch.device) -> None:
    """A smaller or larger one chooses other tiles, and computes the same."""
    case = Case(TASKS, heads=1)
    problem = make_problem(case, kernel_device)
    exact, _ = by_hand(problem, case, torch.float64)
    for problem.max_prompts in (1, 300):
        out, _ = kernels.bank_attention_forward(*problem.arguments(), case.scale)
        assert (out.double() - exact).abs().max() <= 0.01 * exact.abs().max()


def test_no_images(kernel_device: torch.device) -> None:
    problem = make_problem(Case(TASKS), kernel_device)
    none = replace(
        problem,
        tokens=[t[:0] for t in problem.tokens],
        row_offsets=problem.row_offsets[:0],
        counts=problem.counts[:0],
    )
    out, lse = kernels.bank_attention_forward(*none.arguments(), 0.3)
    assert out.shape == (0, 17, 64) and lse.shape == (0, 2, 17)


def test_pools_with_other_strides(kernel_device: torch.device) -> None:
    """Such tensors are copied."""
    case = Case(TASKS)
    problem = make_problem(case, kernel_device)
    expected = kernels.bank_attention_forward(*problem.arguments(), case.scale)
    wide = torch.zeros(case.cached, 3, case.heads, case.head_dim, dtype=case.dtype)
    wide = wide.to(kernel_device)
    wide[:, 1:] = problem.cached
    problem.cached = wide[:, 1:]
    have = kernels.bank_attention_forward(*problem.arguments(), case.scale)
    assert all(torch.equal(a, b) for a, b in zip(have, expected, strict=True))


@pytest.mark.parametrize("offset", [1, 4])
def test_unaligned_pools(offset: int, kernel_device: torch.device) -> None:
    """Prompts whose rows are not aligned to 16 bytes."""
    case = Case(TASKS)
    problem = make_problem(case, kernel_device)
    expected = kernels.bank_attention_forward(*problem.arguments(), case.scale)
    memory = torch.zeros(problem.computed.numel() + offset, dtype=case.dtype, device=kernel_device)
    problem.computed = memory[offset:].view(problem.computed.shape).copy_(problem.computed)
    have = kernels.bank_attention_forward(*problem.arguments(), case.scale)
    assert all(differs_by_one_rounding(a, b) for a, b in zip(have, expected, strict=True))


def test_the_operator_takes_the_kernel(
    kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors are on the CPU under ttsem, so the device check is patched."""
    monkeypatch.setattr(operation, "uses_kernels", lambda *_: True)
    case = Case(TASKS[:3], heads=1)
    problem = make_problem(case, kernel_device)
    have = bank_attention(*problem.arguments(), case.scale)
    want = kernels.bank_attention_forward(*problem.arguments(), case.scale)
    assert all(torch.equal(a, b) for a, b in zip(have, want, strict=True))


def test_rows_of_a_pool_are_counted_in_64_bits() -> None:
    """A pool may have more than 2**31 elements; within one image's prompts 32 bits suffice."""
    case = Case(((0, 50),), 197, 64)
    problem = make_problem(case, torch.device("meta"))
    out, lse = torch.empty(1, 197, 128, dtype=BF16), torch.empty(1, 2, 197)
    launch = kernels.bank_attention_launch(
        *problem.arguments(), out.to("meta"), lse.to("meta"), case.scale, Target(80)
    )
    target = offline.gpu_target(80)
    source, options = offline.specialise(launch, target)
    text = triton.compile(source, target=target, options=options).asm["ttir"]
    # ttsem has MLIR printed in its generic form, and Triton's cache keeps either.
    (offset,) = re.findall(r'(%offset\w*) = "?arith\.select', text)
    kinds = re.findall(rf'arith\.muli"?[ (]{offset}, [^:]*: \(?(\w+)', text)
    assert kinds and set(kinds) == {"i64"}
    assert launch.constexprs["INDEX"] == triton.language.int32


def test_a_launch_that_is_not_ragged_has_none_of_its_pointers() -> None:
    case = Case(((0, 50),), 197, 64)
    problem = make_problem(case, torch.device("meta"))
    out, lse = torch.empty(1, 197, 128, dtype=BF16), torch.empty(1, 2, 197)
    types = {}
    for problem.max_prompts in (0, 50):
        launch = kernels.bank_attention_launch(*problem.arguments(), out, lse, 0.1, Target(80))
        source, _ = offline.specialise(launch, offline.gpu_target(80))
        types[launch.name] = source.signature
    pointers = ("computed_k_ptr", "computed_v_ptr", "row_offsets_ptr", "counts_ptr")
    assert [types["ragged_forward"][name] for name in pointers] == ["*bf16"] * 2 + ["*i64"] * 2
    assert {types["forward"][name] for name in pointers} == {"constexpr"}


def bad_inputs() -> list[Any]:
    def changed(message: str, error: type[Exception], **changes: Any) -> Any:
        return pytest.param(changes, error, message, id=message)

    pool = torch.zeros(9, 2, 2, 32, dtype=BF16)
    return [
        changed("cached is torch.float32", TypeError, cached=pool.float()),
        changed("computed must be", ValueError, computed=pool[:, :1]),
        changed(
            "row_offsets is torch.int32", TypeError, row_offsets=torch.zeros(6, dtype=torch.int32)
        ),
        changed("counts must be", ValueError, counts=torch.zeros(5, dtype=torch.int64)),
        changed("cached is on meta", ValueError, cached=pool.to("meta")),
        changed("max_prompts is -1", ValueError, max_prompts=-1),
        changed(
            "max_prompts is 70 where both pools", ValueError, cached=pool[:0], computed=pool[:0]
        ),
        changed("qkv must be", ValueError, tokens=[torch.zeros(6, 5, 2, 2, 32, dtype=BF16)]),
    ]


@pytest.mark.parametrize(("changes", "error", "message"), bad_inputs())
def test_bad_inputs_are_named(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    problem = replace(make_problem(Case(TASKS), torch.device("cpu")), **changes)
    with pytest.raises(error, match=message):
        kernels.bank_attention_forward(*problem.arguments(), 1.0)
