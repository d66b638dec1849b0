"""Folder that `vpt-fast inspect` writes: shares and mixing maps as CSV and as pictures."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from vpt_fast.analysis.shares import (
    attention_shares,
    mixing_maps,
    query_name,
    stacked,
    uniform_share,
)
from vpt_fast.reports.equal_maps import equal_blocks
from vpt_fast.reports.inspection_pictures import Mixing, Shares, save_attention, save_mixing
from vpt_fast.train.common.curves import format_table
from vpt_fast.train.common.output_folder import Output, starts_with, write_csv
from vpt_fast.train.common.style import named_folder, percentage
from vpt_fast.train.data import images as data
from vpt_fast.train.data.pictures import load_image, reading

ATTENTION_FILE, MIXING_FILE, PICTURE_FILE = "attention.csv", "mixing.csv", "attention.png"
ATTENTION_HEADER = ("image", "block", "head", "prompt", "share")
MIXING_HEADER = ("block", "prompt", "row", "column", "weight")
FOLDER = Output(
    "inspect",
    starts_with(ATTENTION_HEADER, ATTENTION_FILE),
    re.compile(r"attention\.csv|mixing\.csv|attention(_.+)?\.png|mixing_.+_block\d+\.png"),
    ATTENTION_FILE,
)
# In characters of up to 4 bytes; file systems allow 255 bytes.
_NAME_LENGTH = 56


@dataclass(frozen=True)
class _Inspected:
    """Image with its path, name in file names, pixels (H, W, 3) and shares (blocks, H, p).

    In blocks with fewer heads than H, or fewer prompts than p, the missing ones are NaN.
    """

    path: Path
    name: str
    pixels: np.ndarray
    shares: np.ndarray


def inspect_images(
    model: nn.Module,
    inputs: dict[str, Any],
    paths: Sequence[Path],
    output: Path,
    log: Callable[[str], None] = print,
    run: Path | None = None,
    overwrite: bool = False,
) -> list[str]:
    """Write attention shares and mixing maps of a tuned model for images, and log a summary.

    Args:
        model: Model that was tuned with prompts, on any device.
        inputs: Input configuration, as timm.data.resolve_model_data_config returns it.
        paths: Image files; a path that is given twice counts once.
        output: Folder that is new or empty.
        log: Function called with lines of text.
        run: Folder of the run or adapter, which the pictures name; None takes `output`.
        overwrite: Whether it may hold an earlier call's files, which are replaced.

    Returns:
        A line for each image that could not be decoded. If none could, nothing has been written.

    Raises:
        ValueError: If the model has no prompts, or there are no paths.
        FileExistsError: If `output` holds something else.
    """
    if not paths:
        raise ValueError("there are no images to inspect; give at least one path")
    FOLDER.check(output, overwrite)
    maps = {index: weights.cpu().numpy() for index, weights in mixing_maps(model).items()}
    transform, how = data.eval_transform(inputs), reading(inputs)
    names = image_names(list(dict.fromkeys(paths)))
    found: list[_Inspected] = []
    failed: list[str] = []
    blocks: list[int] = []
    for path, name in names.items():
        try:
            image = load_image(path, **how)
        except ValueError as error:
            failed.append(str(error))
            continue
        tensor = transform(image)
        records = attention_shares(model, _like(model, tensor[None]))
        blocks = [record.block for record in records]
        shares = stacked([record.prompts[0].cpu().numpy() for record in records])
        found.append(_Inspected(path, name, _pixels(tensor, inputs), shares))
    if found:
        FOLDER.clear(output)
        _write_tables(output, found, blocks, maps)
        pictures = _draw(output, model, found, blocks, maps, named_folder(run or output))
        log(_summary(model, found, blocks, maps))
        log(f"written to {output}: {_listing(pictures, maps)}")
    return failed


def image_names(paths: Sequence[Path]) -> dict[Path, str]:
    """Return a unique name for each path: its stem, with the folder's name if stems are equal."""
    stems = Counter(path.stem.casefold() for path in paths)
    names: dict[Path, str] = {}
    taken: set[str] = set()
    for path in paths:
        equal = stems[path.stem.casefold()] > 1
        folder = path.resolve().parent.name
        base = (f"{folder}_{path.stem}" if equal else path.stem)[-_NAME_LENGTH:]
        name, number = base, 1
        while name.casefold() in taken:
            number += 1
            name = f"{base}_{number}"
        taken.add(name.casefold())
        names[path] = name
    return names


def _like(model: nn.Module, images: Tensor) -> Tensor:
    weight = next(model.parameters())
    return images.to(weight.device, weight.dtype)


def _pixels(tensor: Tensor, inputs: dict[str, Any]) -> np.ndarray:
    """Return the image as the model sees it, (H, W, 3) in [0, 1]."""
    mean, std = (torch.tensor(inputs[key]).reshape(-1, 1, 1) for key in ("mean", "std"))
    image = (tensor * std + mean).clamp(0, 1).expand(3, -1, -1)
    return image.permute(1, 2, 0).numpy()


def _write_tables(
    output: Path, found: Sequence[_Inspected], blocks: Sequence[int], maps: dict[int, np.ndarray]
) -> None:
    attention = (
        (image.path, blocks[block], head, prompt, f"{share:.9g}")
        for image in found
        for (block, head, prompt), share in np.ndenumerate(image.shares)
        if not np.isnan(share)
    )
    write_csv(output / ATTENTION_FILE, ATTENTION_HEADER, attention)
    if maps:
        mixing = (
            (block, *position, f"{weight:.9g}")
            for block, weights in maps.items()
            for position, weight in np.ndenumerate(weights)
        )
        write_csv(output / MIXING_FILE, MIXING_HEADER, mixing)


def _draw(
    output: Path,
    model: Any,
    found: Sequence[_Inspected],
    blocks: Sequence[int],
    maps: dict[int, np.ndarray],
    run: str,
) -> int:
    """Draw all pictures, whose titles name the run, and return how many."""
    count = len(found)
    mean = np.mean([image.shares for image in found], axis=0)
    title = f"Attention to prompts of {run}"
    whose = f"mean over {count} images" if count > 1 else found[0].name
    subtitle = f"Share of the attention of the {query_name(model)}, "
    uniform = uniform_share(model)
    pixels = None if count > 1 else found[0].pixels
    everything = Shares("", blocks, mean)
    save_attention(output / PICTURE_FILE, [everything], title, subtitle + whose, uniform, pixels)
    for image in found if count > 1 else []:
        save_attention(
            output / f"attention_{image.name}.png",
            [Shares("this image", blocks, image.shares), Shares(f"mean of {count}", blocks, mean)],
            f"{title}: {image.name}",
            f"{subtitle}in this image and as the mean over {count} images",
            uniform,
            image.pixels,
        )
    drawn = equal_blocks(maps)
    for image in tqdm(found, desc="pictures", unit="image", leave=False, disable=None):
        for same in drawn:
            block, weights = same[0], maps[same[0]]
            shares = np.nanmean(image.shares[blocks.index(block)], axis=0)
            side = [
                pixels // n
                for pixels, n in zip(image.pixels.shape, weights.shape[1:], strict=False)
            ]
            mixing = Mixing(
                same, weights, (side[0], side[1]), shares, image.pixels, f"{image.name}, {run}"
            )
            save_mixing(output / f"mixing_{image.name}_block{block:02}.png", mixing)
    return 1 + (count if count > 1 else 0) + count * len(drawn)


def _summary(
    model: Any, found: Sequence[_Inspected], blocks: Sequence[int], maps: dict[int, np.ndarray]
) -> str:
    method = model.tune_record.method
    mean = np.mean([image.shares for image in found], axis=0)  # (blocks, H, p)
    rows, counts = [], []
    for block, shares in zip(blocks, mean, strict=True):
        missing = np.isnan(shares)
        shares = shares[~missing.all(axis=1)][:, ~missing.all(axis=0)]
        heads, prompts = shares.sum(axis=1), shares.mean(axis=0)
        best = int(prompts.argmax())
        counts.append(len(prompts))
        rows.append(
            [
                str(block),
                percentage(heads.mean()),
                f"{percentage(heads.min())} to {percentage(heads.max())}",
                f"{best} ({percentage(prompts[best])})",
                *([_spread(maps.get(block))] if maps else []),
            ]
        )
    header = ["block", "share of prompts", "over heads", "largest prompt"]
    header += ["maps differ by"] if maps else []
    return (
        f"{method.name}, {_range(counts)}, "
        f"{_count(len(found), 'image')}: share of the attention of the "
        f"{query_name(model)} (uniform attention: {100 * uniform_share(model):.2f}%)\n"
        f"{format_table(header, rows)}"
    )


def _spread(weights: np.ndarray | None) -> str:
    """Return how much a block's mixing maps differ between prompts: 0% if all are equal."""
    if weights is None:
        return "static"
    size = float(np.linalg.norm(weights))
    if not size:
        return "all zero"
    return f"{100 * float(np.linalg.norm(weights - weights.mean(axis=0))) / size:.3g}%"


def _listing(pictures: int, maps: dict[int, np.ndarray]) -> str:
    tables = [ATTENTION_FILE, *([MIXING_FILE] if maps else [])]
    return f"{', '.join(tables)}, {_count(pictures, 'picture')} (PNG)"


def _range(counts: Sequence[int]) -> str:
    least, most = min(counts), max(counts)
    return _count(most, "prompt") if least == most else f"{least} to {most} prompts"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
