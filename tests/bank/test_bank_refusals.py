"""Adapters, models and arguments that a bank refuses by name, without any change to it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from support.adapters.adapter_editing import rewrite_config, rewrite_tensors
from support.adapters.banks import VIT, backbone, images_of, write
from support.formulations import families
from support.formulations.families import FAMILIES
from torch import Tensor, nn

from vpt_fast import (
    VAPT,
    AdapterTuning,
    BiasTuning,
    FullTuning,
    PromptBank,
    VPTDeep,
    VPTShallow,
    load_adapter,
    prompt_tune,
)
from vpt_fast.adapter.tensors import expected_tensors


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (VPTShallow(3), "VPTShallow, whose prompt rows pass through the blocks as tokens"),
        (VPTDeep(3, blocks=[0, 1]), r"blocks \[0, 1\] of 4.*live on"),
        (BiasTuning(), "BiasTuning, which changes the backbone"),
        (FullTuning(), "FullTuning, which changes the backbone"),
        (AdapterTuning(), "AdapterTuning, which changes the backbone or adds layers"),
    ],
)
def test_methods_that_no_bank_holds(method: Any, words: str, tmp_path: Path) -> None:
    model = backbone()
    bank = PromptBank(copy.deepcopy(model))
    with pytest.raises(ValueError, match=words):
        bank.add("a", write(model, method, tmp_path / "a"))
    assert bank.tasks == () and bank.nbytes == 0


def test_pooled_prompts_are_refused(tmp_path: Path) -> None:
    model = backbone("mae")
    bank = PromptBank(copy.deepcopy(model))
    with pytest.raises(ValueError, match="pool_prompts=True"):
        bank.add("a", write(model, VPTDeep(2, pool_prompts=True), tmp_path / "a"))


def _edit(directory: Path, change: Callable[[dict[str, Tensor]], None], digest: bool) -> None:
    before = (directory / "adapter_config.json").read_bytes()
    rewrite_tensors(directory, change)
    if not digest:
        (directory / "adapter_config.json").write_bytes(before)


def _nan(tensors: dict[str, Tensor]) -> None:
    tensors["blocks.1.prompt.tokens"][0, 0] = torch.nan


def _fewer(tensors: dict[str, Tensor]) -> None:
    tensors["blocks.1.prompt.tokens"] = tensors["blocks.1.prompt.tokens"][:2].contiguous()


def _missing(tensors: dict[str, Tensor]) -> None:
    del tensors["blocks.2.prompt.tokens"]


def _more(tensors: dict[str, Tensor]) -> None:
    tensors["blocks.0.mlp.fc1.bias"] = torch.zeros(4)


@pytest.mark.parametrize(
    ("change", "digest", "words"),
    [
        (_fewer, False, "damaged or not the file"),
        (_nan, True, "blocks.1.prompt.tokens.*not finite"),
        (_fewer, True, r"blocks.1.prompt.tokens has shape \(2, 64\).*need \(4, 64\)"),
        (_missing, True, "has no blocks.2.prompt.tokens"),
        (_more, True, "has no blocks.0.mlp.fc1.bias"),
    ],
)
def test_a_bad_adapter_changes_nothing(
    change: Callable[[dict[str, Tensor]], None], digest: bool, words: str, tmp_path: Path
) -> None:
    model = backbone()
    bank = PromptBank(copy.deepcopy(model))
    good = write(model, VPTDeep(4), tmp_path / "good")
    bank.add("good", good)
    before, images = bank.nbytes, images_of(VIT, 1)
    wanted = bank(images, ["good"])[0]
    bad = write(model, VPTDeep(4), tmp_path / "bad")
    _edit(bad, change, digest)
    with pytest.raises(ValueError, match=words):
        bank.add("bad", bad)
    assert bank.tasks == ("good",) and bank.nbytes == before
    assert torch.equal(bank(images, ["good"])[0], wanted)


def test_another_backbone(tmp_path: Path) -> None:
    model = backbone()
    other = copy.deepcopy(model)
    families.randomise(other, seed=5)
    bank = PromptBank(copy.deepcopy(model))
    with pytest.raises(ValueError, match="is for another backbone"):
        bank.add("a", write(other, VPTDeep(4), tmp_path / "a"))
    with pytest.raises(ValueError, match="its width is 96, this model's is 64"):
        bank.add("b", write(backbone("deit"), VPTDeep(4), tmp_path / "b"))
    with pytest.raises(FileNotFoundError, match="is not an adapter"):
        bank.add("c", tmp_path)


def test_wrong_arguments(tmp_path: Path) -> None:
    model = backbone()
    adapter = write(model, VPTDeep(4), tmp_path / "a")
    bank = PromptBank(copy.deepcopy(model))
    bank.add("a", adapter)
    images = images_of(VIT, 2)
    with pytest.raises(ValueError, match="has a task 'a' already"):
        bank.add("a", adapter)
    with pytest.raises(TypeError, match="name must be a string"):
        bank.add(3, adapter)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must not be empty"):
        bank.add("", adapter)
    with pytest.raises(TypeError, match="one task per image, got the string 'aa'"):
        bank(images, "aa")
    with pytest.raises(ValueError, match="and 1 tasks do not fit"):
        bank(images, ["a"])
    with pytest.raises(ValueError, match="no task 'b'; it has a"):
        bank(images, ["a", "b"])
    with pytest.raises(ValueError, match="no task 'b'"):
        bank.remove("b")
    assert bank(images[:0], []) == []
    bank._model.train()
    with pytest.raises(ValueError, match="in training mode"):
        bank(images, ["a", "a"])


def test_models_that_have_no_bank() -> None:
    tuned = prompt_tune(backbone(), VPTDeep(2))
    with pytest.raises(ValueError, match="tuned already"):
        PromptBank(tuned)
    with pytest.raises(TypeError, match="cannot tune a Linear"):
        PromptBank(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="logits for every token"):
        PromptBank(backbone("all_tokens"))
    swin = timm.create_model("swin_tiny_patch4_window7_224", img_size=56, window_size=7)
    for layer in swin.layers:
        for block in layer.blocks:
            block.attn.fused_attn = True
    with pytest.raises(TypeError, match="SwinTransformer.*use a timm VisionTransformer"):
        PromptBank(swin)
    for wrong in (True, 1.5, "1 MB"):
        with pytest.raises(TypeError, match="memory_limit must be"):
            PromptBank(backbone(), memory_limit=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 1 byte"):
        PromptBank(backbone(), memory_limit=0)
    with pytest.raises(ValueError, match="needs a memory_limit"):
        PromptBank(backbone(), spill=True)


def test_experts_refuse_another_grid(tmp_path: Path) -> None:
    model = families.build("vit", dtype=torch.float64)
    other: Any = timm.create_model(
        "vit_tiny_patch16_224", **{**FAMILIES["vit"].arguments, "dynamic_img_size": True}
    ).double()
    other.load_state_dict(model.state_dict())
    bank = PromptBank(copy.deepcopy(other))
    bank.add("experts", write(other, VAPT(3), tmp_path / "a"))
    bank.add("deep", write(other, VPTDeep(3), tmp_path / "b"))
    images = torch.randn(2, 3, 32, 24, dtype=torch.float64)
    assert len(bank(images, ["deep", "deep"])) == 2
    with pytest.raises(ValueError, match="mix a 3 x 3 grid .* for task 'experts' has 4 x 3"):
        bank(images, ["deep", "experts"])


# --- damaged files -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["method"].update(name=[]),
        lambda c: c["method"].update(num_prompts="3"),
        lambda c: c["method"].update(blocks="x"),
        lambda c: c["method"].update(num_prompts=10**15),
        lambda c: c["fingerprint"].update(cls_token={}),
        lambda c: c["fingerprint"].update(cls_token=None),
        lambda c: c["fingerprint"]["cls_token"].update(shape=3),
        lambda c: c["fingerprint"]["cls_token"].update(norm="x"),
        lambda c: c["model"].update(args=[]),
        lambda c: c["input"].update(input_size=3),
        lambda c: c.update(class_names=["only one"]),
    ],
)
def test_damaged_configurations(change: Callable[[dict[str, Any]], None], tmp_path: Path) -> None:
    model = backbone()
    bank = PromptBank(copy.deepcopy(model))
    adapter = write(model, VPTDeep(4), tmp_path / "a")
    rewrite_config(adapter, change)
    with pytest.raises(ValueError):
        bank.add("a", adapter)
    assert bank.tasks == () and bank.nbytes == 0


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float8_e4m3fn])
def test_types_that_are_not_trained(dtype: torch.dtype, tmp_path: Path) -> None:
    model = backbone()
    bank = PromptBank(copy.deepcopy(model))
    adapter = write(model, VPTDeep(4), tmp_path / "a")

    def change(tensors: dict[str, Tensor]) -> None:
        tensors["blocks.0.prompt.tokens"] = torch.zeros(4, 64).to(dtype)

    _edit(adapter, change, digest=True)
    with pytest.raises(ValueError, match="not a type that is trained|tokens is torch.*float64"):
        bank.add("a", adapter)


def test_values_that_the_model_cannot_hold(tmp_path: Path) -> None:
    model = backbone()
    adapter = write(model, VPTDeep(4), tmp_path / "a")

    def change(tensors: dict[str, Tensor]) -> None:
        tensors["head.weight"][0, 0] = 1e300

    _edit(adapter, change, digest=True)
    bank = PromptBank(copy.deepcopy(model).float())
    with pytest.raises(ValueError, match=r"in torch.float32 not all of its values are finite"):
        bank.add("a", adapter)


def test_a_kernel_larger_than_the_grid(tmp_path: Path) -> None:
    model = backbone()
    adapter = write(model, VAPT(2), tmp_path / "a")
    rewrite_config(adapter, lambda c: c["method"].update(kernel_size=5))
    with pytest.raises(
        ValueError,
        match="cannot hold .* kernel_size=5 does not fit the 3 x 3 grid of the model's patches",
    ):
        PromptBank(copy.deepcopy(model)).add("a", adapter)


def test_tensors_of_a_method_are_computed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calls = backbone(), []
    adapter = write(model, VPTDeep(4), tmp_path / "a")

    def counted(*arguments: Any) -> Any:
        calls.append(arguments)
        return expected_tensors(*arguments)

    monkeypatch.setattr("vpt_fast.bank.read_task.expected_tensors", counted)
    bank = PromptBank(copy.deepcopy(model))
    for name in "abc":
        bank.add(name, adapter)
    bank.add("other", write(model, VPTDeep(2), tmp_path / "b"))
    assert len(calls) == 2


def test_another_pooling(tmp_path: Path) -> None:
    model = backbone("max_pool")
    adapter = write(model, VPTDeep(4), tmp_path / "a")
    other: Any = copy.deepcopy(model)
    other.global_pool = "avg"
    with pytest.raises(ValueError, match=r"global_pool='max', this model has 'avg'"):
        PromptBank(other).add("a", adapter)
    own: Any = copy.deepcopy(model)
    own.global_pool = "avg"
    with pytest.raises(ValueError, match=r"global_pool='max', this model has 'avg'"):
        load_adapter(own, adapter)


@pytest.mark.parametrize("where", ["", "blocks", "blocks.1", "blocks.1.attn"])
def test_hooks_that_would_be_skipped(where: str, tmp_path: Path) -> None:
    model = backbone()
    bank = PromptBank(model)
    handle = model.get_submodule(where).register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="has a hook or a forward of its own"):
        bank(images_of(VIT, 1), ["a"])
    with pytest.raises(ValueError, match="has a hook or a forward of its own"):
        PromptBank(model)
    handle.remove()
    with pytest.raises(ValueError, match="no task 'a'"):
        bank(images_of(VIT, 1), ["a"])
    model.get_submodule("blocks.1").train()
    with pytest.raises(ValueError, match="in training mode"):
        bank(images_of(VIT, 1), ["a"])


def test_a_bank_is_not_copied() -> None:
    with pytest.raises(TypeError, match="cannot be copied"):
        copy.deepcopy(PromptBank(backbone()))
