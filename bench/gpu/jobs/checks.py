"""Checks of the public operators on a device, against their equations in fp64, at odd shapes.

Attention, the experts and batches of many tasks are checked as before they are timed; row-wise
operators against PyTorch's autograd of the plain formulas. A result may have twice the error of
eager PyTorch against fp64 in the same dtype, plus a slack that depends on the dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from bench.compare.correctness import Check, Results, budget, largest_error
from bench.gpu.jobs.row_checks import (
    ActivationCase,
    GatedCase,
    NormCase,
    RotationCase,
    RowCase,
    row_functions,
    row_inputs,
)
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
from vpt_fast.ops.rowwise.activation import KINDS

KernelCase = AttentionCase | ExpertCase | RowCase | BankAttentionCase | HeadsCase

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
        *(ActivationCase(kind) for kind in KINDS), GatedCase(), GatedCase("gelu", 50),
        RotationCase(), RotationCase(False, 96), RotationCase(width=88),
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
    given = [t.to(device, dtype) for t in row_inputs(case)]
    ours, plain = row_functions(case)
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
        row_functions(case)[0](*(t.to(device, dtype) for t in row_inputs(case)))


def _double(found: Results) -> Results:
    return {name: value.double() for name, value in found.items()}
