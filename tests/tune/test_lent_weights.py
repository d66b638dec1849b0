"""Weights that are present during a call only, or are changed before backward recomputes."""

from __future__ import annotations

import copy

import pytest
import torch
from support.changes import blocks_of, lend_weights
from support.formulations import plain_swin
from support.formulations.families import build, images
from support.formulations.plain import VARIANTS, distance, gradients, redraw_prompts
from torch import nn

from vpt_fast import VAPT, VPTDeep, prompt_tune
from vpt_fast.ops.memory_modes import MEMORY_MODES

SWIN = "window4"


@pytest.mark.parametrize("memory", MEMORY_MODES)
@pytest.mark.parametrize("change", ["edited", "replaced"])
@pytest.mark.parametrize("family", ["qk_norm", "qk_norm_rms", SWIN])
def test_weights_that_change_before_backward_are_refused(
    family: str, change: str, memory: str
) -> None:
    """Module by module; in "speed" autograd refuses, or has saved the replaced weight."""
    swin = family == SWIN
    base = plain_swin.build(family) if swin else build(family)
    tuned = prompt_tune(base, VPTDeep(3), memory)
    redraw_prompts(tuned)
    given = plain_swin.images(family) if swin else images(family)
    block = blocks_of(tuned)[1]
    if swin:
        block.mlp.register_forward_hook(lambda *_: None)  # so that it is not fused
    trained = {n: p for n, p in tuned.named_parameters() if p.requires_grad}
    expected = gradients(tuned(given), trained)
    output = tuned(given)
    with torch.no_grad():
        weight = block.mlp.fc2.weight
        if change == "edited":
            weight.mul_(1.5)
        else:
            block.mlp.fc2.weight = nn.Parameter(1.5 * weight, requires_grad=False)
    if change == "replaced" and memory == "speed":
        found = gradients(output, trained)
        assert all(distance(found[name], expected[name]) <= 1e-12 for name in expected)
        return
    wanted = "replaced between" if change == "replaced" else "modified by an inplace operation"
    with pytest.raises(RuntimeError, match=wanted):
        output.sum().backward()
    assert distance(tuned(given), output) > 1e-6
    tuned(given).sum().backward()


@pytest.mark.parametrize("family", ["vit", "siglip_average", "qk_norm", "deit_distilled", SWIN])
@pytest.mark.parametrize("variant", ["linear", "shallow", "deep", "projected", "shared", "vapt"])
def test_weights_that_are_present_only_while_a_module_is_called(variant: str, family: str) -> None:
    swin = family == SWIN
    if swin and variant in ("projected", "shared"):
        pytest.skip("stages have their own widths")
    method = VAPT(2) if variant == "vapt" else VARIANTS[variant](3)
    given = plain_swin.images(family) if swin else images(family)
    tuned = prompt_tune(plain_swin.build(family) if swin else build(family), method).eval()
    redraw_prompts(tuned)
    with torch.no_grad():
        expected = tuned(given)
        if variant == "vapt":
            refused = copy.deepcopy(tuned)
            lend_weights(refused)
            with pytest.raises(ValueError, match="prompt experts' weights are on the meta device"):
                refused(given)
        lend_weights(tuned, kept="prompt" if variant == "vapt" else "-")
        assert distance(tuned(given), expected) <= 1e-12


@pytest.mark.parametrize("memory", MEMORY_MODES)
def test_prompts_train_where_weights_are_lent(memory: str) -> None:
    tuned = prompt_tune(build("vit"), VPTDeep(3), memory)
    redraw_prompts(tuned)
    given = images("vit")
    trained = {n: p for n, p in tuned.named_parameters() if p.requires_grad}
    expected = gradients(tuned(given), trained)
    lend_weights(tuned)
    found = gradients(tuned(given), trained)
    assert all(distance(found[name], expected[name]) <= 1e-10 for name in expected)
