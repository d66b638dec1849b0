"""Checks of an adapter's configuration: types and ranges. Nothing is opened or fetched."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping
from typing import Any, NoReturn

from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer

_LARGEST = 1 << 16
"""Largest width, depth, image size and other count."""
_TYPES: dict[str, tuple[type, ...]] = {
    "format_version": (int,),
    "method": (dict,),
    "model": (dict,),
    "input": (dict,),
    "class_names": (list, type(None)),
    "versions": (dict,),
    "fingerprint": (dict,),
    "tensors_sha256": (str,),
}
# The other arguments of `timm.create_model` itself name files and addresses.
_OVERLAY = "pretrained_cfg_overlay"
_ARGUMENTS = {
    name
    for model in (VisionTransformer, SwinTransformer, Eva)
    for name in inspect.signature(model.__init__).parameters
} - {"self", "kwargs"}
_MOST_BLOCKS = 512
_INPUT_KEYS = {"input_size", "mean", "std", "crop_pct", "crop_mode", "interpolation"}
_CROP_MODES = ("center", "squash", "border")
_INTERPOLATIONS = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming", "random")
_SOURCE = re.compile(r"hf-hub:[\w.-]+(/[\w.-]+)?(@[\w.-]+)?|local-dir:.+")


def check_config(config: Mapping[str, Any]) -> None:
    """Raise ValueError with name and value unless `save_adapter` could have written `config`.

    Which fields the method takes is left to `vpt_fast.methods.from_dict`.
    """
    for key, types in _TYPES.items():
        if key not in config:
            raise ValueError(f"it has no {key!r}")
        if not isinstance(config[key], types) or isinstance(config[key], bool):
            _wrong(key, config[key], " or ".join(_NAMES[t] for t in types))
    if config["format_version"] < 1:
        _wrong("format_version", config["format_version"], "1 or more")
    names = config["class_names"]
    if names is not None and not all(isinstance(name, str) for name in names):
        _wrong("class_names", names, "a list of strings")
    for key, value in config["method"].items():
        _check_value(f"method.{key}", value)
    _check_model(config["model"])
    classes = config["model"].get("args", {}).get("num_classes")
    if names is not None and classes not in (None, len(names)):
        _wrong("class_names", names, f"{classes} names, one for each class")
    unknown = config["input"].keys() - _INPUT_KEYS - {"exif_transpose"}
    if unknown or "input_size" not in config["input"]:
        _wrong("input", sorted(config["input"]), f"an object of {', '.join(sorted(_INPUT_KEYS))}")
    _check_input(config["input"])
    _check_summaries("fingerprint", config["fingerprint"])
    if not isinstance(config.get("multi_label", False), bool):
        _wrong("multi_label", config["multi_label"], "true or false")
    started = config.get("initialised")
    if started is not None and not (isinstance(started, dict) and _is_count(started.get("images"))):
        _wrong("initialised", started, "an object with a number of images")
    architecture, outputs = config.get("architecture", {}), config.get("fixed_image")
    if not isinstance(architecture, dict):
        _wrong("architecture", architecture, "an object")
    if outputs is not None:
        if not isinstance(outputs, dict) or not isinstance(outputs.get("dtype"), str):
            _wrong("fixed_image", outputs, "an object with a dtype")
        summaries = {name: outputs.get(name) for name in ("features", "logits")}
        _check_summaries("fixed_image", summaries)


_NAMES = {
    int: "a whole number", dict: "an object", list: "a list", str: "a string",
    type(None): "null",
}  # fmt: skip


def _wrong(where: str, value: Any, right: str) -> NoReturn:
    text = repr(value)
    raise ValueError(f"{where} is {text[:80]}{'...' if len(text) > 80 else ''}, not {right}")


def _check_model(model: Mapping[str, Any]) -> None:
    for key in ("width", "depth"):
        if not _is_count(model.get(key)):
            _wrong(f"model.{key}", model.get(key), f"a number from 1 to {_LARGEST}")
    name = model.get("name")
    if name is not None and not (isinstance(name, str) and re.fullmatch(r"[\w.-]+", name)):
        _wrong("model.name", name, "a name of timm's list")
    if model["depth"] > _MOST_BLOCKS:
        _wrong("model.depth", model["depth"], f"a number up to {_MOST_BLOCKS}")
    for key in ("checkpoint", "pretrained_tag"):
        value = model.get(key)
        if not isinstance(value, str | None) or re.search(r"[/\\\x00-\x1f]", value or ""):
            _wrong(f"model.{key}", value, "a name")
    source = model.get("source")
    if source is not None and not (isinstance(source, str) and _SOURCE.fullmatch(source)):
        _wrong("model.source", source, "hf-hub:owner/model or local-dir:path")
    args = model.get("args", {})
    if not isinstance(args, dict):
        _wrong("model.args", args, "an object")
    for key, value in args.items():
        _check_argument(key, value)


def _check_argument(key: str, value: Any) -> None:
    """Raise ValueError unless an argument may be passed on to `timm.create_model`."""
    where = f"model.args.{key}"
    if key == _OVERLAY:
        if not isinstance(value, dict) or not value.keys() <= _INPUT_KEYS:
            _wrong(where, value, f"an object of {', '.join(sorted(_INPUT_KEYS))}")
        _check_input(value)
    elif key not in _ARGUMENTS:
        raise ValueError(
            f"{where} is no argument of timm's VisionTransformer, SwinTransformer or Eva"
        )
    else:
        _check_value(where, value)


def _check_value(where: str, value: Any) -> None:
    if isinstance(value, list):  # Swin's window sizes are pairs
        for item in value:
            _check_value(where, item)
    elif isinstance(value, bool | str | None):
        pass
    elif not isinstance(value, int | float) or not abs(value) <= _LARGEST:
        _wrong(where, value, f"a plain value of at most {_LARGEST}")


def _check_input(values: Mapping[str, Any]) -> None:
    size = values.get("input_size", [1, 1, 1])
    if not (isinstance(size, list) and len(size) == 3 and all(map(_is_count, size))):
        _wrong("input_size", size, "[channels, height, width]")
    for key in ("mean", "std"):
        numbers = values.get(key, [1])
        if not (isinstance(numbers, list) and numbers and all(map(_is_number, numbers))):
            _wrong(key, numbers, "a list of numbers")
        if key == "std" and not all(numbers):
            _wrong(key, numbers, "a list of numbers other than 0")
        # timm gives a model of one channel three of them.
        if key in values and "input_size" in values and len(numbers) not in (1, 3, size[0]):
            _wrong(key, numbers, f"a number for each of {size[0]} channels")
    if not isinstance(values.get("exif_transpose", False), bool):
        _wrong("exif_transpose", values["exif_transpose"], "true or false")
    crop = values.get("crop_pct", 1)
    if not (_is_number(crop) and 0 < crop <= 16):
        _wrong("crop_pct", crop, "a number above 0 and at most 16")
    for key, known in (("crop_mode", _CROP_MODES), ("interpolation", _INTERPOLATIONS)):
        if values.get(key, known[0]) not in known:
            _wrong(key, values[key], f"one of {', '.join(known)}")


def _check_summaries(where: str, summaries: Mapping[str, Any]) -> None:
    for name, summary in summaries.items():
        good = (
            isinstance(summary, dict)
            and isinstance(summary.get("shape"), list)
            and all(isinstance(side, int) for side in summary["shape"])
            and all(_is_number(summary.get(key)) for key in ("norm", "projection"))
        )
        if not good:
            _wrong(f"{where} of {name}", summary, "a shape, a norm and a projection")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _LARGEST


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 1e300 and math.isfinite(value)
