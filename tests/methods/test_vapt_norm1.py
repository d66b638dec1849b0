"""A trained, hooked or unusual norm1 beside VAPT's experts, which normalise the same rows; other
weights of the backbone that are trained."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.formulations import families
from support.formulations.families import TOKEN
from support.formulations.plain import distance
from support.formulations.plain_vapt import ACTING, compare, vapt_pair
from torch import Tensor, nn

from vpt_fast import VAPT

Rowwise = Callable[[Tensor], Tensor]


@pytest.mark.parametrize("also", ["", "blocks.0.", "blocks.2.", "blocks.3."])
@pytest.mark.parametrize("family", [TOKEN, "clip", "aimv2", "siglip_average"])
def test_norm1_may_be_trained(family: str, also: str) -> None:
    """norm1 and the experts normalise the same rows; the gradients of norm1 are timm's."""
    depth = families.depth(family)
    blocks = [f"blocks.{i}." for i in range(depth)] if also == "" else [also]
    names = tuple(f"{block}norm1." for block in blocks if int(block[7]) < depth)
    tuned, plain = vapt_pair(families.build(family), VAPT(3, **ACTING), also=names)
    trained = [name for name in plain.trained if "norm1" in name]
    assert bool(trained) is bool(names)
    compare(tuned, plain, families.images(family))


@pytest.mark.parametrize("also", ["patch_embed.", "blocks.1.attn.qkv.", "blocks.2.mlp.", "norm."])
def test_other_weights_may_be_trained(also: str) -> None:
    tuned, plain = vapt_pair(families.build(TOKEN), VAPT(3, **ACTING), also=(also,))
    assert any(name.startswith(also) for name in plain.trained)
    compare(tuned, plain, families.images(TOKEN))


@pytest.mark.parametrize("pre", [False, True])
@pytest.mark.parametrize("family", [TOKEN, "siglip_average", "aimv2"])
@pytest.mark.parametrize("index", [0, 1])
def test_hooks_on_norm1_may_change_its_output(family: str, index: int, pre: bool) -> None:
    """Of tokens and prompts, as if concatenated; the experts' own input does not change."""
    tuned, plain = vapt_pair(families.build(family), VAPT(3, **ACTING))
    image = families.images(family)
    before = plain(image)

    def change(rows: Tensor) -> Tensor:
        return 1.5 * rows.tanh() + 0.25

    for model in (tuned, plain.model):
        norm = model.blocks[index].norm1
        if pre:
            norm.register_forward_pre_hook(lambda _module, rows: (change(rows[0]),))
        else:
            norm.register_forward_hook(lambda _module, _rows, output: change(output))
    assert distance(plain(image), before) > 1e-3
    compare(tuned, plain, image)


class DoubledNorm(nn.LayerNorm):
    """Subclass of LayerNorm with a forward pass of its own."""

    def forward(self, rows: Tensor) -> Tensor:
        return 2 * super().forward(rows)


def test_a_norm1_of_its_own_class_is_called_or_refused() -> None:
    base, image = families.build(TOKEN), families.images(TOKEN)
    own = DoubledNorm(64, eps=1e-6).double()
    own.load_state_dict(base.blocks[1].norm1.state_dict())
    base.blocks[1].norm1 = own
    try:
        tuned, plain = vapt_pair(base, VAPT(3))
    except (TypeError, ValueError) as error:
        assert "DoubledNorm" in str(error)
        return
    assert distance(tuned.eval()(image), plain(image)) <= 1e-10


@pytest.mark.parametrize(("family", "eps"), [(TOKEN, 1e-6), ("clip", 1e-5), (TOKEN, 0.3)])
def test_the_eps_of_norm1_is_its_own(family: str, eps: float) -> None:
    """The experts' norm has 1e-5 whatever norm1 has; rows of little variance show it."""
    base = families.build(family)
    for block in base.blocks:
        if eps == 0.3:
            block.norm1.eps = eps
        assert block.norm1.eps == eps
    with torch.no_grad():
        for scaled in (*base.patch_embed.parameters(), base.pos_embed, base.cls_token):
            scaled.mul_(1e-3)
        for block in base.blocks:
            for scaled in (block.attn.proj, block.mlp.fc2):
                scaled.weight.mul_(1e-3)
                scaled.bias.mul_(1e-3)
        if hasattr(base.norm_pre, "weight"):
            base.norm_pre.weight.mul_(3e-3)
            base.norm_pre.bias.mul_(3e-3)
    tuned, plain = vapt_pair(base, VAPT(3, **ACTING))
    image = families.images(family)
    compare(tuned, plain, image)
    plain.training = False
    expected = plain(image)
    for block in plain.model.blocks:
        block.norm1.eps = 1e-5 if eps != 1e-5 else 1e-6
    assert distance(plain(image), expected) > 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", ["frozen", "trained", "hooked", "masked"])
@pytest.mark.parametrize("family", [TOKEN, "aimv2"])
def test_norm1_in_low_precision(family: str, how: str, dtype: torch.dtype) -> None:
    """Prompts have a wider dtype than norm1's weights, fused or module by module."""
    also = ("blocks.1.norm1.",) if how == "trained" else ()
    tuned, plain = vapt_pair(families.build(family), VAPT(3), also=also)
    tuned.to(dtype).eval()
    if how == "hooked":
        tuned.blocks[1].norm1.register_forward_hook(lambda *_: None)
    image = families.images(family)
    tokens = plain.model.pos_embed.shape[1]
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril() if how == "masked" else None
    expected, output = plain(image, mask), tuned(image.to(dtype), attn_mask=mask)
    assert output.dtype == dtype
    assert distance(output, expected) < (0.1 if dtype == torch.bfloat16 else 0.02)
    output.double().square().sum().backward()
    for name, parameter in tuned.named_parameters():
        assert not parameter.requires_grad or parameter.grad.isfinite().all(), name
