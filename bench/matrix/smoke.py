"""What an installed vpt_fast has to do with any versions, as one program without a test library.

    python -I smoke.py expected.json [--command vpt-fast] [--write]

Tunes a tiny model of each family with each method: one step, then save, load, bake, remove. Weights
are sines of their indices, in fp64, so that logits do not depend on a generator: expected.json has
them. Prompts of the three methods that `vpt_fast.reference` has are held against the published
formulation too. With --command, trains, evaluates and predicts on a folder of images with it.
Prints a JSON object: versions, the number of checks, and what failed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
import math
import pkgutil
import platform
import subprocess
import sys
import tempfile
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vpt_fast
from vpt_fast import methods

CLASSES, BATCH, TOLERANCE = 3, 2, 1e-9
VERSIONS = ("torch", "torchvision", "triton", "timm", "numpy", "safetensors", "huggingface-hub")

FAMILIES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "vit": (
        "vit_tiny_patch16_224", 16, {"patch_size": 4, "embed_dim": 16, "num_heads": 2, "depth": 3},
    ),
    "eva": (
        "vit_small_patch16_dinov3", 16,
        {"patch_size": 4, "embed_dim": 32, "num_heads": 2, "depth": 3},
    ),
    "swin": (
        "swin_tiny_patch4_window7_224", 32,
        {
            "window_size": 2, "embed_dim": 8, "depths": (2, 1, 1), "num_heads": (1, 2, 2),
            "drop_path_rate": 0.0,
        },
    ),
}  # fmt: skip
"""Name for timm, height and width of the images in pixels, and further arguments of a model."""

NOT_ON_SWIN = ("cvpt", "gate-vpt")
"""Methods that Swin refuses by name."""

FIELDS: dict[str, dict[str, Any]] = {
    "vapt": {"projector_dropout": 0.0, "channel_dropout": 0.0},
    "adapter": {"reduction": 4},
    "bpt": {"rank": 4},
}
"""Fields of methods that are not their defaults."""

REFERENCE = ("vpt-shallow", "vpt-deep", "vapt")
"""Methods whose published formulation is in `vpt_fast.reference`."""

EXTRAS = ("datasets", "jinja2", "matplotlib", "optuna", "sklearn", "webdataset")
"""Packages that the extra "train" does not bring; modules that import them are not imported."""


def cases() -> Iterator[tuple[str, str]]:
    """Yield family and method of every combination that is not refused."""
    for family in FAMILIES:
        for method in methods.NAMES:
            if family != "swin" or method not in NOT_ON_SWIN:
                yield family, method


def method_of(name: str) -> Any:
    """Return a method, with three prompts where it has prompts, without dropout."""
    found = methods.find_method(name)
    prompts = {"num_prompts": 3} if issubclass(found, methods.PromptMethod) else {}
    return found(**{**prompts, **FIELDS.get(name, {})})


def waves(shape: torch.Size, name: str) -> Tensor:
    """Return values in [-1, 1] that depend on indices and name, in fp64."""
    phase = zlib.crc32(name.encode()) % 1000
    return (
        torch.arange(shape.numel(), dtype=torch.float64).mul(12.9898).add(phase).sin().view(shape)
    )


def fill(model: nn.Module, trained: bool = False) -> None:
    """Set a model's parameters to `waves` of order one; only those that are trained, if asked."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if trained and not parameter.requires_grad:
                continue
            wave = waves(parameter.shape, name)
            if parameter.ndim > 1 and "token" not in name and "pos_embed" not in name:
                wave = wave * math.sqrt(2 * parameter.ndim / parameter[0].numel())
            elif name.endswith(("weight", "gamma")):
                wave = 1 + 0.3 * wave
            parameter.copy_(wave)


def plain(family: str) -> nn.Module:
    """Return a family's model without prompts, in fp64 and eval mode."""
    name, size, arguments = FAMILIES[family]
    model = timm.create_model(name, img_size=size, num_classes=CLASSES, **arguments)
    fill(model.double())
    return model.eval()


def images(family: str) -> Tensor:
    """Return the images (B, 3, size, size)."""
    size = FAMILIES[family][1]
    return waves(torch.Size((BATCH, 3, size, size)), "images")


def logits_of(model: nn.Module, family: str) -> Tensor:
    """Return a model's logits (B, classes) without a gradient."""
    with torch.no_grad():
        found: Tensor = model(images(family))
    return found


def step(model: nn.Module, family: str) -> None:
    """Take one step of gradient descent on what is trained."""
    trained = [parameter for _, parameter in vpt_fast.trainable_parameters(model)]
    loss = F.cross_entropy(model.train()(images(family)), torch.arange(BATCH))
    for parameter, gradient in zip(trained, torch.autograd.grad(loss, trained), strict=True):
        parameter.data.sub_(0.1 * gradient)
    model.eval()


def lifecycle(family: str, name: str, folder: Path) -> Tensor:
    """Tune, step, save, load, bake and remove; return the logits after the step.

    Raises:
        AssertionError: If a loaded or baked model's logits differ, or if what was removed is not
            the model from before.
    """
    model = plain(family)
    before = logits_of(model, family)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    vpt_fast.prompt_tune(model, method_of(name))
    fill(model, trained=True)
    step(model, family)
    logits = logits_of(model, family)
    vpt_fast.save_adapter(model, folder)
    loaded = vpt_fast.load_adapter(plain(family), folder).eval()
    torch.testing.assert_close(logits_of(loaded, family), logits, rtol=TOLERANCE, atol=TOLERANCE)
    if family != "swin":
        baked = logits_of(vpt_fast.bake(model), family)
        torch.testing.assert_close(baked, logits, rtol=TOLERANCE, atol=TOLERANCE)
    vpt_fast.remove_prompts(model)
    torch.testing.assert_close(logits_of(model, family), before, rtol=0, atol=0)
    torch.testing.assert_close(dict(model.state_dict()), state, rtol=0, atol=0)
    return logits


def published(name: str) -> None:
    """Hold a ViT's logits against prompt rows that are concatenated.

    Raises:
        AssertionError: If they differ.
    """
    reference = importlib.import_module("vpt_fast.reference.vit")
    eager = reference.concatenated(plain("vit"), method_of(name))
    tuned: Any = vpt_fast.prompt_tune(plain("vit"), method_of(name))
    if name == "vapt":
        first, *rest = (block.prompt for block in tuned.blocks)
        own = [first.tokens, *tuned.prompt_projector.parameters()]
        theirs = [eager.tokens, eager.down.weight, eager.up.weight]
        for prompt, *parts in zip(rest, eager.norms, eager.convs, eager.mixes, strict=True):
            for mine, part in zip((prompt.norm, prompt.conv, prompt.mix), parts, strict=True):
                own += mine.parameters()
                theirs += part.parameters()
    else:
        own = [tuned.blocks[block].prompt.tokens for block in eager.blocks]
        theirs = list(eager.prompts)
    fill(tuned, trained=True)
    with torch.no_grad():
        eager.get_parameter("model.head.weight").copy_(tuned.head.weight)
        eager.get_parameter("model.head.bias").copy_(tuned.head.bias)
        for mine, value in zip(own, theirs, strict=True):
            value.copy_(mine)
    expected, found = logits_of(eager.eval(), "vit"), logits_of(tuned.eval(), "vit")
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)


def modules() -> None:
    """Import every module that needs no other extra than "train".

    Raises:
        ModuleNotFoundError: If one needs a package that the extra does not bring.
    """
    for found in pkgutil.walk_packages(vpt_fast.__path__, "vpt_fast."):
        if found.name.endswith(".__main__"):
            continue
        try:
            importlib.import_module(found.name)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] not in EXTRAS:
                raise


def on_a_folder(command: str, folder: Path) -> None:
    """Train, evaluate and predict with the command.

    Raises:
        AssertionError: If the version is another, or an adapter is missing.
        RuntimeError: If a command fails; the message is its output.
    """
    from PIL import Image

    for split in ("train", "val", "test"):
        for label, name in enumerate(("dark", "light")):
            (folder / split / name).mkdir(parents=True)
            for index in range(4):
                pixels = 50 + 100 * label + 10 * index
                path = folder / split / name / f"{index}.png"
                Image.new("RGB", (40, 36), (pixels, pixels, 60)).save(path)
    version = importlib.metadata.version("vpt-fast")
    assert _ran(command, "--version") == f"vpt-fast {version}\n"
    settings = ("--model", "vpt_fast_demo", "--epochs", "1", "-b", "4", "-j", "0")
    _ran(command, "train", str(folder), *settings, "--output", str(folder / "run"))
    assert (folder / "run" / "best" / "adapter_model.safetensors").is_file()
    assert "images" in _ran(command, "eval", str(folder / "run" / "best"), str(folder))
    picture = str(folder / "test" / "dark" / "0.png")
    assert _ran(command, "predict", str(folder / "run" / "best"), picture)


def _ran(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(words)}: {done.stdout}{done.stderr}")
    return done.stdout


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that are installed."""
    found = {"python": platform.python_version()}
    for name in VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def checks(
    expected: Mapping[str, Any], command: str | None
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield name and function of each check."""

    def case(family: str, method: str) -> None:
        with tempfile.TemporaryDirectory() as folder:
            found = lifecycle(family, method, Path(folder) / "adapter")
        stored = torch.tensor(expected[f"{family} {method}"], dtype=torch.float64)
        torch.testing.assert_close(found, stored, rtol=TOLERANCE, atol=TOLERANCE)

    yield "modules", modules
    for family, method in cases():
        yield f"{family} {method}", partial(case, family, method)
    for name in REFERENCE:
        yield f"published {name}", partial(published, name)
    if command is not None:
        with tempfile.TemporaryDirectory() as folder:
            yield "command", partial(on_a_folder, command, Path(folder))


def main() -> int:
    """Run all checks, or write the logits; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("expected", type=Path)
    parser.add_argument("--command")
    parser.add_argument("--write", action="store_true", help="write the logits; nothing is checked")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.write:
        with tempfile.TemporaryDirectory() as folder:
            found = {
                f"{family} {method}": lifecycle(
                    family, method, Path(folder) / family / method
                ).tolist()
                for family, method in cases()
            }
        options.expected.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        return 0
    expected = json.loads(options.expected.read_text(encoding="utf-8"))
    count, failed = 0, {}
    for name, check in checks(expected, options.command):
        count += 1
        try:
            check()
        except Exception:
            failed[name] = traceback.format_exc()
    print(json.dumps({"versions": versions(), "checks": count, "failed": failed}))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
