"""Checks of the public operators on a device, against their equations in fp64, at odd shapes.

Attention, the experts and batches of many tasks are checked as before they are timed; row-wise
operators against PyTorch's autograd of the plain formulas. A result may have twice the error of
eager PyTorch against fp64 in the same dtype, plus a slack that depends on the dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.compare.correctness import Check, Results, budget, largest_error
from bench.providers import (
    attention as attention_providers,
)
from bench.providers import (
    bank_attention as bank_attention_providers,
)
from bench.providers import (
    experts as expert_providers,
)
from bench.providers.attention import AttentionCase
from bench.providers.bank_attention import BankAttentionCase, HeadsCase, check_heads, run_heads
from bench.providers.experts import ExpertCase
from bench.providers.models import OURS
from vpt_fast.ops.rowwise.activation import KINDS, activation, activation_backward
from vpt_fast.ops.rowwise.residual_norm import residual_norm, residual_norm_backward

EPS = 1e-6


@dataclass(frozen=True)
class NormCase:
    """Residual sum and LayerNorm of (2, rows, width), forward and backward."""

    width: int
    rows: int = 13
    layer_scale: bool = True

    def __str__(self) -> str:
        return f"residual_norm-d{self.width}" + "-layer_scale" * self.layer_scale


@dataclass(frozen=True)
class ActivationCase:
    """Bias and activation of (2, rows, width), forward and backward."""

    kind: str
    width: int = 776
    rows: int = 13

    def __str__(self) -> str:
        return f"activation-{self.kind}-c{self.width}"


KernelCase = AttentionCase | ExpertCase | NormCase | ActivationCase | BankAttentionCase | HeadsCase

_BOTH = ("concat", OURS)
_SHAPES = ((50, 3, 197, 3, 64), (1, 2, 50, 2, 32), (13, 2, 65, 2, 80), (200, 1, 130, 2, 128))


def kernel_cases(expert_models: Sequence[str] = ("vit_tiny_patch16_224",)) -> list[KernelCase]:
    """Return the cases to check.

    They are attention with heads of 64, 32, 80 and 128 channels, experts, row-wise operators, and
    batches of many tasks.
    """
    return [
        *(AttentionCase(*shape, providers=_BOTH) for shape in _SHAPES),
        *(ExpertCase(7, 3, model, providers=_BOTH) for model in expert_models),
        NormCase(192), NormCase(776, layer_scale=False), NormCase(1024),
        *(ActivationCase(kind) for kind in KINDS),
        BankAttentionCase(70, 7, 197, 3, mixed=True, providers=(OURS,)),
        BankAttentionCase(5, 7, 50, 2, 80, mixed=True, providers=(OURS,)),
        HeadsCase(), HeadsCase(33),
    ]  # fmt: skip


def check_kernel(case: KernelCase, dtype: torch.dtype, device: torch.device | str) -> Check:
    """Check an operator."""
    if isinstance(case, AttentionCase):
        return attention_providers.checks(case, dtype, device)[OURS]
    if isinstance(case, ExpertCase):
        return expert_providers.checks(case, dtype, device)[OURS]
    if isinstance(case, BankAttentionCase):
        return bank_attention_providers.checks(case, dtype, device)[OURS]
    if isinstance(case, HeadsCase):
        return check_heads(case, dtype, device)
    given = [t.to(device, dtype) for t in _inputs(case)]
    ours, plain = (_norm, _plain_norm) if isinstance(case, NormCase) else _activations(case)
    truth = plain(*(t.double() for t in given))
    kind = str(dtype).removeprefix("torch.")
    eager = largest_error(_double(plain(*given)), truth)[0]
    error, worst = largest_error(_double(ours(*given)), truth)
    return Check(OURS, error, worst, budget(eager, kind))


def run_operator(case: KernelCase, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
    """Run an operator of vpt_fast, forward and backward, without its reference."""
    if isinstance(case, AttentionCase):
        attention_providers.functions(replace(case, providers=(OURS,)), dtype, device)[OURS]()
    elif isinstance(case, ExpertCase):
        expert_providers.functions(replace(case, providers=(OURS,)), dtype, device)[OURS]()
    elif isinstance(case, BankAttentionCase):
        bank_attention_providers.functions(replace(case, providers=(OURS,)), dtype, device)[OURS]()
    elif isinstance(case, HeadsCase):
        run_heads(case, dtype, device)
    else:
        ours = _norm if isinstance(case, NormCase) else _activations(case)[0]
        ours(*(t.to(device, dtype) for t in _inputs(case)))


def _double(found: Results) -> Results:
    return {name: value.double() for name, value in found.items()}


def _inputs(case: NormCase | ActivationCase) -> Iterable[Tensor]:
    generator = torch.Generator().manual_seed(case.width)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    shape = (2, case.rows, case.width)
    if isinstance(case, ActivationCase):
        return draw(*shape), draw(case.width), draw(*shape)
    scale = draw(case.width) if case.layer_scale else torch.ones(case.width)
    return (draw(*shape), draw(*shape), scale, 1 + 0.3 * draw(case.width),
            draw(case.width), draw(*shape), draw(*shape))  # fmt: skip


def _norm(
    residual: Tensor, branch: Tensor, scale: Tensor, weight: Tensor, bias: Tensor, grad_y: Tensor,
    grad_sum: Tensor,
) -> Results:  # fmt: skip
    total, y, statistics = residual_norm(
        residual, branch, scale, weight, bias, EPS, None, residual.dtype
    )
    grad_x, grad_branch = residual_norm_backward(
        total, statistics, weight, scale, grad_y, grad_sum, branch.dtype
    )
    return {"sum": total, "norm": y, "grad_sum": grad_x, "grad_branch": grad_branch}


def _plain_norm(
    residual: Tensor, branch: Tensor, scale: Tensor, weight: Tensor, bias: Tensor, grad_y: Tensor,
    grad_sum: Tensor,
) -> Results:  # fmt: skip
    total = (residual + scale * branch).requires_grad_()
    y = F.layer_norm(total, total.shape[-1:], weight, bias, EPS)
    (grad,) = torch.autograd.grad([y, total.clone()], total, [grad_y, grad_sum])
    return {
        "sum": total.detach(), "norm": y.detach(), "grad_sum": grad, "grad_branch": scale * grad,
    }  # fmt: skip


_FORMULAS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"),
    "quick_gelu": lambda h: h * torch.sigmoid(1.702 * h),
    "silu": F.silu,
}


def _activations(case: ActivationCase) -> tuple[Callable[..., Results], Callable[..., Results]]:
    formula = _FORMULAS[case.kind]

    def ours(h: Tensor, bias: Tensor, grad: Tensor) -> Results:
        out, grad = activation(h, bias, case.kind), grad.clone()
        activation_backward(h, bias, grad, case.kind)
        return {"out": out, "grad": grad}

    def plain(h: Tensor, bias: Tensor, grad: Tensor) -> Results:
        h = (h + bias).requires_grad_()
        out = formula(h)
        return {"out": out.detach(), "grad": torch.autograd.grad(out, h, grad)[0]}

    return ours, plain
