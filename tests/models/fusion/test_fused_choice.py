"""Which blocks are fused: all but those with a hook or a change that fusion would skip.

Every case changes block 1 of three. That block, and only it, runs module by module, and the model
computes the same as the plain formulation with the same change.
"""

from __future__ import annotations

from typing import Any

import pytest
from support.formulations import families
from support.formulations.families import AVERAGE
from support.formulations.plain import Plain, assert_same, distance, pair
from support.formulations.plain_vapt import STILL, seeded, vapt_pair
from support.fusion import indices, spied
from timm.layers import DropPath
from torch import nn
from torch.nn.modules import module as nn_module

from vpt_fast import VAPT, LinearProbe, VPTDeep, VPTShallow

CHANGED = 1
OTHERS = {0, 2}


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return the readings of the blocks that run fused, in the order of their calls."""
    return spied(monkeypatch)


def make_pair(method: Any, **overrides: Any) -> tuple[nn.Module, Plain]:
    base = families.build(AVERAGE, **{"init_values": 1e-5, **overrides})
    return vapt_pair(base, method) if isinstance(method, VAPT) else pair(base, method)


METHODS = {
    "linear": LinearProbe(),
    "shallow": VPTShallow(3),
    "deep": VPTDeep(3),
    "late": VPTDeep(3, blocks=[2]),
    "code": VAPT(3, **STILL),
}


@pytest.mark.parametrize("method", METHODS)
def test_every_block_is_fused(method: str, ran: list[Any]) -> None:
    """Except the last block of VPT-Shallow, which has no queries for the prompts' dead rows."""
    tuned, plain = make_pair(METHODS[method])
    tuned.train()
    output = tuned(families.images(AVERAGE))
    assert indices(tuned, ran) == ({0, 1} if method == "shallow" else {0, 1, 2})
    assert_same(tuned, plain, output, plain(families.images(AVERAGE)))
    tuned.forward_features(families.images(AVERAGE))
    assert indices(tuned, ran) == ({0, 1} if method == "shallow" else {0, 1, 2})
    for block in tuned.blocks:
        block.register_forward_hook(lambda *_: None)  # sees what goes in and out, and no more
    tuned(families.images(AVERAGE))
    prompted = {0, 1} if method == "shallow" else {0, 1, 2}
    frozen = {"linear": {0, 1}, "late": {0, 1}}.get(method, set())  # timm's own, which are called
    assert indices(tuned, ran) == prompted - frozen


class Watch:
    """A hook that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *_: Any) -> None:
        self.calls += 1


WATCHED = [
    "norm1",
    "attn",
    "attn.qkv",
    "attn.proj",
    "attn.proj_drop",
    "ls1",
    "drop_path1",
    "norm2",
    "mlp",
    "mlp.fc1",
    "mlp.act",
    "mlp.fc2",
    "ls2",
    "drop_path2",
]


KINDS = ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook")


def _watched() -> list[Any]:
    """Return cases: every module with a forward hook, and with each kind of hook."""
    cases = [pytest.param(where, KINDS[0], "deep") for where in WATCHED]
    for index, where in enumerate(WATCHED):
        for kind in KINDS:
            for method in ("linear", "deep", "code"):
                if kind.startswith("full_backward") and method == "linear":
                    continue  # no gradient passes the block
                if (kind, method) == (KINDS[0], "deep"):
                    continue
                chosen = (KINDS.index(kind) + len(method)) % 4 == index % 4
                marks = [] if chosen else [pytest.mark.full]
                cases.append(pytest.param(where, kind, method, marks=marks))
    return cases


@pytest.mark.parametrize(("where", "kind", "method"), _watched())
def test_hooks_are_called(where: str, kind: str, method: str, ran: list[Any]) -> None:
    tuned, plain = make_pair(METHODS[method])
    watch = Watch()
    handle = getattr(tuned.blocks[CHANGED].get_submodule(where), f"register_{kind}")(watch)
    image = families.images(AVERAGE)
    tuned.train()
    output = tuned(image)
    assert indices(tuned, ran) == OTHERS
    assert_same(tuned, plain, output, plain(image))
    assert watch.calls == 1
    handle.remove()
    tuned(image)
    assert indices(tuned, ran) == OTHERS | {CHANGED}


def test_global_hooks_are_called(ran: list[Any]) -> None:
    tuned, _ = make_pair(VPTDeep(3))
    seen: list[nn.Module] = []
    handle = nn_module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        tuned(families.images(AVERAGE))
    finally:
        handle.remove()
    assert not ran
    assert {block.mlp.fc1 for block in tuned.blocks} <= set(seen)


WEIGHTS = [
    "norm1.weight",
    "norm1.bias",
    "attn.qkv.weight",
    "attn.qkv.bias",
    "attn.proj.weight",
    "attn.proj.bias",
    "ls1.gamma",
    "norm2.weight",
    "norm2.bias",
    "mlp.fc1.weight",
    "mlp.fc1.bias",
    "mlp.fc2.weight",
    "mlp.fc2.bias",
    "ls2.gamma",
]


@pytest.mark.parametrize(
    ("weight", "method"),
    [
        pytest.param(w, m, marks=[] if i % 3 == j or "ls" in w else [pytest.mark.full])
        for i, w in enumerate(WEIGHTS)
        for j, m in enumerate(["deep", "linear", "code"])
    ],
)
def test_trained_weights_have_gradients(weight: str, method: str, ran: list[Any]) -> None:
    """A trained weight of the backbone has a gradient."""
    name = f"blocks.{CHANGED}.{weight}"
    tuned, plain = make_pair(METHODS[method])
    tuned.get_parameter(name).requires_grad_()
    plain.trained[name] = plain.model.get_parameter(name).requires_grad_()
    image = families.images(AVERAGE)
    tuned.train()
    output = tuned(image)
    assert indices(tuned, ran) == OTHERS
    assert_same(tuned, plain, output, plain(image))


@pytest.mark.parametrize("where", ["attn.proj_drop", "mlp.drop1", "mlp.drop2", "drop_path1"])
@pytest.mark.parametrize("method", ["linear", "shallow", "deep", "code"])
def test_active_dropout_acts(method: str, where: str, ran: list[Any]) -> None:
    """Dropout is off in the frozen backbone, and active where it is switched on."""
    tuned, plain = make_pair(METHODS[method], proj_drop_rate=0.3, drop_path_rate=0.5)
    image = families.images(AVERAGE, batch=8)
    still = plain(image)
    assert distance(tuned.train()(image), still) <= 1e-10
    ran.clear()
    module = tuned.blocks[CHANGED].get_submodule(where)
    assert isinstance(module, (nn.Dropout, DropPath))
    module.train()
    output = tuned(image)
    assert CHANGED not in indices(tuned, ran)
    assert distance(output, still) > 1e-3
    twin = plain.model.blocks[CHANGED].get_submodule(where)
    twin.train()
    if method != "shallow" and where == "drop_path1":  # one number per image, prompts or not
        expected = seeded(plain, image)
        assert_same(tuned, plain, seeded(tuned, image), expected)


def test_active_attention_dropout_is_refused_or_acts(ran: list[Any]) -> None:
    """It acts in timm's own blocks, and is refused by name in prompted ones."""
    tuned, plain = make_pair(VPTDeep(3), attn_drop_rate=0.5)
    tuned.train().blocks[CHANGED].attn.train()
    with pytest.raises(ValueError, match="attention dropout"):
        tuned(families.images(AVERAGE))
    ran.clear()
    tuned, plain = make_pair(LinearProbe(), attn_drop_rate=0.5)
    for model in (tuned.train(), plain.model):
        model.blocks[CHANGED].attn.train()
    output = seeded(tuned, families.images(AVERAGE))
    assert indices(tuned, ran) == OTHERS
    assert distance(output, seeded(plain, families.images(AVERAGE))) <= 1e-10
    assert distance(output, seeded(tuned, families.images(AVERAGE), seed=5)) > 1e-3


def test_spies_see_the_modules() -> None:
    """Checks `ran`: no module of a fused block is called."""
    tuned, _ = make_pair(VPTDeep(3))
    called: list[str] = []
    block = tuned.blocks[CHANGED]
    original = nn.Module.__call__

    def spy(module: nn.Module, *arguments: Any, **named: Any) -> Any:
        called.extend(name for name, inner in block.named_modules() if inner is module)
        return original(module, *arguments, **named)

    nn.Module.__call__ = spy  # type: ignore[method-assign]
    try:
        tuned(families.images(AVERAGE))
        assert called == []
        block.mlp.register_forward_hook(lambda *_: None)
        tuned(families.images(AVERAGE))
    finally:
        nn.Module.__call__ = original  # type: ignore[method-assign]
    assert {"norm1", "attn", "norm2", "mlp"} <= set(called)
