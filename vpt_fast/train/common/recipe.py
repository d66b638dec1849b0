"""Training recipe of the VPT papers: a frozen dataclass, optimizer and schedule."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import nn

from vpt_fast import trainable_parameters
from vpt_fast.train.common import names
from vpt_fast.train.common.names import (
    AUTO,
    BALANCED,
    DEFAULT_LR,
    MIXUP_MODES,
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
        opt: "sgd" (momentum, no Nesterov), "adamw", or "adam" (weight decay in the gradient).
        momentum: Momentum of SGD; AdamW and Adam have their own betas.
        warmup_epochs: Epochs of linear warm-up from 0; None takes a tenth of `epochs`, rounded
            down.
        amp_dtype: Dtype of torch.autocast: "float32", "bfloat16" or "float16".
        seed: Seed of initial values, the order of the images, augmentation and dropout.
        schedule: When the learning rate changes: after each "epoch", as published, or each "step".
        accumulation: Number of parts that a batch is computed in, one after another, to save
            memory; the step is that of the whole batch.
        smoothing: Label smoothing, in [0, 1).
        mixup, cutmix: Alphas of timm's Mixup of training images, one of them or both; 0 is off.
        mixup_prob: Probability that a batch (or pair, or image) is mixed.
        mixup_switch_prob: Probability of CutMix in place of Mixup, with both.
        mixup_mode: What is mixed alike: each "batch", "pair" of images, or image ("elem").
        bce_loss: Whether the loss is binary cross-entropy also where images have one label each;
            with several labels an image it always is.
        class_weights: Weights of the classes in the loss, in the order of the labels: "balanced",
            by inverse frequency in the training images, or numbers. Of binary cross-entropy they
            are weights of the positive labels.
        model_ema: Whether validation, adapters and the trained model have an exponential moving
            average of what is trained.
        model_ema_decay: Share of the average that a step keeps.
        model_ema_warmup: Whether that share grows from 0 with the steps.
        patience: Epochs without a better validation score after which training stops; None for no
            limit.

    Raises:
        ValueError: If a value is out of range, or two cannot be combined.
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
    # What a recipe had from its first version on ends here; see `settings`.
    smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5
    mixup_mode: str = "batch"
    bce_loss: bool = False
    class_weights: str | tuple[float, ...] | None = None
    model_ema: bool = False
    model_ema_decay: float = 0.9998
    model_ema_warmup: bool = False
    patience: int | None = None

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
        self._check_loss()
        self._check_average()

    def _check_loss(self) -> None:
        for name in ("mixup", "cutmix"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} is {value}; it must be a number that is at least 0")
        for name in ("mixup_prob", "mixup_switch_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be in [0, 1]")
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing is {self.smoothing}; it must be in [0, 1)")
        if self.mixup_mode not in MIXUP_MODES:
            known = ", ".join(MIXUP_MODES)
            raise ValueError(f"mixup_mode is {self.mixup_mode!r}; choose one of {known}")
        mixing = {"mixup_prob": 1.0, "mixup_switch_prob": 0.5, "mixup_mode": "batch"}
        unused = [name for name, default in mixing.items() if getattr(self, name) != default]
        if unused and not self.mixes:
            raise ValueError(f"{unused[0]} is of mixup and cutmix, which are both 0; set one")
        if self.mixup_switch_prob != 0.5 and not (self.mixup and self.cutmix):
            raise ValueError(
                "mixup_switch_prob chooses between mixup and cutmix, and one of them is 0; set it"
            )
        weights = self.class_weights
        if weights is None:
            return
        if isinstance(weights, str):
            if weights != BALANCED:
                raise ValueError(f"class_weights is {weights!r}; give {BALANCED}, or numbers")
        elif not (weights and all(math.isfinite(w) and w >= 0 for w in weights) and any(weights)):
            raise ValueError(
                f"class_weights is {weights}; give a number for each class, at least 0 and one "
                "above it"
            )
        for name in ("mixup", "cutmix", "smoothing"):
            if getattr(self, name):
                raise ValueError(
                    f"class_weights and {name} cannot be combined: they are of classes, and an "
                    "image then has a share of several; leave one out"
                )

    def _check_average(self) -> None:
        if not 0 <= self.model_ema_decay < 1:
            raise ValueError(f"model_ema_decay is {self.model_ema_decay}; it must be in [0, 1)")
        if not self.model_ema and (self.model_ema_warmup or self.model_ema_decay != 0.9998):
            raise ValueError("model_ema_decay and model_ema_warmup are of model_ema; set it")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience is {self.patience}; it must be at least 1")

    @property
    def mixes(self) -> bool:
        """Whether training images are mixed with each other, so that they change in every epoch."""
        return bool(self.mixup or self.cutmix)

    def settings(self) -> dict[str, Any]:
        """Return the fields, without later additions that have their defaults.

        What an earlier version wrote of a run lacks those, and belongs to the same run.
        """
        names = [field.name for field in fields(self)]
        later = names[names.index("accumulation") + 1 :]
        defaults = {field.name: field.default for field in fields(self)}
        return {
            name: value
            for name, value in asdict(self).items()
            if name not in later or value != defaults[name]
        }

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

    Prompts decay as the head's weight does; the head's bias does not. With AdamW and Adam, which
    baselines use that train biases of the backbone too, no bias decays (as in the program of Visual
    Prompt Tuning).

    Raises:
        ValueError: If nothing in the model is trainable.
    """
    head_biases = {id(layer.bias) for layer in head_layers(model)}
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in trainable_parameters(model):
        is_bias = recipe.opt != "sgd" and name.rpartition(".")[2].endswith("bias")
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
