"""A mixed batch of a bank answers as every task alone does, and a bad adapter changes nothing."""

from __future__ import annotations

import copy
import gc
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import timm
import torch
from families import FAMILIES
from plain import redraw_prompts
from torch import Tensor, nn

from vpt_fast import (
    VAPT,
    AdapterTuning,
    BiasTuning,
    FullTuning,
    LinearProbe,
    PromptBank,
    VPTDeep,
    VPTShallow,
    load_adapter,
    prompt_tune,
    save_adapter,
    trainable_parameters,
)

METHODS: dict[str, Callable[[int], Any]] = {
    "deep": lambda depth: VPTDeep(4),
    "dropped": lambda depth: VPTDeep(7, dropout=0.3),
    "projected": lambda depth: VPTDeep(3, project_dim=5),
    "shared": lambda depth: VPTDeep(2, shared=True),
    "last": lambda depth: VPTDeep(6, blocks=[depth - 1]),
    "none": lambda depth: VPTDeep(0),
    "linear": lambda depth: LinearProbe(),
    "vapt": lambda depth: VAPT(4),
    "vapt_again": lambda depth: VAPT(4, hidden_dim=8),
    "vapt_other": lambda depth: VAPT(9, hidden_dim=3, kernel_size=1),
    "vapt_paper": lambda depth: VAPT(2, variant="paper"),
}
VIT = "vit"


def backbone(family: str = VIT, dtype: torch.dtype = torch.float64) -> nn.Module:
    return families.build(family, dtype=dtype)


def write(
    model: nn.Module, method: Any, directory: Path, classes: int = 5, seed: int = 0, **more: Any
) -> Path:
    """An adapter of a copy of `model`, with prompts and a head that no seed would give."""
    own: Any = copy.deepcopy(model)
    own.reset_classifier(classes)
    own.to(next(model.parameters()).dtype)
    own = prompt_tune(own, method)
    generator = torch.Generator().manual_seed(seed)
    redraw_prompts(own, seed)
    with torch.no_grad():
        for name, parameter in trainable_parameters(own):
            if name.startswith("head"):
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.copy_(0.5 * noise)
    return save_adapter(own, directory, **more)


def alone(model: nn.Module, directory: Path, images: Tensor) -> Tensor:
    """The task by itself, image by image."""
    own: Any = copy.deepcopy(model)
    own.reset_classifier(
        json.loads((directory / "adapter_config.json").read_text())["model"]["args"]["num_classes"]
    )
    own.to(next(model.parameters()).dtype)
    own = load_adapter(own, directory).eval()
    with torch.no_grad():
        return torch.cat([own(image[None]) for image in images])


def fill(bank: PromptBank, model: nn.Module, root: Path, names: list[str]) -> dict[str, Path]:
    depth = len(model.blocks)  # type: ignore[arg-type]
    found = {}
    for seed, name in enumerate(names):
        found[name] = write(model, METHODS[name](depth), root / name, 2 + 3 * seed % 7, seed)
        bank.add(name, found[name])
    return found


def images_of(family: str, count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    shape = (count, FAMILIES[family].channels, *FAMILIES[family].image)
    return torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=dtype)


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


_WHOLE = sorted(set(FAMILIES) - {"all_tokens"})


@pytest.mark.parametrize("family", _WHOLE)
def test_a_mixed_batch_is_every_task_alone(family: str, tmp_path: Path) -> None:
    model = backbone(family)
    if FAMILIES[family].arguments.get("num_classes") == 0:
        pytest.skip("an adapter has a head")
    methods = [n for n in METHODS if not n.startswith("vapt")]
    if not family.startswith(("dynamic", "one_patch")):
        methods = list(METHODS)
    bank = PromptBank(copy.deepcopy(model))
    adapters = fill(bank, model, tmp_path, methods)
    order = [*methods, methods[0], *reversed(methods)]
    images = images_of(family, len(order))
    got = bank(images, order)
    assert [len(g) for g in got] == [bank.task(n).num_classes for n in order]
    for name, adapter in adapters.items():
        where = [i for i, n in enumerate(order) if n == name]
        wanted = alone(model, adapter, images[where])
        ours = torch.stack([got[i] for i in where])
        assert relative(ours, wanted) < 1e-12, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    """No further from fp64 than each task alone in the same dtype, by a little."""
    exact = backbone()
    model = copy.deepcopy(exact).to(dtype)
    bank = PromptBank(copy.deepcopy(model))
    names = ["deep", "vapt", "linear", "vapt_other", "shared"]
    adapters = fill(bank, model, tmp_path, names)
    images = images_of(VIT, 8 * len(names)).to(dtype)
    order = [name for name in names for _ in range(8)]
    got = bank(images, order)
    for name, adapter in adapters.items():
        where = [i for i, n in enumerate(order) if n == name]
        ours = torch.stack([got[i] for i in where]).double()
        theirs = alone(model, adapter, images[where]).double()
        # The adapter's own weights are rounded; the backbone of the exact model is so as well.
        wanted = alone(copy.deepcopy(model).double(), adapter, images[where].double())
        error = (ours - wanted).norm() / wanted.norm()
        budget = (theirs - wanted).norm() / wanted.norm()
        assert error <= 1.3 * budget + 1e-7, name


def test_batch_mates_do_not_matter(tmp_path: Path) -> None:
    model = backbone()
    bank = PromptBank(copy.deepcopy(model))
    names = ["deep", "vapt", "linear", "dropped", "vapt_other"]
    fill(bank, model, tmp_path, names)
    images = images_of(VIT, 1)
    others = images_of(VIT, 6)
    for name in names:
        one = bank(images, [name])[0]
        mixed = bank(torch.cat([others, images]), [*names, "deep", name])[-1]
        assert relative(mixed, one) < 1e-12


def test_a_thousand_tasks(tmp_path: Path) -> None:
    model = backbone("one_block")
    bank = PromptBank(copy.deepcopy(model))
    adapters = [write(model, VPTDeep(p), tmp_path / str(p), 2 + p, p) for p in range(1, 5)]
    for number in range(1000):
        bank.add(f"task {number}", adapters[number % 4])
    assert len(bank.tasks) == 1000
    exact = sum(bank.task(name).nbytes for name in bank.tasks)
    assert exact <= bank.nbytes <= 1.07 * exact
    order = [f"task {i}" for i in (999, 0, 500, 501, 502, 503, 7, 7)]
    images = images_of("one_block", len(order))
    got = bank(images, order)
    for image, name, logits in zip(images, order, got, strict=True):
        wanted = alone(model, adapters[int(name.split()[1]) % 4], image[None])[0]
        assert relative(logits, wanted) < 1e-12


def test_removal_frees_rows_that_are_used_again(tmp_path: Path) -> None:
    model = backbone()
    bank = PromptBank(copy.deepcopy(model))
    adapter = write(model, VPTDeep(10), tmp_path / "a", 4)
    for name in "abcdefgh":
        bank.add(name, adapter)
    before = bank.nbytes
    for name in "bdf":
        bank.remove(name)
    assert bank.tasks == ("a", "c", "e", "g", "h")
    for name in "xyz":
        bank.add(name, adapter)
    assert bank.nbytes == before
    got = bank(images_of(VIT, 5), ["a", "x", "y", "z", "h"])
    for logits, wanted in zip(got, alone(model, adapter, images_of(VIT, 5)), strict=True):
        assert relative(logits, wanted) < 1e-12
    with pytest.raises(ValueError, match="no task 'b'; it has a, c, e"):
        bank(images_of(VIT, 1), ["b"])


def test_calls_under_way_end_on_what_they_began_with(tmp_path: Path) -> None:
    """Tasks are removed and added from another thread in the middle of a call."""
    model = backbone()
    bank = PromptBank(copy.deepcopy(model))
    first = write(model, VPTDeep(5), tmp_path / "first", 4, seed=1)
    second = write(model, VPTDeep(5), tmp_path / "second", 4, seed=2)
    bank.add("a", first)
    images = images_of(VIT, 2)
    wanted = alone(model, first, images)
    reached, go_on = threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        reached.set()
        assert go_on.wait(20)

    hook = bank._model.blocks[1].register_forward_pre_hook(wait)
    hook.remove()
    handle = bank._model.blocks[1].mlp.register_forward_pre_hook(wait)
    got: list[Tensor] = []
    thread = threading.Thread(target=lambda: got.extend(bank(images, ["a", "a"])))
    thread.start()
    assert reached.wait(20)
    bank.remove("a")
    for name in "bcde":
        bank.add(name, second)
    assert bank.tasks == ("b", "c", "d", "e")
    handle.remove()
    go_on.set()
    thread.join(20)
    assert relative(torch.stack(got), wanted) < 1e-12
    gc.collect()
    assert relative(torch.stack(bank(images, ["e", "b"])), alone(model, second, images)) < 1e-12


def test_many_threads(tmp_path: Path) -> None:
    model = backbone("one_block")
    bank = PromptBank(copy.deepcopy(model))
    adapters = [write(model, VPTDeep(p), tmp_path / str(p), 3, p) for p in (1, 2, 3)]
    bank.add("stays", adapters[0])
    images = images_of("one_block", 2)
    wanted = alone(model, adapters[0], images)
    stop, errors = threading.Event(), []

    def call() -> None:
        while not stop.is_set():
            got = torch.stack(bank(images, ["stays", "stays"]))
            if not relative(got, wanted) < 1e-12:
                errors.append(got)

    def change(own: int) -> None:
        for turn in range(30):
            bank.add(f"{own} {turn}", adapters[turn % 3])
            if turn % 3:
                bank.remove(f"{own} {turn - 1}")

    callers = [threading.Thread(target=call) for _ in range(2)]
    changers = [threading.Thread(target=change, args=(i,)) for i in range(2)]
    for thread in (*callers, *changers):
        thread.start()
    for thread in changers:
        thread.join(60)
    stop.set()
    for thread in callers:
        thread.join(60)
    assert not errors
    assert len(bank.tasks) == 1 + 2 * 10


# --- memory ------------------------------------------------------------------------------------


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
    bank(images[:1], ["b"])  # now d is the one that was used longest ago
    bank(images[:1], ["a"])
    assert set(bank.resident_tasks) == {"a", "b"}
    with pytest.raises(ValueError, match="ask for fewer tasks in one batch"):
        bank(images_of(VIT, 3), ["a", "b", "c"])
    assert bank.nbytes <= 2 * one
    write(model, VPTDeep(10), tmp_path / "d", 4, seed=99, overwrite=True)
    with pytest.raises(ValueError, match="has changed since it was added"):
        bank(images[:1], ["d"])


def test_a_task_of_vit_base_takes_two_megabytes(tmp_path: Path) -> None:
    """50 prompts in each of 12 blocks, in bf16, the head not counted."""
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


# --- refusals ----------------------------------------------------------------------------------


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
    import hashlib

    from safetensors.torch import load_file, save_file

    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    if digest:
        config = json.loads((directory / "adapter_config.json").read_text())
        config["tensors_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        (directory / "adapter_config.json").write_text(json.dumps(config))


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
        (_more, True, "no blocks.0.mlp.fc1.bias|holds blocks.0.mlp.fc1.bias"),
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
    with pytest.raises(ValueError, match="'experts' mix a 3 x 3 grid.*have 4 x 3"):
        bank(images, ["deep", "experts"])
