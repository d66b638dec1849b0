"""Problems of prompt attention, eager PyTorch's results for them, and those of the kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from support.kernels.error_budget import assert_within_budget
from vpt_fast.kernels.attention.launches import attention_backward, attention_forward
from vpt_fast.kernels.attention.layouts import split, split_prompts


@dataclass(frozen=True)
class Case:
    """One problem; `layout` is how tokens and prompts are packed: packed, kv or apart."""

    tokens: int
    prompts: int
    head_dim: int
    dtype: torch.dtype = torch.bfloat16
    queries: int | None = None
    batch: int = 2
    heads: int = 1
    layout: str = "packed"
    shared: bool = True

    def __str__(self) -> str:
        name = f"N{self.tokens}-p{self.prompts}-d{self.head_dim}-{str(self.dtype)[6:]}"
        name += f"-M{self.queries}" if self.queries else ""
        name += f"-B{self.batch}" if self.batch != 2 else ""
        name += f"-{self.layout}" if self.layout != "packed" else ""
        return name + ("" if self.shared else "-per_image")

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5


@dataclass
class Problem:
    """Tensors of a case: inputs of the kernels, and the gradient of their output."""

    tokens: list[torch.Tensor]
    prompts: list[torch.Tensor]
    grad_out: torch.Tensor


def make_problem(case: Case, device: torch.device) -> Problem:
    """Return random tensors, the same for the same case on every device."""
    generator = torch.Generator().manual_seed(case.tokens * 1000 + case.prompts)

    def rand(*shape: int) -> torch.Tensor:
        values = torch.randn(*shape, generator=generator)
        return values.to(case.dtype).to(device)

    rows, heads, dim = case.queries or case.tokens, case.heads, case.head_dim
    images = 1 if case.shared else case.batch
    if case.layout == "packed":
        tokens = [rand(case.batch, case.tokens, 3, heads, dim)]
    elif case.layout == "kv":
        tokens = [rand(case.batch, rows, heads, dim), rand(case.batch, case.tokens, 2, heads, dim)]
    else:  # q and k as a norm over heads leaves them: (B, H, rows, d) in memory
        q = rand(case.batch, heads, rows, dim).transpose(1, 2)
        k = rand(case.batch, heads, case.tokens, dim).transpose(1, 2)
        tokens = [q, k, rand(case.batch, case.tokens, 3, heads, dim)[:, :, 2]]
    if case.layout == "apart":
        prompts = [rand(images, case.prompts, heads, dim) for _ in range(2)]
    else:
        prompts = [rand(images, case.prompts, 2, heads, dim)]
    return Problem(tokens, prompts, rand(case.batch, rows, heads * dim))


def eager(problem: Problem, case: Case, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Compute attention by concatenation in `dtype`, and gradients by autograd."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in split(problem.tokens)]
    pair = split_prompts(problem.prompts)
    assert pair is not None
    leaves += [t.detach().to(dtype).requires_grad_() for t in pair]
    q, k, v, prompt_k, prompt_v = leaves
    keys = torch.cat([prompt_k.expand(case.batch, -1, -1, -1), k], 1).transpose(1, 2)
    values = torch.cat([prompt_v.expand(case.batch, -1, -1, -1), v], 1).transpose(1, 2)
    scores = q.transpose(1, 2) @ keys.transpose(2, 3) * case.scale
    out = (scores.softmax(-1) @ values).transpose(1, 2).flatten(2)
    grads = torch.autograd.grad(out, leaves, problem.grad_out.to(dtype))
    names = ("dq", "dk", "dv", "prompt_dk", "prompt_dv")
    return {"out": out.detach(), **dict(zip(names, grads, strict=True))}


def kernels(
    problem: Problem, case: Case, needs_tokens: bool = True, needs_prompts: bool = True
) -> dict[str, torch.Tensor]:
    """Compute results and needed gradients by the kernels, and lse."""
    out, lse = attention_forward(problem.tokens, problem.prompts, case.scale)
    assert out.is_contiguous() and out.dtype == case.dtype and lse.dtype == torch.float32
    tokens, prompts = attention_backward(
        problem.tokens,
        problem.prompts,
        out,
        lse,
        problem.grad_out,
        case.scale,
        needs_tokens,
        needs_prompts,
    )
    results = {"out": out, "lse": lse}
    for asked, grads, inputs in (
        (needs_tokens, tokens, problem.tokens),
        (needs_prompts, prompts, problem.prompts),
    ):
        assert [g.shape for g in grads] == ([t.shape for t in inputs] if asked else [])
        assert all(g.is_contiguous() and g.dtype == case.dtype for g in grads)
    if needs_tokens:
        results.update(zip(("dq", "dk", "dv"), split(tokens), strict=True))
    if needs_prompts:
        pair = split_prompts(prompts)
        assert pair is not None
        results.update(zip(("prompt_dk", "prompt_dv"), pair, strict=True))
    return results


def saved_output_noise(problem: Problem, case: Case) -> dict[str, torch.Tensor]:
    """Return the RMS effect on each gradient of one rounding of the saved output.

    The kernels compute rowsum(grad_out * out) from the rounded output, plain PyTorch from exact
    values. With very few keys the gradients are differences so small that this rounding shows.
    """
    q, k, v = (t.double() for t in split(problem.tokens))
    pair = split_prompts(problem.prompts)
    assert pair is not None
    prompt_k, prompt_v = (t.double().expand(case.batch, -1, -1, -1) for t in pair)
    keys, values = torch.cat([prompt_k, k], 1), torch.cat([prompt_v, v], 1)
    probs = (torch.einsum("bmhd,bnhd->bhmn", q, keys) * case.scale).softmax(-1)
    out = torch.einsum("bhmn,bnhd->bhmd", probs, values)
    grad_out = problem.grad_out.double().view(q.shape).transpose(1, 2)
    row = (grad_out * out).square().sum(-1).sqrt() * case.scale
    dq = row[..., None] * torch.einsum("bhmn,bnhd->bhmd", probs, keys).abs()
    squares = torch.einsum("bhmn,bhm,bmhd->bnhd", probs.square(), row.square(), q.square())
    prompts, tokens = squares.split([case.prompts, case.tokens], 1)
    prompts = prompts.sum(0) if case.shared else prompts
    return {"dq": dq, "dk": tokens.sqrt(), "prompt_dk": prompts.sqrt()}


def assert_as_exact_as_eager(case: Case, device: torch.device, **needs: bool) -> None:
    """Assert largest and RMS errors against fp64 within eager's own, plus some roundings."""
    problem = make_problem(case, device)
    actual = kernels(problem, case, **needs)
    truth = eager(problem, case, torch.float64)
    budget = eager(problem, case, case.dtype)
    noise = saved_output_noise(problem, case)
    for name, values in actual.items():
        if name == "lse" or not values.numel():
            continue
        size = noise[name].max() if name in noise else 0.0
        assert_within_budget(name, case.dtype, values, budget[name], truth[name], size)
