"""A block is read once, and every call notices changes of it.

A model that was used, changed and used again is compared with a copy of it, which is read anew.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.formulations import families
from support.formulations.families import AVERAGE
from support.formulations.plain import distance, redraw_prompts, tuned_gradients
from test_fused_changes import Doubling, LowRank, Shifted, _patch
from timm.layers import QuickGELU
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from torch.nn.utils import parametrize

from vpt_fast import VAPT, VPTDeep, fold_backbone, prompt_tune
from vpt_fast.models.fold import unfold_backbone

METHODS: dict[str, Any] = {"deep": VPTDeep(3), "vapt": VAPT(3)}
MIDDLE = 1  # index of the changed block, of three


def tuned(method: str = "deep", dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """Build a tuned model with LayerScale, in eval mode."""
    options = {"init_values": 0.1, **options}
    model = prompt_tune(families.build(AVERAGE, dtype=dtype, **options), METHODS[method])
    redraw_prompts(model)
    return model


def images(dtype: torch.dtype = torch.float64) -> Tensor:
    return families.images(AVERAGE, dtype=dtype)


def results(model: Any, image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the logits and the gradients of all trained parameters."""
    torch.manual_seed(5)  # for dropout
    output = model(image)
    return output.detach(), tuned_gradients(model, output)


def assert_as_read_anew(model: Any, image: Tensor, tolerance: float = 1e-12) -> Tensor:
    """Assert that logits and gradients equal a copy's; return the logits."""
    anew = copy.deepcopy(model)
    assert all(vars(block).get("_reading") is None for block in anew.blocks)
    (found, grads), (expected, right) = results(model, image), results(anew, image)
    assert distance(found, expected) <= tolerance
    assert set(grads) == set(right)
    for name, grad in grads.items():
        assert distance(grad, right[name]) <= tolerance, name
    return found


def linear(block: Any) -> None:
    old = block.mlp.fc1
    block.mlp.fc1 = nn.Linear(old.in_features, old.out_features, dtype=old.weight.dtype)
    block.mlp.fc1.requires_grad_(False)


def _activation(module: nn.Module) -> Callable[[Any], None]:
    return lambda block: setattr(block.mlp, "act", module)


def _kind(where: str, kind: type[nn.Module]) -> Callable[[Any], None]:
    return lambda block: setattr(block.get_submodule(where), "__class__", kind)


def _dropped(where: str) -> Callable[[Any], None]:
    def change(block: Any) -> None:
        module = block.get_submodule(where)
        module.p = 0.5
        module.train()

    return change


def _scale(block: Any) -> None:
    block.attn.scale, block.attn.fused_attn = 0.3, False  # timm's fused attention ignores it


def _heads(block: Any) -> None:
    block.attn.num_heads, block.attn.head_dim, block.attn.scale = 4, 16, 0.25


def swap(block: Any) -> None:
    block.attn.qkv.weight.data = 1.5 * block.attn.qkv.weight.data


def parameter(block: Any) -> None:
    block.norm2.weight = nn.Parameter(1.5 * block.norm2.weight.detach(), requires_grad=False)


def in_place(block: Any) -> None:
    with torch.no_grad():
        block.attn.proj.weight.mul_(1.5)


def not_contiguous(block: Any) -> None:
    weight = block.mlp.fc2.weight
    weight.data = (1.5 * weight.data).t().contiguous().t()


def _spread(block: Any) -> None:
    """Replace a weight by one at the same address with other strides."""
    block.norm2.weight.data = block.norm2.weight.data[:1].expand(block.norm2.weight.shape[0])


CHANGES: dict[str, Callable[[Any], Any]] = {
    "linear": linear,
    "relu": _activation(nn.ReLU()),
    "quick_gelu": _activation(QuickGELU()),
    "linear_class": _kind("attn.proj", LowRank),
    "norm_class": _kind("norm1", Shifted),
    "parametrized": lambda b: parametrize.register_parametrization(
        b.attn.qkv, "weight", Doubling()
    ),
    "dropout": _dropped("mlp.drop1"),
    "projection_dropout": _dropped("attn.proj_drop"),
    "scale": _scale,
    "heads": _heads,
    "eps1": lambda b: setattr(b.norm1, "eps", 0.5),
    "eps2": lambda b: setattr(b.norm2, "eps", 0.5),
    "no_layer_scale": lambda b: setattr(b, "ls1", nn.Identity()),
    "no_bias": lambda b: setattr(b.attn.proj, "bias", None),
    "no_norm_bias": lambda b: setattr(b.norm1, "bias", None),
    "no_affine": lambda b: setattr(
        b, "norm1", nn.LayerNorm(64, eps=1e-6, elementwise_affine=False)
    ),
    "data": swap,
    "parameter": parameter,
    "in_place": in_place,
    "not_contiguous": not_contiguous,
    "spread": _spread,
    **{
        f"forward_{name}": lambda b, name=name: _patch(b.get_submodule(name))
        for name in ("norm1", "norm2", "attn", "attn.qkv", "mlp", "mlp.act", "mlp.fc2", "ls2")
    },
}


@pytest.mark.parametrize(
    ("method", "change"),
    [
        *[("deep", change) for change in CHANGES],
        *[pytest.param("vapt", change, marks=pytest.mark.full) for change in CHANGES],
    ],
)
def test_a_change_is_seen(method: str, change: str) -> None:
    model, image = tuned(method), images()
    before, _ = results(model, image)
    CHANGES[change](model.blocks[MIDDLE])
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("prompt" in name or "head" in name)
    found = assert_as_read_anew(model, image)
    assert distance(found, before) > 1e-3, "the change changes nothing"


def test_the_form_of_gelu_is_seen() -> None:
    model, image = tuned(), images()
    act = model.blocks[MIDDLE].mlp.act = nn.GELU()
    before, _ = results(model, image)
    act.approximate = "tanh"
    assert distance(assert_as_read_anew(model, image), before) > 1e-6


def autocast(dtype: torch.dtype | None) -> Any:
    return torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None)


def test_another_dtype_at_the_same_address() -> None:
    model, image = tuned(dtype=torch.bfloat16), images(torch.bfloat16)
    results(model, image)
    for parameter in model.blocks[MIDDLE].mlp.fc1.parameters():
        parameter.data = parameter.data.view(torch.float16)
    with autocast(torch.bfloat16):
        assert_as_read_anew(model, image)


KINDS = {
    "forward": "register_forward_hook",
    "before": "register_forward_pre_hook",
    "backward": "register_full_backward_hook",
    "before_backward": "register_full_backward_pre_hook",
}
PARTS = ("norm1", "attn", "attn.qkv", "attn.proj_drop", "mlp.act", "ls1", "drop_path2", "prompt")


@pytest.mark.parametrize("kind", KINDS)
def test_a_hook_is_called_and_taken_off(kind: str) -> None:
    model, image = tuned(), images()
    expected, _ = results(model, image)
    # PyTorch calls no backward hook of a module whose input has no part in its output.
    for name in ("", *(PARTS[:-1] if kind == "backward" else PARTS)):
        seen: list[str] = []
        module = model.blocks[MIDDLE].get_submodule(name)
        handle = getattr(module, KINDS[kind])(lambda *_, name=name, seen=seen: seen.append(name))
        assert distance(results(model, image)[0], expected) <= 1e-10
        assert seen and set(seen) == {name}, name
        handle.remove()
        seen.clear()
        assert distance(results(model, image)[0], expected) <= 1e-12
        assert not seen


@pytest.mark.parametrize("name", ["norm2", "mlp", "mlp.fc1", "prompt"])
def test_a_hook_in_a_new_dictionary_is_called(name: str) -> None:
    """Hooks are often removed by assigning an empty dictionary to the module."""
    model, image, seen = tuned(), images(), []
    results(model, image)
    module = model.blocks[MIDDLE].get_submodule(name)
    module._forward_hooks = OrderedDict()
    results(model, image)
    module.register_forward_hook(lambda *_: seen.append(1))
    results(model, image)
    assert seen == [1]


def test_a_hook_on_all_modules_is_called() -> None:
    model, image = tuned(), images()
    results(model, image)
    seen: list[nn.Module] = []
    handle = nn_module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        results(model, image)
    finally:
        handle.remove()
    block = model.blocks[MIDDLE]
    assert {block, *map(block.get_submodule, PARTS)} <= set(seen)


@pytest.mark.parametrize("folded", [False, True])
def test_a_weight_that_is_trained_gets_its_gradient(folded: bool) -> None:
    model, image = tuned(), images()
    if folded:
        fold_backbone(model)
    results(model, image)
    block = model.blocks[MIDDLE]
    names = [name for name, _ in block.named_parameters() if not name.startswith("prompt")]
    assert len(names) == 14
    for name in names:
        block.get_parameter(name).requires_grad_(True)
        with torch.no_grad():  # where that does not matter
            model(image)
        _, grads = results(model, image)
        assert f"blocks.{MIDDLE}.{name}" in grads
        assert_as_read_anew(model, image)
        block.get_parameter(name).requires_grad_(False)
        assert_as_read_anew(model, image)


@pytest.mark.parametrize("changes", [(fold_backbone, unfold_backbone), (unfold_backbone,)])
def test_folding_and_unfolding(changes: Any) -> None:
    model, image = tuned(), images()
    if len(changes) == 1:  # the scale would tell of it too
        fold_backbone(model, attention_scale=False)
    before, _ = results(model, image)
    for change in changes:
        change(model)
        assert distance(assert_as_read_anew(model, image), before) <= 1e-10


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("folded", [False, True])
def test_a_loaded_state_dict(assign: bool, folded: bool) -> None:
    model, other, image = tuned(), tuned(), images()
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "prompt" not in name:
                parameter.mul_(1.1)
    expected, _ = results(other, image)
    if folded:
        fold_backbone(model)
    assert distance(results(model, image)[0], expected) > 1e-3
    model.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("prompt" in name or "head" in name)
    assert distance(assert_as_read_anew(model, image), expected) <= 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_dtype_and_back(dtype: torch.dtype) -> None:
    model = tuned()
    results(model, images())
    assert_as_read_anew(model.to(dtype), images(dtype))
    assert_as_read_anew(model.double(), images())
