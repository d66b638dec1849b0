"""What the GPU benchmark measures, what matters most first: time may not last for all of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from bench.compare.cases import INFERENCE, SWIN, Case
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
"""cuDNN's attention is put first where most depends on it; PyTorch may take it by itself."""

_VAPT = ("concat", OURS, WITHOUT)
_FIRST_COMPILED = ("keys_concat_compiled", "concat_compiled")
DTYPES = ("bfloat16", "float16", "float32")
TINY = "test_vit"


@dataclass(frozen=True)
class Plan:
    """What is asked for.

    Attributes:
        model: timm's name, of most steps.
        batch: images of them.
        prompts: of their blocks, the most important number first.
        providers: who takes part where a case has them.
        full: whether other models, batch sizes, methods and inference are measured too.
        trial: whether everything is tiny, to show on a CPU that it runs.
    """

    model: str = "vit_base_patch16_224"
    batch: int = 64
    prompts: tuple[int, ...] = (50, 200, 10, 100)
    providers: tuple[str, ...] = GPU_PROVIDERS
    full: bool = True
    trial: bool = False

    @property
    def step(self) -> Case:
        """A training step with the most important number of prompts."""
        return Case(
            model=self.model, batch=self.batch, prompts=self.prompts[0], dtype="bfloat16",
            image_size=32 if self.trial else 224, providers=_UNPUBLISHED,
        )  # fmt: skip


def first_jobs(plan: Plan) -> list[Job]:
    """One number of each kind, before anything else may fail: ceilings, the step, attention."""
    step = plan.step
    return [CeilingsJob(), *_chosen([step, _attention(plan, plan.prompts[0])], plan.providers)]


def correctness_jobs(plan: Plan) -> list[Job]:
    """What is checked on the device besides what is timed: models, steps, operators."""
    step, vit = plan.step, replace(plan.step, batch=4)
    models = [TINY] if plan.trial else ["vit_small_patch16_224", plan.model, SWIN]
    found: list[Job] = []
    for dtype in DTYPES:
        for model in models:
            case = replace(vit, model=model, dtype=dtype)
            found.append(ModelCheck(case))
            if model != SWIN:  # eager PyTorch has no such experts to hold them against
                few = min(10, plan.prompts[0])
                found.append(ModelCheck(replace(case, method="vapt", prompts=few)))
    small = replace(step, model=models[0], batch=4)
    found += [StepCheck(small, kind) for kind in KINDS if kind != "compile" or not plan.trial]
    names = (TINY,) if plan.trial else ("vit_tiny_patch16_224",)
    found += [
        KernelCheck(case, dtype)
        for dtype in (DTYPES[:1] if plan.trial else DTYPES)
        for case in kernel_cases(names)
    ]
    return found


def timed_jobs(plan: Plan) -> list[Job]:
    """What is timed, in order; of the compiled providers, which take longest, only the two that
    are compared most come before the end.
    """
    step = plan.step
    found: list[Comparison] = [
        replace(step, prompts=p, providers=_UNPUBLISHED if place < 2 else _DEFAULT)
        for place, p in enumerate(plan.prompts)
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
    return _chosen([*found, *compiled], plan.providers)


def _attention(plan: Plan, prompts: int) -> AttentionCase:
    """Attention alone, with the heads of the plan's model."""
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
    ]  # fmt: skip


def _compiled(plan: Plan) -> list[Comparison]:
    """Each beside ours, in eager PyTorch: what one of them hangs in costs no other its time."""
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


def _chosen(cases: Sequence[Comparison], providers: Sequence[str]) -> list[Job]:
    if OURS in providers:  # names that only some cases have are there to be set beside ours
        providers = (*providers, *BANK_PROVIDERS)
    kept = [only(case, providers) for case in cases]
    # A compiled provider's companion alone was measured before.
    return [
        case
        for case, asked in zip(kept, cases, strict=True)
        if case.providers and (case.providers != (OURS,) or asked.providers == (OURS,)
                               or not set(COMPILED) & set(asked.providers))
    ]  # fmt: skip


def only(case: C, providers: Sequence[str]) -> C:
    """A comparison of those of its providers that are named."""
    return replace(case, providers=tuple(n for n in case.providers if n in providers))


def estimated_seconds(job: Job) -> float:
    """How long a job may take; it is skipped where less is left. A guess, not measured."""
    if isinstance(job, RunnableJob):
        return job.seconds
    if isinstance(job, Case | AttentionCase):
        eager = [name for name in job.providers if name not in COMPILED]
        compiled = len(job.providers) - len(eager)
        seconds = _STEP_SECONDS + _PROVIDER_SECONDS * len(eager) + _COMPILE_SECONDS * compiled
        return seconds * (_LARGE_FACTOR if "large" in getattr(job, "model", "") else 1.0)
    return _SECONDS[type(job)]
