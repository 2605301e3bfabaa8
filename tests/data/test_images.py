"""Every kind of image becomes the right bytes, by computations that do not use Pillow's."""

from __future__ import annotations

import io
import time
from collections import Counter
from multiprocessing.pool import ThreadPool

import numpy as np
import pytest

from spread_jax.data import DatasetError, images
from spread_jax.data.images import Transform, decode_image, quiet_pillow, transform_array

Image = pytest.importorskip("PIL.Image")
RNG = np.random.default_rng(0)
SIZE = 12


def encode(image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def decode(data: bytes, size: int = SIZE, crop: int | None = None, channels: int = 3):
    return decode_image(data, Transform(size, crop, channels), "here.png")


def triangle_matrix(n: int, m: int) -> np.ndarray:
    """Weights [m, n] of an antialiased bilinear reduction from n to m pixels."""
    scale = n / m
    centres = (np.arange(m) + 0.5) * scale - 0.5
    distance = np.abs(np.arange(n)[None] - centres[:, None]) / scale
    weights = np.clip(1 - distance, 0, None)
    return weights / weights.sum(1, keepdims=True)


def reduce(pixels: np.ndarray, m: int) -> np.ndarray:
    rows, columns = (triangle_matrix(n, m) for n in pixels.shape[:2])
    return np.einsum("ah,hwc,bw->abc", rows, pixels.astype(float), columns)


RGB = RNG.integers(0, 256, (SIZE, SIZE, 3), np.uint8)
GREY = RNG.integers(0, 256, (SIZE, SIZE), np.uint8)
ALPHA = RNG.integers(0, 256, (SIZE, SIZE), np.uint8)
DEEP = RNG.integers(0, 65536, (SIZE, SIZE)).astype(np.uint16)
PALETTE = RNG.integers(0, 256, (16, 3), np.uint8)
INDEX = RNG.integers(0, 16, (SIZE, SIZE), np.uint8)


def paletted():
    image = Image.frombytes("P", (SIZE, SIZE), INDEX.tobytes())
    image.putpalette(PALETTE.ravel().tolist())
    return image


def over_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    a = alpha[..., None] / 255
    return colour * a + 255 * (1 - a)


def grey3(values: np.ndarray) -> np.ndarray:
    return np.repeat(np.asarray(values, float)[..., None], 3, axis=-1)


CMYK = RNG.integers(0, 256, (SIZE, SIZE, 4), np.uint8)
CASES = {
    "RGB": (lambda: encode(Image.fromarray(RGB)), RGB),
    "L": (lambda: encode(Image.fromarray(GREY)), grey3(GREY)),
    "1": (lambda: encode(Image.fromarray(GREY > 127)), grey3((GREY > 127) * 255)),
    "P": (lambda: encode(paletted()), PALETTE[INDEX]),
    "P with a clear colour": (
        lambda: encode(paletted(), transparency=3),
        np.where((INDEX == 3)[..., None], 255, PALETTE[INDEX]),
    ),
    "RGB with a clear colour": (
        lambda: encode(Image.fromarray(RGB), transparency=tuple(int(v) for v in RGB[2, 3])),
        np.where((RGB[2, 3] == RGB).all(-1, keepdims=True), 255, RGB),
    ),
    "RGBA": (
        lambda: encode(Image.fromarray(np.dstack([RGB, ALPHA]))),
        over_white(RGB, ALPHA),
    ),
    "LA": (
        lambda: encode(Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(ALPHA)])),
        over_white(grey3(GREY), ALPHA),
    ),
    "CMYK": (
        lambda: encode(Image.frombytes("CMYK", (SIZE, SIZE), CMYK.tobytes()), "TIFF"),
        (255.0 - CMYK[..., :3]) * (255 - CMYK[..., 3:]) / 255,
    ),
    "16-bit PNG": (lambda: encode(Image.fromarray(DEEP)), grey3(DEEP / 257)),
    "16-bit TIFF": (lambda: encode(Image.fromarray(DEEP), "TIFF"), grey3(DEEP / 257)),
    "16-bit PGM": (
        lambda: b"P5 %d %d 65535\n" % (SIZE, SIZE) + DEEP.astype(">u2").tobytes(),
        grey3(DEEP / 257),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_every_mode(case):
    make, expected = CASES[case]
    got = decode(make())
    assert got.dtype == np.uint8
    assert got.shape == (SIZE, SIZE, 3)
    # One level for a rounding in each of two 8-bit steps.
    np.testing.assert_allclose(got, expected, atol=1.0)
    luma = np.asarray(got, float) @ [0.299, 0.587, 0.114]
    np.testing.assert_allclose(decode(make(), channels=1)[..., 0], luma, atol=1.0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.zeros((SIZE, SIZE, 3), np.uint8)
    stored[:4, :6] = 255  # a mark that no turn or flip maps to itself
    upright = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.transpose(1, 0, 2),
        6: np.rot90(stored, -1),
        7: stored[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(stored),
    }[orientation]
    got = decode(encode(Image.fromarray(stored), "PNG", exif=exif))
    assert np.array_equal(got, upright)


@pytest.mark.parametrize(("width", "height", "crop"), [(40, 31, None), (33, 50, 25), (24, 24, 24)])
def test_crop_and_antialiased_reduction(width, height, crop):
    pixels = RNG.integers(0, 256, (height, width, 3), np.uint8)
    side = crop or min(width, height)
    top, left = (height - side) // 2, (width - side) // 2
    expected = reduce(pixels[top : top + side, left : left + side], 10)
    got = decode(encode(Image.fromarray(pixels)), size=10, crop=crop)
    np.testing.assert_allclose(got, expected, atol=1.01)
    np.testing.assert_allclose(transform_array(pixels[None], Transform(10, crop, 3), "x")[0], expected, atol=1.01)


def test_a_fine_pattern_does_not_alias():
    """Stripes one pixel wide are grey when reduced, where sampling would keep black and white."""
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    got = decode(encode(Image.fromarray(stripes)), size=16)
    assert np.abs(got[2:-2, 2:-2].astype(int) - 127).max() <= 2


def test_too_small_for_the_crop():
    with pytest.raises(DatasetError, match=r"here.png is 12x12 .*140x140.*pass crop=12"):
        decode(encode(Image.fromarray(RGB)), crop=140)


def jpeg() -> bytes:
    pixels = RNG.integers(0, 256, (64, 64, 3), np.uint8)
    return encode(Image.fromarray(pixels), "JPEG")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"just some text\n" * 20, "no known image format"),
        (b"", "the file is empty"),
        (jpeg()[:1500], "cannot be decoded.*truncated"),
        (encode(Image.fromarray(np.float32(GREY)), "TIFF"), "floating-point"),
        (encode(Image.fromarray(np.int32(GREY) * 65536), "TIFF"), "8 or 16 bit"),
    ],
)
def test_what_cannot_be_decoded(data, message):
    with pytest.raises(DatasetError, match=f"here.png.*{message}"):
        decode(data)


@pytest.mark.parametrize("side", [9_000, 12_000, 30_000])
def test_decompression_bombs(side, tmp_path):
    """Headers that announce more pixels than is safe, beyond our limit and each of Pillow's two."""
    from spread_jax.data import open_dataset

    header = b"P5 %d %d 255\n" % (side, side)
    with quiet_pillow(), pytest.raises(DatasetError, match=r"here\.png.*(too large|pixels)"):
        decode(header + b"\0" * 100)
    folder = tmp_path / "bombs"
    folder.mkdir()
    (folder / "bomb.pgm").write_bytes(header)
    with pytest.raises(DatasetError, match=r"bomb\.pgm.*(too large|pixels)"):
        open_dataset(folder)


def test_large_pictures_are_decoded_one_after_another(monkeypatch, picture):
    """Six of 8000x8000 took 1.5 GB with two threads, and more with more."""
    monkeypatch.setattr(images, "_room", images._Room(250 * 100))
    now, most, eight_bit = Counter(), Counter(), images._eight_bit

    def watched(image, channels, name):
        pixels = image.width * image.height
        now[name] = pixels
        most["pixels"] = max(most["pixels"], sum(now.values()))
        time.sleep(0.002)
        del now[name]
        return eight_bit(image, channels, name)

    monkeypatch.setattr(images, "_eight_bit", watched)
    files = [picture(n, size=(100, 100 + n)) for n in range(12)]
    with ThreadPool(8) as pool:
        found = pool.map(lambda n: decode_image(files[n], Transform(4, None, 3), f"{n}.png"), range(12))
    assert len(found) == 12
    assert 100 * 200 <= most["pixels"] <= 250 * 100
