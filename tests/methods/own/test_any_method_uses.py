"""What a method of any form is used for: adapters, baking, banks, tables of attention, copies."""

from __future__ import annotations

import copy
import functools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from support.formulations import isotropic, plain_swin
from support.formulations.any_method import KINDS, AnyMethod
from support.formulations.plain import distance, redraw_prompts

from vpt_fast import (
    PromptBank,
    bake,
    fold_backbone,
    load_adapter,
    prompt_tune,
    remove_prompts,
    save_adapter,
)
from vpt_fast.analysis import shares
from vpt_fast.reference.vit import concatenated

FAMILIES = ("vit", "mae", "dinov3 eva", "qk_norm eva")
BLOCKS = (None, (0, 2), (1, 2))


built = functools.partial(isotropic.built, depth=3)


def tuned_model(family: str, kind: str, blocks: Any = None, **fields: Any) -> tuple[Any, Any]:
    base, image = built(family)
    tuned = prompt_tune(base, AnyMethod(3, kind=kind, blocks=blocks, **fields)).eval()
    redraw_prompts(tuned)
    return tuned, image


@pytest.mark.covering
@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_adapter(family: str, kind: str, blocks: Any, tmp_path: Path) -> None:
    tuned, image = tuned_model(family, kind, blocks, dropout=0.2)
    save_adapter(tuned, tmp_path / "adapter")
    loaded = load_adapter(built(family)[0], tmp_path / "adapter").eval()
    assert torch.equal(loaded(image), tuned(image))
    flags = {name: p.requires_grad for name, p in tuned.named_parameters()}
    assert {name: p.requires_grad for name, p in loaded.named_parameters()} == flags
    assert loaded.tune_record.method == tuned.tune_record.method
    plain, before = remove_prompts(loaded), built(family)[0]
    assert torch.equal(plain(image), before(image)) and type(plain) is type(before)
    assert plain.state_dict().keys() == before.state_dict().keys()
    assert not [n for n, _ in plain.named_modules() if "prompt" in n]


@pytest.mark.covering
@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_baked(family: str, kind: str, blocks: Any) -> None:
    tuned, image = tuned_model(family, kind, blocks)
    baked = bake(tuned)
    assert distance(baked(image), tuned(image)) <= 1e-12
    if family == "vit":
        program = torch.export.export(baked, (image,), strict=False).module()
        assert distance(program(image), tuned(image)) <= 1e-12


@pytest.mark.covering
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_bank_beside_another_task(family: str, kind: str, tmp_path: Path) -> None:
    bank, alone = PromptBank(built(family)[0].eval()), {}
    for number, (name, fields) in enumerate(
        {"own": {"kind": kind}, "other": {"kind": "rows", "blocks": (1, 2)}}.items()
    ):
        model = prompt_tune(built(family)[0], AnyMethod(2 + number, **fields)).eval()
        redraw_prompts(model, number)
        save_adapter(model, tmp_path / name)
        bank.add(name, tmp_path / name)
        alone[name] = model
    image = torch.cat([built(family)[1]] * 2)
    names = ["own", "other", "other", "own"]
    for found, name, own in zip(bank(image, names), names, image.unsqueeze(1), strict=True):
        assert distance(found, alone[name](own)[0]) <= 1e-10
    every = bank(image, ["own"] * 4)
    expected = alone["own"](image)
    assert all(distance(f, e) <= 1e-10 for f, e in zip(every, expected, strict=True))


@pytest.mark.covering
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_concatenated(family: str, kind: str) -> None:
    """The eager formulation that benchmarks compare with."""
    tuned, image = tuned_model(family, kind)
    eager: Any = concatenated(built(family)[0], tuned.tune_record.method).eval()
    for index, module in eager.prompts.items():
        module.load_state_dict(tuned.blocks[int(index)].prompt.state_dict())
    eager.shared.load_state_dict(tuned.prompt_shared.state_dict())
    assert distance(eager(image), tuned(image)) <= 1e-10


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["vit", "dinov3 eva", "swin"])
def test_shares_of_attention(family: str, kind: str) -> None:
    if family == "swin":
        tuned, image = prompt_tune(plain_swin.build("tiny"), AnyMethod(3, kind=kind)), None
        image = plain_swin.images("tiny")
    else:
        tuned, image = tuned_model(family, kind)
    found = shares.attention_shares(tuned, image)
    assert len(found) == 3
    for entry in found:
        prompt = [b for b in tuned.modules() if hasattr(b, "prompt")][entry.block].prompt
        assert entry.prompts.shape[-1] == prompt.num_rows + prompt.num_keys
        total = entry.prompts.sum(-1) + entry.tokens
        assert distance(total, torch.ones_like(total)) <= 1e-12 and (entry.prompts > 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_folded(kind: str) -> None:
    """Biases of keys and values are constants only where every key and value has them."""
    tuned, image = tuned_model("vit", kind)
    before = tuned(image)
    assert distance(fold_backbone(tuned)(image), before) <= 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_copies(kind: str) -> None:
    tuned, image = tuned_model("vit", kind)
    for other in (copy.deepcopy(tuned), pickle.loads(pickle.dumps(tuned))):
        assert torch.equal(other(image), tuned(image))
        if kind == "feature":
            other.prompt_shared.linear.weight.data.zero_()
            assert not torch.equal(other(image), tuned(image))
        remove_prompts(other)
