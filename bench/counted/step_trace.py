"""A training step of a provider on tensors without values, traced."""

from __future__ import annotations

import copy
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.counted.trace import Op, traced
from bench.providers.models import provide
from vpt_fast.checks import check_model
from vpt_fast.methods import VAPT, VPTDeep

CLASSES = 100


def step_ops(
    model: str,
    provider: str,
    method: VPTDeep | VAPT,
    batch: int,
    dtype: torch.dtype,
    *,
    depth: int | None = None,
    backward: bool = True,
    image_size: int | None = None,
) -> list[Op]:
    """Launches of forward, cross-entropy and backward of one training step, in order.

    Args:
        model: timm's name of a vision transformer; CLASSES classes, at its own image size.
        provider: an eager one of `bench.providers.models`.
        method: the prompts.
        batch: images.
        dtype: of parameters and images.
        depth: blocks of the model, in place of its own number.
        backward: whether the backward pass is in it.
        image_size: height and width, in pixels, in place of the model's own.

    Raises:
        TypeError, ValueError: the model cannot have these prompts, or the provider is unknown.
    """
    options: dict[str, Any] = {} if depth is None else {"depth": depth}
    options |= {} if image_size is None else {"img_size": image_size}
    with torch.device("meta"):
        plain: Any = timm.create_model(model, num_classes=CLASSES, **options)
    check_model(plain, method)
    channels = plain.pretrained_cfg["input_size"][0]
    height, width = plain.patch_embed.img_size
    mode = FakeTensorMode()
    plain = fake_copy(plain, dtype, mode)
    with mode:
        module = provide(provider, plain, method)
        images = torch.empty(batch, channels, height, width, dtype=dtype)
        labels = torch.empty(batch, dtype=torch.int64)
        with traced() as ops:
            loss = F.cross_entropy(module(images), labels)
            if backward:
                loss.backward()
    return ops


def fake_copy(model: Any, dtype: torch.dtype, mode: FakeTensorMode) -> Any:
    """A copy of a model with fake tensors on the CPU, which stand in for those of a GPU."""

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        kind = dtype if tensor.is_floating_point() else tensor.dtype
        empty = torch.empty(tensor.shape, dtype=kind)
        return nn.Parameter(empty) if isinstance(tensor, nn.Parameter) else empty

    with mode:
        # deepcopy takes what it finds here for copies that it has made already.
        copies = {id(t): fake(t) for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, copies)
