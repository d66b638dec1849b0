"""Linears of quantised weights are called as they are, and compared with prompts concatenated."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support import cases
from support.formulations import eva_families, plain_eva, plain_swin
from support.formulations.plain import Plain, distance, gradients, redraw_prompts
from support.formulations.plain_vapt import PlainVAPT
from torch import Tensor, nn

import vpt_fast
from vpt_fast import CVPT, VAPT, AdapterTuning, GateVPT, VPTDeep, VPTShallow

torchao = pytest.importorskip("torchao.quantization")

METHODS: dict[str, Any] = {"deep": VPTDeep(3), "shallow": VPTShallow(3), "vapt": VAPT(2)}


def build(family: str) -> Any:
    """Build a model in fp32, the widest type that torchao quantises."""
    return cases.build(family).float()


def images(family: str) -> Tensor:
    return cases.images(family).float()


def frozen_linear(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and not module.weight.requires_grad


def quantised(model: Any, all_but_trained: bool = False) -> Any:
    """Convert to int8 the Linears of the blocks, or all that are frozen, in place."""
    config = torchao.Int8WeightOnlyConfig()
    if all_but_trained:
        torchao.quantize_(model, config, frozen_linear)
    else:
        torchao.quantize_(model.blocks, config)
    return model


def plain_of(family: str, method: Any, tuned: Any) -> Any:
    """Return quantised timm with the tuned model's prompts concatenated."""
    kind = PlainVAPT if isinstance(method, VAPT) else Plain
    plain = kind(build(family), method, tuned.state_dict())
    quantised(plain.model)
    return plain


@pytest.mark.parametrize("memory", ["speed", "minimal"])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", ["vit", "qk_norm", "siglip_average"])
def test_prompts_over_int8_weights(family: str, name: str, memory: str) -> None:
    """Logits and every gradient are those of quantised timm, not of the weights from before."""
    method, given = METHODS[name], images(family)
    tuned = vpt_fast.prompt_tune(build(family), method, memory)
    redraw_prompts(tuned)
    tuned.eval()
    before = tuned(given).detach()
    quantised(tuned, all_but_trained=True)
    assert "Int8" in type(tuned.blocks[0].attn.qkv.weight).__name__
    plain = plain_of(family, method, tuned)
    have, want = tuned(given), plain(given)
    error = distance(before, want)
    assert distance(have, want) <= 1e-5 < 1e-3 < error
    ours = gradients(have, dict(vpt_fast.trainable_parameters(tuned)))
    theirs = gradients(want, plain.trained)
    assert ours.keys() == theirs.keys()
    for key, found in ours.items():
        assert distance(found, theirs[key]) <= 1e-4, key


@pytest.mark.parametrize(
    "method", [VPTDeep(2), VAPT(2), CVPT(2), GateVPT(2), AdapterTuning(4)], ids=repr
)
def test_either_order_and_every_way_out(method: Any, tmp_path: Path) -> None:
    given = images("vit")
    tuned = vpt_fast.prompt_tune(quantised(build("vit")), method).eval()
    other = vpt_fast.prompt_tune(build("vit"), method).eval()
    trained = {n: p.detach() for n, p in vpt_fast.trainable_parameters(tuned)}
    other.load_state_dict(trained, strict=False)
    quantised(other, all_but_trained=True)
    expected = tuned(given).detach()
    assert distance(other(given), expected) <= 1e-6
    assert distance(vpt_fast.bake(tuned)(given), expected) <= 1e-5
    assert distance(copy.deepcopy(tuned)(given), expected) <= 1e-6
    vpt_fast.save_adapter(tuned, tmp_path / "adapter")
    again = vpt_fast.load_adapter(quantised(build("vit")), tmp_path / "adapter").eval()
    assert distance(again(given), expected) <= 1e-6
    with pytest.raises(ValueError, match=r"cannot fold blocks\.0\.\S+: .* a Linear of Int8Tensor"):
        vpt_fast.fold_backbone(tuned)
    vpt_fast.remove_prompts(tuned)
    assert distance(tuned(given), quantised(build("vit")).eval()(given)) <= 1e-6


def test_compiled() -> None:
    torch._dynamo.reset()
    tuned = quantised(vpt_fast.prompt_tune(build("vit"), VPTDeep(2)).eval())
    given = images("vit")
    compiled = torch.compile(tuned, backend="eager", fullgraph=True)
    assert distance(compiled(given), tuned(given)) <= 1e-6


def test_initial_values_from_the_quantised_weights() -> None:
    """Modules that are initialised from a block's weights are given what int8 stands for."""
    method = VPTDeep(2, init="spt-mean")
    dequantised = build("vit")
    tuned = vpt_fast.prompt_tune(quantised(build("vit")), method)
    with_values_of(dequantised, tuned)
    other = vpt_fast.prompt_tune(dequantised, method)
    torch.manual_seed(0)
    vpt_fast.initialise(tuned, [images("vit")])
    torch.manual_seed(0)
    vpt_fast.initialise(other, [images("vit")])
    for (name, found), (_, want) in zip(
        vpt_fast.trainable_parameters(tuned), vpt_fast.trainable_parameters(other), strict=True
    ):
        assert distance(found, want) <= 1e-6, name


def with_values_of(plain: nn.Module, source: nn.Module) -> None:
    """Give a plain model's Linears what the quantised Linears of the same names stand for."""
    linears = dict(source.named_modules())
    with torch.no_grad():
        for name, module in plain.named_modules():
            if isinstance(module, nn.Linear):
                weight = linears[name].weight
                values = weight.dequantize() if "Int8" in type(weight).__name__ else weight
                module.weight.copy_(values)


@pytest.mark.parametrize("name", ["eva02_glu", "dinov3_qkvb", "pe_core"])
def test_evas(name: str) -> None:
    """Packed projections with biases apart, which timm's own call breaks on, and three of them."""
    given = eva_families.images(name).float()
    tuned, plain = plain_eva.pair(eva_families.build(name).float(), VPTDeep(3))
    quantised(tuned.eval())
    with_values_of(plain.model, tuned)
    assert distance(tuned(given), plain(given)) <= 1e-5


def test_swins() -> None:
    given = plain_swin.images("window4").float()
    tuned, plain = plain_swin.pair(plain_swin.build("window4").float(), VPTDeep(3))
    torchao.quantize_(tuned.eval(), torchao.Int8WeightOnlyConfig(), frozen_linear)
    with_values_of(plain.model, tuned)
    assert distance(tuned(given), plain(given)) <= 1e-5
