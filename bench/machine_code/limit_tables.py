"""Limits that depend on the compiler, by version of Triton; see `bench.machine_code.limits`.

They are 2 to 3% above the figures of the day they were set, so that a kernel that becomes slower is
noticed. Triton 3.6 is the version that PyTorch 2.11 requires. Its code is worse in places: a few
registers spill, tables of position biases are loaded in narrow pieces, and divisions by constants
take more instructions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

SMALL, MANY, LARGE = (197, 10), (197, 50), (577, 50)
"""(N, p) of attention: 224 px with few and with many prompts, and 384 px, patches of 16."""

SEVEN_FEW, SEVEN_MANY, TWELVE_FEW = ((7, 7), 10), ((7, 7), 50), ((12, 12), 10)
"""(window, p): Swin-T's first stage at 224 px with few and many prompts, and Swin-B's at 384 px."""

Key = tuple[str, int]
"""(kernel, target), such as ("forward", 90)."""

Shape = tuple[int, int] | tuple[tuple[int, int], int]


class LoopLimit(NamedTuple):
    """Most issue cycles per 1,048,576 MMA FLOP of loops over full tiles, and of the others."""

    full: int | None
    masked: int | None


@dataclass(frozen=True)
class Limits:
    """Limits for one version of Triton, in bf16; most issue cycles unless noted.

    Attributes:
        launch: Whole launches of attention per useful 1,048,576 MMA FLOP, by (N, p); head
            dimension 64.
        loops: Loops of attention, at every (N, p).
        delta: The delta kernel per memory cycle, by target, at every (N, p).
        spills: Most spilled bytes of attention and windows, for kernels that have any.
        experts: Launches of VAPT's experts per memory cycle, by p; 64 images of 14 x 14 patches,
            D = 768.
        rows: Row-wise launches per memory cycle, by kernel and target; D = 768, and 3072 hidden
            channels.
        heads: Classifiers of many tasks per memory cycle, by target; 64 images, each of another
            task with 100 classes; F = 768.
        heads_occupancy: Least occupancy of those classifiers.
        windows: Launches of window attention per memory cycle, by (window, p); head dimension 32.
        narrow_products: Kernels that compute the row sums of a softmax with narrower matrix
            instructions than the architecture's own.
        amd: Whether the version compiles every kernel for gfx942.
    """

    launch: Mapping[Key, Mapping[Shape, int]]
    loops: Mapping[Key, LoopLimit]
    delta: Mapping[int, float]
    spills: Mapping[Key, Mapping[Shape, int]]
    experts: Mapping[Key, Mapping[int, float]]
    rows: Mapping[str, Mapping[int, float]]
    heads: Mapping[int, float]
    windows: Mapping[Key, Mapping[Shape, float]]
    heads_occupancy: float = 0.5
    narrow_products: frozenset[Key] = field(default_factory=frozenset)
    amd: bool = True


_TRITON_3_8 = Limits(
    launch={
        ("forward", 80): {SMALL: 569, MANY: 560, LARGE: 382},
        ("dq", 80): {SMALL: 438, MANY: 432, LARGE: 291},
        ("token_dkdv", 80): {SMALL: 393, MANY: 393, LARGE: 268},
        ("shared_prompt_dkdv", 80): {SMALL: 595, MANY: 374, LARGE: 315},
        ("prompt_dkdv", 80): {SMALL: 671, MANY: 465, LARGE: 365},
        ("ragged_forward", 80): {SMALL: 572, MANY: 562, LARGE: 383},
        ("forward", 90): {SMALL: 762, MANY: 765, LARGE: 518},
        ("dq", 90): {SMALL: 495, MANY: 485, LARGE: 306},
        ("token_dkdv", 90): {SMALL: 487, MANY: 487, LARGE: 312},
        ("shared_prompt_dkdv", 90): {SMALL: 643, MANY: 293, LARGE: 226},
        ("prompt_dkdv", 90): {SMALL: 737, MANY: 464, LARGE: 341},
        ("ragged_forward", 90): {SMALL: 774, MANY: 770, LARGE: 520},
    },
    loops={
        ("dq", 80): LoopLimit(full=220, masked=250),
        ("token_dkdv", 80): LoopLimit(full=215, masked=250),
        ("shared_prompt_dkdv", 80): LoopLimit(full=225, masked=None),
        ("dq", 90): LoopLimit(full=210, masked=239),
        ("token_dkdv", 90): LoopLimit(full=229, masked=197),
        ("shared_prompt_dkdv", 90): LoopLimit(full=145, masked=None),
    },
    delta={80: 0.334, 90: 0.347},
    spills={
        ("prompt_dkdv", 90): {SMALL: 24},
    },
    experts={
        ("fold", 80): {10: 1.366, 50: 1.367},
        ("mix", 80): {10: 0.249, 50: 0.761},
        ("features", 80): {10: 1.843, 50: 1.954},
        ("features_backward", 80): {10: 2.425, 50: 2.512},
        ("weight_gradient", 80): {10: 1.413, 50: 1.139},
        ("mix_backward", 80): {10: 0.56, 50: 0.73},
        ("fold_backward", 80): {10: 2.386, 50: 2.387},
        ("fold", 90): {10: 1.547, 50: 1.547},
        ("mix", 90): {10: 0.256, 50: 0.453},
        ("features", 90): {10: 2.311, 50: 2.45},
        ("features_backward", 90): {10: 2.96, 50: 3.066},
        ("weight_gradient", 90): {10: 1.811, 50: 1.378},
        ("mix_backward", 90): {10: 0.613, 50: 0.823},
        ("fold_backward", 90): {10: 1.854, 50: 1.855},
    },
    rows={
        "norm": {80: 0.695, 90: 0.74},
        "residual_norm": {80: 0.383, 90: 0.407},
        "residual_norm_scaled": {80: 0.5, 90: 0.527},
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
        "gated gelu": {80: 0.519, 90: 0.548},
        "gated_backward gelu": {80: 0.387, 90: 0.407},
        "gated silu": {80: 0.358, 90: 0.372},
        "gated_backward silu": {80: 0.296, 90: 0.307},
        "rotation half": {80: 0.172, 90: 0.178},
        "rotation interleaved": {80: 0.176, 90: 0.182},
        "rotation_inverse half": {80: 0.172, 90: 0.178},
        "rotation_inverse interleaved": {80: 0.176, 90: 0.182},
        "rotation_per_head interleaved": {80: 0.203, 90: 0.21},
    },
    heads={80: 0.412, 90: 0.437},
    windows={
        ("window_forward", 80): {SEVEN_FEW: 0.736, SEVEN_MANY: 1.022},
        ("window_backward", 80): {SEVEN_FEW: 0.585, SEVEN_MANY: 0.667},
        ("window_backward_dbias", 80): {SEVEN_FEW: 0.659, SEVEN_MANY: 0.534},
        ("window_forward_tiled", 80): {TWELVE_FEW: 2.736},
        ("window_dq", 80): {TWELVE_FEW: 1.969},
        ("window_dkdv", 80): {TWELVE_FEW: 2.095},
        ("window_dbias", 80): {TWELVE_FEW: 2.107},
        ("window_forward", 90): {SEVEN_FEW: 0.793, SEVEN_MANY: 1.011},
        ("window_backward", 90): {SEVEN_FEW: 0.584, SEVEN_MANY: 0.626},
        ("window_backward_dbias", 90): {SEVEN_FEW: 0.697, SEVEN_MANY: 0.574},
        ("window_forward_tiled", 90): {TWELVE_FEW: 2.839},
        ("window_dq", 90): {TWELVE_FEW: 2.047},
        ("window_dkdv", 90): {TWELVE_FEW: 2.1},
        ("window_dbias", 90): {TWELVE_FEW: 2.203},
    },
)

_TRITON_3_6 = Limits(
    launch={
        ("forward", 80): {SMALL: 572, MANY: 562, LARGE: 383},
        ("dq", 80): {SMALL: 436, MANY: 430, LARGE: 292},
        ("token_dkdv", 80): {SMALL: 420, MANY: 420, LARGE: 288},
        ("shared_prompt_dkdv", 80): {SMALL: 576, MANY: 390, LARGE: 320},
        ("prompt_dkdv", 80): {SMALL: 684, MANY: 499, LARGE: 391},
        ("ragged_forward", 80): {SMALL: 575, MANY: 566, LARGE: 385},
        ("forward", 90): {SMALL: 737, MANY: 738, LARGE: 501},
        ("dq", 90): {SMALL: 483, MANY: 473, LARGE: 297},
        ("token_dkdv", 90): {SMALL: 541, MANY: 541, LARGE: 343},
        ("shared_prompt_dkdv", 90): {SMALL: 621, MANY: 311, LARGE: 230},
        ("prompt_dkdv", 90): {SMALL: 770, MANY: 504, LARGE: 372},
        ("ragged_forward", 90): {SMALL: 743, MANY: 739, LARGE: 500},
    },
    loops={
        ("dq", 80): LoopLimit(full=220, masked=250),
        ("token_dkdv", 80): LoopLimit(full=225, masked=250),
        ("shared_prompt_dkdv", 80): LoopLimit(full=225, masked=None),
        ("dq", 90): LoopLimit(full=202, masked=239),
        ("token_dkdv", 90): LoopLimit(full=250, masked=237),
        ("shared_prompt_dkdv", 90): LoopLimit(full=145, masked=None),
    },
    delta={80: 0.3, 90: 0.329},
    spills={
        ("window_backward", 80): {SEVEN_MANY: 8},
        ("dq", 90): {SMALL: 8, MANY: 24, LARGE: 24},
        ("prompt_dkdv", 90): {SMALL: 16},
    },
    experts={
        ("fold", 80): {10: 1.608, 50: 1.609},
        ("mix", 80): {10: 0.248, 50: 0.75},
        ("features", 80): {10: 1.779, 50: 1.886},
        ("features_backward", 80): {10: 2.352, 50: 2.436},
        ("weight_gradient", 80): {10: 1.331, 50: 1.081},
        ("mix_backward", 80): {10: 0.555, 50: 0.689},
        ("fold_backward", 80): {10: 2.461, 50: 2.462},
        ("fold", 90): {10: 1.751, 50: 1.752},
        ("mix", 90): {10: 0.26, 50: 0.451},
        ("features", 90): {10: 2.511, 50: 2.662},
        ("features_backward", 90): {10: 3.227, 50: 3.343},
        ("weight_gradient", 90): {10: 1.809, 50: 1.362},
        ("mix_backward", 90): {10: 0.617, 50: 0.771},
        ("fold_backward", 90): {10: 2.003, 50: 2.004},
    },
    rows={
        "norm": {80: 0.731, 90: 0.777},
        "residual_norm": {80: 0.402, 90: 0.426},
        "residual_norm_scaled": {80: 0.518, 90: 0.546},
        "residual_norm_backward": {80: 0.5, 90: 0.556},
        "residual_norm_backward_scaled": {80: 0.457, 90: 0.504},
        "activation gelu": {80: 0.63, 90: 0.668},
        "activation_backward gelu": {80: 0.492, 90: 0.519},
        "activation gelu_tanh": {80: 0.469, 90: 0.487},
        "activation_backward gelu_tanh": {80: 0.447, 90: 0.464},
        "activation quick_gelu": {80: 0.416, 90: 0.431},
        "activation_backward quick_gelu": {80: 0.393, 90: 0.408},
        "activation silu": {80: 0.389, 90: 0.403},
        "activation_backward silu": {80: 0.358, 90: 0.371},
        "gated gelu": {80: 0.519, 90: 0.548},
        "gated_backward gelu": {80: 0.387, 90: 0.407},
        "gated silu": {80: 0.358, 90: 0.372},
        "gated_backward silu": {80: 0.296, 90: 0.307},
        "rotation half": {80: 0.172, 90: 0.178},
        "rotation interleaved": {80: 0.176, 90: 0.182},
        "rotation_inverse half": {80: 0.172, 90: 0.178},
        "rotation_inverse interleaved": {80: 0.176, 90: 0.182},
        "rotation_per_head interleaved": {80: 0.203, 90: 0.21},
    },
    heads={80: 0.413, 90: 0.438},
    windows={
        ("window_forward", 80): {SEVEN_FEW: 0.752, SEVEN_MANY: 1.15},
        ("window_backward", 80): {SEVEN_FEW: 0.598, SEVEN_MANY: 0.695},
        ("window_backward_dbias", 80): {SEVEN_FEW: 0.65, SEVEN_MANY: 0.531},
        ("window_forward_tiled", 80): {TWELVE_FEW: 3.708},
        ("window_dq", 80): {TWELVE_FEW: 2.348},
        ("window_dkdv", 80): {TWELVE_FEW: 2.205},
        ("window_dbias", 80): {TWELVE_FEW: 2.143},
        ("window_forward", 90): {SEVEN_FEW: 0.79, SEVEN_MANY: 1.155},
        ("window_backward", 90): {SEVEN_FEW: 0.597, SEVEN_MANY: 0.635},
        ("window_backward_dbias", 90): {SEVEN_FEW: 0.689, SEVEN_MANY: 0.574},
        ("window_forward_tiled", 90): {TWELVE_FEW: 3.797},
        ("window_dq", 90): {TWELVE_FEW: 2.378},
        ("window_dkdv", 90): {TWELVE_FEW: 2.213},
        ("window_dbias", 90): {TWELVE_FEW: 2.238},
    },
    heads_occupancy=0.375,
    amd=False,
    narrow_products=frozenset({("forward", 90), ("ragged_forward", 90)}),
)

LIMITS = {"3.8": _TRITON_3_8, "3.6": _TRITON_3_6}
"""Limits by major and minor version of Triton."""
