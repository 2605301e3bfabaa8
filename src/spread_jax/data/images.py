"""From an encoded image of any kind to uint8 [H, W, C]: decode, orient, convert, crop, resize."""

from __future__ import annotations

import contextlib
import ctypes
import io
import threading
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from spread_jax.data.errors import DatasetError

if TYPE_CHECKING:
    from PIL import Image

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")
)
# Pictures too, which are skipped and reported.
OTHER_PICTURES = frozenset(
    (".heic", ".heif", ".avif", ".jxl", ".jp2", ".svg", ".eps", ".psd", ".tga", ".dng", ".cr2", ".nef", ".arw", ".raw")
)
# Only these are decoded, whatever a file's name: others hand the file to programs outside, as EPS does to Ghostscript.
_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM")
MAX_PIXELS = 64 * 1024 * 1024
MAX_BYTES = 256 * 1024 * 1024
_MAX_RATIO = 200
_ALWAYS_ALLOWED = 1024 * 1024 * 1024


class _Room:
    """Pixels that all threads may decode at once: a picture takes up to three times 4 bytes for each of its own."""

    def __init__(self, pixels: int):
        self._free, self._changed = pixels, threading.Condition()

    @contextlib.contextmanager
    def taken(self, pixels: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self._free >= pixels)
            self._free -= pixels
        try:
            yield
        finally:
            with self._changed:
                self._free += pixels
                self._changed.notify_all()


def _give_back(pixels: int) -> None:
    """Frees what the C library keeps of a large picture for its thread, where it is that of GNU."""
    if pixels > 4 * 1024 * 1024:
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).malloc_trim(0)


_room = _Room(MAX_PIXELS)


class Transform(NamedTuple):
    """What is done to every image; `crop=None` is the largest centre square."""

    image_size: int
    crop: int | None
    channels: int

    def __str__(self) -> str:
        crop = "square" if self.crop is None else self.crop
        return f"{self.image_size}x{self.image_size}x{self.channels} crop {crop}"


def refuse_bomb(name: object, packed: int, unpacked: int) -> None:
    """Refuse what unpacks to over a gigabyte and 200 times its size: pictures do not.

    Raises:
        DatasetError: it does.
    """
    if unpacked > max(_ALWAYS_ALLOWED, _MAX_RATIO * packed):
        raise DatasetError(
            f"{name} holds {packed:,} bytes and unpacks to {unpacked:,}, over {_MAX_RATIO} times as many: it looks "
            "like a decompression bomb; unpack it yourself if you trust it."
        )


def require_pillow() -> None:
    """Raise the error that names the extra when Pillow is missing."""
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise DatasetError('Reading image files needs Pillow: pip install "spread-jax[data]".') from error


@contextlib.contextmanager
def quiet_pillow() -> Iterator[None]:
    """Silence Pillow's remarks on odd files; what matters of them is an error here.

    Python's warning filters belong to the whole process, so this is entered once around a run of
    decodes and not in each decoding thread.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"PIL\b")
        yield


def decode_image(encoded: bytes, transform: Transform, name: str) -> np.ndarray:
    """Decode one image file and bring it to the size and channels asked for.

    EXIF orientation is applied. Transparent pixels are composited over white. 16-bit grey values
    are divided by 257, so that 65535 becomes 255. CMYK, palette, grey, LAB and YCbCr images are
    converted to RGB; for one channel, RGB becomes ITU-R 601 luma. After the centre crop, shrinking
    is antialiased bilinear (a triangle filter as wide as the reduction factor), enlarging bicubic.

    Args:
        encoded: the bytes of the file.
        transform: size, crop and channels of the result.
        name: the file's name, for errors.

    Returns:
        uint8 array [image_size, image_size, channels].

    Raises:
        DatasetError: not an image, damaged, too large to be safe, or smaller than the crop.

    Example:
        >>> import io
        >>> from PIL import Image
        >>> from spread_jax.data.images import Transform, decode_image
        >>> file = io.BytesIO()
        >>> Image.new("RGB", (90, 70), "red").save(file, "PNG")
        >>> decode_image(file.getvalue(), Transform(8, None, 3), "red.png").shape
        (8, 8, 3)
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(encoded), formats=_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DatasetError(
                    f"{name} is {image.width}x{image.height} pixels, more than the "
                    f"{MAX_PIXELS:,} that are decoded from one file: shrink or remove it."
                )
            pixels = image.width * image.height
            with _room.taken(pixels):
                try:
                    image.load()
                    ImageOps.exif_transpose(image, in_place=True)
                    return _finish(_eight_bit(image, transform.channels, name), transform, name)
                finally:
                    image.close()
                    _give_back(pixels)
    except DatasetError:
        raise
    except Image.DecompressionBombError as error:
        raise DatasetError(f"{name} is too large to be decoded safely: {error}") from error
    except MemoryError as error:
        raise DatasetError(f"{name} needs more memory than there is: shrink or remove it.") from error
    except Exception as error:  # Pillow's plugins raise almost anything on damaged files.
        raise DatasetError(
            f"{name} cannot be decoded as an image ({_reason(error, encoded)}): replace or remove the file."
        ) from error


def _reason(error: Exception, encoded: bytes) -> str:
    if not encoded:
        return "the file is empty"
    if type(error).__name__ == "UnidentifiedImageError":
        return f"its {len(encoded):,} bytes are in no known image format"
    return f"{type(error).__name__}: {error}"


def _eight_bit(image: Image.Image, channels: int, name: str) -> Image.Image:
    """The image as mode L or RGB."""
    from PIL import Image

    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise DatasetError(
                f"{name} holds integers from {values.min()} to {values.max()}; grey images of "
                "more than 8 bits are read as 0..65535: convert it to an 8 or 16 bit image."
            )
        image = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    elif image.mode == "F":
        raise DatasetError(
            f"{name} holds floating-point pixels, whose scale is not known: convert it to an 8 or 16 bit image."
        )
    elif image.mode in ("LA", "PA", "La", "RGBA", "RGBa") or "transparency" in image.info:
        over = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")
    wanted = "L" if channels == 1 else "RGB"
    if image.mode not in (wanted, "RGB"):
        # Straight from L to L or RGB; anything else passes through RGB.
        image = image.convert("L" if image.mode in ("1", "L") else "RGB")
    return image if image.mode == wanted else image.convert(wanted)


def _finish(image: Image.Image, transform: Transform, name: str) -> np.ndarray:
    from PIL import Image

    crop = transform.crop or min(image.size)
    if crop > min(image.size):
        raise DatasetError(
            f"{name} is {image.width}x{image.height} pixels, smaller than the {crop}x{crop} centre "
            f"crop: pass crop={min(image.size)} or less (or remove the file)."
        )
    if image.size != (crop, crop):
        left, top = (image.width - crop) // 2, (image.height - crop) // 2
        image = image.crop((left, top, left + crop, top + crop))
    size = transform.image_size
    if crop != size:
        shrink = crop > size
        method = Image.Resampling.BILINEAR if shrink else Image.Resampling.BICUBIC
        image = image.resize((size, size), method)
    return np.asarray(image, np.uint8).reshape(size, size, transform.channels)


def transform_array(images: np.ndarray, transform: Transform, name: str) -> np.ndarray:
    """`decode_image` for uint8 images [n, H, W, C] that are already decoded."""
    _, height, width, channels = images.shape
    size = transform.image_size
    if (height, width, channels) == (size, size, transform.channels) and (transform.crop in (None, size)):
        return images
    require_pillow()
    from PIL import Image

    out = np.empty((len(images), size, size, transform.channels), np.uint8)
    for i, pixels in enumerate(images):
        image = Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)
        out[i] = _finish(_eight_bit(image, transform.channels, name), transform, name)
    return out
