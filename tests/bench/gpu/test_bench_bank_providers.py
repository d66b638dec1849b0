"""The GPU benchmark's batches of many tasks, on the CPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.counted.trace import counts, traced
from bench.gpu.device import CpuDevice
from bench.gpu.jobs.cases import Plan, timed_jobs, with_providers
from bench.gpu.jobs.checks import check_kernel, kernel_cases
from bench.gpu.jobs.measure import KernelCheck, measure
from bench.providers import bank_attention as bank_attention_providers
from bench.providers import bank_models as bank_model_providers
from bench.providers.bank_attention import (
    BANK_PROVIDERS,
    GATHERED,
    ONE_BY_ONE,
    BankAttentionCase,
    HeadsCase,
)
from bench.providers.bank_models import BankModelCase, prepare
from bench.providers.models import OURS
from vpt_fast import PromptBank
from vpt_fast.ops import operation

pytest_plugins = ("support.kernels.kernel_device",)

EQUAL = BankAttentionCase(5, 4, 17, 2, 16)
MIXED = replace(EQUAL, prompts=9, batch=7, mixed=True)
SMALL = BankModelCase("test_vit", 3, 4, 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [EQUAL, MIXED], ids=str)
def test_all_providers_compute_the_same(case: BankAttentionCase, dtype: torch.dtype) -> None:
    checks = bank_attention_providers.checks(case, dtype)
    assert set(checks) == {*BANK_PROVIDERS, OURS}
    assert all(check.holds and check.error > 0 for check in checks.values())
    outs = {
        name: run()["out"] for name, run in bank_attention_providers.functions(case, dtype).items()
    }
    shape = (case.batch, case.tokens, case.heads * case.head_dim)
    for out in outs.values():
        assert out.shape == shape and out.dtype == dtype
        tolerance = 2e-6 if dtype == torch.float32 else 0.02
        torch.testing.assert_close(out, outs[OURS], rtol=0, atol=tolerance)


def test_a_mixed_batch_has_everything() -> None:
    """Tasks of every kind, whose prompts are not in the order of the images or in one pool."""
    spans = MIXED.spans()
    assert {0, 1, 3, 9} == {count for _, count in spans}
    assert any(offset < 0 and count for offset, count in spans)
    given = MIXED.inputs(torch.float32)
    assert given.max_prompts == 9 and given.offsets.tolist() == [offset for offset, _ in spans]
    assert len(EQUAL.inputs(torch.float32).computed) == 0


@pytest.mark.parametrize("case", [MIXED, EQUAL], ids=str)
def test_prompts_of_another_task_are_noticed(
    case: BankAttentionCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = bank_attention_providers.bank_attention

    def wrong(tokens: Any, cached: Tensor, computed: Tensor, offsets: Tensor, *others: Any) -> Any:
        return right(tokens, cached.roll(1, 0), computed, offsets, *others)

    monkeypatch.setattr(bank_attention_providers, "bank_attention", wrong)
    checks = bank_attention_providers.checks(case, torch.bfloat16)
    assert {name for name, check in checks.items() if not check.holds} == {OURS}


@pytest.mark.parametrize("case", [MIXED, EQUAL], ids=str)
def test_one_launch_for_all_tasks(case: BankAttentionCase) -> None:
    """Checked by counting the launches on a GPU."""
    launched = {}
    for name, run in bank_attention_providers.functions(case, torch.bfloat16).items():
        with traced() as ops:
            run()
        launched[name] = ops
    (ours,) = launched[OURS]
    assert (ours.name, ours.kind, ours.launches) == ("ragged_forward", "attention", 1)
    assert counts(launched[ONE_BY_ONE]) == {"forward": case.batch, "cat": 1}
    gathered = counts(launched[GATHERED])
    assert gathered["index"] == 1 and gathered["cat"] >= 1
    one_by_one = sum(op.flop for op in launched[ONE_BY_ONE])
    assert ours.flop == one_by_one <= sum(op.flop for op in launched[GATHERED])
    assert ours.nbytes < sum(op.nbytes for op in launched[GATHERED])


def test_a_head_of_another_task_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_kernel(HeadsCase(40), torch.bfloat16, "cpu").holds
    right = bank_attention_providers.grouped_heads
    monkeypatch.setattr(
        bank_attention_providers, "grouped_heads", lambda x, w, *a: right(x, w.roll(1, 0), *a)
    )
    assert not check_kernel(HeadsCase(40), torch.bfloat16, "cpu").holds


@pytest.mark.parametrize("name", [ONE_BY_ONE, OURS])
def test_a_model_of_many_tasks(name: str) -> None:
    check, run = prepare(SMALL, name, torch.float32, "cpu")
    assert check.holds and 0 < check.error < 1e-4
    assert run()["logits"].shape == (3, 100)


def test_answers_of_another_task_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mixed(PromptBank):
        def __call__(self, images: Tensor, tasks: Any) -> list[Tensor]:
            return super().__call__(images, tasks[::-1])

    monkeypatch.setattr(bank_model_providers, "PromptBank", Mixed)
    case = replace(SMALL, batch=2)
    assert not prepare(case, OURS, torch.float32, "cpu")[0].holds


def test_rows_of_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bank is not captured as a graph, since the graph would replay the captured tasks."""

    def capture(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(CpuDevice, "capture", capture)
    outcome = measure(SMALL, CpuDevice(), "float32")
    assert not outcome.wrong
    assert [row["provider"] for row in outcome.rows] == [ONE_BY_ONE, OURS]
    for row in outcome.rows:
        assert row["p50_ms"] and row["ratio_p50"] and not row.get("note")
        assert (row["model"], row["batch"], row["prompts"]) == ("test_vit", 3, 4)
    monkeypatch.undo()
    rows = measure(EQUAL, CpuDevice(), "float32").rows
    assert {row["bench"] for row in rows} == {"attention of many tasks"}


def test_jobs_of_a_gpu() -> None:
    jobs = timed_jobs(Plan())
    (attention,) = [s for s in jobs if isinstance(s, BankAttentionCase)]
    (model,) = [s for s in jobs if isinstance(s, BankModelCase)]
    assert attention == BankAttentionCase(50, 64, 197, 12, 64) and not attention.mixed
    assert model == BankModelCase("vit_base_patch16_224", 64, 50)
    assert attention.providers == (*BANK_PROVIDERS, OURS) and model.providers == (ONE_BY_ONE, OURS)
    # Other providers are measured with ours only, or by name, as after a fault of a provider.
    others = timed_jobs(Plan(providers=("concat",)))
    assert not any(isinstance(s, BankAttentionCase | BankModelCase) for s in others)
    assert with_providers(attention, [ONE_BY_ONE]).providers == (ONE_BY_ONE,)
    checked = [c for c in kernel_cases() if isinstance(c, BankAttentionCase | HeadsCase)]
    assert {str(KernelCheck(c)) for c in checked} == {
        "check bank_attention-p70-mixed-b7-n197-heads 3x64",
        "check bank_attention-p5-mixed-b7-n50-heads 2x80",
        "check grouped_heads-f776",
        "check grouped_heads-f33",
    }


def test_the_kernels_hold(kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under ttsem tensors are on the CPU, so the operators are told to use the kernels."""
    monkeypatch.setattr(operation, "uses_kernels", lambda *_: True)
    case = replace(MIXED, providers=(OURS,))
    for checked in (case, HeadsCase(72)):
        assert check_kernel(checked, torch.bfloat16, kernel_device).holds
