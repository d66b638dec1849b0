"""Bytes saved for backward: fake tensors against real ones, the order of modes, the limits."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from vpt_fast import VAPT, LinearProbe, VPTDeep, VPTShallow
from vpt_fast.analysis import activation_memory as memory
from vpt_fast.analysis.activation_memory import (
    EAGER,
    PLAIN,
    PROVIDERS,
    MeasuredPeaks,
    SavedBytes,
    measured_peak,
    provided,
    saved_bytes,
    step_inputs,
    training_step,
)
from vpt_fast.methods import Method
from vpt_fast.ops.memory_modes import MEMORY_MODES

SIZE = (3, 32, 32)
MIB = 2**20
BASE_BATCH, BASE_WIDTH, BASE_DEPTH = 64, 768, 12


def vit() -> Any:
    torch.manual_seed(0)
    return timm.create_model("test_vit", img_size=32, num_classes=5)


@cache
def small() -> SavedBytes:
    return SavedBytes(vit(), SIZE, torch.float32)


@cache
def base() -> SavedBytes:
    """Return saved bytes of ViT-B/16 at 224 px in bf16, from a model on meta."""
    with torch.device("meta"):
        model = timm.create_model("vit_base_patch16_224")
    return SavedBytes(model, (3, 224, 224), torch.bfloat16)


def mib(method: Method, provider: str) -> float:
    return base().bytes_of(method, provider, BASE_BATCH) / MIB


@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        (VPTDeep(3), torch.bfloat16),
        (VPTDeep(3, dropout=0.1, blocks=[1, 4]), torch.float32),
        (VAPT(3), torch.bfloat16),
        (VPTShallow(3), torch.float32),
        (LinearProbe(), torch.bfloat16),
    ],
    ids=repr,
)
def test_fake_tensors_save_the_same_bytes_as_real_ones(method: Method, dtype: torch.dtype) -> None:
    model = vit().to(dtype)
    fake = SavedBytes(model, SIZE, dtype)
    for provider in (*PROVIDERS, PLAIN):
        with provided(model, method, provider) as real:
            expected = saved_bytes(real, *step_inputs(2, SIZE, dtype, "cpu"))
        assert fake.bytes_of(method, provider, 2) == expected, provider


class Layers(nn.Module):
    """A module with one parameter that applies a given function."""

    def __init__(self, forward: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self._function = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._function(x * self.weight)


def test_a_storage_counts_once_and_whole_and_weights_not_at_all() -> None:
    labels = torch.zeros(2, dtype=torch.int64)
    images = torch.randn(2, 4)
    plain = saved_bytes(Layers(lambda x: x), images, labels)
    # exp saves its result (2, 4) in fp32.
    assert saved_bytes(Layers(lambda x: x.exp()), images, labels) - plain == 32
    # A view of two columns of it saves all of it, and a second view nothing more.
    views = saved_bytes(Layers(lambda x: (y := x.exp())[:, :2] * y[:, 2:]), images, labels)
    assert views - plain == 32 - (32 - 16)  # the logits of the loss are half as many


def test_tensors_that_no_gradient_needs_are_not_counted() -> None:
    images, labels = torch.randn(2, 4), torch.zeros(2, dtype=torch.int64)
    plain = saved_bytes(Layers(lambda x: x), images, labels)

    def dropped(x: Tensor) -> Tensor:
        x.exp()  # saved until its graph is freed, which is at once
        return x

    assert saved_bytes(Layers(dropped), images, labels) == plain


@pytest.mark.parametrize("method", [VPTDeep(3), VAPT(3), VPTShallow(3), LinearProbe()], ids=repr)
def test_a_provided_model_is_restored(method: Method) -> None:
    model = vit().train()
    model.norm.eval()
    model.blocks[2].requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = {name: m.training for name, m in model.named_modules()}
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kinds = [type(module) for module in model.modules()]
    for provider in (*PROVIDERS, PLAIN):
        with pytest.raises(KeyError), provided(model, method, provider) as given:
            given(torch.randn(1, *SIZE))
            raise KeyError
        assert flags == {name: p.requires_grad for name, p in model.named_parameters()}
        assert modes == {name: m.training for name, m in model.named_modules()}
        assert kinds == [type(module) for module in model.modules()]
        assert all(torch.equal(tensor, values[n]) for n, tensor in model.state_dict().items())
        assert len(model.state_dict()) == len(values)


def test_without_prompts_the_gradient_flows_from_the_first_block_on() -> None:
    plain = small().bytes_of(VPTDeep(3), PLAIN, 4)
    assert small().bytes_of(VPTDeep(0), EAGER, 4) == plain
    late = VPTDeep(0, blocks=[4, 5])
    assert 0.2 < small().bytes_of(late, EAGER, 4) / plain < 0.5
    for mode in MEMORY_MODES:
        everything = small().bytes_of(VPTDeep(0), mode, 4)
        assert small().bytes_of(LinearProbe(), mode, 4) < 0.1 * everything
        assert 0.05 < small().bytes_of(late, mode, 4) / everything < 0.5


@pytest.mark.parametrize("provider", PROVIDERS)
def test_bytes_by_depth(provider: str) -> None:
    def count(blocks: range) -> int:
        return small().bytes_of(VPTDeep(8, blocks=blocks), provider, 4)

    last = [count(range(6 - k, 6)) for k in range(1, 7)]
    assert last == sorted(set(last))
    first = [count(range(k)) for k in range(1, 7)]
    # Rows of the last prompted block live on in eager PyTorch and in ours; only ours has no others.
    assert len(set(first)) == 1 if provider == EAGER else first == sorted(set(first))[::-1]
    assert first[-1] == last[-1]


@pytest.mark.parametrize(("count", "dropout"), [(1, 0.0), (20, 0.1)])
def test_every_mode_saves_less_than_the_one_before(count: int, dropout: float) -> None:
    for method in (VPTDeep(count, dropout), VAPT(count, dropout), VPTShallow(count, dropout)):
        sizes = [small().bytes_of(method, provider, 4) for provider in PROVIDERS]
        assert sizes == sorted(set(sizes))[::-1], (method, sizes)


def test_bytes_are_proportional_to_the_batch() -> None:
    one, *others = (small().bytes_of(VPTDeep(3), "speed", batch) for batch in (8, 16, 64))
    assert others == [pytest.approx(2 * one, rel=0.02), pytest.approx(8 * one, rel=0.02)]


LIMITS = {"speed": 2261, "balanced": 1360, "lean": 690, "minimal": 235}


@pytest.mark.covering
@pytest.mark.parametrize("mode", MEMORY_MODES)
@pytest.mark.parametrize("count", [0, 50, 200])
def test_limits_of_vit_base(mode: str, count: int) -> None:
    assert mib(VPTDeep(count), mode) <= LIMITS[mode]
    if count:
        # Two rows of each prompt, image and block.
        more = 2 * count * BASE_WIDTH * 2 * BASE_BATCH * BASE_DEPTH / MIB
        assert mib(VPTDeep(count, dropout=0.1), mode) <= LIMITS[mode] + more
        assert mib(VAPT(count), mode) <= LIMITS[mode] + more


def test_eager_vit_base() -> None:
    assert mib(VPTDeep(0), EAGER) == mib(VPTDeep(50), PLAIN) == pytest.approx(2261, abs=1)
    assert mib(VPTDeep(50), EAGER) == pytest.approx(2835, rel=0.01)
    assert mib(VPTDeep(200), EAGER) == pytest.approx(4557, rel=0.01)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="provider is 'fast'; choose one of 'eager', 'speed'"):
        small().bytes_of(VPTDeep(3), "fast", 4)
    with pytest.raises(ValueError, match="batch_size is 0; it must be at least 1"):
        small().bytes_of(VPTDeep(3), EAGER, 0)
    with pytest.raises(ValueError, match="names block 7, but the model has 6 blocks"):
        small().bytes_of(VPTDeep(3, blocks=[7]), EAGER, 4)
    other = timm.create_model("test_convnext")
    with pytest.raises(TypeError, match="cannot tune a ConvNeXt"):
        SavedBytes(other, SIZE, torch.float32).bytes_of(LinearProbe(), PLAIN, 4)
    with pytest.raises(ValueError, match="images are on cpu; a peak can be measured on a CUDA"):
        measured_peak(vit(), *step_inputs(1, SIZE, torch.float32, "cpu"))


def test_a_measured_step_does_not_change_the_weights() -> None:
    model = vit()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with provided(model, VPTDeep(3), "speed") as tuned:
        tokens = [block.prompt.tokens for block in tuned.blocks]
        values = [rows.clone() for rows in tokens]
        step = training_step(tuned, *step_inputs(2, SIZE, torch.float32, "cpu"))
        step()
        step()
        assert all(rows.grad is None for rows in tokens)
        torch.testing.assert_close(tokens, values, rtol=0, atol=0)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)


def test_the_tuned_model_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def peak(model: nn.Module, images: Tensor, labels: Tensor) -> int:
        seen.append((type(model).__name__, model.training, images.dtype, tuple(images.shape)))
        training_step(model, images, labels)()
        return 7

    monkeypatch.setattr(memory, "measured_peak", peak)
    meter = MeasuredPeaks(vit(), SIZE, torch.bfloat16, torch.device("cpu"))
    for provider in (EAGER, "lean", PLAIN):
        assert meter.bytes_of(VPTDeep(3), provider, 2) == 7
    images = (torch.bfloat16, (2, *SIZE))
    assert seen == [
        ("ConcatenatedPrompts", True, *images),
        ("PromptedVisionTransformer", True, *images),
        ("VisionTransformer", False, *images),
    ]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_peaks_on_a_gpu() -> None:
    meter = MeasuredPeaks(vit(), SIZE, torch.bfloat16, torch.device("cuda"))
    small_batch, large_batch = (meter.bytes_of(VPTDeep(3), "speed", batch) for batch in (4, 256))
    assert 0 < small_batch < large_batch
    saved = SavedBytes(vit(), SIZE, torch.bfloat16).bytes_of(VPTDeep(3), "speed", 256)
    assert large_batch > 0.8 * saved
