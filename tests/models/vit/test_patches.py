"""Patches embedded by one matrix product, wherever it replaces timm's module: equal results."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.formulations import plain_swin
from support.formulations.families import build, images
from support.formulations.plain import VARIANTS, assert_same, pair
from timm.layers import PatchEmbed
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from vpt_fast import VPTDeep, prompt_tune
from vpt_fast.models import patches
from vpt_fast.models.patches import by_product, embedded_patches, is_one_product


def module(**arguments: Any) -> PatchEmbed:
    """Build an embedding of patches of 3 channels and 4 x 6 pixels to 10 channels, in fp64."""
    torch.manual_seed(0)
    given = {"img_size": (12, 18), "patch_size": (4, 6), "embed_dim": 10, **arguments}
    return PatchEmbed(**given).double()


def pictures(height: int = 12, width: int = 18, channels: int = 3, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, channels, height, width, dtype=torch.float64)


@pytest.fixture
def faster(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[nn.Module]]:
    """Use the product as on a GPU; record the modules that it replaces."""
    embedded: list[nn.Module] = []

    def noting(patch_embed: Any, images: torch.Tensor) -> torch.Tensor:
        embedded.append(patch_embed)
        return by_product(patch_embed, images)

    monkeypatch.setattr(patches, "_product_is_faster", lambda images: True)
    monkeypatch.setattr(patches, "by_product", noting)
    return embedded


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"bias": False},
        {"output_fmt": "NHWC"},
        {"norm_layer": nn.LayerNorm},
        {"strict_img_size": False},
        {"img_size": None},
        {"in_chans": 1},
        {"patch_size": (1, 1)},
        {"patch_size": (12, 18)},
    ],
    ids=lambda a: "-".join(map(str, a)) or "plain",
)
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_it_is_the_modules_result(arguments: dict[str, Any], batch: int) -> None:
    embed = module(**arguments)
    given = pictures(channels=arguments.get("in_chans", 3), batch=batch)
    assert is_one_product(embed, given)
    want, have = embed(given), by_product(embed, given)
    torch.testing.assert_close(have, want, rtol=1e-12, atol=1e-12)
    assert have.is_contiguous()


def test_images_of_any_layout_and_size() -> None:
    embed = module(strict_img_size=False)
    for given in (
        pictures().to(memory_format=torch.channels_last),
        pictures(24, 30)[:, :, ::2, ::1][:, :, :, :18],
        pictures(8, 36),
    ):
        assert is_one_product(embed, given)
        torch.testing.assert_close(by_product(embed, given), embed(given), rtol=1e-12, atol=1e-12)


def test_gradients_of_the_module_and_of_images() -> None:
    embed = module()
    given = pictures(batch=1).requires_grad_()
    parameters = (given, embed.proj.weight, embed.proj.bias)
    want, have = (
        torch.autograd.grad(value.square().sum(), parameters)
        for value in (embed(given), by_product(embed, given))
    )
    for one, other in zip(have, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x: by_product(embed, x), given)


def test_autocast_rounds_where_the_module_does() -> None:
    embed, given = module().float(), pictures().float()
    with torch.autocast("cpu", torch.bfloat16):
        want, have = embed(given), by_product(embed, given)
    assert have.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(have, want, rtol=2e-2, atol=2e-2)


def replaced(embed: PatchEmbed) -> None:
    class Other(nn.Conv2d):
        pass

    embed.proj.__class__ = Other


def subclass(embed: PatchEmbed) -> None:
    class Other(PatchEmbed):
        pass

    embed.__class__ = Other


def other_conv(**arguments: Any) -> Callable[[PatchEmbed], None]:
    given = {"kernel_size": (4, 6), "stride": (4, 6), **arguments}

    def change(embed: PatchEmbed) -> None:
        embed.proj = nn.Conv2d(3, 10, **given).double()

    return change


CHANGES: dict[str, Callable[[PatchEmbed], object]] = {
    "a subclass": subclass,
    "a subclass of the convolution": replaced,
    "a hook": lambda embed: embed.register_forward_hook(lambda m, a, out: out + 1),
    "a hook before the convolution": lambda embed: embed.proj.register_forward_pre_hook(
        lambda m, a: (2 * a[0],)
    ),
    "a forward of its own": lambda embed: setattr(embed.proj, "forward", lambda x: x[:, :, :2, :2]),
    "a compiled convolution": lambda embed: embed.proj.compile(backend="eager"),
    "patches that overlap": other_conv(stride=(2, 3)),
    "padding": other_conv(padding=(4, 6)),
    "dilation": other_conv(kernel_size=(2, 3), stride=(2, 3), dilation=(2, 2)),
    "dynamic padding": lambda embed: setattr(embed, "dynamic_img_pad", True),
    "NCHW": lambda embed: setattr(embed, "flatten", False),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_module_is_called(name: str, faster: list[nn.Module]) -> None:
    embed, given = module(), pictures()
    assert embedded_patches(embed, given) is not None and faster == [embed]
    CHANGES[name](embed)
    assert not is_one_product(embed, given)
    torch.testing.assert_close(embedded_patches(embed, given), embed(given), rtol=0, atol=0)
    assert faster == [embed]


def test_a_hook_of_every_module_sees_the_module(faster: list[nn.Module]) -> None:
    embed, seen = module(), []
    handle = register_module_forward_hook(lambda m, args, out: seen.append(type(m)))
    try:
        embedded_patches(embed, pictures())
    finally:
        handle.remove()
    assert nn.Conv2d in seen and faster == []


@pytest.mark.parametrize("size", [(12, 24), (11, 18), (12, 20)])
def test_images_of_another_size_are_timms_to_refuse(
    size: tuple[int, int], faster: list[nn.Module]
) -> None:
    with pytest.raises(AssertionError, match="doesn't match model"):
        embedded_patches(module(), pictures(*size))
    with pytest.raises(RuntimeError, match="to have 3 channels"):
        embedded_patches(module(), pictures(channels=1))
    assert faster == []


def test_a_cpu_convolves() -> None:
    """A convolution is as fast on a CPU."""
    embed = module()
    calls: list[nn.Module] = []
    embed.proj.register_forward_hook(lambda m, args, out: calls.append(m))
    embedded_patches(embed, pictures())
    assert calls == [embed.proj]


@pytest.mark.parametrize("family", ["vit", "vit_oblong", "vit_grey", "dynamic", "aimv2"])
def test_a_tuned_vit_is_the_plain_one(family: str, faster: list[nn.Module]) -> None:
    model, plain = pair(build(family), VARIANTS["deep"](3))
    given = images(family)
    assert_same(model, plain, model(given), plain(given))
    assert faster == [model.patch_embed]


def test_a_tuned_swin_is_the_plain_one(faster: list[nn.Module]) -> None:
    name = next(iter(plain_swin.SWINS))
    model, plain = plain_swin.pair(plain_swin.build(name), VPTDeep(3))
    given = plain_swin.images(name)
    assert_same(model, plain, model(given), plain(given))
    assert faster == [model.patch_embed]


def test_a_tuned_model_compiles_without_a_graph_break(faster: list[nn.Module]) -> None:
    model = prompt_tune(build("vit", dtype=torch.float32), VPTDeep(3)).eval()
    given = images("vit", dtype=torch.float32)
    want = copy.deepcopy(model)(given)
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(given), want, rtol=1e-5, atol=1e-5)
