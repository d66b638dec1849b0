"""Tuning, and removing prompts, changes nothing if any of its steps fails."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.formulations import plain_swin
from support.formulations.families import build
from support.formulations.plain import redraw_prompts
from support.snapshots import Failing, assert_same_model, snapshot

from vpt_fast import (
    VAPT,
    AdapterTuning,
    FullTuning,
    LinearProbe,
    MLPHead,
    VPTDeep,
    VPTShallow,
    fold_backbone,
    prompt_tune,
    remove_prompts,
)
from vpt_fast import tune as tune_module
from vpt_fast.models.family import family_of
from vpt_fast.models.tuned import Tuned
from vpt_fast.modules import prompt_tokens

METHODS: dict[str, Any] = {
    "linear": LinearProbe(), "shallow projected": VPTShallow(2, project_dim=4),
    "deep": VPTDeep(2), "vapt": VAPT(2), "adapter": AdapterTuning(4),
    "mlp head": MLPHead(2, hidden_dim=9), "full": FullTuning(),
}  # fmt: skip


def built(family: str) -> Any:
    return plain_swin.build(family) if family == "tiny" else build(family)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["vit", "tiny"])
def test_tuning_that_runs_out_of_memory(family: str, method: str) -> None:
    """Each PyTorch operation in turn fails, from the first to the last."""
    model = built(family)
    model.blocks[1].register_forward_hook(print) if family == "vit" else None
    before, number = snapshot(model), 0
    while True:
        try:
            with Failing(number):
                prompt_tune(model, METHODS[method])
            break
        except torch.OutOfMemoryError:
            assert_same_model(model, before)
            number += 1
    assert number >= 2
    remove_prompts(model)
    same = ["hooks", "buffers", "values"]
    if method != "mlp head":  # its classifier of another width is another module
        same += ["modules", "parameters"]
    assert all(snapshot(model)[what] == before[what] for what in same)


STEPS: dict[str, Any] = {
    **dict.fromkeys(("add_prompts", "_add_layers", "host_copy", "TuneRecord"), tune_module),
    **dict.fromkeys(("_new_tokens", "new_projection"), prompt_tokens),
}


@pytest.mark.covering
@pytest.mark.parametrize("step", [*STEPS, "install", "train"])
@pytest.mark.parametrize("error", [RuntimeError, MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("family", ["vit", "tiny"])
def test_tuning_that_fails_at_a_step(
    family: str, error: Any, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error("at this step")

    model = built(family)
    owners = {**STEPS, "install": family_of(model), "train": Tuned}
    monkeypatch.setattr(owners[step], step, fail)
    method = MLPHead(2) if step == "_add_layers" else VPTShallow(2, project_dim=4)
    before = snapshot(model)
    with pytest.raises(error, match="at this step"):
        prompt_tune(model, method)
    assert_same_model(model, before)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["vit", "tiny"])
def test_removal_that_fails_leaves_the_model_tuned(family: str, method: str) -> None:
    """Except for values that were trained in place, which are restored last."""
    model = built(family)
    plain = copy.deepcopy(model)
    prompt_tune(model, METHODS[method])
    redraw_prompts(model)
    before, number = snapshot(model), 0
    del before["values"]
    while True:
        try:
            with Failing(number):
                remove_prompts(model)
            break
        except torch.OutOfMemoryError:
            assert_same_model(model, before)
            number += 1
    assert type(model) is type(plain)
    assert all(
        torch.equal(value, model.state_dict()[name]) for name, value in plain.state_dict().items()
    )


def test_a_model_without_values_is_not_folded() -> None:
    tuned = prompt_tune(build("vit").to("meta"), VPTDeep(2))
    with pytest.raises(ValueError, match="is on the meta device and has no values; fill"):
        fold_backbone(tuned)
