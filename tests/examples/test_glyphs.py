"""The rendered letters and symbols: their classes, and `render`."""

from __future__ import annotations

import unicodedata

import pytest
import torch

from examples.pretrain_demo.glyphs import (
    BITMAP_SIZE,
    CLASSES,
    FONTS,
    HELD_OUT_FONTS,
    IMAGE_SIZE,
    glyph_bank,
    render,
)


def _rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_no_class_holds_a_digit_in_any_form() -> None:
    characters = "".join(CLASSES)
    assert not [c for c in characters if unicodedata.category(c).startswith("N")]
    assert not [c for c in characters if unicodedata.numeric(c, None) is not None]
    assert not [c for c in characters if "DIGIT" in unicodedata.name(c)]


def test_no_character_belongs_to_two_classes() -> None:
    characters = "".join(CLASSES)
    assert len(set(characters)) == len(characters)
    assert 80 <= len(CLASSES) <= 200


def test_held_out_fonts_are_apart_and_cover_every_class() -> None:
    assert not set(FONTS) & set(HELD_OUT_FONTS)
    for fonts, least in ((FONTS, 8), (HELD_OUT_FONTS, 1)):
        assert min(len(rows) for rows in glyph_bank(fonts).rows) >= least


def test_bitmaps_are_centred_inked_and_within_the_frame() -> None:
    bank = glyph_bank()
    assert bank.bitmaps.shape == (len(bank.labels), BITMAP_SIZE, BITMAP_SIZE)
    assert bank.bitmaps.dtype == torch.uint8
    ink = bank.bitmaps > 64
    assert bool(ink.flatten(1).any(1).all())
    assert not bool(ink[:, :5].any() or ink[:, -5:].any() or ink[:, :, :5].any())
    assert all(bool((bank.labels[rows] == i).all()) for i, rows in enumerate(bank.rows))


def test_computer_modern_fonts_give_ascii_letters_only() -> None:
    bank = glyph_bank(("cmr10",))
    found = {CLASSES[i] for i in bank.labels.tolist()}
    assert {"A", "a", "Q"} <= found
    assert all(any(c.isascii() and c.isalpha() for c in name) for name in found)


def test_an_unknown_font_is_named() -> None:
    with pytest.raises(ValueError, match="no font 'Helvetica'.*DejaVuSans"):
        glyph_bank(("Helvetica",))


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_render_gives_images_and_labels(strength: float) -> None:
    images, labels = render(37, _rng(0), strength=strength)
    assert images.shape == (37, 3, IMAGE_SIZE, IMAGE_SIZE) and images.dtype == torch.float32
    assert labels.shape == (37,) and labels.dtype == torch.int64
    assert float(images.min()) >= 0 and float(images.max()) <= 1
    assert int(labels.min()) >= 0 and int(labels.max()) < len(CLASSES)


def test_the_same_generator_state_gives_the_same_batch() -> None:
    images, labels = render(16, _rng(3))
    again, labels_again = render(16, _rng(3))
    other, _ = render(16, _rng(4))
    assert torch.equal(images, again) and torch.equal(labels, labels_again)
    assert not torch.equal(images, other)


def test_classes_are_even_and_ink_is_darker_than_its_ground() -> None:
    images, labels = render(1500, _rng(1), strength=0.0)
    counts = labels.bincount(minlength=len(CLASSES))
    assert int(counts.min()) > 0 and int(counts.max()) < 6 * 1500 / len(CLASSES)
    corner = images[:, :, 0, 0].mean(1)
    darkest = images.mean(1).flatten(1).amin(1)
    assert float((corner > 0.9).float().mean()) > 0.9
    assert bool((darkest < 0.5).all())


def test_plain_renderings_look_like_their_class() -> None:
    images, labels = render(300, _rng(2), strength=0.0)
    bank = glyph_bank()
    frame = (BITMAP_SIZE - 40) // 2
    drawn = bank.bitmaps.float()[:, None, frame:-frame, frame:-frame]
    drawn = torch.nn.functional.interpolate(drawn, size=IMAGE_SIZE, mode="area").flatten(1)
    seen = images.mean(1).flatten(1)
    seen = 1 - seen
    centred = [x - x.mean(1, keepdim=True) for x in (seen, drawn)]
    unit = [x / x.norm(dim=1, keepdim=True) for x in centred]
    nearest = bank.labels[(unit[0] @ unit[1].T).argmax(1)]
    assert float((nearest == labels).float().mean()) > 0.9


def test_strength_makes_images_harder() -> None:
    def spread(strength: float) -> float:
        images, _ = render(200, _rng(5), strength=strength)
        return float((images - images.mean(1, keepdim=True)).abs().mean())

    assert spread(0.0) == pytest.approx(0.0, abs=1e-6)
    assert spread(1.0) > 0.005


def test_a_bank_of_one_font_renders_only_its_classes() -> None:
    bank = glyph_bank(("cmr10",))
    _, labels = render(400, _rng(6), bank)
    assert set(labels.tolist()) <= set(bank.labels.tolist())


@pytest.mark.parametrize(
    ("batch", "strength", "message"),
    [(0, 1.0, "batch must be at least 1, not 0"), (4, 1.5, "strength must lie in .*, not 1.5")],
)
def test_bad_arguments_are_named(batch: int, strength: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        render(batch, _rng(0), strength=strength)
