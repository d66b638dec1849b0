"""Training recipe of the VPT papers: a frozen dataclass, optimizer and schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import nn

from vpt_fast import trainable_parameters
from vpt_fast.train.common import names
from vpt_fast.train.common.names import (
    AUTO,
    DEFAULT_LR,
    OPTIMIZERS,
    SCHEDULES,
    SGD_LR_WITHOUT_WARMUP,
    SIXTEEN_BIT,
)

AMP_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in names.AMP_DTYPES}
# The bias of the papers' head, -log((1 - 0.01) / 0.01) rounded.
HEAD_BIAS = -4.595


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters of training; the defaults are the papers' (VPT, ECCV 2022, appendix A).

    The papers choose `lr` and `weight_decay` for each data set on its validation images, `lr`
    from {50, 25, 10, 5, 2.5, 1, 0.5, 0.25, 0.1, 0.05} and `weight_decay` from {0.01, 0.001,
    0.0001, 0}; the defaults here are the middle of that grid.

    Attributes:
        epochs: Passes over the training images.
        batch_size: Images per step.
        lr: Base learning rate, multiplied by `batch_size / 256`; None takes 2.5 for SGD, 0.5 for
            SGD without warm-up, and 0.001 for AdamW.
        weight_decay: Weight decay of all trained parameters except the head's bias.
        opt: "sgd" (momentum, no Nesterov) or "adamw".
        momentum: Momentum of SGD; AdamW has its own betas.
        warmup_epochs: Epochs of linear warm-up from 0; None takes a tenth of `epochs`, rounded
            down.
        amp_dtype: Dtype of torch.autocast: "float32", "bfloat16" or "float16".
        seed: Seed of initial values, the order of the images, augmentation and dropout.
        schedule: When the learning rate changes: after each "epoch", as published, or each "step".
        accumulation: Number of parts that a batch is computed in, one after another, to save
            memory; the step is that of the whole batch.

    Raises:
        ValueError: If a value is out of range.
    """

    epochs: int = 100
    batch_size: int = 64
    lr: float | None = None
    weight_decay: float = 1e-4
    opt: str = "sgd"
    momentum: float = 0.9
    warmup_epochs: int | None = None
    amp_dtype: str = "float32"
    seed: int = 42
    schedule: str = "epoch"
    accumulation: int = 1

    def __post_init__(self) -> None:
        if self.opt not in OPTIMIZERS:
            raise ValueError(f"opt is {self.opt!r}; choose one of {', '.join(OPTIMIZERS)}")
        if self.amp_dtype not in AMP_DTYPES:
            known = ", ".join(AMP_DTYPES)
            raise ValueError(f"amp_dtype is {self.amp_dtype!r}; choose one of {known}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule is {self.schedule!r}; choose one of {', '.join(SCHEDULES)}")
        for name in ("epochs", "batch_size", "accumulation"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.warmup < self.epochs:
            raise ValueError(
                f"warmup_epochs is {self.warmup} of {self.epochs} epochs; "
                "it must be at least 0 and less than epochs"
            )
        for name, value in (("lr", self.base_lr), ("weight_decay", self.weight_decay)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} is {value}; it must be a number that is at least 0")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum is {self.momentum}; it must be in [0, 1)")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}; it must be at least 0 and less than 2**32")

    @property
    def base_lr(self) -> float:
        """Base learning rate, before it is scaled by the batch size."""
        if self.lr is not None:
            return self.lr
        return (
            SGD_LR_WITHOUT_WARMUP if self.opt == "sgd" and not self.warmup else DEFAULT_LR[self.opt]
        )

    @property
    def warmup(self) -> int:
        """Number of warm-up epochs."""
        return self.epochs // 10 if self.warmup_epochs is None else self.warmup_epochs

    @property
    def peak_lr(self) -> float:
        """Learning rate after warm-up: `lr * batch_size / 256`."""
        return self.base_lr * self.batch_size / 256

    @property
    def autocast_dtype(self) -> torch.dtype:
        """torch dtype that `amp_dtype` names."""
        return AMP_DTYPES[self.amp_dtype]


def resolve_amp_dtype(name: str, device: torch.device) -> str:
    """Return one of `AMP_DTYPES`; other names as they are, for `Recipe` to refuse.

    Args:
        name: One of `AMP_DTYPES`; or "auto", bfloat16 on a GPU that has it and else float32; or
            "16-bit", bfloat16 but on a GPU without it, which takes float16.
        device: Device that the model runs on.
    """
    if name not in (AUTO, SIXTEEN_BIT):
        return name
    emulated: Any = {"including_emulation": False}
    has_it = device.type == "cuda" and torch.cuda.is_bf16_supported(**emulated)
    if name == AUTO:
        return "bfloat16" if has_it else "float32"
    return "bfloat16" if has_it or device.type == "cpu" else "float16"


def head_layers(model: nn.Module) -> list[nn.Linear]:
    """Return the linear layers of a timm model's classifier (two for a distilled DeiT).

    Raises:
        ValueError: If the model has no classifier.
    """
    timm_model: Any = model
    classifier = timm_model.get_classifier()
    parts = classifier if isinstance(classifier, (tuple, list)) else [classifier]
    layers = [layer for part in parts for layer in part.modules() if isinstance(layer, nn.Linear)]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no classifier to train; "
            "create it with num_classes=..., the number of your classes"
        )
    return layers


@torch.no_grad()
def init_head(model: nn.Module) -> None:
    """Initialise the head as the papers do: Kaiming-normal weight (fan-out), every bias -4.595.

    Args:
        model: timm model with a linear classifier; changed in place, from torch's global random
            numbers.

    Raises:
        ValueError: If the model has no classifier.
    """
    for layer in head_layers(model):
        nn.init.kaiming_normal_(layer.weight, a=0, mode="fan_out")
        if layer.bias is not None:
            nn.init.constant_(layer.bias, HEAD_BIAS)


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Build the recipe's optimizer over the trained parameters, with timm's factory.

    Prompts decay as the head's weight does; the head's bias does not. With AdamW, which baselines
    use that train biases of the backbone too, no bias decays (as in the program of Visual Prompt
    Tuning).

    Raises:
        ValueError: If nothing in the model is trainable.
    """
    head_biases = {id(layer.bias) for layer in head_layers(model)}
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in trainable_parameters(model):
        is_bias = recipe.opt == "adamw" and name.rpartition(".")[2].endswith("bias")
        (plain if is_bias or id(parameter) in head_biases else decayed).append(parameter)
    if not decayed and not plain:
        raise ValueError("the model has no trainable parameter; call vpt_fast.prompt_tune first")
    groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return create_optimizer_v2(
        [group for group in groups if group["params"]],
        opt=OPTIMIZERS[recipe.opt],
        lr=recipe.peak_lr,
        momentum=recipe.momentum,
    )


def make_scheduler(
    optimizer: torch.optim.Optimizer, recipe: Recipe, steps: int = 1
) -> CosineLRScheduler:
    """Build the recipe's schedule: linear warm-up from 0, then cosine to 0.

    By epoch, call `scheduler.step(epoch)` after each epoch, counted from 1: with warm-up, the first
    one has learning rate 0. By step, call `scheduler.step_update(step)` after each step, counted
    from 1.

    Args:
        optimizer: Optimizer whose learning rate is scheduled.
        recipe: Recipe with epochs, warm-up and schedule.
        steps: Number of steps of an epoch; used by a schedule by step.
    """
    unit = steps if recipe.schedule == "step" else 1
    return CosineLRScheduler(
        optimizer,
        t_initial=(recipe.epochs - recipe.warmup) * unit,
        lr_min=0.0,
        warmup_t=recipe.warmup * unit,
        warmup_lr_init=0.0,
        warmup_prefix=True,
        t_in_epochs=recipe.schedule == "epoch",
    )
