"""Task of the demo: handwritten digits, the methods, and their learning rates."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from timm.utils import random_seed
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader

from vpt_fast import (
    BPT,
    CVPT,
    DVPT,
    E2VPT,
    VAPT,
    VFPT,
    AdapterTuning,
    BiasTuning,
    FullTuning,
    GateVPT,
    LinearProbe,
    MLPHead,
    PartialTuning,
    VPTDeep,
    VPTShallow,
    prompt_tune,
)
from vpt_fast.backbones.build import data_config_of
from vpt_fast.backbones.demo_backbone import demo_backbone
from vpt_fast.extras import require_extra
from vpt_fast.methods import INITS, Method
from vpt_fast.train.common.paper_settings import default_optimizer
from vpt_fast.train.common.recipe import Recipe, init_head
from vpt_fast.train.data.image_loaders import set_data_config
from vpt_fast.train.data.image_options import ImageOptions
from vpt_fast.train.data.images import ArrayImages, eval_transform, make_loader
from vpt_fast.train.loop.epochs import fit
from vpt_fast.train.loop.fit_result import FitResult
from vpt_fast.train.loop.initial_prompts import initial_prompts

CLASS_NAMES = [str(digit) for digit in range(10)]
NUM_PROMPTS = 10
SPLIT_SEED = 0


@dataclass(frozen=True)
class Setting:
    """Method of the demo, with its title, base learning rate and weight decay."""

    title: str
    method: Method
    lr: float
    weight_decay: float


# For the demo's 20 epochs. Chosen by the last epoch's accuracy on the 200 validation images (then
# the lower loss) with seed 42: the linear probe from the papers' grid without weight decays below
# 0.001 (with 0.0001 it was half a point better at a far higher loss), the others with `--select
# --weight-decays 0.01 --lrs 2.5 1 0.5 0.25`.
SETTINGS: dict[str, Setting] = {
    "linear": Setting("Linear probe", LinearProbe(), 25.0, 0.001),
    "vpt-shallow": Setting("VPT-Shallow", VPTShallow(NUM_PROMPTS), 2.5, 0.01),
    "vpt-deep": Setting("VPT-Deep", VPTDeep(NUM_PROMPTS), 2.5, 0.01),
    "vapt": Setting("VAPT", VAPT(NUM_PROMPTS), 1.0, 0.01),
}

DEMO = tuple(SETTINGS)
"""Names of the methods that the demo itself compares."""

# The other prompt methods of the package, by the same rule: learning rates of 2.5, 1, 0.5 and 0.25.
SETTINGS |= {
    "e2vpt": Setting("E2VPT", E2VPT(NUM_PROMPTS), 1.0, 0.01),
    "vfpt": Setting("VFPT", VFPT(NUM_PROMPTS), 2.5, 0.01),
    "bpt": Setting("BPT", BPT(NUM_PROMPTS), 1.0, 0.01),
    "dvpt": Setting("DVPT, tokens", DVPT(NUM_PROMPTS), 1.0, 0.01),
    "dvpt-feature": Setting("DVPT, feature", DVPT(NUM_PROMPTS, source="feature"), 1.0, 0.01),
    "cvpt": Setting("CVPT", CVPT(NUM_PROMPTS), 1.0, 0.01),
    "gate-vpt": Setting("GateVPT", GateVPT(NUM_PROMPTS), 1.0, 0.01),
    **{
        f"vpt-deep-{init}": Setting(f"VPT-Deep, {init}", VPTDeep(NUM_PROMPTS, init=init), 2.5, 0.01)
        for init in INITS[1:]
    },
}

# And the baselines: MLPHead from the same, the others, with AdamW, from 0.1, 0.05, 0.01 and 0.005.
SETTINGS |= {
    "mlp-head": Setting("MLP head", MLPHead(), 0.25, 0.01),
    "partial": Setting("Partial, last block", PartialTuning(), 0.05, 0.01),
    "bias": Setting("Bias", BiasTuning(), 0.1, 0.01),
    "adapter": Setting("Adapter", AdapterTuning(), 0.1, 0.01),
    "full": Setting("Full", FullTuning(), 0.005, 0.01),
}

# For the papers' 100 epochs, by the same rule: the linear probe from learning rates of 5 to 50 and
# all weight decays; VAPT with `--lrs 10 2.5 0.5 --weight-decays 0.01`. VPT-Deep's learning rate is
# the better of 0.5 and 2.5 over the papers' five seeds, on a backbone of half the training.
STUDY_SETTINGS = SETTINGS | {
    "linear": replace(SETTINGS["linear"], lr=5.0),
    "vapt": replace(SETTINGS["vapt"], lr=0.5),
}


@dataclass(frozen=True)
class Digits:
    """Three splits of the digits, and the test images (797, 8, 8) in [0, 1] for the pictures."""

    train: ArrayImages
    val: ArrayImages
    test: ArrayImages
    test_pixels: np.ndarray


def load_splits() -> Digits:
    """Load the digits as inputs of the demo backbone: 800, 200 and 797 images."""
    require_extra("reports", "sklearn")
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    labels = digits.target
    rest, test = train_test_split(
        np.arange(len(labels)), test_size=797, stratify=labels, random_state=SPLIT_SEED
    )
    train, val = train_test_split(
        rest, test_size=200, stratify=labels[rest], random_state=SPLIT_SEED
    )
    pixels = digits.images / 16
    transform = eval_transform(data_config_of(demo_backbone(len(CLASS_NAMES))))

    def part(indices: np.ndarray) -> ArrayImages:
        images = (255 * pixels[indices]).round().astype(np.uint8)
        return ArrayImages(images, labels[indices], transform)

    return Digits(part(train), part(val), part(test), pixels[test])


def new_model(setting: Setting, seed: int, device: torch.device) -> nn.Module:
    """Return the demo backbone with the papers' head and `setting`'s prompts."""
    random_seed(seed)
    model = demo_backbone(num_classes=len(CLASS_NAMES))
    init_head(model)
    set_data_config(model, ImageOptions())
    return prompt_tune(model, setting.method).to(device)


def test_loader(dataset: ArrayImages) -> DataLoader:
    """Return the one loader for evaluation, so that accuracies can be compared exactly."""
    return make_loader(dataset, batch_size=100)


def train_once(
    setting: Setting,
    recipe: Recipe,
    digits: Digits,
    device: torch.device,
    *,
    select: bool,
    progress: bool = True,
) -> tuple[nn.Module, FitResult]:
    """Train one model.

    Args:
        setting: Method and its title.
        recipe: Recipe to train it with.
        digits: Splits of the digits.
        device: Device to train on.
        select: Whether to train on the 800 images and select the epoch that is best on validation;
            else training is on all 1,000 images and ends with the last epoch, as in the papers'
            tables.
        progress: Whether to show a bar on a terminal.
    """
    model = new_model(setting, recipe.seed, device)
    dataset = digits.train if select else ConcatDataset([digits.train, digits.val])
    batches = make_loader(dataset, recipe.batch_size, shuffle=True, seed=recipe.seed)
    initial_prompts(model, batches)
    result = fit(
        model,
        batches,
        recipe,
        val_batches=test_loader(digits.val) if select else None,
        progress=progress,
        description=f"{setting.title:<12}",
    )
    if result.interrupted:
        raise KeyboardInterrupt
    return model, result


def recipe_of(setting: Setting, epochs: int, seed: int) -> Recipe:
    """Return the papers' recipe with the setting's learning rate and weight decay."""
    return Recipe(
        epochs=epochs, lr=setting.lr, weight_decay=setting.weight_decay, seed=seed,
        opt=default_optimizer(setting.method),
    )  # fmt: skip
