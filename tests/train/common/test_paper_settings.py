"""The papers' settings by name, and their transforms of images."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from support.pictures import make_folders, write_checkpoint
from support.training import CONFIG
from typer.testing import CliRunner

from vpt_fast import VAPT, AdapterTuning, LinearProbe, VPTDeep, VPTShallow
from vpt_fast.cli.app import app
from vpt_fast.methods import METHODS
from vpt_fast.train.common.paper_settings import PAPERS, default_optimizer, paper_settings
from vpt_fast.train.data.augmentation import Augmentation
from vpt_fast.train.data.image_loaders import Loading
from vpt_fast.train.data.image_options import RESIZES, ImageOptions
from vpt_fast.train.data.images import eval_transform
from vpt_fast.train.data.memory_set import MemoryLoader
from vpt_fast.train.data.split import split_of_files

CPU = torch.device("cpu")


def test_which_methods_the_papers_train_with_adamw():
    adamw = {name for name, kind in METHODS.items() if default_optimizer(kind()) == "adamw"}
    assert adamw == {"full", "partial", "bias", "adapter"}


@pytest.mark.parametrize(
    ("name", "method", "batch", "dropout"),
    [
        ("vpt", VPTDeep(10), 128, 0.1),
        ("vpt", VPTDeep(99), 128, 0.1),
        ("vpt", VPTDeep(100), 64, 0.1),
        ("vpt", VPTShallow(50), 128, 0.0),
        ("vpt", VAPT(10), 64, 0.1),
        ("vpt", LinearProbe(), 64, None),
        ("vpt", AdapterTuning(), 64, None),
        ("vapt", VPTDeep(10), 64, 0.1),
        ("vapt", VAPT(50), 64, 0.1),
    ],
)
def test_batch_size_and_prompt_dropout(name, method, batch, dropout):
    found = paper_settings(name, method, "fgvc")
    assert found.batch_size == batch
    assert getattr(found.method, "dropout", None) == dropout
    chosen = paper_settings(name, method, "fgvc", frozenset({"dropout"}))
    assert chosen.method == method


def test_images_of_vtab_and_of_other_data():
    for format in ("vtab", "vtab-1000"):
        found = paper_settings("vpt", VPTDeep(), format)
        assert (found.resize, found.augment) == ("squash", False)
    found = paper_settings("vapt", VPTDeep(), "folders")
    assert (found.resize, found.augment, found.crops) == ("crop", True, "plain")
    assert paper_settings(None, VPTDeep(), "vtab").augment
    with pytest.raises(ValueError, match="recipe is 'vtp'; choose one of vpt, vapt"):
        paper_settings("vtp", VPTDeep(), "vtab")


def picture(width: int, height: int) -> Image.Image:
    """Return a picture whose red grows to the right, and whose green grows to the bottom."""
    red, green = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([red, green, 0 * red], -1).round().astype(np.uint8))


def edges(image: torch.Tensor) -> tuple[float, ...]:
    """Return red at the left and right edge, green at the top and bottom edge, in [0, 1]."""
    red, green = image[0], image[1]
    return tuple(
        float(v) for v in (red[:, 0].mean(), red[:, -1].mean(), green[0].mean(), green[-1].mean())
    )


def config(resize: str) -> dict:
    plain = {**CONFIG, "mean": (0.0,) * 3, "std": (1.0,) * 3}
    return {**plain, **ImageOptions(resize=resize).changes(plain)}


def test_squash_shows_all_of_the_image_and_crop_its_centre():
    image = picture(90, 60)
    squashed = eval_transform(config("squash"))(image)
    side = CONFIG["input_size"][-1]
    assert squashed.shape[1:] == (side, side)
    assert edges(squashed) == pytest.approx((0, 1, 0, 1), abs=0.05)
    cropped = eval_transform(config("crop"))(image)
    # The crop has 224 / 256 of the height, and two thirds of that of the width.
    low, high = (1 - 0.875) / 2, (1 + 0.875) / 2
    across = 0.875 * 2 / 3
    want = ((1 - across) / 2, (1 + across) / 2, low, high)
    assert edges(cropped) == pytest.approx(want, abs=0.05)


def loading(resize: str, **augmentation) -> Loading:
    return Loading(config(resize), Augmentation(**augmentation), CPU)


@pytest.fixture
def split(tmp_path):
    for index in range(3):
        picture(90, 60).save(tmp_path / f"{index}.png")
    return split_of_files([tmp_path / f"{index}.png" for index in range(3)], [0, 1, 0])


def test_without_augmentation_training_images_equal_those_of_evaluation(split):
    found = loading("squash", no_aug=True)
    train, plain = (found.loader(split, ["a", "b"], 3, training=flag) for flag in (True, False))
    assert isinstance(train, MemoryLoader)
    assert torch.equal(next(iter(train)).images[0], next(iter(plain)).images[0])


def test_plain_crops_move_over_the_resized_image_and_flip(split):
    loader = loading("crop", crops="plain", hflip=0.5).loader(split, ["a", "b"], 3, training=True)
    assert not isinstance(loader, MemoryLoader)
    torch.manual_seed(0)
    found = [edges(image) for _ in range(20) for image in next(iter(loader)).images]
    left_to_right = [red[1] - red[0] for red in found]
    assert min(left_to_right) < 0 < max(left_to_right), "some are flipped"
    for red0, red1, top, bottom in found:
        assert abs(red1 - red0) == pytest.approx(0.875 * 2 / 3, abs=0.06)
        assert bottom - top == pytest.approx(0.875, abs=0.06)
    assert max(e[2] for e in found) - min(e[2] for e in found) > 0.05, "crops move"
    never = loading("crop", crops="plain", hflip=0.0).loader(split, ["a", "b"], 3, training=True)
    assert all(edges(image)[1] > edges(image)[0] for image in next(iter(never)).images)


def test_plain_crops_cannot_be_cached():
    with pytest.raises(ValueError, match="choose cache auto or stream"):
        Loading(config("crop"), Augmentation(crops="plain"), CPU, cache="memory")
    with pytest.raises(ValueError, match="crops is 'big'; choose one of scaled, plain"):
        Augmentation(crops="big")
    with pytest.raises(ValueError, match=f"resize is 'fit'; choose one of {', '.join(RESIZES)}"):
        ImageOptions(resize="fit")


@pytest.mark.parametrize("recipe", PAPERS)
def test_train_with_a_recipe(recipe, tmp_path):
    folder = make_folders(tmp_path / "data", train=4, val=2, test=2)
    checkpoint = write_checkpoint(tmp_path / "tiny.pth")
    arguments = [
        "train", folder, "--model", "test_vit", "--img-size", 32, "--checkpoint", checkpoint,
        "--epochs", 1, "--num-prompts", 2, "--recipe", recipe, "--output", tmp_path / "run",
    ]  # fmt: skip
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    batch = 128 if recipe == "vpt" else 64
    assert f"sgd, learning rate 0.5 x {batch} / 256" in result.stdout
    saved = json.loads((tmp_path / "run" / "last" / "adapter_config.json").read_text())
    assert saved["method"]["dropout"] == 0.1
    assert saved["input"]["crop_pct"] == 0.875
    wrong = CliRunner().invoke(app, ["train", str(folder), "--recipe", "mine"])
    assert wrong.exit_code == 2 and "choose one of vpt, vapt" in wrong.stderr
