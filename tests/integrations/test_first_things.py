"""Every row of the page of first things is what happens."""

from __future__ import annotations

import copy
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import timm.optim
import timm.utils
import torch
import torch.distributed as dist
from support.doc_pages import ROOT, blocks
from torch import nn

import vpt_fast
from vpt_fast.backbones.demo_backbone import DEMO_ARGS, DEMO_MODEL, demo_backbone

PAGE = (ROOT / "docs" / "integrations" / "first-things.md").read_text()
OTHERS = ("accelerate", "peft", "torchao", "transformers")


def rows() -> list[tuple[str, str, str]]:
    """Return the cells of the tables with three columns."""
    found = []
    for line in PAGE.splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
        if line.startswith("| `") and len(cells) == 3:
            found.append((cells[0].strip("`"), cells[1], cells[2]))
    return found


def test_the_page_has_the_first_thirty() -> None:
    typed = [row[0] for row in rows()]
    assert len(typed) >= 30 and len({*typed}) == len(typed)
    assert len(typed) == PAGE.count("\n| `") - PAGE.partition("## On the command")[2].count("\n| `")


def trained_by(optimizer: Any, model: Any) -> set[str]:
    """Return the names of what a step of an optimizer changes."""
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    nn.functional.cross_entropy(model(images), torch.tensor([0, 2])).backward()
    optimizer.step()
    return {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}


def within(context: Any, model: Any, images: torch.Tensor) -> Any:
    with context:
        return model(images)


def wrapped(model: Any) -> Any:
    """Return the page's module that returns the loss."""
    names: dict[str, Any] = {}
    page = (ROOT / "docs" / "integrations" / "transformers.md").read_text()
    source = blocks(page, "python")[0]
    exec(source[: source.index("images, labels =")], names)
    return names["Classifier"](model)


def wrapper() -> Any:
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    config = TimmWrapperConfig(architecture=DEMO_MODEL, num_labels=3, model_args=sizes())
    return TimmWrapperForImageClassification(config)


def sizes() -> dict[str, Any]:
    return {key: value for key, value in DEMO_ARGS.items() if key != "pretrained_cfg_overlay"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the adapter and the weights of which the page speaks."""
    path = tmp_path_factory.mktemp("first")
    torch.manual_seed(0)
    model = demo_backbone(num_classes=3)
    torch.save(model.state_dict(), path / "backbone.pth")
    vpt_fast.prompt_tune(model, vpt_fast.VPTDeep(4))
    vpt_fast.save_adapter(model, path / "adapter")
    torch.save(model.state_dict(), path / "tuned.pth")
    return path


@pytest.fixture
def names(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return what the rows name: `model` is tuned, and `plain` the same before."""
    for file in folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    monkeypatch.chdir(tmp_path)

    def plain() -> Any:
        model = demo_backbone(num_classes=3)
        model.load_state_dict(torch.load(folder / "backbone.pth"))
        return model

    model = vpt_fast.load_adapter(plain(), folder / "adapter").eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return {
        "copy": copy, "images": images, "model": model, "name": DEMO_MODEL, "plain": plain(),
        "sizes": sizes(), "timm": timm, "torch": torch, "vpt_fast": vpt_fast, "wrapped": wrapped,
        "before": model(images).detach(), "within": within,
        "trained_by": lambda optimizer: trained_by(optimizer, model),
    }  # fmt: skip


@pytest.fixture
def process(tmp_path: Path) -> Iterator[None]:
    """Start the one process of a group, for rows about several."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _prepare(names: dict[str, Any], code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in OTHERS:
        if re.search(rf"\b{module}\.", code):
            names[module] = pytest.importorskip(module)
    if "torchvision." in code:
        names["torchvision"] = importlib.import_module("torchvision")
        importlib.import_module("torchvision.models.feature_extraction")
    if "quantization" in code:
        importlib.import_module("torchao.quantization")
    if "fully_shard" in code:
        importlib.import_module("torch.distributed.fsdp")
    if "wrapper" in code:
        pytest.importorskip("transformers")
        names["wrapper"] = wrapper()
    if "cpu," in code:
        options = {"report_to": "none", "use_cpu": True, "disable_tqdm": True}
        options |= {"max_steps": 1, "save_strategy": "no"}
        names["data"] = [{"pixel_values": x, "labels": 1} for x in names["images"]]
        names["cpu"] = names["transformers"].TrainingArguments("run", **options)
    if "push" in code:
        import huggingface_hub

        class Api:
            def __init__(self, token: Any) -> None:
                pass

            def create_repo(self, repo: str, **_: Any) -> None:
                assert repo == "user/name"

            def create_commit(self, repo: str, files: list[Any], **_: Any) -> Any:
                assert len(files) == 4
                return type("Commit", (), {"commit_url": f"https://huggingface.co/{repo}/commit"})

        monkeypatch.setattr(huggingface_hub, "HfApi", Api)


@pytest.mark.filterwarnings("ignore")  # of the other libraries
@pytest.mark.parametrize(("typed", "here", "then"), rows(), ids=[row[0][:60] for row in rows()])
def test_a_row(
    typed: str, here: str, then: str, names: Any, request: Any, monkeypatch: Any
) -> None:
    torch._dynamo.reset()
    if "Distributed" in typed or "fully_shard" in typed:
        request.getfixturevalue("process")
    _prepare(names, typed + here + then, monkeypatch)
    if here == "refused":
        with pytest.raises(Exception) as refusal:
            eval(typed, names)
        assert then in str(refusal.value)
        return
    code = typed
    if here != "works":
        (code,) = re.fullmatch(r"write `(.*)`", here).groups()  # type: ignore[union-attr]
        with pytest.raises(Exception) as refusal:
            eval(typed, dict(names))
        assert not isinstance(refusal.value, (NameError, SyntaxError))
    names["_"] = eval(code, names)
    assert eval(then.strip("`"), names)
