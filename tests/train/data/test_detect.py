"""Class folders without splits, orders of classes, validation splits, and what is refused."""

from __future__ import annotations

import json
import tarfile
import zipfile
from pathlib import Path

import pytest
from support.pictures import CLASSES, make_folders, write_image

from vpt_fast.train.data.sources import check_format, open_source


def make_classes(folder: Path, **counts: int) -> Path:
    """Write `folder/<class>/<i>.png`."""
    for label, (name, count) in enumerate(counts.items()):
        for i in range(count):
            write_image(folder / name / f"{i:02d}.png", label % 3, 1000 * label + i)
    return folder


def names(split):
    return ["/".join(Path(name).parts[-2:]) for name in split.names]


def test_class_folders_without_splits_are_train(tmp_path):
    make_classes(tmp_path, bee=2, ant=1)
    (tmp_path / "photos.zip").write_bytes(b"left from unpacking")
    (tmp_path / ".cache").mkdir()
    source = open_source(tmp_path)
    assert (source.format, source.class_names) == ("classes", ["ant", "bee"])
    assert names(source.splits["train"]) == ["ant/00.png", "bee/00.png", "bee/01.png"]
    assert source.splits["train"].labels == [0, 1, 1]
    assert list(source.splits) == ["train"]


@pytest.mark.parametrize("name", ["Training", "TEST", "val_set", "dev"])
def test_a_folder_that_could_be_a_split_is_no_class(tmp_path, name):
    make_classes(tmp_path, **{"bee": 1, name: 1})
    with pytest.raises(ValueError, match=f"{name} could be a split or a class; rename it"):
        open_source(tmp_path)
    assert open_source(tmp_path, "classes").class_names == sorted(["bee", name])


def test_nested_folders_and_a_class_called_train_are_not_guessed(tmp_path):
    make_classes(tmp_path / "part1", ant=1, bee=1)
    make_classes(tmp_path / "part2", ant=1, bee=1)
    with pytest.raises(ValueError, match="part1 could be a split or a class"):
        open_source(tmp_path)
    make_classes(tmp_path / "traffic", train=1, bus=1)
    with pytest.raises(ValueError, match="could be several formats: folders, classes"):
        open_source(tmp_path / "traffic")
    assert open_source(tmp_path / "traffic", "classes").class_names == ["bus", "train"]
    make_classes(tmp_path / "flat", train=1, test=1)
    with pytest.raises(FileNotFoundError, match="no class folders in .*flat/train"):
        open_source(tmp_path / "flat")


def test_validation_images_are_split_off_by_class(tmp_path):
    make_classes(tmp_path, a=10, b=5, c=2, d=1)
    source = open_source(tmp_path, val_fraction=0.2)
    # numpy.random.RandomState(0).permutation(10) begins with 2 and 8, that of 5 with 2.
    assert names(source.splits["val"]) == ["a/02.png", "a/08.png", "b/02.png"]
    assert source.splits["val"].labels == [0, 0, 1]
    assert len(source.splits["train"]) == 15
    assert not set(source.splits["val"].names) & set(source.splits["train"].names)
    assert source.splits["train"].labels == [0] * 8 + [1] * 4 + [2] * 2 + [3]
    assert source.splits["val"].load(1, 3).tobytes() != source.splits["val"].load(0, 3).tobytes()
    # Another order of the classes, as an adapter may have it: the same images.
    other = open_source(tmp_path, known=["d", "c", "b", "a"], val_fraction=0.2)
    assert names(other.splits["val"]) == names(source.splits["val"])
    assert other.splits["val"].labels == [3, 3, 2]


def test_validation_splits_that_cannot_be(tmp_path):
    make_folders(tmp_path / "with", train=2, val=1)
    with pytest.raises(ValueError, match="has a val split; leave --val-fraction out"):
        open_source(tmp_path / "with", val_fraction=0.2)
    make_classes(tmp_path / "few", a=2, b=2)
    with pytest.raises(ValueError, match="0.2 of 4 images of 2 classes, which is none; choose"):
        open_source(tmp_path / "few", val_fraction=0.2)
    for wrong in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="it must be between 0 and 1"):
            open_source(tmp_path / "few", val_fraction=wrong)


def test_an_image_on_both_sides_of_the_split_is_named(tmp_path):
    make_classes(tmp_path, a=10, b=3)
    (tmp_path / "a/02.png").write_bytes((tmp_path / "a/05.png").read_bytes())
    (line,) = open_source(tmp_path, val_fraction=0.2).warnings
    assert line == f"1 images are in both train and val: {tmp_path / 'a/02.png'}"


def test_classes_are_sorted_as_strings_or_by_number(tmp_path):
    make_classes(tmp_path, c1=1, c2=2, c10=1)
    assert open_source(tmp_path).class_names == ["c1", "c10", "c2"]
    strings = open_source(tmp_path, class_order="strings")
    assert strings.splits["train"].labels == [0, 1, 2, 2]
    source = open_source(tmp_path, class_order="natural")
    assert (source.class_names, source.class_order) == (["c1", "c2", "c10"], "natural")
    assert names(source.splits["train"]) == ["c1/00.png", "c10/00.png", "c2/00.png", "c2/01.png"]
    assert source.splits["train"].labels == [0, 2, 1, 1]
    with pytest.raises(ValueError, match="class_order is 'timm'; choose one of strings, natural"):
        open_source(tmp_path, class_order="timm")


def test_a_list_of_classes_is_their_order(tmp_path):
    make_folders(tmp_path, train=1, test=1)
    listed = tmp_path / "classes.txt"
    listed.write_text("red\n\ngreen \nblue\npink\n")
    source = open_source(tmp_path)
    assert source.class_names == ["red", "green", "blue", "pink"]
    assert source.splits["test"].labels == [2, 1, 0]
    assert source.class_order == str(listed)
    assert source.warnings[0] == f"{tmp_path}: 1 of 4 classes have no training image: pink"
    assert open_source(tmp_path, known=list(CLASSES)).class_names == list(CLASSES)
    with pytest.raises(ValueError, match="classes.txt.; leave --class-order out"):
        open_source(tmp_path, class_order="natural")
    listed.write_text("red\nblue\n")
    with pytest.raises(ValueError, match="does not name the class 'green', which has images"):
        open_source(tmp_path)
    listed.write_text("red\nblue\nred")
    with pytest.raises(ValueError, match="names the class 'red' twice"):
        open_source(tmp_path)


def test_numbers_have_one_order(tmp_path):
    entries = {f"{i}.png": i for i in (2, 10)}
    for number, name in enumerate(entries):
        write_image(tmp_path / name, number, number)
    (tmp_path / "train.json").write_text(json.dumps(entries))
    assert open_source(tmp_path, class_order="natural").class_names == ["2", "10"]
    with pytest.raises(ValueError, match=r"an order of the data's own \(numbers\)"):
        open_source(tmp_path, class_order="strings")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("annotations/instances_train2017.json", "holds COCO's annotations of objects, which are"),
        ("valid2/_annotations.coco.json", "COCO's annotations of objects, which are not read; wri"),
        ("Annotations/1.xml", "Pascal VOC's annotations of objects"),
        ("images/a.tfrecord-00000-of-00002", "holds TFRecord files, which are not read; save its"),
        ("data.mdb", "holds an LMDB database"),
        ("digits.npz", "holds digits.npz, NumPy's arrays, which is not read; save its images"),
        ("imagelabels.MAT", "holds imagelabels.MAT, a file of MATLAB's"),
        ("photos.zip", "holds photos.zip, an archive, which is not read; unpack it, and name"),
        ("photos.tar.gz", "holds photos.tar.gz, an archive"),
        ("labels.csv", "has no train.csv; name the CSV file itself: .*/labels.csv"),
    ],
)
def test_what_is_not_read_is_named_with_the_way(tmp_path, file, message):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_bytes(b"")
    if "/" in file:  # folders of images beside it are no classes
        make_classes(tmp_path, train2017=1, val2017=1)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_source(tmp_path)


def test_files_that_are_no_csv_are_named_with_the_way(tmp_path):
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("cat/a.txt", "")
    with tarfile.open(tmp_path / "photos.tar", "w"):
        pass
    for name, message in (
        ("photos.zip", "is an archive, which is not read; unpack it"),
        ("photos.tar", "is an archive, which is not read; unpack it"),
        ("a.parquet", "is one file of a table, which is not read; name the folder that it is in"),
        ("a.txt", "is no CSV file, which is not read; name a folder, or write a CSV"),
    ):
        (tmp_path / name).touch()
        with pytest.raises(ValueError, match=message):
            check_format(tmp_path / name, "auto")
    (tmp_path / "a.csv").write_text("path,label\n")
    with pytest.raises(ValueError, match="a.csv is a file, and --format hf is a folder"):
        check_format(tmp_path / "a.csv", "hf")


def test_a_csv_beside_class_folders_is_ambiguous(tmp_path):
    make_folders(tmp_path, train=1)
    (tmp_path / "train.csv").write_text("path,label\ntrain/red/0.png,x\ntrain/blue/0.png,y\n")
    with pytest.raises(ValueError, match="could be several formats: csv, folders; name one"):
        open_source(tmp_path)
    assert open_source(tmp_path, "csv").class_names == ["x", "y"]
    assert open_source(tmp_path, "folders").class_names == list(CLASSES)
