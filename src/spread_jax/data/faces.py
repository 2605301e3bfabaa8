"""Synthetic faces: a data set of any size, without a download, drawn from known factors.

The faces are painted back to front (background, hair behind, shoulders, neck, ears, head, eyes,
brows, mouth, hair in front). Edges are soft, one pixel wide, from signed distances, and the head is
lit as a curved surface with a nose, eye sockets, cheeks, lips and a chin.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from spread_jax.data.images import Transform, transform_array
from spread_jax.data.source import Block, Source, digest

SIZE = 64
NUM_EXAMPLES = {"train": 8000, "validation": 1000, "test": 1000}
_SPLIT_KEYS = {"train": 0, "validation": 1, "test": 2}
_CHUNK = 12
# Change with every change of the pictures, so that caches are drawn again.
_VERSION = 1


class FaceFactors(NamedTuple):
    """The factors of n faces, each an array [n]; `FACTOR_RANGES` holds their ranges.

    Lengths are in half heights of the head, angles in radians, colours positions on a scale.
    """

    x: np.ndarray  # head's centre, in half widths of the image, to the right
    y: np.ndarray  # the same, downwards
    scale: np.ndarray  # half height of the head, in half heights of the image
    yaw: np.ndarray  # turn to the image's right
    tilt: np.ndarray  # lean, clockwise
    skin_tone: np.ndarray  # 0 light, 1 dark
    skin_warmth: np.ndarray  # 0 cool, 1 warm
    face_width: np.ndarray  # half width of the head
    jaw: np.ndarray  # 0 square, 1 pointed
    hair_colour: np.ndarray  # black, brown, auburn, blond, grey
    hair_length: np.ndarray  # 0 above the ears, 1 below the shoulders
    hair_volume: np.ndarray  # 0 flat, 1 full
    fringe: np.ndarray  # 0 high forehead, 1 down to the brows
    parting: np.ndarray  # where the hair is parted, -1 left, 1 right
    hair_wave: np.ndarray  # 0 straight, 1 wavy
    eye_colour: np.ndarray  # dark brown, hazel, green, blue, grey
    eye_spacing: np.ndarray  # from the middle to an eye's centre
    eye_size: np.ndarray  # half width of an eye
    eye_openness: np.ndarray  # 0 nearly closed, 1 wide open
    gaze: np.ndarray  # -1 left, 1 right
    brow_height: np.ndarray  # 0 low, 1 raised
    brow_angle: np.ndarray  # positive: inner ends lower
    brow_thickness: np.ndarray  # 0 thin, 1 thick
    nose_length: np.ndarray  # from the eyes to its base
    nose_width: np.ndarray  # half width of the base
    mouth_width: np.ndarray  # half width
    smile: np.ndarray  # -1 corners down, 1 up
    mouth_openness: np.ndarray  # 0 closed, 1 open
    lip_colour: np.ndarray  # 0 like the skin, 1 red
    light_azimuth: np.ndarray  # negative from the left
    light_elevation: np.ndarray  # above the horizon
    light_strength: np.ndarray  # 0 flat, 1 hard
    background_warmth: np.ndarray  # 0 slate, 1 sand: the backdrops of a studio
    background_value: np.ndarray  # 0 dark, 1 light
    clothes_hue: np.ndarray  # around the colour circle
    clothes_value: np.ndarray  # 0 dark, 1 light


FACTOR_RANGES = FaceFactors(
    x=(-0.1, 0.1),
    y=(-0.04, 0.08),
    scale=(0.58, 0.7),
    yaw=(-0.45, 0.45),
    tilt=(-0.22, 0.22),
    skin_tone=(0.0, 1.0),
    skin_warmth=(0.0, 1.0),
    face_width=(0.68, 0.82),
    jaw=(0.0, 1.0),
    hair_colour=(0.0, 1.0),
    hair_length=(0.0, 1.0),
    hair_volume=(0.0, 1.0),
    fringe=(0.0, 1.0),
    parting=(-1.0, 1.0),
    hair_wave=(0.0, 1.0),
    eye_colour=(0.0, 1.0),
    eye_spacing=(0.30, 0.38),
    eye_size=(0.15, 0.2),
    eye_openness=(0.0, 1.0),
    gaze=(-1.0, 1.0),
    brow_height=(0.0, 1.0),
    brow_angle=(-0.25, 0.15),
    brow_thickness=(0.0, 1.0),
    nose_length=(0.36, 0.46),
    nose_width=(0.10, 0.22),
    mouth_width=(0.2, 0.32),
    smile=(-0.35, 1.0),
    mouth_openness=(0.0, 1.0),
    lip_colour=(0.0, 1.0),
    light_azimuth=(-1.2, 1.2),
    light_elevation=(0.1, 1.0),
    light_strength=(0.0, 1.0),
    background_warmth=(0.0, 1.0),
    background_value=(0.0, 1.0),
    clothes_hue=(0.0, 1.0),
    clothes_value=(0.0, 1.0),
)
# Ends of the range are rarer for these, as in photographs; the others are uniform.
_CENTRED = ("x", "y", "yaw", "tilt", "gaze", "brow_angle")
_MOSTLY_LOW = ("mouth_openness",)

_SKIN = ((1.0, 0.86, 0.76), (0.95, 0.77, 0.63), (0.83, 0.62, 0.46), (0.62, 0.42, 0.29),
         (0.42, 0.27, 0.19))  # fmt: skip
_HAIR = ((0.09, 0.08, 0.09), (0.25, 0.16, 0.11), (0.42, 0.27, 0.17), (0.58, 0.28, 0.13),
         (0.87, 0.70, 0.42), (0.68, 0.66, 0.65))  # fmt: skip
_EYES = ((0.20, 0.11, 0.06), (0.42, 0.27, 0.12), (0.30, 0.44, 0.24), (0.24, 0.46, 0.66),
         (0.50, 0.58, 0.62))  # fmt: skip

_BACKDROPS = ((0.60, 0.84, 1.0), (0.80, 0.92, 1.0), (1.0, 0.97, 0.92), (1.0, 0.86, 0.68))


def sample_factors(rng: np.random.Generator, n: int) -> FaceFactors:
    """Draw the factors of n faces, each within its range in `FACTOR_RANGES`, independently.

    Args:
        rng: NumPy generator.
        n: how many faces.

    Returns:
        float32 arrays [n].

    Example:
        >>> import numpy as np
        >>> from spread_jax.data import sample_factors
        >>> sample_factors(np.random.default_rng(0), 5).smile.shape
        (5,)
    """
    return _from_uniform(rng.random((n, len(FaceFactors._fields))))


def factors_at(seed: int, split: str, start: int, stop: int) -> FaceFactors:
    """The factors of faces start..stop-1 of a split; those of face i depend on nothing else."""
    fields = len(FaceFactors._fields)
    blocks = -(-fields // 4)  # Philox makes four numbers per count of its counter.
    bits = np.random.Philox(key=[seed, _SPLIT_KEYS[split]]).advance(start * blocks)
    raw = bits.random_raw((stop - start) * blocks * 4).reshape(-1, blocks * 4)[:, :fields]
    return _from_uniform((raw >> np.uint64(11)) * 2.0**-53)


def _from_uniform(uniform: np.ndarray) -> FaceFactors:
    columns = []
    for name, (low, high), u in zip(FaceFactors._fields, FACTOR_RANGES, uniform.T, strict=True):
        if name in _CENTRED:
            u = 0.5 + 0.5 * np.sign(u - 0.5) * np.abs(2 * u - 1) ** 1.6
        elif name in _MOSTLY_LOW:
            u = u * u
        columns.append((low + (high - low) * u).astype(np.float32))
    return FaceFactors(*columns)


def render_faces(factors: FaceFactors) -> np.ndarray:
    """Draw faces.

    Args:
        factors: arrays [n] or scalars; values outside their range are drawn as they are.

    Returns:
        uint8 array [n, 64, 64, 3].

    Raises:
        ValueError: a factor's shape cannot be broadcast to [n].

    Example:
        >>> import numpy as np
        >>> from spread_jax.data import render_faces, sample_factors
        >>> render_faces(sample_factors(np.random.default_rng(0), 2)).shape
        (2, 64, 64, 3)
    """
    columns = np.broadcast_arrays(*(np.atleast_1d(np.float32(f)) for f in factors))
    if columns[0].ndim != 1:
        shapes = {name: np.shape(f) for name, f in factors._asdict().items() if np.ndim(f) > 1}
        raise ValueError(f"Factors are arrays [n] or scalars, but got the shapes {shapes}.")
    n = columns[0].shape[0]
    out = np.empty((n, SIZE, SIZE, 3), np.uint8)
    for start in range(0, n, _CHUNK):
        part = FaceFactors(*(column[start : start + _CHUNK, None, None] for column in columns))
        out[start : start + _CHUNK] = _Painter(part).paint()
    return out


def faces_source(
    split: str, image_size: int | None, crop: int | None, channels: int | None, *, seed: int = 0
) -> Source:
    """8,000 training, 1,000 validation and 1,000 test faces."""
    transform = Transform(image_size or SIZE, crop, channels or 3)

    def read(start: int, stop: int) -> Block:
        images = render_faces(factors_at(seed, split, start, stop))
        return Block(transform_array(images, transform, "A synthetic face"))

    return Source(
        name="faces",
        location=f"spread_jax.data.faces seed {seed}",
        description=f"synthetic faces (seed {seed})",
        fingerprint=digest((_VERSION, seed, split)),
        num_examples=NUM_EXAMPLES[split],
        image_shape=(transform.image_size, transform.image_size, transform.channels),
        settings=str(transform),
        read=read,
    )


def _palette(colours: tuple, position: np.ndarray) -> np.ndarray:
    """Linear interpolation along a row of colours; position [n, 1, 1] in 0..1 -> [n, 3, 1, 1]."""
    table = np.asarray(colours, np.float32)
    at = np.clip(position[:, 0, 0], 0, 1) * (len(table) - 1)
    low = np.minimum(at.astype(int), len(table) - 2)
    part = (at - low).astype(np.float32)[:, None]
    return (table[low] * (1 - part) + table[low + 1] * part)[:, :, None, None]


def _rgb(red: float, green: float, blue: float) -> np.ndarray:
    return np.array((red, green, blue), np.float32)[None, :, None, None]


def _hue(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    """A smooth colour circle: [n, 1, 1] each -> [n, 3, 1, 1]."""
    phase = _rgb(0, 1 / 3, 2 / 3)
    wave = 0.5 + 0.5 * np.cos(2 * np.pi * (hue[:, None] - phase))
    return (value[:, None] * (1 - saturation[:, None] * (1 - wave))).astype(np.float32)


def _smoothstep(low: float, high: float, x: np.ndarray) -> np.ndarray:
    t = np.clip((x - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


class _Painter:
    """A chunk of faces; every array is float32 [n, H, W], colours [n, 3, 1, 1]."""

    def __init__(self, factors: FaceFactors):
        f = self.f = factors
        axis = (np.arange(SIZE, dtype=np.float32) + 0.5) * (2 / SIZE) - 1
        self.image_x, self.image_y = axis[None, None, :], axis[None, :, None]
        dx, dy = self.image_x - f.x, self.image_y - f.y
        cos, sin = np.cos(f.tilt) / f.scale, np.sin(f.tilt) / f.scale
        # Head coordinates: u to the right, v down; the skull ends at v = -1, the chin at v = 1.
        self.u, self.v = dx * cos + dy * sin, dy * cos - dx * sin
        self.sharpness = f.scale * (SIZE / 2)  # pixels per unit of u and v
        elevation, azimuth = np.cos(f.light_elevation), f.light_azimuth
        self.light = (
            elevation * np.sin(azimuth),
            -np.sin(f.light_elevation),
            elevation * np.cos(azimuth),
        )
        self.rgb = np.empty((f.x.shape[0], 3, SIZE, SIZE), np.float32)

        skin = _palette(_SKIN, f.skin_tone)
        warm = (f.skin_warmth - 0.5)[:, None] * _rgb(0.05, -0.02, -0.14)
        self.skin = skin + warm
        # Light that has passed through skin is red, so shadows on it are not grey.
        self.skin_shadow = self.skin * _rgb(0.50, 0.36, 0.33)
        self.hair = _palette(_HAIR, f.hair_colour)

    def paint(self) -> np.ndarray:
        self._background()
        self._hair_behind()
        self._shoulders()
        self._head()
        self._mouth()
        self._eyes()
        self._hair_in_front()
        out = np.clip(self.rgb, 0, 1)
        return np.rint(out * 255).astype(np.uint8).transpose(0, 2, 3, 1)

    # Painting -------------------------------------------------------------------------------

    def _cover(self, distance: np.ndarray, softness: float = 1.0) -> np.ndarray:
        """Opacity of a shape from its signed distance (negative inside), one pixel of edge."""
        return np.clip(0.5 - distance * (self.sharpness / softness), 0, 1)

    def _over(self, alpha: np.ndarray, colour: np.ndarray, window: tuple = (slice(None),) * 3) -> None:
        for channel in range(3):  # One at a time stays in the processor's cache.
            part = self.rgb[:, channel][window]
            change = colour[:, channel] - part
            change *= alpha
            part += change

    def _window(self, u_low, u_high, v_low, v_high) -> tuple[slice, slice, slice]:
        """The part of the images that can hold head coordinates in this box."""
        f = self.f
        cos, sin = np.cos(f.tilt) * f.scale, np.sin(f.tilt) * f.scale
        corners = [(u, v) for u in (u_low, u_high) for v in (v_low, v_high)]
        xs = np.concatenate([f.x + u * cos - v * sin for u, v in corners])
        ys = np.concatenate([f.y + u * sin + v * cos for u, v in corners])
        window = [slice(None)]
        for values in (ys, xs):
            low, high = ((bound + 1) * (SIZE / 2) for bound in (values.min(), values.max()))
            first = int(np.clip(np.floor(low) - 1, 0, SIZE - 1))
            window.append(slice(first, int(np.clip(np.ceil(high) + 1, first + 1, SIZE))))
        return tuple(window)

    def _lit(self, nx: np.ndarray, ny: np.ndarray, nz: np.ndarray) -> np.ndarray:
        """Brightness 0..1 of a surface with this unit normal."""
        lx, ly, lz = self.light
        facing = lx * nx + ly * ny + lz * nz
        wrapped = np.clip(facing * 0.75 + 0.25, 0, 1)  # soft light reaches around
        hard = 0.35 + 0.65 * self.f.light_strength
        return (1 - hard) * 0.85 + hard * (0.12 + wrapped)

    # Things ---------------------------------------------------------------------------------

    def _background(self) -> None:
        f = self.f
        value = 0.3 + 0.6 * f.background_value
        colour = _palette(_BACKDROPS, f.background_warmth) * value[:, None]
        glow = 1.05 - 0.22 * (self.image_x**2 + self.image_y**2)
        slope = self.image_x * np.sin(f.light_azimuth) * 0.12 - self.image_y * 0.08
        self.rgb[:] = colour * (glow + slope * f.light_strength)[:, None]

    def _hair_shade(self, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Brightness of hair at head coordinates: form, strands and a band of gloss."""
        f = self.f
        width, height = f.face_width + 0.2, 1.25
        nx, ny = u / width, np.minimum(v, 0.2) / height
        nz = np.sqrt(np.clip(1 - nx * nx - ny * ny, 0.04, 1))
        lit = self._lit(nx, ny, nz)
        across = (u - 0.4 * f.parting) / (1.3 + 0.5 * np.clip(v, -1, 1))
        bend = f.hair_wave * np.sin(6 * v + 3 * f.parting)
        strands = np.sin(26 * across + 1.6 * bend) * 0.5 + np.sin(11 * across + 2.5 * bend) * 0.5
        gloss = np.exp(-(((ny + 0.55 - 0.25 * np.abs(nx)) / 0.16) ** 2))
        return lit * (0.85 + 0.16 * strands) + 0.28 * gloss * lit

    def _hair_colour(self, shade: np.ndarray) -> np.ndarray:
        shine = _rgb(0.10, 0.09, 0.08)
        return self.hair * (0.25 + shade)[:, None] + shine * (shade * shade)[:, None]

    def _hair_behind(self) -> None:
        f = self.f
        window = self._window(-1.35, 1.35, -1.3, 1.75)
        u, v = self.u[window], self.v[window]
        end = 0.15 + 1.55 * f.hair_length
        width = f.face_width + 0.07 + 0.2 * f.hair_volume * f.hair_length
        width = width + 0.05 * f.hair_wave * np.sin(7 * v) * np.clip(v, 0, 1)
        width = width * (1 - 0.18 * np.clip(v - end + 0.5, 0, 1))
        side, below = np.abs(u) - width + 0.2, v - end + 0.2
        corner = np.maximum(side, 0) ** 2 + np.maximum(below, 0) ** 2
        falling = np.sqrt(corner) - 0.2  # round at the corners
        falling = np.maximum(falling, -0.2 - v)
        outer = self._outer(u, v)
        alpha = self._cover(np.minimum(falling, np.maximum(outer, v - 0.1)))
        shade = self._hair_shade(u, v)
        self._over(alpha, self._hair_colour(shade * (0.62 - 0.12 * np.clip(v, 0, 1))), window)
        self.hair_parts = window, outer, shade  # The hair in front needs them again.

    def _outer(self, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Signed distance to the outline of the hair around the skull."""
        f = self.f
        width = f.face_width + 0.06 + 0.14 * f.hair_volume
        height = 1.04 + 0.16 * f.hair_volume
        return (np.sqrt((u / width) ** 2 + (v / height) ** 2 + 1e-6) - 1) * width

    def _shoulders(self) -> None:
        f = self.f
        top = int(((0.6 * f.scale + f.y).min() + 1) * SIZE / 2)
        window = (slice(None), slice(top, SIZE), slice(None))
        # The body stands upright: it follows the head's place and size, and its tilt a little.
        x = (self.image_x - f.x - 0.1 * f.tilt) / f.scale
        y = ((self.image_y - f.y) / f.scale)[:, top:]
        lx, _, _ = self.light
        neck = 0.40 + 0.25 * (f.face_width - 0.68)
        flare = np.clip(y - 1.0, 0, 1)
        distance = np.abs(x) - neck - 0.9 * flare * flare
        side = np.clip(x / neck, -1, 1)
        shade = 0.52 + 0.25 * lx * side * f.light_strength - 0.12 * side * side
        # The chin's shadow falls on the neck.
        shade = shade - 0.3 * np.exp(-(((y - 0.86) / 0.26) ** 2)) * (0.5 + 0.5 * f.light_strength)
        shade = np.clip(shade, 0, 1)[:, None]
        colour = self.skin_shadow + (self.skin - self.skin_shadow) * shade
        self._over(self._cover(distance), colour, window)

        value = 0.2 + 0.7 * f.clothes_value
        cloth = _hue(f.clothes_hue, np.full_like(value, 0.6), value)
        slope = 1.28 + 0.22 * x * x + 0.02 * np.abs(x)
        collar = 0.26 * np.exp(-((x / 0.34) ** 2))
        distance = slope + collar - y
        folds = 0.78 + 0.22 * lx * np.clip(x / 1.6, -1, 1) - 0.12 * np.clip(y - 1.5, 0, 1)
        folds = folds - 0.15 * np.exp(-(((y - slope - collar) / 0.06) ** 2))
        self._over(self._cover(distance), cloth * folds[:, None], window)

    def _head(self) -> None:
        f = self.f
        turn = np.sin(f.yaw)
        # Ears: the one the face turns away from comes forward.
        for side in (-1, 1):
            at = side * (f.face_width + 0.015) - 0.10 * np.maximum(side * turn, 0) * side
            window = self._window(at - 0.15, at + 0.15, -0.2, 0.35)
            du, dv = (self.u[window] - at) / 0.11, (self.v[window] - 0.08) / 0.2
            radius = np.sqrt(du * du + dv * dv)
            shade = 0.62 - 0.25 * np.exp(-(radius**2) * 3.5) + 0.2 * self.light[0] * side
            colour = self.skin_shadow + (self.skin - self.skin_shadow) * shade[:, None]
            self._over(self._cover((radius - 1) * 0.11), colour, window)

        window = self._window(-0.87, 0.87, -1.05, 1.05)
        u, v = self.u[window], self.v[window]
        below = np.clip(v, 0, 1.2)
        width = f.face_width * (1 - (0.10 + 0.24 * f.jaw) * below * below)
        nx, ny = u / width, v
        squared = nx * nx + ny * ny
        alpha = self._cover((np.sqrt(squared + 1e-6) - 1) * 0.8)
        nz = np.sqrt(np.clip(1.02 - 0.92 * squared, 0.02, 1))

        # Features in relief; u0 is where a feature at rest would be, after the turn of the head.
        nose = self._turned(0.0, 1.17)
        base = f.nose_length
        ridge_v = np.clip((v + 0.05) / (base + 0.05), 0, 1)
        ridge_u = u - nose * (0.35 + 0.65 * ridge_v)
        ridge_w = 0.075 + (f.nose_width - 0.075) * 0.7 * ridge_v**2
        fade = _smoothstep(-0.12, 0.1, v) * (1 - _smoothstep(0.0, 0.13, v - base))
        relief = 0.13 * (0.25 + ridge_v) * fade * np.exp(-((ridge_u / ridge_w) ** 2))
        for side in (-1, 1):
            eye = self._turned(side * f.eye_spacing)
            relief -= 0.05 * np.exp(-(((u - eye) / 0.2) ** 2) - ((v + 0.04) / 0.13) ** 2)
            cheek = self._turned(side * 0.40)
            relief += 0.05 * (1 + 0.5 * f.smile) * np.exp(-(((u - cheek) / 0.2) ** 2) - ((v - 0.42) / 0.18) ** 2)
        mouth = self._turned(0.0, 1.03)
        chin = np.exp(-(((u - mouth) / 0.2) ** 2) - ((v - 0.9) / 0.12) ** 2)
        hollow = np.exp(-(((u - mouth) / 0.22) ** 2) - ((v - 0.78) / 0.06) ** 2)
        relief += 0.05 * chin - 0.03 * hollow
        step = self.sharpness  # np.gradient is per pixel
        slope_v, slope_u = np.gradient(relief, axis=(1, 2))
        nx, ny = nx - slope_u * step, ny - slope_v * step
        length = 1 / np.sqrt(nx * nx + ny * ny + nz * nz)
        shade = self._lit(nx * length, ny * length, nz * length)
        shade *= 1.06 - 0.16 * squared  # less light reaches the rim

        # The nose's shadow, away from the light, and the nostrils.
        lx, _ly, _ = self.light
        du = u - nose + 0.16 * lx
        cast = np.exp(-((du / (f.nose_width * 0.9)) ** 2) - ((v - base - 0.06) / 0.075) ** 2)
        shade -= 0.26 * (0.35 + 0.65 * f.light_strength) * cast
        for side in (-1, 1):
            at = nose * 0.93 + side * f.nose_width * 0.5
            du, dv = (u - at) / 0.05, (v - base - 0.03) / 0.03
            shade -= 0.3 * np.exp(-du * du - dv * dv)
        np.clip(shade, 0, 1.1, out=shade)

        shade = shade[:, None]
        colour = self.skin_shadow + (self.skin - self.skin_shadow) * shade
        blush = np.zeros_like(u)
        for side in (-1, 1):
            cheek = self._turned(side * 0.42)
            blush += np.exp(-(((u - cheek) / 0.2) ** 2) - ((v - 0.36) / 0.16) ** 2)
        tint = _rgb(0.03, -0.055, -0.035)
        colour += (blush * (1.0 - 0.5 * f.skin_tone))[:, None] * tint
        gloss = np.clip(shade - 0.88, 0, 1) * 0.8
        self._over(alpha, colour + gloss, window)

    def _turned(self, at: np.ndarray | float, radius: float = 1.0) -> np.ndarray:
        """Where a point of the front of the head, at rest at u = `at`, is after the turn."""
        width = self.f.face_width
        return radius * width * np.sin(np.arcsin(np.clip(at / width, -0.95, 0.95)) + self.f.yaw)

    def _foreshortening(self, at: np.ndarray | float) -> np.ndarray:
        width = self.f.face_width
        angle = np.arcsin(np.clip(at / width, -0.95, 0.95))
        return np.cos(angle + self.f.yaw) / np.cos(angle)

    def _mouth(self) -> None:
        f = self.f
        centre = self.f.nose_length + 0.235
        half = f.mouth_width * (1 + 0.12 * f.smile) * np.cos(f.yaw)
        middle = self._turned(0.0, 1.03)
        window = self._window(middle - 1.3 * half, middle + 1.3 * half, centre - 0.25, centre + 0.28)
        u, v = self.u[window], self.v[window] - centre
        e = (u - middle) / half
        e2 = np.minimum(e * e, 1.4)
        bend = -0.11 * f.smile * (e2 - 0.35)  # corners up, in a smile
        gap = 0.13 * f.mouth_openness * np.clip(1 - e2, 0, 1)
        taper = np.sqrt(np.clip(1 - e2, 0, 1))
        bow = 0.022 * np.exp(-((e / 0.16) ** 2))
        inner_top, inner_bottom = bend - 0.35 * gap, bend + 0.65 * gap
        top = inner_top - 0.075 * taper + bow * taper
        bottom = inner_bottom + 0.095 * taper
        ends = (np.abs(e) - 1) * half

        lip = self.skin * _rgb(0.86, 0.60, 0.58)
        red = _rgb(0.72, 0.20, 0.24)
        red = red * (1 - 0.35 * f.skin_tone[:, None])
        strength = 0.15 + 0.6 * f.lip_colour[:, None]
        lip = lip + (red - lip) * strength
        body = self._cover(np.maximum(np.maximum(top - v, v - bottom), ends), 1.2)
        upper = np.clip((inner_top - v) / 0.08 + 0.4, 0, 1)
        shade = 0.92 - 0.2 * upper
        shine = 0.13 * np.exp(-((e / 0.5) ** 2) - ((v - inner_bottom - 0.045) / 0.03) ** 2)
        self._over(body, lip * shade[:, None] + shine[:, None], window)

        inside = self._cover(np.maximum(np.maximum(inner_top - v, v - inner_bottom), ends + 0.03))
        inside = inside * np.clip(gap * 40, 0, 1)
        dark = _rgb(0.26, 0.07, 0.08)
        self._over(inside, dark, window)
        teeth = self._cover(v - inner_top - 0.06) * (1 - 0.35 * e2)
        white = _rgb(0.95, 0.93, 0.89)
        self._over(inside * teeth, white, window)
        line = 0.55 * np.exp(-(((v - bend) / 0.022) ** 2)) * np.clip(1.25 - e2, 0, 1)
        line = line * np.clip(1 - gap * 25, 0, 1) * self._cover(ends - 0.03)
        self._over(line, dark * 0.9 + 0.1 * self.skin, window)

    def _eyes(self) -> None:
        f = self.f
        iris_colour = _palette(_EYES, f.eye_colour)
        lash = self.hair * 0.25 + 0.03
        brow = self.hair * 0.75 * (1 - 0.25 * self.f.skin_tone[:, None])
        white = _rgb(0.97, 0.96, 0.95)
        white = white * (0.93 - 0.12 * self.f.skin_tone[:, None])
        for side in (-1, 1):
            narrow = np.maximum(self._foreshortening(side * f.eye_spacing), 0.45)
            half = f.eye_size * narrow
            centre = self._turned(side * f.eye_spacing)
            window = self._window(centre - 1.5 * half, centre + 1.5 * half, -0.45, 0.25)
            u, v = self.u[window] - centre, self.v[window]
            e = u / half
            e2 = np.minimum(e * e, 1.6)
            arch = 1 - e2
            open_ = 0.05 + 0.085 * f.eye_openness
            slant = -0.018 * side * e  # outer corners a little higher
            upper = slant - open_ * arch
            lower = slant + 0.62 * open_ * arch
            ends = (np.abs(e) - 1) * half
            almond = self._cover(np.maximum(np.maximum(upper - v, v - lower), ends))
            shaded = np.clip((v - upper) / 0.09 + 0.45, 0, 1)  # the lid's shadow
            self._over(almond, white * shaded[:, None], window)

            radius = 0.092
            iu = (u - 0.05 * f.gaze - 0.03 * np.sin(f.yaw)) / np.sqrt(narrow)
            iv = v - slant + 0.012
            distance = np.sqrt(iu * iu + iv * iv)
            iris = almond * self._cover(distance - radius)
            tone = 0.55 + 4.2 * np.clip(iv + 0.04, 0, 0.14)
            self._over(iris, iris_colour * tone[:, None], window)
            self._over(iris * self._cover(distance - 0.042), iris_colour * 0.12, window)
            lx, _ly, _ = self.light
            spark = (iu - 0.035 * np.sign(lx)) ** 2 + (iv + 0.035) ** 2
            self._over(almond * np.exp(-spark / 0.0011), white * 0 + 1, window)

            reach = np.clip((1.25 - e2) * 4, 0, 1)
            lid = np.exp(-(((v - upper + 0.012) / 0.026) ** 2)) * reach
            self._over(0.8 * lid, lash, window)
            fold = np.exp(-(((v - upper + 0.085) / 0.03) ** 2)) * reach * 0.25
            self._over(fold, self.skin_shadow, window)
            under = np.exp(-(((v - lower - 0.02) / 0.022) ** 2)) * reach * 0.2
            self._over(under, self.skin_shadow, window)

            b = (u - 0.03 * side) / (half * 1.25)
            b2 = np.minimum(b * b, 1.6)
            middle = -0.235 - 0.08 * f.brow_height - 0.03 * (1 - b2) - f.brow_angle * 0.16 * b * side
            thick = (0.02 + 0.028 * f.brow_thickness) * (1.0 - 0.35 * (b * side + 0.2))
            stroke = self._cover(np.maximum(np.abs(v - middle) - thick, (np.abs(b) - 1) * half), 2.0)
            self._over(0.88 * stroke, brow, window)

    def _hair_in_front(self) -> None:
        f = self.f
        window, outer, shade = self.hair_parts
        u, v = self.u[window], self.v[window]
        across = u / f.face_width
        shift = across - 0.45 * np.sin(f.yaw)
        line = -0.68 + 0.32 * f.fringe
        part = 0.5 * f.parting
        lift = 0.16 * (1 - 0.5 * f.fringe) * np.exp(-(((shift - part) / 0.35) ** 2))
        sides = (0.35 + 0.75 * np.minimum(f.hair_length * 2, 1)) * np.abs(shift * shift * shift)
        sweep = 0.10 * f.parting * shift
        jagged = 0.025 * np.sin(23 * shift + 5 * f.parting) * (0.4 + f.fringe)
        edge = line - lift + sides + sweep + jagged
        edge = np.minimum(edge, 0.1 + 1.4 * f.hair_length)
        distance = np.maximum(outer, v - edge)
        # The fringe shades the forehead just below it.
        shadow = np.exp(-((np.clip(v - edge, 0, 1) / 0.07) ** 2)) * self._cover(outer)
        inside = self._cover((np.sqrt(across**2 + v**2) - 0.98) * 0.8)
        self._over(0.32 * shadow * inside, self.skin_shadow * 0.8, window)
        shade = shade * (0.8 + 0.2 * np.clip((edge - v) * 5, 0, 1))
        self._over(self._cover(distance), self._hair_colour(shade), window)
