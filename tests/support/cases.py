"""Cases of edited models: one edit of every module and attribute that forward reads.

A case is a family, a method, a memory mode, an edit, and whether the edit comes before or after
tuning. The expected result is the plain formulation's with the same edit.
"""

from __future__ import annotations

import linecache
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from support.changes_of_parts import Change, changes_of
from support.formulations import families, plain_swin
from support.formulations.plain import Plain, redraw_prompts
from support.formulations.plain_baselines import PlainBaseline, redraw_added
from support.formulations.plain_vapt import PlainVAPT
from vpt_fast import (
    VAPT,
    AdapterTuning,
    BiasTuning,
    FullTuning,
    LinearProbe,
    MLPHead,
    PartialTuning,
    VPTDeep,
    VPTShallow,
    prompt_tune,
)
from vpt_fast.methods.baselines import Baseline
from vpt_fast.ops.memory_modes import MEMORY_MODES

SWIN = "tiny"
VITS = (
    "vit", "deit_distilled", "deit3", "mae", "clip", "dinov2", "dinov2_swiglu", "dinov2_registers",
    "siglip_map", "siglip_average", "qk_norm", "qk_norm_rms", "max_pool", "token_fc_norm",
    "average_with_prefix", "no_bias",
)  # fmt: skip
SIZES: dict[str, Any] = {"embed_dim": 16, "num_heads": 2, "depth": 2}
METHODS: dict[str, Any] = {
    "deep": VPTDeep(2), "shallow": VPTShallow(2), "vapt": VAPT(2), "linear": LinearProbe(),
    "first": VPTDeep(2, blocks=[0]), "adapter": AdapterTuning(4), "bias": BiasTuning(),
    "partial": PartialTuning(1), "mlp": MLPHead(2), "full": FullTuning(),
}  # fmt: skip
_OFF = {"projector_dropout": 0.0, "channel_dropout": 0.0}


def build(family: str) -> Any:
    """Return a new tiny model with the same weights at every call."""
    if family == SWIN:
        return plain_swin.build(SWIN)
    return families.build(family, **SIZES)


def images(family: str) -> Tensor:
    """Return images of the size that the family's model takes."""
    return plain_swin.images(SWIN) if family == SWIN else families.images(family)


class PlainTimm:
    """timm's own model, which trains the same parameters as the tuned one."""

    def __init__(self, model: Any, method: Any, state: dict[str, Tensor], names: set[str]) -> None:
        self.model, self.trained = model.eval(), {}
        model.load_state_dict(state, strict=False)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names)

    def __call__(self, x: Tensor) -> Any:
        return self.model(x)


def truth(family: str, method: Any, base: Any, tuned: Any) -> Any:
    """Return the plain formulation of a tuned model, around a model of the same weights."""
    state = tuned.state_dict()
    if isinstance(method, Baseline):
        if isinstance(method, AdapterTuning | MLPHead):
            return PlainBaseline(base, method, state)
        names = {n for n, p in tuned.named_parameters() if p.requires_grad}
        return PlainTimm(base, method, state, names)
    if family == SWIN:
        return plain_swin.PlainSwin(base, method, state)
    return (PlainVAPT if isinstance(method, VAPT) else Plain)(base, method, state)


@dataclass(frozen=True)
class Case:
    """One case; its `str` names it."""

    family: str
    method: str
    memory: str
    when: str
    change: Change

    def __str__(self) -> str:
        parts = (self.family, self.method, self.memory, self.when, self.change.name)
        return "-".join(parts).replace(" ", "_")


def all_cases() -> list[Case]:
    """Return every edit of every family; methods, memory modes and times of the edit alternate."""
    found = []
    for number, family in enumerate((*VITS, SWIN)):
        missing = {SWIN: ("adapter", "mlp"), "deit_distilled": ("mlp",)}.get(family, ())
        methods = [m for m in METHODS if m not in missing]
        combined = [
            (m, memory, when)
            for memory in MEMORY_MODES for m in methods for when in ("after", "before")
        ]  # fmt: skip
        for index, change in enumerate(changes_of(build(family))):
            step = combined[(index * 7 + number * 5) % len(combined)]
            found.append(Case(family, *step, change))
    return found


def method_of(case: Case) -> Any:
    """Return the case's method, without dropout."""
    return VAPT(2, **_OFF) if case.method == "vapt" else METHODS[case.method]


def is_ours(error: BaseException) -> bool:
    """Return whether a `raise` statement of the library raised an error."""
    if not isinstance(error, ValueError | TypeError | RuntimeError):
        return False
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    name = trace.tb_frame.f_code.co_filename
    line = linecache.getline(name, trace.tb_lineno).strip()
    return "vpt_fast" in name and line.startswith("raise")


def tuned_and_plain(case: Case, counts: tuple[list[str], list[str]]) -> tuple[Any, Any]:
    """Return the tuned and the plain model, both edited; errors of `prompt_tune` propagate."""
    method, one, other = method_of(case), build(case.family), build(case.family)
    if case.when == "before":
        torch.manual_seed(2)
        case.change.make(one, counts[0])
        torch.manual_seed(2)
        (case.change.plain or case.change.make)(other, counts[1])
    tuned = prompt_tune(one, method, case.memory)
    redraw_prompts(tuned), redraw_added(tuned)
    tuned.eval()
    plain = truth(case.family, method, other, tuned)
    if case.when == "after":
        tuned(images(case.family)), plain(images(case.family))
        torch.manual_seed(2)
        case.change.make(tuned, counts[0])
        torch.manual_seed(2)
        (case.change.plain or case.change.make)(plain.model, counts[1])
        if hasattr(plain, "blocks"):
            plain.blocks = [i for i in plain.blocks if i < len(plain.model.blocks)]
    return tuned, plain
