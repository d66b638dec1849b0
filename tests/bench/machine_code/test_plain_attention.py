"""The plain flash attention that reports compare with: its results, and its machine code.

The kernels run on the GPU, or on the CPU under ttsem (see `kernel_device`). Their results are no
further from fp64 than plain PyTorch in the same dtype, plus about one rounding.
"""

from __future__ import annotations

import pytest
import torch

from bench.machine_code.plain_attention import PlainTiles, plain_launches
from bench.machine_code.problems.attention import AttentionProblem
from bench.machine_code.reports.attention import attention_entry
from bench.machine_code.reports.plain_attention import (
    comparison,
    copy_cycles,
    plain_entry,
    summed_cycles,
)

pytest_plugins = ("support.kernels.kernel_device",)

TILES = {
    "forward": PlainTiles(32, 16, 2, 2),
    "dq": PlainTiles(32, 16, 2, 2),
    "dkdv": PlainTiles(32, 16, 2, 2),
}


def make_tensors(
    queries: int, keys: int, head_dim: int, dtype: torch.dtype, device: torch.device
) -> dict[str, torch.Tensor]:
    """Create the tensors of `plain_launches` for one image of two heads, outputs uninitialised."""
    generator = torch.Generator().manual_seed(queries)

    def rand(rows: int) -> torch.Tensor:
        return torch.randn(1, 2, rows, head_dim, generator=generator).to(dtype).to(device)

    inputs = {"q": rand(queries), "k": rand(keys), "v": rand(keys), "grad_out": rand(queries)}
    outputs = {
        "out": torch.empty_like(inputs["q"]), "dq": torch.empty_like(inputs["q"]),
        "dk": torch.empty_like(inputs["k"]), "dv": torch.empty_like(inputs["v"]),
    }  # fmt: skip
    statistics = {name: torch.empty(1, 2, queries, device=device) for name in ("lse", "delta")}
    return {**inputs, **outputs, **statistics}


def by_hand(
    tensors: dict[str, torch.Tensor], scale: float, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Compute softmax attention in `dtype`, and its gradients."""
    q, k, v = (tensors[name].detach().to(dtype).requires_grad_() for name in "qkv")
    scores = q @ k.transpose(2, 3) * scale
    out = scores.softmax(-1) @ v
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), tensors["grad_out"].to(dtype))
    lse = torch.logsumexp(scores.detach(), -1) / torch.log(torch.tensor(2.0))
    return {"out": out.detach(), "dq": dq, "dk": dk, "dv": dv, "lse": lse}


@pytest.mark.parametrize(
    ("queries", "keys", "head_dim", "dtype"),
    [
        (37, 53, 32, torch.bfloat16),
        (53, 53, 24, torch.float16),
        (32, 48, 64, torch.float16),
    ],
)
def test_forward_and_backward_against_fp64(
    queries: int, keys: int, head_dim: int, dtype: torch.dtype, kernel_device: torch.device
) -> None:
    tensors = make_tensors(queries, keys, head_dim, dtype, kernel_device)
    scale = head_dim**-0.5
    for launch in plain_launches(tensors, scale, TILES).values():
        launch.run()
    exact, eager = by_hand(tensors, scale, torch.float64), by_hand(tensors, scale, dtype)
    for name in ("out", "dq", "dk", "dv"):
        expected = exact[name]
        error = (tensors[name].double() - expected).abs().max()
        usual = (eager[name].double() - expected).abs().max()
        rounding = torch.finfo(dtype).eps * expected.abs().max()
        assert error <= usual + rounding, name
    assert torch.allclose(tensors["lse"].double(), exact["lse"], rtol=0, atol=1e-3)
    delta = (tensors["out"].double() * tensors["grad_out"].double()).sum(-1)
    assert torch.allclose(tensors["delta"].double(), delta, rtol=0, atol=1e-4)


def test_fp32_and_strided_tensors_are_refused() -> None:
    meta = torch.device("meta")
    tensors = {n: t.to(meta) for n, t in make_tensors(8, 8, 32, torch.float32, "cpu").items()}
    with pytest.raises(TypeError, match="float32: plain attention is for"):
        plain_launches(tensors, 1.0, TILES)
    tensors = {n: t.to(meta) for n, t in make_tensors(8, 8, 32, torch.float16, "cpu").items()}
    tensors["k"] = tensors["k"].transpose(1, 2)
    with pytest.raises(ValueError, match="k not contiguous"):
        plain_launches(tensors, 1.0, TILES)


def test_both_are_counted_over_the_same_useful_flop() -> None:
    problem = AttentionProblem(197, 50)
    unit = 64 * 12 * 197 * 64  # of one product of N queries with one key
    ours = [attention_entry(k, problem, 90) for k in ("token_dkdv", "shared_prompt_dkdv")]
    without, with_dead_rows = (plain_entry("plain_dkdv", problem, 90, q) for q in (False, True))
    assert sum(entry.useful_flop or 0 for entry in ours) == 8 * 247 * unit
    assert without.useful_flop == with_dead_rows.useful_flop == 8 * 247 * unit
    assert with_dead_rows.launch.arguments["num_queries"] == 247
    assert (with_dead_rows.useful_fraction or 1) < 0.9 * (without.useful_fraction or 0)

    issue = sum(entry.cycles["issue"] or 0 for entry in ours)
    assert summed_cycles(ours)["issue"] == pytest.approx(issue * 2**20 / (8 * 247 * unit))
    copied = 2 * 2 * 64 * 12 * 247 * 64 * 2  # dk and dv, read and written, bf16
    assert copy_cycles([without]) == pytest.approx(copied / 13.9 * 2**20 / (8 * 247 * unit))
    assert copy_cycles(ours) == 0

    lines = comparison([*ours, without, with_dead_rows]).splitlines()
    assert [line.split("  ")[0] for line in lines[1:]] == ["dkdv"] * 3
    assert [line[33:51].strip() for line in lines[1:]] == [
        "ours", "plain, M = N", "plain, M = N + p",
    ]  # fmt: skip


@pytest.mark.parametrize("kernel", ["plain_forward", "plain_dq"])
def test_full_tiles_arrive_by_wide_asynchronous_copies(kernel: str) -> None:
    """The comparison is fair: the architecture's matrix instructions, no narrow load in a loop."""
    entry = plain_entry(kernel, AttentionProblem(197, 50), 90, prompt_queries=False)
    full = entry.loops[0].figures
    assert full.mix["HGMMA"] > 0 and full.mix["HMMA"] == 0 and full.load_widths == ()
    assert full.wide_copy_bytes == 2 * entry.launch.constexprs["BLOCK_N"] * 64 * 2
