"""Models on the meta device run, get values later, and can be restored."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from support.formulations import plain_swin
from support.formulations.families import build, images
from support.formulations.plain import distance, redraw_prompts
from support.snapshots import assert_same_model, snapshot

from vpt_fast import (
    VAPT,
    AdapterTuning,
    BiasTuning,
    FullTuning,
    LinearProbe,
    MLPHead,
    PartialTuning,
    VPTDeep,
    VPTShallow,
    prompt_tune,
    remove_prompts,
)

METHODS: dict[str, Any] = {
    "linear": LinearProbe(), "shallow": VPTShallow(2, project_dim=4), "deep": VPTDeep(2),
    "vapt": VAPT(2), "adapter": AdapterTuning(4), "mlp head": MLPHead(2), "bias": BiasTuning(),
    "partial": PartialTuning(1), "full": FullTuning(),
}  # fmt: skip
FAMILIES = ("vit", "siglip_map", "qk_norm", "tiny")


def built(family: str) -> Any:
    return plain_swin.build(family) if family == "tiny" else build(family)


def given(family: str) -> Any:
    return plain_swin.images(family) if family == "tiny" else images(family)


@pytest.mark.covering
@pytest.mark.parametrize("memory", ["speed", "minimal"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_forward_and_backward(family: str, method: str, memory: str) -> None:
    model = prompt_tune(built(family), METHODS[method], memory)
    expected = model(given(family)).shape
    model.to("meta")
    output = model(given(family).to("meta"))
    assert output.shape == expected and output.is_meta
    output.sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.grad is None or parameter.grad.shape == parameter.shape
    with torch.inference_mode():
        assert model(given(family).to("meta")).shape == expected


@pytest.mark.covering
@pytest.mark.parametrize("how", ["assign", "to_empty", "plain"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["vit", "tiny"])
def test_filled_later(family: str, method: str, how: str) -> None:
    """It computes with the new values, and is timm's again when its prompts are removed."""
    plain = built(family)
    flags = {name: p.requires_grad for name, p in plain.named_parameters()}
    source = prompt_tune(built(family), METHODS[method])
    redraw_prompts(source)
    # Rebuilt, as moving would copy the buffers' values too.
    model = prompt_tune(built(family).to("meta"), METHODS[method])
    state = source.state_dict()
    if how == "to_empty":
        model.to_empty(device="cpu")
        model.load_state_dict(state)
    elif how == "assign":
        model.load_state_dict(state, assign=True)
    else:
        model.to_empty(device="cpu")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.load_state_dict(plain.state_dict())
        model.load_state_dict(
            {n: v for n, v in state.items() if n not in plain.state_dict()}, strict=False
        )
    fill_buffers(model, source)
    assert distance(model.eval()(given(family)), source.eval()(given(family))) == 0
    remove_prompts(model)
    assert type(model) is type(plain)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert distance(model.eval()(given(family)), plain.eval()(given(family))) == 0


def fill_buffers(model: Any, source: Any) -> None:
    """Initialise non-persistent buffers, like timm's `init_non_persistent_buffers`."""
    for (name, buffer), (_, value) in zip(
        model.named_buffers(), source.named_buffers(), strict=True
    ):
        if name not in source.state_dict():
            place, _, leaf = name.rpartition(".")
            model.get_submodule(place)._buffers[leaf] = value.clone().to(buffer.dtype)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["vit", "tiny"])
def test_prompts_that_were_not_filled(family: str, method: str) -> None:
    """They are named in an error; the model does not compute without them."""
    plain = built(family)
    model = prompt_tune(built(family).to("meta"), METHODS[method])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.load_state_dict(plain.state_dict(), assign=True)
    fill_buffers(model, plain)
    if not [name for name, p in model.named_parameters() if p.is_meta]:
        assert torch.isfinite(model(given(family))).all()
        return
    with pytest.raises((ValueError, RuntimeError), match="meta"):
        model(given(family))
    with pytest.raises((ValueError, RuntimeError), match="meta"), torch.inference_mode():
        model(given(family))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["vit", "tiny"])
def test_moved_there_and_given_back_there(family: str, method: str) -> None:
    plain = built(family).to("meta")
    before = snapshot(plain)
    remove_prompts(prompt_tune(plain, METHODS[method]))
    assert_same_model(plain, {k: v for k, v in before.items() if k != "attributes"})
    moved = prompt_tune(built(family), METHODS[method]).to("meta")
    remove_prompts(moved)
    assert all(p.is_meta for p in moved.parameters())
