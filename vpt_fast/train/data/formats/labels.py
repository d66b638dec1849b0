"""Labels in lists of images: whole numbers or words."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vpt_fast.train.data.formats.class_folders import is_image


class Pairs(list[tuple[str, Any]]):
    """Items of a json object, of which several may have the same key."""


def whole(label: object) -> int | None:
    """Return a label that is a whole number as an int; else None."""
    if isinstance(label, str) and re.fullmatch("[+-]?[0-9]{1,18}", label.strip()):
        return int(label)
    return label if isinstance(label, int) and not isinstance(label, bool) else None


def word(label: object) -> str | None:
    """Return a label that is a word, stripped; else None, as for "1.5", "1e3" and "nan"."""
    if not isinstance(label, str) or not label.strip():
        return None
    try:
        float(label)
    except ValueError:
        return label.strip()
    return None


def are_words(labels: Iterable[object]) -> bool:
    """Return whether more of the labels are words than whole numbers."""
    kinds = [0 if whole(label) is not None else 1 for label in labels if is_class(label)]
    return 2 * sum(kinds) > len(kinds)


def is_class(label: object) -> bool:
    """Return whether a label is a whole number or a word."""
    return whole(label) is not None or word(label) is not None


def name_of(label: object, words: bool) -> str | None:
    """Return the name of a label's class, or None if the label is not of that kind.

    Args:
        label: Label as it was read.
        words: Whether classes are words rather than whole numbers.
    """
    number = whole(label)
    if words:
        return word(label) or (None if number is None else str(label).strip())
    return None if number is None else str(number)


def consecutive(labels: Sequence[object]) -> list[str]:
    """Return names "0" to the largest label that is below the number of labels."""
    numbers = (whole(label) for label in labels)
    fitting = (number for number in numbers if number is not None and number < len(labels))
    return [str(number) for number in range(1 + max(fitting, default=-1))]


def range_of(names: Sequence[str], entries: int) -> str:
    """Return the range of valid numbers as text."""
    return f"0 to {len(names) - 1}" if names else f"0 to {entries - 1} of so few entries"


def short(label: object) -> str:
    """Return a label as text for a message, shortened to 80 characters."""
    text = repr(label) if isinstance(label, str) else str(label)
    return text if len(text) <= 80 else f"{text[:77]}..."


def read_list(path: Path) -> list[tuple[int, str, str | None]]:
    """Return number, image and label of each line of a list of "image label".

    Image and label, which may be several words, are separated by the last tab, else by the last
    space after the name of an image file, else by the last space. For a line without both, the
    label is None and the image is the line.

    Raises:
        ValueError: If the file is no text in UTF-8, UTF-16 or UTF-32.
    """
    found: list[tuple[int, str, str | None]] = []
    for number, line in enumerate(re.split("\r\n|\r|\n", read_text(path)), 1):
        image, label = _separated(line.strip())
        if not line.strip():
            continue
        # A form feed or U+2028 ends a line for some programs, and file names contain none.
        good = image.strip() and not is_image(label) and len(line.strip().splitlines()) == 1
        found.append((number, image.strip(), label) if good else (number, line, None))
    return found


def _separated(line: str) -> tuple[str, str]:
    if "\t" not in line:
        words = line.split(" ")
        for count in range(len(words) - 1, 0, -1):
            if is_image(words[count - 1]):
                return " ".join(words[:count]), " ".join(words[count:])
    image, _, label = line.rpartition("\t" if "\t" in line else " ")
    return image, label


def read_json(path: Path) -> Any:
    """Return the content of a json file, with `Pairs` for objects and long numbers as strings.

    Raises:
        ValueError: If it is no json file.
    """
    try:
        return json.loads(
            read_text(path),
            object_pairs_hook=Pairs,
            parse_int=lambda digits: int(digits) if len(digits) <= 18 else digits,
        )
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no json file: {error}") from error


def read_text(path: Path) -> str:
    """Return the content of a text file, without a byte order mark.

    Raises:
        ValueError: If it is no text in UTF-8, UTF-16 or UTF-32.
    """
    content = path.read_bytes()
    try:
        return content.decode(json.detect_encoding(content))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 or UTF-16: {error}") from error
