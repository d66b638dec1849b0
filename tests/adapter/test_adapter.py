"""Adapters hold what was trained, load bit for bit, and fit no other backbone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from support.formulations import families
from support.formulations.families import AVERAGE, FAMILIES, TOKEN
from support.formulations.plain import VARIANTS, prompt_names, redraw_prompts
from torch import Tensor, nn

import vpt_fast
from vpt_fast import (
    LinearProbe,
    VPTDeep,
    VPTShallow,
    load_adapter,
    prompt_tune,
    save_adapter,
    trainable_parameters,
)
from vpt_fast.adapter.files import read_config

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
FINGERPRINT, CARD = "adapter_fingerprint.json", "README.md"
NAMES = [f"class {letter}" for letter in "abcde"]


def trained(family: str, method: Any, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a tuned model whose prompts and head differ from their initialisation."""
    model = prompt_tune(families.build(family, dtype=dtype), method)
    redraw_prompts(model)
    with torch.no_grad():
        for name, parameter in trainable_parameters(model):
            if name.startswith("head"):
                parameter.mul_(1.25).add_(0.5)
    return model.eval()


def save(model: nn.Module, directory: Path, family: str = TOKEN, **more: Any) -> Path:
    return save_adapter(model, directory, model_args=FAMILIES[family].arguments, **more)


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip_of_every_method(variant: str, tmp_path: Path) -> None:
    method, image = VARIANTS[variant](4), families.images(TOKEN, dtype=torch.float32)
    model = trained(TOKEN, method)
    assert Path(save(model, tmp_path / "adapter")) == tmp_path / "adapter"
    torch.manual_seed(99)
    plain = families.build(TOKEN, dtype=torch.float32)
    loaded = load_adapter(plain, tmp_path / "adapter")
    assert loaded is plain
    assert torch.equal(loaded.eval()(image), model(image))
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name: p.requires_grad for name, p in loaded.named_parameters()} == flags
    loaded.train()
    assert loaded.head.training
    assert not loaded.blocks.training
    again = save(loaded, tmp_path / "again")
    assert (again / TENSORS).read_bytes() == (tmp_path / "adapter" / TENSORS).read_bytes()


@pytest.mark.parametrize(
    "method",
    [
        VPTDeep(3, dropout=0.25, project_dim=6, blocks=[0, 2], shared=True, pool_prompts=True),
        VPTShallow(4, dropout=0.5, project_dim=7, pool_prompts=True),
    ],
)
def test_every_field_of_the_method_is_loaded(method: Any, tmp_path: Path) -> None:
    model = trained(AVERAGE, method)
    save(model, tmp_path / "adapter", AVERAGE)
    loaded = load_adapter(families.build(AVERAGE, dtype=torch.float32), tmp_path / "adapter")
    image = families.images(AVERAGE, dtype=torch.float32)
    assert torch.equal(loaded.eval()(image), model(image))
    outputs = []
    for each in (model, loaded):
        torch.manual_seed(5)
        outputs.append(each.train()(image))
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], model.eval()(image)), "the dropout rate was lost"


@pytest.mark.parametrize(
    "family", ["deit_distilled", "siglip_map", "aimv2", "dinov2_swiglu", "headless", "dynamic"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_round_trip_of_families(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = trained(family, VPTDeep(3), dtype)
    save(model, tmp_path / "adapter", family)
    loaded = load_adapter(families.build(family, dtype=dtype), tmp_path / "adapter")
    image = families.images(family, dtype=dtype)
    assert torch.equal(loaded.eval()(image), model(image))


@pytest.mark.parametrize("family", [TOKEN, "deit_distilled"])
@pytest.mark.parametrize("variant", ["linear", "shallow", "deep", "projected_shared_gaps"])
def test_the_file_holds_what_was_trained(family: str, variant: str, tmp_path: Path) -> None:
    method = VARIANTS[variant](families.depth(family))
    model = trained(family, method)
    directory = save(model, tmp_path / "adapter", family)
    assert sorted(path.name for path in directory.iterdir()) == [CARD, CONFIG, FINGERPRINT, TENSORS]
    stored = load_file(directory / TENSORS)
    listed = dict(trainable_parameters(model))
    assert set(stored) == set(listed)
    heads = {name for name in model.state_dict() if name.startswith(("head.", "head_dist."))}
    blocks = [0] if variant == "shallow" else [*range(families.depth(family))]
    if variant == "linear":
        assert set(stored) == heads
    elif "shared" in variant:
        assert set(stored) == heads | set(prompt_names(method, []))
    else:
        assert set(stored) == heads | set(prompt_names(method, blocks))
    for name, value in stored.items():
        assert torch.equal(value, listed[name].detach())
        assert value.dtype == listed[name].dtype
    size = sum(value.numel() * value.element_size() for value in stored.values())
    assert (directory / TENSORS).stat().st_size < size + 4096


def test_the_configuration(tmp_path: Path) -> None:
    """It holds method and fields, model and arguments, size, normalisation, labels, versions."""
    model = trained(TOKEN, VPTDeep(3, dropout=0.1, blocks=range(2), project_dim=6))
    directory = save(
        model, tmp_path / "adapter", class_names=NAMES, checkpoint=Path("runs") / "weights.bin"
    )
    config = read_config(directory)
    for_people, rest = (
        json.loads((directory / name).read_text(encoding="utf-8")) for name in (CONFIG, FINGERPRINT)
    )
    assert config == {**for_people, **rest}
    assert sorted(rest) == ["architecture", "fingerprint", "fixed_image"]
    assert len((directory / CONFIG).read_text(encoding="utf-8").splitlines()) < 80
    assert isinstance(config["format_version"], int)
    assert config["method"] == {
        "name": "vpt-deep",
        "num_prompts": 3,
        "dropout": 0.1,
        "project_dim": 6,
        "blocks": [0, 1],
        "shared": False,
        "pool_prompts": False,
        "init": "uniform",
    }
    assert config["model"]["name"] == "vit_tiny_patch16_224"
    rebuilt = timm.create_model(config["model"]["name"], **config["model"]["args"])
    original = families.create(TOKEN)
    assert {n: p.shape for n, p in rebuilt.named_parameters()} == {
        n: p.shape for n, p in original.named_parameters()
    }
    assert Path(config["model"]["checkpoint"]).name == "weights.bin"
    expected = timm.data.resolve_model_data_config(original)
    stored = config["input"]
    assert tuple(stored["input_size"]) == (3, 24, 24)
    for key in ("mean", "std"):
        assert tuple(stored[key]) == tuple(expected[key])
    assert stored["interpolation"] == expected["interpolation"]
    assert stored["crop_pct"] == expected["crop_pct"]
    assert config["class_names"] == NAMES
    assert config["versions"]["vpt_fast"] == vpt_fast.__version__
    assert config["versions"]["torch"] == torch.__version__
    assert config["versions"]["timm"] == timm.__version__
    assert config["fingerprint"]
    assert not any("blocks.0.prompt" in name for name in config["fingerprint"])


def test_the_configuration_without_extras(tmp_path: Path) -> None:
    for name, method in (("linear", LinearProbe()), ("vpt-shallow", VPTShallow(2))):
        directory = save(trained("clip", method), tmp_path / name, "clip")
        config = read_config(directory)
        assert config["method"]["name"] == name
        assert config["class_names"] is None
        expected = timm.data.resolve_model_data_config(families.create("clip"))
        assert tuple(config["input"]["mean"]) == tuple(expected["mean"])


def test_a_vit_base_task_is_hundreds_of_kilobytes(tmp_path: Path) -> None:
    model = prompt_tune(
        timm.create_model("vit_base_patch16_224", num_classes=10, depth=12),
        VPTDeep(10),
    )
    save_adapter(model, tmp_path / "adapter", model_args={"num_classes": 10})
    assert sum(path.stat().st_size for path in (tmp_path / "adapter").iterdir()) < 600_000


FRESH = """
import sys
sys.modules["triton"] = None  # as on a machine that has none
import timm, torch
from vpt_fast import load_adapter
from vpt_fast.adapter.files import read_config
directory, weights, stored = sys.argv[1:]
model = read_config(directory)["model"]
base = timm.create_model(model["name"], **model["args"])
base.load_state_dict(torch.load(weights))
image, expected = torch.load(stored)
torch.set_num_threads(int(expected[1]))
with torch.no_grad():
    assert torch.equal(load_adapter(base, directory).eval()(image), expected[0])
print("equal to the bit")
"""


def test_a_fresh_process_without_triton(tmp_path: Path) -> None:
    model, image = trained(TOKEN, VPTDeep(3)), families.images(TOKEN, dtype=torch.float32)
    directory = save(model, tmp_path / "adapter", class_names=NAMES)
    torch.save(families.build(TOKEN, dtype=torch.float32).state_dict(), tmp_path / "weights.pt")
    with torch.no_grad():
        torch.save((image, (model(image), torch.get_num_threads())), tmp_path / "expected.pt")
    arguments = [str(directory), str(tmp_path / "weights.pt"), str(tmp_path / "expected.pt")]
    run = subprocess.run(
        [sys.executable, "-c", FRESH, *arguments], capture_output=True, text=True, check=False
    )
    assert run.stdout.strip() == "equal to the bit", run.stderr


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_backbone_is_the_same_backbone(dtype: torch.dtype, tmp_path: Path) -> None:
    model, image = trained(TOKEN, VPTDeep(3)), families.images(TOKEN, dtype=torch.float32)
    directory = save(model, tmp_path / "adapter")
    loaded = load_adapter(families.build(TOKEN, dtype=torch.float32).to(dtype), directory).eval()
    output = loaded(image.to(dtype))
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert (output.double() - model(image).double()).norm() < 0.05 * model(image).norm()


def test_a_cast_adapter_fits_the_original_backbone(tmp_path: Path) -> None:
    model = trained(TOKEN, VPTDeep(3)).to(torch.bfloat16)
    directory = save(model, tmp_path / "adapter")
    loaded = load_adapter(families.build(TOKEN, dtype=torch.float32), directory).eval()
    image: Tensor = families.images(TOKEN, dtype=torch.float32)
    output = model(image.to(torch.bfloat16)).float()
    assert (loaded(image) - output).norm() < 0.05 * output.norm()
