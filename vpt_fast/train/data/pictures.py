"""From an image file to 8-bit RGB or grey: one rule for all that reads images."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import ExifTags, Image

Image.init()
_FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "TGA"),
    *("PSD", "QOI", "SGI", "PCX", "DDS"),
)
FORMATS = tuple(name for name in _FORMATS if name in Image.registered_extensions().values())
"""Pillow's names of what is read; AVIF where Pillow was built with it. Of several frames the
first is taken. Pillow knows more, but some of it starts other programs, some is no picture, and the
images in icons may be larger than the file says at first."""
EXTENSIONS = frozenset(
    extension
    for extension, name in Image.registered_extensions().items()
    if name in FORMATS or name == "MPO"  # of which Pillow's JPEG reader takes the first frame
)
"""Ends of the names of files that are read, in small letters."""

MAX_ASPECT = 64
"""Longer side by shorter. The shorter one is resized to the model's, so a line of pixels that a
file says little about would become an image that fills the memory."""

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_image(
    path: str | Path | IO[bytes],
    channels: int = 3,
    exif: bool = True,
    *,
    name: str | None = None,
    formats: tuple[str, ...] = FORMATS,
) -> Image.Image:
    """Decodes a whole image file; see `as_picture`.

    Args:
        path: Of the file, or an open binary file, read from where it stands.
        channels: 3 for RGB, 1 for grey.
        exif: Whether the image is turned as its EXIF orientation says.
        name: What errors call the file; None takes `path`.
        formats: Pillow's names of those that are decoded.

    Raises:
        ValueError: If the file cannot be decoded, naming it and the reason. Nothing else is raised,
            whatever is in the file.
    """
    with naming(str(name or path)):
        if isinstance(path, (str, Path)):
            _check_regular(path)
            # Of a path Pillow maps some files into memory, and then leaves TIFF as it is stored.
            with open(path, "rb") as file:
                return _decoded(file, channels, exif, formats)
        return _decoded(path, channels, exif, formats)


def reading(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments `channels` and `exif` of `load_image` that a model's input configuration means.

    Adapters that do not say whether images were turned are of a time when none were.

    Raises:
        ValueError: If "exif_transpose" is no boolean.
    """
    exif = inputs.get("exif_transpose", False)
    if not isinstance(exif, bool):
        raise ValueError(f"exif_transpose is {exif!r}; it must be true or false")
    return {"channels": inputs["input_size"][0], "exif": exif}


def as_picture(image: Image.Image, channels: int = 3, exif: bool = True) -> Image.Image:
    """An image of any of Pillow's modes as 8-bit RGB or grey.

    16 bits are cut to the upper 8, and what is transparent is put onto white. Where EXIF cannot be
    read, the image stays as it is stored.

    Raises:
        ValueError: If no value of its pixels is defined to be white, or it is long and thin.
    """
    image.load()
    check_shape(image.size)
    turn = _UPRIGHT.get(_orientation(image)) if exif else None
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        image = _upper_bits(image)
    elif image.mode in ("I", "F"):
        kind = "32-bit integers" if image.mode == "I" else "floating-point numbers"
        raise ValueError(f"{kind} have no range that means white; save it as 8 or 16 bit")
    elif image.has_transparency_data:
        clear = image.info.get("transparency")
        if isinstance(clear, tuple) and max(clear) > 255:
            # Of 16 bits, where Pillow keeps the pixels' upper 8 only.
            image.info["transparency"] = tuple(value >> 8 for value in clear)
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode != "L":
        image = image.convert("RGB")  # on the way to grey too, which some modes have no way to
    image = image.convert("L" if channels == 1 else "RGB")
    return image if turn is None else image.transpose(turn)


def check_shape(size: tuple[int, int]) -> None:
    """Raises ValueError if an image of that width and height is longer than `MAX_ASPECT`."""
    width, height = size
    if max(size) > MAX_ASPECT * min(size):
        raise ValueError(
            f"{width:,} x {height:,} pixels: the longer side is more than {MAX_ASPECT} times the "
            "shorter"
        )


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Inside, every error becomes a ValueError that says that `name` cannot be decoded, and why."""
    try:
        yield
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        reason = " ".join(str(error).split())
        if isinstance(error, Image.UnidentifiedImageError):
            reason = "not an image of a type that is read, or damaged"
        elif not isinstance(error, (OSError, SyntaxError, ValueError)) or not reason:
            reason = f"{type(error).__name__} {reason}".strip()
        raise ValueError(f"{name} cannot be decoded ({reason})") from error


def _decoded(file: IO[bytes], channels: int, exif: bool, formats: tuple[str, ...]) -> Image.Image:
    with Image.open(file, formats=formats) as image:
        check_shape(image.size)
        return as_picture(image, channels, exif)


def _check_regular(path: str | Path) -> None:
    """Refuses what may be waited for without end, before it is opened."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        raise ValueError(f"it is {kinds.get(stat.S_IFMT(mode), 'a device')}, not a file")


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # as many as decoders raise; the pixels are whole nevertheless
        return 1


def _upper_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits, or of the 12 that TIFF has too."""
    tags: Mapping[int, Any] = getattr(image, "tag_v2", {})
    bits = tags.get(258, (16,))[0]  # BitsPerSample
    values = np.asarray(image)
    grey = (values >> (bits - 8)).astype(np.uint8)
    if tags.get(262) == 0:  # PhotometricInterpretation: WhiteIsZero, which Pillow leaves as it is
        grey = 255 - grey
    if "transparency" in image.info:
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey)
