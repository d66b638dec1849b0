"""Tables of positions are made once for a patch grid, and anew once what they depend on changes."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from support.formulations import eva_families as families
from support.formulations.plain import distance
from support.formulations.plain_eva import pair

from vpt_fast import FullTuning, VPTDeep, prompt_tune, remove_prompts

DYNAMIC = ("dinov3", "eva02_glu", "rope_mixed", "mrope")
CHANGES: dict[str, Any] = {
    "dinov3": lambda rope: rope.periods.mul_(2),
    "eva02_glu": lambda rope: rope.bands.mul_(2),
    "rope_mixed": lambda rope: rope.freqs.mul_(2),
    "mrope": lambda rope: rope.inv_freq.mul_(2),
}


def tuned(family: str, **overrides: Any) -> Any:
    return prompt_tune(families.build(family, **overrides), VPTDeep(3)).eval()


@pytest.mark.parametrize("family", DYNAMIC)
def test_a_table_is_made_once_for_each_grid(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tuned(family, dynamic_img_size=True)
    plain, made = type(model.rope).__mro__[2], []
    get_embed = plain.get_embed
    monkeypatch.setattr(
        plain, "get_embed", lambda self, *args: made.append(args[0]) or get_embed(self, *args)
    )
    for size in ((24, 24), (16, 40), (24, 24), (16, 40)):
        model(torch.randn(1, 3, *size, dtype=torch.float64))
    assert [tuple(grid) for grid in made] == [(3, 3), (2, 5)]


@pytest.mark.parametrize("family", DYNAMIC)
def test_changed_frequencies_make_another_table(family: str) -> None:
    ours, plain = pair(families.build(family, dynamic_img_size=True), VPTDeep(3))
    image = families.images(family)
    before = ours(image)
    with torch.no_grad():
        for rope in (ours.rope, plain.model.rope):
            CHANGES[family](rope)
    assert distance(ours(image), plain(image)) <= 1e-10
    assert distance(ours(image), before) > 1e-6


def test_a_changed_setting_makes_another_table() -> None:
    ours, plain = pair(families.build("eva02_glu", dynamic_img_size=True), VPTDeep(3))
    image = families.images("eva02_glu")
    before = ours(image)
    ours.rope.grid_offset = plain.model.rope.grid_offset = 3.0
    assert distance(ours(image), plain(image)) <= 1e-10
    ours.rope.ref_feat_shape = plain.model.rope.ref_feat_shape = [7, 7]
    assert distance(ours(image), plain(image)) <= 1e-10
    assert distance(ours(image), before) > 1e-6


def test_a_table_that_someone_changed_is_made_anew() -> None:
    ours, plain = pair(families.build("dinov3", dynamic_img_size=True), VPTDeep(3))
    image = families.images("dinov3")
    ours.rope.get_embed((3, 3)).zero_()
    assert distance(ours(image), plain(image)) <= 1e-10


def test_a_setting_that_is_changed_in_place_makes_another_table() -> None:
    base = families.build("eva02_glu", dynamic_img_size=True)
    base.rope.ref_feat_shape = [3, 3]
    ours, plain = pair(base, VPTDeep(3))
    image = families.images("eva02_glu")
    before = ours(image)
    for rope in (ours.rope, plain.model.rope):
        rope.ref_feat_shape[0] = 7
    assert distance(ours(image), plain(image)) <= 1e-10
    assert distance(ours(image), before) > 1e-6


def test_frequencies_at_another_address_make_another_table() -> None:
    """Also after several changes, of which the last may get the first one's address."""
    ours, plain = pair(families.build("rope_mixed"), VPTDeep(3))
    image = families.images("rope_mixed")
    for changes in range(1, 6):
        ours(image)
        for _ in range(changes):
            for rope in (ours.rope, plain.model.rope):
                rope.freqs.data = rope.freqs.data * 1.1
        assert distance(ours(image), plain(image)) <= 1e-10


def test_frequencies_edited_through_data_are_read_after_a_conversion() -> None:
    ours, plain = pair(families.build("rope_mixed"), VPTDeep(3))
    image = families.images("rope_mixed")
    ours(image)
    for rope in (ours.rope, plain.model.rope):
        rope.freqs.data.mul_(1.5)
    ours.to(torch.float64)
    assert distance(ours(image), plain(image)) <= 1e-10


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("family", DYNAMIC)
def test_tables_made_in_inference_mode_serve_training(
    family: str, dynamic: bool, dtype: torch.dtype
) -> None:
    base = families.build(family, dynamic_img_size=dynamic).to(dtype)
    ours = prompt_tune(base, VPTDeep(3))
    image = families.images(family).to(dtype)
    with torch.inference_mode():
        before = ours.eval()(image)
    loss = ours.train()(image).sum()
    loss.backward()
    assert distance(loss, before.clone().sum()) <= 100 * torch.finfo(dtype).eps


def test_tables_fit_the_blocks() -> None:
    ours, plain = pair(families.build("rope_mixed"), VPTDeep(3))
    image, blocks = families.images("rope_mixed"), ours.blocks
    ours.blocks = blocks[:2]
    ours(image)
    ours.blocks = blocks
    assert distance(ours(image), plain(image)) <= 1e-10


def test_other_dtypes() -> None:
    ours, plain = pair(families.build("dinov3", dynamic_img_size=True), VPTDeep(3))
    image = families.images("dinov3")
    expected = plain(image)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 0.2)):
        ours.to(dtype)
        assert distance(ours(image.to(dtype)), expected) <= tolerance


@pytest.mark.parametrize("family", DYNAMIC)
def test_copies_and_pickles(family: str) -> None:
    model = tuned(family, dynamic_img_size=True)
    image = families.images(family)
    before = model(image)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(image), before)
        assert other.rope.tables.of != model.rope.tables.of
    plain = remove_prompts(model)
    assert type(plain.rope).__module__.startswith("timm") and "tables" not in vars(plain.rope)


def test_trained_frequencies_are_not_kept() -> None:
    model = prompt_tune(families.build("rope_mixed"), FullTuning())
    image = families.images("rope_mixed")
    first = model(image)
    assert torch.autograd.grad(first.sum(), model.rope.freqs)[0].abs().max() > 0
    with torch.no_grad():
        model.rope.freqs.mul_(1.5)
    assert distance(model(image), first) > 1e-6


def test_cached_inputs_need_the_models_own_size() -> None:
    model = tuned("dinov3", dynamic_img_size=True)
    image = families.images("dinov3")
    found = model.forward_from(model.forward_until(image, 1), 1)
    assert distance(found, model(image)) <= 1e-12
    with pytest.raises(ValueError, match="have 14 tokens .3 x 3 patches., but these have 15"):
        model.forward_from(torch.randn(2, 15, 64, dtype=torch.float64), 1)


@pytest.mark.parametrize("size", [(16, 40), (8, 72)])
def test_inputs_of_another_grid_are_not_cached(size: tuple[int, int]) -> None:
    """1 x 9 patches are as many as the model's 3 x 3, with other positions."""
    model = tuned("dinov3", dynamic_img_size=True)
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    grid = f"{size[0] // 8} x {size[1] // 8}"
    with pytest.raises(ValueError, match=f"{grid} patches in a model of 3 x 3"):
        model.forward_until(image, 1)
    model.set_input_size(size)
    assert distance(model.forward_from(model.forward_until(image, 1), 1), model(image)) <= 1e-12
