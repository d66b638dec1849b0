"""CSV files of paths and labels: columns, splits, several labels, damaged entries."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.pictures import write_image
from support.training import CONFIG

from vpt_fast.train.data.images import eval_transform, make_loader
from vpt_fast.train.data.memory_set import MemoryLoader
from vpt_fast.train.data.sources import open_source
from vpt_fast.train.data.split import SplitImages, require_one_label


def write(folder: Path, name: str, *lines: str, encoding: str = "utf-8") -> Path:
    """Write a CSV file, and the images a.png to f.png beside it once."""
    for number, image in enumerate("abcdef"):
        if not (folder / f"{image}.png").exists():
            write_image(folder / f"{image}.png", number % 3, number)
    path = folder / name
    path.write_text("\n".join(lines) + "\n", encoding=encoding)
    return path


def test_one_file_with_a_column_of_splits(tmp_path):
    path = write(
        tmp_path,
        "list.csv",
        "id,File_Name,split,Label",
        "1,a.png,train,golden retriever",
        '2,"b.png",TRAIN,"cat, black"',
        "3,c.png,validation,golden retriever",
        "4,d.png,test,golden retriever",
        "5,e.png,dev,golden retriever",
        "",
        "6,f.png,train",
        "7,f.png,train,",
        "8,,train,golden retriever",
        "9,gone.png,valid,wolf",
    )
    source = open_source(path)
    assert source.format == "csv"
    assert source.class_names == ["cat, black", "golden retriever"]
    labels = {name: split.labels for name, split in source.splits.items()}
    assert labels == {"train": [1, 0], "val": [1], "test": [1]}
    assert source.splits["train"].names == [str(tmp_path / "a.png"), str(tmp_path / "b.png")]
    assert source.splits["val"].load(0, 3).size == (40, 36)
    assert [item.reason for item in source.splits["train"].refused] == [
        f"{path} line 6: split 'dev' is none of train, val, test",
        f"{path} line 8: 3 cells in 4 columns",
        f"{path} line 10: there is no path",
        f"{path} line 9: there is no label",
    ]
    (item,) = source.splits["val"].refused
    assert item.reason.endswith("line 11: no training image has the class 'wolf'")
    assert not source.multi_label


def test_a_file_for_each_split_in_a_folder(tmp_path):
    write(tmp_path, "train.csv", "path;class", "a.png;10", "b.png;2", "c.png;10", encoding="utf-16")
    write(tmp_path, "valid.csv", "path;class", "d.png;2")
    write(tmp_path, "test.csv", "path", "e.png")
    source = open_source(tmp_path)
    assert source.class_names == ["2", "10"]
    assert source.splits["train"].labels == [1, 0, 1]
    assert source.splits["val"].labels == [0]
    assert source.warnings == [f"{tmp_path / 'test.csv'} has no column of labels: it is left out"]
    assert open_source(tmp_path, known=["10", "3", "2"]).splits["train"].labels == [0, 2, 0]
    with pytest.raises(ValueError, match="val has no entry that can be used: .*no class '2'"):
        open_source(tmp_path, known=["10", "9"])


def test_missing_damaged_and_repeated_images_are_named(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    path = write(
        tmp_path,
        "list.csv",
        "image,target",
        "a.png,x",
        "./a.png,y",
        "text.png,y",
        "gone.png,x",
        f"{tmp_path}/b.png,y",
    )
    source = open_source(path)
    assert source.warnings == [
        f"1 images are in train more than once: {tmp_path / 'a.png'}",
        f"1 images have two labels: {tmp_path / 'a.png'} (x, y)",
    ]
    images = SplitImages(source.splits["train"], eval_transform(CONFIG), source.class_names)
    for loader in (make_loader(images, 9), MemoryLoader(images, 9)):
        (batch,) = loader
        assert batch.labels.tolist() == [0, 1, 1]
        assert [Path(item.path).name for item in batch.skipped] == ["text.png", "gone.png"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ["name,label", "a.png,x"],
            "has 0 columns of paths (none of name, label); the first line must name one 'path'",
        ),
        (["path,image,label", "a.png,b.png,x"], "has 2 columns of paths (path, image of"),
        (["path,label,class", "a.png,x,y"], "has 2 columns of labels (label, class); keep one"),
        (["path,label,Path", "a.png,x,y"], "has two columns 'path'; rename one"),
        (["path", "a.png"], "has no column of labels; name it 'label'"),
        (["path,label", "a.png,x", "b.png,x"], "has 1 class; a classifier needs at least two"),
        (["path,cat,age", "a.png,1,7"], "line 2: '7' in the column 'age' is neither 0 nor 1"),
        (["path,labels", "a.png,x;y", "b.png,x|y"], "divides labels by both ; and |"),
        (["path,labels", "a.png,cat", "b.png,red dog"], "'red dog', one name or several; write ;"),
        ([""], "is empty; its first line must name the columns"),
        ([","], "is empty"),
    ],
)
def test_unclear_files_are_refused(tmp_path, lines, message):
    with pytest.raises(ValueError) as error:
        open_source(write(tmp_path, "list.csv", *lines))
    assert message in str(error.value)


def test_several_names_in_the_column_of_one_class_are_said(tmp_path):
    lines = ("path,label", "a.png,cat;dog", "b.png,cat")
    path = write(tmp_path, "list.csv", *lines, encoding="utf-8-sig")
    source = open_source(path)
    assert source.class_names == ["cat", "cat;dog"] and not source.multi_label
    assert source.warnings == [
        f"{path}: 'cat;dog' in the column label is the name of one class; several are in a column "
        "called labels"
    ]


def test_columns_that_differ_between_files_are_refused(tmp_path):
    write(tmp_path, "train.csv", "path,label", "a.png,x", "b.png,y")
    write(tmp_path, "val.csv", "path,class", "c.png,x")
    with pytest.raises(ValueError, match=r"different columns: .*train.csv in label, .*in class;"):
        open_source(tmp_path)
    write(tmp_path, "val.csv", "path,label,split", "c.png,x,test")
    with pytest.raises(ValueError, match="has a column 'split' and is the file of one split"):
        open_source(tmp_path)
    write(tmp_path, "train.csv", "path,x,y", "a.png,0,1", "b.png,1,1")
    write(tmp_path, "val.csv", "path,x,z", "c.png,0,1")
    with pytest.raises(ValueError, match="differ in the columns y, z"):
        open_source(tmp_path)


@pytest.mark.parametrize("divider", [";", "|", " ; "])
def test_several_names_in_a_column(tmp_path, divider):
    write(
        tmp_path,
        "train.csv",
        "path,labels",
        f"a.png,wild cat{divider}ant",
        "b.png,",
        f"c.png,bee{divider}{divider}ant",
        "a.png,ant",
    )
    write(tmp_path, "val.csv", "path,labels", "d.png,bee", f"e.png,bee{divider}wolf")
    source = open_source(tmp_path)
    assert source.multi_label
    assert source.class_names == ["ant", "bee", "wild cat"]
    assert source.splits["train"].labels == [[1, 0, 1], [0, 0, 0], [1, 1, 0], [1, 0, 0]]
    assert source.splits["val"].labels == [[0, 1, 0]]
    assert source.splits["val"].refused[0].reason.endswith("has the class 'wolf'")
    assert source.warnings[1].endswith("a.png (ant, ant + wild cat)")
    images = SplitImages(source.splits["train"], eval_transform(CONFIG), source.class_names)
    for loader in (make_loader(images, 3), MemoryLoader(images, 3)):
        first, _ = loader
        assert first.labels.dtype == torch.float32
        assert first.labels.tolist() == [[1, 0, 1], [0, 0, 0], [1, 1, 0]]
    with pytest.raises(ValueError, match="several labels each"):
        require_one_label(source)


def test_spaces_divide_numbers_and_the_names_of_a_list(tmp_path):
    path = write(tmp_path, "list.csv", "path,labels", "a.png,3 10", "b.png,3", "c.png,7")
    source = open_source(path)
    assert source.class_names == ["3", "7", "10"]
    assert source.splits["train"].labels == [[1, 0, 1], [1, 0, 0], [0, 1, 0]]
    path = write(tmp_path, "list.csv", "path,labels", "a.png,haze primary", "b.png,clear")
    with pytest.raises(ValueError, match="'haze primary', one name or several"):
        open_source(path)
    (tmp_path / "classes.txt").write_text("primary\nclear\nhaze\nroad\n")
    source = open_source(path)
    assert source.class_names == ["primary", "clear", "haze", "road"]
    assert source.class_order == str(tmp_path / "classes.txt")
    assert source.splits["train"].labels == [[1, 0, 1, 0], [0, 1, 0, 0]]
    assert source.warnings == [f"{path}: 1 of 4 classes have no training image: road"]


def test_a_column_of_0_and_1_for_each_class(tmp_path):
    path = write(
        tmp_path,
        "list.csv",
        "zebra,image,ant",
        "1,a.png,0",
        "0.0,b.png,1.0",
        "1,c.png,1",
        "0,d.png,0",
    )
    source = open_source(path)
    assert source.multi_label
    assert source.class_names == ["zebra", "ant"] and source.class_order == "columns"
    assert source.splits["train"].labels == [[1, 0], [0, 1], [1, 1], [0, 0]]
    swapped = open_source(path, known=["ant", "zebra"])
    assert swapped.splits["train"].labels == [[0, 1], [1, 0], [1, 1], [0, 0]]
    with pytest.raises(ValueError, match="has no column 'bee', a class of the model"):
        open_source(path, known=["ant", "bee"])
    with pytest.raises(ValueError, match=r"an order of the data's own \(columns\)"):
        open_source(path, class_order="strings")


def test_a_list_of_classes_defines_labels_and_numbers(tmp_path):
    path = write(tmp_path, "list.csv", "path,label", "a.png,dog", "b.png,ant")
    (tmp_path / "class_to_idx.json").write_text('{"dog": 0, "cat": 2, "ant": 1}')
    source = open_source(path)
    assert source.class_names == ["dog", "ant", "cat"]
    assert source.splits["train"].labels == [0, 1]
    path = write(tmp_path, "list.csv", "path,label", "a.png,2", "b.png,0", "c.png,3")
    source = open_source(path)
    assert source.class_names == ["dog", "ant", "cat"]
    assert source.splits["train"].labels == [2, 0]
    assert source.splits["train"].refused[0].reason.endswith("'3' is no whole number in range")
    assert open_source(path, known=["cat", "dog"]).splits["train"].labels == [0, 1]
    path = write(tmp_path, "list.csv", "path,label", "a.png,dog", "b.png,wolf")
    with pytest.raises(ValueError, match=r"class_to_idx.json does not name the class 'wolf'"):
        open_source(path)
    (tmp_path / "classes.txt").write_text("dog\ncat\n")
    with pytest.raises(ValueError, match="have different classes or orders; remove one"):
        open_source(path)
    (tmp_path / "classes.txt").unlink()
    (tmp_path / "class_to_idx.json").write_text('{"dog": 0, "cat": 2}')
    with pytest.raises(ValueError, match="must give its 2 classes the numbers from 0 on"):
        open_source(path)
