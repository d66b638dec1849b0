"""webdataset, imagefolder and parquet, read by Hugging Face `datasets`."""

from __future__ import annotations

import io
import json
import pickle
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image
from support.pictures import make_folders, write_image
from support.training import CONFIG

from vpt_fast.train.data.images import eval_transform, make_loader
from vpt_fast.train.data.memory_set import MemoryLoader
from vpt_fast.train.data.sources import open_source
from vpt_fast.train.data.split import SplitImages

datasets = pytest.importorskip("datasets", reason="the data extra is not installed")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Put the cache of `datasets` into a folder of the test."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)


def picture(red: int, form: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (20, 10), (red, 0, 0)).save(stream, form)
    return stream.getvalue()


def shard(path: Path, samples: dict[str, dict[str, object]]) -> Path:
    """Write a tar archive of samples: the content of each file by its extension."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for key, files in samples.items():
            for end, content in files.items():
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                member = tarfile.TarInfo(f"{key}.{end}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return path


def red(split, row: int) -> int:
    return split.load(row, 3).getpixel((0, 0))[0]


def test_shards_with_numbers(tmp_path):
    for number in range(2):
        samples = {
            f"0000{i}": {"png": picture(100 * number + i), "cls": [2, 0, 1][i]} for i in range(3)
        }
        shard(tmp_path / f"train-00{number}.tar", samples)
    shard(
        tmp_path / "val-000.tar",
        {"a": {"png": picture(7), "cls": 1}, "b": {"png": picture(8), "cls": 5}},
    )
    source = open_source(tmp_path)
    assert (source.format, source.class_names) == ("webdataset", ["0", "1", "2", "3", "4", "5"])
    assert source.splits["train"].labels == [2, 0, 1, 2, 0, 1]
    assert source.splits["val"].labels == [1, 5]
    assert [red(source.splits["train"], row) for row in (5, 0, 3)] == [102, 0, 100]
    assert source.splits["train"].names[4] == str(tmp_path / "train-001.tar" / "00001")
    # Both shards have the same keys, which are not the same images.
    assert source.warnings == [f"{tmp_path}: 3 of 6 classes have no training image: 3; 4; 5"]
    (tmp_path / "classes.txt").write_text("ant\nbee\ncat\n")
    source = open_source(tmp_path)
    assert source.class_names == ["ant", "bee", "cat"]
    (item,) = source.splits["val"].refused
    assert item.reason == f"{tmp_path}/val-000.tar/b: label 5 is out of range, 0 to 2"
    assert open_source(tmp_path, known=["bee", "ant"]).splits["train"].labels == [1, 0, 1, 0]


def test_shards_in_folders_with_words_in_json(tmp_path):
    for part, words in (("train", ["dog", "cat", "dog"]), ("test", ["cat"])):
        samples = {
            f"{part}{i}": {"jpg": picture(9, "JPEG"), "json": {"id": i, "label": word}}
            for i, word in enumerate(words)
        }
        shard(tmp_path / part / "00.tar", samples)
    source = open_source(tmp_path)
    assert (source.format, source.class_names) == ("webdataset", ["cat", "dog"])
    assert source.splits["train"].labels == [1, 0, 1]
    assert source.splits["test"].labels == [0]


def test_a_member_that_is_no_image_is_skipped_and_pickled(tmp_path):
    samples = {
        "a": {"png": picture(1), "cls": 0},
        "b": {"png": b"no image", "cls": 1},
        "c": {"cls": 1, "png": picture(3)},
    }
    shard(tmp_path / "train.tar", samples)
    source = open_source(tmp_path)
    images = SplitImages(source.splits["train"], eval_transform(CONFIG), source.class_names)
    for loader in (make_loader(images, 9), MemoryLoader(images, 9)):
        (batch,) = loader
        assert batch.labels.tolist() == [0, 1]
        assert [item.path for item in batch.skipped] == [f"{tmp_path}/train.tar/b"]
    assert red(pickle.loads(pickle.dumps(source.splits["train"])), 2) == 3


def test_damaged_shards_and_samples_without_labels_are_refused(tmp_path):
    samples = {str(i): {"png": picture(i), "cls": i} for i in range(3)}
    path = shard(tmp_path / "cut" / "train-0.tar", samples)
    shard(tmp_path / "cut" / "train-1.tar", samples)
    path.write_bytes(path.read_bytes()[:1200])
    with pytest.raises(
        ValueError, match=r"train-0.tar has no end of a tar archive: it was cut off"
    ):
        open_source(tmp_path / "cut")
    shard(tmp_path / "words" / "a.tar", {"0": {"png": picture(1), "json": {"caption": "x"}}})
    with pytest.raises(ValueError, match=r"train .json has 0 label columns \(none\)"):
        open_source(tmp_path / "words")
    shard(tmp_path / "plain" / "a.tar", {"cat/0": {"png": picture(1)}})
    with pytest.raises(ValueError, match=r"plain holds a.tar, an archive, which is not read"):
        open_source(tmp_path / "plain")


def test_a_missing_package_is_named_in_one_line(tmp_path, monkeypatch):
    shard(tmp_path / "a.tar", {"0": {"png": picture(1), "cls": 0}})
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match="which is not installed: pip install datasets$"):
        open_source(tmp_path)


def imagefolder(folder: Path, part: str, name: str, *lines: str) -> Path:
    for i in range(3):
        write_image(folder / part / f"{i}.png", i, i)
    (folder / part / name).write_text("\n".join(lines) + "\n")
    return folder / part / name


def test_an_imagefolder_with_metadata(tmp_path):
    lines = ("file_name,label", "0.png,dog", "2.png,cat", "gone.png,cat", "1.png,")
    imagefolder(tmp_path, "train", "metadata.csv", *lines)
    imagefolder(tmp_path, "test", "metadata.csv", "file_name,label", "0.png,cat")
    source = open_source(tmp_path)
    assert (source.format, source.class_names) == ("imagefolder", ["cat", "dog"])
    train = source.splits["train"]
    assert train.labels == [1, 0, 0]
    assert train.names == [str(tmp_path / "train" / f"{name}.png") for name in (0, 2, "gone")]
    assert train.refused[0].reason == f"{tmp_path / 'train' / '1.png'}: label None is no word"
    assert train.load(1, 3).size == (40, 36)
    with pytest.raises(ValueError, match="gone.png cannot be decoded"):
        train.load(2, 3)
    # The images are files, which are compared by their content.
    assert source.warnings == [
        f"1 images are in both train and test: {tmp_path / 'test' / '0.png'}",
        f"1 images have two labels: {tmp_path / 'train' / '0.png'} (cat, dog)",
    ]


def test_an_imagefolder_with_numbers_of_which_one_is_missing(tmp_path):
    lines = ('{"file_name": "0.png", "class": 1}', '{"file_name": "1.png", "class": 0}')
    imagefolder(tmp_path / "json", "train", "metadata.jsonl", *lines)
    source = open_source(tmp_path / "json")
    assert (source.class_names, source.splits["train"].labels) == (["0", "1"], [1, 0])
    lines = ("file_name,target", "0.png,1", "1.png,", "2.png,0", ",0")
    imagefolder(tmp_path / "csv", "train", "metadata.csv", *lines)
    train = open_source(tmp_path / "csv").splits["train"]
    assert train.labels == [1, 0, 0]
    with pytest.raises(ValueError, match=r"train row 3 cannot be decoded \(the row has no image"):
        train.load(2, 3)
    assert train.refused[0].reason.endswith("1.png: label None is out of range, 0 to 1")


def test_metadata_that_cannot_be_used(tmp_path):
    imagefolder(tmp_path / "a", "train", "metadata.csv", "file_name,caption", "0.png,x")
    with pytest.raises(ValueError, match=r"train has 0 label columns \(none\)"):
        open_source(tmp_path / "a")
    imagefolder(tmp_path / "b", "train", "metadata.csv", "name,label", "0.png,x")
    with pytest.raises(ValueError, match="b cannot be read as imagefolder: .*file_name"):
        open_source(tmp_path / "b")
    line = '{"file_name": "0.png", "labels": ["x", "y"]}'
    imagefolder(tmp_path / "c", "train", "metadata.jsonl", line)
    with pytest.raises(ValueError, match="has lists for labels; write a CSV with a path"):
        open_source(tmp_path / "c")
    make_folders(tmp_path / "d", train=1)
    (tmp_path / "d" / "train" / "metadata.csv").write_text("file_name,label\nred/0.png,x\n")
    with pytest.raises(ValueError, match="could be several formats: imagefolder, folders"):
        open_source(tmp_path / "d")


def test_files_that_change_are_read_again(tmp_path):
    """The cache of `datasets` must not answer for files of the same name."""
    for labels in ([0, 1, 1], [1, 0, 0]):
        samples = {str(i): {"png": picture(i), "cls": label} for i, label in enumerate(labels)}
        shard(tmp_path / "tars" / "train-0.tar", samples)
        assert open_source(tmp_path / "tars").splits["train"].labels == labels
    for words in ("ab", "ba"):
        lines = ("file_name,label", *(f"{i}.png,{word}" for i, word in enumerate(words)))
        imagefolder(tmp_path / "folder", "train", "metadata.csv", *lines)
        labels = ["ab".index(word) for word in words]
        assert open_source(tmp_path / "folder").splits["train"].labels == labels


def test_parquet_files_have_the_names_of_their_features(tmp_path):
    rows = {"image": [{"bytes": picture(i), "path": None} for i in range(4)], "label": [1, 0, 1, 1]}
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["zebra", "ant"])}
    made = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    folder = tmp_path / "data"
    folder.mkdir()
    made.to_parquet(folder / "train-00000-of-00001.parquet")
    made.select([1]).to_parquet(folder / "validation-00000-of-00001.parquet")
    source = open_source(tmp_path)
    assert (source.format, source.class_names) == ("parquet", ["zebra", "ant"])
    assert source.class_order == "features"
    assert source.splits["train"].labels == [1, 0, 1, 1]
    assert source.splits["val"].labels == [0]
    assert [red(source.splits["train"], row) for row in (3, 1)] == [3, 1]
    assert source.splits["train"].names[2] == f"{tmp_path} train row 2"
    with pytest.raises(ValueError, match=r"an order of the data's own \(features\); leave"):
        open_source(tmp_path, class_order="strings")


def test_a_dataset_that_was_saved_is_read(tmp_path):
    """With the package itself; test_sources.py has stand-ins for it."""
    rows = {"img": [Image.new("L", (20, 10), 40 * i) for i in range(3)], "label": ["b", "a", "b"]}
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows)}).save_to_disk(tmp_path / "s")
    source = open_source(tmp_path / "s")
    assert (source.format, source.class_names) == ("hf", ["a", "b"])
    assert source.splits["train"].labels == [1, 0, 1]
    assert source.splits["train"].load(2, 1).getpixel((0, 0)) == 80
