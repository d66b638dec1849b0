"""A tuned SwinTransformer computes the same function as its plain formulation, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from support.formulations import plain_swin
from support.formulations.plain import assert_same, distance, redraw_prompts
from support.formulations.plain_swin import SWINS, build, images, pair
from timm.models.swin_transformer import SwinTransformer

from vpt_fast import VAPT, LinearProbe, VPTDeep, VPTShallow, prompt_tune

VARIANTS: dict[str, Any] = {
    "deep": lambda depth: VPTDeep(3),
    "shallow": lambda depth: VPTShallow(3),
    "deep_pooled": lambda depth: VPTDeep(3, pool_prompts=True),
    "shallow_pooled": lambda depth: VPTShallow(2, pool_prompts=True),
    "gaps": lambda depth: VPTDeep(3, blocks=[0, depth - 1]),
    "first_stage": lambda depth: VPTDeep(3, blocks=[0, 1]),
    "last_only": lambda depth: VPTDeep(3, blocks=[depth - 1]),
    "shared_projected": lambda depth: VPTDeep(3, blocks=[0, 1], shared=True, project_dim=5),
    "shallow_projected": lambda depth: VPTShallow(3, project_dim=5),
}
IN_DEPTH = ("padded",)
WHOLE = pytest.mark.full
CASES = [
    (name, variant)
    for name in SWINS
    for variant in VARIANTS
    if variant in ("deep", "shallow") or name in IN_DEPTH
]


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_logits_and_gradients(name: str, variant: str) -> None:
    tuned, plain = pair(build(name), VARIANTS[variant](SWINS[name].depth))
    image = images(name)
    expected = plain(image)
    tuned.train()
    assert_same(tuned, plain, tuned(image), expected)
    tuned.eval()
    with torch.inference_mode():
        assert distance(tuned(image), expected) <= 1e-10


@pytest.mark.parametrize("name", ["padded", "no_bias", pytest.param("window7", marks=WHOLE)])
@pytest.mark.parametrize("also", ["relative_position_bias_table", "norm1", "attn.qkv.bias"])
@pytest.mark.parametrize("variant", ["deep", "shallow"])
def test_what_is_trained_besides(name: str, also: str, variant: str) -> None:
    """A trained position bias, norm or projection; the projection's bias fills the padding."""
    tuned, plain = pair(build(name), VARIANTS[variant](6), also=also)
    image = images(name)
    tuned.train()
    assert_same(tuned, plain, tuned(image), plain(image))


def test_every_variant_is_another_function() -> None:
    image, outputs = images("window7"), {}
    for variant, method in VARIANTS.items():
        tuned = prompt_tune(build("window7"), method(6))
        redraw_prompts(tuned)
        with torch.no_grad():
            outputs[variant] = tuned(image)
    for one, found in outputs.items():
        for other, compared in outputs.items():
            assert one == other or distance(found, compared) > 1e-3, f"{one} is {other}"


@pytest.mark.parametrize(
    "name", ["padded", pytest.param("window7", marks=WHOLE), pytest.param("dynamic", marks=WHOLE)]
)
@pytest.mark.parametrize("memory", ["balanced", "lean", "minimal"])
@pytest.mark.parametrize("variant", ["deep", "shallow", "gaps"])
def test_memory_modes(name: str, memory: str, variant: str) -> None:
    tuned, plain = pair(build(name), VARIANTS[variant](6), memory)
    image = images(name)
    tuned.train()
    assert_same(tuned, plain, tuned(image), plain(image))


@pytest.mark.parametrize("variant", ["deep", "shallow", "deep_pooled"])
def test_grad_checkpointing(variant: str) -> None:
    tuned, plain = pair(build("padded"), VARIANTS[variant](6))
    tuned.set_grad_checkpointing()
    image = images("padded")
    tuned.train()
    assert_same(tuned, plain, tuned(image), plain(image))


@pytest.mark.parametrize("method", [VPTDeep(8, dropout=0.5), VPTShallow(8, dropout=0.5)])
@pytest.mark.parametrize("memory", ["speed", "minimal"])
def test_prompt_dropout(method: Any, memory: str) -> None:
    """An independent mask per image, the same where backward recomputes the prompts."""
    tuned, plain = pair(build("padded"), method, memory)
    image = images("padded", batch=3)
    tuned.train()
    plain.training = True
    torch.manual_seed(4)
    expected = plain(image)
    torch.manual_seed(4)
    assert_same(tuned, plain, tuned(image), expected)
    plain.training = False
    tuned.eval()
    assert distance(tuned(image), plain(image)) <= 1e-10
    assert distance(expected, plain(image)) > 1e-3


@pytest.mark.parametrize("name", SWINS)
@pytest.mark.parametrize("method", [VPTDeep(0), VPTShallow(0), LinearProbe()])
def test_no_prompts_is_the_base_model(name: str, method: Any) -> None:
    """Up to rounding: timm's explicit softmax and fused attention round differently."""
    base, image = build(name), images(name)
    with torch.no_grad():
        expected, features = base(image), base.forward_features(image)
    tuned = prompt_tune(base, method).train()
    assert distance(tuned(image), expected) <= 1e-12
    assert distance(tuned.forward_features(image), features) <= 1e-12


@pytest.mark.parametrize("name", ["padded", "dynamic", "oblong_window"])
@pytest.mark.parametrize("variant", ["deep", "shallow", "shallow_pooled", "vapt"])
def test_batch_mates_do_not_matter(name: str, variant: str) -> None:
    """In the published program they matter, in shallow mode."""
    if variant == "vapt" and name == "dynamic":
        name = "window7"  # prompt experts take images of one size
    method = VAPT(3) if variant == "vapt" else VARIANTS[variant](6)
    tuned, _ = pair(build(name), method)
    image = images(name, batch=4)
    with torch.no_grad():
        together = tuned(image)
        for i in range(4):
            assert distance(tuned(image[i : i + 1]), together[i : i + 1]) <= 1e-12
    assert distance(together[:1], together[1:2]) > 1e-3


@pytest.mark.parametrize("variant", ["code", "paper"])
@pytest.mark.parametrize("name", ["padded", "one_stage", pytest.param("window7", marks=WHOLE)])
@pytest.mark.parametrize("memory", ["speed", "lean"])
def test_prompt_experts(name: str, variant: str, memory: str) -> None:
    method = VAPT(3, dropout=0.3, projector_dropout=0.4, channel_dropout=0.3, variant=variant)
    tuned, plain = pair(build(name), method, memory)
    image = images(name)
    expected = plain(image)
    assert_same(tuned, plain, tuned(image), expected)
    tuned.train()
    plain.training = True
    torch.manual_seed(4)
    trained = plain(image)
    torch.manual_seed(4)
    assert_same(tuned, plain, tuned(image), trained)
    assert distance(trained, expected) > 1e-4


def test_prompt_experts_take_images_of_one_size() -> None:
    tuned = prompt_tune(build("dynamic"), VAPT(3))
    tuned(images("window7"))  # 56 x 56, the model's size
    with pytest.raises(ValueError, match="14 x 14 grid .* has 12 x 17"):
        tuned(images("dynamic"))


@pytest.mark.parametrize("variant", ["deep", "shallow", "shallow_pooled"])
def test_intermediates(variant: str) -> None:
    tuned, plain = pair(build("padded"), VARIANTS[variant](6))
    image = images("padded")
    expected = [x.permute(0, 3, 1, 2) for x, _ in plain.stages(image)]
    features, found = tuned.forward_intermediates(image)
    assert all(distance(a, b) <= 1e-10 for a, b in zip(found, expected, strict=True))
    assert distance(tuned.forward_head(features), plain(image)) <= 1e-10
    found = tuned.forward_intermediates(image, [0, 1], stop_early=True, intermediates_only=True)
    assert all(distance(a, b) <= 1e-10 for a, b in zip(found, expected[:2], strict=True))
    tuned.prune_intermediate_layers([0, 1], prune_head=True)
    found = tuned.forward_intermediates(image, [1], intermediates_only=True)
    assert distance(found[0], expected[1]) <= 1e-10


@pytest.mark.parametrize("variant", ["deep", "shallow"])
def test_hooks_see_images(variant: str) -> None:
    """Hooks on stages, blocks and their parts see tokens, and do not change the result."""
    tuned, plain = pair(build("padded"), VARIANTS[variant](6))
    image, seen = images("padded"), {}
    for name in ("layers.1", "layers.1.blocks.1", "layers.0.blocks.0.attn.proj"):

        def note(module: Any, inputs: Any, output: Any, name: str = name) -> None:
            seen[name] = output

        tuned.get_submodule(name).register_forward_hook(note)
    tuned.train()
    assert_same(tuned, plain, tuned(image), plain(image))
    assert distance(seen["layers.1"], plain.stages(image)[1][0]) <= 1e-10
    assert torch.equal(seen["layers.1"], seen["layers.1.blocks.1"])
    # Live rows pass with the tokens: in windows, as they are concatenated.
    shape = (2, 16, 14, 32) if variant == "deep" else (2 * 4 * 3, 3 + 25, 32)
    assert seen["layers.0.blocks.0.attn.proj"].shape == shape


def test_images_that_are_not_contiguous_or_none() -> None:
    tuned, plain = pair(build("padded"), VPTDeep(3))
    assert tuned(images("padded", batch=0)).shape == (0, 5)
    image = images("padded")
    assert distance(tuned(image.to(memory_format=torch.channels_last)), plain(image)) <= 1e-10


def test_frozen_dropout_is_off_and_gradients_reach_the_image() -> None:
    rates = dict.fromkeys(("proj_drop_rate", "attn_drop_rate", "drop_path_rate"), 0.3)
    tuned, plain = pair(build("padded", **rates), VPTDeep(3))
    ours, theirs = (images("padded").requires_grad_() for _ in range(2))
    tuned.train()
    tuned(ours).tanh().sum().backward()
    plain(theirs).tanh().sum().backward()
    assert distance(ours.grad, theirs.grad) <= 1e-10


FULL = [
    *(
        (f"swin_{size}_patch4_window7_224", {"window_size": window, **image}, pixels)
        for size in ("tiny", "small", "base")
        for window in (7, 12)
        for image, pixels in (
            ({"img_size": 224}, (224, 224)),
            ({"img_size": 256}, (256, 256)),
            ({"dynamic_img_size": True}, (200, 312)),
        )
    ),
    ("swin_base_patch4_window12_384", {}, (384, 384)),
    ("swin_s3_tiny_224", {}, (224, 224)),
]


@WHOLE
@pytest.mark.parametrize(("entry", "arguments", "image"), FULL)
@pytest.mark.parametrize("variant", ["deep", "shallow"])
def test_full_size(entry: str, arguments: dict, image: Any, variant: str) -> None:
    model = timm.create_model(entry, num_classes=5, **arguments).eval().double()
    assert type(model) is SwinTransformer
    plain_swin.families.randomise(model)
    tuned, plain = pair(model, VARIANTS[variant](12))
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 3, *image, generator=generator, dtype=torch.float64)
    assert_same(tuned, plain, tuned(x), plain(x))
