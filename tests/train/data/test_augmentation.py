"""RandAugment and its like: timm's transforms, of files, drawn by image and epoch."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from support.pictures import make_folders
from support.training import CONFIG
from timm.data import create_transform
from torchvision import transforms

from vpt_fast.train.data.augmentation import Augmentation
from vpt_fast.train.data.image_loaders import Loading
from vpt_fast.train.data.images import plain_crops, train_transform
from vpt_fast.train.data.memory_set import MemoryLoader
from vpt_fast.train.data.sources import open_source

CPU = torch.device("cpu")
AA = "rand-m9-mstd0.5-inc1"


def loading(augmentation: Augmentation, cache: str = "auto", **changes: Any) -> Loading:
    return Loading({**CONFIG, **changes}, augmentation, CPU, None, cache)


def steps(augmentation: Augmentation) -> list[str]:
    pipeline: Any = loading(augmentation)._training()
    return [type(step).__name__ for step in pipeline.transforms]


def test_the_pipeline_is_timms() -> None:
    augmentation = Augmentation(aa=AA, reprob=0.25)
    timms = create_transform(
        **CONFIG, is_training=True, scale=(0.7, 1.0), auto_augment=AA, re_prob=0.25
    )
    ours: Any = loading(augmentation)._training()
    assert str(ours) == str(timms)
    assert steps(Augmentation(color_jitter=0.4))[2] == "ColorJitter"


def test_without_it_the_pipelines_are_those_of_before() -> None:
    crop, flip, *end = steps(Augmentation())
    assert (crop, flip) == ("RandomResizedCropAndInterpolation", "RandomHorizontalFlip")
    assert end == ["MaybeToTensor", "Normalize"]
    plain: Any = plain_crops(CONFIG)
    assert [type(step) for step in plain.transforms[:3]] == [
        transforms.Resize,
        transforms.RandomCrop,
        transforms.RandomHorizontalFlip,
    ]
    assert str(train_transform(CONFIG)) == str(loading(Augmentation())._training())


def test_plain_crops_are_augmented_after_flips_and_erased_at_the_end() -> None:
    found = steps(Augmentation(crops="plain", aa=AA, reprob=1.0))
    assert found == [
        "Resize", "RandomCrop", "RandomHorizontalFlip", "RandAugment", "MaybeToTensor",
        "Normalize", "RandomErasing",
    ]  # fmt: skip


def test_it_is_made_of_files_and_the_same_again_with_workers(tmp_path: Any) -> None:
    source = open_source(make_folders(tmp_path, train=3, val=2))
    train = source.splits["train"]

    def images(augmentation: Augmentation, workers: int | None = None) -> torch.Tensor:
        how = Loading(CONFIG, augmentation, CPU, workers)
        loader = how.loader(train, source.class_names, 4, training=True, seed=3)
        assert not isinstance(loader, MemoryLoader)
        return torch.cat([batch.images for _ in range(2) for batch in loader])

    augmentation = Augmentation(aa=AA, reprob=0.5)
    first = images(augmentation)
    assert torch.equal(first, images(augmentation)) and torch.equal(first, images(augmentation, 1))
    erased = images(Augmentation(reprob=0.5))
    assert not torch.equal(first, erased)
    validation = loading(augmentation).loader(source.splits["val"], source.class_names, 4)
    assert isinstance(validation, MemoryLoader)
    pickle.dumps(loading(augmentation)._training())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"aa": "rand-x9"}, "aa is 'rand-x9', which timm does not know"),
        ({"aa": "foo"}, "aa is 'foo', which timm does not know"),
        ({"reprob": 1.5}, "reprob is 1.5"),
        ({"color_jitter": -1.0}, "color_jitter is -1"),
        ({"aa": AA, "color_jitter": 0.4}, "color_jitter would be ignored"),
        ({"no_aug": True, "reprob": 0.5}, "reprob augments images, and no_aug is on"),
    ],
)
def test_what_cannot_be_is_refused_by_name(changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augmentation(**changes)


def test_what_does_not_fit_the_model_or_the_cache_is_refused_by_name() -> None:
    augmentation = Augmentation(aa=AA)
    for changes, message in (
        ({"cache": "memory"}, "aa, reprob and color_jitter are made of the files"),
        ({"input_size": (1, 32, 32)}, "the model takes 1 channels"),
        ({"antialias": False}, "leave --no-antialias out"),
    ):
        with pytest.raises(ValueError, match=message):
            loading(augmentation, **changes)
    for known in ("original", "v0", "augmix-m3-w2", "3a"):
        assert Augmentation(aa=known).settings()["aa"] == known
    assert Augmentation(aa="3a", color_jitter=0.2).per_image
    assert Augmentation().settings().keys() == {"scale", "hflip", "no_aug", "crops"}
