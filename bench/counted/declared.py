"""Declarations of what each kernel loads and stores, and the FLOP of its matrix products.

A launch passes some tensors that it does not access (a tensor stands in for an absent optional
one), and accesses only parts of others. The declarations below follow each kernel's source. Every
byte counts once, however many programs load it: repeated loads are served by caches. The
declarations are compared with what the kernels load and store when their IR is executed on the CPU
(tests/bench/counted/test_declared_traffic.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from bench.counted import bank_traffic, window_traffic
from bench.machine_code.problems.attention import AttentionProblem, useful_flop
from vpt_fast.kernels.runtime.launch import Launch

Part = Callable[[Launch, Tensor], Tensor]


class Touched(NamedTuple):
    """Views of the tensors that a launch loads from and stores to."""

    loads: list[Tensor]
    stores: list[Tensor]


@dataclass(frozen=True)
class Parameter:
    """One pointer of a kernel.

    Attributes:
        name: Name without "_ptr".
        needs: Constexprs that must all be true for the kernel to access it.
        part: Returns the part of the tensor that is accessed; all of it by default.
    """

    name: str
    needs: tuple[str, ...] = ()
    part: Part | None = None

    def of(self, launch: Launch) -> Tensor | None:
        """Return the view that `launch` accesses, or None."""
        if not all(launch.constexprs[flag] for flag in self.needs):
            return None
        tensor = launch.arguments[f"{self.name}_ptr"]
        return tensor if self.part is None else self.part(launch, tensor)


class Declaration(NamedTuple):
    """Parameters that a kernel loads, and those that it stores."""

    loads: tuple[Parameter, ...]
    stores: tuple[Parameter, ...]


def _parameters(names: str) -> tuple[Parameter, ...]:
    """Return parameters by name; `name?` is accessed if the launch's HAS_NAME is set."""
    found = []
    for word in names.split():
        name = word.rstrip("?")
        found.append(Parameter(name, (f"HAS_{name.upper()}",) if word != name else ()))
    return tuple(found)


def _patch_columns(launch: Launch, matrix: Tensor) -> Tensor:
    """Return the patches' columns of a matrix (p, padded), with the last tile's padding."""
    patches, step = launch.arguments["num_patches"], launch.constexprs["BLOCK_T"]
    left = patches % step
    return matrix[:, : patches - left + (launch.constexprs["BLOCK_TAIL"] if left else 0)]


def _patches(launch: Launch, matrix: Tensor) -> Tensor:
    return matrix[:, : launch.arguments["num_patches"]]


def _grid(launch: Launch, matrix: Tensor) -> Tensor:
    """Return the columns of a matrix (p, padded) that are patches of the grid."""
    outer = [launch.constexprs[f"INNER_{n}"] + launch.constexprs["SIZE"] - 1 for n in _AXES]
    return matrix[:, : math.prod(outer)]


_AXES = ("ROWS", "COLUMNS")


def _patch_rows(launch: Launch, x: Tensor) -> Tensor:
    return x[:, x.shape[1] - launch.arguments["num_patches"] :]


def _patch_statistics(launch: Launch, statistics: Tensor) -> Tensor:
    """Return the patches' mean and experts' rstd; norm1's rstd, between them, is not read."""
    return statistics[::2, :, statistics.shape[2] - launch.arguments["num_patches"] :]


def _mix_backward_statistics(launch: Launch, statistics: Tensor) -> Tensor:
    """Return the statistics read; norm1's rstd is needed only for the gradient of x."""
    return statistics if launch.constexprs["NEEDS_X"] else statistics[::2]


def _rotated(launch: Launch, heads: Tensor) -> Tensor:
    return heads[:, launch.arguments["first"] :, : launch.constexprs["PARTS"]]


_GATE_BIASES = tuple(Parameter(f"{half}_bias", ("HAS_BIAS",)) for half in ("gate", "value"))
_PROMPTS = tuple(Parameter(name, ("HAS_PROMPTS",)) for name in ("prompt_k", "prompt_v"))
_KEY_GRADIENTS = Declaration(_parameters("q k v grad_out lse delta"), _parameters("dk dv"))
_WINDOW_PROMPTS = Parameter("prompts", ("HAS_PROMPTS",))
_WINDOW_PADDING = Parameter("pad", ("PADDED", "HAS_PAD"), window_traffic.keys_and_values)
_WINDOWS_FORWARD = Declaration(
    (*_parameters("qkv table"), _WINDOW_PADDING, _WINDOW_PROMPTS), _parameters("out lse")
)
_WINDOWS_BACKWARD = Declaration(
    (
        Parameter("qkv", part=window_traffic.queries),
        Parameter("qkv", part=window_traffic.kv_of_whole_windows),
        Parameter("table", part=window_traffic.table_of_whole_windows),
        Parameter("pad", ("PADDED", "HAS_PAD"), window_traffic.padding_of_whole_windows),
        Parameter("prompts", ("HAS_PROMPTS",), window_traffic.prompts_of_whole_windows),
        Parameter("out", ("BLOCK_P",)),
        *_parameters("grad_out lse"),
    ),
    (
        Parameter("grad_qkv", ("NEEDS_TOKENS",)),
        Parameter("grad_prompts", ("NEEDS_PROMPTS",)),
        Parameter("grad_scores", ("NEEDS_TABLE",)),
    ),
)
_WINDOWS_KEYS = (
    Parameter("qkv", part=window_traffic.queries),
    Parameter("qkv", part=window_traffic.kv_of_tiles),
    Parameter("table", part=window_traffic.table_of_tiles),
    Parameter("pad", ("PADDED", "HAS_PAD"), window_traffic.padding_of_tiles),
    Parameter("prompts", ("HAS_PROMPTS",), window_traffic.prompts_of_tiles),
    *_parameters("grad_out lse delta"),
)
_FEATURES = "mixing mixing_sum norm_weight norm_bias projector_bias? channel_mask? down up"

DECLARATIONS = {
    "forward": Declaration((*_parameters("q k v"), *_PROMPTS), _parameters("out lse")),
    "ragged_forward": Declaration(
        (
            *_parameters("q k v row_offsets counts"),
            *(Parameter(f"prompt_{part}", part=bank_traffic.cached_prompts) for part in "kv"),
            *(Parameter(f"computed_{part}", part=bank_traffic.computed_prompts) for part in "kv"),
        ),
        _parameters("out lse"),
    ),
    "grouped_heads": Declaration(
        (
            *_parameters("row_offsets counts logit_offsets"),
            Parameter("features", part=bank_traffic.head_features),
            Parameter("weight", part=bank_traffic.head_rows),
            Parameter("bias", part=bank_traffic.head_rows),
        ),
        _parameters("out"),
    ),
    "dq": Declaration((*_parameters("q k v out grad_out lse"), *_PROMPTS), _parameters("delta dq")),
    "delta": Declaration(_parameters("out grad_out"), _parameters("delta")),
    "token_dkdv": _KEY_GRADIENTS,
    "prompt_dkdv": _KEY_GRADIENTS,
    "shared_prompt_dkdv": _KEY_GRADIENTS,
    "window_forward": _WINDOWS_FORWARD,
    "window_forward_tiled": _WINDOWS_FORWARD,
    "window_backward": _WINDOWS_BACKWARD,
    "window_backward_dbias": _WINDOWS_BACKWARD,
    "window_dq": Declaration(
        (*_parameters("qkv table out grad_out lse"), _WINDOW_PADDING, _WINDOW_PROMPTS),
        (*_parameters("delta"), Parameter("grad_qkv", part=window_traffic.queries)),
    ),
    "window_delta": Declaration(_parameters("out grad_out"), _parameters("delta")),
    "window_dkdv": Declaration(
        _WINDOWS_KEYS,
        (
            Parameter("grad_qkv", ("NEEDS_TOKENS",), window_traffic.keys_and_values),
            Parameter("grad_prompts", ("NEEDS_PROMPTS",)),
        ),
    ),
    "window_dbias": Declaration(_WINDOWS_KEYS, _parameters("grad_scores")),
    "fold": Declaration(_parameters("weight kernel"), _parameters("mixing_weight mixing_sum")),
    "fold_backward": Declaration(
        (
            *_parameters("weight kernel grad_mixing_sum"),
            Parameter("grad_mixing_weight", part=_grid),
        ),
        _parameters("grad_weight grad_kernel"),
    ),
    "mix": Declaration(
        (
            Parameter("x", part=_patch_rows),
            Parameter("mixing_weight", part=_patch_columns),
            Parameter("statistics", part=_patch_statistics),
        ),
        _parameters("mixing"),
    ),
    "mix_backward": Declaration(
        (
            *_parameters("x grad_mixing"),
            Parameter("statistics", part=_mix_backward_statistics),
            Parameter("mixing_weight", ("NEEDS_X",), _patches),
            Parameter("norm1_weight", ("NEEDS_X", "HAS_NORM1_WEIGHT")),
            Parameter("grad_y", ("NEEDS_X",)),
            Parameter("grad_sum", ("NEEDS_X", "HAS_SUM")),
        ),
        (
            Parameter("grad_x", ("NEEDS_X",)),
            Parameter("grad_mixing_weight", ("NEEDS_MIXING_WEIGHT",)),
        ),
    ),
    "features": Declaration(
        _parameters(f"{_FEATURES} hidden_mask? norm1_weight? norm1_bias?"),
        _parameters("out mean rstd"),
    ),
    "features_backward": Declaration(
        _parameters(f"{_FEATURES} hidden_mask? norm1_weight? mean rstd grad"),
        _parameters("grad_mixing units sums"),
    ),
    "weight_gradient": Declaration(
        (
            *_parameters(f"{_FEATURES} norm1_weight? mean rstd grad units"),
            Parameter("sums", part=lambda _, sums: sums[2:]),
        ),
        _parameters("out"),
    ),
    "residual_norm": Declaration(
        (
            *_parameters("residual branch? weight? bias?"),
            Parameter("scale", ("HAS_BRANCH", "HAS_SCALE")),
        ),
        (Parameter("sum", ("HAS_BRANCH",)), *_parameters("y statistics")),
    ),
    "residual_norm_backward": Declaration(
        (
            *_parameters("x weight? grad_y"),
            Parameter("grad_sum", ("HAS_SUM",)),
            Parameter("statistics", part=lambda _, statistics: statistics[:2]),
            Parameter("scale", ("NEEDS_BRANCH", "HAS_SCALE")),
        ),
        (*_parameters("grad_x"), Parameter("grad_branch", ("NEEDS_BRANCH",))),
    ),
    "activation": Declaration(_parameters("h bias?"), _parameters("out")),
    "activation_backward": Declaration(_parameters("h bias? grad"), _parameters("grad")),
    "gated": Declaration((*_parameters("h"), *_GATE_BIASES), _parameters("out")),
    "gated_backward": Declaration((*_parameters("h grad"), *_GATE_BIASES), _parameters("grad_h")),
    "rotation": Declaration(
        (Parameter("heads", part=_rotated), *_parameters("table")),
        (Parameter("heads", part=_rotated),),
    ),
}
"""Declarations by the name of the launch."""


def declared(launch: Launch) -> Touched:
    """Return what a launch loads and stores.

    Raises:
        ValueError: If the kernel is not declared.
    """
    if launch.name not in DECLARATIONS:
        raise ValueError(
            f"kernel {launch.name!r} has no declaration; add it to DECLARATIONS in "
            "bench/counted/declared.py"
        )
    loads, stores = DECLARATIONS[launch.name]
    return Touched(_views(launch, loads), _views(launch, stores))


def _views(launch: Launch, parameters: tuple[Parameter, ...]) -> list[Tensor]:
    views = (parameter.of(launch) for parameter in parameters)
    return [view for view in views if view is not None]


def product_flop(launch: Launch) -> int:
    """Return the FLOP of the matrix products that a launch computes, without padding.

    For attention they are those of `useful_flop`, including what backward recomputes: seven
    products where a backward pass in one kernel takes five. For windows they are `window_flop`, for
    many tasks `bank_flop`. Row-wise kernels have none.
    """
    given: Any = launch.arguments
    if launch.name in ("forward", "dq", "token_dkdv", "prompt_dkdv", "shared_prompt_dkdv"):
        batch, queries, heads, dim = given["q_ptr"].shape
        prompts = given.get("num_prompts", 0)
        keys = given.get("num_keys", 0)
        if launch.name == "prompt_dkdv":
            prompts, keys = keys, 0
        problem = AttentionProblem(
            keys, prompts, dim, num_queries=queries, batch=batch, num_heads=heads
        )
        return useful_flop(launch.name, problem)
    if launch.name.startswith("window_"):
        return window_traffic.window_flop(launch)
    if launch.name in ("ragged_forward", "grouped_heads"):
        return bank_traffic.bank_flop(launch)
    if launch.name in ("mix", "mix_backward"):
        products = 1 if launch.name == "mix" else 1 + bool(launch.constexprs["NEEDS_X"])
        batch, _, width = given["x_ptr"].shape
        return 2 * products * batch * given["num_prompts"] * given["num_patches"] * width
    if launch.name in ("features", "features_backward", "weight_gradient"):
        products = 2 if launch.name == "features" else 4
        hidden, width = given["down_ptr"].shape
        return 2 * products * given["num_rows"] * hidden * width
    return 0
