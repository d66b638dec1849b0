"""What the machine code of the kernels must not exceed: every limit, in one place.

All figures are static, as `bench.figures` and `bench.entry` define them, and compared as they are
printed. The limits of whole launches lie 2 to 3% above the figures of the day that they were set,
so that a kernel that gets slower is named. `bench.attention_report`, `bench.expert_report`,
`bench.heads_report`, `bench.row_report` and `bench.window_report` say which of them apply to a
launch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from vpt_fast.kernels.plan import AttentionProblem

JUDGED_TARGETS = (80, 90)
"""Architectures that the limits are for. Shared memory has to fit on every one."""

# Attention: bf16, head dimension 64.

SMALL, MANY, LARGE = (197, 10), (197, 50), (577, 50)
"""(N, p): 224 px with few and with many prompts, and 384 px, in patches of 16."""

PROBLEMS = tuple(AttentionProblem(tokens, prompts) for tokens, prompts in (SMALL, MANY, LARGE))
"""What the limits are for: bf16, head dimension 64."""

MIN_STAGES = 2
"""Stages of the software pipeline: with one, loads are not ahead of their use."""

MIN_WARPS = 8
"""Fewest resident warps of a multiprocessor: two for each scheduler."""


SPILLED = {("prompt_dkdv", 90): {SMALL: 24}}
"""Most bytes of spills, by kernel, target and (N, p), where a kernel has any."""


class LoopLimit(NamedTuple):
    """Most issue cycles per 1,048,576 MMA FLOP of loops over full tiles, and of the others."""

    full: int | None
    masked: int | None


LAUNCH_LIMITS = {
    ("forward", 80): {SMALL: 569, MANY: 560, LARGE: 382},
    ("forward", 90): {SMALL: 503, MANY: 482, LARGE: 316},
    ("ragged_forward", 80): {SMALL: 572, MANY: 562, LARGE: 383},
    ("ragged_forward", 90): {SMALL: 506, MANY: 484, LARGE: 316},
    ("dq", 80): {SMALL: 438, MANY: 432, LARGE: 291},
    ("dq", 90): {SMALL: 382, MANY: 351, LARGE: 219},
    ("token_dkdv", 80): {SMALL: 393, MANY: 393, LARGE: 268},
    ("token_dkdv", 90): {SMALL: 388, MANY: 388, LARGE: 231},
    ("shared_prompt_dkdv", 80): {SMALL: 624, MANY: 391, LARGE: 333},
    ("shared_prompt_dkdv", 90): {SMALL: 645, MANY: 313, LARGE: 250},
    ("prompt_dkdv", 80): {SMALL: 671, MANY: 465, LARGE: 365},
    ("prompt_dkdv", 90): {SMALL: 707, MANY: 382, LARGE: 267},
}
"""Most issue cycles of a whole launch per useful 1,048,576 MMA FLOP: kernel, target and (N, p)."""

LOOP_LIMITS = {
    ("dq", 80): LoopLimit(full=220, masked=250),
    ("dq", 90): LoopLimit(full=160, masked=195),
    ("token_dkdv", 80): LoopLimit(full=215, masked=250),
    ("token_dkdv", 90): LoopLimit(full=160, masked=180),
    ("shared_prompt_dkdv", 80): LoopLimit(full=260, masked=None),
    ("shared_prompt_dkdv", 90): LoopLimit(full=170, masked=None),
}
"""By kernel and target, for every problem of `PROBLEMS`."""

DELTA_LIMITS = {80: 0.334, 90: 0.347}
"""Most issue cycles of the delta kernel per memory cycle, by target, at every shape."""

# Experts: bf16.

MIX_LIMIT, MIX_PROMPTS = 0.3, 16
"""Most issue cycles of the mix's loop per memory cycle, for up to so many prompts."""

EXPERT_LIMITS = {
    ("fold", 80): {10: 1.366, 50: 1.367},
    ("fold", 90): {10: 1.501, 50: 1.501},
    ("mix", 80): {10: 0.249, 50: 0.761},
    ("mix", 90): {10: 0.255, 50: 0.414},
    ("features", 80): {10: 1.889, 50: 2.003},
    ("features", 90): {10: 1.971, 50: 2.089},
    ("features_backward", 80): {10: 2.425, 50: 2.512},
    ("features_backward", 90): {10: 2.523, 50: 2.614},
    ("weight_gradient", 80): {10: 1.71, 50: 1.316},
    ("weight_gradient", 90): {10: 1.818, 50: 1.404},
    ("mix_backward", 80): {10: 0.56, 50: 0.73},
    ("mix_backward", 90): {10: 0.55, 50: 0.754},
    ("fold_backward", 80): {10: 2.386, 50: 2.387},
    ("fold_backward", 90): {10: 1.854, 50: 1.855},
}
"""Most issue cycles of a launch per memory cycle: kernel, target and p; 64 images of 14 x 14
patches, D = 768."""

# Rows: 16-bit tensors.

WIDTHS = (192, 384, 768, 1024, 1280)
HIDDEN = (768, 1536, 3072, 4096, 5120)
"""Widths of the stream and of the hidden layer that the limits are for."""

MIN_OCCUPANCY = 0.5
"""Least part of a multiprocessor's warps that are resident: they wait for memory in turns."""

WIDE = 16
"""Bytes of the widest load and store of a lane before sm_100."""

ISSUE_LIMIT = 0.8
"""Most issue cycles of a launch per memory cycle, at every width: memory is what it waits for."""

ROW_LIMITS = {
    "norm": {80: 0.695, 90: 0.74},
    "residual_norm": {80: 0.383, 90: 0.407},
    "residual_norm_scaled": {80: 0.49, 90: 0.527},
    "residual_norm_backward": {80: 0.482, 90: 0.537},
    "residual_norm_backward_scaled": {80: 0.443, 90: 0.489},
    "activation gelu": {80: 0.63, 90: 0.667},
    "activation_backward gelu": {80: 0.491, 90: 0.519},
    "activation gelu_tanh": {80: 0.469, 90: 0.486},
    "activation_backward gelu_tanh": {80: 0.438, 90: 0.463},
    "activation quick_gelu": {80: 0.415, 90: 0.431},
    "activation_backward quick_gelu": {80: 0.384, 90: 0.408},
    "activation silu": {80: 0.388, 90: 0.403},
    "activation_backward silu": {80: 0.348, 90: 0.371},
}
"""The same by kernel and target for bf16 at D = 768 and at 3072 hidden channels."""

# Classifiers of many tasks: bf16.

HEADS_LIMITS = {80: 0.412, 90: 0.437}
"""Most issue cycles of the launch per memory cycle, by target: 64 images, each of a task of its own
with 100 classes; F = 768."""

# Windows: bf16, head dimension 32.

_SMALL_FEW, _SMALL_MANY, _LARGE_FEW = ((7, 7), 10), ((7, 7), 50), ((12, 12), 10)
"""(window, prompts): Swin-T's first stage at 224 px, Swin-B's at 384 px."""

WINDOW_LIMITS = {
    ("window_forward", 80): {_SMALL_FEW: 0.736, _SMALL_MANY: 1.022},
    ("window_forward", 90): {_SMALL_FEW: 0.767, _SMALL_MANY: 0.982},
    ("window_backward", 80): {_SMALL_FEW: 0.585, _SMALL_MANY: 0.667},
    ("window_backward", 90): {_SMALL_FEW: 0.557, _SMALL_MANY: 0.602},
    ("window_backward_dbias", 80): {_SMALL_FEW: 0.659, _SMALL_MANY: 0.534},
    ("window_backward_dbias", 90): {_SMALL_FEW: 0.682, _SMALL_MANY: 0.541},
    ("window_forward_tiled", 80): {_LARGE_FEW: 2.736},
    ("window_forward_tiled", 90): {_LARGE_FEW: 2.839},
    ("window_dq", 80): {_LARGE_FEW: 1.969},
    ("window_dq", 90): {_LARGE_FEW: 2.047},
    ("window_dkdv", 80): {_LARGE_FEW: 2.095},
    ("window_dkdv", 90): {_LARGE_FEW: 2.1},
    ("window_dbias", 80): {_LARGE_FEW: 2.107},
    ("window_dbias", 90): {_LARGE_FEW: 2.203},
}
"""Most issue cycles of a whole launch per memory cycle: kernel, target and (window, prompts)."""


@dataclass(frozen=True)
class Verdict:
    """One figure held against its limit.

    Attributes:
        figure: what is judged.
        value, limit: as they are printed.
        holds: whether the value is within the limit.
    """

    figure: str
    value: str
    limit: str
    holds: bool


def at_most(figure: str, value: float | None, limit: float, digits: int = 0) -> Verdict:
    """A figure, rounded to so many digits, held against the most that it may be.

    A figure that is not known does not hold.
    """
    asked = f"at most {limit:.{digits}f}"
    if value is None:
        return Verdict(figure, "unknown", asked, False)
    return Verdict(figure, f"{value:.{digits}f}", asked, round(value, digits) <= limit)


def resources(shared: int, shared_limit: int) -> Verdict:
    """Whether a block may have the shared memory that it asks for."""
    return Verdict("shared memory", f"{shared} B", f"{shared_limit} B", shared <= shared_limit)


def few_spills(spill_bytes: int, most: int = 0) -> Verdict:
    """Whether a kernel's values fit in registers, but for so many bytes."""
    return Verdict("spills", f"{spill_bytes} B", f"{most} B", spill_bytes <= most)
