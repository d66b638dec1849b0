"""Launch plans: a repeated launch passes to its kernel what a newly built launch would.

No kernel runs here. The tests of the kernels run them through the same launchers, but under a
sanitizer, for which there are no plans.
"""

from __future__ import annotations

import importlib.util
import pkgutil
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
from support.formulations import families
from support.formulations.plain_vapt import ACTING
from support.kernels.recording_driver import LAUNCHES, RecordingDriver, compared, recording
from torch import Tensor
from triton.runtime.jit import JITFunction

from vpt_fast import VAPT, VPTDeep, VPTShallow, kernels, prompt_tune
from vpt_fast.kernels.attention import launches as attention
from vpt_fast.kernels.experts import launches as prompt_expert
from vpt_fast.kernels.rowwise import residual_norm
from vpt_fast.kernels.rowwise.residual_norm import residual_norm_launch
from vpt_fast.kernels.runtime import launch_plan

BF16 = torch.bfloat16
EPS = 1e-6


@pytest.fixture
def driver() -> Iterator[RecordingDriver]:
    with recording() as found:
        yield found


def vit(method: Any, memory: str = "speed", family: str = families.TOKEN, **options: Any) -> Any:
    model = families.build(family, dtype=BF16, depth=2, **options)
    return prompt_tune(model, method, memory=memory).train()


def swin(method: Any) -> Any:
    options = {"img_size": 32, "patch_size": 4, "window_size": 4, "embed_dim": 32}
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", depths=(2, 2), num_heads=(1, 2), num_classes=3, **options
    )
    return prompt_tune(model.to(BF16), method).train()


SUBJECTS: dict[str, Any] = {
    "deep": lambda: vit(VPTDeep(3)),
    "deep_lean_dropout": lambda: vit(VPTDeep(3, dropout=0.4), "lean"),
    "deep_minimal_average": lambda: vit(VPTDeep(3), "minimal", families.AVERAGE),
    "layer_scale_balanced": lambda: vit(VPTDeep(3), "balanced", init_values=0.1),
    "shallow": lambda: vit(VPTShallow(3)),
    "vapt": lambda: vit(VAPT(3, **ACTING)),
    "vapt_minimal": lambda: vit(VAPT(3, **ACTING), "minimal"),
    "swin": lambda: swin(VPTDeep(3)),
    "swin_vapt": lambda: swin(VAPT(3, **ACTING)),
}


CONTAINED = ("deep_minimal_average", "layer_scale_balanced", "vapt", "swin")
"""Subjects whose launches and modes are those of others."""


def images(model: Any, batch: int, dtype: torch.dtype = BF16, seed: int = 0) -> Tensor:
    size = 32 if hasattr(model, "layers") else 24
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, size, size, generator=generator).to(dtype)


def step(model: Any, batch: int, dtype: torch.dtype = BF16, seed: int = 0) -> None:
    model(images(model, batch, dtype, seed)).sum().backward()


@pytest.mark.parametrize(
    "subject",
    [pytest.param(s, marks=pytest.mark.full if s in CONTAINED else ()) for s in SUBJECTS],
)
def test_steps_of_other_values_and_batches(subject: str, driver: RecordingDriver) -> None:
    model = SUBJECTS[subject]()
    with compared() as found:
        step(model, 2)
        built = found.built
        assert built
        step(model, 2, seed=1)
        assert found.built == built, "the layouts are known"
        assert found.replayed >= built
        step(model, 3)
        step(model, 2, seed=2)
        with torch.inference_mode():
            model.eval()(
                torch.zeros(2, 3, *([32, 32] if "swin" in subject else [24, 24]), dtype=BF16)
            )
    assert len(found.kernels) >= 6


def test_other_dtypes_and_autocast(driver: RecordingDriver) -> None:
    model = vit(VPTDeep(3), init_values=0.1)
    with compared() as found:
        step(model, 2)
        step(model.to(torch.float16), 2, torch.float16)
        step(model, 2, torch.float16)
        model.float()
        for _ in range(2):
            with torch.autocast("cpu", BF16):
                step(model, 2, torch.float32)
        built, replayed = found.built, found.replayed
        step(model.to(BF16), 2)
    assert built == found.built and found.replayed > replayed, "bf16 was known before"


def offset_by(tensor: Tensor, elements: int) -> Tensor:
    """Return the same values, `elements` after a multiple of 64 bytes."""
    memory = torch.empty(tensor.numel() + 64, dtype=tensor.dtype)
    start = (-memory.data_ptr() % 64) // tensor.element_size() + elements
    return memory[start : start + tensor.numel()].view(tensor.shape).copy_(tensor)


def normalise(x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor | None = None) -> Any:
    return residual_norm.residual_norm(x, branch, None, weight, bias, EPS, None, BF16)


def test_other_alignments(driver: RecordingDriver) -> None:
    x, weight = torch.randn(2, 5, 64).to(BF16), torch.randn(64).to(BF16)
    qkv = torch.randn(2, 5, 3, 2, 32).to(BF16)
    offsets = (0, 1, 2, 4, 8, 1, 0, 3)
    with compared() as found:
        for elements in offsets:
            normalise(offset_by(x, elements), x, weight)
            normalise(x, offset_by(x, elements), weight)
            attention.attention_forward([offset_by(qkv, elements)], [], 0.2)
    assert found.replayed >= 7
    aligned = {normalise(x, x.clone(), weight)[0].data_ptr() % 16}
    assert aligned == {0}


def test_plans_for_odd_addresses_are_bounded(driver: RecordingDriver) -> None:
    x, weight = torch.randn(2, 5, 64).to(BF16), torch.randn(64).to(BF16)
    launch = launch_plan.Launcher()
    with compared() as found:
        for first in range(1, 8):
            for second in range(1, 8):
                y = torch.empty_like(x)
                tensors = (
                    offset_by(x, first), None, None, offset_by(weight, second), None, None, y,
                    torch.empty(2, 2, 5),
                )  # fmt: skip
                launch(tensors, residual_norm_launch, EPS, None)
    assert found.built + found.replayed == 49
    assert len(launch._others) == launch_plan._MOST_ALIGNMENTS
    assert launch_plan.launcher.cache_info().maxsize == launch_plan._MOST_LAYOUTS


def test_tensors_that_share_memory(driver: RecordingDriver) -> None:
    x, y, weight = (torch.randn(2, 5, 64).to(BF16) for _ in range(3))
    weight = weight[0, 0].clone()
    both = torch.randn(2, 64).to(BF16)
    with compared() as found:
        for branch in (x, y, x, x.clone(), y):
            normalise(x, branch, weight)
        for _ in range(2):  # weight and bias in one allocation, then the other way round
            normalise(x, None, both[0], both[1])
            normalise(x, None, both[1], both[0])
        normalise(x, None, both[1], both[1])
        normalise(x, None, weight, both[1])
    assert found.replayed >= 4


def attended(tokens: list[Tensor], prompts: list[Tensor]) -> None:
    out, lse = attention.attention_forward(tokens, prompts, 0.2)
    attention.attention_backward(tokens, prompts, out, lse, out, 0.2, True, True)


def test_keys_and_values_in_one_allocation_or_in_two(driver: RecordingDriver) -> None:
    """The kernels step from keys to values where both lie in one tensor."""
    q = torch.randn(2, 5, 2, 32).to(BF16)
    packed = torch.randn(2, 5, 3, 2, 32).to(BF16)
    kv = torch.randn(1, 3, 2, 2, 32).to(BF16)
    k, v = (torch.empty_like(packed)[:, :, 0] for _ in range(2))
    near, far = (packed[:, :, 0], packed[:, :, 1]), (packed[:, :, 0], packed[:, :, 2])
    pair, apart = (kv[:, :, 0], kv[:, :, 1]), (kv.clone()[:, :, 0], kv.clone()[:, :, 1])
    with compared() as found:
        for _ in range(2):
            for keys, values in (near, far, (k, v), far[::-1]):
                for prompts in (pair, apart):
                    attended([q, keys, values], [*prompts])
        attended([q, packed[:, :, 1:]], [kv])
        attended([packed[:, :, 0], packed[:, :, 1:]], [kv])  # queries in the keys' allocation
        attended([packed], [kv])
        attended([packed], [])
    assert found.replayed >= 8


def test_an_empty_batch_launches_nothing(driver: RecordingDriver) -> None:
    x, weight = torch.empty(0, 5, 64, dtype=BF16), torch.randn(64).to(BF16)
    qkv = torch.empty(0, 5, 3, 2, 32, dtype=BF16)
    for _ in range(2):
        total, y, statistics = normalise(x, x.clone(), weight)
        assert total.shape == y.shape == x.shape and statistics.shape == (2, 0, 5)
        out, lse = attention.attention_forward([qkv], [], 0.2)
        grads, _ = attention.attention_backward([qkv], [], out, lse, out, 0.2, True, False)
        assert grads[0].shape == qkv.shape and not LAUNCHES.take()
    normalise(torch.randn(2, 5, 64).to(BF16), None, weight)
    assert len(LAUNCHES.take()) == 1


def test_no_tensor_is_held(driver: RecordingDriver) -> None:
    def tensors() -> list[Any]:
        x, weight = torch.randn(2, 9, 64).to(BF16), torch.randn(64).to(BF16)
        qkv, kv = torch.randn(2, 9, 3, 2, 32).to(BF16), torch.randn(1, 3, 2, 2, 32).to(BF16)
        matrix, statistics = torch.randn(3, 16), torch.randn(3, 2, 9)
        results = [
            *normalise(x, x.clone(), weight),
            *attention.attention_forward([qkv], [kv], 0.2),
            prompt_expert.mix_forward(x, matrix, 8, statistics),
        ]
        return [weakref.ref(t) for t in (x, weight, qkv, kv, matrix, statistics, *results)]

    for _ in range(2):
        assert not any(held() is not None for held in tensors())
    assert launch_plan.launcher.cache_info().currsize == 3


def test_pointers_come_first_in_every_kernel() -> None:
    """A plan replaces a kernel's first arguments, the pointers, and stores the others."""
    found = 0
    for module in pkgutil.walk_packages(kernels.__path__, "vpt_fast.kernels."):
        loaded = importlib.import_module(module.name)
        for name, kernel in vars(loaded).items():
            if isinstance(kernel, JITFunction) and name.endswith("_kernel"):
                pointers = [argument.endswith("_ptr") for argument in kernel.arg_names]
                assert pointers == sorted(pointers, reverse=True), name
                assert pointers[0], name
                found += 1
    assert found >= 15
