"""The small vision transformer that this package ships.

`vpt_fast/assets/demo_vit.safetensors` holds a plain timm `VisionTransformer` (32 x 32 pixels in
patches of 8, so 16 patches and a [CLS] token; width 128, 6 blocks, 4 heads) that
`examples/pretrain_demo` trained to classify drawn letters and symbols. It is stored in fp16 with
its pretraining head. `demo_vit.md` beside it is its model card.

`timm.create_model(DEMO_MODEL, **DEMO_ARGS)` makes the same architecture with random weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import nn

DEMO_MODEL = "vit_tiny_patch16_224"
"""timm's name of the architecture that `DEMO_ARGS` makes smaller."""

DEMO_MEAN = (0.5, 0.5, 0.5)
"""Channel means that images in [0, 1] are normalised with."""

DEMO_STD = (0.5, 0.5, 0.5)
"""Channel standard deviations that images in [0, 1] are normalised with."""

DEMO_ARGS: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 128,
    "depth": 6,
    "num_heads": 4,
    "mlp_ratio": 3,
    "pretrained_cfg_overlay": {
        "input_size": [3, 32, 32],
        "mean": list(DEMO_MEAN),
        "std": list(DEMO_STD),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
    },
}
"""Arguments of `timm.create_model`, as JSON can hold them, next to `num_classes`."""

DEMO_CHECKPOINT = Path(__file__).resolve().parents[1] / "assets" / "demo_vit.safetensors"
"""File of the shipped weights."""


def demo_backbone(num_classes: int | None = 10, checkpoint: str | Path | None = None) -> nn.Module:
    """Build the demo backbone with its pretrained weights.

    Args:
        num_classes: Number of outputs of a new, randomly initialised head; 0 for none; None keeps
            the pretraining head (one output per letter or symbol).
        checkpoint: File that `examples/pretrain_demo` wrote; the shipped one by default.

    Returns:
        A timm `VisionTransformer` in training mode, fp32, on the CPU. It takes images
        (B, 3, 32, 32) normalised with `DEMO_MEAN` and `DEMO_STD`.

    Raises:
        FileNotFoundError: If the checkpoint does not exist.
        ValueError: If `num_classes` is negative, or the checkpoint does not fit the architecture.
    """
    if num_classes is not None and num_classes < 0:
        raise ValueError(f"num_classes must be None or at least 0, not {num_classes}")
    path = DEMO_CHECKPOINT if checkpoint is None else Path(checkpoint)
    if not path.is_file():
        raise FileNotFoundError(
            f"no demo backbone at {path}; `python -m examples.pretrain_demo`, in a clone of the "
            "repository, makes one"
        )
    try:
        state = {name: tensor.float() for name, tensor in load_file(path).items()}
        pretrained_classes = state["head.weight"].shape[0]
    except Exception as error:
        raise ValueError(f"{path} is not a demo backbone: {error}") from error
    if num_classes is None:
        num_classes = pretrained_classes
    else:
        del state["head.weight"], state["head.bias"]
    model: nn.Module = timm.create_model(DEMO_MODEL, num_classes=num_classes, **DEMO_ARGS)
    own = model.state_dict()
    wanted = {name for name in own if num_classes == pretrained_classes or "head." not in name}
    missing = sorted(wanted - state.keys() - {"head.weight", "head.bias"})
    unknown = sorted(state.keys() - own.keys())
    shapes = [n for n in state if n in own and state[n].shape != own[n].shape]
    if missing or unknown or shapes:
        raise ValueError(
            f"{path} does not fit {DEMO_MODEL} with {DEMO_ARGS}: missing {missing[:3]}, "
            f"unknown {unknown[:3]}, of another shape {shapes[:3]}"
        )
    with torch.no_grad():
        model.load_state_dict({**own, **state})
    return model
