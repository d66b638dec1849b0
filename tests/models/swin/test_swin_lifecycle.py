"""Tuned Swins are restored, saved, copied, cast and compiled like any other model, or refused."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from support.formulations import plain_swin
from support.formulations.plain import distance, redraw_prompts
from support.formulations.plain_swin import build, images, pair
from timm.models.swin_transformer import SwinTransformer
from torch import nn

from vpt_fast import (
    VAPT,
    AdapterTuning,
    BiasTuning,
    FullTuning,
    LinearProbe,
    MLPHead,
    PartialTuning,
    VPTDeep,
    VPTShallow,
    load_adapter,
    prompt_tune,
    remove_prompts,
    save_adapter,
    trainable_parameters,
)
from vpt_fast.analysis.activation_memory import saved_bytes, step_inputs
from vpt_fast.reference.vit import concatenated, without_prompts

METHODS: dict[str, Any] = {
    "deep": VPTDeep(3),
    "shallow": VPTShallow(3, pool_prompts=True),
    "vapt": VAPT(3),
    "linear": LinearProbe(),
    "mlp-head": MLPHead(hidden_dim=9),
    "partial": PartialTuning(3),
    "bias": BiasTuning(),
    "adapter": AdapterTuning(),
    "full": FullTuning(),
}


def trained_step(model: nn.Module, name: str = "padded") -> None:
    """Take a large SGD step on all trained parameters."""
    parameters = [p for _, p in trainable_parameters(model)]
    optimiser = torch.optim.SGD(parameters, lr=0.1)
    model(images(name)).square().mean().backward()
    assert all(p.grad is not None for p in parameters)
    optimiser.step()
    optimiser.zero_grad()


@pytest.mark.parametrize("method", METHODS)
def test_remove_prompts_is_exact(method: str) -> None:
    base = build("padded").train()
    base.layers[0].requires_grad_(False)
    before = copy.deepcopy(base)
    tuned = prompt_tune(base, METHODS[method])
    trained_step(tuned.train())
    plain = remove_prompts(tuned)
    assert plain is base and type(plain) is SwinTransformer
    assert [type(m) for m in plain.modules()] == [type(m) for m in before.modules()]
    assert [m.training for m in plain.modules()] == [m.training for m in before.modules()]
    flags = [(n, p.requires_grad) for n, p in before.named_parameters()]
    assert [(n, p.requires_grad) for n, p in plain.named_parameters()] == flags
    state = before.state_dict()
    assert list(plain.state_dict()) == list(state)
    assert all(torch.equal(t, state[n]) for n, t in plain.state_dict().items())
    assert [vars(m).keys() for m in plain.modules()] == [vars(m).keys() for m in before.modules()]


@pytest.mark.parametrize("method", METHODS)
def test_adapters(method: str, tmp_path: Path) -> None:
    tuned = prompt_tune(build("padded"), METHODS[method])
    trained_step(tuned.train())
    tuned.eval()
    save_adapter(tuned, tmp_path / "adapter")
    loaded = load_adapter(build("padded"), tmp_path / "adapter").eval()
    assert torch.equal(loaded(images("padded")), tuned(images("padded")))
    if method != "full":
        other = build("padded", seed=3)
        with pytest.raises(ValueError, match="another backbone"):
            load_adapter(other, tmp_path / "adapter")
        assert type(other) is SwinTransformer


def test_names_of_tensors() -> None:
    tuned = prompt_tune(build("padded"), VAPT(3))
    names = [n for n, _ in trainable_parameters(tuned)]
    parts = ("norm.weight", "norm.bias", "conv.weight", "mix.weight", "mix.bias")
    experts = [f"layers.{s}.blocks.{i}.prompt.{p}" for s, i in
               [(0, 1), (1, 0), (1, 1), (2, 0), (2, 1)] for p in parts]  # fmt: skip
    projectors = [
        f"layers.{s}.prompt_projector.{n}.weight" for s in range(3) for n in ("down", "up")
    ]
    expected = ["layers.0.blocks.0.prompt.tokens", *experts, *projectors]
    assert sorted(names) == sorted([*expected, "head.fc.weight", "head.fc.bias"])
    tuned.load_state_dict(build("padded", seed=5).state_dict())  # strict, from a plain checkpoint
    deep = prompt_tune(build("padded"), VPTDeep(3))
    shapes = {n: tuple(p.shape) for n, p in trainable_parameters(deep) if "prompt" in n}
    assert shapes == {
        f"layers.{s}.blocks.{i}.prompt.tokens": (3, 32 * 2**s) for s in range(3) for i in range(2)
    }


@pytest.mark.parametrize(
    ("method", "parts"),
    [
        (PartialTuning(1), ("layers.2.blocks.1.", "norm.", "head.")),
        (
            PartialTuning(3),
            ("layers.1.blocks.1.", "layers.2.downsample.", "layers.2.blocks.", "norm.", "head."),
        ),
    ],
)
def test_last_blocks_and_the_merging_between_them(method: Any, parts: tuple[str, ...]) -> None:
    tuned = prompt_tune(build("padded"), method)
    for name, parameter in tuned.named_parameters():
        assert parameter.requires_grad == name.startswith(parts), name


@pytest.mark.parametrize("method", ["deep", "shallow", "vapt", "adapter", "mlp-head"])
def test_copies(method: str) -> None:
    tuned = prompt_tune(build("padded"), METHODS[method])
    redraw_prompts(tuned)
    image = images("padded")
    file = io.BytesIO()
    torch.save(tuned, file)
    file.seek(0)
    for copied in (
        copy.deepcopy(tuned),
        pickle.loads(pickle.dumps(tuned)),
        torch.load(file, weights_only=False),
    ):
        assert torch.equal(copied(image), tuned(image))
        redraw_prompts(copied, seed=9)
        if method in ("deep", "shallow", "vapt"):
            assert not torch.equal(copied(image), tuned(image))
        assert type(remove_prompts(copied)) is SwinTransformer


def test_adapters_and_heads_act() -> None:
    """Layers that are initialised to the identity change the output once they are trained."""
    image = images("padded")
    tuned = prompt_tune(build("padded"), AdapterTuning())
    before = tuned(image)
    for memory in ("speed", "minimal"):
        for block in (b for stage in tuned.layers for b in stage.blocks):
            block.memory = memory
            nn.init.normal_(block.adapter.up.weight)
        assert distance(tuned(image), before) > 1e-3
    headed = prompt_tune(build("padded"), MLPHead(hidden_dim=9))
    assert headed(image).shape == (2, 5)
    pooled = headed.forward_head(headed.forward_features(image), pre_logits=True)
    assert distance(headed.head.fc(headed.head_hidden(pooled)), headed(image)) <= 1e-12
    headed.reset_classifier(3)
    assert headed(image).shape == (2, 3)


def test_reset_classifier_and_modes() -> None:
    tuned = prompt_tune(build("padded", drop_rate=0.2), VPTDeep(3, dropout=0.1))
    tuned.train()
    modes = {n for n, m in tuned.named_modules() if m.training}
    assert modes >= {"", "head", "head.drop", "layers.0.blocks.0.prompt"}
    assert all(n == "" or n.startswith("head") or "prompt" in n for n in modes)
    tuned.reset_classifier(7)
    assert tuned(images("padded")).shape == (2, 7)
    assert tuned.head.fc.weight.requires_grad


@pytest.mark.parametrize("method", ["deep", "shallow", "vapt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(method: str, dtype: torch.dtype) -> None:
    """Cast or under autocast, near fp64, and every gradient finite."""
    tuned, plain = pair(build("padded"), METHODS[method])
    image = images("padded")
    expected = plain(image)
    tolerance = 1e-4 if dtype == torch.float32 else 0.15
    narrow = copy.deepcopy(tuned).to(dtype)
    assert distance(narrow(image.to(dtype)), expected) <= tolerance
    mixed = tuned.float()
    with torch.autocast("cpu", torch.bfloat16):
        output = mixed(image.float())
    assert distance(output, expected) <= 0.15
    output.float().square().sum().backward()
    for name, parameter in trainable_parameters(mixed):
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("method", ["deep", "shallow"])
def test_compiles_without_a_graph_break(method: str) -> None:
    tuned = prompt_tune(build("one_stage"), METHODS[method])
    redraw_prompts(tuned)
    compiled = torch.compile(tuned, fullgraph=True, backend="aot_eager")
    assert distance(compiled(images("one_stage")), tuned(images("one_stage"))) <= 1e-10


@pytest.mark.parametrize("prompts", [1, 10, 60])
def test_saves_no_more_than_the_model_without_prompts(prompts: int) -> None:
    """In mode "speed", at any number of deep prompts; each further mode saves less."""
    inputs = step_inputs(8, (3, 64, 64), torch.float32, "cpu")
    base = build("window4", torch.float32, embed_dim=64)
    plain = saved_bytes(without_prompts(copy.deepcopy(base)), *inputs)
    sizes = []
    for memory in ("speed", "balanced", "lean", "minimal"):
        tuned = prompt_tune(copy.deepcopy(base), VPTDeep(prompts), memory=memory).train()
        sizes.append(saved_bytes(tuned, *inputs))
    assert sizes[0] <= plain
    assert all(more > less for more, less in zip(sizes, sizes[1:], strict=False))


@pytest.mark.parametrize("method", [VPTDeep(3), VPTShallow(3), VPTDeep(3, blocks=[1, 4])])
def test_the_eager_form_is_the_same_function(method: Any) -> None:
    base, image = build("padded"), images("padded")
    tuned = prompt_tune(copy.deepcopy(base), method)
    eager = concatenated(base, method)
    prompts = [p for n, p in tuned.named_parameters() if n.endswith("prompt.tokens")]
    with torch.no_grad():
        for ours, theirs in zip(prompts, eager.prompts, strict=True):
            ours.copy_(theirs)
    assert distance(tuned(image), eager(image)) <= 1e-10


@pytest.mark.parametrize("entry", ["swinv2_tiny_window8_256", "swinv2_cr_tiny_224"])
def test_later_swins_are_refused_by_name(entry: str) -> None:
    model = timm.create_model(entry, num_classes=2)
    with pytest.raises(TypeError, match=f"{type(model).__name__}.*cosine attention"):
        prompt_tune(model, VPTDeep(3))


def _another_block(model: Any) -> None:
    class Other(type(model.layers[0].blocks[1])):  # type: ignore[misc]
        pass

    model.layers[0].blocks[1].__class__ = Other


def _extra(model: Any) -> None:
    model.layers[1].blocks[0].attn.gate = nn.Linear(3, 3)


def _headless(model: Any) -> None:
    model.reset_classifier(5, "")


@pytest.mark.parametrize(
    ("change", "method", "message"),
    [
        (_another_block, VPTDeep(3), r"layers\.0\.blocks\.1 is Other"),
        (_extra, VPTDeep(3), r"layers\.1\.blocks\.0\.attn\.gate is Linear"),
        (_headless, VPTDeep(3, pool_prompts=True), "pool_prompts=True needs a head that pools"),
        (None, VPTDeep(3, shared=True), r"shared=True needs .* \[32, 64, 128\]"),
        (None, VPTDeep(3, project_dim=4), r"project_dim=4 needs .* one width"),
        (None, VPTDeep(3, blocks=[6]), "names block 6"),
        (None, VAPT(3, kernel_size=5), "kernel_size=5 does not fit the 4 x 4 grid of block 4"),
        (None, PartialTuning(7), "num_blocks=7"),
    ],
)
def test_what_cannot_be_honoured_is_named(change: Any, method: Any, message: str) -> None:
    model = build("padded")
    if change is not None:
        change(model)
    before = {n: type(m) for n, m in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        prompt_tune(model, method)
    assert {n: type(m) for n, m in model.named_modules()} == before


def test_hooks_that_would_miss_prompt_rows_are_named() -> None:
    tuned = prompt_tune(build("padded"), VPTShallow(3))
    handle = tuned.layers[1].blocks.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="blocks` are hooked, compiled"):
        tuned(images("padded"))
    handle.remove()
    tuned.layers.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="`layers` is hooked, compiled"):
        tuned(images("padded"))
    deep = prompt_tune(build("padded"), VPTDeep(3))
    calls = []
    deep.layers[1].blocks.register_forward_hook(lambda *_: calls.append("blocks"))
    deep.layers.register_forward_hook(lambda *_: calls.append("layers"))
    deep(images("padded"))
    assert calls == ["blocks", "layers"]


def test_a_new_size_is_timms() -> None:
    """`set_input_size` changes windows and tables of a tuned model as those of a plain one."""
    tuned, plain = pair(build("window4"), VPTDeep(3))
    for model in (tuned, plain.model):
        model.set_input_size((48, 80), window_size=(3, 5))
    image = plain_swin.images("window4")[:, :, :48].repeat(1, 1, 1, 2)[..., :80]
    assert distance(tuned(image), plain(image)) <= 1e-10
