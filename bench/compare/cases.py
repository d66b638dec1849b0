"""What is benchmarked: work on one model, with its method, batch size, dtype and prompt count."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, replace
from typing import Any

import timm
import torch

from bench.providers.models import EAGER, GPU_PROVIDERS, OURS, PROVIDERS, WITHOUT
from vpt_fast import VAPT, PromptMethod
from vpt_fast.methods import find_method
from vpt_fast.ops.memory_modes import MEMORY_MODES

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
OTHERS = ("e2vpt", "vfpt", "bpt", "dvpt", "cvpt", "gate-vpt")
"""Methods that are compared with the concatenation of what their modules make."""
METHODS = ("vpt-deep", "vapt", *OTHERS)
STEP, INFERENCE = "step", "inference"
SWIN = "swin_tiny_patch4_window7_224"
DINOV3, DINOV3_BASE = "vit_small_patch16_dinov3", "vit_base_patch16_dinov3"


@dataclass(frozen=True)
class Case:
    """One comparison.

    Attributes:
        work: `STEP` (forward, loss and backward) or `INFERENCE`.
        model: Model name in timm.
        method: One of `METHODS`.
        batch: Images per batch.
        prompts: Prompts per block.
        dropout: Rate for prompts, or for channels and projector (VAPT).
        dtype: One of `DTYPES`; "published" runs in fp32 regardless.
        providers: Providers to compare, of `bench.providers.models.GPU_PROVIDERS`.
        image_size: Height and width in pixels.
        classes: Classes of the head.
        memory: What vpt_fast saves for backward, one of `MEMORY_MODES`.
    """

    work: str = STEP
    model: str = "vit_small_patch16_224"
    method: str = "vpt-deep"
    batch: int = 8
    prompts: int = 50
    dropout: float = 0.0
    dtype: str = "float32"
    providers: tuple[str, ...] = EAGER
    image_size: int = 224
    classes: int = 100
    memory: str = "speed"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("work", self.work, (STEP, INFERENCE)),
            ("method", self.method, METHODS),
            ("dtype", self.dtype, tuple(DTYPES)),
            ("memory", self.memory, MEMORY_MODES),
            *(("provider", provider, GPU_PROVIDERS) for provider in self.providers),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; choose one of {', '.join(known)}")

    def __str__(self) -> str:
        dropout = f"-dropout {self.dropout:g}" if self.dropout else ""
        dropout += f"-{self.memory}" if self.memory != "speed" else ""
        return (
            f"{self.work}-{self.model}-{self.method}-p{self.prompts}-b{self.batch}-{self.dtype}"
            f"{dropout}"
        )

    def settings(self, dropout: float | None = None) -> PromptMethod:
        """Return the method, with `dropout` in place of its own rate if given."""
        rate = self.dropout if dropout is None else dropout
        if self.method == "vapt":
            return VAPT(self.prompts, projector_dropout=rate, channel_dropout=rate)
        kind: Any = find_method(self.method)
        method: PromptMethod = kind(self.prompts, dropout=rate)
        return method

    def build(self) -> Any:
        """Return a timm model with seeded random weights, whose values do not affect speed."""
        model, state = _plain(self.model, self.classes, self.image_size)
        torch.set_rng_state(state)  # for the weights that a method adds
        return copy.deepcopy(model)

    def inputs(self, count: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return seeded images (count or batch, 3, height, width), fp32, and labels."""
        count = self.batch if count is None else count
        generator = torch.Generator().manual_seed(1)
        size = self.image_size
        images = torch.randn(count, 3, size, size, generator=generator)
        return images, torch.randint(self.classes, (count,), generator=generator)


@functools.lru_cache(maxsize=1)
def _plain(model: str, classes: int, image_size: int) -> tuple[Any, torch.Tensor]:
    """Return the model that `Case.build` copies, and the generator's state after drawing it.

    Drawing the weights of a large model takes seconds.
    """
    torch.manual_seed(0)
    built = timm.create_model(model, num_classes=classes, img_size=image_size).eval()
    return built, torch.get_rng_state()


def cpu_cases() -> list[Case]:
    """Return what `make bench` compares on a CPU."""
    small, tiny = Case(), Case(model="vit_tiny_patch16_224")
    three, two = ("concat", OURS, WITHOUT), ("concat", OURS)
    rotary = Case(model=DINOV3, image_size=256, providers=("concat", "keys_concat", OURS, WITHOUT))
    return [
        *(replace(small, prompts=p) for p in (0, 10, 50, 100, 200)),
        *(replace(small, prompts=p, dropout=0.1, providers=three) for p in (50, 200)),
        *(replace(small, method="vapt", prompts=p) for p in (10, 50, 100)),
        *(replace(small, method=name, providers=two) for name in OTHERS),
        *(replace(tiny, batch=b) for b in (1, 4, 16, 32)),
        replace(tiny, providers=PROVIDERS),
        replace(tiny, dtype="bfloat16"),
        replace(small, model="vit_base_patch16_224", batch=2),
        replace(small, model="vit_large_patch16_224", batch=1, providers=three),
        *(replace(small, model=SWIN, prompts=p, providers=three) for p in (10, 50)),
        *(replace(rotary, prompts=p) for p in (10, 50, 100)),
        *(replace(small, work=INFERENCE, prompts=p) for p in (10, 50, 200)),
        replace(small, work=INFERENCE, method="vapt"),
    ]
