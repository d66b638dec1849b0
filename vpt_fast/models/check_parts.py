"""Checks of a module part by part: known parts are accepted, others are refused by name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

from torch import nn

from vpt_fast.methods import VAPT, Method, prompted_blocks
from vpt_fast.models.attention_inputs import computes_as_timms
from vpt_fast.modules.row_by_row import ROW_NORMS

Parts = dict[str, tuple[type, ...] | None]
"""Types of a module's parts by name; None for any type."""


def refuse(where: str, value: Any, why: str) -> NoReturn:
    """Raise ValueError, naming what cannot be tuned."""
    raise ValueError(f"cannot tune this model: {where} is {value}; {why}")


def name_of(value: Any) -> str:
    """Return the name of a value's type."""
    return type(value).__name__


def check_parts(
    module: nn.Module,
    parts: Parts,
    where: str,
    optional: str = "",
    parameters: Iterable[str] = (),
) -> None:
    """Raise ValueError if a part is of an unknown type, or is one too many.

    Args:
        module: Module to check.
        parts: Parts that it must have.
        where: Name of the module, for the message.
        optional: Name of a part that it may have.
        parameters: Names of its own parameters.
    """
    if "forward" in vars(module):
        refuse(f"{where}.forward", "replaced on the instance", "restore the class's own")
    for name, types in parts.items():
        part = getattr(module, name)
        if types is not None and type(part) not in types:
            needed = ", ".join(sorted({t.__name__ for t in types}))
            found = f"{type(part).__module__}.{type(part).__qualname__}"
            if nn.Linear in types:
                needed += " of torch.nn; tune first, then put another in its place: it is called"
            refuse(f"{where}.{name}", found, f"known are: {needed}")
    extra = sorted(set(module._modules) - set(parts) - {optional})
    extra += sorted(set(module._parameters) - set(parameters))
    if extra:
        name = extra[0]
        refuse(f"{where}.{name}", name_of(getattr(module, name)), "timm's class has no such part")


def check_projections(attn: Any, width: int, where: str) -> None:
    """Raise ValueError unless qkv and proj have `width` channels of attention.

    Args:
        attn: timm's Attention or WindowAttention.
        width: Channels H * d.
        where: Name of the attention, for the message.
    """
    if attn.qkv.out_features != 3 * width:
        refuse(f"{where}.qkv.out_features", attn.qkv.out_features, f"{3 * width} are needed")
    if (attn.proj.in_features, attn.proj.out_features) != (width, attn.qkv.in_features):
        shape = (attn.proj.in_features, attn.proj.out_features)
        refuse(f"{where}.proj", shape, f"{width, attn.qkv.in_features} features are needed")


def check_fused(attn: Any, where: str) -> None:
    """Raise ValueError if an attention has an explicit softmax, or a scale that timm ignores."""
    if not attn.fused_attn:
        refuse(
            f"{where}.fused_attn",
            attn.fused_attn,
            "explicit softmax was asked for, which fused prompt attention would replace; set "
            "fused_attn = True",
        )
    check_scale(attn, attn.head_dim, where)


def check_scale(attn: Any, head_dim: int, where: str) -> None:
    """Raise ValueError if an attention has a scale that timm's forward ignores."""
    if not computes_as_timms(attn, head_dim):
        refuse(
            f"{where}.scale",
            attn.scale,
            f"timm's fused attention scales by {head_dim**-0.5:.6g} whatever it says; put the "
            "scale into the weights of the queries",
        )


def check_around_blocks(model: Any, method: Method) -> None:
    """Raise ValueError if a method does not fit a model of one width beside its blocks."""
    if type(model.norm) not in ROW_NORMS:
        refuse("norm", name_of(model.norm), "a normalisation of each token by itself is needed")
    prompted_blocks(method, len(model.blocks))
    if isinstance(method, VAPT) and method.num_prompts:
        check_kernel_size(method, model.patch_embed.grid_size, "the model's patches")


def check_kernel_size(method: VAPT, grid: tuple[int, int], what: str) -> None:
    """Raise ValueError if VAPT's convolution is larger than a grid of tokens.

    Args:
        method: Settings of VAPT.
        grid: Height and width of the grid.
        what: What has the grid, for the message.
    """
    if min(grid) < method.kernel_size:
        raise ValueError(
            f"kernel_size={method.kernel_size} does not fit the {grid[0]} x {grid[1]} grid of "
            f"{what}; use at most {min(grid)}"
        )


def check_apart(blocks: Iterable[tuple[str, nn.Module]]) -> None:
    """Raise ValueError if one block has two names: each needs prompts of its own.

    Args:
        blocks: Names and blocks, in order.
    """
    names: dict[int, str] = {}
    for name, block in blocks:
        before = names.setdefault(id(block), name)
        if before != name:
            refuse(name, f"{before} again", "give each place a copy (copy.deepcopy)")
