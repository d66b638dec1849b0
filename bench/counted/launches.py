"""Kernel launches of a prompted block, forward and backward, counted without a GPU.

    python -m bench.counted.launches [--prompts P] [--layer-scale]

The launches of a model minus those of one with one block fewer; small and on the CPU, since
launches do not depend on sizes. `bench.counted.trace` defines what counts as a launch.
"""

from __future__ import annotations

import argparse
import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import timm
import torch
from torch import nn

from bench.counted.trace import counts, traced
from vpt_fast import VAPT, VPTDeep, prompt_tune
from vpt_fast.methods import Method
from vpt_fast.ops.memory_modes import MEMORY_MODES
from vpt_fast.reference.vit import ConcatenatedExperts, ConcatenatedPrompts


@contextlib.contextmanager
def counted() -> Iterator[Counter[str]]:
    """Count the launches inside by name, as on a GPU; the counter is filled on exit."""
    found: Counter[str] = Counter()
    with traced() as ops:
        yield found
    found.update(counts(ops))


def launches_of_step(model: nn.Module, images: torch.Tensor) -> tuple[Counter[str], Counter[str]]:
    """Return the launches of forward and backward of the sum of a model's logits, by name."""
    with counted() as forward:
        loss = model(images).float().sum()
    with counted() as backward:
        loss.backward()
    return forward, backward


def launches_per_block(build: Callable[[int], nn.Module]) -> tuple[Counter[str], Counter[str]]:
    """Return the launches of one block, forward and backward, by name.

    Args:
        build: Builds a model of a given number of blocks, for images of 32 x 32 pixels in bf16.
    """
    images = torch.randn(4, 3, 32, 32).bfloat16()
    more, less = (launches_of_step(build(depth), images) for depth in (5, 4))
    for longer, shorter in zip(more, less, strict=True):
        longer.subtract(shorter)
    forward, backward = (+counts for counts in more)
    return forward, backward


def backbone(depth: int, layer_scale: bool = False) -> Any:
    """Return a small timm model of `depth` blocks, in bf16."""
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=64, num_heads=1, depth=depth,
        num_classes=3, init_values=0.1 if layer_scale else None,
    ).bfloat16()  # fmt: skip


def providers(prompts: int, layer_scale: bool = False) -> dict[str, Callable[[int], nn.Module]]:
    """Return functions that build a model of a given depth, by name.

    They are eager PyTorch, and vpt_fast in every memory mode.
    """

    def plain(depth: int) -> Any:
        return backbone(depth, layer_scale)

    def ours(method: Method, memory: str) -> Callable[[int], nn.Module]:
        return lambda depth: prompt_tune(plain(depth), method, memory).train()

    vapt = VAPT(prompts, projector_dropout=0.0, channel_dropout=0.0)
    result: dict[str, Callable[[int], nn.Module]] = {
        "VPT-Deep, eager": lambda depth: ConcatenatedPrompts(
            plain(depth), VPTDeep(prompts)
        ).bfloat16(),
        "VAPT, eager": lambda depth: ConcatenatedExperts(plain(depth), vapt).bfloat16(),
    }
    for memory in MEMORY_MODES:
        result[f"VPT-Deep, {memory}"] = ours(VPTDeep(prompts), memory)
    result["VAPT, speed"] = ours(vapt, "speed")
    return result


def main(arguments: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.counted.launches", description=__doc__)
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--layer-scale", action="store_true")
    options = parser.parse_args(arguments)
    print("Kernel launches per block, counted; nothing was run on a GPU.")
    for name, build in providers(options.prompts, options.layer_scale).items():
        forward, backward = launches_per_block(build)
        for direction, found in (("forward", forward), ("backward", backward)):
            names = ", ".join(f"{n} {c}" if c > 1 else n for n, c in sorted(found.items()))
            print(f"{name:20}{direction:10}{found.total():4}   {names}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
