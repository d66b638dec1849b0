"""What the GPU benchmark measures, what matters most first: time may not last for all of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from bench.attention_ways import AttentionCase
from bench.bank_model_ways import BankModelCase
from bench.bank_ways import OWN_NAMES, BankAttentionCase
from bench.cases import INFERENCE, Case
from bench.expert_ways import PROVIDERS as EXPERT_PROVIDERS
from bench.expert_ways import ExpertCase
from bench.gpu_checks import kernel_cases
from bench.gpu_measure import CeilingsWanted, Comparison, KernelCheck, Subject
from bench.providers import COMPILED, EAGER, OURS, PROVIDERS, WITHOUT

COMPILED_PROMPTS = 50
"""The number of prompts at which compiled providers join: compiling takes longest of all."""

_SECONDS = {
    KernelCheck: 10.0, CeilingsWanted: 20.0, AttentionCase: 12.0, ExpertCase: 15.0,
    BankAttentionCase: 12.0, BankModelCase: 40.0,
}  # fmt: skip
_STEP_SECONDS, _COMPILE_SECONDS, _LARGE_SECONDS = 20.0, 50.0, 40.0
C = TypeVar("C", bound=Comparison)


@dataclass(frozen=True)
class Plan:
    """What is asked for.

    Attributes:
        model: timm's name, of most steps.
        batch: images of them.
        prompts: of their blocks, the most important number first.
        providers: who takes part where a case has them.
        full: whether other models, batch sizes, methods and inference are measured too.
    """

    model: str = "vit_base_patch16_224"
    batch: int = 64
    prompts: tuple[int, ...] = (COMPILED_PROMPTS, 10, 100, 200, 0)
    providers: tuple[str, ...] = PROVIDERS
    full: bool = True


def gpu_subjects(plan: Plan) -> list[Subject]:
    """What a GPU measures, in order."""
    step = Case(
        model=plan.model, batch=plan.batch, prompts=plan.prompts[0], dtype="bfloat16",
        providers=EAGER,
    )  # fmt: skip
    heads = AttentionCase(batch=plan.batch, heads=12, providers=EAGER)
    experts = ExpertCase(batch=plan.batch, model=plan.model)
    vapt = replace(step, method="vapt")
    many = plan.prompts[0] or COMPILED_PROMPTS
    found: list[Comparison] = [
        *(
            replace(step, prompts=p, providers=PROVIDERS if p == COMPILED_PROMPTS else EAGER)
            for p in plan.prompts
        ),
        replace(heads, prompts=plan.prompts[0]),
        vapt,
    ]
    if plan.full:
        inference = replace(step, work=INFERENCE)
        three = ("concat", "keys_concat", OURS, WITHOUT)
        found += [
            inference,
            experts,
            BankAttentionCase(many, plan.batch),
            BankModelCase(plan.model, plan.batch, many),
            replace(step, dropout=0.1, providers=three),
            *(replace(step, batch=b) for b in (1, 16)),
            replace(step, model="vit_small_patch16_224"),
            replace(step, model="vit_tiny_patch16_224"),
            replace(step, model="vit_large_patch16_224", batch=32),
            *(replace(vapt, prompts=p) for p in (10, 100)),
            *(replace(heads, prompts=p) for p in (10, 200)),
            replace(inference, prompts=200),
            replace(step, batch=128),
            replace(experts, providers=EXPERT_PROVIDERS),
            replace(vapt, providers=("concat_compiled", OURS)),
            replace(inference, providers=("concat_compiled", "keys_concat_compiled", OURS)),
        ]
    checks = [KernelCheck(case) for case in kernel_cases()]
    return [CeilingsWanted(), *checks, *_chosen(found, plan.providers)]


def trial_subjects(plan: Plan) -> list[Subject]:
    """What a CPU runs, to show that everything does: a tiny model, in order."""
    step = Case(
        model=plan.model, batch=plan.batch, prompts=plan.prompts[0], dtype="bfloat16",
        image_size=32, providers=PROVIDERS,
    )  # fmt: skip
    found: list[Comparison] = [replace(step, prompts=p) for p in plan.prompts]
    found.append(AttentionCase(plan.prompts[0], plan.batch, 17, 2, 32))
    if plan.full:
        found += [
            replace(step, method="vapt"),
            replace(step, work=INFERENCE),
            replace(step, dropout=0.1),
            ExpertCase(plan.prompts[0], plan.batch, plan.model, EXPERT_PROVIDERS),
            BankAttentionCase(plan.prompts[0], plan.batch, 17, 2, 32),
            BankModelCase(plan.model, plan.batch, plan.prompts[0], 32),
        ]
    checks = [KernelCheck(case) for case in kernel_cases(["test_vit"])]
    return [CeilingsWanted(), *checks, *_chosen(found, plan.providers)]


def _chosen(cases: Sequence[Comparison], providers: Sequence[str]) -> list[Comparison]:
    if OURS in providers:  # names that only some cases have are there to be set beside ours
        providers = (*providers, *OWN_NAMES)
    kept = [only(case, providers) for case in cases]
    return [case for case in kept if case.providers]


def only(case: C, providers: Sequence[str]) -> C:
    """A comparison of those of its providers that are named."""
    return replace(case, providers=tuple(n for n in case.providers if n in providers))


def guessed_seconds(subject: Subject) -> float:
    """How long a subject may take; it is skipped where less is left. A guess, not measured."""
    if not isinstance(subject, Case):
        return _SECONDS[type(subject)]
    seconds = _LARGE_SECONDS if "large" in subject.model else _STEP_SECONDS
    return seconds + _COMPILE_SECONDS * len(set(COMPILED).intersection(subject.providers))
