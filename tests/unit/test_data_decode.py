"""Decoding by extension, against Pillow's general reader."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image

from sixfold_data.decode import UndecodableError, decode_image, decode_member, to_unit_range

RANDOM = np.random.default_rng(0)


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def picture(mode: str, size: tuple[int, int] = (13, 7)) -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    pixels = RANDOM.integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    return Image.frombytes(mode, size, pixels.tobytes())


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("form", "options"), [("PNG", {}), ("PNG", {"optimize": True}), ("WEBP", {"lossless": True})])
def test_images_match_the_general_reader(mode, channels, form, options):
    content = encoded(picture(mode), form, **options)
    expected = np.asarray(Image.open(io.BytesIO(content)).convert({1: "L", 3: "RGB"}[channels]))
    found = decode_image(content, channels=channels)
    assert found.shape == (7, 13, channels)
    np.testing.assert_array_equal(found.squeeze(), expected)


def test_large_png_with_many_data_chunks():
    image = picture("RGB", (300, 400))
    content = encoded(image)
    assert content.count(b"IDAT") > 1
    np.testing.assert_array_equal(decode_image(content), np.asarray(image))


@pytest.mark.parametrize(
    "make",
    [lambda: picture("RGB").quantize(16), lambda: picture("L").convert("1"), lambda: Image.new("I;16", (3, 5), 9)],
)
def test_unusual_pngs_take_the_general_reader(make):
    content = encoded(make())
    expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    np.testing.assert_array_equal(decode_image(content, channels=3), expected)


def test_resizing_keeps_the_centre():
    pixels = np.zeros((20, 40, 3), dtype=np.uint8)
    pixels[:, 10:30] = 200
    found = decode_image(encoded(Image.fromarray(pixels)), size=(10, 10))
    assert found.shape == (10, 10, 3)
    assert found[:, 1:-1].min() > 190


def test_unit_range_is_channels_first_and_exact_at_the_ends():
    pixels = np.asarray([[[0, 255, 51]]], dtype=np.uint8)
    found = to_unit_range([pixels, pixels])
    assert found.shape == (2, 3, 1, 1)
    np.testing.assert_allclose(found[0, :, 0, 0], [-1.0, 1.0, -0.6], atol=1e-6)


def test_other_members():
    array = np.arange(6, dtype=np.float16).reshape(2, 3)
    buffer = io.BytesIO()
    np.save(buffer, array)
    np.testing.assert_array_equal(decode_member("npy", buffer.getvalue()), array)
    assert decode_member("cls", b"17") == 17
    assert decode_member("txt", "größer".encode()) == "größer"
    assert decode_member("json", json.dumps({"a": [1]}).encode()) == {"a": [1]}
    np.testing.assert_array_equal(decode_member("u16", np.asarray([1, 500], "<u2").tobytes()), [1, 500])
    assert decode_member("png", encoded(picture("L"))).shape == (1, 7, 13)


@pytest.mark.parametrize(
    ("extension", "content"),
    [
        ("png", b""),
        ("png", b"not an image"),
        ("png", encoded(picture("RGB"))[:60]),
        ("png", encoded(picture("RGB"))[:-30]),
        ("jpg", encoded(picture("RGB", (64, 64)), "JPEG")[:200]),
        ("npy", b"\x93NUMPY\x01\x00"),
        ("npy", b""),
        ("cls", b"seven"),
        ("txt", b"\xff\xfe"),
        ("json", b"{"),
        ("u16", b"\x01"),
        ("exe", b"MZ"),
    ],
)
def test_damage_is_one_kind_of_error(extension, content):
    with pytest.raises(UndecodableError):
        decode_member(extension, content)


def test_any_truncation_of_a_png_is_damage():
    content = encoded(picture("RGB", (32, 32)))
    for length in range(0, len(content) - 13, 97):
        with pytest.raises(UndecodableError):
            decode_image(content[:length])
