"""Wrappers of models: work is done on the timm model inside, or refused with what to pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.cases import build, images
from support.unchanged import assert_unchanged, snapshot
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DataParallel, DistributedDataParallel

import vpt_fast
from vpt_fast import VAPT, VPTDeep
from vpt_fast.adapter.files import read_config
from vpt_fast.models.interop.wrappers import inner_model


def assert_same_adapters(one: Path, other: Path) -> None:
    """Assert equal files; outputs for the fixed image to rounding."""
    found, expected = read_config(one), read_config(other)
    outputs = [config.pop("fixed_image") for config in (found, expected)]
    for config in (found, expected):
        del config["config_sha256"]
    assert found == expected
    assert outputs[0]["dtype"] == outputs[1]["dtype"]
    for name in ("features", "logits"):
        assert outputs[0][name] == pytest.approx(outputs[1][name], rel=1e-10)


@pytest.fixture
def one_process(tmp_path: Path) -> Any:
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class TimmWrapperForSomething(nn.Module):
    """A module as transformers' TimmWrapperForImageClassification."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.timm_model = model

    def forward(self, pixel_values: torch.Tensor) -> Any:
        return self.timm_model(pixel_values)


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


WRAPPERS: dict[str, Any] = {
    "compiled": compiled,
    "data_parallel": DataParallel,
    "ddp": DistributedDataParallel,
    "hugging_face": TimmWrapperForSomething,
    "two": lambda model: compiled(TimmWrapperForSomething(model)),
    "compiled_ddp": lambda model: compiled(DistributedDataParallel(model)),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_tuned_model_inside(name: str, one_process: None, tmp_path: Path) -> None:
    torch._dynamo.reset()
    x, model = images("vit"), vpt_fast.prompt_tune(build("vit"), VAPT(2)).eval()
    vpt_fast.save_adapter(model, tmp_path / "plain")
    names = [name for name, _ in vpt_fast.trainable_parameters(model)]
    counts, wrapped = vpt_fast.count_parameters(model), WRAPPERS[name](model)
    assert inner_model(wrapped) is model
    vpt_fast.save_adapter(wrapped, tmp_path / "wrapped")
    assert_same_adapters(tmp_path / "plain", tmp_path / "wrapped")
    assert vpt_fast.count_parameters(wrapped) == counts
    assert [name for name, _ in vpt_fast.trainable_parameters(wrapped)] == names
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(vpt_fast.bake(wrapped)(x), expected, rtol=1e-9, atol=1e-9)
    assert vpt_fast.active_adapter(wrapped) == "default"
    if "ddp" in name:
        before = snapshot(model)
        for call in (
            lambda: vpt_fast.remove_prompts(wrapped),
            lambda: vpt_fast.add_adapter(wrapped, "other", VPTDeep(2)),
        ):
            with pytest.raises(ValueError, match=r"DistributedDataParallel.*pass its \.module"):
                call()
            assert_unchanged(model, before)
        return
    vpt_fast.add_adapter(wrapped, "other", VPTDeep(2))
    with vpt_fast.disabled(wrapped), torch.no_grad():
        assert torch.equal(wrapped(x), build("vit").eval()(x))
    vpt_fast.set_adapter(wrapped, "other")
    assert vpt_fast.remove_prompts(wrapped) is wrapped
    with torch.no_grad():
        assert torch.equal(wrapped(x), build("vit").eval()(x))


@pytest.mark.parametrize("name", ["compiled", "data_parallel", "hugging_face"])
def test_a_plain_model_inside(name: str, tmp_path: Path) -> None:
    torch._dynamo.reset()
    x, model = images("vit"), vpt_fast.prompt_tune(build("vit"), VPTDeep(2)).eval()
    vpt_fast.save_adapter(model, tmp_path / "adapter")
    wrapped = WRAPPERS[name](build("vit"))
    assert vpt_fast.load_adapter(wrapped, tmp_path / "adapter") is wrapped
    with torch.no_grad():
        assert torch.equal(wrapped.eval()(x), model(x))
    wrapped = WRAPPERS[name](build("vit"))
    assert vpt_fast.prompt_tune(wrapped, VPTDeep(2)) is wrapped
    assert vpt_fast.count_parameters(wrapped) == vpt_fast.count_parameters(model)


def test_other_modules_are_told_what_to_pass(tmp_path: Path) -> None:
    class Lit(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.net = nn.ModuleDict({"backbone": model})

    lit = Lit(vpt_fast.prompt_tune(build("vit"), VPTDeep(2)))
    own = [name for name, _ in vpt_fast.trainable_parameters(lit)]
    assert "net.backbone.head.weight" in own and "net.backbone.pos_embed" not in own
    assert vpt_fast.count_parameters(lit) == vpt_fast.count_parameters(lit.net["backbone"])
    for call in (
        lambda: vpt_fast.save_adapter(lit, tmp_path / "a"),
        lambda: vpt_fast.remove_prompts(lit),
        lambda: vpt_fast.bake(lit),
        lambda: vpt_fast.prompt_tune(Lit(build("vit")), VPTDeep(2)),
        lambda: vpt_fast.load_adapter(Lit(build("vit")), tmp_path),
        lambda: vpt_fast.set_adapter(lit, "other"),
    ):
        with pytest.raises((ValueError, FileNotFoundError)) as refusal:
            call()
        if "is not an adapter" not in str(refusal.value):
            assert "this Lit holds a timm model; pass its .net.backbone" in str(refusal.value)
    assert not (tmp_path / "a").exists()


def test_accelerates_forward(tmp_path: Path) -> None:
    """Its forward runs under autocast, whose rounding must not be in what an adapter records."""
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    model = vpt_fast.prompt_tune(build("vit"), VPTDeep(2))
    vpt_fast.save_adapter(model, tmp_path / "plain")
    prepared = accelerator.prepare(model)
    vpt_fast.save_adapter(prepared, tmp_path / "prepared")
    assert_same_adapters(tmp_path / "plain", tmp_path / "prepared")
    for call in (lambda: vpt_fast.remove_prompts(prepared), lambda: vpt_fast.bake(prepared)):
        with pytest.raises(ValueError, match=r"accelerator\.unwrap_model\(model, keep_fp32_wr"):
            call()
    inner = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    with torch.no_grad():
        x = images("vit")
        expected = vpt_fast.prompt_tune(build("vit"), VPTDeep(2)).eval()
        expected.load_state_dict(inner.state_dict())
        assert torch.equal(vpt_fast.bake(inner)(x), vpt_fast.bake(expected)(x))
        assert torch.equal(vpt_fast.remove_prompts(inner).eval()(x), build("vit").eval()(x))


def test_a_sharded_model(one_process: None, tmp_path: Path) -> None:
    model = vpt_fast.prompt_tune(build("vit").float(), VPTDeep(2)).eval()
    vpt_fast.save_adapter(model, tmp_path / "plain")
    counts = vpt_fast.count_parameters(model)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    vpt_fast.save_adapter(model, tmp_path / "sharded")
    plain, sharded = (
        vpt_fast.load_adapter(build("vit").float(), tmp_path / kind).eval()
        for kind in ("plain", "sharded")
    )
    x = images("vit").float()
    with torch.no_grad():
        assert torch.equal(plain(x), sharded(x))
    configs = [read_config(tmp_path / kind) for kind in ("plain", "sharded")]
    for key in ("tensors_sha256", "fingerprint", "architecture", "model"):
        assert configs[0][key] == configs[1][key]
    assert vpt_fast.count_parameters(model) == counts
    for call in (
        lambda: vpt_fast.remove_prompts(model),
        lambda: vpt_fast.bake(model),
        lambda: vpt_fast.add_adapter(model, "other", VPTDeep(2)),
    ):
        with pytest.raises(ValueError, match="sharded by fully_shard; do this before"):
            call()
