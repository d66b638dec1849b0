"""Images in memory equal those of streaming loaders, and their random crops equal Pillow's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.pictures import backbone, make_folders, write_checkpoint
from support.training import CONFIG, Stopped, damaged_files, endings

from vpt_fast import VPTDeep, prompt_tune, save_adapter
from vpt_fast.train.common import parallel
from vpt_fast.train.common.recipe import Recipe, init_head
from vpt_fast.train.data import image_loaders
from vpt_fast.train.data.augmentation import Augmentation
from vpt_fast.train.data.image_loaders import Loading
from vpt_fast.train.data.image_options import ImageOptions, to_uint8
from vpt_fast.train.data.images import eval_transform, make_loader, train_transform
from vpt_fast.train.data.memory_set import MemoryLoader, bytes_in_memory
from vpt_fast.train.data.random_crops import Crops, RandomCrops, crop_and_resize, rescaled
from vpt_fast.train.data.split import SplitImages, split_of_files
from vpt_fast.train.loop.epochs import fit
from vpt_fast.train.run.folder_run import tune_on_folder
from vpt_fast.train.run.settings import RunSettings

CROPS = RandomCrops((0.7, 1.0), 0.5)


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    """Return a smooth picture with noise, since filters act on both."""
    rng = np.random.default_rng(seed)
    ramp = np.add.outer(np.linspace(0, 90, height), np.linspace(0, 90, width))[..., None]
    return Image.fromarray((ramp + rng.integers(0, 75, (height, width, 3))).astype(np.uint8))


def image_set(folder: Path, sizes, transform, broken: bool = False) -> SplitImages:
    folder.mkdir(exist_ok=True)
    paths = []
    for i, (height, width) in enumerate(sizes):
        paths.append(folder / f"{i}.png")
        noise(height, width, i).save(paths[-1])
    if broken:
        paths[2:2] = damaged_files(folder / "damaged")[:1]
    labels = [i % 3 for i in range(len(paths))]
    return SplitImages(split_of_files(paths, labels), transform, ["a", "b", "c"])


MIXED = [(36 + 3 * i, 50 - 2 * i) for i in range(11)]
FULL = [(40, 30)] * 11


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("make", [eval_transform, lambda c: train_transform(c, no_aug=True)])
def test_without_crops_the_images_equal_streamed_ones(tmp_path, make, interpolation, antialias):
    config = {**CONFIG, "interpolation": interpolation, "antialias": antialias}
    images = image_set(tmp_path, MIXED, make(config), broken=True)
    streamed, cached = make_loader(images, 4), MemoryLoader(images, 4)
    assert len(cached) == len(streamed) == 3
    for one, other in zip(streamed, cached, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.labels, other.labels)
        assert one.skipped == other.skipped
    assert cached.images.dtype == torch.uint8
    assert cached.nbytes == bytes_in_memory(images, None) == 12 * 3 * 32 * 32


def test_orders_are_those_of_make_loader_in_every_epoch(tmp_path):
    images = image_set(tmp_path, MIXED, train_transform(CONFIG))
    images.targets[:] = range(len(images))
    streamed = make_loader(images, 4, shuffle=True, seed=5)
    cached = MemoryLoader(images, 4, crops=CROPS, shuffle=True, seed=5)
    for _ in range(3):
        orders = [[batch.labels.tolist() for batch in loader] for loader in (streamed, cached)]
        assert orders[0] == orders[1]
        assert torch.equal(streamed.generator.get_state(), cached.generator.get_state())


def test_crops_differ_between_images_and_epochs_and_repeat_with_the_seed(tmp_path):
    folder = tmp_path / "same"
    images = image_set(folder, FULL, train_transform(CONFIG))
    for i in range(1, len(FULL)):
        (folder / f"{i}.png").write_bytes((folder / "0.png").read_bytes())

    def epochs(seed):
        loader = MemoryLoader(images, 4, crops=CROPS, seed=seed)
        return [torch.cat([batch.images for batch in loader]) for _ in range(2)]

    torch.manual_seed(0)
    first, second = epochs(1)
    torch.manual_seed(1)  # crops do not use the global generator
    assert torch.equal(first, epochs(1)[0])
    assert torch.equal(second, epochs(1)[1])
    assert not torch.equal(first, second)
    assert not torch.equal(first, epochs(2)[0])
    assert len({image.numpy().tobytes() for image in first}) == len(FULL)


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("box", [(0, 0, 60, 70), (3, 5, 50, 44), (10, 20, 20, 15), (59, 0, 1, 70)])
def test_a_crop_in_memory_is_pillows(interpolation, box):
    picture = noise(60, 70)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None]
    top, left, height, width = box
    mode = Image.Resampling[interpolation.upper()]
    want = picture.crop((left, top, left + width, top + height)).resize((32, 24), mode)
    want = torch.from_numpy(np.array(want)).permute(2, 0, 1).float()
    for flip in (False, True):
        crops = Crops(torch.tensor([box]), torch.tensor([flip]))
        (found,) = crop_and_resize(pixels, crops, (24, 32), interpolation)
        found = found.flip(2) if flip else found
        # Pillow rounds to integers after rows and after columns.
        assert (found - want).abs().max() <= (0 if interpolation == "nearest" else 1.5)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_crop_without_antialiasing_is_pytorchs(interpolation):
    pixels = torch.from_numpy(np.array(noise(60, 70))).permute(2, 0, 1)[None]
    boxes = torch.tensor([[0, 0, 60, 70], [3, 5, 50, 44], [10, 20, 20, 15]])
    crops = Crops(boxes, torch.zeros(3, dtype=torch.bool))
    found = crop_and_resize(pixels.expand(3, -1, -1, -1), crops, (24, 32), interpolation, False)
    for (top, left, height, width), ours in zip(boxes.tolist(), found, strict=True):
        part = pixels[..., top : top + height, left : left + width].float()
        want = torch.nn.functional.interpolate(part, (24, 32), mode=interpolation).clamp(0, 255)
        torch.testing.assert_close(ours[None], want, rtol=0, atol=1e-2)


def test_whole_images_in_memory_equal_timms_pipeline(tmp_path):
    """Images of other sizes are resized once, to less than twice the size; none is cropped here."""
    transform = train_transform(CONFIG, scale=(1.0, 1.0), hflip=0.0)
    images = image_set(tmp_path, MIXED, transform)
    loader = MemoryLoader(images, 11, crops=RandomCrops((1.0, 1.0), 0.0))
    whole = torch.tensor([[0, 0, *size] for size in MIXED])
    assert torch.equal(loader.sizes, whole[:, 2:])
    none = torch.zeros(11, dtype=torch.bool)
    (batch,) = [
        loader._batch(list(range(11)), Crops(rescaled(whole, loader.sizes, (32, 32)), none))
    ]
    want = torch.stack(
        [
            to_uint8(eval_transform({**CONFIG, "crop_mode": "squash", "crop_pct": 1}))(
                noise(h, w, i)
            )
            for i, (h, w) in enumerate(MIXED)
        ]
    )
    found = (batch.images * 0.5 + 0.5) * 255
    assert (found - want).abs().max() <= 1


def test_drawn_boxes_keep_area_ratio_and_bounds():
    sizes = torch.tensor([[100, 200], [300, 300], [10, 400]]).repeat(200, 1)
    boxes, flips = RandomCrops((0.3, 0.6), 0.25).draw(sizes, torch.Generator().manual_seed(0))
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= sizes).all()
    area = boxes[:, 2:].prod(1) / sizes.prod(1)
    ratio = boxes[:, 3] / boxes[:, 2]
    fits = sizes[:, 0] >= 100
    assert 0.29 < area[fits].min() < 0.35
    assert 0.55 < area[fits].max() < 0.61
    assert 0.73 < ratio[fits].min() < 0.8
    assert 1.25 < ratio[fits].max() < 1.36
    # In a strip too thin for a crop of this area: the central box of the widest ratio.
    assert (boxes[~fits] == torch.tensor([0, 193, 10, 13])).all()
    assert 0.2 < flips.float().mean() < 0.3


def test_images_of_one_small_size_are_not_resized(tmp_path):
    same = MemoryLoader(image_set(tmp_path / "a", FULL, train_transform(CONFIG)), 4, crops=CROPS)
    assert same.images.shape == (11, 3, 40, 30)
    assert torch.equal(
        same.images[1], torch.from_numpy(np.array(noise(40, 30, 1))).permute(2, 0, 1)
    )
    images = image_set(tmp_path / "b", MIXED, train_transform(CONFIG))
    mixed = MemoryLoader(images, 4, crops=CROPS)
    assert mixed.images.shape == (11, 3, 39, 39)  # 32 / sqrt(0.7)
    assert mixed.nbytes == bytes_in_memory(images, CROPS)


def test_processes_take_parts_of_the_same_batches_with_the_same_crops(tmp_path, monkeypatch):
    images = image_set(tmp_path, MIXED, train_transform(CONFIG), broken=True)
    make = {"crops": CROPS, "shuffle": True, "seed": 3}
    whole = list(MemoryLoader(images, 5, **make))
    parts = []
    for rank in range(3):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(parallel, "world_size", lambda: 3)
        parts.append(list(MemoryLoader(images, 5, **make)))
    for batch, *theirs in zip(whole, *parts, strict=True):
        assert sum(len(part.labels) for part in theirs) == len(batch.labels)
        images = {image.numpy().tobytes() for part in theirs for image in part.images}
        assert images == {image.numpy().tobytes() for image in batch.images}
    assert sum(len(batch.skipped) for batch in whole) == 1


def test_nothing_that_decodes_is_empty_batches(tmp_path):
    paths = damaged_files(tmp_path)
    images = SplitImages(split_of_files(paths, [0] * len(paths)), eval_transform(CONFIG), ["a"])
    (batch,) = MemoryLoader(images, 10)
    assert len(batch.labels) == 0
    assert len(batch.skipped) == len(paths)


def test_a_run_in_memory_resumes_to_the_bit(tmp_path):
    make_folders(tmp_path / "data", train=5)
    paths = sorted((tmp_path / "data").rglob("*.png"))
    split = split_of_files(paths, [i // 5 for i in range(15)])
    images = SplitImages(split, train_transform(CONFIG), ["a", "b", "c"])
    recipe = Recipe(epochs=2, batch_size=8, lr=2.0, warmup_epochs=0)

    def run(folder, resume=False, stop=None):
        folder.mkdir(exist_ok=True)
        torch.manual_seed(3)
        model = backbone(seed=0)
        init_head(model)
        prompt_tune(model, VPTDeep(2, dropout=0.1))

        def log(line):
            if stop is not None and line.startswith(f"epoch {stop}/"):
                raise Stopped

        loader = MemoryLoader(images, 8, crops=CROPS, shuffle=True, seed=recipe.seed)
        fit(
            model,
            loader,
            recipe,
            val_batches=MemoryLoader(images, 8),
            output=folder,
            save=lambda model, where: save_adapter(model, where, overwrite=True),
            progress=False,
            log=log,
            resume=resume,
        )
        return endings(folder)

    want = run(tmp_path / "whole")
    with pytest.raises(Stopped):
        run(tmp_path / "cut", stop=1)
    assert run(tmp_path / "cut", resume=True) == want


def test_caching_images_does_not_change_a_run_without_augmentation(tmp_path):
    folder = make_folders(tmp_path / "data", train=3, val=2)
    checkpoint = write_checkpoint(tmp_path / "tiny.pth")

    def run(cache):
        lines = []
        settings = RunSettings(
            folder,
            tmp_path / cache,
            "test_vit",
            VPTDeep(2),
            Recipe(epochs=1, batch_size=4, lr=2.0, warmup_epochs=0),
            checkpoint=checkpoint,
            img_size=32,
            augmentation=Augmentation(no_aug=True),
            image_options=ImageOptions("bilinear", antialias=False),
            cache=cache,
        )
        tune_on_folder(settings, progress=False, log=lines.append)
        return endings(tmp_path / cache), [line for line in lines if "decoded once" in line]

    cached, lines = run("memory")
    assert [line.split(":")[0] for line in lines] == ["train", "val"]
    assert run("stream") == (cached, [])
    with pytest.raises(ValueError, match="cache is 'ram'; choose one of auto, memory, stream"):
        run("ram")


def test_more_than_the_limit_streams(tmp_path, monkeypatch):
    images = image_set(tmp_path, MIXED, train_transform(CONFIG))
    size = bytes_in_memory(images, CROPS)

    def is_cached(limit, cache="auto"):
        monkeypatch.setattr(image_loaders, "LIMIT", limit)
        loading = Loading(CONFIG, Augmentation(), torch.device("cpu"), cache=cache)
        found = loading.loader(images.split, images.classes, 4, training=True)
        return isinstance(found, MemoryLoader)

    assert is_cached(size)
    assert not is_cached(size - 1)
    assert is_cached(size - 1, "memory")


def test_other_resizing_in_memory_is_refused(tmp_path):
    images = image_set(tmp_path, FULL, train_transform({**CONFIG, "interpolation": "lanczos"}))
    with pytest.raises(ValueError, match="bicubic; choose one of them, or cache 'stream'"):
        MemoryLoader(images, 4, crops=CROPS)
    with pytest.raises(ValueError, match="-1 threads cannot decode"):
        MemoryLoader(images, 4, threads=-1)


def test_options_change_only_their_fields():
    config = {**CONFIG, "mean": (0.1, 0.2, 0.3)}
    assert ImageOptions().changes(config) == {}
    assert ImageOptions("nearest").changes(config) == {"interpolation": "nearest"}
    none = ImageOptions(normalisation="none").changes(config)
    image = Image.new("RGB", (40, 40), (255, 0, 51))
    found = eval_transform({**config, **none})(image)[:, 0, 0]
    torch.testing.assert_close(found, torch.tensor([1.0, 0.0, 0.2]))
    found = eval_transform({**config, **ImageOptions(normalisation="inception").changes(config)})
    assert found(image)[:, 0, 0].tolist() == pytest.approx([1, -1, -0.6])
    grey = {**config, "input_size": (1, 32, 32)}
    assert ImageOptions(normalisation="inception").changes(grey)["mean"] == (0.5,)
    with pytest.raises(ValueError, match="for 3 channels and the model takes 1"):
        ImageOptions(normalisation="imagenet").changes(grey)
    with pytest.raises(ValueError, match="interpolation is 'cubic'; choose one of model, bilinear"):
        ImageOptions("cubic")
    with pytest.raises(ValueError, match="normalisation is 'zero'"):
        ImageOptions(normalisation="zero")


def test_antialiasing_can_be_switched_off():
    """Antialiasing blurs stripes of one pixel to grey when an image is reduced."""
    stripes = Image.fromarray(np.tile(np.array([0, 255], np.uint8), (64, 32))).convert("RGB")
    config = {**CONFIG, "interpolation": "bilinear", "crop_pct": 1.0, "input_size": (3, 24, 24)}
    on = eval_transform(config)(stripes)
    off = eval_transform({**config, "antialias": False})(stripes)
    assert on.std() < 0.5 * off.std()
    with pytest.raises(ValueError, match="choose interpolation bilinear, bicubic or nearest"):
        eval_transform({**config, "interpolation": "lanczos", "antialias": False})
    with pytest.raises(ValueError, match="cannot be switched off for ResizeKeepRatio"):
        eval_transform({**config, "crop_mode": "border", "antialias": False})
