"""The eager formulation computes what tuned models compute, for every choice of blocks."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vpt_fast import VAPT, LinearProbe, VPTDeep, VPTShallow, prompt_tune, trainable_parameters
from vpt_fast.methods import Method
from vpt_fast.reference.vit import ConcatenatedExperts, concatenated, freeze, without_prompts

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double()


def vit(name: str = "test_vit") -> Any:
    torch.manual_seed(0)
    return timm.create_model(name, img_size=32, num_classes=5).double()


def results(model: nn.Module, prompts: list[nn.Parameter]) -> list[Tensor]:
    """Return the logits and the gradients of prompts and head."""
    logits = model(IMAGES)
    inner: Any = getattr(model, "model", model)
    trained = [*prompts, *(p for h in inner.head.modules() for p in h.parameters(recurse=False))]
    return [logits, *torch.autograd.grad(F.cross_entropy(logits, torch.arange(3)), trained)]


@pytest.mark.parametrize(
    "method",
    [
        VPTDeep(3),
        VPTDeep(3, blocks=range(2)),
        VPTDeep(3, blocks=range(3, 6)),
        VPTDeep(3, blocks=[1, 3, 4]),
        VPTShallow(3),
    ],
    ids=repr,
)
def test_prompts_give_the_tuned_model(method: Method) -> None:
    eager: Any = concatenated(vit(), method)
    tuned: Any = prompt_tune(vit(), method).train()
    own = [tuned.blocks[i].prompt.tokens for i in eager.blocks]
    with torch.no_grad():
        for tokens, rows in zip(own, eager.prompts, strict=True):
            tokens.copy_(rows)
    logits, rows, *head = results(eager, [eager.prompts])
    mine, *others = results(tuned, own)
    torch.testing.assert_close(mine, logits)
    torch.testing.assert_close(torch.stack(others[: len(own)]), rows)
    torch.testing.assert_close(others[len(own) :], head)


@pytest.mark.parametrize("variant", ["code", "paper"])
def test_experts_give_the_tuned_model(variant: str) -> None:
    method = VAPT(3, projector_dropout=0.0, channel_dropout=0.0, variant=variant)
    eager: Any = concatenated(vit(), method)
    assert isinstance(eager, ConcatenatedExperts)
    tuned: Any = prompt_tune(vit(), method).train()
    first, *rest = (block.prompt for block in tuned.blocks)
    own = [first.tokens, tuned.prompt_projector.down.weight, tuned.prompt_projector.up.weight]
    theirs = [eager.tokens, eager.down.weight, eager.up.weight]
    for prompt, *modules in zip(rest, eager.norms, eager.convs, eager.mixes, strict=True):
        for mine, module in zip((prompt.norm, prompt.conv, prompt.mix), modules, strict=True):
            own += mine.parameters()
            theirs += module.parameters()
    with torch.no_grad():
        for mine, value in zip(own, theirs, strict=True):
            mine.copy_(value)
    torch.testing.assert_close(results(tuned, own), results(eager, theirs))


def test_the_model_stays_in_eval_mode_and_dropout_follows_the_mode() -> None:
    eager = concatenated(vit(), VPTDeep(3, dropout=0.5))
    assert eager.training and not any(m.training for m in eager.model.modules())
    torch.manual_seed(0)
    assert not torch.equal(eager(IMAGES), eager(IMAGES))
    eager.eval()
    assert torch.equal(eager(IMAGES), eager(IMAGES))
    eager.train()
    assert eager.training and not any(m.training for m in eager.model.modules())


@pytest.mark.parametrize("method", [LinearProbe(), VPTDeep(0)])
def test_without_prompts_only_the_head_is_trained(method: Method) -> None:
    model = vit()
    assert concatenated(model, method) is model
    assert [name for name, _ in trainable_parameters(model)] == ["head.weight", "head.bias"]


def test_both_heads_of_a_distilled_model_are_trained() -> None:
    model = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=5)
    names = [name for name, _ in trainable_parameters(freeze(model))]
    assert names == ["head.weight", "head.bias", "head_dist.weight", "head_dist.bias"]


def test_the_gradient_of_the_model_without_prompts_reaches_the_chosen_block() -> None:
    for first in (0, 4):
        names = [name for name, _ in trainable_parameters(without_prompts(vit(), first))]
        assert names == [
            f"blocks.{first}.norm1.weight",
            f"blocks.{first}.norm1.bias",
            "head.weight",
            "head.bias",
        ]


def test_fields_that_the_formulation_lacks_are_refused() -> None:
    with pytest.raises(ValueError, match="shared=True is not in the eager baseline"):
        concatenated(vit(), VPTDeep(3, shared=True))
    with pytest.raises(ValueError, match="project_dim=8 is not in the eager baseline"):
        concatenated(vit(), VPTShallow(3, project_dim=8))
    with pytest.raises(TypeError, match="method must be one of"):
        concatenated(vit(), "vpt-deep")  # type: ignore[arg-type]
