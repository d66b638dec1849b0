"""Every memory mode in every use of a model: features, batches, dtypes, loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.formulations import families
from support.formulations.families import AVERAGE, TOKEN
from support.formulations.plain import (
    Plain,
    assert_same,
    distance,
    gradients,
    pair,
    tuned_gradients,
)
from support.formulations.plain_vapt import ACTING, STILL, seeded, vapt_pair
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vpt_fast import VAPT, LinearProbe, VPTDeep, VPTShallow, prompt_tune
from vpt_fast.ops.memory_modes import MEMORY_MODES

METHODS: dict[str, Any] = {
    "linear": LinearProbe(),
    "shallow": VPTShallow(3),
    "deep": VPTDeep(3),
    "gaps": VPTDeep(3, blocks=[0, 2]),
    "code": VAPT(3, **STILL),
}
each_mode = pytest.mark.parametrize("memory", MEMORY_MODES)


def tune(method: Any, memory: str, family: str = AVERAGE, **overrides: Any) -> Any:
    """Return a tuned model in training mode with its plain formulation."""
    base = families.build(family, **overrides)
    if isinstance(method, VAPT):
        tuned, plain = vapt_pair(base, method, memory=memory)
    else:
        tuned, plain = pair(base, method, memory)
    return tuned.train(), plain


@each_mode
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["shallow", "deep", "code"])
def test_features_and_their_gradients(method: str, checkpointing: bool, memory: str) -> None:
    """forward_features, forward_intermediates and get_intermediate_layers equal timm's."""
    tuned, plain = tune(METHODS[method], memory)
    tuned.set_grad_checkpointing(checkpointing)
    image = families.images(AVERAGE)
    names = {name: leaf for name, leaf in plain.trained.items() if "head" not in name}
    trained = {name: tuned.get_parameter(name) for name in names}
    prefix = plain.model.num_prefix_tokens

    def patches() -> tuple[Tensor, ...]:
        return tuple(output[:, prefix:] for output in plain.block_outputs(image))

    _, entries = tuned.forward_intermediates(image, output_fmt="NLC")
    for found, right in (
        ((tuned.forward_features(image),), (plain.features(image),)),
        (tuned.forward_intermediates(image)[:1], (plain.features(image),)),
        (tuple(entries), patches()),
        (tuple(tuned.get_intermediate_layers(image, n=3)), patches()),
    ):
        assert max(map(distance, found, right)) <= 1e-10
        ours = gradients(found, trained)
        theirs = gradients(right, names)
        assert max(distance(ours[name], theirs[name]) for name in names) <= 1e-10


@each_mode
@pytest.mark.parametrize("method", ["shallow", "deep", "code"])
def test_under_an_outer_checkpoint(method: str, memory: str) -> None:
    """The whole model in torch.utils.checkpoint, whose saved tensors can be unpacked only once."""
    acting = {"shallow": VPTShallow(3, dropout=0.4), "deep": VPTDeep(3, dropout=0.4)}
    tuned, plain = tune(acting.get(method, VAPT(3, **ACTING)), memory)
    plain.training = True
    image = families.images(AVERAGE)
    expected = seeded(plain, image)
    output = seeded(lambda: checkpoint(tuned, image, use_reentrant=False))
    torch.manual_seed(99)
    assert_same(tuned, plain, output, expected)


@each_mode
def test_saved_tensors_are_fetched_once(memory: str) -> None:
    """Hooks that offload saved tensors (save_on_cpu) unpack each once."""
    tuned, _ = tune(METHODS["deep"], memory)
    packed: list[int] = []
    fetched: list[int] = []

    def pack(tensor: Tensor) -> tuple[int, Tensor]:
        packed.append(len(packed))
        return packed[-1], tensor

    def unpack(pair: tuple[int, Tensor]) -> Tensor:
        fetched.append(pair[0])
        return pair[1]

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        output = tuned(families.images(AVERAGE))
    output.sum().backward()
    assert len(fetched) == len(set(fetched)) > 0


@each_mode
@pytest.mark.parametrize("method", METHODS)
def test_without_gradients(method: str, memory: str) -> None:
    tuned, plain = tune(METHODS[method], memory)
    image = families.images(AVERAGE)
    expected = plain(image)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            output = tuned(image)
        assert not output.requires_grad
        assert distance(output, expected) <= 1e-10
    assert_same(tuned, plain, tuned(image), expected)  # and training goes on


@each_mode
@pytest.mark.parametrize(
    ("method", "family"),
    [
        ("shallow", AVERAGE),
        ("deep", TOKEN),
        ("deep", "siglip_map"),
        ("code", "siglip_average"),
        ("code", TOKEN),
    ],
)
def test_batches(method: str, family: str, memory: str) -> None:
    """One image, odd numbers of them, and images in any layout."""
    tuned, plain = tune(METHODS[method], memory, family)
    image = families.images(family, batch=3)
    views = [image[:1], image[1:2], image, image.to(memory_format=torch.channels_last)]
    for view in (*views, image.flip(2).transpose(2, 3), image.expand(3, -1, -1, -1)):
        assert_same(tuned, plain, tuned(view), plain(view.contiguous()))


@pytest.mark.covering
@each_mode
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", [AVERAGE, "qk_norm"])
def test_no_image_at_all(family: str, method: str, checkpointing: bool, memory: str) -> None:
    """Gradients of an empty batch exist and are 0."""
    method_of = METHODS[method] if method != "code" else VAPT(3, **ACTING)
    tuned, _ = tune(method_of, memory, family)
    tuned.set_grad_checkpointing(checkpointing)
    output = tuned(families.images(family, batch=0))
    assert output.shape == (0, families.CLASSES)
    output.sum().backward()
    for name, parameter in tuned.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert not parameter.grad.any(), name


@each_mode
@pytest.mark.parametrize("method", ["shallow", "deep", "code"])
def test_no_patch_but_one(method: str, memory: str) -> None:
    method_of = VAPT(3, kernel_size=1, **STILL) if method == "code" else METHODS[method]
    tuned, plain = tune(method_of, memory, "one_patch")
    image = families.images("one_patch")
    assert_same(tuned, plain, tuned(image), plain(image))


@each_mode
def test_no_prompt_at_all(memory: str) -> None:
    base, image = families.build(AVERAGE), families.images(AVERAGE)
    expected = base(image)
    for method in (VPTDeep(0), VPTShallow(0), VPTDeep(0, shared=True, dropout=0.5)):
        tuned = prompt_tune(families.build(AVERAGE), method, memory=memory).train()
        output = tuned(image)
        assert distance(output, expected) <= 1e-12
        output.sum().backward()
        assert tuned.head.weight.grad.any()


def by_hand(plain: Plain, batches: list[Tensor]) -> dict[str, Tensor]:
    """Return the sum of the batches' gradients."""
    sums = [gradients(plain(batch), plain.trained) for batch in batches]
    return {name: sum(one[name] for one in sums) for name in plain.trained}


def loss(output: Tensor) -> Tensor:
    """Compute the loss of `plain.gradients`."""
    generator = torch.Generator().manual_seed(11)
    return (
        torch.randn(output.shape, generator=generator, dtype=torch.float64) * output.tanh()
    ).sum()


def assert_gradients(tuned: nn.Module, expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        assert distance(tuned.get_parameter(name).grad, value) <= 1e-10, name
    tuned.zero_grad()


@pytest.mark.covering
@each_mode
@pytest.mark.parametrize("method", ["shallow", "deep", "gaps", "code"])
def test_accumulation(method: str, memory: str) -> None:
    """Two steps, two forwards before two backwards, one backward of both, one graph twice."""
    tuned, plain = tune(METHODS[method], memory)
    first, second = families.images(AVERAGE), families.images(AVERAGE, batch=3, seed=8)
    expected = by_hand(plain, [first, second])
    for batch in (first, second):
        loss(tuned(batch)).backward()
    assert_gradients(tuned, expected)
    losses = [loss(tuned(batch)) for batch in (first, second)]
    losses[1].backward()
    losses[0].backward()
    assert_gradients(tuned, expected)
    (loss(tuned(first)) + loss(tuned(second))).backward()
    assert_gradients(tuned, expected)
    once = loss(tuned(first))
    once.backward(retain_graph=True)
    once.backward()
    assert_gradients(tuned, by_hand(plain, [first, first]))
    with pytest.raises(RuntimeError, match="second time"):
        once.backward()


@each_mode
@pytest.mark.parametrize("method", ["deep", "code"])
def test_two_forwards_have_masks_of_their_own(method: str, memory: str) -> None:
    """Dropout of the first forward is not that of the second in its backward."""
    acting = VAPT(3, **ACTING) if method == "code" else VPTDeep(3, dropout=0.4)
    tuned, _ = tune(acting, memory)
    image = families.images(AVERAGE)
    apart = []
    for seed in (4, 5):
        apart.append(tuned_gradients(tuned, seeded(tuned, image, seed=seed)))
    outputs = [seeded(tuned, image, seed=seed) for seed in (4, 5)]
    for output, expected in zip(outputs, apart, strict=True):
        found = tuned_gradients(tuned, output)
        assert max(distance(found[name], expected[name]) for name in expected) <= 1e-12


@pytest.mark.covering
@each_mode
@pytest.mark.parametrize("how", ["float16", "bfloat16", "autocast_bfloat16"])
@pytest.mark.parametrize("family", [AVERAGE, "dinov2", "siglip_map"])
def test_low_precision_runs(family: str, how: str, memory: str) -> None:
    """Checks dtypes, and values roughly; `test_fused_precision` checks the errors."""
    dtype = getattr(torch, how.rpartition("_")[2])
    autocast = how.startswith("autocast")
    for method in ("deep", "code"):
        tuned, plain = tune(METHODS[method], memory, family)
        image = families.images(family)
        expected = plain(image)
        truth = gradients(expected, plain.trained)
        stored = torch.float32 if autocast else dtype
        tuned.to(stored)
        with torch.autocast("cpu", dtype=dtype, enabled=autocast):
            output = tuned(image.to(stored))
            middle = tuned.forward_intermediates(image.to(stored), intermediates_only=True)[1]
        assert middle.dtype == stored, "the residual stream"
        assert output.dtype == dtype
        found = tuned_gradients(tuned, output)
        assert distance(output, expected) < 0.2
        for name, value in truth.items():
            assert found[name].dtype == stored
            assert found[name].isfinite().all()
            assert (found[name] - value).norm() < 0.5 * value.norm(), name
