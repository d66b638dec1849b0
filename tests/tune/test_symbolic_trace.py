"""torch.fx and torchvision's feature extractor trace tuned and baked models as timm's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.cases import SWIN, build, images
from support.formulations import eva_families
from support.formulations.plain import distance, redraw_prompts
from support.formulations.plain_baselines import redraw_added
from torch.fx import symbolic_trace
from torchvision.models.feature_extraction import create_feature_extractor

from vpt_fast import bake, methods, prompt_tune, trainable_parameters
from vpt_fast.methods import METHODS as ALL
from vpt_fast.methods.baselines import AdapterTuning


def small(name: str, cls: Any) -> Any:
    if name in ("adapter", "bpt"):
        return AdapterTuning(4) if name == "adapter" else cls(num_prompts=2, rank=4)
    return cls(num_prompts=2) if issubclass(cls, methods.PromptMethod) else cls()


SMALL: dict[str, Any] = {name: small(name, cls) for name, cls in ALL.items()}
NOT_IN_SWIN = ("cvpt", "gate-vpt", "vpt-shallow", "dvpt")


def redrawn(model: Any) -> Any:
    redraw_prompts(model), redraw_added(model)
    return model.eval()


def tuned(family: str, method: str) -> Any:
    if method == "mlp-head" and family == "deit_distilled":
        pytest.skip("an MLP head fits models with one head")
    return redrawn(prompt_tune(build(family), SMALL[method]))


def output_of(model: Any, part: Any, x: torch.Tensor) -> Any:
    """Return what a hook sees leave a part of a model."""
    seen: list[Any] = []
    hook = part.register_forward_hook(lambda _, inputs, output: seen.append(output))
    model(x)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("family", ["vit", "siglip_map", "deit_distilled", "mae"])
@pytest.mark.parametrize("method", SMALL)
def test_tuned_and_baked_models(family: str, method: str) -> None:
    x, model = images(family), tuned(family, method)
    before = copy.deepcopy(model).state_dict()
    with torch.no_grad():
        expected = model(x)
        for one in (model, bake(model)):
            assert distance(symbolic_trace(one)(x), expected) <= 1e-10
            block = output_of(one, one.blocks[1], x)
            nodes = {"blocks.1": "block", "norm": "norm"}
            found = create_feature_extractor(one, nodes)(x)
            assert distance(found["block"], block) <= 1e-10
            assert found["norm"].shape == found["block"].shape
    assert list(model.state_dict()) == list(before)
    copy.deepcopy(model)


@pytest.mark.parametrize("method", [name for name in SMALL if name not in NOT_IN_SWIN])
def test_swin(method: str) -> None:
    x, model = images(SWIN), tuned(SWIN, method)
    with torch.no_grad():
        assert distance(symbolic_trace(model)(x), model(x)) <= 1e-10
        found = create_feature_extractor(model, {"layers.1.blocks.0": "block"})(x)["block"]
        assert distance(found, output_of(model, model.layers[1].blocks[0], x)) <= 1e-10


@pytest.mark.parametrize("method", ["vpt-shallow", "dvpt"])
def test_rows_that_pass_beside_the_tokens_are_refused(method: str) -> None:
    model = tuned(SWIN, method) if method == "vpt-shallow" else redrawn(
        prompt_tune(build(SWIN), methods.find_method("dvpt")(2, source="feature"))
    )  # fmt: skip
    with pytest.raises(ValueError, match="cannot trace a Swin.*use forward_intermediates"):
        symbolic_trace(model)


@pytest.mark.parametrize("family", [*eva_families.FAMILIES][:3])
@pytest.mark.parametrize("method", ["vpt-deep", "vapt", "e2vpt", "vpt-shallow"])
def test_eva(family: str, method: str) -> None:
    model = redrawn(prompt_tune(eva_families.build(family), SMALL[method]))
    x = eva_families.images(family)
    with torch.no_grad():
        for one in (model, bake(model)):
            assert distance(symbolic_trace(one)(x), model(x)) <= 1e-10


@pytest.mark.parametrize("method", ["vpt-deep", "vapt", "vpt-shallow", "cvpt", "bias"])
def test_a_traced_model_trains_the_models_parameters(method: str) -> None:
    x, model = images("vit"), tuned("vit", method)
    own = dict(trainable_parameters(model))
    expected = torch.autograd.grad(model(x).square().sum(), [*own.values()])
    found = torch.autograd.grad(symbolic_trace(model)(x).square().sum(), [*own.values()])
    for name, one, other in zip(own, found, expected, strict=True):
        assert distance(one, other) <= 1e-9, name


def test_parts_of_blocks_are_nodes() -> None:
    model = tuned("vit", "vpt-deep")
    x = images("vit")
    found = create_feature_extractor(model, ["blocks.0.mlp", "blocks.1.attn", "head"])(x)
    assert [*found] == ["blocks.0.mlp", "blocks.1.attn", "head"]
    assert distance(found["head"], model(x)) <= 1e-10


@pytest.mark.parametrize("baked", [False, True])
def test_a_graph_has_no_masks(baked: bool) -> None:
    x, model = images("vit"), tuned("vit", "vpt-deep")
    graph = symbolic_trace(bake(model) if baked else model)
    mask = torch.zeros(1, 1, 10, 10, dtype=x.dtype)
    for more in ({"attn_mask": mask}, {"is_causal": True}):
        with pytest.raises(ValueError, match="takes neither attn_mask nor is_causal"):
            graph(x, **more)


def test_torch_jit() -> None:
    x = images("vit")
    for family in ("vit", SWIN):
        model = tuned(family, "vpt-deep")
        with pytest.raises(ValueError, match=r"torch\.jit\.trace; trace vpt_fast\.bake\(model\)"):
            torch.jit.trace(model, images(family))
        with pytest.raises(ValueError, match=r"cannot be scripted; torch\.jit\.trace takes vpt_f"):
            torch.jit.script(model)
    model = tuned("vit", "vapt")
    baked = bake(model)
    with pytest.raises(ValueError, match="cannot be scripted; torch.jit.trace and torch.export"):
        torch.jit.script(baked)
    with torch.no_grad():
        assert distance(torch.jit.trace(baked, x)(x), model(x)) <= 1e-10
