"""Fused blocks: which of timm's blocks run as one function with a hand-written backward pass.

`vpt_fast.ops.block.function` computes. A block is not fused where a part is trained, hooked or
unknown, or drops elements or paths: it runs module by module then.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import NoneType
from typing import Any, NamedTuple

import torch
from timm.layers import GELU, DropPath, GELUTanh, GluMlp, Mlp, QuickGELU, SwiGLU, Swish
from timm.models.vision_transformer import LayerScale
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from vpt_fast.models.attention_inputs import computes_as_timms
from vpt_fast.models.fusion.block_reading import BlockReading, forget, weight_slots
from vpt_fast.models.fusion.weights_reading import BlockSettings, WeightsReading
from vpt_fast.modules.hooks import has_hooks, has_own_forward, with_descendants
from vpt_fast.modules.norms import is_layer_norm
from vpt_fast.ops.backend import computing_dtype, statistics_dtype
from vpt_fast.ops.block.add_norm import DeferredSum
from vpt_fast.ops.block.core import BlockSteps
from vpt_fast.ops.block.function import run_blocks, run_traced
from vpt_fast.ops.block.parts import AttentionPattern, BlockConfig, BlockWeights, contiguous
from vpt_fast.ops.block.prompt_kv import StaticKV
from vpt_fast.ops.block.prompt_source import PromptSource
from vpt_fast.ops.block.sites import sites_for
from vpt_fast.ops.tracing import is_traced, is_transformed

Prompts = tuple[PromptSource | None, tuple[Tensor | None, ...]]
"""Source of a block's prompts, and its tensors."""

NO_PROMPTS: Prompts = (None, ())
_ACTIVATIONS: dict[type[nn.Module], str] = {
    GELU: "gelu",
    GELUTanh: "gelu_tanh",
    QuickGELU: "quick_gelu",
    Swish: "silu",
    nn.SiLU: "silu",
}

_MLPS: dict[type[nn.Module], tuple[str, ...]] = {
    Mlp: ("fc1", "fc2"),
    GluMlp: ("fc1", "fc2"),
    SwiGLU: ("fc1_g", "fc1_x", "fc2"),
}
"""Linears of the MLPs that can be fused."""

_LAYER_SCALES = (nn.Identity, LayerScale, NoneType)  # Swin's blocks have none

_DROPOUTS = (nn.Identity, nn.Dropout, DropPath)

# Parts of a fused block that are called as modules.
_CALLED = ("prompt", "adapter")


def activation_kind(module: nn.Module) -> str | None:
    """Return the name of an activation of the fused MLP; None for any other."""
    if type(module) is nn.GELU:
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    return _ACTIVATIONS.get(type(module))


def can_fuse(block: nn.Module) -> bool:
    """Return whether a block's parts can be fused: known, frozen, without dropout and hooks.

    Hooks on the block itself do not matter: they see its input and output.
    """
    # In dictionaries: this runs often, and nn.Module's attribute access is slow.
    parts: Any = block._modules
    if type(parts["mlp"]) not in _MLPS:
        return False
    attn, mlp = parts["attn"]._modules, parts["mlp"]._modules
    linears = [*_projections(attn), *(mlp[name] for name in _MLPS[type(parts["mlp"])])]
    return (
        is_layer_norm(parts["norm1"])
        and is_layer_norm(parts["norm2"])
        and activation_kind(mlp["act"]) is not None
        and all(type(m) is nn.Linear for m in linears)
        and all(
            type(m) in (nn.Identity, NoneType) for m in (attn.get("q_norm"), attn.get("k_norm"))
        )
        and all(map(_is_nothing_or_layer_norm, (attn.get("norm"), mlp["norm"])))
        and attn.get("gate") is None
        and type(attn.get("softmax")) in (nn.Softmax, NoneType)
        and _has_timms_heads(parts["attn"])
        and all(type(parts.get(name)) in _LAYER_SCALES for name in ("ls1", "ls2"))
        and all(map(_drops_nothing, (attn["attn_drop"], attn["proj_drop"])))
        and all(map(_drops_nothing, (mlp["drop1"], mlp["drop2"])))
        and all(_drops_nothing(parts[name]) for name in ("drop_path1", "drop_path2"))
        and not nn_module._has_any_global_hook()
        and not any(p is not None and p.requires_grad for p in block._parameters.values())
        and _is_unchanged(parts)
    )


def _projections(attn: Mapping[str, Any]) -> list[Any]:
    """Return the Linears of an attention."""
    if attn.get("qkv") is not None:
        return [attn["qkv"], attn["proj"]]
    return [*(attn.get(name) for name in ("q_proj", "k_proj", "v_proj")), attn["proj"]]


def _is_nothing_or_layer_norm(norm: Any) -> bool:
    return type(norm) in (nn.Identity, NoneType) or is_layer_norm(norm)


def _has_timms_heads(attn: Any) -> bool:
    head_dim, rest = divmod(attn.proj.weight.shape[1], attn.num_heads)
    drops = attn.training and attn.attn_drop.p  # timm's fused attention reads attn.training
    return not rest and not drops and computes_as_timms(attn, head_dim)


def _is_unchanged(parts: Mapping[str, nn.Module | None]) -> bool:
    """Return whether no fused part is trained, and no module has a hook or its own forward."""
    for name, part in parts.items():
        for module in with_descendants(part):
            if has_hooks(module) or has_own_forward(module):
                return False
            if name not in _CALLED and any(
                p is not None and p.requires_grad for p in module._parameters.values()
            ):
                return False
    return True


def _drops_nothing(module: Any) -> bool:
    """Return whether a module is a dropout or timm's stochastic depth that does nothing."""
    dropped = getattr(module, "p", 0) or getattr(module, "drop_prob", 0)
    return type(module) in _DROPOUTS and not (module.training and dropped)


def block_weights(block: Any) -> BlockWeights:
    """Return the weights of a block that `can_fuse`; None for those folded into others."""
    return BlockWeights._make([parameters.get(name) for parameters, name in weight_slots(block)])


def _block_settings(block: Any) -> BlockSettings:
    attn, mlp = block._modules["attn"], block._modules["mlp"]
    inner = mlp._modules["norm"], attn._modules.get("norm")
    gate = "" if type(mlp) is Mlp else "last" if getattr(mlp, "gate_last", False) else "first"
    return BlockSettings(
        attn.num_heads, attn.scale, block.norm1.eps, block.norm2.eps,
        activation_kind(mlp._modules["act"]) or "", getattr(attn, "rotate_half", False), gate,
        *(getattr(norm, "eps", None) for norm in inner),
    )  # fmt: skip


class Use(NamedTuple):
    """Settings of a block in one call.

    Attributes:
        memory: One of `vpt_fast.ops.memory_modes.MEMORY_MODES`.
        windows: Windows that attention is restricted to, or None.
        queries: Number of first rows that are computed; None computes all.
    """

    memory: str
    windows: AttentionPattern | None = None
    queries: int | None = None


def block_config(block: Any, source: PromptSource | None, use: Use) -> BlockConfig:
    """Return the settings of a block that `can_fuse`, with a source of its prompts."""
    return _config(_block_settings(block), source, use)


def _config(settings: BlockSettings, source: PromptSource | None, use: Use) -> BlockConfig:
    s = settings
    return BlockConfig(
        s.heads, s.scale, s.eps1, s.eps2, s.activation, use.memory, source, use.windows,
        use.queries, s.rotate_half, s.gate, s.mlp_eps, s.attn_eps,
    )  # fmt: skip


class Fused(NamedTuple):
    """A block that is fused in this call.

    Attributes:
        weights: Weights of the block.
        reading: Reading of the weights; None under tracing, where modules are read in every call.
    """

    weights: BlockWeights
    reading: WeightsReading | None


def fused(block: Any, x: Tensor | None) -> Fused | None:
    """Return a block's weights for a fused call; None if it cannot be fused now.

    Args:
        block: Block of a class that can be fused.
        x: Input; None outside of tracing.
    """
    if x is not None and is_traced(x):
        if is_transformed():
            return None
        return Fused(block_weights(block), None) if can_fuse(block) else None
    reading = block.__dict__.get("_reading")
    known = None if reading is None else reading.current(block)
    if known is None:
        forget(block)  # frees cached copies, also if it is not fused any more
        if not can_fuse(block):
            return None
        reading = BlockReading(block, _block_settings(block))
        known = reading.current(block)
        if known is None:
            return None
        block.__dict__["_reading"] = reading
    return Fused(known.weights, known)


def can_rotate(rope: Tensor | None, x: Tensor) -> bool:
    """Return whether fused blocks take a table of the rotary position embedding.

    They take fp32 tables, fp64 ones for tokens in fp64, (N', 2 d) or (H, N', 2 d), that are not
    trained.

    Args:
        rope: Table, or None.
        x: Tokens (B, N, D).
    """
    if rope is None:
        return True
    trained = rope.requires_grad and torch.is_grad_enabled()
    return (
        not trained
        and rope.ndim in (2, 3)
        and rope.dtype == statistics_dtype(x.dtype)
        and rope.device == x.device
        and rope.is_contiguous()
        and rope.shape[-2] <= x.shape[1]
    )


class _Input(NamedTuple):
    """Layout of a block's input, a deferred sum."""

    shape: torch.Size
    device: torch.device
    dtype: torch.dtype  # of the residual
    branch: torch.dtype | None  # of the branch


def run(
    block: Any,
    now: Fused,
    prompts: Prompts,
    total: DeferredSum,
    use: Use,
    rope: Tensor | None = None,
) -> DeferredSum:
    """Run a fused block from one deferred sum to the next.

    Args:
        block: Block with the adapter that is called, if it has one.
        now: What `fused` returned for this input.
        prompts: Source of its prompts, and the source's tensors.
        total: Input.
        use: Settings in this call.
        rope: Table of the rotary position embedding, as `can_rotate` takes it; or None.

    Returns:
        Output (B, N, D), or its first rows (B, queries, D), deferred.
    """
    residual, branch, scale = total
    source, sources = prompts
    dtype = computing_dtype(residual)
    if now.reading is None:
        config = block_config(block, source, use)
        weights = now.weights._replace(rope=rope)
        middle, result = run_traced(config, weights, scale, dtype, residual, branch, sources)
    else:
        steps = _steps(now.reading, prompts, dtype, _input_of(total), scale, use, rope)
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
    ropes: Iterable[Tensor | None],
) -> DeferredSum:
    """Run fused blocks as one function; see `run`.

    Args:
        ahead: Each block and its prompts, outside of tracing; blocks without adapters.
        static_kv: Those blocks whose K_p and V_p are computed together, if any.
        total: Input of the first block.
        uses: Settings of each in this call; all but the last compute all rows.
        ropes: Table of each, as for `run`.
    """
    dtype, scale, read = computing_dtype(total.residual), total.scale, _input_of(total)
    steps, sources = [], []
    for (now, prompts), use, rope in zip(ahead, uses, ropes, strict=True):
        if now.reading is None:
            raise RuntimeError("under tracing blocks run one by one")
        steps.append(_steps(now.reading, prompts, dtype, read, scale, use, rope))
        sources.append(prompts[1])
        scale = now.weights.scale2
        if len(steps) == 1:  # later sums have the wider dtype of input and products
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
    rope: Tensor | None,
) -> BlockSteps:
    """Return the steps of a block for inputs of one layout, cached."""
    weights, scale = reading.in_dtype(dtype), contiguous(scale)
    source, sources = prompts
    tensors: tuple[Any, ...] = (
        dtype, read, None if scale is None else scale.dtype, None if rope is None else rope.shape,
        *[None if t is None else (t.shape, t.dtype) for t in sources],
    )  # fmt: skip
    layout = source, use, tensors
    known = reading.steps.get(layout)
    if (
        known is not None
        and known.weights is weights
        and known.scale is scale
        and known.rope is rope
    ):
        return known.steps
    config = _config(reading.settings, source, use)
    head_dim = weights.proj_weight.shape[1] // config.heads
    sites = sites_for(weights.proj_weight, head_dim, config, reading.layout, tensors)
    steps = BlockSteps(config, weights._replace(branch_scale=scale, rope=rope), dtype, sites)
    reading.remember(layout, weights, scale, rope, steps)
    return steps
