"""Labels and lists of any content: words, mistakes, encodings, and duplicate images."""

from __future__ import annotations

import json
import os
import shutil
import tracemalloc
from pathlib import Path

import pytest
from support.pictures import make_folders, write_image

from vpt_fast.train.data.formats.labels import (
    are_words,
    consecutive,
    name_of,
    read_list,
    whole,
    word,
)
from vpt_fast.train.data.sources import open_source
from vpt_fast.train.run.record import data_digest

HUGE = 5000 * "9"


def listed(folder, train, test=("7.png 0",), encoding="utf-8"):
    """Write a data set in VTAB's layout with given lines."""
    folder.mkdir(exist_ok=True)
    for number in range(8):
        write_image(folder / f"{number}.png", number % 3, number)
    text = train if isinstance(train, str) else "\n".join(train)
    (folder / "train800.txt").write_bytes(text.encode(encoding))
    (folder / "test.txt").write_text("\n".join(test))
    return folder


def reasons(split):
    return [item.reason.partition(": ")[2] for item in split.refused]


def test_kinds_of_labels():
    assert [whole(label) for label in (3, "3", " +3", "-1", "007")] == [3, 3, 3, -1, 7]
    assert not any(whole(x) is not None for x in ("3.0", 3.0, True, None, "x", "", HUGE, "٣x"))
    assert [word(label) for label in ("cat", " a b ", "3d", "747-400")] == [
        "cat",
        "a b",
        "3d",
        "747-400",
    ]
    assert not any(word(x) for x in ("3", "1.5", "1e3", "nan", "inf", "", "  ", HUGE, 3, None, [1]))
    assert are_words(["cat", "dog", 3]) and not are_words(["cat", 3]) and not are_words([])
    assert name_of("007", True) == "007" and name_of("007", False) == "7"
    assert consecutive([0, "2", 7, None, -1]) == ["0", "1", "2"]


def test_a_label_far_out_of_range_is_reported_and_allocates_nothing(tmp_path):
    folder = listed(
        tmp_path / "mine",
        ["0.png 0", "1.png 2", "2.png 99999999999", f"3.png {HUGE}", "4.png 9", "5.png 2.0"],
    )
    tracemalloc.start()
    source = open_source(folder)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()
    assert source.class_names == ["0", "1", "2"]
    assert source.splits["train"].labels == [0, 2]
    out = "is out of range, 0 to 2"
    found = reasons(source.splits["train"])
    assert found[0] == f"label 99999999999 {out}" and found[2] == f"label 9 {out}"
    assert found[1].startswith("label '9999") and len(found[1]) < 130
    assert found[3] == "label '2.0' is no whole number in range"
    (line,) = source.warnings
    assert line.endswith("train800.txt has no image of 1 of the 3 classes: 1")


def test_labels_that_are_words(tmp_path):
    lines = [
        "0.png dog",
        "1.png\tbig cat",
        "2.png ant",
        "3.png 7",
        "4.png nan",
        "5.png",
        "my 6.png",
    ]
    folder = listed(tmp_path / "mine", lines, ["7.png dog", "6.png bee"])
    source = open_source(folder)
    assert source.class_names == ["7", "ant", "bee", "big cat", "dog"]
    train = source.splits["train"]
    assert [os.path.basename(name) for name in train.names] == ["0.png", "1.png", "2.png", "3.png"]
    assert [source.class_names[label] for label in train.labels] == ["dog", "big cat", "ant", "7"]
    assert reasons(train) == [
        "label 'nan' is no word",
        "'5.png' is no path and label",
        "'my 6.png' is no path and label",
    ]
    known = open_source(folder, known=["dog", "ant"])
    assert known.class_names == ["dog", "ant"]
    assert known.splits["train"].labels == [0, 1]
    assert reasons(known.splits["test"]) == ["the model has no class 'bee'"]


def test_the_models_classes_hold_where_lists_have_fewer(tmp_path):
    folder = listed(tmp_path / "mine", ["0.png 0", "1.png 1"])
    assert open_source(folder, known=["0", "1", "2"]).class_names == ["0", "1", "2"]
    with pytest.raises(ValueError, match="has the classes 0 to 1, the model has 1 classes: 0"):
        open_source(folder, known=["0"])
    with pytest.raises(ValueError, match="has the classes 0 to 1, the model has 2 classes: cat, d"):
        open_source(folder, known=["cat", "dog"])


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_encodings_and_ends_of_lines(tmp_path, encoding, end):
    text = end.join(["0.png 0", "1.png\t1", "  2.png   2  ", ""])
    split = open_source(listed(tmp_path / "mine", text, encoding=encoding)).splits["train"]
    assert split.labels == [0, 1, 2] and split.refused == ()
    assert all(os.path.isfile(name) for name in split.names)


@pytest.mark.parametrize("end", ["\u2028", "\x85", "\x0b", "\x0c"])
def test_other_ends_of_lines_are_named(tmp_path, end):
    folder = listed(tmp_path / "mine", f"0.png 0\n1.png 1\n2.png 2{end}3.png 0\n4.png 1{end}\n")
    split = open_source(folder).splits["train"]
    assert split.labels == [0, 1, 1]
    assert reasons(split) == [f"{f'2.png 2{end}3.png 0'!r} is no path and label"]


def test_lists_and_json_that_cannot_be_used_are_one_line(tmp_path):
    folder = listed(tmp_path / "mine", "", encoding="utf-8")
    (folder / "train800.txt").write_bytes(b"caf\xe9.png 0\n")
    with pytest.raises(ValueError, match=r"train800.txt is no text in UTF-8 or UTF-16: .*0xe9"):
        open_source(folder)
    listed(folder, ["0.png 0", "0.png", "1.png 0", "2.png -5"], ["3.png 0"])
    with pytest.raises(ValueError, match=r"has 1 class; .* \(left out: .*line 2: '0.png' is no pa"):
        open_source(folder)
    listed(folder, ["0.png 50", "1.png 90"])
    with pytest.raises(ValueError, match=r"train800.*label 50 is out of range, 0 to 0"):
        open_source(folder)
    other = tmp_path / "fgvc"
    other.mkdir()
    for content, message in {
        "[" * 10**5: "train.json is no json file: maximum recursion",
        '{"a": ' * 10**5: "train.json is no json file: maximum recursion",
        '{"images": [{"id": 1}], "annotations": []}': "holds no .*: its 'images' is a list",
        '{"a.jpg": {"label": 3}}': "holds no .*: its 'a.jpg' is an object",
        '[["a.jpg", 3]]': "holds no .* but a list",
        "3": "holds no .* but a int",
        "{}": "train.json has no entry that can be used: it is empty",
        '{"a.jpg": 1.5, "b.jpg": NaN}': "used: .*a.jpg: class id 1.5 is no .*id nan is",
        f'{{"a.jpg": {HUGE}, "b.jpg": "{HUGE}"}}': "used: .*a.jpg: class id '9999.* is no whole nu",
        '{"a.jpg": 1, "b.jpg": null, "c.jpg": true}': r"has 1 class; .*b.jpg: class id None is no",
    }.items():
        (other / "train.json").write_text(content)
        with pytest.raises(ValueError, match=message) as caught:
            open_source(other)
        assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_json_with_words_and_duplicate_keys(tmp_path, encoding):
    for number in range(4):
        write_image(tmp_path / f"{number}.png", number % 3, number)
    text = '{"0.png": "dog", "1.png": "cat", "2.png": 2, "0.png": "cat", "3.png": "cat"}'
    (tmp_path / "train.json").write_bytes(text.encode(encoding))
    source = open_source(tmp_path)
    assert source.class_names == ["2", "cat", "dog"]
    assert source.splits["train"].labels == [2, 1, 0, 1, 1]
    again, labels = source.warnings
    assert again.startswith("1 images are in train more than once: ")
    assert labels.startswith("1 images have two labels: ") and labels.endswith("0.png (cat, dog)")
    (tmp_path / "train.json").write_text(json.dumps({"0.png": "1", "1.png": 3, "2.png": "cat"}))
    source = open_source(tmp_path)
    assert source.class_names == ["1", "3"]
    assert reasons(source.splits["train"]) == ["class id 'cat' is no whole number"]


def test_images_in_two_splits_are_found_by_their_files(tmp_path):
    make_folders(tmp_path, train=2)
    train, val = tmp_path / "train", tmp_path / "val"
    for name in ("blue", "green", "red"):
        write_image(val / name / "own.png", 0, 7000 + len(name))
    (val / "blue" / "link.png").symlink_to(train / "blue" / "0.png")
    os.link(train / "green" / "1.png", val / "green" / "hard.png")
    shutil.copy(train / "red" / "0.png", val / "red" / "copy.png")
    shutil.copy(train / "red" / "1.png", val / "blue" / "elsewhere.png")
    for number in range(2):  # of one size, and damaged: nothing is equal
        (val / "red" / f"{number}.png").write_bytes(bytes([number]) * 1000)
        (val / "red" / f"empty{number}.png").write_bytes(b"")
    long = 2**17 * b"x"
    for number in range(3):  # that differ at their end only, two of them
        (val / "green" / f"long{number}.png").write_bytes(long + bytes([number // 2]))
    found = {line.partition(": ")[0]: line for line in open_source(tmp_path).warnings}
    assert set(found) == {
        "4 images are in both train and val",
        "1 images are in val more than once",
        "1 images have two labels",
    }
    assert found["1 images are in val more than once"].endswith("long1.png")
    assert found["1 images have two labels"].endswith("red/1.png (blue, red)")


def test_words_of_several_words_without_tabs(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text("a b.JPG black cat\nx/c.png red\nno_end 3\nd.png e.png 7\n")
    assert read_list(path) == [
        (1, "a b.JPG", "black cat"),
        (2, "x/c.png", "red"),
        (3, "no_end", "3"),
        (4, "d.png e.png", "7"),
    ]


@pytest.mark.parametrize("name", ["n" * 5000, "\\u0000", "\\ud800"])
def test_names_that_no_file_can_have(name: str, tmp_path: Path) -> None:
    """Their entries cannot be decoded, and stop neither reading nor the run's record."""
    (tmp_path / "train.json").write_text(f'{{"{name}.png": 1, "b.png": 2}}')
    source = open_source(tmp_path)
    assert source.splits["train"].labels == [0, 1]
    with pytest.raises(ValueError, match="cannot be decoded"):
        source.splits["train"].load(0, 3)
    assert len(data_digest(tmp_path, source)) == 64
