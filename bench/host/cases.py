"""The cases whose host time and calls are measured: steps and inference on tiny tensors.

The tensors are so small that PyTorch's own kernels, which run on the CPU here, take negligible
time.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.providers.models import OURS, WITHOUT, provide
from vpt_fast import VAPT, VPTDeep, prompt_tune

STEP, INFERENCE = "step", "inference"

BATCH, PROMPTS, CLASSES, DEPTH = 2, 10, 10, 12
WARMUP = 4
"""Calls after which caches are full."""


@dataclass(frozen=True)
class HostCase:
    """A provider's step, or its inference.

    Attributes:
        model: Key of `MODELS`.
        provider: One of `bench.providers.models`.
        method: "vpt-deep" or "vapt".
        work: `STEP` or `INFERENCE`.
        memory: Memory mode of vpt_fast.
    """

    model: str
    provider: str
    method: str = "vpt-deep"
    work: str = STEP
    memory: str = "speed"

    def __str__(self) -> str:
        parts = [self.model, self.provider]
        parts += [self.method] if self.provider != WITHOUT else []
        parts += [self.work] if self.work != STEP else []
        parts += [self.memory] if self.memory != "speed" else []
        return "-".join(parts)

    @property
    def base(self) -> HostCase:
        """Case with the same model and work, without prompts."""
        return HostCase(self.model, WITHOUT, work=self.work)


def _vit(depth: int, init_values: float | None = None) -> Any:
    return timm.models.VisionTransformer(
        img_size=32, patch_size=16, embed_dim=16, depth=depth, num_heads=1,
        init_values=init_values, num_classes=CLASSES,
    )  # fmt: skip


def _swin(depth: int) -> Any:
    """Return Swin-T's 12 blocks; only the last stage has one window, as with windows of 7 x 7."""
    return timm.models.swin_transformer.SwinTransformer(
        img_size=64, patch_size=4, embed_dim=16, depths=(2, 2, depth - 6, 2),
        num_heads=(1, 2, 4, 8), window_size=2, num_classes=CLASSES,
    )  # fmt: skip


MODELS: Mapping[str, tuple[Callable[[int], Any], int]] = {
    "vit": (_vit, 32),
    "vit_layerscale": (functools.partial(_vit, init_values=1e-5), 32),
    "swin": (_swin, 64),
}
"""Function that builds a model of a given number of blocks, and its image size in pixels."""


class Work:
    """A case, ready to run: a call is one step, or one inference."""

    def __init__(self, case: HostCase, depth: int = DEPTH) -> None:
        build, size = MODELS[case.model]
        torch.manual_seed(0)
        model = build(depth)
        kind = VAPT if case.method == "vapt" else VPTDeep
        method = kind(num_prompts=PROMPTS)
        if case.provider == OURS:
            self.module = prompt_tune(model, method, memory=case.memory).train()
        else:
            self.module = provide(case.provider, model, method)
        self.infers = case.work == INFERENCE
        if self.infers:
            self.module.eval()
        self.images = torch.randn(BATCH, 3, size, size)
        self.labels = torch.arange(BATCH)
        self.trained = [p for p in self.module.parameters() if p.requires_grad]

    def forward(self) -> Tensor:
        """Return the logits in inference; in a step drop the old gradients and return the loss."""
        if self.infers:
            with torch.inference_mode():
                return self.module(self.images)
        for parameter in self.trained:
            parameter.grad = None
        return F.cross_entropy(self.module(self.images), self.labels)

    def __call__(self) -> None:
        loss = self.forward()
        if not self.infers:
            loss.backward()

    def parts(self) -> dict[str, float]:
        """Run one call, and return the seconds of this thread's CPU time by part."""
        start = time.thread_time()
        loss = self.forward()
        middle = time.thread_time()
        if self.infers:
            return {"whole": middle - start}
        loss.backward()
        end = time.thread_time()
        return {"forward": middle - start, "backward": end - middle, "whole": end - start}


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Limit PyTorch's operators to the calling thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
