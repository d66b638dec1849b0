"""LoRA of PEFT beside prompts, compared with the merged weights and prompts concatenated."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support.cases import build, images
from support.changes import with_low_rank
from support.formulations.plain import Plain, distance, gradients, redraw_prompts
from support.formulations.plain_vapt import PlainVAPT
from torch import nn

import vpt_fast
from vpt_fast import VAPT, VPTDeep, VPTShallow

peft = pytest.importorskip("peft")

METHODS: dict[str, Any] = {"deep": VPTDeep(3), "shallow": VPTShallow(3), "vapt": VAPT(2)}


def with_lora(tuned: Any, targets: list[str]) -> Any:
    """Give a tuned model LoRA whose product is not zero; prompts and head are trained too."""
    trained = [parameter for _, parameter in vpt_fast.trainable_parameters(tuned)]
    model = peft.get_peft_model(tuned, peft.LoraConfig(r=2, target_modules=targets))
    for parameter in trained:
        parameter.requires_grad_(True)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.5)
    return model.to(torch.float64)  # PEFT makes its factors in fp32


@pytest.mark.parametrize("targets", [["qkv"], ["fc1", "fc2"], ["qkv", "proj"]], ids="-".join)
@pytest.mark.parametrize("name", METHODS)
def test_lora_and_prompts_train_together(name: str, targets: list[str]) -> None:
    """Logits, and gradients of prompts, head and factors, are those of timm with the same LoRA."""
    method, given = METHODS[name], images("vit")
    tuned = vpt_fast.prompt_tune(build("vit"), method)
    redraw_prompts(tuned)
    state = copy.deepcopy(tuned.state_dict())
    model = with_lora(tuned, targets).eval()
    plain = (PlainVAPT if name == "vapt" else Plain)(build("vit"), method, state)
    before = plain(given).detach()
    config = peft.LoraConfig(r=2, target_modules=targets)
    peft.inject_adapter_in_model(config, plain.model).to(torch.float64)
    factors = {n: p for n, p in tuned.named_parameters() if "lora_" in n}
    theirs = {n: p for n, p in plain.model.named_parameters() if "lora_" in n}
    assert factors and factors.keys() == theirs.keys()
    with torch.no_grad():
        for n, p in theirs.items():
            p.copy_(factors[n])
    for p in plain.trained.values():
        p.requires_grad_(True)
    have, want = model(given), plain(given)
    assert distance(have, want) <= 1e-10 < 1e-3 < distance(before, want)
    ours = gradients(have, dict(vpt_fast.trainable_parameters(tuned)))
    expected = gradients(want, {**plain.trained, **theirs})
    assert ours.keys() == expected.keys()
    for n, found in ours.items():
        assert distance(found, expected[n]) <= 1e-9, n


def test_saved_apart_and_loaded_again(tmp_path: Path) -> None:
    given = images("vit")
    tuned = vpt_fast.prompt_tune(build("vit"), VAPT(2))
    model = with_lora(tuned, ["qkv"]).eval()
    expected = model(given).detach()
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.qkv is PEFT's Linear.*\.unload\(\)"):
        vpt_fast.save_adapter(tuned, tmp_path / "prompts")
    assert not (tmp_path / "prompts").exists()
    model.save_pretrained(str(tmp_path / "lora"))
    vpt_fast.save_adapter(copy.deepcopy(model).unload(), tmp_path / "prompts")
    again = vpt_fast.load_adapter(build("vit"), tmp_path / "prompts")
    again = peft.PeftModel.from_pretrained(again, str(tmp_path / "lora"))
    assert distance(again.to(torch.float64).eval()(given), expected) <= 1e-10
    assert distance(vpt_fast.bake(tuned)(given), expected) <= 1e-10
    assert distance(model.merge_and_unload()(given), expected) <= 1e-10


def test_a_copy_that_the_blocks_do_not_read_is_refused() -> None:
    tuned = vpt_fast.prompt_tune(build("vit"), VAPT(2))
    config = peft.LoraConfig(
        r=2, target_modules=["qkv"], modules_to_save=["prompt_projector", "head"]
    )
    model = peft.get_peft_model(tuned, config)
    for change in (model.train, model.eval):
        with pytest.raises(ValueError, match=r"prompt_projector is shared .* modules_to_save"):
            change()


def test_another_order_is_refused() -> None:
    model = peft.get_peft_model(build("vit"), peft.LoraConfig(r=2, target_modules=["qkv"]))
    with pytest.raises(ValueError, match=r"PeftModel holds a timm model; pass its \.base_model"):
        vpt_fast.prompt_tune(model, VPTDeep(2))
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.qkv is peft.*; tune first"):
        vpt_fast.prompt_tune(model.base_model.model, VPTDeep(2))


def test_what_replaces_a_linear_is_not_saved_as_if_it_could_be_loaded(tmp_path: Path) -> None:
    tuned = vpt_fast.prompt_tune(build("vit"), VPTDeep(2))
    with_low_rank(tuned)
    with pytest.raises(ValueError, match=r"blocks\.0\.\S+ was put into a block after tuning"):
        vpt_fast.save_adapter(tuned, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
