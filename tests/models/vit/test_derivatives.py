"""Derivatives by torch.func, in forward mode and of second order: correct, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.cases import METHODS, SWIN, build, images
from support.formulations.plain import distance, redraw_prompts
from support.formulations.plain_baselines import redraw_added
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, vjp, vmap

from vpt_fast import VAPT, VPTDeep, prompt_tune

FAMILIES = ("vit", "siglip_map", "qk_norm", SWIN)
CASES = [
    pytest.param(family, method, memory, id=f"{family}-{method}-{memory}")
    for family in FAMILIES for method in METHODS for memory in ("speed", "minimal")
    if family in ("vit", SWIN) or (memory == "speed" and method in ("deep", "vapt"))
]  # fmt: skip
Named = dict[str, Tensor]


def tuned(family: str, method: str, memory: str = "speed") -> Any:
    model = prompt_tune(build(family), METHODS[method], memory).eval()
    redraw_prompts(model), redraw_added(model)
    return model


def trained(model: Any) -> Named:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradients_of(model: Any, x: Tensor) -> Named:
    """Compute the gradients of trained parameters by the fused backward pass."""
    own = trained(model)
    grads = torch.autograd.grad(model(x).tanh().sum(), [*own.values()])
    return dict(zip(own, grads, strict=True))


def loss_of(model: Any) -> Any:
    return lambda own, x: functional_call(model, own, (x,)).tanh().sum()


def values_of(model: Any) -> Named:
    return {name: p.detach().clone() for name, p in trained(model).items()}


def directions(values: Named) -> Named:
    torch.manual_seed(6)
    return {name: torch.randn_like(value) for name, value in values.items()}


def assert_close(found: Named, right: Named, bound: float = 1e-9) -> None:
    largest = max(float(value.abs().max()) for value in right.values())
    for name, value in right.items():
        assert float((found[name] - value).abs().max()) <= bound * largest, name


@pytest.mark.parametrize(("family", "method", "memory"), CASES)
def test_gradients(family: str, method: str, memory: str) -> None:
    """Gradients of a batch and of each image, and directional derivatives."""
    model, x = tuned(family, method, memory), images(family)
    right, values, loss = gradients_of(model, x), values_of(model), loss_of(model)
    assert_close(grad(loss)(values, x), right)
    each = vmap(grad(lambda own, image: loss(own, image[None])), (None, 0))(values, x)
    assert_close({name: found.sum(0) for name, found in each.items()}, right)
    _, pull = vjp(lambda own: loss(own, x), values)
    assert_close(pull(torch.ones((), dtype=torch.float64))[0], right)
    along = directions(values)
    expected = sum((right[name] * along[name]).sum() for name in values)
    _, found = jvp(lambda own: loss(own, x), (values,), (along,))
    assert distance(found, expected) <= 1e-8
    with forward_ad.dual_level():
        duals = {n: forward_ad.make_dual(v, along[n]) for n, v in values.items()}
        tangent = forward_ad.unpack_dual(loss(duals, x)).tangent
    assert distance(tangent, expected) <= 1e-8


@pytest.mark.parametrize(("family", "method", "memory"), CASES)
def test_images(family: str, method: str, memory: str) -> None:
    """Gradients of images, also of each logit, by torch.autograd.grad and by torch.func."""
    model, x = tuned(family, method, memory), images(family)
    leaf = x.clone().requires_grad_()
    output = model(leaf)
    rows = [torch.autograd.grad(y, leaf, retain_graph=True)[0][0] for y in output[0]]
    jacobian = jacrev(lambda image: model(image[None])[0])(x[0])
    assert distance(jacobian, torch.stack(rows)) <= 1e-9
    first = next(iter(trained(model).values()))
    both = torch.autograd.grad(model(leaf).sum(), [leaf, first])
    assert distance(both[0], torch.autograd.grad(model(leaf).sum(), leaf)[0]) <= 1e-12
    assert both[1].abs().max() > 0
    frozen = [p for p in model.parameters() if not p.requires_grad]
    if frozen:
        with pytest.raises(RuntimeError, match="does not require grad"):
            torch.autograd.grad(model(leaf).sum(), frozen[0])


@pytest.mark.parametrize(("family", "method", "memory"), CASES)
def test_second_derivatives(family: str, method: str, memory: str) -> None:
    """Along a direction, by nested torch.func calls, against differences of fused gradients."""
    model, x = tuned(family, method, memory), images(family)
    values, loss = values_of(model), loss_of(model)
    along, step = directions(values), 1e-5
    _, found = jvp(grad(lambda own: loss(own, x)), (values,), (along,))
    sides = []
    for sign in (1, -1):
        with torch.no_grad():
            for name, p in trained(model).items():
                p.copy_(values[name] + sign * step * along[name])
        sides.append(gradients_of(model, x))
    right = {name: (sides[0][name] - sides[1][name]) / (2 * step) for name in values}
    assert_close(found, right, 1e-5)


@pytest.mark.parametrize(("family", "method"), [("vit", "deep"), ("vit", "vapt"), (SWIN, "deep")])
def test_a_whole_hessian(family: str, method: str) -> None:
    model, x = tuned(family, method), images(family)
    name = next(name for name in trained(model) if "prompt.tokens" in name)
    tokens = trained(model)[name].detach()
    loss = loss_of(model)
    second = hessian(lambda value: loss({name: value}, x))(tokens)
    flat = second.reshape(tokens.numel(), tokens.numel())
    assert distance(flat, flat.T) <= 1e-9 and flat.abs().max() > 0
    along = torch.randn_like(tokens)
    _, found = jvp(grad(lambda value: loss({name: value}, x)), (tokens,), (along,))
    assert distance((flat @ along.flatten()).view_as(tokens), found) <= 1e-9


@pytest.mark.parametrize(("family", "method", "memory"), CASES)
def test_recorded_backward_passes(family: str, method: str, memory: str) -> None:
    """Second derivatives are correct where only timm's blocks are recorded, else refused."""
    model, x = tuned(family, method, memory), images(family)
    own, along = trained(model), directions(values_of(model))
    try:
        grads = torch.autograd.grad(model(x).tanh().sum(), [*own.values()], create_graph=True)
        total = sum((g * a).sum() for g, a in zip(grads, along.values(), strict=True))
        found = torch.autograd.grad(total, [*own.values()], allow_unused=True)
    except RuntimeError as error:
        ours = "no second derivatives where backward is recorded"
        theirs = "derivative for aten::_scaled_dot_product"  # raised by timm's trained blocks
        if theirs in str(error) and method in ("bias", "full"):
            return
        assert ours in str(error)
        with pytest.raises(RuntimeError, match=ours):
            model(x).tanh().sum().backward(create_graph=True)
        return
    loss = loss_of(model)
    right = jvp(grad(lambda value: loss(value, x)), (values_of(model),), (along,))[1]
    named = dict(zip(own, found, strict=True))
    assert_close({n: torch.zeros_like(own[n]) if g is None else g for n, g in named.items()}, right)


@pytest.mark.parametrize("family", ["vit", "qk_norm", SWIN])
@pytest.mark.parametrize("method", ["deep", "shallow", "vapt"])
def test_batched_backward_passes_are_refused(family: str, method: str) -> None:
    model, x = tuned(family, method), images(family)
    tokens = next(p for name, p in trained(model).items() if "prompt" in name)
    output = model(x)
    with pytest.raises(RuntimeError, match="tuned blocks have no batched backward pass"):
        torch.autograd.grad(output[0], tokens, torch.eye(5).double(), is_grads_batched=True)


@pytest.mark.parametrize("method", [VPTDeep(2, dropout=0.5), VAPT(2)])
def test_draws_of_each_image(method: Any) -> None:
    """Dropout under vmap follows vmap's `randomness`."""
    model = prompt_tune(build("vit"), method).train()
    redraw_prompts(model)
    values, loss = values_of(model), loss_of(model)
    each = vmap(
        grad(lambda own, image: loss(own, image[None])), (None, 0), randomness="different"
    )  # fmt: skip
    found = each(values, images("vit"))
    assert all(torch.isfinite(value).all() for value in found.values())
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(grad(lambda own, image: loss(own, image[None])), (None, 0))(values, images("vit"))


def test_under_gradient_checkpointing() -> None:
    model, x = tuned("vit", "deep"), images("vit")
    model.set_grad_checkpointing()
    found = grad(loss_of(model))(values_of(model), x)
    assert_close(found, gradients_of(model, x))
