"""Patch embedding by one matrix product, on a GPU faster than the convolution.

Patches do not overlap: the embedding is the product of rearranged pixels and the convolution's
weight (Dosovitskiy et al. 2021, equation 1). cuDNN's convolution of three channels takes ten times
as long in 16 bits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.layers.format import Format
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules import module as nn_module

from vpt_fast.modules.hooks import has_compiled_call, has_hooks, has_own_forward


def embedded_patches(patch_embed: Any, images: Tensor) -> Tensor:
    """Return `patch_embed(images)`, computed by one product on a GPU.

    Args:
        patch_embed: Patch embedding of a timm model.
        images: Images (B, channels, height, width).

    Returns:
        Output of the module: (B, N, D), or (B, height / patch, width / patch, D).
    """
    if not _product_is_faster(images) or not is_one_product(patch_embed, images):
        return patch_embed(images)
    return by_product(patch_embed, images)


def _product_is_faster(images: Tensor) -> bool:
    return not isinstance(images, Proxy) and images.is_cuda


def is_one_product(patch_embed: nn.Module, images: Tensor) -> bool:
    """Return whether a module is timm's, has no hooks, and embeds whole patches of images."""
    if type(patch_embed) is not PatchEmbed or patch_embed.dynamic_img_pad:
        return False
    proj = patch_embed.proj
    if type(proj) is not nn.Conv2d or _is_watched(patch_embed) or _is_watched(proj):
        return False
    if not patch_embed.flatten and patch_embed.output_fmt is not Format.NHWC:
        return False
    if (proj.stride, proj.padding, proj.dilation, proj.groups) != (
        proj.kernel_size, (0, 0), (1, 1), 1
    ):  # fmt: skip
        return False
    size = tuple(images.shape[1:])
    if len(size) != 3 or size[0] != proj.in_channels:
        return False
    if any(length % step for length, step in zip(size[1:], proj.stride, strict=True)):
        return False
    return not patch_embed.strict_img_size or patch_embed.img_size in (None, size[1:])


def _is_watched(module: nn.Module) -> bool:
    return (
        has_hooks(module) or nn_module._has_any_global_hook() or has_own_forward(module)
        or has_compiled_call(module)
    )  # fmt: skip


def by_product(patch_embed: Any, images: Tensor) -> Tensor:
    """Return the output of a module that `is_one_product`, by that product."""
    proj, device = patch_embed.proj, images.device.type
    if torch.is_autocast_enabled(device):
        # Cast first: the rearrangement moves half the bytes then.
        images = images.to(torch.get_autocast_dtype(device))
    high, wide = proj.kernel_size
    # (B, C, rows, high, columns, wide)
    cut = images.unflatten(3, (-1, wide)).unflatten(2, (-1, high))
    pixels = cut.permute(0, 2, 4, 1, 3, 5).flatten(3)
    if patch_embed.flatten:
        pixels = pixels.flatten(1, 2)
    rows: Tensor = patch_embed.norm(F.linear(pixels, proj.weight.flatten(1), proj.bias))
    return rows
