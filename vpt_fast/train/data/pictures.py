"""From an image file to 8-bit RGB or grey, by one rule for all commands."""

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
"""Pillow's names of the formats that are read; AVIF where Pillow was built with it. The first of
several frames is taken. Pillow reads more formats, but some start other programs, some are no
pictures, and images in icons may be larger than the file's header says."""
EXTENSIONS = frozenset(
    extension
    for extension, name in Image.registered_extensions().items()
    if name in FORMATS or name == "MPO"  # of which Pillow's JPEG reader takes the first frame
)
"""Extensions of files that are read, in lower case."""

MAX_ASPECT = 64
"""Largest ratio of the longer side to the shorter one. The shorter side is resized to the model's,
so that a small file with a line of pixels would become an image that fills the memory."""

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
    """Decode a whole image file; see `as_picture`.

    Args:
        path: Path of the file, or an open binary file, read from its position.
        channels: Number of channels: 3 for RGB, 1 for grey.
        exif: Whether the image is rotated as its EXIF orientation says.
        name: Name of the file in errors; None takes `path`.
        formats: Pillow's names of the formats that are decoded.

    Raises:
        ValueError: If the file cannot be decoded, naming it and the reason. No other error is
            raised, whatever the file holds.
    """
    with naming(str(name or path)):
        if isinstance(path, (str, Path)):
            _check_regular(path)
            # Given a path, Pillow maps some files into memory and then leaves TIFF as it is stored.
            with open(path, "rb") as file:
                return _decoded(file, channels, exif, formats)
        return _decoded(path, channels, exif, formats)


def reading(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments `channels` and `exif` of `load_image` for an input configuration.

    Adapters without "exif_transpose" are from versions that did not rotate images.

    Raises:
        ValueError: If "exif_transpose" is no boolean.
    """
    exif = inputs.get("exif_transpose", False)
    if not isinstance(exif, bool):
        raise ValueError(f"exif_transpose is {exif!r}; it must be true or false")
    return {"channels": inputs["input_size"][0], "exif": exif}


def as_picture(image: Image.Image, channels: int = 3, exif: bool = True) -> Image.Image:
    """Return an image of any of Pillow's modes as 8-bit RGB or grey.

    Of 16 bits the upper 8 are taken, and transparent pixels are composited onto white. Where EXIF
    cannot be read, the image stays as it is stored.

    Raises:
        ValueError: If its pixels have no value that means white, or its sides differ by more than
            `MAX_ASPECT`.
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
            # A 16-bit value, where Pillow has only the upper 8 bits of the pixels.
            image.info["transparency"] = tuple(value >> 8 for value in clear)
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode != "L":
        image = image.convert("RGB")  # some modes convert to grey only by way of RGB
    image = image.convert("L" if channels == 1 else "RGB")
    return image if turn is None else image.transpose(turn)


def check_shape(size: tuple[int, int]) -> None:
    """Raise ValueError if the sides of an image differ by more than a factor `MAX_ASPECT`."""
    width, height = size
    if max(size) > MAX_ASPECT * min(size):
        raise ValueError(
            f"{width:,} x {height:,} pixels: the longer side is more than {MAX_ASPECT} times the "
            "shorter"
        )


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Turn every error into a ValueError that says that `name` cannot be decoded, and why."""
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
    """Raise ValueError for a pipe or device, on which opening could block for ever."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        raise ValueError(f"it is {kinds.get(stat.S_IFMT(mode), 'a device')}, not a file")


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged EXIF raises nearly anything, but the pixels are intact
        return 1


def _upper_bits(image: Image.Image) -> Image.Image:
    """Return the upper 8 bits of a grey image of 16 bits, or of 12 as in some TIFF files."""
    tags: Mapping[int, Any] = getattr(image, "tag_v2", {})
    bits = tags.get(258, (16,))[0]  # BitsPerSample
    values = np.asarray(image)
    grey = (values >> (bits - 8)).astype(np.uint8)
    if tags.get(262) == 0:  # PhotometricInterpretation: WhiteIsZero, which Pillow leaves as it is
        grey = 255 - grey
    if "transparency" in image.info:
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey)
