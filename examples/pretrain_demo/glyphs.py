"""Letters and symbols drawn from matplotlib's fonts, for pretraining the demo backbone.

Each glyph is drawn once per font into a small bitmap (`GlyphBank`); `render` then makes endless
batches from those bitmaps with tensor operations only: random affine maps, elastic wobble,
stroke thickness, low resolution, colours, backgrounds, noise and occlusion.

No class contains a digit in any form (a test goes through `CLASSES` with `unicodedata`). Letters
that only resemble a digit, such as O, I, Z, S and B, are letters and stay.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

IMAGE_SIZE = 32
"""Side of a rendered image in pixels."""

BITMAP_SIZE = 48
"""Side of a stored glyph bitmap in pixels."""

_GLYPH_SIDE = 36

# Forms that differ only in size or position share a class: a glyph is scaled to its bounding box.
CLASSES: tuple[str, ...] = (
    *("A", "a", "B", "b", "Cc", "D", "d", "E", "e", "F", "f", "G", "g", "H", "h", "Il|", "i"),
    *("J", "j", "K", "k", "L", "M", "m", "N", "n", "Oo", "Pp", "Q", "q", "R", "r", "Ss", "T"),
    *("t", "Uu", "Vv", "Ww", "Xx", "Y", "y", "Zz"),
    *("α", "β", "γ", "δ", "ε", "ζ", "Θθ", "λ", "μ", "ξ", "π", "σ", "φΦ", "ψΨ", "ω"),
    *("Γ", "Δ", "Λ", "Ξ", "Π", "Σ", "Ω"),
    *("Д", "Ж", "И", "Л", "Ц", "Ш", "Ы", "Э", "Ю", "Я", "Ђ", "Ч"),
    *("æ", "Ø", "ŋ", "ə"),
    *("+", "÷", "=", "≠", "≈", "±", "<", ">", "≤", "≥", "∞", "∫", "∂", "∇", "√", "∈", "∃"),
    *("∀", "∩", "⊂", "⊃", "⊕", "⊗", "⊥", "∠", "→", "←", "↑", "↓", "↔", "⇒"),
    *("!", "?", "#", "$", "%", "&", "@", "*", "~", "{", "}", "[", "]", "(", ")", "/", "\\"),
    *("§", "¶", "†", "‡", "©", "®", "€", "£", "¥"),
)
"""The characters of each class. A class name is its characters."""

FONTS: tuple[str, ...] = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique"),
    *("DejaVuSerif", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic"),
    *("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-BoldOblique"),
    *("STIXGeneral", "STIXGeneralBol", "STIXGeneralBolIta"),
    *("cmr10", "cmb10", "cmti10", "cmtt10", "cmmi10"),
)
"""Fonts that pretraining draws from."""

HELD_OUT_FONTS: tuple[str, ...] = (
    *("DejaVuSerif-Bold", "DejaVuSansMono-Oblique", "STIXGeneralItalic", "cmss10"),
)
"""Fonts that pretraining never sees."""


@dataclass(frozen=True)
class GlyphBank:
    """Glyph bitmaps of some fonts.

    Attributes:
        bitmaps: Bitmaps (G, 48, 48) uint8, ink 255 on 0, centred, longer side 36 pixels.
        labels: Index into `CLASSES` of each bitmap, (G,) int64.
        rows: Indices of the bitmaps of each class.
    """

    bitmaps: Tensor
    labels: Tensor
    rows: tuple[Tensor, ...]


def _draw(font: ImageFont.FreeTypeFont, character: str) -> np.ndarray | None:
    """Draw one character, cropped to its ink and centred; None if it has no ink."""
    left, top, right, bottom = (int(v) for v in font.getbbox(character))
    if right - left < 2 or bottom - top < 2:
        return None
    image = Image.new("L", (right - left + 8, bottom - top + 8), 0)
    ImageDraw.Draw(image).text((4 - left, 4 - top), character, font=font, fill=255)
    box = image.getbbox()
    if box is None:
        return None
    image = image.crop(box)
    factor = _GLYPH_SIDE / max(image.size)
    width, height = (max(3, round(side * factor)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.LANCZOS)
    canvas = Image.new("L", (BITMAP_SIZE, BITMAP_SIZE), 0)
    canvas.paste(image, ((BITMAP_SIZE - width) // 2, (BITMAP_SIZE - height) // 2))
    return np.asarray(canvas)


@lru_cache(maxsize=4)
def glyph_bank(fonts: tuple[str, ...] = FONTS) -> GlyphBank:
    """Draw every class in every font that has it.

    The Computer Modern fonts have their own encodings and give only the letters A to Z and a to z.

    Args:
        fonts: Names of matplotlib's TrueType files without the suffix.

    Returns:
        The bitmaps. A class that no font has gets no rows.

    Raises:
        ValueError: If this matplotlib does not bundle a font.
    """
    import matplotlib
    from matplotlib.ft2font import FT2Font

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    bitmaps: list[np.ndarray] = []
    labels: list[int] = []
    for name in fonts:
        path = folder / f"{name}.ttf"
        if not path.is_file():
            known = ", ".join(sorted(p.stem for p in folder.glob("*.ttf")))
            raise ValueError(f"matplotlib bundles no font {name!r}; it has {known}")
        available = set(FT2Font(str(path)).get_charmap())
        font = ImageFont.truetype(str(path), 64)
        for label, characters in enumerate(CLASSES):
            for character in characters:
                ascii_letter = character.isascii() and character.isalpha()
                if ord(character) not in available or (name.startswith("cm") and not ascii_letter):
                    continue
                bitmap = _draw(font, character)
                if bitmap is not None:
                    bitmaps.append(bitmap)
                    labels.append(label)
    targets = torch.tensor(labels, dtype=torch.long)
    rows = tuple((targets == label).nonzero().flatten() for label in range(len(CLASSES)))
    return GlyphBank(torch.from_numpy(np.stack(bitmaps)), targets, rows)


def _uniform(shape: tuple[int, ...], low: float, high: float, rng: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=rng) * (high - low) + low


def _chance(batch: int, probability: float, rng: torch.Generator) -> Tensor:
    return (torch.rand(batch, 1, 1, 1, generator=rng) < probability).float()


def _thicken(ink: Tensor, rng: torch.Generator) -> Tensor:
    """Move each image between eroded, plain, dilated and twice dilated strokes."""
    amount = _uniform((len(ink), 1, 1, 1), -0.6, 1.3, rng)
    thin = -F.max_pool2d(-ink, 3, 1, 1)
    thick = F.max_pool2d(ink, 3, 1, 1)
    thicker = F.max_pool2d(thick, 3, 1, 1)
    out = ink + amount.clamp(-1, 0) * (ink - thin) + amount.clamp(0, 1) * (thick - ink)
    return out + (amount - 1).clamp(0, 1) * (thicker - thick)


def _warp(ink: Tensor, strength: float, rng: torch.Generator) -> Tensor:
    """Apply a random affine map and elastic wobble: (B, 1, 48, 48) to (B, 1, 32, 32)."""
    batch = len(ink)
    angle = torch.randn(batch, generator=rng) * 0.12 * strength
    shear = torch.randn(batch, generator=rng) * 0.15 * strength
    # The side that the glyph's longer side takes, relative to the image.
    size = _uniform((batch,), 0.92 - 0.27 * strength, 0.92 + 0.08 * strength, rng)
    aspect = torch.exp(torch.randn(batch, generator=rng) * 0.16 * strength)
    scale_x = (_GLYPH_SIDE / BITMAP_SIZE) / (size * aspect)
    scale_y = (_GLYPH_SIDE / BITMAP_SIZE) / (size / aspect)
    room = (1.08 - size).clamp_min(0.05) * strength
    shift = _uniform((batch, 2), -1.0, 1.0, rng) * room[:, None]
    cos, sin = angle.cos(), angle.sin()
    theta = torch.stack(
        (
            torch.stack((cos * scale_x, (shear * cos - sin) * scale_x), 1),
            torch.stack((sin * scale_y, (shear * sin + cos) * scale_y), 1),
        ),
        1,
    )
    offset = -(theta @ shift[:, :, None])
    grid = F.affine_grid(
        torch.cat((theta, offset), 2), [batch, 1, IMAGE_SIZE, IMAGE_SIZE], align_corners=False
    )
    coarse = torch.randn(batch, 2, 5, 5, generator=rng)
    coarse = coarse * _uniform((batch, 1, 1, 1), 0.0, 0.05, rng) * strength
    wobble = F.interpolate(coarse, size=IMAGE_SIZE, mode="bicubic", align_corners=True)
    grid = grid + wobble.permute(0, 2, 3, 1)
    return F.grid_sample(ink, grid, mode="bilinear", align_corners=False)


def _occlude(ink: Tensor, strength: float, rng: torch.Generator) -> Tensor:
    """Erase or fill a small rectangle of ink in some images."""
    batch = len(ink)
    axis = torch.arange(IMAGE_SIZE, dtype=torch.float32)
    centre = _uniform((batch, 2, 1), 0, IMAGE_SIZE, rng)
    half = _uniform((batch, 2, 1), 1.0, 4.0, rng)
    inside = ((axis - centre).abs() < half).float()
    mask = inside[:, 0, :, None] * inside[:, 1, None, :]
    mask = mask[:, None] * _chance(batch, 0.1 * strength, rng)
    colour = _chance(batch, 0.3, rng)
    return ink * (1 - mask) + colour * mask


def _coarsen(ink: Tensor, strength: float, rng: torch.Generator) -> Tensor:
    """Resize some images to 16 or 20 pixels a side and back; blur some others.

    A random permutation of the batch decides which images.
    """
    batch = len(ink)
    out = ink.clone()
    start = 0
    order = torch.randperm(batch, generator=rng)
    plan = ((16, "bilinear"), (20, "bicubic"))
    for (side, mode), share in zip(plan, (0.15, 0.1), strict=True):
        stop = start + int(batch * share * strength)
        if stop > start:
            rows = order[start:stop]
            small = F.interpolate(ink[rows], size=side, mode="area")
            out[rows] = F.interpolate(small, size=IMAGE_SIZE, mode=mode, align_corners=False)
        start = stop
    stop = start + int(batch * 0.15 * strength)
    if stop > start:
        out[order[start:stop]] = F.avg_pool2d(ink[order[start:stop]], 3, 1, 1)
    return out.clamp(0, 1)


def _colour(ink: Tensor, strength: float, rng: torch.Generator) -> Tensor:
    """Paint dark ink on a light ground: (B, 1, 32, 32) to (B, 3, 32, 32), both in [0, 1]."""
    batch = len(ink)
    contrast = _uniform((batch, 1, 1, 1), 1 - 0.65 * strength, 1.0, rng)
    low = _uniform((batch, 1, 1, 1), 0.0, 1.0, rng) * (1 - contrast)
    background = low + contrast
    foreground = low
    tinted = _chance(batch, 0.4, rng) * strength
    background = background + torch.randn(batch, 3, 1, 1, generator=rng) * 0.08 * tinted
    foreground = foreground + torch.randn(batch, 3, 1, 1, generator=rng) * 0.12 * tinted
    axis = torch.linspace(-1, 1, IMAGE_SIZE)
    slope = torch.randn(batch, 2, 1, 1, generator=rng) * contrast * 0.12 * strength
    slope = slope * _chance(batch, 0.4, rng)
    background = background + slope[:, :1] * axis[:, None] + slope[:, 1:] * axis
    coarse = torch.randn(batch, 1, 6, 6, generator=rng) * 0.10 * contrast * strength
    coarse = coarse * _chance(batch, 0.3, rng)
    background = background + F.interpolate(coarse, size=IMAGE_SIZE, mode="bicubic")
    image = background + (foreground - background) * ink
    noise = torch.randn(batch, 1, IMAGE_SIZE, IMAGE_SIZE, generator=rng)
    level = _uniform((batch, 1, 1, 1), 0.0, 0.10, rng) * contrast * _chance(batch, 0.6, rng)
    return (image + noise * level * strength).clamp(0, 1)


def render(
    batch: int,
    rng: torch.Generator,
    bank: GlyphBank | None = None,
    strength: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Return a batch of random glyph images.

    Classes are drawn uniformly, then a bitmap of the class uniformly.

    Args:
        batch: Number of images B.
        rng: Generator on the CPU; the same state gives the same batch.
        bank: Bitmaps to draw from, those of `FONTS` by default.
        strength: Strength of the augmentation, from 0 for plain centred black glyphs of random
            thickness on white to 1.

    Returns:
        Images (B, 3, 32, 32) float32 in [0, 1] and labels (B,) int64 into `CLASSES`.

    Raises:
        ValueError: If `batch` is below 1 or `strength` outside [0, 1].
    """
    if batch < 1:
        raise ValueError(f"batch must be at least 1, not {batch}")
    if not 0.0 <= strength <= 1.0:
        raise ValueError(f"strength must lie in [0, 1], not {strength}")
    bank = glyph_bank() if bank is None else bank
    present = torch.tensor([label for label, rows in enumerate(bank.rows) if len(rows)])
    labels = present[torch.randint(len(present), (batch,), generator=rng)]
    counts = torch.tensor([max(1, len(rows)) for rows in bank.rows])
    table = torch.nn.utils.rnn.pad_sequence(list(bank.rows), batch_first=True)
    column = (torch.rand(batch, generator=rng) * counts[labels]).long()
    ink = bank.bitmaps[table[labels, column]].float()[:, None] / 255
    ink = _warp(_thicken(ink, rng), strength, rng)
    ink = _coarsen(_occlude(ink, strength, rng), strength, rng)
    return _colour(ink, strength, rng), labels
