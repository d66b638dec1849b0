"""What a model computes beside its weights: heads, activations, norms, strides, windows.

Two models may have the same weights and compute different functions of them (CLIP and "quick GELU"
CLIP). A description holds what tells them apart as JSON values.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from timm.layers import DropPath, PatchDropout
from torch import nn
from torch.nn.modules.conv import _ConvNd

from vpt_fast.models.tuned import ADDED

Description = Mapping[str, Any]
"""Plain attributes by their name in the model, and the class of norms and activations by the
module's; `*` stands for every number in its place."""

_PLAIN = (bool, int, float, str)
# How it is computed, which other sizes are taken, what training alone reads or keeps.
_NOT_THE_FUNCTION = {
    "training", "fused_attn", "grad_checkpointing", "inplace", "weight_init_mode", "fix_init",
    "memory", "folded_scale", "dynamic_img_size", "dynamic_img_pad", "dynamic_mask",
    "strict_img_size", "flatten",
}  # fmt: skip
# Adapters compare these with words of their own.
_SAID_ELSEWHERE = {"num_classes", "global_pool"}
# Of the model itself, where people keep values of their own.
_OF_THE_MODEL = {
    "in_chans", "embed_dim", "num_features", "num_layers", "num_prefix_tokens", "num_reg_tokens",
    "has_class_token", "no_embed_class", "pool_include_prefix", "output_fmt",
}  # fmt: skip
_WITHOUT_EFFECT = (nn.Identity, nn.Dropout, DropPath, PatchDropout)
_TOLD_BY_WEIGHTS = (nn.Linear, _ConvNd)


def describe(model: nn.Module) -> dict[str, Any]:
    """What the modules of a timm model compute; a tuned one is described as the plain one was.

    Args:
        model: plain or tuned.
    """
    groups: dict[str, dict[str, Any]] = {}
    folded = _folded(model)
    for module_name, module in _parts(model):
        for key, value in _attributes(module):
            name = ".".join(part for part in (module_name, key) if part)
            groups.setdefault(_pattern(name), {})[name] = folded.get(name, value)
    found: dict[str, Any] = {}
    for pattern, values in groups.items():
        first, *others = values.values()
        found |= {pattern: first} if all(value == first for value in others) else values
    return found


def different_architecture(have: Description, expected: Description) -> str:
    """Say how a model computes something else than is expected; "" if it does not.

    What only one of the two has is of another version of timm.

    Args:
        have: `describe` of the model.
        expected: of the one that it should be.
    """
    for name in {**expected, **have}:
        mine, other = (found.get(name, found.get(_pattern(name))) for found in (have, expected))
        if mine is not None and other is not None and mine != other:
            return f"{name} is {mine}, not {other}"
    return ""


def _folded(model: nn.Module) -> dict[str, Any]:
    """Attributes that `fold_backbone` has changed, as they were."""
    record = vars(model).get("tune_record")
    scales = {} if record is None or record.fold is None else record.fold.scales
    return {f"blocks.{index}.attn.scale": scale for index, scale in scales.items()}


def _parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that a plain backbone has, by name."""
    vit: Any = model
    heads = vit.get_classifier()
    heads = heads if isinstance(heads, tuple) else (heads,)
    left_out = {id(part) for head in heads if head is not None for part in head.modules()}
    for name, module in model.named_modules():
        if _plain_class(module) is nn.Module or name in ADDED:
            left_out |= {id(part) for part in module.modules()}
        if id(module) not in left_out and not isinstance(module, _WITHOUT_EFFECT):
            yield name, module


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Public ones that are plain values, or a few of them; the class has no name of its own."""
    is_model = hasattr(module, "patch_embed")  # the model itself
    if not isinstance(module, nn.Linear):
        for key, value in vars(module).items():
            if key.startswith("_") or key in _NOT_THE_FUNCTION | _SAID_ELSEWHERE:
                continue
            if is_model and key not in _OF_THE_MODEL:
                continue
            if isinstance(value, tuple | list) and len(value) <= 4:
                if value and all(type(item) in _PLAIN for item in value):
                    yield key, list(value)
            elif type(value) in _PLAIN:
                yield key, value
    if not isinstance(module, _TOLD_BY_WEIGHTS) and not list(module.children()):
        yield "", _plain_class(module).__name__


def _plain_class(module: nn.Module) -> type:
    """Its class, or what that was before the model was tuned; nn.Module of what a method adds."""
    package = __name__.partition(".")[0]
    return next(k for k in type(module).__mro__ if k.__module__.partition(".")[0] != package)


def _pattern(name: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
