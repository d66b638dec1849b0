"""Image folders, arrays and loaders."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from support.pictures import CLASSES, make_folders, write_image
from support.training import CONFIG, damaged_files

from vpt_fast.train.data.images import (
    ArrayImages,
    ImageFolders,
    SkippedImage,
    eval_transform,
    find_split,
    load_image,
    make_loader,
    require_split,
    train_transform,
)


def blank(image: Image.Image) -> torch.Tensor:
    return torch.zeros(3, 2, 2)


def test_classes_are_the_sorted_folders_and_hidden_ones_are_none(tmp_path):
    make_folders(tmp_path, train=2)
    write_image(tmp_path / "train" / ".ipynb_checkpoints" / "a.png", 0, 0)
    (tmp_path / "train" / "notes.txt").write_text("no class")
    images = ImageFolders(tmp_path / "train", blank)
    assert images.classes == list(CLASSES)
    assert images.targets == [0, 0, 1, 1, 2, 2]


def test_class_order_from_outside_holds_where_a_class_is_missing(tmp_path):
    make_folders(tmp_path, ("green", "red"), test=1)
    images = ImageFolders(tmp_path / "test", blank, class_names=["red", "blue", "green"])
    labels = {path.split("/")[-2]: label for path, label in images.samples}
    assert labels == {"green": 2, "red": 0}


def test_a_class_that_training_lacks_is_refused(tmp_path):
    make_folders(tmp_path, (*CLASSES, "violet"), test=1)
    with pytest.raises(ValueError, match=r"test.*violet.*known: blue, green, red"):
        ImageFolders(tmp_path / "test", blank, class_names=CLASSES)


def test_empty_folders_are_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="no data folder .*nowhere"):
        require_split(tmp_path / "nowhere", "train")
    with pytest.raises(FileNotFoundError, match="no folder 'train'"):
        require_split(tmp_path, "train")
    with pytest.raises(FileNotFoundError, match="there is no folder .*train"):
        ImageFolders(tmp_path / "train", blank)
    (tmp_path / "train").mkdir()
    with pytest.raises(FileNotFoundError, match="no class folders in .*train"):
        ImageFolders(tmp_path / "train", blank)
    (tmp_path / "train" / "cat").mkdir()
    (tmp_path / "train" / "dog").mkdir()
    with pytest.raises(FileNotFoundError, match="no images in the class folders of .*train"):
        ImageFolders(tmp_path / "train", blank)
    write_image(tmp_path / "train" / "cat" / "a.png", 0, 0)
    with pytest.raises(ValueError, match="without an image in .*train: dog"):
        ImageFolders(tmp_path / "train", blank)
    (tmp_path / "train" / "dog").rmdir()
    with pytest.raises(ValueError, match=r"one class folder \(cat\)"):
        ImageFolders(tmp_path / "train", blank)


def test_validation_folder_may_be_called_validation(tmp_path):
    assert find_split(tmp_path, "val") is None
    (tmp_path / "validation").mkdir()
    assert find_split(tmp_path, "val") == tmp_path / "validation"
    (tmp_path / "val").mkdir()
    assert find_split(tmp_path, "val") == tmp_path / "val"


def test_undecodable_files_are_named_with_a_reason(tmp_path):
    for path in [*damaged_files(tmp_path), tmp_path / "missing.png"]:
        with pytest.raises(ValueError, match=rf"{path.name} cannot be decoded \(.+\)"):
            load_image(path)


def test_undecodable_files_are_reported_in_their_batch(tmp_path):
    make_folders(tmp_path, train=2)
    damaged = damaged_files(tmp_path / "train" / "green")
    images = ImageFolders(tmp_path / "train", eval_transform(CONFIG))
    assert len(images) == 6 + len(damaged)
    for workers in (0, 2):
        batches = list(make_loader(images, 4, workers=workers))
        assert sum(len(batch.labels) for batch in batches) == 6
        assert all(len(batch.images) == len(batch.labels) for batch in batches)
        skipped = [item for batch in batches for item in batch.skipped]
        assert sorted(item.path for item in skipped) == sorted(map(str, damaged))
        assert all(item.path in item.reason for item in skipped)


def test_a_batch_of_undecodable_files_is_empty():
    broken = [SkippedImage("a.png", "a.png cannot be decoded")] * 3
    (batch,) = make_loader(broken, 3)
    assert len(batch.labels) == 0
    assert len(batch.skipped) == 3


def test_workers_change_nothing_without_augmentation(tmp_path):
    make_folders(tmp_path, train=3)
    images = ImageFolders(tmp_path / "train", eval_transform(CONFIG))
    first, second = (
        list(make_loader(images, 4, shuffle=True, seed=1, workers=workers)) for workers in (0, 2)
    )
    assert [batch.labels.tolist() for batch in first] == [b.labels.tolist() for b in second]
    for one, two in zip(first, second, strict=True):
        assert torch.equal(one.images, two.images)
    assert images.targets != torch.cat([batch.labels for batch in first]).tolist()
    with pytest.raises(ValueError, match="workers is -1"):
        make_loader(images, 4, workers=-1)


def test_the_order_follows_the_seed_and_changes_every_epoch():
    items = [(torch.tensor([i]), i) for i in range(50)]

    def epochs(seed):
        loader = make_loader(items, 10, shuffle=True, seed=seed)
        return [torch.cat([batch.labels for batch in loader]).tolist() for _ in range(2)]

    assert epochs(1) == epochs(1)
    assert epochs(1) != epochs(2)
    assert epochs(1)[0] != epochs(1)[1]
    assert sorted(epochs(1)[1]) == list(range(50))


def test_transforms_have_the_models_size_and_normalisation():
    picture = Image.new("RGB", (60, 40), (255, 0, 255))
    want = torch.tensor([1.0, -1.0, 1.0]).view(3, 1, 1).expand(3, 32, 32)
    for transform in (
        eval_transform(CONFIG),
        train_transform(CONFIG),
        train_transform(CONFIG, no_aug=True),
    ):
        torch.testing.assert_close(transform(picture), want, rtol=0, atol=0.01)


def test_only_augmentation_is_random():
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3)).astype(np.uint8)
    picture = Image.fromarray(noise)
    plain = train_transform(CONFIG, no_aug=True)
    assert torch.equal(plain(picture), plain(picture))
    crops = train_transform(CONFIG, scale=(0.3, 0.5), hflip=0.0)
    assert not torch.equal(crops(picture), crops(picture))
    flips = train_transform(CONFIG, scale=(1.0, 1.0), hflip=1.0)(picture)
    unflipped = train_transform(CONFIG, scale=(1.0, 1.0), hflip=0.0)(picture)
    torch.testing.assert_close(flips.flip(2), unflipped, rtol=0, atol=0.02)


def test_grey_models_get_grey_images(tmp_path):
    make_folders(tmp_path, train=1)
    grey = {**CONFIG, "input_size": (1, 32, 32), "mean": (0.5,), "std": (0.5,)}
    image, label = ImageFolders(tmp_path / "train", eval_transform(grey), channels=1)[2]
    assert image.shape == (1, 32, 32)
    assert label == 2


def test_array_images_are_transformed_as_pictures_are():
    pixels = np.random.default_rng(0).integers(0, 255, (4, 8, 8)).astype(np.uint8)
    images = ArrayImages(pixels, np.array([0, 1, 2, 3]), eval_transform(CONFIG))
    image, label = images[2]
    assert label == 2
    assert len(images) == 4
    assert torch.equal(image, eval_transform(CONFIG)(Image.fromarray(pixels[2]).convert("RGB")))


def test_an_open_file_is_decoded_as_one_on_disk_and_formats_can_be_limited(tmp_path):
    path = tmp_path / "image.png"
    write_image(path, 0, 0)
    file = io.BytesIO(path.read_bytes())
    assert load_image(file).tobytes() == load_image(path).tobytes()
    file.seek(0)
    with pytest.raises(ValueError, match=r"^The upload cannot be decoded \("):
        load_image(file, name="The upload", formats=("JPEG",))
    assert not file.closed
