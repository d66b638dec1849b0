"""Folder that `vpt-fast memory` writes: the profile of a model and a method as CSV and PNG."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch

from vpt_fast.analysis.activation_memory import (
    DTYPES,
    EAGER,
    PLAIN,
    PROVIDERS,
    MeasuredPeaks,
    SavedBytes,
)
from vpt_fast.analysis.memory_profile import (
    ALL,
    COUNTED,
    FIRST,
    LAST,
    MEASURED,
    Meter,
    Point,
    Row,
    Setting,
    points_of,
    profile,
    prompts_in_words,
    words,
)
from vpt_fast.backbones import build as backbones
from vpt_fast.methods import Method, VPTDeep, VPTShallow
from vpt_fast.methods.baselines import Baseline
from vpt_fast.models.tuned import blocks_of
from vpt_fast.reports.memory_picture import Panel, format_size, save_panels
from vpt_fast.train.common.curves import format_table
from vpt_fast.train.common.output_folder import Output, starts_with, write_csv
from vpt_fast.train.common.style import named_folder

TABLE_FILE, PICTURE_FILE = "memory.csv", "memory.png"
HEADER = (
    "kind", "model", "method", "num_prompts", "prompted_blocks", "end", "provider", "batch_size",
    "dtype", "image_height", "image_width", "dropout", "bytes", "mib", "device", "torch", "timm",
)  # fmt: skip
FOLDER = Output(
    "memory", starts_with(HEADER, TABLE_FILE), re.compile(r"memory\.(csv|png)"), TABLE_FILE
)
# Only the head's logits and their softmax depend on it.
_CLASSES = 1000
_MIB = 2**20


def report_memory(
    model: str,
    method: Method,
    output: Path,
    *,
    num_prompts: int,
    prompts: Iterable[int],
    batch_size: int = 64,
    img_size: int | None = None,
    dtype: str = "bfloat16",
    overwrite: bool = False,
    progress: bool = True,
    log: Callable[[str], None] = print,
) -> None:
    """Write and log the memory of a training step by prompted blocks and by number of prompts.

    Bytes saved for backward are counted for eager PyTorch, every memory mode of `prompt_tune`, and
    timm's model without prompts, with the gradient flowing through all of its blocks. With a CUDA
    GPU the peak of a real step is measured too. The model has random weights and 1,000 classes.

    Args:
        model: Name of a timm model, or "vpt_fast_demo".
        method: Method whose number of prompts and blocks are varied.
        output: Folder for memory.csv and memory.png, new or empty.
        num_prompts: Number of prompts of each block where the number of prompted blocks varies
            (VPT-Deep only).
        prompts: Numbers of prompts where all of the method's blocks have prompts; 0 stands for no
            prompts, with the gradient still flowing through all of those blocks.
        batch_size: Number of images of a step.
        img_size: Side of the images in pixels; None takes the model's own.
        dtype: Dtype of weights and images, one of `vpt_fast.analysis.activation_memory.DTYPES`.
        overwrite: Whether it may hold an earlier call's files, which are replaced.
        progress: Whether to show a bar on a terminal.
        log: Function called with lines of text.

    Raises:
        ValueError, TypeError: If a name is unknown, a value is out of range, or the model cannot be
            tuned; nothing is written then.
        FileExistsError: If `output` holds something else.
    """
    FOLDER.check(output, overwrite)
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)}")
    name, _, model_args = backbones.resolve_name(model, None, img_size)
    plain: Any = backbones.tunable_on_meta(name, _CLASSES, method, model_args)
    channels, height, width = backbones.data_config_of(plain)["input_size"]
    size = (channels, height, width)
    setting = Setting(model, method, len(blocks_of(plain)), batch_size, dtype, (height, width))
    points = points_of(method, setting.depth, num_prompts, prompts)
    meters: dict[str, Meter] = {COUNTED: SavedBytes(plain, size, DTYPES[dtype])}
    gpu = gpu_meter(name, model_args, size, DTYPES[dtype])
    if gpu is not None:
        meters[MEASURED] = gpu
    providers: tuple[str, ...] = PROVIDERS
    by_rows = isinstance(method, Baseline | VPTShallow | VPTDeep)
    if not by_rows and not hasattr(plain, "blocks"):
        log(f"{setting.model}: {method.name} has no published form here, so {EAGER} is left out")
        providers = tuple(name for name in PROVIDERS if name != EAGER)
    rows = profile(setting, points, meters, progress, log, providers)
    FOLDER.clear(output)
    write_csv(output / TABLE_FILE, HEADER, (_record(setting, row) for row in rows))
    kinds = {kind: [row for row in rows if row.kind == kind] for kind in meters}
    save_panels(
        output / PICTURE_FILE,
        f"{setting.model}, {method.name}",
        f"Memory of a training step: {_described(setting)}; {named_folder(output)}",
        [_panels(setting, found, kind) for kind, found in kinds.items()],
    )
    for kind, found in kinds.items():
        log(f"{setting.model}, {method.name}, {_described(setting)}: {_meaning(kind)}, in MiB")
        log(_table(setting, found))
    log(f"written to {output}: {TABLE_FILE} (all {len(rows)} rows), {PICTURE_FILE}")


def gpu_meter(
    name: str,
    model_args: Mapping[str, Any],
    input_size: tuple[int, int, int],
    dtype: torch.dtype,
) -> Meter | None:
    """Return a meter of a new model on the current CUDA device; None without a device."""
    if not torch.cuda.is_available():
        return None
    model = timm.create_model(name, num_classes=_CLASSES, **dict(model_args))
    device = torch.device("cuda", torch.cuda.current_device())
    return MeasuredPeaks(model, input_size, dtype, device)


def _device(kind: str) -> str:
    return torch.cuda.get_device_name() if kind == MEASURED else "fake tensors"


def _meaning(kind: str) -> str:
    if kind == MEASURED:
        return f"peak of a training step, measured on {_device(kind)}"
    return "saved for backward, counted on fake tensors"


def _described(setting: Setting) -> str:
    height, width = setting.image_size
    dropout = getattr(setting.method, "dropout", 0.0)
    return (
        f"batch {setting.batch_size}, {setting.dtype}, {height} x {width} px"
        + (f", prompt dropout {dropout:g}" if dropout else "")
    )  # fmt: skip


def _record(setting: Setting, row: Row) -> list[Any]:
    point = row.point
    return [
        row.kind, setting.model, setting.method.name, point.num_prompts, point.blocks, point.end,
        row.provider, setting.batch_size, setting.dtype, *setting.image_size,
        getattr(setting.method, "dropout", 0.0), row.bytes, f"{row.bytes / _MIB:.2f}",
        _device(row.kind), torch.__version__, timm.__version__,
    ]  # fmt: skip


def _table(setting: Setting, rows: Sequence[Row]) -> str:
    """Return a table of points by providers, with the quarters of the depth only."""
    found = {(row.point, row.provider): format_size(row.bytes / _MIB) for row in rows}
    quarters = {max(1, round(setting.depth * part / 4)) for part in range(4)}
    deep = isinstance(setting.method, VPTDeep)
    points = [
        point
        for point in dict.fromkeys(row.point for row in rows if row.provider != PLAIN)
        if not deep or point.end == ALL or point.blocks in quarters
    ]
    ends = (ALL, FIRST, LAST)
    points.sort(key=lambda point: (ends.index(point.end), point.num_prompts, point.blocks))
    lines = [
        [words(point, setting.method), *(found.get((point, name), "-") for name in PROVIDERS)]
        for point in points
    ]
    for row in rows:
        if row.provider == PLAIN:
            lines.append([f"timm's model {PLAIN}", format_size(row.bytes / _MIB), *[""] * 4])
    return format_table(["", *PROVIDERS], lines)


def _panels(setting: Setting, rows: Sequence[Row], kind: str) -> list[Panel]:
    plain = next((row.bytes for row in rows if row.provider == PLAIN), None)
    what = "peak of a step" if kind == MEASURED else "saved for backward"
    method, depth = setting.method, setting.depth
    deep = isinstance(method, VPTDeep)
    # Points by depth share one number of prompts; a model of one block has no such points.
    varied = next((row.point.num_prompts for row in rows if deep and row.point.end != ALL), None)

    def panel(title: str, across: str, x_of: Callable[[Point], int | None]) -> Panel:
        lines: dict[str, dict[int, int]] = {name: {} for name in PROVIDERS}
        for row in rows:
            x = x_of(row.point)
            if row.provider != PLAIN and x is not None:
                lines[row.provider][x] = row.bytes
        lines = {name: line for name, line in lines.items() if line}
        return Panel(title, across, f"{what}, {kind}", lines, plain)

    def number(point: Point) -> int | None:
        return None if deep and point.end != ALL else point.num_prompts

    def blocks(end: str) -> Panel:
        def x_of(point: Point) -> int | None:
            inside = point.end in (end, ALL) and point.num_prompts == varied
            return point.blocks if inside else None

        title = f"{end.capitalize()} blocks prompted, {prompts_in_words(varied or 0)} in each"
        return panel(title, "prompted blocks", x_of)

    points = {row.point for row in rows if row.provider != PLAIN and number(row.point) is not None}
    across = "prompts in each block" if deep else "number of prompts"
    if len(points) == 1:
        across = words(points.pop(), method)
    title = f"All {depth} blocks prompted" if deep else ""
    ends = [] if varied is None else [blocks(FIRST), blocks(LAST)]
    return [*ends, panel(title, across, number)]
