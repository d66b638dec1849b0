"""VAPT refuses what it cannot honour, naming value and fix, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.formulations import families
from support.formulations.families import TOKEN
from support.formulations.plain import distance
from support.formulations.plain_vapt import ACTING, compare, vapt_pair
from support.unchanged import assert_unchanged, snapshot
from torch import nn

from vpt_fast import VAPT, VPTDeep, prompt_tune

FIELDS: dict[str, tuple[dict[str, Any], type[Exception], list[str]]] = {
    "negative": ({"num_prompts": -1}, ValueError, ["num_prompts", "-1"]),
    "half": ({"num_prompts": 1.5}, TypeError, ["num_prompts", "1.5"]),
    "flag": ({"num_prompts": True}, TypeError, ["num_prompts", "True"]),
    "variant": ({"variant": "x"}, ValueError, ["variant", "'x'", "code", "paper"]),
    "variant_case": ({"variant": "Code"}, ValueError, ["variant", "'Code'"]),
    "variant_none": ({"variant": None}, ValueError, ["variant", "None"]),
    "kernel_zero": ({"kernel_size": 0}, ValueError, ["kernel_size", "0", "1"]),
    "kernel_negative": ({"kernel_size": -2}, ValueError, ["kernel_size", "-2"]),
    "kernel_half": ({"kernel_size": 2.0}, TypeError, ["kernel_size", "2.0"]),
    "kernel_flag": ({"kernel_size": True}, TypeError, ["kernel_size", "True"]),
    "kernel_pair": ({"kernel_size": (2, 2)}, TypeError, ["kernel_size", "(2, 2)"]),
    "hidden_zero": ({"hidden_dim": 0}, ValueError, ["hidden_dim", "0", "1"]),
    "hidden_half": ({"hidden_dim": 8.0}, TypeError, ["hidden_dim", "8.0"]),
    "hidden_none": ({"hidden_dim": None}, TypeError, ["hidden_dim", "None"]),
    "hidden_flag": ({"hidden_dim": False}, TypeError, ["hidden_dim", "False"]),
}
for _name in ("dropout", "projector_dropout", "channel_dropout"):
    FIELDS |= {
        f"{_name}_one": ({_name: 1.0}, ValueError, [_name, "1.0"]),
        f"{_name}_below": ({_name: -0.1}, ValueError, [_name, "-0.1"]),
        f"{_name}_nan": ({_name: float("nan")}, ValueError, [_name, "nan"]),
        f"{_name}_flag": ({_name: True}, TypeError, [_name, "True"]),
        f"{_name}_text": ({_name: "0.1"}, TypeError, [_name, "0.1"]),
        f"{_name}_none": ({_name: None}, TypeError, [_name, "None"]),
    }


@pytest.mark.parametrize("case", FIELDS)
def test_fields(case: str) -> None:
    values, kind, named = FIELDS[case]
    with pytest.raises(kind) as refusal:
        VAPT(**values)
    for word in named:
        assert word in str(refusal.value), f"{word!r} is not in {str(refusal.value)!r}"


def test_bounds_are_accepted() -> None:
    """The values next to the refused ones are accepted."""
    method = VAPT(1, 0.99, 1, 1, 0.99, 0.99)
    prompt_tune(families.build(TOKEN), method)
    assert VAPT(num_prompts=0).num_prompts == 0


@pytest.mark.parametrize(
    ("family", "kernel", "grid", "most"),
    [
        (TOKEN, 4, "3 x 3", "3"),
        ("vit_oblong", 3, "2 x 4", "2"),
        ("one_patch", 2, "1 x 1", "1"),
        (TOKEN, 2**20, "3 x 3", "3"),
    ],
)
@pytest.mark.parametrize("variant", ["code", "paper"])
def test_a_kernel_larger_than_the_grid(
    family: str, kernel: int, grid: str, most: str, variant: str
) -> None:
    model = families.build(family)
    before = snapshot(model)
    with pytest.raises(ValueError, match="kernel_size") as refusal:
        prompt_tune(model, VAPT(2, kernel_size=kernel, variant=variant))
    for word in (f"{kernel}", grid, f"at most {most}"):
        assert word in str(refusal.value)
    assert_unchanged(model, before)
    prompt_tune(model, VAPT(2, kernel_size=int(most), variant=variant))


CALLS: dict[str, Callable[[nn.Module, Any], Any]] = {
    "forward": lambda model, image: model(image),
    "forward_features": lambda model, image: model.forward_features(image),
    "forward_intermediates": lambda model, image: model.forward_intermediates(image, [0]),
    "get_intermediate_layers": lambda model, image: model.get_intermediate_layers(image, 1),
    "masked": lambda model, image: model(
        image, attn_mask=torch.ones(1, 1, 1, model.num_prefix_tokens + 16, dtype=torch.bool)
    ),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("family", [TOKEN, "siglip_map", "deit_distilled"])
@pytest.mark.parametrize("size", [(16, 64), (64, 16)])
def test_another_grid_of_as_many_patches(family: str, call: str, size: tuple[int, int]) -> None:
    """2 x 8 patches are as many as 4 x 4: shapes fit, but the token mixing would be wrong."""
    tuned, plain = vapt_pair(
        families.build(family, img_size=32, dynamic_img_size=True), VAPT(3, **ACTING)
    )
    image = torch.randn(1, 3, *size, dtype=torch.float64)
    for mode in (True, False):
        with pytest.raises(ValueError) as refusal:
            CALLS[call](tuned.train(mode), image)
        for grid in ("4 x 4", f"{size[0] // 8} x {size[1] // 8}"):
            assert grid in str(refusal.value)
    compare(tuned, plain, torch.randn(2, 3, 32, 32, dtype=torch.float64))


@pytest.mark.parametrize("size", [(24, 24), (40, 32), (8, 8)])
@pytest.mark.parametrize("family", [TOKEN, "siglip_average"])
def test_another_number_of_patches(family: str, size: tuple[int, int]) -> None:
    tuned, plain = vapt_pair(
        families.build(family, img_size=32, dynamic_img_size=True), VAPT(3, **ACTING)
    )
    with pytest.raises(ValueError) as refusal:
        tuned(torch.randn(1, 3, *size, dtype=torch.float64))
    for grid in ("4 x 4", f"{size[0] // 8} x {size[1] // 8}"):
        assert grid in str(refusal.value)
    compare(tuned, plain, torch.randn(2, 3, 32, 32, dtype=torch.float64))


@pytest.mark.parametrize("family", ["dynamic", "dynamic_padded"])
def test_images_of_the_trained_size_work_with_a_dynamic_size(family: str) -> None:
    tuned, plain = vapt_pair(families.build(family), VAPT(3, **ACTING))
    assert tuned.dynamic_img_size or tuned.patch_embed.dynamic_img_pad
    compare(tuned, plain, torch.randn(2, 3, 24, 24, dtype=torch.float64))
    if family == "dynamic_padded":  # padded to the same 3 x 3 patches
        compare(tuned, plain, torch.randn(2, 3, 20, 17, dtype=torch.float64))


@pytest.mark.parametrize("size", [(16, 64), (24, 24)])
def test_another_input_size_is_refused(size: tuple[int, int]) -> None:
    tuned, plain = vapt_pair(families.build("vit_32px"), VAPT(3, **ACTING))
    tuned.set_input_size((32, 32))
    image = families.images("vit_32px")
    expected = plain(image)
    assert distance(tuned.eval()(image), expected) <= 1e-10
    with pytest.raises(ValueError) as refusal:
        tuned.set_input_size(size)
        tuned(torch.randn(1, 3, *size, dtype=torch.float64))
    for grid in ("4 x 4", f"{size[0] // 8} x {size[1] // 8}"):
        assert grid in str(refusal.value)


def test_a_size_that_was_set_before_tuning_is_used() -> None:
    base = families.build("vit_32px")
    base.set_input_size((16, 64))
    tuned, plain = vapt_pair(base, VAPT(3, **ACTING))
    compare(tuned, plain, torch.randn(2, 3, 16, 64, dtype=torch.float64))


def test_causal_attention_is_refused() -> None:
    tuned, _ = vapt_pair(families.build(TOKEN), VAPT(3))
    with pytest.raises(ValueError, match="is_causal"):
        tuned(families.images(TOKEN), is_causal=True)


@pytest.mark.parametrize(("first", "second"), [(VAPT(2), VPTDeep(2)), (VPTDeep(2), VAPT(2))])
def test_tuning_twice_is_refused(first: Any, second: Any) -> None:
    tuned = prompt_tune(families.build(TOKEN), first)
    before = snapshot(tuned)
    with pytest.raises(ValueError, match="remove_prompts"):
        prompt_tune(tuned, second)
    assert_unchanged(tuned, before)
