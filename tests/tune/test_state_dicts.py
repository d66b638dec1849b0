"""`load_state_dict` of tuned models: complete, without what the method added, and in part."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from support.formulations import plain_swin
from support.formulations.families import build, images
from support.formulations.plain import distance, redraw_prompts

from vpt_fast import VAPT, AdapterTuning, LinearProbe, MLPHead, VPTDeep, VPTShallow, prompt_tune

METHODS: dict[str, Any] = {
    "shallow": VPTShallow(3), "shallow projected": VPTShallow(3, project_dim=6),
    "deep": VPTDeep(3), "deep projected": VPTDeep(3, project_dim=6),
    "shared": VPTDeep(3, shared=True), "vapt": VAPT(2), "adapter": AdapterTuning(4),
    "mlp head": MLPHead(2),
}  # fmt: skip
SWIN = "window4"


def tuned(method: str, family: str = "vit", seed: int = 0) -> Any:
    swin = family == SWIN
    base = plain_swin.build(family, seed=seed) if swin else build(family, seed=seed)
    model = prompt_tune(base, METHODS[method])
    redraw_prompts(model, 7 + seed)
    return model


def added(method: str, family: str = "vit") -> list[str]:
    """Return the names that the plain model does not have."""
    plain = plain_swin.build(family) if family == SWIN else build(family)
    return [name for name in tuned(method, family).state_dict() if name not in plain.state_dict()]


CASES = [(method, "vit") for method in METHODS] + [
    (method, SWIN) for method in ("shallow", "deep", "vapt", "adapter", "mlp head")
]


@pytest.mark.parametrize(("method", "family"), CASES)
def test_a_complete_state_dict(method: str, family: str) -> None:
    model, other = tuned(method, family), tuned(method, family, 1)
    given = plain_swin.images(family) if family == SWIN else images(family)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = model.load_state_dict(other.state_dict())
    assert not found.missing_keys and not found.unexpected_keys
    assert distance(model(given), other(given)) == 0


@pytest.mark.covering
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize(("method", "family"), CASES)
def test_a_state_dict_of_a_plain_backbone(method: str, family: str, assign: bool) -> None:
    """It loads with a warning, and what the method added stays; `strict=False` lists it."""
    model, names = tuned(method, family), added(method, family)
    assert names
    before = {name: model.state_dict()[name].clone() for name in names}
    state = {n: 2 * v for n, v in tuned(method, family, 1).state_dict().items() if n not in names}
    with pytest.warns(UserWarning, match=f"nothing of what .* added .*{len(names)} in all"):
        found = model.load_state_dict(state, assign=assign)
    assert not found.missing_keys and not found.unexpected_keys
    now = model.state_dict()
    assert all(torch.equal(now[name], before[name]) for name in names)
    assert all(torch.equal(now[name], value) for name, value in state.items())
    found = model.load_state_dict(state, strict=False)
    assert sorted(found.missing_keys) == sorted(names) and not found.unexpected_keys


@pytest.mark.parametrize(("method", "family"), CASES)
def test_a_part_of_a_state_dict(method: str, family: str) -> None:
    names, state = added(method, family), tuned(method, family, 1).state_dict()
    parts = [names[:1], names[1:], names[:-1]] if len(names) > 1 else []
    for kept in parts:
        model = tuned(method, family)
        some = {n: v for n, v in state.items() if n not in names or n in kept}
        missing = [name for name in names if name not in kept]
        with pytest.raises(RuntimeError, match="Missing key") as raised:
            model.load_state_dict(some)
        assert all(f'"{name}"' in str(raised.value) for name in missing)
        assert sorted(model.load_state_dict(some, strict=False).missing_keys) == sorted(missing)


@pytest.mark.covering
@pytest.mark.parametrize("theirs", METHODS)
@pytest.mark.parametrize("ours", METHODS)
def test_a_state_dict_of_another_method(ours: str, theirs: str) -> None:
    if added(ours) == added(theirs):
        pytest.skip("their names are the same")
    state = tuned(theirs).state_dict()
    with pytest.raises(RuntimeError, match="Missing key|Unexpected key"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned(ours).load_state_dict(state)


def test_a_part_of_a_larger_model() -> None:
    """The names have a prefix."""
    model = torch.nn.ModuleDict({"tuned": tuned("vapt")})
    state = {f"tuned.{name}": value for name, value in build("vit").state_dict().items()}
    with pytest.warns(UserWarning, match=r"\(tuned\.blocks\.0\.prompt\.tokens, "):
        model.load_state_dict(state)
    probe = prompt_tune(build("vit"), LinearProbe())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        probe.load_state_dict(build("vit").state_dict())
