"""Outputs of a model for one fixed image: they show changes that weights and attributes hide."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vpt_fast.adapter.fingerprint import difference, fingerprint
from vpt_fast.models.interop.wrappers import is_sharded
from vpt_fast.tune import classifiers_of

# Relative to the norm. Outputs of ViT-S/16 with random weights differ by 1.3e-2 when computed in
# bf16; those of four kinds of models by up to 1.2e-2 in 36 trials when the weights are rounded to
# bf16 and back.
_TOLERANCE = 1e-2
_TOLERANCE_16_BITS = 1e-1


@torch.no_grad()
def fixed_image_outputs(model: nn.Module) -> dict[str, Any] | None:
    """Return fingerprints of a model's features and logits for one image of fixed noise.

    Args:
        model: Tuned model. It runs in eval mode, without CUDA graphs, autocast and compiled code;
            its modes are restored.

    Returns:
        "dtype" of the computation, `fingerprint` of the classifier's input "features" and of its
        "logits", and "scale", the size that logits have unless they cancel. None if a value is not
        finite.
    """
    vit: Any = model
    weight: Tensor = vit.patch_embed.proj.weight
    # RandomState's stream is frozen by NumPy's compatibility policy.
    noise = np.random.RandomState(0).standard_normal((1, vit.in_chans, *vit.patch_embed.img_size))
    image = torch.from_numpy(noise).to(weight.device, weight.dtype)
    head = classifiers_of(model)[0]
    found: dict[str, Tensor] = {}
    record, modes = vit.tune_record, [(part, part.training) for part in model.modules()]
    graphs, record.graphs = record.graphs, None
    hook = head.register_forward_pre_hook(lambda _, inputs: found.update(features=inputs[0]))
    try:
        model.eval()
        with (
            torch.autocast(weight.device.type, enabled=False),
            torch.compiler.set_stance("force_eager"),
        ):
            # Past a forward that accelerate put on the instance, but with the hooks of shards.
            sharded = is_sharded(model)
            found["logits"] = vit(image) if sharded else type(vit).forward(vit, image)
    finally:
        hook.remove()
        record.graphs = graphs
        for part, training in modes:
            part.training = training
    if not all(bool(torch.isfinite(tensor).all()) for tensor in found.values()):
        return None
    scale = math.sqrt(
        sum(float(part.double().square().sum()) for part in head.parameters() if part.ndim > 1)
    )
    features = found["features"].double()
    return {
        "dtype": str(weight.dtype).removeprefix("torch."),
        "scale": scale * float(features.norm()) / math.sqrt(features.shape[-1]),
        **fingerprint(found),
    }


def different_outputs(
    have: Mapping[str, Any], expected: Mapping[str, Any], rounded: bool = False
) -> str:
    """Return how two models' outputs for the fixed image differ, in words; "" if they do not.

    Args:
        have: `fixed_image_outputs` of the model.
        expected: `fixed_image_outputs` of the model that was saved.
        rounded: Whether the weights of one have been rounded.
    """
    types = {have["dtype"], expected["dtype"]}
    exact = types <= {"float32", "float64"} and not rounded
    mine, other = (
        {name: found[name] for name in ("features", "logits")} for found in (have, expected)
    )
    tolerance = _TOLERANCE if exact else _TOLERANCE_16_BITS
    return difference(mine, other, tolerance, {"logits": have["scale"]})
