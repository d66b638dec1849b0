"""Bytes saved for backward by number of prompted blocks, counted, as rows of the results."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import timm
import torch

from bench.providers.models import OURS, WITHOUT
from vpt_fast import VPTDeep
from vpt_fast.analysis.activation_memory import EAGER, PLAIN, SavedBytes
from vpt_fast.models.tuned import blocks_of

MODEL, BATCH, PROMPTS = "vit_base_patch16_224", 64, 50
_NAMES = {EAGER: "concat", "speed": OURS}


def saved_rows() -> Iterator[dict[str, Any]]:
    """Yield rows of eager PyTorch, of vpt_fast and of the model without prompts, in bf16.

    The prompted blocks are the last `blocks` blocks.
    """
    with torch.device("meta"):
        model: Any = timm.create_model(MODEL, num_classes=100)
    meter, depth = SavedBytes(model, (3, 224, 224), torch.bfloat16), len(blocks_of(model))
    common = {
        "kind": "counted", "bench": "memory", "model": MODEL, "method": "vpt-deep",
        "batch": BATCH, "dtype": "bfloat16", "image_size": 224,
    }  # fmt: skip

    def row(provider: str, blocks: int, name: str) -> dict[str, Any]:
        method = VPTDeep(PROMPTS, blocks=range(depth - blocks, depth) if blocks else None)
        saved = meter.bytes_of(method, provider, BATCH) / 2**20
        prompts = PROMPTS if blocks else 0
        return {
            **common, "blocks": blocks, "prompts": prompts, "provider": name,
            "kept_mib": f"{saved:.1f}",
        }  # fmt: skip

    for blocks in range(1, depth + 1):
        for provider, name in _NAMES.items():
            yield row(provider, blocks, name)
    yield row(PLAIN, 0, WITHOUT)
