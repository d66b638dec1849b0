"""Adapters, baking, banks, the eager formulation and pruning of published methods."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.formulations import isotropic, plain_swin
from support.formulations.plain import distance, redraw_prompts
from support.formulations.plain_published import METHODS

from vpt_fast import (
    CVPT,
    E2VPT,
    GateVPT,
    PromptBank,
    VPTDeep,
    bake,
    load_adapter,
    prompt_tune,
    remove_prompts,
    save_adapter,
)
from vpt_fast.published.e2vpt import prune
from vpt_fast.reference.vit import concatenated

FAMILIES = ("vit", "mae", "dinov3 eva", "qk_norm eva")


built = functools.partial(isotropic.built, depth=3)


def tuned_model(family: str, method: Any) -> tuple[Any, Any]:
    base, image = built(family)
    tuned: Any = prompt_tune(base, method).eval()
    redraw_prompts(tuned)
    if isinstance(method, E2VPT):
        tuned.prompt_shared.token_mask[1] = 0
        tuned.prompt_shared.piece_mask[0, 1] = 0
    return tuned, image


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["vit", "dinov3 eva"])
def test_tuned_on_the_meta_device_and_filled_later(family: str, method: str) -> None:
    source, image = tuned_model(family, METHODS[method])
    model: Any = prompt_tune(built(family)[0].to("meta"), METHODS[method]).eval()
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(7)
    model.load_state_dict(source.state_dict())
    for part in model.modules():
        if hasattr(part, "init_non_persistent_buffers"):  # a name of timm's
            part.init_non_persistent_buffers()
    assert distance(model(image), source(image)) == 0


@pytest.mark.covering
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_adapter_and_baked(family: str, method: str, tmp_path: Path) -> None:
    tuned, image = tuned_model(family, METHODS[method])
    expected = tuned(image)
    assert distance(bake(tuned)(image), expected) <= 1e-12
    save_adapter(tuned, tmp_path / "adapter")
    loaded = load_adapter(built(family)[0], tmp_path / "adapter").eval()
    assert torch.equal(loaded(image), expected)
    plain = remove_prompts(loaded)
    assert torch.equal(plain(image), built(family)[0](image))
    assert not [name for name in plain.state_dict() if "prompt" in name]


@pytest.mark.covering
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_concatenated(family: str, method: str) -> None:
    tuned, image = tuned_model(family, METHODS[method])
    eager: Any = concatenated(built(family)[0], METHODS[method]).eval()
    for index, module in eager.prompts.items():
        module.load_state_dict(tuned.blocks[int(index)].prompt.state_dict())
    for index, module in eager.updates.items():
        module.load_state_dict(tuned.blocks[int(index)].prompt_update.state_dict())
    if eager.shared is not None:
        eager.shared.load_state_dict(tuned.prompt_shared.state_dict())
    assert distance(eager(image), tuned(image)) <= 1e-10


@pytest.mark.parametrize("method", ["e2vpt", "vfpt", "bpt", "dvpt", "dvpt feature", "cvpt", "gate"])
def test_bank(method: str, tmp_path: Path) -> None:
    bank = PromptBank(built("vit")[0].eval())
    tuned, image = tuned_model("vit", METHODS[method])
    save_adapter(tuned, tmp_path / "own")
    if method in ("cvpt", "gate"):
        why = {"cvpt": "attend to the prompts apart", "gate": r"blocks \[0\] of 3.*live on"}[method]
        with pytest.raises(ValueError, match=f"a bank cannot hold.*{why}"):
            bank.add("own", tmp_path / "own")
        return
    deep = prompt_tune(built("vit")[0], VPTDeep(2)).eval()
    redraw_prompts(deep)
    save_adapter(deep, tmp_path / "deep")
    for name in ("own", "deep"):
        bank.add(name, tmp_path / name)
    logits = bank(torch.cat([image, image]), ["own", "deep", "deep", "own"])
    for found, model, row in zip(logits, [tuned, deep, deep, tuned], [0, 1, 0, 1], strict=True):
        assert distance(found, model(image[row : row + 1])[0]) <= 1e-10


@pytest.mark.parametrize("method", [CVPT(2), GateVPT(2)])
def test_models_in_stages_are_refused(method: Any) -> None:
    base = plain_swin.build("tiny")
    before = copy.deepcopy(base.state_dict())
    with pytest.raises(ValueError, match="needs attention of whole images, and a .*Swin"):
        prompt_tune(base, method)
    assert type(base).__module__.startswith("timm") and not hasattr(base, "tune_record")
    assert all(torch.equal(t, before[name]) for name, t in base.state_dict().items())


def test_pruning_takes_the_least_important() -> None:
    """Importances by differences of the loss: |L(m + h) - L(m - h)| / 2h, batch by batch."""
    tuned, image = tuned_model("vit", E2VPT(4, num_keys=2, pieces=4))
    masks: Any = tuned.prompt_shared
    masks.token_mask.fill_(1), masks.piece_mask.fill_(1)
    batches = [(image, torch.tensor([0, 3])), (image.flip(2), torch.tensor([2, 1]))]

    @torch.no_grad()
    def importance(mask: Any, at: Any) -> float:
        total = 0.0
        for images, labels in batches:
            losses = []
            for step in (1e-5, -1e-5):
                mask[at] = 1 + step
                losses.append(F.cross_entropy(tuned(images), labels).item())
            mask[at] = 1
            total += abs(losses[0] - losses[1])
        return total

    tokens = [importance(masks.token_mask, i) for i in range(4)]
    pieces = {(i, j): importance(masks.piece_mask, (i, j)) for i in range(4) for j in range(4)}
    assert prune(tuned, batches, 0.3, 0.25) == (1, 3)
    gone = min(range(4), key=lambda i: tokens[i])
    assert [int(m) for m in masks.token_mask] == [int(i != gone) for i in range(4)]
    left = sorted((at for at in pieces if at[0] != gone), key=lambda at: pieces[at])
    assert {at for at in pieces if not masks.piece_mask[at]} == set(left[:3])
    assert not masks.token_mask.requires_grad and not tuned.training


def test_pruning_refuses() -> None:
    tuned, image = tuned_model("vit", E2VPT(2, pieces=4))
    batch = [(image, torch.tensor([0, 1]))]
    for tokens, pieces in ((1.0, 0.0), (0.0, -0.1)):
        with pytest.raises(ValueError, match="give a share in"):
            prune(tuned, batch, tokens, pieces)
    with pytest.raises(ValueError, match="needs training images"):
        prune(tuned, [], 0.5, 0.5)
    with pytest.raises(ValueError, match="only a model that was tuned with E2VPT"):
        prune(tuned_model("vit", METHODS["bpt"])[0], batch, 0.5, 0.5)
    masks: Any = tuned.prompt_shared
    assert masks.token_mask.tolist() == [1, 0] and masks.piece_mask.sum() == 7
