"""Checks of a model before `prompt_tune` changes it: what cannot be honoured is refused by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vpt_fast.methods import Method
from vpt_fast.methods.baselines import AdapterTuning, BiasTuning, MLPHead, PartialTuning
from vpt_fast.models.check_parts import name_of, refuse
from vpt_fast.models.family import KNOWN, Family, family_of
from vpt_fast.models.tuned import blocks_of, check_pooling, is_disabled, is_tuned


def check_model(model: Any, method: Method) -> Family:
    """Return the record of a model's class, or raise if `method` cannot be honoured.

    Raises:
        TypeError: If it is no timm VisionTransformer, Eva or SwinTransformer.
        ValueError: If a block, an attribute or the method does not fit, or it is tuned already.
    """
    if is_tuned(model):
        raise ValueError(
            f"this {name_of(model)} is tuned already, with {model.tune_record.method}; call "
            "remove_prompts(model) first"
        )
    if is_disabled(model):
        raise ValueError(
            f"the adapters of this {name_of(model)} are disabled; leave `with disabled(model)`"
        )
    family = family_of(model)
    if family is None:
        raise TypeError(_not_known(model))
    if "forward" in vars(model) or "forward_features" in vars(model):
        refuse("forward", "replaced on the instance", "restore the class's own")
    family.check(model, method)
    # timm 1.0.29 lets the pooling of a ClassifierHead differ from the model's.
    pool = getattr(model.head, "global_pool", None)
    check_pooling(method, model.global_pool if pool is None else pool.pool_type)
    _check_baseline(model, method)
    return family


def _check_baseline(model: Any, method: Method) -> None:
    depth, width = len(blocks_of(model)), model.embed_dim
    if isinstance(method, PartialTuning) and method.num_blocks > depth:
        raise ValueError(
            f"num_blocks={method.num_blocks}, but the model has {depth} blocks; use at most {depth}"
        )
    if isinstance(method, AdapterTuning) and method.reduction > width:
        raise ValueError(
            f"reduction={method.reduction} leaves no channel of the model's {width}; use at most "
            f"{width}"
        )
    if isinstance(method, BiasTuning):
        backbone = (n for n, _ in model.named_parameters() if not n.startswith("head"))
        if not any(method.trains(name, depth) for name in backbone):
            raise ValueError(f"this {name_of(model)} has no bias to train; use another method")
    if isinstance(method, MLPHead):
        head = model.get_classifier()
        if isinstance(head, tuple):
            refuse("head_dist", name_of(model.head_dist), "an MLP head fits models with one head")
        if type(head) is not nn.Linear:
            refuse("head", name_of(head), "a Linear is needed; pass num_classes=...")


_COSINE = (
    "its cosine attention with a position bias from an MLP is not known, use a swin_* model of the "
    "first version"
)
_MISSING = {
    "SwinTransformerV2": _COSINE,
    "SwinTransformerV2Cr": _COSINE,
    "Beit": "its attention adds a table of relative positions to the scores, which the kernels of "
    "whole images do not; use an EVA02 or a DINOv2 model",
    "Hiera": "its blocks pool tokens and attend within mask units, so that prompts have no place "
    "between them",
    "NaFlexVit": "its images have different numbers of tokens and a mask in every batch, which the "
    "kernels of whole images do not know; use the model's form for images of one size",
}
"""What is missing for some of timm's other transformers, by class."""


def _not_known(model: Any) -> str:
    known = " or ".join(f"timm {name}" for name in KNOWN)
    message = f"cannot tune a {name_of(model)}: a {known} is needed"
    for kind in type(model).__mro__:
        if kind.__name__ in _MISSING:
            return f"{message}; {_MISSING[kind.__name__]}"
    if isinstance(model, torch.jit.ScriptModule):
        return f"{message}; tune the model before scripting it"
    return f"{message}, as timm.create_model('vit_base_patch16_224') makes it"
