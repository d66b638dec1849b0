"""Trace of a training step of a provider on fake tensors."""

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
from vpt_fast.methods import PromptMethod

CLASSES = 100


def step_ops(
    model: str,
    provider: str,
    method: PromptMethod,
    batch: int,
    dtype: torch.dtype,
    *,
    depth: int | None = None,
    backward: bool = True,
    image_size: int | None = None,
) -> list[Op]:
    """Return the launches of forward, cross-entropy and backward of a training step, in order.

    Args:
        model: Name of a vision transformer in timm; it gets CLASSES classes.
        provider: Eager provider of `bench.providers.models`.
        method: Prompt method.
        batch: Images per batch.
        dtype: Dtype of parameters and images.
        depth: Blocks of the model, instead of its own number.
        backward: Whether to include the backward pass.
        image_size: Height and width in pixels, instead of the model's own.

    Raises:
        TypeError, ValueError: If the model does not support these prompts, or the provider is
            unknown.
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
    """Return a copy of a model with fake tensors on the CPU, which stand in for those of a GPU."""

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        kind = dtype if tensor.is_floating_point() else tensor.dtype
        empty = torch.empty(tensor.shape, dtype=kind)
        return nn.Parameter(empty) if isinstance(tensor, nn.Parameter) else empty

    with mode:
        # deepcopy treats these as copies that it has already made.
        copies = {id(t): fake(t) for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, copies)
