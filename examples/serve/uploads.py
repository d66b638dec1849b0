"""From an uploaded file to a model's input, as `vpt-fast predict` prepares it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import IO, Any

from PIL import Image
from torch import Tensor

from examples.serve.refusals import Refusal
from vpt_fast.train.data import DECODE_ERRORS, eval_transform, load_image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""Pillow's names of what is decoded. It knows more, but some start other programs."""

MAX_ASPECT = 64
"""Longer side by shorter. The shorter one is resized to the model's, so a line of pixels that a
file says little about would become an image that fills the memory."""


def prepare(file: IO[bytes], inputs: Mapping[str, Any], max_pixels: int) -> Tensor:
    """Decodes an image and transforms it.

    Args:
        file: The upload, at its beginning.
        inputs: Of the task: size, normalisation, interpolation and crop.
        max_pixels: Width times height that are decoded at most.

    Returns:
        (C, H, W), fp32.

    Raises:
        Refusal: If it is no image of a known format, is damaged, or is too large.
    """
    _check_size(file, max_pixels)
    file.seek(0)
    try:
        image = load_image(file, inputs["input_size"][0], name="The image", formats=FORMATS)
    except ValueError as error:
        raise Refusal(422, "undecodable_image", f"{error}.") from None
    pixels: Tensor = eval_transform(inputs)(image)
    return pixels


def _check_size(file: IO[bytes], max_pixels: int) -> None:
    try:
        # Reads the file's header only.
        with Image.open(file, formats=FORMATS) as image:
            width, height = image.size
    except Image.DecompressionBombError:
        raise _too_large(f"more than {max_pixels:,} pixels") from None
    except DECODE_ERRORS:
        known = ", ".join(FORMATS)
        raise Refusal(
            422,
            "undecodable_image",
            f"The file is not an image of a format that the server takes ({known}), or is damaged.",
        ) from None
    if width * height > max_pixels:
        raise _too_large(f"{width:,} x {height:,} pixels; the limit is {max_pixels:,} in all")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise _too_large(f"{width:,} x {height:,} pixels, which is too long and thin")


def _too_large(what: str) -> Refusal:
    return Refusal(413, "too_many_pixels", f"The image has {what}. Send a smaller one.")
