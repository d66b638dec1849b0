"""What a model makes of one fixed image: shows what neither weights nor attributes do."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vpt_fast.adapter.fingerprint import difference, fingerprint

# Relative to the norm. Of ViT-S/16 with random weights 1.3e-2 if bf16 is computed in; of four kinds
# of models up to 1.2e-2 in 36 trials if weights are rounded to bf16 and back.
_TOLERANCE = {"float32": 1e-2, "float64": 1e-2}
_OF_16_BITS = 1e-1


@torch.no_grad()
def seen_in_fixed_image(model: nn.Module) -> dict[str, Any] | None:
    """Features that enter the classifier, and logits, of one image of fixed noise.

    Args:
        model: a tuned model. Its mode is as before afterwards; CUDA graphs, autocast and compiled
            code are left out of it.

    Returns:
        "dtype" of the computation, a `fingerprint` of "features" and "logits", and a "scale" of
        logits: those of a few classes may be near 0 by chance. None if they are not finite.
    """
    vit: Any = model
    weight: Tensor = vit.patch_embed.proj.weight
    # RandomState's stream is frozen by NumPy's compatibility policy.
    noise = np.random.RandomState(0).standard_normal((1, vit.in_chans, *vit.patch_embed.img_size))
    image = torch.from_numpy(noise).to(weight.device, weight.dtype)
    heads = vit.get_classifier()
    head = heads[0] if isinstance(heads, tuple) else heads
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
            found["logits"] = vit.forward(image)
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


def seen_differently(
    have: Mapping[str, Any], expected: Mapping[str, Any], rounded: bool = False
) -> str:
    """Say how two models see the fixed image differently; "" if they do not.

    Args:
        have: `seen_in_fixed_image` of the model.
        expected: of the one that it should be.
        rounded: whether the weights of one have been rounded.
    """
    types = {have["dtype"], expected["dtype"]}
    tolerance = max(_TOLERANCE.get(name, _OF_16_BITS) for name in types)
    tolerance = _OF_16_BITS if rounded else tolerance
    mine, other = (
        {name: found[name] for name in ("features", "logits")} for found in (have, expected)
    )
    return difference(mine, other, tolerance, {"logits": have["scale"]})
