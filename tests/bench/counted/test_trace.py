"""The trace: rules for bytes, FLOP and launches, known multiply-adds, and ideal fusion."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import pytest
import timm
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.counted import launches
from bench.counted.fusion import fused
from bench.counted.step_trace import CLASSES, step_ops
from bench.counted.trace import Op, counts, traced
from bench.providers.models import provide
from vpt_fast import VPTDeep
from vpt_fast.kernels.runtime.launch import Launch

TINY, VIT_B = "vit_tiny_patch16_224", "vit_base_patch16_224"
BF16 = torch.bfloat16


def moved(ops: Iterable[Op]) -> list[tuple[str, int, int]]:
    return [(op.name, op.bytes_read, op.bytes_written) for op in ops]


def test_an_operator_reads_its_arguments_once_and_writes_its_result() -> None:
    x, row = torch.zeros(3, 4), torch.zeros(3, 1)
    with traced() as ops:
        x + x
        x + row.expand(3, 4)
        torch.cat([x[:, :1], x[:, 2:]], 1)
        x.t().reshape(2, 6)
    assert moved(ops) == [
        ("add", 48, 48),
        ("add", 48 + 12, 48),
        ("cat", 12 + 24, 36),
        ("clone", 48, 48),
    ]
    assert {(op.kind, op.flop) for op in ops} == {("elementwise", 0)}


def test_in_place_operators_read_and_write_but_a_copy_only_writes_its_target() -> None:
    x = torch.zeros(3, 4, dtype=BF16)
    with traced() as ops:
        x.add_(1.0)
        x[:1].copy_(x[1:2])
        x.zero_()
    assert moved(ops) == [("add_", 24, 24), ("copy_", 8, 8), ("zero_", 0, 24)]


def test_views_and_allocations_are_nothing() -> None:
    x = torch.zeros(3, 4)
    with traced() as ops:
        torch.empty(5)
        x.view(12)[None].expand(2, 12).transpose(0, 1).detach()
    assert ops == []


def test_a_product_that_adds_a_matrix_copies_it_first() -> None:
    a, b = torch.zeros(3, 4), torch.zeros(4, 5)
    with traced() as ops:
        torch.addmm(torch.zeros(5), a, b)
        torch.addmm(torch.zeros(3, 5), a, b)
    products = [op for op in ops if op.kind == "gemm"]
    assert [op.flop for op in products] == [2 * 3 * 4 * 5] * 2
    assert all(op.fp32 for op in products)
    given = 4 * (3 * 4 + 4 * 5)
    assert moved(ops)[1] == ("addmm", given + 20, 60)
    assert moved(ops)[-2:] == [("copy_", 60, 60), ("addmm", given + 60, 60)]


def test_the_gradient_of_a_slice_is_zeros_and_a_copy() -> None:
    x = torch.zeros(6, 4, requires_grad=True)
    y, grad = x[:2], torch.zeros(2, 4)
    with traced() as ops:
        y.backward(grad)
    assert moved(ops)[:2] == [("slice_backward", 0, 96), ("slice_backward", 32, 32)]


def test_attention_has_two_products_forward_and_five_backward() -> None:
    with FakeTensorMode():
        q = torch.empty(64, 12, 197, 64, dtype=BF16, requires_grad=True)
        k, v = (torch.empty(64, 12, 247, 64, dtype=BF16, requires_grad=True) for _ in range(2))
        with traced() as ops:
            F.scaled_dot_product_attention(q, k, v).sum().backward()
    forward, backward = (op for op in ops if op.kind == "attention")
    pairs = 64 * 12 * 197 * 247 * 64
    assert (forward.flop, backward.flop) == (4 * pairs, 10 * pairs)
    assert (forward.launches, backward.launches) == (1, 3)
    rows, statistics = 2 * 64 * 12 * 64, 4 * 64 * 12 * 197
    assert forward.bytes_read == rows * (197 + 2 * 247)
    assert forward.bytes_written == rows * 197 + statistics


def test_our_launches_are_recorded_as_declared_and_not_run() -> None:
    run = Launch.run
    with FakeTensorMode():
        tokens = torch.empty(64, 197, 3, 12, 64, dtype=BF16)
        prompts = torch.empty(1, 50, 2, 12, 64, dtype=BF16)
        with traced() as ops:
            torch.ops.vpt_fast.attention([tokens], [prompts], 0.125)
    (op,) = ops
    rows, statistics = 2 * 12 * 64, 4 * 64 * 12 * 197
    assert (op.name, op.kind, op.ours, op.fp32) == ("forward", "attention", True, False)
    assert op.flop == 64 * 12 * 4 * 197 * 247 * 64
    assert op.bytes_read == rows * (3 * 64 * 197 + 2 * 50)
    assert op.bytes_written == rows * 64 * 197 + statistics
    assert Launch.run is run


@pytest.mark.parametrize("provider", ["concat", "keys_concat", "vpt_fast"])
def test_tensors_with_and_without_values_are_counted_alike(provider: str) -> None:
    method = VPTDeep(5)
    fake = step_ops(TINY, provider, method, 2, BF16, depth=2)
    plain = timm.create_model(TINY, num_classes=CLASSES, depth=2).bfloat16()
    model = provide(provider, plain, method)
    images, labels = torch.zeros(2, 3, 224, 224, dtype=BF16), torch.zeros(2, dtype=torch.int64)
    with traced() as real:
        F.cross_entropy(model(images), labels).backward()
    assert len(real) > 40
    assert [(op.flop, op.fp32, *m) for op, m in zip(real, moved(real), strict=True)] == [
        (op.flop, op.fp32, *m) for op, m in zip(fake, moved(fake), strict=True)
    ]


@functools.cache
def block_flop(provider: str, prompts: int) -> float:
    """Return the multiply-adds of one more block's forward pass per image, in 10^9."""
    more, less = (
        step_ops(VIT_B, provider, VPTDeep(prompts), 64, BF16, depth=depth, backward=False)
        for depth in (3, 2)
    )
    return (sum(op.flop for op in more) - sum(op.flop for op in less)) / 64 / 2 / 1e9


@pytest.mark.parametrize(
    ("provider", "prompts", "expected"),
    [
        ("without_prompts", 50, 17.4),
        ("concat", 10, 18.4),
        ("concat", 50, 22.1),
        ("concat", 200, 36.6),
        ("keys_concat", 50, 17.6),
        ("vpt_fast", 10, 17.5),
        ("vpt_fast", 50, 17.6),
        ("vpt_fast", 100, 17.8),
        ("vpt_fast", 200, 18.2),
    ],
)
def test_multiply_adds_of_vit_b_are_those_of_the_formulas(
    provider: str, prompts: int, expected: float
) -> None:
    """12 blocks of ViT-B/16, 224 px, in 10^9 per image, without the skipped rows of the last."""
    assert 12 * block_flop(provider, prompts) == pytest.approx(expected, abs=0.051)


SWIN_T = "swin_tiny_patch4_window7_224"


def swin_products(prompts: int, batch: int, concatenated: bool) -> int:
    """Return Swin-T's multiply-adds per image at 224 pixels, forward, 100 classes, by formula."""
    found, area = 56 * 56 * 48 * 96 + 768 * 100, 49
    for stage, depth in enumerate((2, 2, 6, 2)):
        tokens, width = (56 >> stage) ** 2, 96 << stage
        windows = tokens // area
        if stage:
            merged = tokens + (prompts if concatenated else 0)
            found += merged * 2 * width * width  # four neighbours of width / 2
        keys = area + prompts
        block = 12 * tokens * width**2 + 2 * tokens * keys * width
        if concatenated:
            # a row per window in attention, one per image in the MLP
            block += windows * prompts * (4 * width**2 + 2 * keys * width) + prompts * 8 * width**2
        else:
            block += 2 * prompts * width**2 // batch
        found += depth * block
    return found


@pytest.mark.parametrize("prompts", [10, 50])
def test_multiply_adds_of_swin_are_those_of_the_formulas(prompts: int) -> None:
    assert swin_products(0, 1, False) == pytest.approx(4.5e9, rel=0.01)  # as published
    for provider, concatenated, count in (
        ("without_prompts", False, 0), ("vpt_fast", False, prompts), ("concat", True, prompts),
    ):  # fmt: skip
        ops = step_ops(SWIN_T, provider, VPTDeep(prompts), 64, BF16, backward=False)
        expected = 64 * swin_products(count, 64, concatenated)
        assert sum(op.flop for op in ops) == 2 * expected, provider


@pytest.mark.parametrize(
    ("model", "side", "launches", "second", "first"),
    [
        # one kernel takes five products backward, two take seven, the first block's prompts four
        (SWIN_T, 56, {"window_forward": 12, "window_backward": 12}, [5 * 59], [4 * 10]),
        (
            "swin_base_patch4_window12_384",
            96,
            {"window_forward_tiled": 24, "window_dq": 23, "window_delta": 1, "window_dkdv": 24},
            [3 * 154, 4 * 154],
            [0, 4 * 10],
        ),
    ],
)
def test_window_attention_has_only_the_needed_products(
    model: str, side: int, launches: dict[str, int], second: list[int], first: list[int]
) -> None:
    ops = step_ops(model, "vpt_fast", VPTDeep(10), 2, BF16)
    ours = [op for op in ops if op.name.startswith("window_")]
    assert counts(ours) == launches
    assert {(op.kind, op.ours, op.fp32) for op in ours} == {("attention", True, False)}
    width = 96 if model == SWIN_T else 128
    unit = 2 * 2 * side**2 * width
    keys = 59 if model == SWIN_T else 154
    assert ours[0].flop == ours[1].flop == unit * 2 * keys
    backward = [op.flop for op in ours if "forward" not in op.name]
    assert backward[-len(second) - len(first) :] == [unit * n for n in (*second, *first)]


def test_the_explicit_softmax_has_the_products_of_the_fused_one() -> None:
    published = step_ops(VIT_B, "published", VPTDeep(5), 2, torch.float32)
    concat = step_ops(VIT_B, "concat", VPTDeep(5), 2, BF16)
    assert not any(op.kind == "attention" for op in published)
    assert all(op.fp32 for op in published if op.flop)
    assert not any(op.fp32 for op in concat if op.flop)
    pairs = 2 * 12 * 202 * 202 * 64
    found, fused_attention = (sum(op.flop for op in ops) for ops in (published, concat))
    # its backward has four products, since the scores are saved
    assert found == fused_attention - 12 * 2 * pairs


def chain(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    y = x.relu()
    z = y * y  # y is not read again: never written
    product = torch.mm(z, weight)
    shifted = product + x
    return shifted.sigmoid() * shifted


def test_ideal_fusion_of_a_small_example() -> None:
    x, weight = torch.zeros(8, 4), torch.zeros(4, 4)
    with traced() as ops:
        chain(x, weight)
    small = fused(ops)
    assert counts(ops) == {"relu": 1, "mul": 2, "mm": 1, "add": 1, "sigmoid": 1}
    assert moved(small) == [
        ("fused", 128, 128),  # x; z
        ("mm", 128 + 64, 128),
        ("fused", 256, 128),  # the product and x; the result
    ]


def test_tensors_read_later_are_written_and_independent_operators_are_not_fused() -> None:
    x, other, weight = torch.zeros(8, 4), torch.zeros(16), torch.zeros(4, 4)
    with traced() as ops:
        y = x.relu()
        z = y * 2
        other.exp()
        product = torch.mm(z, weight)
        product + y
    assert moved(fused(ops)) == [
        ("fused", 128, 256),  # y too
        ("exp", 64, 64),
        ("mm", 128 + 64, 128),
        ("add", 256, 128),
    ]


def test_parts_that_are_written_separately_are_read_as_one() -> None:
    x = torch.zeros(8, 4)
    with traced() as ops:
        whole = torch.empty(8, 8)
        whole[:, :4].copy_(x)
        whole[:, 4:].copy_(x)
        whole.relu()
    assert moved(fused(ops)) == [("fused", 128, 256)]


@pytest.mark.parametrize("provider", ["concat", "keys_concat"])
def test_fusion_does_not_change_products_and_moves_less(provider: str) -> None:
    ops = step_ops(TINY, provider, VPTDeep(10), 4, BF16)
    small = fused(ops)
    unfused = [[op for op in many if op.kind != "elementwise"] for many in (ops, small)]
    assert unfused[0] == unfused[1]
    assert len(small) < len(ops)
    eager, less = (
        sum(op.nbytes for op in many if op.kind == "elementwise") for many in (ops, small)
    )
    assert 0.3 * eager < less < 0.9 * eager


def test_launches_of_a_step_equal_those_counted_by_block() -> None:
    model = launches.providers(5)["VPT-Deep, eager"](2)
    images = torch.zeros(4, 3, 32, 32, dtype=BF16)
    with traced() as ops:
        model(images).float().sum().backward()
    forward, backward = launches.launches_of_step(model, images)
    found = counts(ops)
    assert found - forward - backward == {} and found.total() >= forward.total()
