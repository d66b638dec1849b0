"""Settings of the papers that depend on the method and on the data set.

Settings that are the same everywhere are the defaults of `Recipe`. VPT: arXiv 2203.12119, section
4.1 and appendix A. VAPT (arXiv 2501.18936) is compared under the same protocol, with batches of 64.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from vpt_fast.methods import VAPT, Method, VPTDeep, VPTShallow

PAPERS = ("vpt", "vapt")
LEARNING_RATES = {
    "sgd": (50.0, 25.0, 10.0, 5.0, 2.5, 1.0, 0.5, 0.25, 0.1, 0.05),
    "adamw": (0.005, 0.001, 0.0005, 0.0001),
    "adam": (0.005, 0.001, 0.0005, 0.0001),
}
"""The papers' grids of base learning rates, by optimizer; they do not use Adam, which has
AdamW's."""
WEIGHT_DECAYS = (0.01, 0.001, 0.0001, 0.0)
PROMPT_COUNTS = (1, 5, 10, 50, 100, 200)
"""The papers' grids for ViT."""
SEEDS = (42, 44, 82, 100, 800)
"""The five seeds of the papers."""

_ADAMW = ("full", "partial", "bias", "adapter")
_DEEP_DROPOUT = 0.1
# With fewer prompts than this, VPT's batches are twice as large.
_MANY_PROMPTS = 100


def default_optimizer(method: Method) -> str:
    """Return the optimizer that the papers train a method with, one of `names.OPTIMIZERS`."""
    return "adamw" if method.name in _ADAMW else "sgd"


@dataclass(frozen=True)
class PaperSettings:
    """Settings of a paper beyond the defaults of `Recipe`.

    Attributes:
        method: Method with the prompt dropout of the paper, unless one was chosen.
        batch_size: Images per step.
        resize: How images are resized, one of `image_options.RESIZES`.
        augment: Whether training images are augmented.
        crops: How training images are cropped, one of `augmentation.CROPS`.
    """

    method: Method
    batch_size: int
    resize: str
    augment: bool
    crops: str


def paper_settings(
    name: str | None, method: Method, data_format: str, chosen: frozenset[str] = frozenset()
) -> PaperSettings:
    """Return the settings of a paper for a method and a data set.

    VTAB-1k: images resized to the model's size in both directions, no augmentation. Other data, as
    FGVC: the shorter side resized to 256 / 224 of the model's, a random crop and flips in training
    and the centre crop elsewhere. Deep prompts have a dropout of 0.1. Batches are of 64 images;
    of 128 for VPT with fewer than 100 prompts.

    Args:
        name: One of `PAPERS`, or None for the defaults of this program.
        method: Method to train.
        data_format: Format of the data set, one of `names.FORMATS` but "auto".
        chosen: Names of the method's fields that the user has set.

    Raises:
        ValueError: If `name` is unknown.
    """
    if name is None:
        return PaperSettings(method, 64, "model", augment=True, crops="scaled")
    if name not in PAPERS:
        raise ValueError(f"recipe is {name!r}; choose one of {', '.join(PAPERS)}")
    tuned: Any = method
    if isinstance(method, VPTDeep | VAPT) and "dropout" not in chosen:
        tuned = replace(tuned, dropout=_DEEP_DROPOUT)
    is_vtab = data_format.startswith("vtab")
    return PaperSettings(
        method=tuned,
        batch_size=paper_batch_size(name, method),
        resize="squash" if is_vtab else "crop",
        augment=not is_vtab,
        crops="plain",
    )


def paper_batch_size(name: str | None, method: Method) -> int:
    """Return the images per step of a paper: 64, or 128 for VPT with fewer than 100 prompts.

    Args:
        name: One of `PAPERS`, or None.
        method: Method to train.
    """
    prompted = isinstance(method, VPTShallow | VPTDeep)
    double = name == "vpt" and prompted and method.num_prompts < _MANY_PROMPTS
    return 128 if double else 64
