"""Problems of attention in windows, eager PyTorch's results for them, and those of the kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from support.formulations.plain_windows import plain_window_attention
from support.kernels.error_budget import assert_within_budget
from vpt_fast.kernels.window_attention.launches import (
    window_attention_backward,
    window_attention_forward,
)

LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class Case:
    """One problem; `pad` is whether padding tokens have a key and a value."""

    size: tuple[int, int]
    window: tuple[int, int]
    shift: tuple[int, int] = (0, 0)
    prompts: int | None = 5
    head_dim: int = 32
    dtype: torch.dtype = torch.bfloat16
    batch: int = 2
    heads: int = 1
    pad: bool = True
    shared: bool = True

    def __str__(self) -> str:
        pairs = ("x".join(map(str, pair)) for pair in (self.size, self.window, self.shift))
        name = "-".join(pairs) + f"-p{self.prompts}-d{self.head_dim}-{str(self.dtype)[6:]}"
        name += f"-B{self.batch}" if self.batch != 2 else ""
        name += f"-h{self.heads}" if self.heads != 1 else ""
        return name + ("" if self.shared else "-per_image") + ("" if self.pad else "-zeros")

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5


Problem = dict[str, Tensor]


def make_problem(case: Case, device: torch.device) -> Problem:
    """Return random tensors, the same for the same case on every device."""
    generator = torch.Generator().manual_seed(case.size[0] * 1000 + (case.prompts or 0))

    def rand(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).to(device)

    heads, dim, (rows, columns) = case.heads, case.head_dim, case.window
    problem = {
        "qkv": rand(case.batch, *case.size, 3, heads, dim),
        "table": rand((2 * rows - 1) * (2 * columns - 1), heads),
        "grad_out": rand(case.batch, *case.size, heads * dim),
    }
    if case.pad:
        problem["pad"] = rand(3, heads, dim)
    if case.prompts is not None:
        images = 1 if case.shared else case.batch
        problem["prompts"] = rand(images, case.prompts, 2, heads, dim)
    return problem


def eager(problem: Problem, case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """Compute windowed attention in `dtype`, and gradients by autograd, named as the kernels'."""
    leaves = {n: t.detach().to(dtype) for n, t in problem.items() if n != "grad_out"}
    wanted = [n for n in ("qkv", "prompts", "table") if n in leaves]
    for name in wanted:
        leaves[name].requires_grad_()
    out, lse = plain_window_attention(
        leaves["qkv"], leaves.get("pad"), leaves["table"], leaves.get("prompts"),
        case.window, case.shift, case.scale,
    )  # fmt: skip
    grads = torch.autograd.grad(
        out, [leaves[n] for n in wanted], problem["grad_out"].to(dtype), allow_unused=True
    )
    results = {"out": out.detach(), "lse": lse.detach() * LOG2_E}
    for name, grad in zip(wanted, grads, strict=True):
        results[name] = torch.zeros_like(leaves[name]) if grad is None else grad
    return by_part(results)


def by_part(results: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the gradients of q, k, v and of the prompts' k, v one by one."""
    parts = dict(results)
    if "qkv" in parts:
        parts.update(zip(("dq", "dk", "dv"), parts.pop("qkv").unbind(3), strict=True))
    if "prompts" in parts:
        pair = parts.pop("prompts").unbind(2)
        parts.update(zip(("prompt_dk", "prompt_dv"), pair, strict=True))
    return parts


def kernels(
    problem: Problem, case: Case, tokens: bool = True, prompts: bool = True, table: bool = True
) -> dict[str, Tensor]:
    """Compute results and needed gradients by the kernels."""
    given = (problem["qkv"], problem.get("pad"), problem["table"], problem.get("prompts"))
    geometry = (case.window, case.shift, case.scale)
    out, lse = window_attention_forward(*given, *geometry)
    assert out.is_contiguous() and out.dtype == case.dtype and lse.dtype == torch.float32
    *grads, grad_pad = window_attention_backward(
        *given, out, lse, problem["grad_out"], *geometry, tokens, prompts, table
    )
    assert grad_pad is None
    results = {"out": out, "lse": lse}
    for name, grad, asked in zip(
        ("qkv", "prompts", "table"), grads, (tokens, prompts, table), strict=True
    ):
        if not asked or name not in problem:
            assert grad is None
            continue
        assert grad is not None and grad.shape == problem[name].shape and grad.is_contiguous()
        assert grad.dtype == (torch.float32 if name == "table" else case.dtype)
        results[name] = grad
    return by_part(results)


def assert_as_exact_as_eager(case: Case, device: torch.device, **needs: bool) -> None:
    """Assert largest and RMS errors against fp64 within eager's own, plus some roundings."""
    problem = make_problem(case, device)
    actual = kernels(problem, case, **needs)
    truth = eager(problem, case, torch.float64)
    budget = eager(problem, case, case.dtype)
    for name, values in actual.items():
        assert values.isfinite().all(), name
        if values.numel():
            assert_within_budget(name, case.dtype, values, budget[name], truth[name])
