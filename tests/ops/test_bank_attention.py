"""Attention with prompts of each image's own task: the operator and its plain PyTorch path."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from vpt_fast.kernels.attention.layouts import split
from vpt_fast.ops.attention import ragged_reference as reference
from vpt_fast.ops.attention import reference as attention_reference
from vpt_fast.ops.attention.ragged import bank_attention, bank_attention_operator

LOG2_E = 1.4426950408889634
SCALE = 0.3

CASES = {
    "mixed": ([2, 0, ~1, 2, ~0], [3, 0, 4, 3, 1]),
    "overlapping": ([0, 1, 2, 3, 4], [5, 4, 3, 2, 1]),
    "equal": ([4, ~3, 0, 4, 1], [2, 2, 2, 2, 2]),
    "computed": ([~0, ~1, ~2, ~3, ~4], [1, 1, 1, 1, 1]),
    "none": ([0, 0, 0, 0, 0], [0, 0, 0, 0, 0]),
}


@dataclass
class Call:
    """Arguments of `bank_attention` without the scale."""

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

    def image(self, b: int) -> Call:
        one = slice(b, b + 1)
        return Call(
            [t[one] for t in self.tokens],
            self.cached,
            self.computed,
            self.row_offsets[one],
            self.counts[one],
            self.max_prompts,
        )

    def prompts(self, b: int) -> Tensor:
        """Return the prompts of an image, (1, p, 2, H, d)."""
        start, count = int(self.row_offsets[b]), int(self.counts[b])
        pool, first = (self.computed, ~start) if start < 0 else (self.cached, start)
        return pool[first : first + count].unsqueeze(0)


def make(
    case: str = "mixed",
    layout: int = 1,
    *,
    batch: int = 5,
    keys: int = 7,
    queries: int = 3,
    heads: int = 2,
    dim: int = 4,
    dtype: torch.dtype = torch.float64,
) -> Call:
    """Return random tensors: nine cached prompts, six computed ones."""
    generator = torch.Generator().manual_seed(keys + 10 * dim + 100 * batch)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    tokens = {
        1: lambda: [rand(batch, keys, 3, heads, dim)],
        2: lambda: [rand(batch, queries, heads, dim), rand(batch, keys, 2, heads, dim)],
        3: lambda: [rand(batch, r, heads, dim) for r in (queries, keys, keys)],
    }[layout]()
    row_offsets, counts = (
        torch.tensor(values[:batch], dtype=torch.int64) for values in CASES[case]
    )
    max_prompts = int(counts.max()) if batch else 0
    return Call(
        tokens, rand(9, 2, heads, dim), rand(6, 2, heads, dim), row_offsets, counts, max_prompts
    )


def textbook(call: Call, scale: float = SCALE) -> tuple[Tensor, Tensor]:
    """Compute attention image by image, by concatenation."""
    outs, sums = [], []
    for b in range(len(call.row_offsets)):
        q, k, v = split(call.image(b).tokens)
        prompts = call.prompts(b)
        k, v = torch.cat([prompts[:, :, 0], k], 1), torch.cat([prompts[:, :, 1], v], 1)
        scores = torch.einsum("bmhd,bnhd->bhmn", q, k) * scale
        outs.append(torch.einsum("bhmn,bnhd->bmhd", scores.softmax(-1), v).flatten(2))
        sums.append(scores.logsumexp(-1) * LOG2_E)
    return torch.cat(outs), torch.cat(sums)


def assert_equal(have: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    for a, b in zip(have, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("layout", [1, 2, 3])
@pytest.mark.parametrize("case", CASES)
def test_equals_textbook_attention(case: str, layout: int) -> None:
    call = make(case, layout)
    out, lse = bank_attention(*call.arguments(), SCALE)
    assert out.is_contiguous() and lse.is_contiguous()
    assert_equal((out, lse), textbook(call))


@pytest.mark.parametrize(
    "sizes",
    [{"batch": 1}, {"keys": 1}, {"queries": 1}, {"heads": 1, "dim": 1}, {"dim": 5}],
    ids=str,
)
@pytest.mark.parametrize("layout", [1, 2])
def test_small_and_odd_sizes(layout: int, sizes: dict[str, int]) -> None:
    call = make("mixed", layout, **sizes)
    assert_equal(bank_attention(*call.arguments(), SCALE), textbook(call))


@pytest.mark.parametrize("max_prompts", [1, 20])
def test_long_runs_of_prompts_are_copied_in_pieces(
    max_prompts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces have one row, or two rows of eight numbers and a shorter last piece."""
    monkeypatch.setattr(reference, "_ONE_REGION", max_prompts)
    for case in ("mixed", "overlapping"):
        call = make(case)
        assert_equal(bank_attention(*call.arguments(), SCALE), textbook(call))


def test_no_images() -> None:
    call = make(batch=0)
    out, lse = bank_attention(*call.arguments(), SCALE)
    assert out.shape == (0, 7, 8) and lse.shape == (0, 2, 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["mixed", "equal"])
def test_is_prompt_attention_of_each_image(case: str, dtype: torch.dtype) -> None:
    """Bit for bit: a task's images do not depend on the others of their batch."""
    call = make(case, keys=19, dim=16, dtype=dtype)
    out, lse = bank_attention(*call.arguments(), SCALE)
    assert out.dtype == dtype and lse.dtype == torch.float32
    for b in range(len(call.row_offsets)):
        alone = attention_reference.attention_forward(
            call.image(b).tokens, [call.prompts(b)], SCALE
        )
        assert torch.equal(out[b : b + 1], alone[0]) and torch.equal(lse[b : b + 1], alone[1])


@pytest.mark.parametrize(("case", "calls"), [("mixed", 4), ("equal", 1), ("none", 1)])
def test_one_fused_call_for_each_count(
    case: str, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = []
    attend = attention_reference.attend

    def spy(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        shapes.append(tuple(k.shape))
        return attend(q, k, v, scale)

    monkeypatch.setattr(reference, "attend", spy)
    call = make(case)
    bank_attention(*call.arguments(), SCALE)
    counts = call.counts.tolist()
    assert len(shapes) == calls
    assert {(counts.count(p), p + 7) for p in counts} == {(b, rows) for b, _, rows, _ in shapes}


def test_one_count_copies_only_the_join(monkeypatch: pytest.MonkeyPatch) -> None:
    """The queries are not copied."""
    call = make("equal")
    storages = []

    def spy(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        storages.append(q.untyped_storage().data_ptr())
        return attention_reference.attend(q, k, v, scale)

    monkeypatch.setattr(reference, "attend", spy)
    reference.bank_attention_forward(*call.arguments(), SCALE)
    assert storages == [call.tokens[0].untyped_storage().data_ptr()]


@pytest.mark.parametrize("case", ["mixed", "equal"])
def test_formula_for_other_devices(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path without the CPU's fused attention, which MPS and XPU tensors take."""
    monkeypatch.setattr(attention_reference, "has_flash", lambda q: False)
    call = make(case)
    assert_equal(bank_attention(*call.arguments(), SCALE), textbook(call))


@pytest.mark.parametrize("rows", [0, 1])
def test_a_pool_may_be_empty(rows: int) -> None:
    call = make("overlapping")
    call.computed = call.computed[:rows]
    assert_equal(bank_attention(*call.arguments(), SCALE), textbook(call))


def test_most_may_be_more_than_there_are() -> None:
    call = make()
    call.max_prompts = 50
    assert_equal(bank_attention(*call.arguments(), SCALE), textbook(call))


@pytest.mark.parametrize(("layout", "case"), [*itertools.product((1, 2, 3), ("mixed", "none"))])
def test_opcheck(layout: int, case: str) -> None:
    call = make(case, layout, dtype=torch.float32)
    torch.library.opcheck(bank_attention_operator, (*call.arguments(), SCALE))


def test_compiles_without_a_graph_break() -> None:
    call = make(dtype=torch.float32)
    compiled = torch.compile(bank_attention, fullgraph=True, backend="aot_eager")
    have = compiled(*call.arguments(), SCALE)
    want = bank_attention(*call.arguments(), SCALE)
    assert all(torch.equal(a, b) for a, b in zip(have, want, strict=True))


def test_has_no_backward() -> None:
    call = make()
    call.tokens[0].requires_grad_()
    out, _ = bank_attention(*call.arguments(), SCALE)
    with pytest.raises(RuntimeError, match="autograd"):
        out.sum().backward()


def test_autocast_rounds_as_sdpa_does() -> None:
    call = make(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = bank_attention(*call.arguments(), SCALE)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"counts": torch.tensor([9, 0, 0, 0, 0]), "max_prompts": 9},
            ValueError,
            "2 to 11 of `cached`",
        ),
        ({"row_offsets": torch.tensor([~4, 0, 0, 0, 0])}, ValueError, "4 to 7 of `computed`"),
        ({"counts": torch.tensor([5, 0, 0, 0, 0])}, ValueError, "5 prompts; 0 to max_prompts = 4"),
        ({"counts": torch.tensor([-1, 0, 0, 0, 0])}, ValueError, "-1 prompts"),
        ({"max_prompts": -1}, ValueError, "max_prompts is -1"),
        (
            {"row_offsets": torch.zeros(4, dtype=torch.int64)},
            ValueError,
            r"row_offsets must be \(5,\)",
        ),
        ({"counts": torch.zeros(5, dtype=torch.int32)}, TypeError, r"counts is torch\.int32"),
        ({"cached": torch.zeros(9, 2, 2, 4)}, TypeError, r"cached is torch\.float32"),
        (
            {"computed": torch.zeros(6, 3, 2, 4).double()},
            ValueError,
            r"computed must be .* not \(6, 3, 2, 4\)",
        ),
        ({"tokens": [torch.zeros(5, 7, 2, 2, 4).double()]}, ValueError, "qkv must be"),
        ({"tokens": [torch.zeros(5, 7, 2, 4).double()]}, ValueError, "qkv must be"),
        (
            {"tokens": [torch.zeros(4, 1, 2, 4).double(), torch.zeros(5, 7, 2, 2, 4).double()]},
            ValueError,
            "kv has a leading dimension of 5 where q has 4",
        ),
        (
            {"cached": torch.zeros(9, 2, 2, 4, device="meta").double()},
            ValueError,
            "cached is on meta",
        ),
    ],
)
def test_what_does_not_fit_is_named(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    call = Call(**{**vars(make()), **changes})
    with pytest.raises(error, match=message):
        bank_attention(*call.arguments(), SCALE)
