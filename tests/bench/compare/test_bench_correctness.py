"""Every provider is checked against fp64 before it is timed, and a wrong one is never timed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.compare import correctness
from bench.compare.cases import OTHERS, Case, cpu_cases
from bench.compare.correctness import Check, Truth, largest_error, norm_gradients
from bench.compare.rounds import check_and_time, time_interleaved
from bench.providers import attention as attention_providers
from bench.providers import experts as expert_providers
from bench.providers.attention import AttentionCase
from bench.providers.experts import ExpertCase
from bench.providers.models import EAGER, OURS, PROVIDERS

SMALL: dict[str, Any] = {"model": "test_vit", "batch": 2, "prompts": 3, "image_size": 32}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["vpt-deep", "vapt"])
def test_every_provider_holds(method: str, dtype: str) -> None:
    truth = Truth(Case(method=method, dtype=dtype, **SMALL))
    checks = [truth.check(name) for name in EAGER]
    assert all(check.holds for check in checks), checks
    assert all(check.error > 0 for check in checks)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", OTHERS)
def test_every_other_method_holds(method: str, dtype: str) -> None:
    truth = Truth(Case(method=method, dtype=dtype, **SMALL))
    checks = [truth.check(name) for name in ("published", "concat", OURS)]
    assert all(check.holds for check in checks), checks


def test_inference_is_checked_by_its_logits() -> None:
    truth = Truth(Case("inference", **SMALL))
    assert {truth.check(name).worst for name in EAGER} == {"logits"}


@pytest.mark.parametrize(
    ("what", "name"), [("logits", "logits"), ("blocks.2.prompt.tokens", "blocks.2.prompt.tokens")]
)
def test_a_wrong_provider_is_named_and_not_timed(
    what: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = correctness.results

    def wrong(module: Any, *args: Any) -> Any:
        found = results(module, *args)
        if hasattr(module, "blocks") and hasattr(module.blocks[0], "prompt"):
            found[what] = found[what] * 1.001
        return found

    monkeypatch.setattr(correctness, "results", wrong)
    outcome = check_and_time(Case(**SMALL), rounds=1)
    assert [n for n, result in outcome.items() if result.times is None] == [OURS]
    check = outcome[OURS].check
    assert check.worst == name and check.error == pytest.approx(1e-3, rel=0.1)


def test_nan_does_not_hold() -> None:
    want = {"a": torch.ones(2), "b": torch.ones(2)}
    have = {"a": torch.tensor([1.0, float("nan")]), "b": torch.zeros(2)}
    error, worst = largest_error(have, want)
    assert worst == "a" and not Check("x", error, worst, 1.0).holds
    with pytest.raises(ValueError, match=r"\['b'\] on one side only"):
        largest_error({"a": want["a"]}, want)


def test_single_numbers_are_measured_together() -> None:
    """Of numbers that nearly cancel, the relative error of each says nothing."""
    want = {"blocks.0.gate": torch.tensor([1e-9]), "blocks.1.gate": torch.tensor([[2.0]])}
    have = {"blocks.0.gate": torch.tensor([2e-9]), "blocks.1.gate": torch.tensor([[1.5]])}
    assert largest_error(have, want) == (0.25, "blocks.*.gate")
    layer = {"norm.weight": torch.ones(3), "norm.bias": torch.zeros(1)}
    assert largest_error(layer | {"norm.bias": torch.ones(1)}, layer)[1] == "norm.weight"


def test_every_implementation_of_attention_holds() -> None:
    case = AttentionCase(prompts=5, batch=2, tokens=9, heads=2, head_dim=16, providers=EAGER)
    for dtype in (torch.float32, torch.bfloat16):
        checks = attention_providers.checks(case, dtype)
        assert list(checks) == list(EAGER) and all(check.holds for check in checks.values()), checks
    assert set(attention_providers.functions(case, torch.float32)) == set(EAGER)


def test_a_wrong_attention_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    case = AttentionCase(prompts=5, batch=2, tokens=9, heads=2, head_dim=16, providers=EAGER)
    right = attention_providers.IMPLEMENTATIONS[OURS]
    monkeypatch.setitem(attention_providers.IMPLEMENTATIONS, OURS, lambda t, p: right(t, p[:, 1:]))
    checks = attention_providers.checks(case, torch.float32)
    assert [name for name, check in checks.items() if not check.holds] == [OURS]


def test_both_implementations_of_the_experts_hold() -> None:
    case = ExpertCase(3, batch=2, model="test_vit")
    checks = expert_providers.checks(case, torch.float32)
    assert list(checks) == ["concat", OURS] and all(check.holds for check in checks.values())
    results = {name: run() for name, run in expert_providers.functions(case, torch.float32).items()}
    assert "blocks.1.prompt.conv.weight" in results[OURS]
    assert set(results["concat"]) == set(results[OURS])


def test_only_correct_providers_run() -> None:
    ran: list[str] = []
    checks = {name: Check(name, error, "logits", 0.1) for name, error in (("a", 0.0), ("b", 1.0))}
    outcome = time_interleaved(
        checks, {name: lambda name=name: ran.append(name) for name in checks}, 2
    )
    assert set(ran) == {"a"} and outcome["b"].times is None
    assert outcome["a"].times is not None and len(outcome["a"].times.seconds) == 2


def test_the_default_cases_cover_methods_and_sizes() -> None:
    cases = cpu_cases()
    assert len(set(cases)) == len(cases)
    steps = [case for case in cases if case.work == "step" and case.method == "vpt-deep"]
    assert {0, 10, 50, 100, 200} <= {
        case.prompts for case in steps if set(EAGER) <= set(case.providers)
    }
    kinds = {tuple(case.model.split("_")[:2]) for case in steps}
    vits = {("vit", size) for size in ("tiny", "small", "base", "large")}
    assert kinds == vits | {("swin", "tiny")}
    assert any(case.providers == PROVIDERS for case in steps)
    assert {case.dtype for case in steps} >= {"float32", "bfloat16"}
    assert {case.method for case in cases if case.work == "inference"} == {"vpt-deep", "vapt"}


@pytest.mark.parametrize(
    ("field", "value"),
    [("work", "training"), ("method", "vpt"), ("dtype", "int8"), ("providers", ("timm",))],
)
def test_cases_refuse(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match="choose one of"):
        Case(**{field: value})


@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_gradients_of_a_norm_that_a_cpu_sums_up_in_16_bits(factor: float) -> None:
    """The sums over rows are recomputed, and wrong rows stay wrong."""
    torch.manual_seed(0)
    rows, grad = torch.randn(6272, 32).bfloat16(), (0.5 + torch.randn(6272, 32)).bfloat16()
    module = torch.nn.Sequential(torch.nn.LayerNorm(32), torch.nn.Identity()).bfloat16()
    module[1].register_forward_pre_hook(lambda _, given: _scaled(given[0], factor))
    with norm_gradients(module) as resummed:
        module(rows).backward(grad)
    exact = grad.double().sum(0)
    if factor == 1.0:
        assert (module[0].bias.grad - exact).norm() > 0.25 * exact.norm()
    assert set(resummed) == {"0.weight", "0.bias"}
    found = float((resummed["0.bias"] - exact).norm() / exact.norm())
    assert found == pytest.approx(factor - 1, abs=0.01)
    normed = torch.nn.functional.layer_norm(rows.double(), (32,))
    weight = (normed * grad).sum(0)
    assert (resummed["0.weight"] - factor * weight).norm() < 0.01 * weight.norm()
    with norm_gradients(module.float()) as none:
        module(rows.float()).backward(grad.float())
    assert not none


def _scaled(out: torch.Tensor, factor: float) -> torch.Tensor:
    """Return a tensor of the same values whose gradient is scaled by `factor`."""
    return factor * out + (1 - factor) * out.detach()
