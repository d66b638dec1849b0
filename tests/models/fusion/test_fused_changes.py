"""A changed block is not fused unless the change is honoured.

As in `test_fused_choice`, block 1 of three is changed, in the tuned model and in its plain
formulation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from support.formulations import families
from support.formulations.families import AVERAGE
from support.formulations.plain import assert_same, distance, pair
from support.formulations.plain_vapt import vapt_pair
from support.fusion import indices
from test_fused_choice import CHANGED, METHODS, OTHERS, make_pair, ran
from timm.layers import Attention
from torch import Tensor, nn
from torch.nn.utils import parametrize

from vpt_fast import VPTDeep

__all__ = ["ran"]  # a fixture


class Doubling(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class LowRank(nn.Linear):
    """A Linear with a low-rank update, as LoRA adds it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.mean(-1, keepdim=True)


class Shifted(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.3


class HalfAttention(Attention):
    def forward(self, x: Tensor, *arguments: Any, **named: Any) -> Tensor:
        return 0.5 * super().forward(x, *arguments, **named)


class Wrapper(nn.Module):
    """A wrapper like FSDP's: attributes are the block's, forward is the wrapper's."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules["block"], name)

    def forward(self, x: Tensor, *arguments: Any, **named: Any) -> Tensor:
        return self.block(x, *arguments, **named) * 1.5


def _patch(module: nn.Module) -> None:
    """Replace forward on the instance, as recipes for attention maps do."""
    forward = type(module).forward
    module.forward = lambda *arguments, **named: 0.5 * forward(module, *arguments, **named)


def _wrap(model: nn.Module) -> None:
    model.blocks[CHANGED] = Wrapper(model.blocks[CHANGED])


def _replace(where: str, kind: type[nn.Module]) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        model.blocks[CHANGED].get_submodule(where).__class__ = kind

    return change


def _activation(module: nn.Module) -> Callable[[nn.Module], None]:
    return lambda model: setattr(model.blocks[CHANGED].mlp, "act", module)


CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "relu": _activation(nn.ReLU()),
    "leaky": _activation(nn.LeakyReLU(0.2)),
    "linear": _replace("attn.proj", LowRank),
    "mlp_linear": _replace("mlp.fc2", LowRank),
    "norm": _replace("norm2", Shifted),
    "norm1": _replace("norm1", Shifted),
    "parametrized": lambda m: parametrize.register_parametrization(
        m.blocks[CHANGED].attn.qkv, "weight", Doubling()
    ),
    "mlp_forward": lambda m: _patch(m.blocks[CHANGED].mlp),
    "act_forward": lambda m: _patch(m.blocks[CHANGED].mlp.act),
    "proj_forward": lambda m: _patch(m.blocks[CHANGED].attn.proj),
    "scale_forward": lambda m: _patch(m.blocks[CHANGED].ls2),
    "norm_forward": lambda m: _patch(m.blocks[CHANGED].norm2),
}
# Changes of timm's own block before the first prompted one, whose class is not swapped.
FROZEN_CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "attention": _replace("attn", HalfAttention),
    "attention_forward": lambda m: _patch(m.blocks[CHANGED].attn),
    "block_forward": lambda m: _patch(m.blocks[CHANGED]),
    "wrapper": _wrap,
}


@pytest.mark.parametrize(
    ("method", "change"),
    [
        *[("deep", change) for change in CHANGES],
        *[pytest.param("code", change, marks=pytest.mark.full) for change in CHANGES],
        *[pytest.param("late", change, marks=pytest.mark.full) for change in CHANGES],
        *[("late", change) for change in FROZEN_CHANGES],
    ],
)
def test_changes_are_not_passed_by(method: str, change: str, ran: list[nn.Module]) -> None:
    tuned, plain = make_pair(METHODS[method])
    image = families.images(AVERAGE)
    before = plain(image)
    for model in (tuned, plain.model):
        {**CHANGES, **FROZEN_CHANGES}[change](model)
        for parameter in model.blocks[CHANGED].parameters():
            if any(parameter is p for p in plain.model.parameters()):
                parameter.requires_grad_(False)
    tuned.blocks[CHANGED].eval()
    expected = plain(image)
    assert distance(before, expected) > 1e-3, "the change changes nothing"
    output = tuned(image)
    assert indices(tuned, ran) == OTHERS
    assert_same(tuned, plain, output, expected)


@pytest.mark.parametrize("where", ["", "attn", "mlp", "norm2"])
def test_a_replaced_forward_in_the_last_block_sees_all_rows(where: str) -> None:
    """If a head reads one row, the last block computes one, unless its forward is replaced."""
    tuned, plain = pair(families.build(families.TOKEN), VPTDeep(3))
    image = families.images(families.TOKEN)
    module, twin = (m.blocks[-1].get_submodule(where) for m in (tuned, plain.model))
    rows: list[int] = []
    forward = type(module).forward

    def replaced(x: Tensor, *arguments: Any, **named: Any) -> Tensor:
        rows.append(x.shape[1])
        return 0.5 * forward(module, x, *arguments, **named)

    module.forward = replaced
    _patch(twin)
    assert_same(tuned, plain, tuned(image), plain(image))
    # The forward of a part may mix rows, so it receives the prompt rows, too.
    assert rows == [10 + (3 if where else 0)]


@pytest.mark.parametrize(("method", "count"), [("deep", 2), ("shallow", 1), ("code", 1)])
def test_rms_norms_are_fused_but_not_with_experts(method: str, count: int, ran: list) -> None:
    pairs = vapt_pair if method == "code" else pair
    tuned, plain = pairs(families.build("aimv2"), METHODS[method])
    image = families.images("aimv2")
    output = tuned.train()(image)
    assert len(ran) == count
    assert_same(tuned, plain, output, plain(image))


@pytest.mark.parametrize("method", ["shallow", "deep", "code"])
def test_kinds_of_blocks_that_are_not_fused(method: str, ran: list[nn.Module]) -> None:
    family = "qk_norm"
    base = families.build(family)
    pairs = vapt_pair if method == "code" else pair
    tuned, plain = pairs(base, METHODS[method])
    image = families.images(family)
    output = tuned.train()(image)
    assert not ran
    assert_same(tuned, plain, output, plain(image))
