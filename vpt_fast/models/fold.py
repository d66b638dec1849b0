"""Fold a frozen backbone's per-channel factors and biases into the Linears beside them.

    LayerNorm    W (gamma * n + beta) + b  =  (W diag(gamma)) n + (b + W beta)
    LayerScale   gamma * (W x + b)         =  (diag(gamma) W) x + gamma * b
    scale        goes into the queries' rows of the qkv projection
    key bias     adds the same to all scores of a query, prompts' included: the softmax drops it,
                 unless keys are rotated by their position
    value bias   softmax rows sum to 1, so it is a constant of the output projection

The function stays the same; what is folded is computed in fp64 and rounded once, to the weight's
dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from timm.layers import Attention, AttentionRope, Mlp
from timm.models.eva import EvaAttention
from timm.models.vision_transformer import LayerScale
from torch import Tensor, nn

from vpt_fast.models.attention_inputs import reads_plainly
from vpt_fast.models.interop.quantised import cannot_fold
from vpt_fast.modules.hooks import has_hooks, has_own_forward

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Folds:
    """What `fold_backbone` folds; the fields are its arguments."""

    norm: bool = True
    layer_scale: bool = True
    attention_scale: bool = True
    bias: bool = True


@dataclass
class FoldRecord:
    """What was folded, and what undoes it.

    Attributes:
        folds: Requested folds.
        originals: Original weights by name, in host memory.
        scales: Original `attn.scale` by block index.
    """

    folds: Folds
    originals: dict[str, Tensor] = field(default_factory=dict)
    scales: dict[int, float] = field(default_factory=dict)


def fold_backbone(
    model: Model,
    *,
    norm: bool = True,
    layer_scale: bool = True,
    attention_scale: bool = True,
    bias: bool = True,
) -> Model:
    """Fold the frozen blocks of a tuned model, in place; `remove_prompts` undoes it bit for bit.

    Nothing is folded where the function would change: the attention scale and the key bias under
    qk-norm, the key bias where keys are rotated by their position, both biases where a method makes
    keys and values itself, the attention scale of an Eva and of a block that is still timm's own
    (they leave the scale to PyTorch's default), a norm1 that attention's gate reads too, a
    LayerNorm's shift into a Linear without bias, a value bias into an output projection without
    bias, MLPs other than timm's `Mlp`. Norms and LayerScales that are folded become ones and zeros,
    which the fused blocks pass by.

    The original weights of what is changed stay in host memory, since a rounded product cannot
    be divided back exactly: as much as the blocks' Linears take (ViT-B/16 in fp32: 340 MB).
    `model.state_dict()` gives those originals, and a state dict that is loaded is folded again, so
    that checkpoints are timm's with or without folding.

    Args:
        model: A model that `prompt_tune` has tuned.
        norm: Whether the affine of norm1 and norm2 is folded into qkv and fc1.
        layer_scale: Whether LayerScale is folded into proj and fc2.
        attention_scale: Whether the scale of the scores is folded into the queries' projection.
        bias: Whether the key bias is dropped and the value bias folded into proj.

    Returns:
        `model` itself.

    Raises:
        ValueError: `model` is not tuned or is folded already, or a parameter that would be folded
            is trained or its module hooked. Nothing has been changed then.
    """
    record = getattr(model, "tune_record", None)
    if record is None:
        raise ValueError(
            f"this {type(model).__name__} is not tuned: call prompt_tune(model, method) first, so "
            "that remove_prompts can undo the folding"
        )
    tuned: Any = model
    if record.fold is not None:
        raise ValueError(f"this model is folded already, with {record.fold.folds}")
    if not hasattr(tuned, "blocks"):
        raise ValueError(
            f"a {type(tuned).__name__} cannot be folded: what its windows are padded with is the "
            "projection's bias, which folding norm1 would change; leave it as it is"
        )
    _check(tuned)
    record.fold = FoldRecord(Folds(norm, layer_scale, attention_scale, bias))
    _fold(tuned)
    tuned.register_load_state_dict_post_hook(_fold_after_loading)
    return model


def unfold_backbone(model: Any) -> None:
    """Put the original weights back; no-op for a model that is not folded."""
    if model.tune_record.fold is None:
        return
    _unfold(model)
    model.tune_record.fold = None
    hooks = model._load_state_dict_post_hooks
    for key in [key for key, hook in hooks.items() if hook is _fold_after_loading]:
        del hooks[key]


def folded_parts(block: Any) -> frozenset[str]:
    """Return the names of a block's parts that folding has set to ones and zeros."""
    found: frozenset[str] = block.__dict__.get("folded", frozenset())
    return found


def _check(model: Any) -> None:
    for index, block in enumerate(model.blocks):
        for name, module in _parts(block):
            where = f"blocks.{index}.{name}"
            if has_hooks(module):
                raise ValueError(
                    f"cannot fold {where}: it is hooked, and what the hook sees would change; "
                    "remove the hook or do not fold"
                )
            if has_own_forward(module) or (name in _LINEARS and not reads_plainly(module)):
                raise cannot_fold(where, module)
            for leaf, parameter in module.named_parameters(recurse=False):
                if parameter.is_meta:
                    raise ValueError(
                        f"cannot fold {where}.{leaf}: it is on the meta device and has no values; "
                        "fill the model first"
                    )
                _check_frozen(f"{where}.{leaf}", parameter)
        for name in _GAMMAS:
            if block._parameters.get(name) is not None:
                _check_frozen(f"blocks.{index}.{name}", block._parameters[name])


def _check_frozen(name: str, parameter: Tensor) -> None:
    if parameter.requires_grad:
        raise ValueError(
            f"cannot fold {name}: it is trained (requires_grad=True); freeze it or do not fold"
        )


_LINEARS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
_PLAIN_ATTENTION = (Attention, EvaAttention, AttentionRope)
_GAMMAS = ("gamma_1", "gamma_2")

# LayerScale and parameter of a block that scale a branch, and the branch's last Linear.
_SCALED = (("ls1", "gamma_1", "attn.proj"), ("ls2", "gamma_2", "mlp.fc2"))


def _parts(block: Any) -> Iterator[tuple[str, nn.Module]]:
    names = ["norm1", "attn.qkv", "attn.proj", "ls1", "norm2", "ls2"]
    if type(block.mlp) is Mlp:
        names += ["mlp.fc1", "mlp.fc2"]
    for name in names:
        container, _, leaf = name.rpartition(".")
        part = block.get_submodule(container)._modules.get(leaf)
        if part is not None:
            yield name, part


def _fold(model: Any) -> None:
    record: FoldRecord = model.tune_record.fold
    with torch.no_grad():
        for index, block in enumerate(model.blocks):
            rotates = getattr(model, "rope", None) is not None
            changes, scale, passed = _folded_block(block, record.folds, rotates)
            if scale is not None:
                record.scales[index], block.attn.scale = block.attn.scale, scale
                block.attn.folded_scale = scale
            block.folded = passed
            for name, value in changes.items():
                parameter = block.get_parameter(name)
                record.originals[f"blocks.{index}.{name}"] = parameter.detach().cpu().clone()
                # Another model may have the same parameter: it keeps it as it is.
                place, _, leaf = name.rpartition(".")
                folded = torch.empty_like(parameter).copy_(value)
                setattr(block.get_submodule(place), leaf, nn.Parameter(folded, False))


def _unfold(model: Any) -> None:
    record: FoldRecord = model.tune_record.fold
    with torch.no_grad():
        for name, original in record.originals.items():
            model.get_parameter(name).copy_(original)
    for index, scale in record.scales.items():
        model.blocks[index].attn.scale = scale
        del model.blocks[index].attn.folded_scale
    for block in model.blocks:
        block.__dict__.pop("folded", None)
    record.originals.clear()
    record.scales.clear()


def _fold_after_loading(model: Any, _: Any) -> None:
    """Fold again after loading; `unfold_before_loading` restored the originals before."""
    if not model.tune_record.fold.originals:
        _fold(model)


def unfold_before_loading(model: Any) -> None:
    """Restore the originals; a hook of `fold_backbone` folds again after loading."""
    if model.tune_record.fold is not None:
        _unfold(model)


class _Folded:
    """Tensors of a block in fp64, replaced by new values."""

    def __init__(self, block: Any) -> None:
        self.block = block
        self.values: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.values:
            return self.block.get_parameter(name).double()
        return self.values[name]

    def __setitem__(self, name: str, value: Tensor) -> None:
        self.values[name] = value


def _folded_block(
    block: Any, folds: Folds, rotates: bool
) -> tuple[dict[str, Tensor], float | None, frozenset[str]]:
    """Return new values by name, the new `attn.scale`, and the parts that fused blocks skip.

    Args:
        block: Block of a tuned model.
        folds: What to fold.
        rotates: Whether keys are rotated by their position, so that their bias is no constant.
    """
    attn, mlp = block.attn, block.mlp
    new = _Folded(block)
    passed: set[str] = set()
    plain_mlp = type(mlp) is Mlp
    normed = not all(type(m) is nn.Identity for m in (attn.q_norm, attn.k_norm))
    width = attn.num_heads * attn.head_dim
    packed, gated = (attn._modules.get(name) is not None for name in ("qkv", "gate"))
    if folds.norm:
        targets = [("norm1", "attn.qkv")] if packed and not gated else []
        targets += [("norm2", "mlp.fc1")] if plain_mlp else []
        passed.update(norm for norm, linear in targets if _fold_norm(new, norm, linear))
    scale = None
    is_vit = isinstance(attn, Attention)
    if folds.attention_scale and not normed and is_vit and type(attn) not in _PLAIN_ATTENTION:
        factor = torch.ones_like(new["attn.qkv.weight"][:, 0])
        factor[:width] = attn.scale
        _scale_rows(new, "attn.qkv", factor)
        scale = 1.0
    # Keys and values of prompts' own have no such biases.
    alike = not getattr(block._modules.get("prompt"), "num_keys", 0)
    if folds.bias and packed and attn.qkv.bias is not None and alike:
        bias = new["attn.qkv.bias"].clone()
        if not (normed or rotates):
            bias[width : 2 * width] = 0
        inner = gated or type(attn.norm) is not nn.Identity
        if attn.proj.bias is not None and not inner:
            shift = new["attn.proj.weight"] @ bias[2 * width :]
            new["attn.proj.bias"] = new["attn.proj.bias"] + shift
            bias[2 * width :] = 0
        new["attn.qkv.bias"] = bias
    if folds.layer_scale:
        for part, own, linear in _SCALED if plain_mlp else _SCALED[:1]:
            if type(block._modules.get(part)) is LayerScale:
                _fold_scale(new, f"{part}.gamma", linear)
                passed.add(part)
            if block._parameters.get(own) is not None:
                _fold_scale(new, own, linear)
    return new.values, scale, frozenset(passed)


def _fold_norm(new: _Folded, norm: str, linear: str) -> bool:
    module, target = new.block.get_submodule(norm), new.block.get_submodule(linear)
    if not isinstance(module, nn.LayerNorm) or module.weight is None:
        return False
    if module.bias is not None and target.bias is None:
        return False
    if module.bias is not None:
        new[f"{linear}.bias"] = (
            new[f"{linear}.bias"] + new[f"{linear}.weight"] @ new[f"{norm}.bias"]
        )
        new[f"{norm}.bias"] = torch.zeros_like(new[f"{norm}.bias"])
    new[f"{linear}.weight"] = new[f"{linear}.weight"] * new[f"{norm}.weight"]
    new[f"{norm}.weight"] = torch.ones_like(new[f"{norm}.weight"])
    return True


def _fold_scale(new: _Folded, gamma: str, linear: str) -> None:
    _scale_rows(new, linear, new[gamma])
    new[gamma] = torch.ones_like(new[gamma])


def _scale_rows(new: _Folded, linear: str, factor: Tensor) -> None:
    """Multiply the outputs of a Linear by `factor` (out,)."""
    new[f"{linear}.weight"] = new[f"{linear}.weight"] * factor[:, None]
    if new.block.get_submodule(linear).bias is not None:
        new[f"{linear}.bias"] = new[f"{linear}.bias"] * factor
