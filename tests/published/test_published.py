"""Published methods against their equations on concatenated prompts."""

from __future__ import annotations

import pytest
import torch
from support.formulations.isotropic import built
from support.formulations.plain import assert_same
from support.formulations.plain_published import METHODS, pair
from support.formulations.plain_vapt import seeded

from vpt_fast.ops.memory_modes import MEMORY_MODES

VIT = ("vit", "deit_distilled", "deit3", "mae", "siglip_map", "qk_norm", "no_bias", "dinov2_swiglu")
EVA = ("dinov3", "eva02_swiglu_norm", "rope_mixed", "gated", "qk_norm", "eva02_clip")


@pytest.mark.covering
@pytest.mark.parametrize("memory", MEMORY_MODES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", [*VIT, *(f"{name} eva" for name in EVA)])
def test_equals_its_equations(family: str, method: str, memory: str) -> None:
    """Logits and every trained gradient, in training with the same dropout and in eval mode."""
    base, image = built(family)
    tuned, plain = pair(base, METHODS[method], memory)
    for training in (False, True):
        tuned.train(training)
        plain.training = training
        expected, output = seeded(plain, image), seeded(tuned, image)
        assert_same(tuned, plain, output, expected)


@pytest.mark.parametrize("method", METHODS)
def test_features(method: str) -> None:
    """Of models that timm calls block by block, where no feature of the image is needed."""
    base, image = built("mae")
    tuned, plain = pair(base, METHODS[method])
    tuned.eval()
    with torch.no_grad():
        features = plain.features(image)
        assert torch.allclose(tuned.forward_features(image), features, rtol=0, atol=1e-10)
        if "feature" in method:
            with pytest.raises(ValueError, match="come from a feature of the image"):
                tuned.forward_intermediates(image)
        else:
            _, found = tuned.forward_intermediates(image, norm=True)
            assert torch.allclose(found[-1].flatten(2).mT, features[:, 1:], rtol=0, atol=1e-10)
