"""From an uploaded file to a model's input, prepared as in `vpt-fast predict`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import IO, Any

from PIL import Image
from torch import Tensor

from examples.serve.refusals import Refusal
from vpt_fast.train.data.images import eval_transform
from vpt_fast.train.data.pictures import FORMATS, check_shape, load_image, reading


def prepare(file: IO[bytes], inputs: Mapping[str, Any], max_pixels: int) -> Tensor:
    """Decode an image and transform it.

    Args:
        file: Uploaded file, at its beginning.
        inputs: Input configuration of the task: size, normalisation, interpolation and crop.
        max_pixels: Largest width times height that is decoded.

    Returns:
        Image (C, H, W), fp32.

    Raises:
        Refusal: If it is no image of a known format, is damaged, or is too large.
    """
    _check_size(file, max_pixels)
    file.seek(0)
    how = reading(inputs)
    try:
        image = load_image(file, name="The image", **how)
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
    except Exception:  # Pillow raises nearly anything on damaged files
        known = ", ".join(FORMATS)
        raise Refusal(
            422,
            "undecodable_image",
            f"The file is not an image of a format that the server takes ({known}), or is damaged.",
        ) from None
    if width * height > max_pixels:
        raise _too_large(f"{width:,} x {height:,} pixels; the limit is {max_pixels:,} in all")
    try:
        check_shape((width, height))
    except ValueError as error:
        raise _too_large(str(error)) from None


def _too_large(what: str) -> Refusal:
    return Refusal(413, "too_many_pixels", f"The image has {what}. Send a smaller one.")
