"""Adapters on the Hugging Face Hub, against a stand-in of its HTTP interface."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.adapters import hub as stand_in
from support.formulations.plain import redraw_prompts

import vpt_fast
from vpt_fast import VPTDeep
from vpt_fast.adapter.files import read_config
from vpt_fast.adapter.hub.names import local_folder, repository
from vpt_fast.backbones.build import create_backbone, resolve_name

PROGRAM = """
import json, sys, torch, vpt_fast
results = []
for function, args, options in json.loads(sys.argv[1]):
    try:
        found = getattr(vpt_fast, function)(*args, **options)
        if isinstance(found, torch.nn.Module):
            image = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32).sin()
            found = [found(image).tolist(), found.training, found.num_classes]
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
    results.append(found)
print(json.dumps(results))
"""


@pytest.fixture
def hub() -> Iterator[stand_in.Hub]:
    with stand_in.running() as found:
        yield found


@pytest.fixture
def adapter(tmp_path: Path) -> tuple[Path, Any]:
    torch.manual_seed(0)
    name, checkpoint, args = resolve_name("vpt_fast_demo")
    model = create_backbone(name, 3, checkpoint=checkpoint, model_args=args)
    redraw_prompts(vpt_fast.prompt_tune(model, VPTDeep(2)))
    folder = vpt_fast.save_adapter(
        model, tmp_path / "digits", class_names=["a", "b|c", "d"], model_args=args,
        checkpoint="demo_vit.safetensors", metrics={"test top-1": 91.234}, dataset="digits",
        license="apache-2.0",
    )  # fmt: skip
    image = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32).sin()
    with torch.no_grad():
        return folder, model.eval()(image)


def environment(hub: stand_in.Hub, home: Path, token: str = "hf_test") -> dict[str, str]:
    """Return the Hub client's own variables, that it reads when it is imported."""
    return {
        "HF_ENDPOINT": hub.address, "HF_HOME": str(home), "HF_TOKEN": token,
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
    }  # fmt: skip


def run(hub: stand_in.Hub, home: Path, *calls: Any, token: str = "hf_test") -> list[Any]:
    import os

    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, json.dumps(calls)],
        capture_output=True, text=True, env={**os.environ, **environment(hub, home, token)},
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_push_and_load(hub: stand_in.Hub, adapter: tuple[Path, Any], tmp_path: Path) -> None:
    folder, logits = adapter
    address, main, branch, again = run(
        hub, tmp_path / "home",
        ("push_adapter", [str(folder), "user/digits"], {"private": True}),
        ("load_adapter", [None, "hf-hub:user/digits"], {}),
        ("load_adapter", [None, "hf_hub:user/digits@main"], {}),
        ("push_adapter", [str(folder), "hf-hub:user/digits@next"], {"message": "again"}),
    )  # fmt: skip
    assert address.startswith(f"{hub.address}/user/digits/commit/")
    assert again.startswith(address.rpartition("/")[0]) and again != address
    for found, training, classes in (main, branch):
        torch.testing.assert_close(torch.tensor(found), logits)
        assert not training and classes == 3
    assert "user/digits" in hub.private and [*hub.repos["user/digits"]] == ["main", "next"]
    files = hub.repos["user/digits"]["main"]
    for path in folder.iterdir():
        if path.name != "README.md":
            assert files[path.name] == path.read_bytes()
    card = files["README.md"].decode()
    assert 'load_adapter(None, "hf-hub:user/digits")' in card
    assert "path/or/hf-hub:user/name" in (folder / "README.md").read_text(encoding="utf-8")


def test_refusals(hub: stand_in.Hub, adapter: tuple[Path, Any], tmp_path: Path) -> None:
    folder, _ = adapter
    hub.repos["user/other"] = {"main": {"README.md": b"other"}}
    hub.repos["user/lora"] = {"main": {
        "adapter_config.json": b'{"peft_type": "LORA"}', "adapter_model.safetensors": b"",
    }}  # fmt: skip
    hub.repos["user/secret"], hub.private = {"main": {}}, {"user/secret"}
    missing, revision, other, lora, secret, pushed, name, damaged = run(
        hub, tmp_path / "home",
        ("load_adapter", [None, "hf-hub:user/none"], {}),
        ("load_adapter", [None, "hf-hub:user/other@v9"], {}),
        ("load_adapter", [None, "hf-hub:user/other"], {}),
        ("load_adapter", [None, "hf-hub:user/lora"], {}),
        ("load_adapter", [None, "hf-hub:user/secret"], {}),
        ("push_adapter", [str(folder), "user/mine"], {}),
        ("push_adapter", [str(folder), "mine"], {}),
        ("push_adapter", [str(tmp_path / "none"), "user/mine"], {}),
        token="hf_wrong",
    )  # fmt: skip
    assert missing.startswith("FileNotFoundError: the Hub has no hf-hub:user/none, or it is priv")
    assert revision.startswith("FileNotFoundError: the Hub has no hf-hub:user/other@v9")
    assert other.endswith("hf-hub:user/other is no adapter: it has no adapter_config.json")
    assert "is an adapter of PEFT's; load it with peft" in lora
    assert secret.startswith("FileNotFoundError: the Hub has no hf-hub:user/secret, or it is priva")
    assert pushed.startswith("OSError: user/mine cannot be pushed to the Hub: ")
    assert name == "ValueError: 'mine' is no repository of the Hub; give user/name"
    assert "none is not an adapter" in damaged
    assert "user/mine" not in hub.repos and all("\n" not in text for text in (missing, pushed))


def test_names(tmp_path: Path) -> None:
    assert repository("user/name") == ("user/name", None)
    assert repository("hf-hub:user/na.me@v1") == ("user/na.me", "v1")
    for wrong in ("name", "hf-hub:", "a/b/c", "hf-hub:user/name@"):
        with pytest.raises(ValueError, match="is no repository of the Hub; give user/name"):
            repository(wrong)
    with pytest.raises(FileNotFoundError, match="write hf-hub:some-user/some-name"):
        local_folder("some-user/some-name")
    assert local_folder(tmp_path / "none") == tmp_path / "none"


def test_an_own_backbone_where_none_is_given(adapter: tuple[Path, Any], tmp_path: Path) -> None:
    folder, logits = adapter
    image = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32).sin()
    model: Any = vpt_fast.load_adapter(None, folder)
    with torch.no_grad():
        assert torch.equal(model(image), logits)
    name, checkpoint, args = resolve_name("vpt_fast_demo")
    with pytest.raises(ValueError, match="checkpoint is .*pass None for the model"):
        vpt_fast.load_adapter(model, folder, checkpoint=checkpoint)
    own = create_backbone(name, 3, checkpoint=checkpoint, model_args=args)
    vpt_fast.prompt_tune(own, VPTDeep(2))
    vpt_fast.save_adapter(own, tmp_path / "own", model_args=args, checkpoint="mine.safetensors")
    with pytest.raises(ValueError, match=r"weights in mine\.safetensors; .*checkpoint= in Python"):
        vpt_fast.load_adapter(None, tmp_path / "own")
    again: Any = vpt_fast.load_adapter(None, tmp_path / "own", checkpoint=checkpoint)
    with torch.no_grad():
        assert torch.equal(again(image), own.eval()(image))
    assert 'checkpoint="path/of/mine.safetensors"' in card_of(tmp_path / "own")


def test_a_full_adapter_needs_no_weights(tmp_path: Path) -> None:
    name, checkpoint, args = resolve_name("vpt_fast_demo")
    own = create_backbone(name, 3, checkpoint=checkpoint, model_args=args)
    vpt_fast.prompt_tune(own, vpt_fast.FullTuning())
    vpt_fast.save_adapter(own, tmp_path / "own", model_args=args, checkpoint="gone.safetensors")
    image = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32).sin()
    with torch.no_grad():
        assert torch.equal(vpt_fast.load_adapter(None, tmp_path / "own")(image), own.eval()(image))


def test_normalisation_comes_from_the_adapter(tmp_path: Path) -> None:
    """timm's own way of making a transform gives what the model was tuned with."""
    import timm

    name, checkpoint, args = resolve_name("vpt_fast_demo")
    own: Any = create_backbone(name, 3, checkpoint=checkpoint, model_args=args)
    own.pretrained_cfg = {**own.pretrained_cfg, "mean": (0.1, 0.2, 0.3), "crop_pct": 0.75}
    vpt_fast.prompt_tune(own, VPTDeep(2))
    vpt_fast.save_adapter(own, tmp_path / "a", model_args=args, checkpoint="demo_vit.safetensors")
    found = timm.data.resolve_model_data_config(vpt_fast.load_adapter(None, tmp_path / "a"))
    assert list(found["mean"]) == [0.1, 0.2, 0.3] and found["crop_pct"] == 0.75
    assert tuple(found["input_size"]) == (3, 32, 32)


def card_of(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def test_model_card(adapter: tuple[Path, Any]) -> None:
    import yaml

    text = card_of(adapter[0])
    _, front, body = text.split("---\n", 2)
    data = yaml.safe_load(front)
    assert data["library_name"] == "vpt_fast" and data["license"] == "apache-2.0"
    assert data["pipeline_tag"] == "image-classification" and "base_model" not in data
    assert {"vpt_fast", "timm", "vpt-deep"} <= set(data["tags"])
    (result,) = data["model-index"][0]["results"]
    assert result["dataset"]["name"] == "digits"
    assert result["metrics"] == [{"type": "accuracy", "value": 91.23, "name": "test top-1"}]
    for line in (
        "# VPTDeep adapter of vit_tiny_patch16_224",
        "| Method | `VPTDeep(num_prompts=2)`",
        "| Classes | 3: a, b\\|c, d |",
        "| test top-1 | 91.23% |",
        "| Trained | 1,923 scalars |",
        "| Images | 3 x 32 x 32 |",
    ):
        assert line in body, line


def test_names_of_classes_without_an_encoding(tmp_path: Path) -> None:
    import timm

    model = timm.create_model("test_vit", num_classes=2)
    names = ["caf\udce9", "a\nb"]
    folder = vpt_fast.save_adapter(
        vpt_fast.prompt_tune(model, VPTDeep(1)), tmp_path / "a", class_names=names,
        dataset="caf\udce9", metrics={"val mAP": 50},
    )  # fmt: skip
    assert "| Classes | 2: caf\\udce9, a b |" in card_of(folder)
    assert read_config(folder)["class_names"] == names


def test_the_four_lines_of_a_card_run(adapter: tuple[Path, Any]) -> None:
    from PIL import Image

    folder, _ = adapter
    program = card_of(folder).split("```python\n")[1].split("```")[0]
    assert len(program.strip().splitlines()) == 4
    names: dict[str, Any] = {"image": Image.new("RGB", (40, 40), "red")}
    exec(program.replace("path/or/hf-hub:user/name", str(folder)), names)
    assert names["probabilities"].shape == (1, 3)
    torch.testing.assert_close(names["probabilities"].sum(), torch.tensor(1.0))


def test_base_models_of_timm(tmp_path: Path) -> None:
    import timm
    import yaml

    model = timm.create_model("vit_tiny_patch16_224.augreg_in21k", num_classes=2)
    folder = vpt_fast.save_adapter(vpt_fast.prompt_tune(model, VPTDeep(1)), tmp_path / "a")
    data = yaml.safe_load(card_of(folder).split("---\n")[1])
    assert data["base_model"] == "timm/vit_tiny_patch16_224.augreg_in21k"
    assert "license" not in data and "model-index" not in data
    assert "| Licence of the base model | apache-2.0 |" in card_of(folder)
    assert "| Licence | not stated |" in card_of(folder)
    assert "| Classes | 2, without names |" in card_of(folder)
