"""Banks of tiny models, their adapters, and the same tasks served alone."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from support.formulations import families
from support.formulations.families import FAMILIES
from support.formulations.plain import redraw_prompts
from vpt_fast import (
    VAPT,
    LinearProbe,
    PromptBank,
    VPTDeep,
    load_adapter,
    prompt_tune,
    save_adapter,
    trainable_parameters,
)

METHODS: dict[str, Callable[[int], Any]] = {
    "deep": lambda depth: VPTDeep(4),
    "dropped": lambda depth: VPTDeep(7, dropout=0.3),
    "projected": lambda depth: VPTDeep(3, project_dim=5),
    "shared": lambda depth: VPTDeep(2, shared=True),
    "last": lambda depth: VPTDeep(6, blocks=[depth - 1]),
    "none": lambda depth: VPTDeep(0),
    "linear": lambda depth: LinearProbe(),
    "vapt": lambda depth: VAPT(4),
    "vapt_again": lambda depth: VAPT(4, hidden_dim=8),
    "vapt_other": lambda depth: VAPT(9, hidden_dim=3, kernel_size=1),
    "vapt_paper": lambda depth: VAPT(2, variant="paper"),
}
VIT = "vit"


def backbone(family: str = VIT, dtype: torch.dtype = torch.float64) -> nn.Module:
    return families.build(family, dtype=dtype)


def write(
    model: nn.Module, method: Any, directory: Path, classes: int = 5, seed: int = 0, **more: Any
) -> Path:
    """Save an adapter of a copy of `model`, with prompts and head of order one."""
    own: Any = copy.deepcopy(model)
    own.reset_classifier(classes)
    own.to(next(model.parameters()).dtype)
    own = prompt_tune(own, method)
    generator = torch.Generator().manual_seed(seed)
    redraw_prompts(own, seed)
    with torch.no_grad():
        for name, parameter in trainable_parameters(own):
            if name.startswith("head"):
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(0.5 * noise)
    return save_adapter(own, directory, **more)


def alone(model: nn.Module, directory: Path, images: Tensor) -> Tensor:
    """Return the logits of a task served alone, image by image."""
    own: Any = copy.deepcopy(model)
    own.reset_classifier(
        json.loads((directory / "adapter_config.json").read_text())["model"]["args"]["num_classes"]
    )
    own.to(next(model.parameters()).dtype)
    own = load_adapter(own, directory).eval()
    with torch.no_grad():
        return torch.cat([own(image[None]) for image in images])


def fill(bank: PromptBank, model: nn.Module, root: Path, names: list[str]) -> dict[str, Path]:
    depth = len(model.blocks)  # type: ignore[arg-type]
    found = {}
    for seed, name in enumerate(names):
        found[name] = write(model, METHODS[name](depth), root / name, 2 + 3 * seed % 7, seed)
        bank.add(name, found[name])
    return found


def images_of(family: str, count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    shape = (count, FAMILIES[family].channels, *FAMILIES[family].image)
    return torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=dtype)


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())
