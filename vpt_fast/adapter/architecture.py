"""Description of what a model computes with its weights: heads, activations, strides, windows.

Two models with the same weights may compute different functions (CLIP and "quick GELU" CLIP).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from timm.layers import DropPath, PatchDropout
from torch import nn
from torch.nn.modules.conv import _ConvNd

from vpt_fast.models.tuned import is_added
from vpt_fast.tune import classifiers_of

Description = Mapping[str, Any]
"""JSON values: plain attributes by their name in the model, and the class of norms and activations
by their module's name. `*` stands for all numbers at its position."""

_PLAIN = (bool, int, float, str)
# Attributes that select an implementation, allow other image sizes, or concern training alone.
_NOT_THE_FUNCTION = {
    "training", "fused_attn", "grad_checkpointing", "inplace", "weight_init_mode", "fix_init",
    "memory", "folded_scale", "dynamic_img_size", "dynamic_img_pad", "dynamic_mask",
    "strict_img_size", "flatten", "aug_active", "shift_coords", "jitter_coords", "rescale_coords",
}  # fmt: skip
# Adapters compare these themselves, with messages of their own.
_COMPARED_ELSEWHERE = {"num_classes", "global_pool"}
# No other attributes of the model itself: users store their own there.
_OF_THE_MODEL = {
    "in_chans", "embed_dim", "num_features", "num_layers", "num_prefix_tokens", "num_reg_tokens",
    "has_class_token", "no_embed_class", "pool_include_prefix", "output_fmt",
}  # fmt: skip
_WITHOUT_EFFECT = (nn.Identity, nn.Dropout, DropPath, PatchDropout)
_DESCRIBED_BY_WEIGHTS = (nn.Linear, _ConvNd)


def describe(model: nn.Module) -> dict[str, Any]:
    """Return the description of a timm model, plain or tuned; tuning does not change it."""
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
    """Return how two descriptions differ, in words; "" if they do not.

    Attributes that only one of them has are ignored: versions of timm differ in them.

    Args:
        have: `describe` of the model.
        expected: `describe` of the model that it should be.
    """
    for name in {**expected, **have}:
        mine, other = (found.get(name, found.get(_pattern(name))) for found in (have, expected))
        if mine is not None and other is not None and mine != other:
            return f"{name} is {mine}, not {other}"
    return ""


def _folded(model: nn.Module) -> dict[str, Any]:
    """Return the attributes that `fold_backbone` has changed, with their original values."""
    record = vars(model).get("tune_record")
    scales = {} if record is None or record.fold is None else record.fold.scales
    return {f"blocks.{index}.attn.scale": scale for index, scale in scales.items()}


def _parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield names and modules of the plain backbone, without heads and what a method adds."""
    heads = classifiers_of(model)
    left_out = {id(part) for head in heads if head is not None for part in head.modules()}
    for name, module in model.named_modules():
        if is_added(name, module) or _plain_class(module) is nn.Module:
            left_out |= {id(part) for part in module.modules()}
        if id(module) not in left_out and not isinstance(module, _WITHOUT_EFFECT):
            yield name, module


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield a module's public attributes that are plain values, and its class under the name ""."""
    is_model = hasattr(module, "patch_embed")
    if not isinstance(module, nn.Linear):
        for key, value in vars(module).items():
            if key.startswith("_") or key in _NOT_THE_FUNCTION | _COMPARED_ELSEWHERE:
                continue
            if is_model and key not in _OF_THE_MODEL:
                continue
            many = isinstance(value, tuple | list)
            values = list(value) if many else [value]
            if 0 < len(values) <= 4 and all(type(item) in _PLAIN for item in values):
                yield key, values if many else value
    if not isinstance(module, _DESCRIBED_BY_WEIGHTS) and not list(module.children()):
        yield "", _plain_class(module).__name__


def _plain_class(module: nn.Module) -> type:
    """Return a module's class before tuning; nn.Module for what a method adds."""
    package = __name__.partition(".")[0]
    return next(k for k in type(module).__mro__ if k.__module__.partition(".")[0] != package)


def _pattern(name: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
