"""Bytes of a training step by number of prompts and of prompted blocks, for every provider."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from tqdm import tqdm

from vpt_fast.analysis.activation_memory import PLAIN, PROVIDERS
from vpt_fast.methods import Method, VPTDeep

COUNTED, MEASURED = "counted", "measured"
FIRST, LAST, ALL = "first", "last", "all"


class Meter(Protocol):
    """Object that tells how many bytes a training step takes."""

    def bytes_of(self, method: Method, provider: str, batch_size: int) -> int:
        """Return the bytes of a step; see `activation_memory.SavedBytes.bytes_of`."""
        ...


@dataclass(frozen=True)
class Setting:
    """Settings of a whole profile.

    Attributes:
        model: Name of the timm model.
        method: Method, whose number of prompts and blocks the points replace.
        depth: Number of the model's blocks.
        batch_size: Number of images of a step.
        dtype: Dtype of weights and images, such as "bfloat16".
        image_size: Height and width of the images, in pixels.
    """

    model: str
    method: Method
    depth: int
    batch_size: int
    dtype: str
    image_size: tuple[int, int]


@dataclass(frozen=True)
class Point:
    """Number and position of the prompts.

    Attributes:
        num_prompts: Number of prompts of each prompted block.
        blocks: Number of prompted blocks.
        end: Which of the model's blocks have prompts: the `FIRST`, the `LAST` or `ALL`.
    """

    num_prompts: int
    blocks: int
    end: str


@dataclass(frozen=True)
class Row:
    """Bytes that one provider takes at one point; `kind` is `COUNTED` or `MEASURED`."""

    kind: str
    point: Point
    provider: str
    bytes: int


def points_of(
    method: Method, depth: int, num_prompts: int, prompts: Iterable[int]
) -> dict[Point, Method]:
    """Return every point of a profile once, with its method.

    Args:
        method: Method to vary. LinearProbe has one point; only VPTDeep has blocks to choose.
        depth: Number of the model's blocks.
        num_prompts: Number of prompts where the number of prompted blocks varies.
        prompts: Numbers of prompts where all of the method's blocks have prompts.

    Raises:
        ValueError: If a number of prompts is below 0, or `prompts` is empty.
    """
    if "num_prompts" not in {field.name for field in fields(method)}:
        return {Point(0, 0, ALL): method}
    varied: Any = method
    blocks = len(replace(varied, num_prompts=1).prompted_blocks(depth))
    end = ALL if blocks == depth else FIRST
    found: dict[Point, Method] = {
        Point(count, blocks, end): replace(varied, num_prompts=count)
        for count in sorted(set(prompts))
    }
    if not found:
        raise ValueError("there are no numbers of prompts; give at least one, such as 50")
    if isinstance(method, VPTDeep):
        deep = replace(method, num_prompts=num_prompts)
        for count in range(1, depth):
            found[Point(num_prompts, count, FIRST)] = replace(deep, blocks=range(count))
        for count in range(1, depth):
            last = range(depth - count, depth)
            found[Point(num_prompts, count, LAST)] = replace(deep, blocks=last)
        found.setdefault(Point(num_prompts, depth, ALL), deep)
    return found


def profile(
    setting: Setting,
    points: Mapping[Point, Method],
    meters: Mapping[str, Meter],
    progress: bool = True,
    log: Callable[[str], None] = print,
    providers: Sequence[str] = PROVIDERS,
) -> list[Row]:
    """Return the rows of every meter: the model without prompts, then all points and providers.

    Args:
        setting: Settings of all rows.
        points: Points that `points_of` returns, with their methods.
        meters: Meters by the kind of their rows.
        progress: Whether to show a bar on a terminal.
        log: Function called with a line for each step that runs out of memory and has no row.
        providers: Providers to compare, of `vpt_fast.analysis.activation_memory.PROVIDERS`.

    Raises:
        TypeError, ValueError: If a meter refuses the batch size, the method or the model.
    """
    wanted = [(Point(0, 0, ALL), setting.method, PLAIN)]
    wanted += [(point, method, name) for point, method in points.items() for name in providers]
    rows = []
    disable = None if progress else True
    for kind, meter in meters.items():
        for point, method, provider in tqdm(wanted, kind, leave=False, disable=disable):
            try:
                count = meter.bytes_of(method, provider, setting.batch_size)
            except torch.OutOfMemoryError:
                log(f"{kind}: {provider}, {words(point, method)}: out of memory, left out")
                continue
            rows.append(Row(kind, point, provider, count))
    return rows


def words(point: Point, method: Method) -> str:
    """Return a point in words, such as "50 prompts, first 3 blocks"."""
    if not point.blocks:
        return method.name
    prompts = prompts_in_words(point.num_prompts)
    if not isinstance(method, VPTDeep):
        return prompts
    if point.blocks == 1:
        return f"{prompts}, {point.end} block"
    return f"{prompts}, {point.end} {point.blocks} blocks"


def prompts_in_words(count: int) -> str:
    """Return a number of prompts in words: 1 prompt, 2 prompts."""
    return f"{count} prompt{'' if count == 1 else 's'}"
