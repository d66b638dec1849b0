"""Declared loads and stores of the kernels, compared with the executed ones, byte by byte.

Every launch of every kernel runs on the CPU under ttsem, which sees each address. The distinct
bytes of all loads, and of all stores, have to be exactly those declared: masks are honoured, and
padding moves nothing.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.kernels.traffic import Draw, both
from torch import Tensor

from bench.counted import declared
from bench.counted.declared import DECLARATIONS, Declaration, Parameter, product_flop
from vpt_fast.kernels.attention import launches as attention
from vpt_fast.kernels.attention import ragged as bank_attention
from vpt_fast.kernels.experts import launches as prompt_expert
from vpt_fast.kernels.experts.inputs import FeatureInputs
from vpt_fast.kernels.rowwise import (
    grouped_heads,
)
from vpt_fast.kernels.runtime.launch import Launch, Target
from vpt_fast.kernels.window_attention import launches as window_attention

pytest_plugins = ("support.kernels.kernel_device",)
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="counted by ttsem, which runs kernels on the CPU"
)

BF16, FP32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("prompts", "shared", "queries", "needs_tokens", "launches"),
    [
        (5, True, None, True, {"forward", "dq", "token_dkdv", "shared_prompt_dkdv"}),
        (70, True, None, True, {"forward", "dq", "token_dkdv", "shared_prompt_dkdv"}),
        (3, False, None, True, {"forward", "dq", "token_dkdv", "prompt_dkdv"}),
        (5, True, 1, True, {"forward", "dq", "token_dkdv", "shared_prompt_dkdv"}),
        (5, True, None, False, {"forward", "delta", "shared_prompt_dkdv"}),
        (0, True, None, True, {"forward", "dq", "token_dkdv"}),
    ],
)
def test_attention(
    prompts: int,
    shared: bool,
    queries: int | None,
    needs_tokens: bool,
    launches: set[str],
    kernel_device: torch.device,
) -> None:
    draw, batch, rows, heads, dim = Draw(kernel_device), 3, 37, 2, 24
    tokens = [draw(batch, rows, 3, heads, dim)]
    if queries is not None:
        tokens = [draw(batch, queries, heads, dim), draw(batch, rows, 2, heads, dim)]
    keys = [draw(1 if shared else batch, prompts, 2, heads, dim)] if prompts else []
    with both() as (declared_bytes, executed_bytes):
        out, lse = attention.attention_forward(tokens, keys, dim**-0.5)
        attention.attention_backward(
            tokens, keys, out, lse, draw(*out.shape), dim**-0.5, needs_tokens, bool(keys)
        )
    assert set(executed_bytes) == launches
    assert declared_bytes == executed_bytes


@pytest.mark.parametrize("grid", [(5, 5), (8, 4)])
def test_fold(grid: tuple[int, int], kernel_device: torch.device) -> None:
    draw, prompts = Draw(kernel_device), 3
    weight, kernel = draw(prompts, (grid[0] - 1) * (grid[1] - 1)), draw(1, 1, 2, 2)
    with both() as (declared_bytes, executed_bytes):
        mixing_weight, mixing_sum = prompt_expert.fold_forward(weight, kernel, grid, 64)
        prompt_expert.fold_backward(weight, kernel, mixing_weight, mixing_sum, grid)
    assert set(executed_bytes) == {"fold", "fold_backward"}
    assert declared_bytes == executed_bytes


@pytest.mark.parametrize(
    ("patches", "needs_x", "needs_mixing_weight", "options"),
    [(25, True, True, True), (64, True, False, False), (100, False, True, True)],
)
def test_mix(
    patches: int,
    needs_x: bool,
    needs_mixing_weight: bool,
    options: bool,
    kernel_device: torch.device,
) -> None:
    draw, prompts, width = Draw(kernel_device), 5, 72
    x = draw(2, 1 + patches, width)
    mixing_weight = torch.zeros(prompts, -(-patches // 64) * 64).to(kernel_device)
    mixing_weight[:, :patches] = draw(prompts, patches, dtype=FP32)
    statistics = draw(3, 2, 1 + patches, dtype=FP32)
    with both() as (declared_bytes, executed_bytes):
        mixing = prompt_expert.mix_forward(x, mixing_weight, patches, statistics)
        prompt_expert.mix_backward(
            x, mixing_weight, patches, draw(width) if options else None, statistics,
            draw(*x.shape), mixing, draw(*x.shape) if options else None, needs_x,
            needs_mixing_weight,
        )  # fmt: skip
    assert set(executed_bytes) == {"mix", "mix_backward"}
    assert declared_bytes == executed_bytes


@pytest.mark.parametrize("options", [True, False])
def test_features(options: bool, kernel_device: torch.device) -> None:
    draw, batch, prompts, width, hidden = Draw(kernel_device), 2, 5, 72, 8

    def optional(*shape: int, dtype: torch.dtype = BF16) -> Tensor | None:
        return draw(*shape, dtype=dtype) if options else None

    inputs = FeatureInputs(
        draw(batch, prompts, width, dtype=FP32),
        draw(prompts, dtype=FP32),
        draw(width),
        draw(width),
        optional(prompts),
        optional(batch, width, dtype=FP32),
        draw(hidden, width),
        draw(width, hidden),
        optional(batch, prompts, hidden, dtype=FP32),
    )
    norm = optional(width), optional(width)
    with both() as (declared_bytes, executed_bytes):
        out, mean, rstd = prompt_expert.features_forward(inputs, options, *norm, 1e-6, BF16)
        prompt_expert.features_backward(
            inputs, options, norm[0], mean, rstd, draw(batch, prompts, width)
        )
    assert set(executed_bytes) == {"features", "features_backward", "weight_gradient"}
    assert declared_bytes == executed_bytes


TOKENS, PROMPTS, TABLE = (True, False, False), (False, True, False), (False, False, True)
ALL = (True, True, True)
WHOLE = {"window_backward"}
TILED = {"window_dq", "window_dkdv"}
APART = {"window_delta", "window_dkdv"}
SCORES = {"window_backward_dbias"}


@pytest.mark.parametrize(
    ("size", "window", "shift", "prompts", "shared", "pad", "dim", "needs", "launches"),
    [
        ((9, 10), (7, 7), (3, 3), 5, True, True, 24, (True, True, False), WHOLE),
        ((4, 6), (4, 3), (0, 1), 0, True, False, 32, ALL, WHOLE | SCORES),
        ((5, 7), (7, 7), (3, 3), 20, False, False, 32, ALL, WHOLE | SCORES),
        ((5, 7), (7, 7), (3, 3), 20, True, True, 32, TOKENS, WHOLE),
        ((5, 7), (7, 7), (3, 3), 20, True, True, 32, PROMPTS, WHOLE),
        ((5, 7), (7, 7), (3, 3), 20, True, True, 32, TABLE, SCORES),
        ((10, 13), (9, 9), (4, 4), 50, True, True, 16, ALL, TILED | {"window_dbias"}),
        ((10, 9), (9, 9), (4, 0), 70, True, True, 16, TOKENS, TILED),
        # the last tile of prompt keys also holds the first 3, 31 and no tokens of a window
        ((10, 9), (9, 9), (4, 0), 61, False, True, 16, PROMPTS, APART),
        ((8, 9), (9, 9), (4, 0), 33, True, True, 16, PROMPTS, APART),
        ((6, 9), (9, 9), (0, 0), 64, True, True, 16, PROMPTS, APART),
        ((10, 9), (9, 9), (4, 0), 5, True, False, 16, TABLE, {"window_delta", "window_dbias"}),
    ],
)  # fmt: skip
def test_window_attention(
    size: tuple[int, int],
    window: tuple[int, int],
    shift: tuple[int, int],
    prompts: int,
    shared: bool,
    pad: bool,
    dim: int,
    needs: tuple[bool, bool, bool],
    launches: set[str],
    kernel_device: torch.device,
) -> None:
    draw, batch, heads = Draw(kernel_device), 2, 2
    qkv = draw(batch, *size, 3, heads, dim)
    padding = draw(3, heads, dim) if pad else None
    table = draw((2 * window[0] - 1) * (2 * window[1] - 1), heads)
    keys = draw(1 if shared else batch, prompts, 2, heads, dim) if prompts else None
    given = qkv, padding, table, keys
    geometry = window, shift, dim**-0.5
    with both() as (declared_bytes, executed_bytes):
        out, lse = window_attention.window_attention_forward(*given, *geometry)
        window_attention.window_attention_backward(
            *given, out, lse, draw(*out.shape), *geometry, *needs
        )
    forward = "window_forward" if launches <= WHOLE | SCORES else "window_forward_tiled"
    assert set(executed_bytes) == {forward, *launches}
    assert declared_bytes == executed_bytes


@pytest.mark.parametrize(
    ("tasks", "layout"),
    [
        # both pools, one task twice, rows that two tasks share, no prompts, more than a whole tile
        (((3, 5), (~2, 9), (3, 5), (6, 4), (0, 0), (20, 70)), "packed"),
        (((3, 5), (9, 1)), "kv"),
        (((~0, 4), (~4, 6)), "apart"),
    ],
)
def test_bank_attention(
    tasks: tuple[tuple[int, int], ...], layout: str, kernel_device: torch.device
) -> None:
    draw, batch, rows, heads, dim = Draw(kernel_device), len(tasks), 37, 2, 24
    tokens = {
        "packed": [draw(batch, rows, 3, heads, dim)],
        "kv": [draw(batch, 1, heads, dim), draw(batch, rows, 2, heads, dim)],
        "apart": [draw(batch, rows, heads, dim) for _ in range(3)],
    }[layout]
    offsets, counts = (torch.tensor(n).to(kernel_device) for n in zip(*tasks, strict=True))
    pools = draw(90, 2, heads, dim), draw(12, 2, heads, dim)
    most = max(count for _, count in tasks)
    with both() as (declared_bytes, executed_bytes):
        bank_attention.bank_attention_forward(tokens, *pools, offsets, counts, most, 0.2)
    assert set(executed_bytes) == {"ragged_forward"}
    assert declared_bytes == executed_bytes


def test_grouped_heads(kernel_device: torch.device) -> None:
    draw, heads = Draw(kernel_device), ((3, 5), (30, 0), (3, 5), (6, 21), (39, 1))
    weight_offsets, counts = (torch.tensor(n).to(kernel_device) for n in zip(*heads, strict=True))
    logit_offsets, total = counts.cumsum(0) - counts, int(counts.sum())
    with both() as (declared_bytes, executed_bytes):
        grouped_heads.grouped_heads_forward(
            draw(5, 72), draw(40, 72), draw(40), weight_offsets, counts, logit_offsets, total, 30
        )
    assert set(executed_bytes) == {"grouped_heads"}
    assert declared_bytes == executed_bytes


def test_flop_of_a_bank() -> None:
    """FLOP follow from each image's number of prompts if known, else from the largest."""
    pool = torch.zeros(20, 2, 2, 8)
    for device, prompts in (("cpu", 3 + 5), ("meta", 2 * 6)):
        offsets, counts = (torch.tensor(n, device=device) for n in ((0, 4), (3, 5)))
        launch = bank_attention.bank_attention_launch(
            [torch.zeros(2, 7, 3, 2, 8)], pool, pool, offsets, counts, 6, torch.zeros(2, 7, 16),
            torch.zeros(2, 2, 7), 0.3, Target(80),
        )  # fmt: skip
        assert product_flop(launch) == 4 * 7 * (2 * 7 + prompts) * 8 * 2
        assert len(declared.declared(launch).loads) == 9


@pytest.mark.parametrize(
    "wrong",
    [
        # a tensor of prompt_kv is missing
        DECLARATIONS["forward"]._replace(loads=DECLARATIONS["forward"].loads[:-1]),
        # lse is stored, not loaded
        Declaration(DECLARATIONS["forward"].loads, DECLARATIONS["forward"].stores[:1]),
        DECLARATIONS["forward"]._replace(
            loads=(*DECLARATIONS["forward"].loads, Parameter("lse"))
        ),
    ],
)  # fmt: skip
def test_a_wrong_declaration_is_found(
    wrong: Declaration, kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(declared.DECLARATIONS, "forward", wrong)
    draw = Draw(kernel_device)
    with both() as (declared_bytes, executed_bytes):
        attention.attention_forward([draw(1, 9, 3, 1, 16)], [draw(1, 3, 2, 1, 16)], 0.25)
    assert declared_bytes != executed_bytes


def test_a_kernel_without_a_declaration_is_refused() -> None:
    unknown: Any = Launch("new", None, (1, 1, 1), {}, {}, 4, 1)
    with pytest.raises(ValueError, match="'new' has no declaration"):
        declared.declared(unknown)
    assert product_flop(unknown) == 0
