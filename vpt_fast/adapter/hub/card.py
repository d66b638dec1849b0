"""Model card of an adapter: a README.md with the metadata that the Hugging Face Hub reads."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from safetensors import safe_open
from timm.models import get_pretrained_cfg

from vpt_fast.adapter.atomic import atomic_file
from vpt_fast.adapter.files import CARD_FILE, TENSORS_FILE, read_config
from vpt_fast.backbones.demo_backbone import DEMO_CHECKPOINT
from vpt_fast.methods import Method, from_dict

PLACE = "path/or/hf-hub:user/name"
"""Name of the adapter in a card that was not pushed; `push_adapter` replaces it."""

_CLASSES = 20
"""Number of classes that a card names."""


def card_text(
    config: Mapping[str, Any],
    trained: int,
    *,
    metrics: Mapping[str, float] | None = None,
    dataset: str | None = None,
    license: str | None = None,
) -> str:
    """Return the model card of an adapter, in Markdown.

    Args:
        config: Configuration of the adapter.
        trained: Number of its trained scalars.
        metrics: Results in percent by name, such as {"test top-1": 91.5}.
        dataset: Name of the data set that they were measured on.
        license: Licence of the adapter, as the Hub names it, such as "apache-2.0".

    Raises:
        ValueError, TypeError: If a result has no name, or is no finite number.
    """
    for name, value in (metrics or {}).items():
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"metrics has the name {name!r}; name what was measured")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"metrics[{name!r}] is {value!r}; give a number in percent")
        if not math.isfinite(value):
            raise ValueError(f"metrics[{name!r}] is {value}; leave out what was not measured")
    model, method = config["model"], from_dict(config["method"])
    base = _base_model(model)
    name = model.get("name") or "a model of timm's"
    title = f"{type(method).__name__} adapter of {name}"
    results = [
        EvalResult(
            task_type="image-classification", dataset_type="imagefolder", dataset_name=dataset,
            metric_type="accuracy" if metric.endswith("top-1") else metric.split()[-1],
            metric_name=metric, metric_value=round(value, 2),
        )
        for metric, value in (metrics or {}).items()
    ] if dataset else None  # fmt: skip
    data = ModelCardData(
        base_model=base,
        library_name="vpt_fast",
        license=license,
        pipeline_tag="image-classification",
        tags=["vpt_fast", "timm", "visual-prompt-tuning", method.name],
        model_name=title if results else None,
        eval_results=results,
    )
    rows = {
        "Base model": _linked(base) if base else _weights(model),
        "Licence of the base model": _base_license(model),
        "Method": _described(method),
        "Trained": f"{trained:,} scalars",
        "Classes": _classes(config),
        "Images": " x ".join(map(str, config["input"]["input_size"])),
        **{_cell(name): f"{value:.2f}%" for name, value in (metrics or {}).items()},
        "Data set": _cell(dataset or ""),
        "Licence": _cell(license or "not stated"),
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items() if value)
    versions = ", ".join(f"{_cell(k)} {_cell(v)}" for k, v in config["versions"].items())
    text = (
        f"---\n{data.to_yaml()}\n---\n\n# {title}\n\n| | |\n|---|---|\n{table}\n\n"
        f"```python\n{_loading(config)}\n```\n\n"
        f"It holds what was trained, nothing of the backbone; {versions}.\n"
    )
    # Names of folders may have no valid encoding.
    return text.encode("utf-8", "backslashreplace").decode()


def write_card(directory: Path, **options: Any) -> None:
    """Write the model card of a saved adapter anew.

    Args:
        directory: Folder of the adapter.
        **options: `metrics`, `dataset` and `license` of `card_text`.
    """
    text = card_text(read_config(directory), trained_scalars(directory), **options)
    with atomic_file(directory / CARD_FILE, "w", encoding="utf-8") as file:
        file.write(text)


def trained_scalars(directory: Path) -> int:
    """Return the number of scalars in an adapter's tensors, whose values are not read.

    Raises:
        SafetensorError: If the file is damaged.
    """
    with safe_open(str(directory / TENSORS_FILE), "np") as file:
        return sum(math.prod(file.get_slice(n).get_shape()) for n in file.keys())  # noqa: SIM118


def _loading(config: Mapping[str, Any]) -> str:
    own = config["model"].get("checkpoint")
    call = "sigmoid()" if config.get("multi_label") else "softmax(-1)"
    weights = ""
    if own and own != DEMO_CHECKPOINT.name:
        weights = f", checkpoint={json.dumps(f'path/of/{own}')}"
    return (
        "import timm, vpt_fast\n"
        f'model = vpt_fast.load_adapter(None, "{PLACE}"{weights})\n'
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))\n"
        f"probabilities = model(transform(image)[None]).{call}  # image: PIL's, in RGB"
    )


def _base_model(model: Mapping[str, Any]) -> str | None:
    """Return the base model's name on the Hub, if its weights come from there."""
    source, name, tag = (model.get(key) for key in ("source", "name", "pretrained_tag"))
    if model.get("checkpoint"):
        return None
    if source and source.startswith("hf-hub:"):
        return str(source.removeprefix("hf-hub:").partition("@")[0])
    return f"timm/{name}.{tag}" if name and tag and not source else None


def _base_license(model: Mapping[str, Any]) -> str | None:
    if model.get("source") or model.get("checkpoint") or not model.get("name"):
        return None
    known = get_pretrained_cfg(".".join(filter(None, (model["name"], model["pretrained_tag"]))))
    return getattr(known, "license", None)


def _linked(name: str) -> str:
    return f"[{name}](https://huggingface.co/{name})"


def _weights(model: Mapping[str, Any]) -> str:
    name, own = model.get("name") or "of timm's", model.get("checkpoint")
    return f"{name}, weights of {_cell(own)}" if own else f"{name}, weights of its own"


def _described(method: Method) -> str:
    """Return the call that makes a method, without what is the default, and its paper."""
    given = []
    for field in fields(method):
        value = getattr(method, field.name)
        if field.default is MISSING or value != field.default:
            given.append(f"{field.name}={value!r}")
    call = f"`{type(method).__name__}({', '.join(given)})`"
    paper = getattr(method, "paper", None)
    return f"{call}, {paper}" if paper else call


def _classes(config: Mapping[str, Any]) -> str:
    count = config["model"].get("args", {}).get("num_classes")
    names = config["class_names"]
    if not names:
        return f"{count}, without names"
    shown = [_cell(name) for name in names[:_CLASSES]]
    return f"{len(names)}: {', '.join(shown)}{', ...' if len(names) > _CLASSES else ''}"


def _cell(text: Any) -> str:
    """Return a text as Markdown shows it, in a cell of a table."""
    plain = html.escape(" ".join(str(text).split()), quote=False)
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", plain)
