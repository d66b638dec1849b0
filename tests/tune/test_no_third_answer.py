"""A change of a model has its effect on the tuned one, or is refused by name.

In every case logits and all gradients equal those of the plain formulation with the same change, or
the library raises an error of its own; there is no third answer.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.cases import METHODS, SWIN, VITS, Case, all_cases, images, is_ours, tuned_and_plain
from torch import Tensor

from vpt_fast.ops.memory_modes import MEMORY_MODES

CASES = all_cases()
EVERY = 47
"""One of so many cases runs by default."""

PARTS = 32


def losses(output: Any) -> Tensor:
    parts = output if isinstance(output, tuple) else (output,)
    generator = torch.Generator().manual_seed(11)
    weights = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parts]
    return sum(((w * p.double().tanh()).sum() for w, p in zip(weights, parts, strict=True)))


def answers(call: Any, model: Any, x: Tensor, more: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the logits and the gradients of all that is trained, by name."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    trained |= {name: value for name, value in more.items() if value.requires_grad}
    output = call(x)
    parts = output if isinstance(output, tuple) else (output,)
    found = {f"output {i}": part.detach() for i, part in enumerate(parts)}
    if trained and losses(output).requires_grad:
        grads = torch.autograd.grad(losses(output), [*trained.values()], allow_unused=True)
        found |= {
            name: torch.zeros_like(p) if g is None else g
            for (name, p), g in zip(trained.items(), grads, strict=True)
        }
    return found


def assert_equal(found: dict[str, Tensor], right: dict[str, Tensor], rounded: bool) -> None:
    assert set(found) == set(right)
    largest = max(float(value.abs().max()) for value in right.values())
    for name, value in right.items():
        assert found[name].shape == value.shape, name
        scale = max(float(value.abs().max()), 1e-3 * largest)
        off = float((found[name].double() - value.double()).abs().max()) / scale
        bound = 1e-5 if rounded else 1e-9
        assert off <= bound, f"{name} is off by {off:.1e}"


def outcome(case: Case) -> str:
    """Return "equal", or the refusal of a case; fail for any other outcome."""
    x, counts = images(case.family), ([], [])
    try:
        tuned, plain = tuned_and_plain(case, counts)
    except Exception as error:
        if case.when == "before" and is_ours(error):
            return str(error)
        raise
    del counts[0][:], counts[1][:]
    there = dict(tuned.named_parameters())  # without those of removed blocks
    own = {n: p for n, p in plain.trained.items() if n in there and n.partition(".")[0] != "head"}
    try:
        right = answers(plain, plain.model, x, own)
    except Exception as broken:  # timm's model cannot do it either
        with pytest.raises((ValueError, TypeError, RuntimeError, AttributeError)):
            answers(tuned, tuned, x, {})
        return f"broken: {broken}"
    calls = len(counts[1])
    try:
        output = tuned(x)
    except Exception as error:
        if is_ours(error):
            return str(error)
        if case.change.plain is not None and isinstance(error, RuntimeError):
            return f"broken: {error}"  # timm's model refuses mixed dtypes too
        raise
    if case.family != SWIN:  # the plain form calls a module for tokens and prompts separately
        assert len(counts[0]) == calls, f"hooks ran {len(counts[0])} times, not {calls}"
    del output
    assert_equal(answers(tuned, tuned, x, {}), right, rounded=case.change.plain is not None)
    return "equal"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES[::EVERY], ids=str)
def test_case(case: Case) -> None:
    outcome(case)


@pytest.mark.full
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", range(PARTS))
def test_every_case(part: int) -> None:
    """In parts, each of which reports all its failures: collecting so many tests would be slow."""
    failed = []
    for case in CASES[part::PARTS]:
        try:
            outcome(case)
        except Exception as error:
            failed.append(f"{case}: {type(error).__name__}: {str(error)[:200]}")
    assert not failed, "\n".join(failed)


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 10_000 and len({*map(str, CASES)}) == len(CASES)
    for chosen in (CASES, CASES[::EVERY]):
        assert {case.method for case in chosen} == {*METHODS}
        assert {case.family for case in chosen} == {*VITS, SWIN}
        assert {(case.memory, case.when) for case in chosen} == {
            (memory, when) for memory in MEMORY_MODES for when in ("before", "after")
        }
