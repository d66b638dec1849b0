"""Check that a resumed run has the settings it was started with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from vpt_fast.methods import METHODS
from vpt_fast.train.common.differences import first_difference, plain
from vpt_fast.train.common.recipe import Recipe
from vpt_fast.train.data.augmentation import Augmentation
from vpt_fast.train.data.image_options import ImageOptions
from vpt_fast.train.run.record import RunRecord

_FLAGS = {"antialias": "no_antialias", "exif": "no_exif"}
"""Options that negate their field."""
_OPTIONS = {"cache": "auto", "prefix_cache": True, "device": None, "rewind": None}
"""Defaults of the options that are compared. `memory`, `workers` and `cuda_graphs` change no bit,
and `loop` compares the number of processes."""


def check_resumed(earlier: RunRecord | None, record: RunRecord) -> None:
    """Raise ValueError if a run was started with other settings than it is resumed with.

    All settings that affect a trained bit are compared; the location of data and weights is not.

    Args:
        earlier: Record in the output folder, or None.
        record: Record of the resumed run.
    """
    if earlier is None:
        return
    for name, before, now, default in _options(earlier, record):
        if before != now:
            raise ValueError(
                f"this run was started {_words(name, before, default)}, not "
                f"{_words(name, now, default, again=True)}; resume with the options that it was "
                "started with"
            )
    for what, before, now in _contents(earlier, record):
        if before is not None and before != now:
            raise ValueError(f"this run was started with other {what}: {_first(before, now)}")


def _options(earlier: RunRecord, record: RunRecord) -> Iterator[tuple[str, Any, Any, Any]]:
    """Yield each option, its values before and now, and its default."""
    for key in ("format", "val_fraction"):
        yield key, earlier.data.get(key), record.data.get(key), None
    for key in ("name", "img_size", "pretrained"):
        name = "model" if key == "name" else key
        yield name, earlier.model.get(key), record.model.get(key), False
    yield "method", earlier.method.get("name"), record.method.get("name"), None
    kind = METHODS.get(str(record.method.get("name")))
    sections = (
        ("method", _defaults(kind) if kind else {}),
        ("recipe", _recipe_defaults(record)),
        ("augmentation", _defaults(Augmentation)),
        ("image_options", _defaults(ImageOptions)),
        ("options", _OPTIONS),
    )
    for section, defaults in sections:
        before, now = getattr(earlier, section), plain(getattr(record, section))
        for key, default in defaults.items():
            usual = plain(default)
            # A version that wrote no such option did as its default does.
            yield key, _device(key, before.get(key, usual)), _device(key, now.get(key)), usual


def _contents(earlier: RunRecord, record: RunRecord) -> Iterator[tuple[str, Any, Any]]:
    yield "classes", earlier.class_names, record.class_names
    yield "numbers of images", earlier.images, record.images
    yield "images", earlier.data.get("digest"), record.data.get("digest")
    yield "weights of the backbone", earlier.model.get("weights"), record.model.get("weights")


def _defaults(kind: Any) -> dict[str, Any]:
    return {field.name: field.default for field in fields(kind)}


def _recipe_defaults(record: RunRecord) -> dict[str, Any]:
    """Return the defaults of a recipe, with the learning rate and warm-up that None stands for."""
    told = {key: record.recipe[key] for key in ("epochs", "opt")}
    standard = Recipe(**told, warmup_epochs=record.recipe["warmup_epochs"])
    lr, warmup = standard.base_lr, Recipe(**told).warmup
    return {**_defaults(Recipe), "lr": lr, "warmup_epochs": warmup}


def _device(key: str, value: Any) -> Any:
    """Return a device without its index, which changes no bit; other values as they are."""
    return str(value).partition(":")[0] if key == "device" and value is not None else value


def _words(name: str, value: Any, default: Any, again: bool = False) -> str:
    """Return an option as the user types it.

    Args:
        name: Name of the option, with underscores.
        value: Its value.
        default: Its default.
        again: Whether the message has named the option already.
    """
    flag = f"--{_FLAGS.get(name, name).replace('_', '-')}"
    if isinstance(value, bool):
        given = value != (name in _FLAGS)
        if again:
            return "with it" if given else "without"
        return f"with {flag}" if given else f"without {flag}"
    parts = value if isinstance(value, list) else ["none" if value is None else value]
    text = " ".join(f"{part:g}" if isinstance(part, float) else str(part) for part in parts)
    if value is not None and value == default:
        text += ", the default"
    return text if again else f"with {flag} {text}"


def _first(before: Any, now: Any) -> str:
    if isinstance(before, dict):
        what, one, other = first_difference(before, now)
        return f"{what} {one}, not {other}"
    if isinstance(before, list) and isinstance(now, list):
        return f"{len(before)}, not {len(now)}" if len(before) != len(now) else _item(before, now)
    return "their checksum is another"


def _item(before: list[Any], now: list[Any]) -> str:
    pairs = zip(before, now, strict=True)
    return next(f"{one}, not {other}" for one, other in pairs if one != other)
