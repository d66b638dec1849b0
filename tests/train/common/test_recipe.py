"""The papers' recipe: learning rates, weight decay and the head."""

from __future__ import annotations

import math

import pytest
import torch
from support.pictures import backbone
from torch import nn

from vpt_fast import FullTuning, VPTDeep, prompt_tune, trainable_parameters
from vpt_fast.train.common.recipe import (
    Recipe,
    head_layers,
    init_head,
    make_optimizer,
    make_scheduler,
)


def tuned(**arguments):
    return prompt_tune(backbone(**arguments), VPTDeep(2))


def test_defaults_are_the_papers():
    recipe = Recipe()
    assert (recipe.epochs, recipe.warmup, recipe.batch_size) == (100, 10, 64)
    assert (recipe.opt, recipe.momentum, recipe.amp_dtype) == ("sgd", 0.9, "float32")
    assert recipe.peak_lr == recipe.base_lr * 64 / 256
    assert Recipe(lr=10, batch_size=128).peak_lr == 5


def test_defaults_follow_epochs_and_optimizer():
    assert Recipe(epochs=30).warmup == 3
    assert Recipe(epochs=1).warmup == 0
    assert Recipe(epochs=30, warmup_epochs=5).warmup == 5
    assert Recipe(opt="adamw").base_lr == Recipe(opt="adamw", epochs=3).base_lr == 1e-3
    assert (Recipe().base_lr, Recipe(epochs=10).base_lr, Recipe(epochs=9).base_lr) == (
        2.5,
        2.5,
        0.5,
    )
    assert Recipe(epochs=9, warmup_epochs=1).base_lr == 2.5
    assert Recipe(epochs=9, lr=2.5).base_lr == 2.5
    assert Recipe(opt="adamw", lr=0.5).base_lr == 0.5


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("batch_size", 0),
        ("lr", -1.0),
        ("lr", math.nan),
        ("weight_decay", -0.1),
        ("weight_decay", math.inf),
        ("opt", "sdg"),
        ("momentum", 1.0),
        ("warmup_epochs", 100),
        ("warmup_epochs", -1),
        ("amp_dtype", "fp16"),
        ("seed", -1),
    ],
)
def test_bad_values_are_named(field, value):
    with pytest.raises(ValueError, match=rf"{field} is '?{value}"):
        Recipe(**{field: value})


@pytest.mark.parametrize("warmup", [0, 10])
def test_the_schedule_is_linear_warm_up_then_cosine_to_zero(warmup):
    recipe = Recipe(epochs=100, warmup_epochs=warmup, lr=2.0, batch_size=128)
    optimizer = make_optimizer(tuned(), recipe)
    scheduler = make_scheduler(optimizer, recipe)
    for epoch in range(100):
        if epoch < warmup:
            want = epoch / warmup
        else:
            want = 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (100 - warmup)))
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(want, abs=1e-12), epoch
        scheduler.step(epoch + 1)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", ["test_vit", "deit_tiny_distilled_patch16_224"])
def test_everything_decays_but_the_heads_bias(name):
    import timm

    model = prompt_tune(
        timm.create_model(name, num_classes=3, img_size=32, depth=2), VPTDeep(2, project_dim=8)
    )
    recipe = Recipe(weight_decay=0.01, lr=4.0)
    optimizer = make_optimizer(model, recipe)
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    trained = trainable_parameters(model)
    assert decay.keys() == {id(parameter) for _, parameter in trained}
    for parameter_name, parameter in trained:
        is_head_bias = parameter_name in ("head.bias", "head_dist.bias")
        assert decay[id(parameter)] == (0 if is_head_bias else 0.01), parameter_name
    assert any(value == 0 for value in decay.values())


@pytest.mark.parametrize(("opt", "decayed"), [("sgd", 0.01), ("adamw", 0.0)])
def test_no_bias_decays_under_adamw(opt, decayed):
    """As in the published program; under SGD only the head's bias does not decay."""
    import timm

    model = prompt_tune(timm.create_model("test_vit", num_classes=3, img_size=32), FullTuning())
    optimizer = make_optimizer(model, Recipe(weight_decay=0.01, opt=opt))
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    biases = {name for name, _ in trainable_parameters(model) if name.endswith("bias")}
    assert {"norm.bias", "patch_embed.proj.bias", "blocks.0.attn.qkv.bias"} <= biases
    for name, parameter in trainable_parameters(model):
        expected = 0.0 if name == "head.bias" else decayed if name in biases else 0.01
        assert decay[id(parameter)] == expected, name


def test_sgd_has_momentum_without_nesterov():
    optimizer = make_optimizer(tuned(), Recipe(lr=4.0))
    assert type(optimizer) is torch.optim.SGD
    for group in optimizer.param_groups:
        assert (group["momentum"], group["nesterov"], group["lr"]) == (0.9, False, 1.0)
    assert type(make_optimizer(tuned(), Recipe(opt="adamw"))) is torch.optim.AdamW


def test_the_head_is_kaiming_normal_by_fan_out():
    torch.manual_seed(0)
    model = backbone(num_classes=200)
    init_head(model)
    assert torch.all(model.head.bias == -4.595)
    assert model.head.weight.std().item() == pytest.approx(math.sqrt(2 / 200), rel=0.02)
    assert model.head.weight.mean().item() == pytest.approx(0, abs=0.005)


def test_a_model_without_classifier_is_refused():
    with pytest.raises(ValueError, match="has no classifier.*num_classes"):
        head_layers(backbone(num_classes=0))


def test_a_model_in_which_nothing_is_trained_is_refused():
    model = backbone().requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        make_optimizer(model, Recipe())
    assert isinstance(head_layers(model)[0], nn.Linear)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"smoothing": 1.0}, r"smoothing is 1.0; it must be in \[0, 1\)"),
        ({"mixup": -1.0}, "mixup is -1.0"),
        ({"cutmix": math.nan}, "cutmix is nan"),
        ({"mixup": 1.0, "mixup_prob": 2.0}, "mixup_prob is 2.0"),
        ({"mixup": 1.0, "cutmix": 1.0, "mixup_switch_prob": -1.0}, "mixup_switch_prob is -1.0"),
        ({"mixup": 1.0, "mixup_mode": "half"}, "mixup_mode is 'half'; choose one of batch, pair"),
        ({"mixup_mode": "pair"}, "mixup_mode is of mixup and cutmix, which are both 0"),
        ({"mixup": 1.0, "mixup_switch_prob": 0.2}, "chooses between mixup and cutmix"),
        ({"class_weights": "even"}, "class_weights is 'even'; give balanced"),
        ({"class_weights": ()}, "a number for each class"),
        ({"class_weights": (1.0, -1.0)}, "a number for each class"),
        ({"class_weights": (0.0, 0.0)}, "a number for each class"),
        ({"class_weights": "balanced", "smoothing": 0.1}, "class_weights and smoothing cannot"),
        ({"class_weights": (1.0, 2.0), "cutmix": 1.0}, "class_weights and cutmix cannot"),
        ({"model_ema": True, "model_ema_decay": 1.0}, "model_ema_decay is 1.0"),
        ({"model_ema_decay": 0.9}, "model_ema_decay and model_ema_warmup are of model_ema"),
        ({"patience": 0}, "patience is 0; it must be at least 1"),
    ],
)
def test_additions_to_the_papers_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**changes)


def test_adam_is_torchs_and_decays_no_bias():
    recipe = Recipe(opt="adam", batch_size=256, weight_decay=0.01)
    optimizer = make_optimizer(prompt_tune(backbone(), FullTuning()), recipe)
    assert type(optimizer) is torch.optim.Adam
    decayed, plain = optimizer.param_groups
    assert (decayed["lr"], decayed["weight_decay"], plain["weight_decay"]) == (1e-3, 0.01, 0)
    assert decayed["betas"] == (0.9, 0.999)
    named = dict(prompt_tune(backbone(), FullTuning()).named_parameters())
    assert len(plain["params"]) == sum(name.endswith("bias") for name in named)


def test_settings_leave_out_later_additions_that_are_off():
    old = {"epochs", "batch_size", "lr", "weight_decay", "opt", "momentum", "warmup_epochs"}
    old |= {"amp_dtype", "seed", "schedule", "accumulation"}
    assert Recipe().settings().keys() == old
    changed = Recipe(mixup=0.8, patience=3).settings()
    assert changed.keys() - old == {"mixup", "patience"}
