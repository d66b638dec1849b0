"""Which of timm's blocks run as one function with a hand-written backward pass, and how.

`ops.block.function` computes; here a block's modules are read: what they are, and whether somebody
trains, hooks or drops out something that the fused functions pass by. Such a block runs module by
module, as `vit.blocks` and `swin.blocks` have it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import NoneType
from typing import Any, NamedTuple

import torch
from timm.layers import GELU, DropPath, GELUTanh, Mlp, QuickGELU, Swish
from timm.models.vision_transformer import LayerScale
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from vpt_fast.models.attention_inputs import computes_as_timms
from vpt_fast.models.fusion.block_reading import BlockReading, forget, weight_slots
from vpt_fast.models.fusion.weights_reading import WeightsReading
from vpt_fast.modules.hooks import has_hooks, has_own_forward, with_descendants
from vpt_fast.modules.norms import is_layer_norm
from vpt_fast.ops.backend import computing_dtype
from vpt_fast.ops.block.add_norm import DeferredSum
from vpt_fast.ops.block.core import BlockSteps
from vpt_fast.ops.block.function import run_blocks, run_traced
from vpt_fast.ops.block.parts import AttentionPattern, BlockConfig, BlockWeights, contiguous
from vpt_fast.ops.block.prompt_kv import StaticKV
from vpt_fast.ops.block.prompt_source import PromptSource
from vpt_fast.ops.block.sites import sites_for
from vpt_fast.ops.tracing import is_traced, is_transformed

Prompts = tuple[PromptSource | None, tuple[Tensor | None, ...]]
"""Where a block's prompts come from, and the tensors that they are made of."""

NO_PROMPTS: Prompts = (None, ())
_ACTIVATIONS: dict[type[nn.Module], str] = {
    GELU: "gelu",
    GELUTanh: "gelu_tanh",
    QuickGELU: "quick_gelu",
    Swish: "silu",
    nn.SiLU: "silu",
}

_LAYER_SCALES = (nn.Identity, LayerScale, NoneType)  # Swin's blocks have none

_DROPOUTS = (nn.Identity, nn.Dropout, DropPath)

# Parts of a block that are called as modules, before and after what is fused.
_BESIDE = ("prompt", "adapter")


def activation_kind(module: nn.Module) -> str | None:
    """Name of an activation that the fused MLP has; None for any other."""
    if type(module) is nn.GELU:
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    return _ACTIVATIONS.get(type(module))


def can_fuse(block: nn.Module) -> bool:
    """Whether a block is of a kind that is fused, frozen, without dropout and without hooks.

    Hooks on the block itself, which see its input and output, are not looked at.
    """
    # Modules are looked up in their dictionaries: this runs for every block of every step, and
    # nn.Module's attribute access is slow.
    parts: Any = block._modules
    attn, mlp = parts["attn"]._modules, parts["mlp"]._modules
    return (
        type(parts["mlp"]) is Mlp
        and is_layer_norm(parts["norm1"])
        and is_layer_norm(parts["norm2"])
        and activation_kind(mlp["act"]) is not None
        and all(type(m) is nn.Linear for m in (attn["qkv"], attn["proj"], mlp["fc1"], mlp["fc2"]))
        and all(
            type(m) in (nn.Identity, NoneType)
            for m in (attn.get("q_norm"), attn.get("k_norm"), attn.get("norm"), mlp["norm"])
        )
        and attn.get("gate") is None
        and type(attn.get("softmax")) in (nn.Softmax, NoneType)
        and _has_timms_heads(parts["attn"])
        and all(type(parts.get(name)) in _LAYER_SCALES for name in ("ls1", "ls2"))
        and all(map(_drops_nothing, (attn["attn_drop"], attn["proj_drop"])))
        and all(map(_drops_nothing, (mlp["drop1"], mlp["drop2"])))
        and all(_drops_nothing(parts[name]) for name in ("drop_path1", "drop_path2"))
        and not nn_module._has_any_global_hook()
        and _is_left_alone(parts)
    )


def _has_timms_heads(attn: Any) -> bool:
    head_dim, rest = divmod(len(attn.qkv.weight), 3 * attn.num_heads)
    drops = attn.training and attn.attn_drop.p  # timm's fused attention goes by its own mode
    return not rest and not drops and computes_as_timms(attn, head_dim)


def _is_left_alone(parts: Mapping[str, nn.Module | None]) -> bool:
    """Whether nothing that is fused is trained, and no hook or forward was put on any module."""
    for name, part in parts.items():
        for module in with_descendants(part):
            if has_hooks(module) or has_own_forward(module):
                return False
            if name not in _BESIDE and any(
                p is not None and p.requires_grad for p in module._parameters.values()
            ):
                return False
    return True


def _drops_nothing(module: Any) -> bool:
    """Whether a dropout, or timm's stochastic depth, is one, and not at work."""
    dropped = getattr(module, "p", 0) or getattr(module, "drop_prob", 0)
    return type(module) in _DROPOUTS and not (module.training and dropped)


def block_weights(block: Any) -> BlockWeights:
    """The weights of a block that `can_fuse`; None for those that are folded into others."""
    return BlockWeights._make([place.get(name) for place, name in weight_slots(block)])


class Use(NamedTuple):
    """How a block is run.

    Attributes:
        memory: one of `vpt_fast.ops.memory_modes.MEMORY_MODES`.
        windows: of its attention; None if that is over all rows.
        queries: how many of its first rows are computed; None for all.
    """

    memory: str
    windows: AttentionPattern | None = None
    queries: int | None = None


def block_config(block: Any, source: PromptSource | None, use: Use) -> BlockConfig:
    """What of a block that `can_fuse` is no tensor; its prompts come from `source`."""
    return BlockConfig(
        heads=block.attn.num_heads,
        scale=block.attn.scale,
        eps1=block.norm1.eps,
        eps2=block.norm2.eps,
        activation=activation_kind(block.mlp.act) or "",
        memory=use.memory,
        source=source,
        windows=use.windows,
        queries=use.queries,
    )


class Fused(NamedTuple):
    """A block that is fused in this call.

    Attributes:
        weights: its weights as they are.
        reading: of the weights; None where somebody traces, who reads the modules with us.
    """

    weights: BlockWeights
    reading: WeightsReading | None


def fused(block: Any, x: Tensor | None) -> Fused | None:
    """A block as it is fused in a call with input x; None if it cannot be.

    Args:
        block: of a kind that can be fused, as far as its class says.
        x: its input; None where it is known that nobody traces.
    """
    if x is not None and is_traced(x):
        if is_transformed():
            return None
        return Fused(block_weights(block), None) if can_fuse(block) else None
    reading = block.__dict__.get("_reading")
    known = None if reading is None else reading.now(block)
    if known is None:
        # Copies that the old one holds are of no use, fused or not.
        forget(block)
        if not can_fuse(block):
            return None
        kind = activation_kind(block._modules["mlp"]._modules["act"])
        reading = BlockReading(block, kind or "")
        known = reading.now(block)
        if known is None:
            return None
        block.__dict__["_reading"] = reading
    return Fused(known.weights, known)


class _Input(NamedTuple):
    """What of a block's input decides how it is computed with: the sum that is left to it."""

    shape: torch.Size
    device: torch.device
    dtype: torch.dtype  # of the residual
    branch: torch.dtype | None  # of the branch


def run(block: Any, now: Fused, prompts: Prompts, total: DeferredSum, use: Use) -> DeferredSum:
    """A block from the sum that it reads to the sum that is its output.

    Args:
        block: the block.
        now: it, as `fused` has found it for this input.
        prompts: its prompts: where they come from, and the tensors that they are made of, laid out
            as their source has them.
        total: its input.
        use: how it is run.

    Returns:
        Its output (B, N, D), or of the first rows (B, queries, D), not yet summed; the branch
        adapted by the block's adapter, if it has one.
    """
    residual, branch, scale = total
    source, sources = prompts
    dtype = computing_dtype(residual)
    if now.reading is None:
        config = block_config(block, source, use)
        middle, result = run_traced(config, now.weights, scale, dtype, residual, branch, sources)
    else:
        steps = _steps(now.reading, prompts, dtype, _input_of(total), scale, use)
        middle, result = run_blocks([steps], residual, branch, [sources])
    adapter, scale = block._modules.get("adapter"), now.weights.scale2
    if adapter is None:
        return DeferredSum(middle, result, scale)
    return DeferredSum(middle, adapter(result if scale is None else result * scale))


def run_together(
    ahead: Sequence[tuple[Fused, Prompts]],
    static_kv: StaticKV | None,
    total: DeferredSum,
    uses: Iterable[Use],
) -> DeferredSum:
    """Blocks one after the other, as one function; see `run`.

    Args:
        ahead: each block, and its prompts, in a call in which nobody traces; without adapters.
        static_kv: what makes keys of some of their prompts, if there are any.
        total: the first block's input.
        uses: how each is run; all compute all rows but the last.
    """
    dtype, scale, read = computing_dtype(total.residual), total.scale, _input_of(total)
    steps, sources = [], []
    for (now, prompts), use in zip(ahead, uses, strict=True):
        if now.reading is None:
            raise RuntimeError("somebody traces: run blocks one by one")
        steps.append(_steps(now.reading, prompts, dtype, read, scale, use))
        sources.append(prompts[1])
        scale = now.weights.scale2
        if len(steps) == 1:  # as wide as what it sums; LayerScale does not count
            wide = torch.promote_types(total.dtype, dtype)
            read = read._replace(dtype=wide, branch=dtype)
    middle, result = run_blocks(steps, total.residual, total.branch, sources, static_kv)
    return DeferredSum(middle, result, scale)


def _input_of(total: DeferredSum) -> _Input:
    residual, branch, _ = total
    kind = None if branch is None else branch.dtype
    return _Input(residual.shape, residual.device, residual.dtype, kind)


def _steps(
    reading: WeightsReading,
    prompts: Prompts,
    dtype: torch.dtype,
    read: _Input,
    scale: Tensor | None,
    use: Use,
) -> BlockSteps:
    """The steps of a block for inputs of one layout, which are remembered."""
    weights, scale = reading.in_dtype(dtype), contiguous(scale)
    source, sources = prompts
    layout: tuple[Any, ...] = (
        source, use, dtype, read, None if scale is None else scale.dtype,
        *[None if t is None else (t.shape, t.dtype) for t in sources],
    )  # fmt: skip
    known = reading.steps.get(layout)
    if known is not None and known[0] is weights and known[1] is scale:
        return known[2]
    heads, factor, eps1, eps2, activation = reading.scalars
    config = BlockConfig(
        heads, factor, eps1, eps2, activation, use.memory, source, use.windows, use.queries
    )
    head_dim = weights.qkv_weight.shape[0] // (3 * config.heads)
    sites = sites_for(weights.qkv_weight, head_dim, config, reading.layout, *layout[2:])
    steps = BlockSteps(config, weights._replace(branch_scale=scale), dtype, sites)
    reading.remember(layout, weights, scale, steps)
    return steps
