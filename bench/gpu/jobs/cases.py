"""The jobs of the GPU benchmark, most important first: there may not be time for all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from bench.compare.cases import DINOV3_BASE as DINOV3
from bench.compare.cases import INFERENCE, OTHERS, SWIN, Case
from bench.gpu.jobs.checks import kernel_cases
from bench.gpu.jobs.job import (
    CeilingsJob,
    Comparison,
    FactsJob,
    Job,
    KernelCheck,
    RunnableJob,
)
from bench.gpu.jobs.models import ModelCheck
from bench.gpu.jobs.steps import KINDS, StepCheck
from bench.providers.attention import AttentionCase
from bench.providers.bank_attention import BANK_PROVIDERS, BankAttentionCase
from bench.providers.bank_models import BankModelCase
from bench.providers.experts import PROVIDERS as EXPERT_PROVIDERS
from bench.providers.experts import ExpertCase
from bench.providers.models import (
    COMPILED,
    CUDNN,
    GPU_EAGER,
    GPU_PROVIDERS,
    OURS,
    PUBLISHED,
    WITHOUT,
)
from vpt_fast.ops.memory_modes import MEMORY_MODES

_SECONDS = {
    KernelCheck: 3.0, CeilingsJob: 8.0, FactsJob: 10.0, ExpertCase: 8.0,
    BankAttentionCase: 8.0, BankModelCase: 20.0,
}  # fmt: skip
_STEP_SECONDS, _PROVIDER_SECONDS, _COMPILE_SECONDS, _LARGE_FACTOR = 5.0, 1.5, 25.0, 2.5
C = TypeVar("C", bound=Comparison)

_UNPUBLISHED = tuple(name for name in GPU_EAGER if name != PUBLISHED)
_DEFAULT = tuple(name for name in _UNPUBLISHED if name not in CUDNN)
"""Eager providers of most steps. cuDNN's attention is preferred only where it matters most; PyTorch
may choose it anyway.
"""

_VAPT = ("concat", OURS, WITHOUT)
_FIRST_COMPILED = ("keys_concat_compiled", "concat_compiled")
DTYPES = ("bfloat16", "float16", "float32")
TINY = "test_vit"


@dataclass(frozen=True)
class Plan:
    """What is requested.

    Attributes:
        model: Model of most steps, by its timm name.
        batch: Images per step.
        prompts: Prompts per block, the most important number first.
        providers: Providers to include where a case has them.
        full: Whether other models, batch sizes, methods and inference are measured too.
        trial: Whether everything is tiny, to try the code on a CPU.
    """

    model: str = "vit_base_patch16_224"
    batch: int = 64
    prompts: tuple[int, ...] = (50, 200, 10, 100)
    providers: tuple[str, ...] = GPU_PROVIDERS
    full: bool = True
    trial: bool = False

    @property
    def step(self) -> Case:
        """Training step with the most important number of prompts."""
        return Case(
            model=self.model, batch=self.batch, prompts=self.prompts[0], dtype="bfloat16",
            image_size=32 if self.trial else 224, providers=_UNPUBLISHED,
        )  # fmt: skip


def first_jobs(plan: Plan) -> list[Job]:
    """Return one job of each kind that matters most: ceilings, the step, attention."""
    step = plan.step
    return [CeilingsJob(), *_select([step, _attention(plan, plan.prompts[0])], plan.providers)]


def correctness_jobs(plan: Plan) -> list[Job]:
    """Return the checks in addition to those of timed cases: models, steps, operators."""
    step, vit = plan.step, replace(plan.step, batch=4)
    models = [TINY] if plan.trial else ["vit_small_patch16_224", plan.model, SWIN, DINOV3]
    found: list[Job] = []
    for dtype in DTYPES:
        for model in models:
            case = replace(vit, model=model, dtype=dtype)
            found.append(ModelCheck(case))
            if model != SWIN:  # eager PyTorch has no experts for Swin to compare with
                few = min(10, plan.prompts[0])
                found.append(ModelCheck(replace(case, method="vapt", prompts=few)))
    small = replace(step, model=models[0], batch=4)
    other = replace(small, prompts=min(10, plan.prompts[0]))
    found += [ModelCheck(replace(other, method=name)) for name in OTHERS]
    found += [StepCheck(small, kind) for kind in KINDS if kind != "compile" or not plan.trial]
    names = (TINY,) if plan.trial else ("vit_tiny_patch16_224",)
    found += [
        KernelCheck(case, dtype)
        for dtype in (DTYPES[:1] if plan.trial else DTYPES)
        for case in kernel_cases(names)
    ]
    return found


def timed_jobs(plan: Plan) -> list[Job]:
    """Return the comparisons to time, in order.

    Compiled providers take longest: only the two that are compared most come before the end.
    """
    step = plan.step
    found: list[Comparison] = [
        replace(step, prompts=p, providers=_UNPUBLISHED if index < 2 else _DEFAULT)
        for index, p in enumerate(plan.prompts)
    ]
    compiled = _compiled(plan)
    if plan.full:
        found[1:1] = [replace(step, method="vapt", providers=_VAPT)]
        found[3:3] = compiled[:2]
        found += _other_models(plan)
        found += [
            replace(step, memory=mode, providers=("concat", OURS))
            for mode in MEMORY_MODES
            if mode != "speed"
        ]
        found += _rest(plan)
        compiled = compiled[2:]
    return _select([*found, *compiled], plan.providers)


def _attention(plan: Plan, prompts: int) -> AttentionCase:
    """Return attention alone, with the heads of the plan's model."""
    if plan.trial:
        return AttentionCase(prompts, plan.batch, 17, 2, 32, GPU_EAGER)
    return AttentionCase(prompts, plan.batch, heads=12, providers=GPU_EAGER)


def _other_models(plan: Plan) -> list[Comparison]:
    step = replace(plan.step, providers=_DEFAULT)
    inference = replace(step, work=INFERENCE)
    if plan.trial:
        return [inference, replace(step, dropout=0.1, providers=("concat", OURS))]
    small = replace(step, model="vit_small_patch16_224")
    swin = replace(step, model=SWIN, providers=("concat", OURS, WITHOUT))
    few = replace(step, method="vapt", prompts=min(10, plan.prompts[0]), providers=_VAPT)
    return [
        swin, few, inference, small, replace(step, batch=16), replace(swin, prompts=10),
        replace(small, batch=16),
    ]  # fmt: skip


def _rest(plan: Plan) -> list[Comparison]:
    step, many = replace(plan.step, providers=_DEFAULT), plan.prompts[0]
    if plan.trial:
        return [
            ExpertCase(many, plan.batch, plan.model),
            BankAttentionCase(many, plan.batch, 17, 2, 32),
            BankModelCase(plan.model, plan.batch, many, 32),
        ]
    return [
        _attention(plan, 200), _attention(plan, 10),
        ExpertCase(batch=plan.batch, model=plan.model),
        replace(step, prompts=0, providers=("concat", OURS, WITHOUT)),
        replace(step, providers=(PUBLISHED, OURS)),
        BankAttentionCase(many, plan.batch), BankModelCase(plan.model, plan.batch, many),
        replace(step, dropout=0.1, providers=("concat", "keys_concat", OURS)),
        replace(step, work=INFERENCE, prompts=200), replace(step, batch=1),
        replace(step, model="vit_large_patch16_224", batch=32),
        *(replace(step, method=name, providers=("concat", OURS)) for name in OTHERS),
    ]  # fmt: skip


def _compiled(plan: Plan) -> list[Comparison]:
    """Return compiled providers, each in a comparison with eager vpt_fast.

    So a compiler that hangs costs no other provider its time.
    """
    step = plan.step
    many = (*COMPILED, OURS)
    found: list[Comparison] = [replace(step, providers=(name, OURS)) for name in _FIRST_COMPILED]
    found += [
        replace(step, providers=(name, OURS)) for name in COMPILED if name not in _FIRST_COMPILED
    ]
    if plan.full and not plan.trial:
        found += [
            replace(step, prompts=200, providers=(_FIRST_COMPILED[0], OURS)),
            replace(step, prompts=200, providers=tuple(n for n in many if n != _FIRST_COMPILED[0])),
            replace(step, method="vapt", providers=("concat_compiled", OURS)),
            replace(step, work=INFERENCE, providers=many),
            ExpertCase(batch=plan.batch, model=plan.model, providers=EXPERT_PROVIDERS),
        ]
    return found


def _select(cases: Sequence[Comparison], providers: Sequence[str]) -> list[Job]:
    if OURS in providers:  # providers of single cases are only compared with ours
        providers = (*providers, *BANK_PROVIDERS)
    selected = [with_providers(case, providers) for case in cases]
    # What accompanies a compiled provider was measured before, on its own.
    return [
        case
        for case, requested in zip(selected, cases, strict=True)
        if case.providers and (case.providers != (OURS,) or requested.providers == (OURS,)
                               or not set(COMPILED) & set(requested.providers))
    ]  # fmt: skip


def with_providers(case: C, providers: Sequence[str]) -> C:
    """Return a comparison with those of its providers that are named."""
    return replace(case, providers=tuple(n for n in case.providers if n in providers))


def estimated_seconds(job: Job) -> float:
    """Return the estimated seconds of a job, which is skipped if less time is left."""
    if isinstance(job, RunnableJob):
        return job.seconds
    if isinstance(job, Case | AttentionCase):
        eager = [name for name in job.providers if name not in COMPILED]
        compiled = len(job.providers) - len(eager)
        seconds = _STEP_SECONDS + _PROVIDER_SECONDS * len(eager) + _COMPILE_SECONDS * compiled
        return seconds * (_LARGE_FACTOR if "large" in getattr(job, "model", "") else 1.0)
    return _SECONDS[type(job)]
