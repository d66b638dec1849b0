"""Texts of a report: methods, recipes, and reasons that runs cannot be compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from vpt_fast.reports.page.runs import RunFolder
from vpt_fast.train.common.recipe import Recipe

# Fields that `describe_recipe` has phrases for.
_TOLD = {
    "opt", "lr", "batch_size", "weight_decay", "epochs", "warmup_epochs", "amp_dtype", "seed",
    "momentum",
}  # fmt: skip
_PLAIN = {field.name: field.default for field in fields(Recipe)}


def describe_method(method: Mapping[str, Any]) -> str:
    """Return the fields of a method that are set, such as "num_prompts 10, dropout 0.1"."""
    fields = [(name, value) for name, value in method.items() if name != "name"]
    # Those of this package are False unless they are chosen; of others it is not known.
    every = "defined_in" in method
    return ", ".join(
        f"{name} {_value(value)}"
        for name, value in fields
        if _is_set(value) or (every and value is False)
    )


def describe_recipe(recipe: Mapping[str, Any]) -> str:
    """Return a recipe in one line; fields that differ from the usual follow by name."""
    parts = []
    if "opt" in recipe:
        parts.append(str(recipe["opt"]))
    if "lr" in recipe and "batch_size" in recipe:
        parts.append(f"lr {_value(recipe['lr'])} × {recipe['batch_size']} / 256")
    if "weight_decay" in recipe:
        parts.append(f"weight decay {_value(recipe['weight_decay'])}")
    if "epochs" in recipe:
        warmup = recipe.get("warmup_epochs")
        parts.append(f"{recipe['epochs']} epochs" + (f" ({warmup} of warm-up)" if warmup else ""))
    parts += [str(recipe[name]) for name in ("amp_dtype",) if name in recipe]
    if "seed" in recipe:
        parts.append(f"seed {recipe['seed']}")
    parts += [
        f"{name} {_value(value)}"
        for name, value in recipe.items()
        if name not in _TOLD and _PLAIN.get(name) != value and _is_set(value)
    ]
    return ", ".join(parts)


def settings_of(run: RunFolder) -> list[tuple[str, str]]:
    """Return all recorded settings of a run, by section."""
    record = run.record
    if record is None:
        return []
    groups: dict[str, Mapping[str, Any]] = {
        "model": record.model,
        "method": record.method,
        "recipe": record.recipe,
        "augmentation": record.augmentation,
        "images": record.image_options,
        "options": record.options,
        "data": record.data,
        "number of images": record.images,
        "versions": record.versions,
    }
    return [
        (group, ", ".join(f"{name} {_value(value)}" for name, value in values.items()))
        for group, values in groups.items()
    ]


def test_accuracy(run: RunFolder, found: Mapping[str, Any] | None) -> float | None:
    """Return the accuracy on test in percent: the recorded one, else that of this evaluation.

    Of images with several labels it is the mAP.
    """
    if run.record is not None and run.record.test is not None:
        return float(_score(run.record.test))
    return _score(found) if found is not None and found["split"] == "test" else None


def _score(figures: Mapping[str, Any]) -> float:
    found: float = figures["map"] if "map" in figures else figures["top1"]
    return found


def differences(runs: Sequence[tuple[RunFolder, Mapping[str, Any] | None]]) -> list[str]:
    """Return sentences on why figures of runs cannot be compared, or differ from the recorded ones.

    Args:
        runs: Runs, each with its evaluation: split, directory, images, top1 and a digest of the
            names of the images.
    """
    notes = []
    found = [(run, now) for run, now in runs if now is not None]
    classes = {tuple(run.class_names) for run, _ in runs if run.class_names is not None}
    if len(classes) > 1:
        notes.append("The runs have different classes: their accuracies cannot be compared.")
    if len({"map" in now for _, now in found}) > 1:
        notes.append("Accuracies of some runs are mAP, of others top-1: they cannot be compared.")
    splits = {now["split"] for _, now in found}
    if len(splits) > 1:
        which = ", ".join(f"{run.name} on {now['split']}" for run, now in found)
        notes.append(f"The runs are evaluated on different splits ({which}).")
    elif len({now["names"] for _, now in found}) > 1:
        which = ", ".join(
            f"{run.name} {now['images']:,} of {now['directory']}" for run, now in found
        )
        notes.append(f"The runs are evaluated on different images ({which}).")
    counts = {tuple(run.record.images.items()) for run, _ in runs if run.record is not None}
    if len(counts) > 1:
        notes.append("The runs were trained with different numbers of images.")
    missing = [run.name for run, now in runs if now is None]
    if missing and found:
        notes.append(f"Not evaluated here: {', '.join(missing)}; see there.")
    for run, now in found:
        if run.record is None or run.record.test is None or now["split"] != "test":
            continue
        recorded = run.record.test
        before, after = _score(recorded), _score(now)
        if recorded["images"] != now["images"] or abs(before - after) > 0.005:
            notes.append(
                f"{run.name} recorded {before:.2f}% on {recorded['images']:,} test "
                f"images when it was trained, and has {after:.2f}% on {now['images']:,} now: "
                "data, weights or precision are not the same."
            )
    return notes


def _is_set(value: Any) -> bool:
    return value is not None and value is not False


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return " ".join(map(_value, value))
    return "none" if value is None else str(value)
