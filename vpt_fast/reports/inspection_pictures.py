"""Pictures of prompts: heat maps of attention shares, token mixing maps over an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from vpt_fast.reports.equal_maps import TOLERANCE, equal_prompts, numbered
from vpt_fast.train.common.style import (
    COLOURS,
    GRID,
    INK,
    MUTED,
    Heading,
    decimal,
    percentage,
    plain_numbers,
    save,
    text_inches,
    wrapped,
)

MIXING_COLUMNS, MIXING_ROWS = 5, 4
_SEQUENTIAL = colormaps["Blues"]
_NEGATIVE, _POSITIVE = COLOURS[0], COLOURS[5]
# Opacity of the largest weight, over an image in pale grey; below it hues are hard to tell.
_OPACITY = 0.9
_DIVERGING = LinearSegmentedColormap.from_list("mixing", [_NEGATIVE, "white", _POSITIVE])
_DPI = 120
# In inches: the image in the corner, with its distance from heading and edge.
_THUMBNAIL, _CORNER = 0.8, 1.3
# Sides of a map, in inches: of one or two in a picture, and of more.
_LARGE, _SMALL, _GAP = 2.4, 1.76, 0.16
_CAPTION, _CAPTION_LINE = 9.5, 0.19
_BAR = 2.5
"""Width of a colour bar that its note fits above, in inches."""


@dataclass(frozen=True)
class Shares:
    """Attention shares of one image, or their mean over images.

    Attributes:
        title: Name of the image, or of the mean.
        blocks: Index of each block whose keys include prompts.
        shares: (blocks, H, p); NaN for heads and prompts that a block lacks.
    """

    title: str
    blocks: Sequence[int]
    shares: np.ndarray


@dataclass(frozen=True)
class Mixing:
    """Token mixing maps of a block, and the image that they are drawn over.

    Attributes:
        blocks: Indices of the block and of those that have the same maps.
        weights: Mixing weights (p, gh, gw) of the first of them.
        patch_size: Height and width of a patch, in pixels.
        shares: Attention share of each prompt in the first of them for this image, (p,).
        image: (H, W, 3) in [0, 1].
        title: Names of the image and of the model.
    """

    blocks: Sequence[int]
    weights: np.ndarray
    patch_size: tuple[int, int]
    shares: np.ndarray
    image: np.ndarray
    title: str


def save_attention(
    path: Path,
    groups: Sequence[Shares],
    title: str,
    subtitle: str,
    uniform: float,
    image: np.ndarray | None = None,
) -> None:
    """Draw, for each group, blocks x heads (all prompts together) and blocks x prompts.

    Args:
        path: PNG file to write.
        groups: Shares to draw one below the other, on common colour scales; all of the same blocks.
        title: First line of the heading.
        subtitle: Second line of the heading.
        uniform: Share of all prompts of the first block together under uniform attention; it and
            that of each of them are marked on the colour bars.
        image: (H, W, 3) in [0, 1], shown in the corner.
    """
    blocks = len(groups[0].blocks)
    count = int((~np.isnan(groups[0].shares[0])).any(axis=0).sum())
    # In inches, from the top: heading, panels with their captions, colour bars. A panel is as wide
    # as its cells and its caption need.
    panel = float(np.clip(0.26 * blocks, 1.1, 5.0))
    labels = "All prompts together", "Each prompt, mean over heads"
    longest = max((f": {group.title}" for group in groups if group.title), key=len, default="")
    heads, prompts = (
        max(float(np.clip(0.55 * cells, _BAR, limit)), text_inches(label + longest, 10.5) + 0.1)
        for cells, limit, label in zip(groups[0].shares.shape[1:], (3.4, 5.5), labels, strict=True)
    )
    second = 0.6 + heads + 1.15
    width = second + prompts + 0.4
    heading = Heading(title, subtitle, width - 0.6 - (0.0 if image is None else _CORNER - 0.3))
    top = max(heading.height, 0.0 if image is None else _THUMBNAIL + 0.2)
    caption, bottom = 0.75, 0.95
    height = top + len(groups) * (panel + caption) + bottom
    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white")
    heading.draw(figure)
    if image is not None:
        _thumbnail(figure, image, _THUMBNAIL)
    panels = (
        (0.6, heads, uniform, "head", labels[0], _together),
        (second, prompts, uniform / count, "prompt", labels[1], _per_prompt),
    )
    for left, wide, even, what, label, reduce in panels:
        maps = [reduce(group.shares) for group in groups]
        highest = max(float(np.nanmax(values)) for values in maps)
        norm = Normalize(0, highest or 1.0)
        for row, (group, values) in enumerate(zip(groups, maps, strict=True)):
            y = height - top - (row + 1) * (panel + caption) + 0.3
            axes = figure.add_axes((left / width, y / height, wide / width, panel / height))
            caption_text = f"{label}: {group.title}" if group.title else label
            _heat_map(axes, values, group.blocks, norm, what, caption_text)
            if what == "head":
                _row_means(axes, values)
        bar = figure.add_axes((left / width, 0.42 / height, wide / width, 0.11 / height))
        _colour_bar(figure, bar, norm, even, int(wide / 0.9))
    save(figure, path)


def _together(shares: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(shares).all(axis=2), np.nan, np.nansum(shares, axis=2))


def _per_prompt(shares: np.ndarray) -> np.ndarray:
    heads = (~np.isnan(shares)).sum(axis=1)
    return np.nansum(shares, axis=1) / np.where(heads, heads, np.nan)


def _heat_map(
    axes: Axes,
    values: np.ndarray,
    blocks: Sequence[int],
    norm: Normalize,
    what: str,
    title: str,
) -> None:
    axes.imshow(values, cmap=_SEQUENTIAL, norm=norm, aspect="auto", interpolation="nearest")
    axes.set_title(title, loc="left", fontsize=10.5, color=INK, pad=5, parse_math=False)
    _label(axes, what, list(range(values.shape[1])), "x")
    _label(axes, "block", list(blocks), "y")
    axes.tick_params(colors=MUTED, labelsize=8.5, length=2.5)
    for spine in axes.spines.values():
        spine.set_color(GRID)


def _label(axes: Axes, what: str, names: Sequence[int], side: str) -> None:
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 1000) if len(names) <= 13 * s)
    ticks = list(range(0, len(names), step))
    axis = axes.xaxis if side == "x" else axes.yaxis
    axis.set_ticks(ticks, [str(names[i]) for i in ticks])
    axis.set_label_text(what, fontsize=9, color=MUTED)


def _row_means(axes: Axes, values: np.ndarray) -> None:
    """Write the mean over heads to the right of each row."""
    step = -(-len(values) // 20)
    for row in range(0, len(values), step):
        axes.text(
            values.shape[1] - 0.5,
            row,
            f" {_percent(float(np.nanmean(values[row])))}",
            fontsize=8.5,
            color=INK,
            va="center",
        )
    axes.annotate(
        "mean", (1, 1), (2, 5), xycoords="axes fraction", textcoords="offset points",
        fontsize=8.5, color=MUTED,
    )  # fmt: skip


def _percent(share: float) -> str:
    return percentage(share, 2 if share < 0.0995 else 1)


def _colour_bar(figure: Figure, axes: Axes, norm: Normalize, even: float, ticks: int) -> None:
    bar = figure.colorbar(ScalarMappable(norm, _SEQUENTIAL), cax=axes, orientation="horizontal")
    bar.ax.xaxis.set_major_locator(MaxNLocator(ticks))
    bar.ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{decimal(100 * value)}%"))
    bar.ax.tick_params(colors=MUTED, labelsize=8.5, length=2.5)
    bar.outline.set_edgecolor(GRID)
    text = f"uniform attention: {_percent(even)}"
    highest = float(norm.vmax or 1.0)
    if even > highest:
        position, text, side = 1.0, f"{text}, off the scale", "right"
    else:
        bar.ax.axvline(even, color=_POSITIVE, linewidth=2)
        position = even / highest
        # Near an end of the bar the text would leave it.
        side = "left" if position < 0.2 else "right" if position > 0.8 else "center"
    bar.ax.annotate(
        text,
        (position, 1),
        xytext=(0, 3),
        textcoords="offset points",
        xycoords="axes fraction",
        ha=side,
        va="bottom",
        fontsize=8.5,
        color=_POSITIVE,
    )


def save_mixing(path: Path, mixing: Mixing) -> None:
    """Draw the maps of the prompts with the largest attention shares, at most 5 x 4 of them.

    Equal maps are drawn once, and named. Colour limits are those of the whole block, so that
    pictures of several images are comparable.
    """
    groups = equal_prompts(mixing.weights)
    groups.sort(key=lambda group: -float(mixing.shares[group].max()))
    shown = groups[: MIXING_COLUMNS * MIXING_ROWS]
    columns = min(MIXING_COLUMNS, len(shown))
    rows = -(-len(shown) // columns)
    wide, tall = _cell(mixing.image, _SMALL if columns > 2 else _LARGE)
    room = wide + 0.1 if columns > 1 else 4.0
    captions = [_caption(group, mixing.shares[group], room) for group in shown]
    caption = 0.16 + _CAPTION_LINE * max(map(len, captions))
    limit = float(np.abs(mixing.weights).max())
    maps = columns * wide + (columns - 1) * _GAP
    width = max(maps + 0.6, 5.6)
    title, subtitle = _mixing_heading(mixing, len(groups), len(shown), limit)
    heading = Heading(title, subtitle, width - 0.3 - _CORNER)
    top, bottom = max(heading.height, _THUMBNAIL + 0.25), 0.8
    height = top + rows * (tall + caption) + bottom
    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white")
    heading.draw(figure)
    _thumbnail(figure, mixing.image, _THUMBNAIL)
    norm = Normalize(-(limit or 1.0), limit or 1.0)
    left = (width - maps) / 2
    for i, group in enumerate(shown):
        row, column = divmod(i, columns)
        x = left + column * (wide + _GAP)
        y = height - top - (row + 1) * (tall + caption) + 0.04
        axes = figure.add_axes((x / width, y / height, wide / width, tall / height))
        _overlay(axes, mixing, group[0], norm)
        axes.set_title("\n".join(captions[i]), fontsize=_CAPTION, color=INK, pad=3)
    bar = figure.add_axes((0.5 - 2 / width, 0.36 / height, 4 / width, 0.11 / height))
    _mixing_bar(figure, bar, norm)
    save(figure, path)


def _mixing_heading(mixing: Mixing, different: int, shown: int, limit: float) -> tuple[str, str]:
    count, others = len(mixing.weights), mixing.blocks[1:]
    which = f"{count} prompt{'s' if count > 1 else ''}"
    if different < count:
        maps = "the same map" if different == 1 else f"{different} different maps"
        which += f" with {maps} (to {100 * TOLERANCE:g}% of the largest weight), drawn once"
    if shown < different:
        which += f"; {shown} of {different} maps"
    parts = [which + (", by attention share in this image" if shown > 1 else "")]
    parts.append(
        "colour: weight of each patch, the same for every image" if limit else "all weights 0"
    )
    if others:
        parts.append(f"{numbered('block', others)}: the same")
    return f"Token mixing of block {mixing.blocks[0]}: {mixing.title}", "; ".join(parts)


def _caption(prompts: Sequence[int], shares: np.ndarray, room: float) -> list[str]:
    name, share = numbered("prompt", prompts), _range(shares)
    together = f"{name} · {share}"
    if text_inches(together, _CAPTION) <= room:
        return [together]
    return [*wrapped(name, room, _CAPTION), *wrapped(share, room, _CAPTION)]


def _range(shares: np.ndarray) -> str:
    low, high = _percent(float(shares.min())), _percent(float(shares.max()))
    return low if low == high else f"{low} to {high}"


def _cell(image: np.ndarray, side: float) -> tuple[float, float]:
    """Return width and height of a map in inches, in the image's proportions."""
    high, wide = image.shape[:2]
    return (side, side * high / wide) if wide >= high else (side * wide / high, side)


def _overlay(axes: Axes, mixing: Mixing, prompt: int, norm: Normalize) -> None:
    high, wide = mixing.image.shape[:2]
    grey = 0.6 + 0.4 * (mixing.image @ np.array([0.299, 0.587, 0.114]))
    axes.imshow(grey, cmap="gray", vmin=0, vmax=1, extent=(0, wide, high, 0), aspect="auto")
    weights = mixing.weights[prompt]
    rows, columns = weights.shape
    ph, pw = mixing.patch_size
    axes.imshow(
        np.where(weights < 0, 0.0, 1.0),
        cmap=LinearSegmentedColormap.from_list("signs", [_NEGATIVE, _POSITIVE], N=2),
        vmin=0,
        vmax=1,
        alpha=_OPACITY * np.abs(norm(weights) - 0.5) * 2,
        extent=(0, columns * pw, rows * ph, 0),
        aspect="auto",
        interpolation="nearest",
    )
    axes.set_xlim(0, wide)
    axes.set_ylim(high, 0)
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color(GRID)


def _mixing_bar(figure: Figure, axes: Axes, norm: Normalize) -> None:
    bar = figure.colorbar(ScalarMappable(norm, _DIVERGING), cax=axes, orientation="horizontal")
    bar.ax.xaxis.set_major_locator(MaxNLocator(4, symmetric=True))
    plain_numbers(bar.ax.xaxis)
    bar.ax.tick_params(colors=MUTED, labelsize=8.5, length=2.5)
    bar.outline.set_edgecolor(GRID)
    bar.ax.set_title("weight of the patch (zero is transparent)", fontsize=8.5, color=MUTED, pad=3)


def _thumbnail(figure: Figure, image: np.ndarray, side: float) -> None:
    """Draw the image in the upper right corner, at most `side` inches wide and high."""
    width, height = figure.get_size_inches()
    high, wide = (side * n / max(image.shape[:2]) for n in image.shape[:2])
    corner = (1 - (0.3 + wide) / width, 1 - (0.14 + high) / height)
    axes = figure.add_axes((*corner, wide / width, high / height))
    axes.imshow(image, interpolation="nearest", aspect="auto")
    axes.set_axis_off()
