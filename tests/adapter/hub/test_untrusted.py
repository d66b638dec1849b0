"""Adapters from strangers: names, configurations, links and model cards."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from support.adapters.adapter_editing import rewrite_config

import vpt_fast
from vpt_fast import FullTuning, VPTDeep
from vpt_fast.adapter.files import read_config
from vpt_fast.adapter.hub.card import write_card
from vpt_fast.adapter.hub.names import repository

SMALL: dict[str, Any] = {"img_size": 32, "embed_dim": 16, "num_heads": 2, "depth": 2}


def saved(folder: Path, method: Any = None, **more: Any) -> Path:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=3, **SMALL)
    vpt_fast.prompt_tune(model, method or VPTDeep(2))
    return vpt_fast.save_adapter(model, folder, model_args=SMALL, **more)


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "source": (lambda c: c["input"].update(source="hf-hub"), "input is"),
    "url": (lambda c: c["input"].update(url="https://x"), "input is"),
    "no_size": (lambda c: c["input"].pop("input_size"), "input is"),
    "deep": (lambda c: (c["model"].update(depth=3000), c["model"]["args"].update(depth=3000)),
             "model.depth is 3000"),
    "other_depth": (lambda c: c["model"]["args"].update(depth=400), "its depth is 400, and 2"),
    "other_width": (lambda c: c["model"]["args"].update(embed_dim=8192), "embed_dim is 8192"),
    "path": (lambda c: c["model"].update(checkpoint="../../etc/passwd"), "model.checkpoint"),
    "code": (lambda c: c["model"].update(checkpoint='x")\nimport os\n("'), "model.checkpoint"),
    "several": (lambda c: c.update(multi_label=1), "multi_label is 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("method", [VPTDeep(2), FullTuning()], ids=["deep", "full"])
def test_configurations(name: str, method: Any, tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", method)
    change, words = CHANGES[name]
    rewrite_config(folder, change)
    start = time.perf_counter()
    with pytest.raises(ValueError, match="damaged|contradicts itself") as refusal:
        vpt_fast.load_adapter(None, folder)
    assert words in str(refusal.value) and time.perf_counter() - start < 10


def test_shapes_are_compared_before_memory_is_taken(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", FullTuning())
    wide = {"width": 4096, "args": {**SMALL, "embed_dim": 4096, "num_classes": 3}}
    rewrite_config(folder, lambda config: config["model"].update(wide))
    with pytest.raises(ValueError, match="contradicts itself: .* of shape .*, the adapter"):
        vpt_fast.load_adapter(None, folder)


def test_the_fingerprint_of_another_adapter(tmp_path: Path) -> None:
    one, other = saved(tmp_path / "a"), saved(tmp_path / "b", FullTuning())
    name = "adapter_fingerprint.json"
    (one / name).write_bytes((other / name).read_bytes())
    with pytest.raises(ValueError, match="its checksum does not fit"):
        read_config(one)


def test_a_link_is_not_pushed(tmp_path: Path) -> None:
    folder, secret = saved(tmp_path / "a"), tmp_path / "secret"
    secret.write_text("secret")
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to(secret)
    with pytest.raises(ValueError, match="README.md is a link; put the file itself there"):
        vpt_fast.push_adapter(folder, "user/name")


def test_cards_show_names_as_they_are(tmp_path: Path) -> None:
    names = ["<script>x</script>", "a|b\r# owned", "[c](http://x) `d`"]
    folder = saved(
        tmp_path / "a", class_names=names, dataset="x|y\n```", license="l|m",
        metrics={"val | top-1": 50}, checkpoint='w".bin',
    )  # fmt: skip
    text = (folder / "README.md").read_text(encoding="utf-8")
    body = text.split("---\n", 2)[2]
    assert "<script>" not in body and "\n# owned" not in body and "[c](http" not in body
    assert "| Data set | x\\|y \\`\\`\\` |" in body and "| val \\| top-1 | 50.00% |" in body
    program = body.split("```python\n")[1].split("```")[0]
    assert 'checkpoint="path/of/w\\".bin"' in program
    compile(program, "card", "exec")
    assert read_config(folder)["class_names"] == names
    write_card(folder)
    assert "Data set" not in (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("metrics", "error"),
    [({"": 1.0}, ValueError), ({"top-1": None}, TypeError), ({"top-1": float("nan")}, ValueError),
     ({"top-1": "91"}, TypeError), ({3: 1.0}, ValueError)],
)  # fmt: skip
def test_metrics_that_are_none(metrics: Any, error: type[Exception], tmp_path: Path) -> None:
    with pytest.raises(error, match="metrics"):
        saved(tmp_path / "a", metrics=metrics, dataset="d")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("name", ["user/hf-hub:name", "../..", "./x", "a/b@../../x", "a/b@"])
def test_names_that_are_paths(name: str) -> None:
    with pytest.raises(ValueError, match="is no repository of the Hub"):
        repository(name)
