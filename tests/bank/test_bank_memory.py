"""A bank's memory limit, and tasks that are spilled to disk."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from support.adapters.banks import VIT, alone, backbone, fill, images_of, relative, write
from torch import Tensor

from vpt_fast import (
    VAPT,
    PromptBank,
    VPTDeep,
    prompt_tune,
    save_adapter,
)
from vpt_fast.bank.row_pool import RowPool


def test_a_limit(tmp_path: Path) -> None:
    model = backbone()
    adapter = write(model, VPTDeep(10), tmp_path / "a", 4)
    probe = PromptBank(copy.deepcopy(model))
    one = probe.add("a", adapter).nbytes
    bank = PromptBank(copy.deepcopy(model), memory_limit=3 * one + 10)
    for name in "abc":
        bank.add(name, adapter)
        assert bank.nbytes <= 3 * one + 10
    with pytest.raises(ValueError, match=r"task 'd' takes [\d,]+ bytes.*spill=True"):
        bank.add("d", adapter)
    assert bank.tasks == ("a", "b", "c")
    bank.remove("b")
    bank.add("d", adapter)
    assert bank.nbytes <= 3 * one + 10
    small = write(model, VPTDeep(1), tmp_path / "small", 4)
    large = write(model, VPTDeep(18), tmp_path / "large", 4)
    bank.remove("c")
    bank.remove("a")
    bank.add("small", small)
    bank.add("large", large)
    assert bank.nbytes <= 3 * one + 10
    got = bank(images_of(VIT, 3), ["d", "small", "large"])
    for image, logits, source in zip(images_of(VIT, 3), got, (adapter, small, large), strict=True):
        assert relative(logits, alone(model, source, image[None])[0]) < 1e-12


def test_spilled_tasks_come_back(tmp_path: Path) -> None:
    model = backbone()
    adapters = {n: write(model, VPTDeep(10), tmp_path / n, 4, ord(n)) for n in "abcd"}
    one = PromptBank(copy.deepcopy(model)).add("a", adapters["a"]).nbytes
    bank = PromptBank(copy.deepcopy(model), memory_limit=2 * one, spill=True)
    for name, adapter in adapters.items():
        bank.add(name, adapter)
    assert bank.tasks == ("a", "b", "c", "d")
    assert bank.resident_tasks == ("c", "d")
    images = images_of(VIT, 2)
    for pair in ("ab", "ca", "dc", "bd"):
        got = bank(images, list(pair))
        assert bank.nbytes <= 2 * one
        assert set(bank.resident_tasks) == set(pair)
        for image, logits, name in zip(images, got, pair, strict=True):
            assert relative(logits, alone(model, adapters[name], image[None])[0]) < 1e-12
    bank(images[:1], ["b"])  # now d is the least recently used
    bank(images[:1], ["a"])
    assert set(bank.resident_tasks) == {"a", "b"}
    with pytest.raises(ValueError, match="ask for fewer tasks in one batch"):
        bank(images_of(VIT, 3), ["a", "b", "c"])
    assert bank.nbytes <= 2 * one
    write(model, VPTDeep(10), tmp_path / "d", 4, seed=99, overwrite=True)
    with pytest.raises(ValueError, match="has changed since it was added"):
        bank(images[:1], ["d"])


def test_a_task_of_vit_base_takes_two_megabytes(tmp_path: Path) -> None:
    """50 prompts in each of 12 blocks, in bf16, without the head."""
    model = timm.create_model("vit_base_patch16_224", num_classes=0).to(torch.bfloat16)
    bank = PromptBank(model)
    tuned: Any = timm.create_model("vit_base_patch16_224", num_classes=2)
    tuned.load_state_dict(model.float().state_dict(), strict=False)
    model.to(torch.bfloat16)
    adapter = save_adapter(prompt_tune(tuned, VPTDeep(50)), tmp_path / "a")
    for number in range(20):
        bank.add(str(number), adapter)
    heads = 20 * 2 * (768 + 1) * 2
    assert (bank.nbytes - heads) / 20 <= 2e6


def test_experts_are_spilled_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spilled under a relative path and read from another working folder; tasks keep identity."""
    model = backbone()
    monkeypatch.chdir(tmp_path)
    adapters = {n: write(model, VAPT(4), Path(n), 4, ord(n)) for n in "ab"}
    one = PromptBank(copy.deepcopy(model)).add("a", adapters["a"]).nbytes
    bank = PromptBank(copy.deepcopy(model), memory_limit=one, spill=True)
    known = [bank.add(name, adapter) for name, adapter in adapters.items()]
    monkeypatch.chdir("/")
    for name in "abab":
        got = bank(images_of(VIT, 1), [name])[0]
        assert bank.resident_tasks == (name,) and bank.nbytes <= one
        wanted = alone(model, tmp_path / name, images_of(VIT, 1))[0]
        assert relative(got, wanted) < 1e-12
    assert [bank.task(n) for n in "ab"] == known and bank.task("a") is known[0]


@pytest.mark.parametrize("method", [VPTDeep(4), VAPT(4)])
def test_a_file_that_changes_changes_nothing(method: Any, tmp_path: Path) -> None:
    model = backbone(dtype=torch.float32)
    adapter = write(model, method, tmp_path / "a")
    bank = PromptBank(copy.deepcopy(model))
    bank.add("a", adapter)
    images = images_of(VIT, 1, torch.float32)
    wanted = bank(images, ["a"])[0]
    (adapter / "adapter_model.safetensors").open("wb").close()
    assert torch.equal(bank(images, ["a"])[0], wanted)


def test_inference_mode_leaves_no_trace(tmp_path: Path) -> None:
    model = backbone()
    adapters = {n: write(model, VPTDeep(3), tmp_path / n, 4, ord(n)) for n in "abc"}
    one = PromptBank(copy.deepcopy(model)).add("a", adapters["a"]).nbytes
    with torch.inference_mode():
        bank = PromptBank(copy.deepcopy(model), memory_limit=2 * one, spill=True)
        bank.add("a", adapters["a"])
        bank.add("b", adapters["b"])
        bank(images_of(VIT, 1), ["b"])
    bank.add("c", adapters["c"])
    for name in "abc":
        got = bank(images_of(VIT, 1), [name])[0]
        assert relative(got, alone(model, adapters[name], images_of(VIT, 1))[0]) < 1e-12


def test_a_write_that_fails_owns_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = RowPool([(2,)], 4, torch.float32, torch.device("cpu"))
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "copy_", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            pool.store([torch.ones(3, 2)])
    assert pool.store([torch.ones(4, 2)]) is not None


def test_autocast(tmp_path: Path) -> None:
    """No further from fp32 than each task alone under autocast."""
    model = backbone(dtype=torch.float32)
    bank = PromptBank(copy.deepcopy(model))
    names = ["deep", "vapt", "linear"]
    adapters = fill(bank, model, tmp_path, names)
    images = images_of(VIT, 300, torch.float32)
    order = [name for name in names for _ in range(100)]
    with torch.autocast("cpu", torch.bfloat16):
        got = bank(images, order)
    for name, adapter in adapters.items():
        where = [i for i, n in enumerate(order) if n == name]
        wanted = alone(model, adapter, images[where])
        with torch.autocast("cpu", torch.bfloat16):
            theirs = alone(model, adapter, images[where]).float()
        ours = torch.stack([got[i] for i in where]).float()
        assert got[where[0]].dtype == torch.bfloat16
        assert (ours - wanted).norm() <= 1.2 * (theirs - wanted).norm()
