"""Decoding of image files: every mode and type, upright, on white; damaged ones are named."""

from __future__ import annotations

import io
import os
import socket
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from vpt_fast.train.data.images import eval_transform
from vpt_fast.train.data.pictures import EXTENSIONS, FORMATS, as_picture, load_image, reading
from vpt_fast.train.data.split import SplitImages, split_of_files

SIDES = (12, 9)
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16")
OPAQUE = np.random.default_rng(0).integers(0, 256, (9, 12, 3)).astype(np.uint8)


def in_mode(mode, seed=0):
    """Return a noisy picture of a mode, with noisy alpha."""
    noise = np.random.default_rng(seed).integers(0, 256, (9, 12, 4)).astype(np.uint8)
    if mode == "I;16":
        return Image.fromarray(noise[..., 0].astype(np.uint16) * 257)
    if mode in ("I", "F"):
        return Image.fromarray(noise[..., 0].astype(np.int32 if mode == "I" else np.float32))
    if mode in ("LAB", "HSV"):
        return Image.fromarray(noise[..., :3]).convert("HSV" if mode == "HSV" else "RGB").copy()
    base = Image.fromarray(noise)
    return base.convert("P").convert(mode) if mode == "PA" else base.convert(mode)


def written(image, file_format, **options):
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def grey_of(content, **options):
    return np.asarray(load_image(io.BytesIO(content), 1, **options))


def test_common_file_types_are_read():
    read = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm"}
    assert read <= EXTENSIONS
    assert not EXTENSIONS & {".eps", ".pdf", ".heic", ".mpg", ".txt", ".json", ".npy", ".h5"}
    assert set(FORMATS) <= set(Image.OPEN) and "EPS" not in FORMATS


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_sixteen_bits_are_cut_to_the_upper_eight(file_format):
    ramp = np.linspace(0, 65535, 40 * 30).astype(np.uint16).reshape(30, 40)
    found = grey_of(written(Image.fromarray(ramp), file_format))
    assert np.array_equal(found, ramp >> 8)
    assert found.min() == 0 and found.max() == 255


def test_sixteen_bits_of_other_orders_and_of_twelve():
    ramp = np.linspace(0, 65535, 40 * 30).astype(np.uint16).reshape(30, 40)
    for mode in ("I;16", "I;16L", "I;16B"):
        raw = ramp.astype(">u2" if mode == "I;16B" else "<u2").tobytes()
        image = Image.frombytes(mode, (40, 30), raw)
        assert np.array_equal(np.asarray(as_picture(image, 1)), ramp >> 8)
    white_is_zero = written(Image.fromarray(ramp), "TIFF", tiffinfo={262: 0})
    assert np.array_equal(grey_of(white_is_zero), 255 - (ramp >> 8))
    image = Image.fromarray(ramp >> 4)
    image.tag_v2 = {258: (12,), 262: 1}
    assert np.array_equal(np.asarray(as_picture(image, 1)), ramp >> 8)
    keyed = grey_of(written(Image.fromarray(ramp), "PNG", transparency=int(ramp[3, 4])))
    assert keyed[3, 4] == 255 and np.array_equal(keyed[:3], ramp[:3] >> 8)


@pytest.mark.parametrize(("mode", "kind"), [("I", "32-bit integers"), ("F", "floating-point num")])
def test_numbers_without_a_range_are_named(mode, kind):
    file = io.BytesIO(written(in_mode(mode), "TIFF"))
    with pytest.raises(ValueError, match=rf"^x.tif cannot be decoded \({kind}.* as 8 or 16 bit\)$"):
        load_image(file, name="x.tif")


@pytest.mark.parametrize("channels", [1, 3])
def test_transparent_pixels_are_white(channels):
    def top_left(content):
        image = load_image(io.BytesIO(content), channels)
        assert image.mode == ("L" if channels == 1 else "RGB")
        found = np.asarray(image)
        assert (found[1:] == 0).all()
        return found[0, 0].max(), found[0, 0].min()

    black = Image.new("RGB", SIDES)
    clear = black.convert("RGBA")
    clear.putpixel((0, 0), (0, 0, 0, 0))
    keyed = black.copy()
    keyed.putpixel((0, 0), (0, 200, 0))
    palette = keyed.quantize(4)
    grey = keyed.convert("L")
    for content in (
        written(clear, "PNG"),
        written(clear, "TIFF"),
        written(clear, "WEBP", lossless=True),
        written(clear.convert("LA"), "PNG"),
        written(clear, "GIF"),
        written(keyed, "PNG", transparency=(0, 200, 0)),
        written(grey, "PNG", transparency=grey.getpixel((0, 0))),
        written(palette, "PNG", transparency=palette.getpixel((0, 0))),
    ):
        assert top_left(content) == (255, 255)
    half = Image.new("RGBA", SIDES, (0, 0, 0, 128))
    assert grey_of(written(half, "PNG"))[0, 0] == 127
    whole = Image.fromarray(np.dstack([OPAQUE, np.full((9, 12), 255, np.uint8)]))
    assert np.array_equal(np.asarray(load_image(io.BytesIO(written(whole, "PNG")))), OPAQUE)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_images_are_rotated_by_exif(tmp_path, orientation, file_format):
    stored = Image.new("L", (16, 8))
    stored.paste(255, (0, 0, 8, 4))  # the upper left quarter
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = written(stored.convert("RGB"), file_format, exif=exif)
    found = grey_of(content)
    (tmp_path / "image").write_bytes(content)
    assert np.array_equal(np.asarray(load_image(tmp_path / "image", 1)), found)
    assert found.shape == ((16, 8) if orientation > 4 else (8, 16))
    high, wide = (side // 2 for side in found.shape)
    corners = {(0, 0): "1 5", (0, 1): "2 6", (1, 1): "3 7", (1, 0): "4 8"}
    for (row, column), which in corners.items():
        part = found[row * high : (row + 1) * high, column * wide : (column + 1) * wide]
        assert (part.mean() > 200) == (str(orientation) in which)
    if file_format != "TIFF":  # Pillow itself rotates TIFF
        assert grey_of(content, exif=False).shape == (8, 16)


def png16(pixels, colour, *chunks):
    """Return a PNG with 16 bits per channel, which Pillow reads but does not write in colour."""
    height, width = pixels.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )


def test_sixteen_bits_a_channel_are_cut_to_the_upper_eight():
    pixels = np.random.default_rng(0).integers(256, 65536, (5, 7, 3)).astype(np.uint16)
    found = np.asarray(load_image(io.BytesIO(png16(pixels, 2))))
    assert np.array_equal(found, pixels >> 8)
    clear = (b"tRNS", pixels[1, 2].astype(">u2").tobytes())
    found = np.asarray(load_image(io.BytesIO(png16(pixels, 2, clear)))).copy()
    assert found[1, 2].tolist() == [255, 255, 255]
    found[1, 2] = pixels[1, 2] >> 8
    assert np.array_equal(found, pixels >> 8)


def test_other_colour_spaces_have_the_colours_that_they_mean():
    colours = np.array([[[255, 255, 255], [0, 0, 0], [200, 60, 60], [60, 60, 200]]], np.uint8)
    rgb = Image.fromarray(colours)
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    for image, file_format in (
        (ImageCms.profileToProfile(rgb, srgb, lab, outputMode="LAB"), "TIFF"),
        (rgb.convert("YCbCr"), "TIFF"),
        (rgb.convert("CMYK"), "TIFF"),
        (rgb.quantize(4), "GIF"),
        (rgb.convert("P"), "PNG"),
    ):
        found = np.asarray(load_image(io.BytesIO(written(image, file_format)))).astype(int)
        assert abs(found - colours).max() <= (30 if image.mode == "P" else 8), image.mode


def test_exif_that_cannot_be_read_leaves_an_image_as_it_is():
    content = written(Image.fromarray(OPAQUE), "PNG", exif=b"Exif\0\0rubbish")
    assert np.array_equal(np.asarray(load_image(io.BytesIO(content))), OPAQUE)


def test_the_configuration_sets_the_reading():
    assert reading({"input_size": [1, 8, 8]}) == {"channels": 1, "exif": False}
    turned = reading({"input_size": (3, 8, 8), "exif_transpose": True})
    assert turned == {"channels": 3, "exif": True}
    with pytest.raises(ValueError, match="exif_transpose is 'no'; it must be true or false"):
        reading({"input_size": (3, 8, 8), "exif_transpose": "no"})


def test_a_line_of_pixels_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    path = tmp_path / "line.png"
    Image.new("L", (1, 30_000)).save(path)
    Image.new("L", (2, 128)).save(tmp_path / "thin.png")
    assert load_image(tmp_path / "thin.png").size == (2, 128)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(ValueError, match=r"line.png .*1 x 30,000 pixels: the longer side is more"):
        load_image(path)


def test_only_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.png"))
        for name in ("pipe", "folder", "socket"):
            with pytest.raises(ValueError, match=rf"{name}.png cannot be decoded \(it is a {name}"):
                load_image(tmp_path / f"{name}.png")
    with pytest.raises(ValueError, match=r"/dev/zero cannot be decoded \(it is a device, not a"):
        load_image("/dev/zero")
    with pytest.raises(ValueError, match="null byte"):
        load_image("a\0.png")


def test_training_predict_and_the_server_read_alike(tmp_path):
    pytest.importorskip("fastapi", reason="the serve extra is not installed")
    from examples.serve.uploads import prepare
    from vpt_fast.cli.work.predict import _prepared

    inputs = {
        "input_size": (3, 16, 16), "interpolation": "bicubic", "mean": (0.5,) * 3,
        "std": (0.5,) * 3, "crop_pct": 0.9, "crop_mode": "center",
    }  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = 6
    count = 0
    for mode in MODES:
        for file_format in ("PNG", "TIFF", "JPEG", "WEBP", "GIF"):
            path = tmp_path / f"{mode.replace(';', '')}.{file_format.lower()}"
            try:
                path.write_bytes(written(in_mode(mode), file_format, exif=exif))
            except (OSError, ValueError, KeyError):
                continue  # the format has no such mode
            for channels in (1, 3):
                for turned in (False, True):
                    how = {**inputs, "exif_transpose": turned}
                    if channels == 1:
                        how |= {"input_size": (1, 16, 16), "mean": (0.5,), "std": (0.5,)}
                    split = split_of_files([path], [0])
                    images = SplitImages(split, eval_transform(how), ["a"], **reading(how))
                    trained, predicted = images[0], _prepared(path, how)
                    if isinstance(predicted, str):
                        assert mode in ("I", "F") and trained.reason == predicted
                        continue
                    served = prepare(io.BytesIO(path.read_bytes()), how, 10**6)
                    assert trained[0].shape == (channels, 16, 16)
                    assert torch.equal(trained[0], predicted) and torch.equal(trained[0], served)
                    count += 1
    assert count > 100


def damaged(content, seed):
    """Return a copy with some flipped bits, or without its end."""
    draw = np.random.default_rng(seed)
    found = bytearray(content)
    if seed % 3 == 0:
        return bytes(found[: draw.integers(0, len(found))])
    for _ in range(draw.integers(1, 9)):
        # Most of a decoder's branches depend on headers.
        end = min(len(found), 200) if seed % 3 == 1 else len(found)
        found[draw.integers(0, end)] ^= 1 << int(draw.integers(0, 8))
    return bytes(found)


def decodes(content):
    """Return whether a file is decoded, else assert that the error gives a reason in one line."""
    try:
        image = load_image(io.BytesIO(content), 3, name="it", formats=tuple(Image.OPEN))
    except ValueError as error:
        assert str(error).startswith("it cannot be decoded (") and "\n" not in str(error)
        return False
    assert image.mode == "RGB"
    return True


def originals():
    for file_format in sorted(set(Image.SAVE) & set(Image.OPEN) - {"EPS", "WMF"}):
        for mode in MODES:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    yield file_format, mode, written(in_mode(mode), file_format)
                except Exception:  # the format has no such mode
                    continue


def check_damaged(copies):
    intact = whole = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of damage
        for number, (_, mode, content) in enumerate(originals()):
            intact += decodes(content) and mode not in ("I", "F")
            whole += sum(decodes(damaged(content, 10**4 * number + i)) for i in range(copies))
    assert intact > 60
    return whole


def test_damaged_files_are_pictures_or_named():
    assert check_damaged(12) > 100


@pytest.mark.full
def test_many_damaged_files_are_pictures_or_named():
    check_damaged(600)
