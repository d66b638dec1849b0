"""Several adapters on one model: each computes what it computes on a model of its own."""

from __future__ import annotations

import copy
import pickle
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from support.cases import METHODS, SWIN, build, images
from support.formulations.plain import redraw_prompts
from support.formulations.plain_baselines import redraw_added
from support.unchanged import assert_unchanged, snapshot
from torch import Tensor, nn

import vpt_fast
from vpt_fast import E2VPT, VAPT, BiasTuning, FullTuning, LinearProbe, VPTDeep

EVERY = {**METHODS, "e2vpt": E2VPT(2)}


def values_redrawn(model: Any) -> Any:
    """Give all that is trained other values."""
    redraw_prompts(model), redraw_added(model)
    with torch.no_grad():
        for name, parameter in vpt_fast.trainable_parameters(model):
            if "prompt" not in name:
                parameter.mul_(1.2).add_(0.01)
    return model.eval()


def tuned(family: str, method: Any) -> Any:
    return values_redrawn(vpt_fast.prompt_tune(build(family), method))


@torch.no_grad()
def logits(model: nn.Module, x: Tensor) -> Any:
    found = model(x)
    return found if isinstance(found, Tensor) else torch.stack(found)


@pytest.mark.parametrize("family", ["vit", "deit_distilled", "siglip_map", SWIN])
@pytest.mark.parametrize("method", EVERY)
def test_each_adapter_is_as_on_a_model_of_its_own(family: str, method: str, tmp_path: Path) -> None:
    if family == "deit_distilled" and method == "mlp":
        pytest.skip("an MLP head fits models with one head")
    x, plain = images(family), build(family).eval()
    before, base = snapshot(plain), logits(plain, x)
    model = values_redrawn(vpt_fast.prompt_tune(plain, EVERY[method]))
    other = tuned(family, VPTDeep(3))
    vpt_fast.save_adapter(other, tmp_path / "other")
    expected = {"default": logits(model, x), "other": logits(other, x)}
    assert vpt_fast.add_adapter(model, "other", tmp_path / "other") is model
    vpt_fast.add_adapter(model, "new", EVERY[method])
    assert vpt_fast.active_adapter(model) == "default"
    for name in ("other", "default", "new", "other", "default", "other"):
        assert vpt_fast.set_adapter(model, name) is model
        assert vpt_fast.active_adapter(model) == vpt_fast.adapter_names(model)[0] == name
        if name in expected:
            assert torch.equal(logits(model, x), expected[name])
        keys = [n for n, _ in vpt_fast.trainable_parameters(model)]
        alone = other if name == "other" else tuned(family, EVERY[method])
        assert keys == [n for n, _ in vpt_fast.trainable_parameters(alone)]
        assert list(model.state_dict()) == list(alone.state_dict())
        with vpt_fast.disabled(model) as same:
            assert same is model and type(model) is type(build(family))
            assert torch.equal(logits(model, x), base)
        assert vpt_fast.active_adapter(model) == name
    assert_unchanged(vpt_fast.remove_prompts(model), before)
    assert torch.equal(logits(model, x), base)


@pytest.mark.parametrize("first", [VPTDeep(2), FullTuning(), BiasTuning(), VAPT(2)], ids=repr)
@pytest.mark.parametrize("second", [VPTDeep(2), FullTuning(), BiasTuning()], ids=repr)
def test_training_one_leaves_the_others(first: Any, second: Any) -> None:
    x = images("vit")
    model = vpt_fast.prompt_tune(build("vit"), first)
    base = logits(build("vit").eval(), x)
    expected = {"default": logits(values_redrawn(model), x)}
    vpt_fast.add_adapter(model, "second", second)
    vpt_fast.set_adapter(model, "second").train()
    own = [p for _, p in vpt_fast.trainable_parameters(model)]
    optimizer = torch.optim.SGD(own, lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    expected["second"] = logits(model.eval(), x)
    assert not torch.equal(expected["second"], base)
    for name in ("default", "second", "default"):
        assert torch.equal(logits(vpt_fast.set_adapter(model, name), x), expected[name])
        with vpt_fast.disabled(model):
            assert torch.equal(logits(model, x), base)
    vpt_fast.set_adapter(model, "second")
    assert [p for _, p in vpt_fast.trainable_parameters(model)] == own  # the optimizer's


def test_another_number_of_classes(tmp_path: Path) -> None:
    x = images("vit")
    plain = build("vit")
    plain.reset_classifier(9)
    with torch.no_grad():
        plain.head.weight.normal_(generator=torch.Generator().manual_seed(1))
    other = values_redrawn(vpt_fast.prompt_tune(plain, VPTDeep(2)))
    vpt_fast.save_adapter(other, tmp_path / "nine")
    model = tuned("vit", VPTDeep(2))
    expected = logits(model, x)
    vpt_fast.add_adapter(model, "nine", tmp_path / "nine")
    vpt_fast.add_adapter(model, "three", LinearProbe(), num_classes=3)
    vpt_fast.set_adapter(model, "nine")
    assert model.num_classes == 9 and torch.equal(logits(model, x), logits(other, x))
    vpt_fast.set_adapter(model, "three")
    assert model.num_classes == 3 and logits(model, x).shape == (len(x), 3)
    vpt_fast.save_adapter(model, tmp_path / "three")
    loaded = build("vit")
    loaded.reset_classifier(3)
    again = vpt_fast.load_adapter(loaded, tmp_path / "three").eval()
    assert torch.equal(logits(again, x), logits(model, x))
    vpt_fast.set_adapter(model, "default")
    assert model.num_classes == len(model.head.bias) and torch.equal(logits(model, x), expected)


def test_conversions_copies_and_pickles_take_all_adapters_along() -> None:
    x, model = images("vit"), tuned("vit", VPTDeep(2))
    vpt_fast.add_adapter(model, "full", FullTuning())
    values_redrawn(vpt_fast.set_adapter(model, "full"))
    vpt_fast.add_adapter(model, "vapt", VAPT(2))
    names = vpt_fast.adapter_names(model)
    expected = {name: logits(vpt_fast.set_adapter(model, name), x) for name in names}
    single = copy.deepcopy(model).float()
    for name in names:
        found = logits(vpt_fast.set_adapter(single, name), x.float())
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected[name], rtol=1e-4, atol=1e-4)
    with vpt_fast.disabled(single):
        assert logits(single, x.float()).dtype == torch.float32
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for name in ("default", "full"):
            vpt_fast.set_adapter(other, name)
            assert torch.equal(logits(other, x), expected[name])
            with torch.no_grad():
                for _, parameter in vpt_fast.trainable_parameters(other):
                    parameter.zero_()
    for name in names:
        assert torch.equal(logits(vpt_fast.set_adapter(model, name), x), expected[name])


def test_modes_follow_the_model() -> None:
    model = vpt_fast.prompt_tune(build("vit"), VPTDeep(2, dropout=0.5)).train()
    vpt_fast.add_adapter(model, "other", VPTDeep(2, dropout=0.5))
    model.eval()
    vpt_fast.set_adapter(model, "other")
    assert not any(module.training for module in model.modules())
    model.train()
    vpt_fast.set_adapter(model, "default")
    assert model.blocks[0].prompt.training and model.head.training
    assert not model.blocks[0].attn.training


def test_folded_weights_stay_folded() -> None:
    x, model = images("vit"), tuned("vit", VPTDeep(2))
    vpt_fast.fold_backbone(model)
    vpt_fast.add_adapter(model, "other", VAPT(2))
    base = logits(build("vit").eval(), x)
    for name in ("other", "default"):
        folded = logits(vpt_fast.set_adapter(model, name), x)
        assert model.tune_record.fold is not None
        with vpt_fast.disabled(model):
            assert torch.equal(logits(model, x), base)
        copied = copy.deepcopy(model)
        keys = copied.state_dict()
        unfolded = vpt_fast.prompt_tune(build("vit"), model.tune_record.method).eval()
        unfolded.load_state_dict(keys)
        torch.testing.assert_close(folded, logits(unfolded, x), rtol=1e-9, atol=1e-9)
    vpt_fast.add_adapter(model, "bias", BiasTuning())
    before = snapshot(model)
    with pytest.raises(ValueError, match="folded.*'bias'.*fold then"):
        vpt_fast.set_adapter(model, "bias")
    assert_unchanged(model, before)
    vpt_fast.set_adapter(model, "other")
    assert torch.equal(logits(vpt_fast.remove_prompts(model), x), base)


def test_a_switch_reads_no_weight_again() -> None:
    """Under autocast, copies of frozen weights are made once for all adapters."""
    model = vpt_fast.prompt_tune(build("vit").float(), VPTDeep(2)).eval()
    vpt_fast.add_adapter(model, "other", VPTDeep(2))
    x = images("vit").float()

    def copies() -> list[int]:
        with torch.autocast("cpu", torch.bfloat16):
            logits(model, x)
        return [id(block._reading.known.held()) for block in model.blocks[:-1]]

    first = copies()
    assert all(model.blocks[0]._reading.known.held() is not None for _ in first)
    assert copies() == first
    for name in ("other", "default"):
        vpt_fast.set_adapter(model, name)
        assert copies() == first
    with vpt_fast.disabled(model):
        pass
    assert copies() == first


@pytest.mark.parametrize("method", [VPTDeep(2), VAPT(2)], ids=repr)
def test_a_compiled_model_is_not_compiled_again(method: Any) -> None:
    model = vpt_fast.prompt_tune(build("vit"), method).eval()
    vpt_fast.add_adapter(model, "other", method)
    x = images("vit")
    expected = {}
    for name in ("other", "default"):
        values_redrawn(vpt_fast.set_adapter(model, name))
        with torch.no_grad():
            model.head.bias.add_(len(name))
        expected[name] = logits(model, x)
    torch._dynamo.reset()
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(model, backend=backend)
    torch.testing.assert_close(logits(compiled, x), expected["default"])
    count = len(graphs)
    for name in ("other", "default", "other"):
        vpt_fast.set_adapter(compiled, name)
        torch.testing.assert_close(logits(compiled, x), expected[name])
    assert len(graphs) == count
    assert not torch.equal(expected["other"], expected["default"])


def test_a_switch_of_vit_b_takes_milliseconds() -> None:
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224", num_classes=10)
    vpt_fast.prompt_tune(model, VPTDeep(10))
    vpt_fast.add_adapter(model, "other", VAPT(10))
    times = []
    for name in ("other", "default") * 10:
        start = time.perf_counter()
        vpt_fast.set_adapter(model, name)
        times.append(time.perf_counter() - start)
    assert min(times) < 5e-3
    assert set(vpt_fast.adapter_names(model)) == {"default", "other"}


def test_refusals(tmp_path: Path) -> None:
    model = tuned("vit", VPTDeep(2))
    vpt_fast.add_adapter(model, "other", VPTDeep(2))
    before = snapshot(model)
    wrong: list[tuple[Any, str]] = [
        (lambda: vpt_fast.set_adapter(model, "third"), "no adapter 'third'; there are default, o"),
        (lambda: vpt_fast.add_adapter(model, "other", VPTDeep(2)), "'other' already"),
        (lambda: vpt_fast.add_adapter(model, "", VPTDeep(2)), "name is ''"),
        (lambda: vpt_fast.add_adapter(model, "x", tmp_path / "none"), "is not an adapter"),
        (lambda: vpt_fast.add_adapter(model, "x", tmp_path, num_classes=3), "leave it out"),
        (lambda: vpt_fast.add_adapter(model, "x", VPTDeep(2), num_classes=-1), "num_classes is -1"),
        (lambda: vpt_fast.add_adapter(model, "x", 3), "3"),  # type: ignore[arg-type]
        (lambda: vpt_fast.add_adapter(model, "x", VPTDeep(2, blocks=[7])), "7"),
        (lambda: vpt_fast.delete_adapter(model, "default"), "remove_prompts deletes all"),
        (lambda: vpt_fast.delete_adapter(model, "third"), "no adapter 'third'"),
        (lambda: vpt_fast.active_adapter(build("vit")), "is not tuned; call prompt_tune"),
    ]
    for call, words in wrong:
        with pytest.raises((ValueError, TypeError, FileNotFoundError)) as refusal:
            call()
        assert words in str(refusal.value)
        assert_unchanged(model, before)
    with vpt_fast.disabled(model):
        for call in (
            lambda: vpt_fast.prompt_tune(model, VPTDeep(2)),
            lambda: vpt_fast.set_adapter(model, "other"),
            lambda: vpt_fast.active_adapter(model),
        ):
            with pytest.raises(ValueError, match="are disabled; leave"):
                call()
    assert_unchanged(model, before)
    vpt_fast.set_adapter(model, "other")
    with pytest.raises(ValueError, match="'other' is active"):
        vpt_fast.delete_adapter(model, "other")
    vpt_fast.set_adapter(model, "default")
    vpt_fast.delete_adapter(model, "other")
    assert vpt_fast.adapter_names(model) == ["default"]


def test_what_all_would_share_is_not_trained() -> None:
    model = tuned("vit", VPTDeep(2))
    vpt_fast.add_adapter(model, "other", VPTDeep(2))
    model.blocks[0].norm2.weight.requires_grad_(True)
    before = snapshot(model)
    for call in (lambda: vpt_fast.set_adapter(model, "other"), lambda: disable(model)):
        with pytest.raises(ValueError, match=r"blocks\.0\.norm2\.weight.*freeze it"):
            call()
        assert_unchanged(model, before)


def disable(model: nn.Module) -> None:
    with vpt_fast.disabled(model):
        pass


def test_another_adapters_damage_changes_nothing(tmp_path: Path) -> None:
    model, other = tuned("vit", FullTuning()), tuned("vit", VPTDeep(2))
    vpt_fast.save_adapter(other, tmp_path / "other")
    with torch.no_grad():
        other = build("vit")
        other.blocks[1].mlp.fc1.weight.mul_(1.5)
    vpt_fast.save_adapter(vpt_fast.prompt_tune(other, VPTDeep(2)), tmp_path / "wrong")
    vpt_fast.add_adapter(model, "other", tmp_path / "other")
    before = snapshot(model)
    with pytest.raises(ValueError, match="another backbone"):
        vpt_fast.add_adapter(model, "wrong", tmp_path / "wrong")
    assert_unchanged(model, before)
    with pytest.raises(RuntimeError, match="mine"), vpt_fast.disabled(model):
        raise RuntimeError("mine")
    assert_unchanged(model, before)
