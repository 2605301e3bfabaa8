"""The sources that need no files: synthetic faces and scikit-learn's digits."""

from __future__ import annotations

import numpy as np
import pytest

from spread_jax.data import FaceFactors, open_dataset, render_faces, sample_factors
from spread_jax.data.faces import FACTOR_RANGES, factors_at

MIDDLE = FaceFactors(*(np.float32((low + high) / 2) for low, high in FACTOR_RANGES))


def test_a_face_depends_on_seed_split_and_index_alone():
    whole = render_faces(factors_at(0, "train", 0, 40))
    assert whole.shape == (40, 64, 64, 3)
    assert whole.dtype == np.uint8
    for i in range(40):  # in other company, so that no chunk leaks into its faces
        assert np.array_equal(render_faces(factors_at(0, "train", i, i + 1))[0], whole[i])
    assert len({face.tobytes() for face in whole}) == 40
    for other in (factors_at(0, "test", 17, 18), factors_at(1, "train", 17, 18)):
        assert not np.array_equal(render_faces(other)[0], whole[17])


def test_opened_like_any_other_set():
    faces = open_dataset("faces", "validation", max_examples=30)
    assert np.array_equal(faces.images, render_faces(factors_at(0, "validation", 0, 30)))
    small = open_dataset("faces", "test", image_size=16, channels=1, max_examples=4)
    assert small.image_shape == (16, 16, 1)
    assert len(small) == 4


def test_factors_stay_in_their_ranges_and_fill_them():
    factors = sample_factors(np.random.default_rng(0), 2000)
    for name, values, (low, high) in zip(FaceFactors._fields, factors, FACTOR_RANGES, strict=True):
        assert values.shape == (2000,), name
        assert low <= values.min() < low + 0.05 * (high - low), name
        assert high >= values.max() > high - 0.05 * (high - low), name


@pytest.mark.parametrize("name", FaceFactors._fields)
def test_every_factor_is_visible(name):
    """Its two ends differ clearly somewhere, and the pictures stay unsaturated."""
    # A mouth that can be seen open, hair that can wave, a light that casts shadows.
    base = MIDDLE._replace(hair_length=np.float32(0.9), light_strength=np.float32(0.8))
    start, end = getattr(FACTOR_RANGES, name)
    if name.endswith("_hue"):
        end = (start + end) / 2  # the range is a full circle
    low, high = render_faces(base._replace(**{name: np.float32([start, end])})).astype(int)
    changed = np.abs(high - low).max(-1) > 20
    assert changed.sum() >= 12


@pytest.mark.parametrize(
    ("name", "box"),
    [
        ("smile", (slice(36, 56), slice(20, 44))),
        ("eye_openness", (slice(24, 40), slice(16, 48))),
        ("gaze", (slice(24, 40), slice(16, 48))),
        ("eye_colour", (slice(24, 40), slice(16, 48))),
    ],
)
def test_a_local_factor_changes_its_place_alone(name, box):
    ends = MIDDLE._replace(**{name: np.asarray(getattr(FACTOR_RANGES, name), np.float32)})
    low, high = render_faces(ends).astype(int)
    change = np.abs(high - low).sum(-1)
    assert change[box].sum() >= 0.8 * change.sum() > 0


def test_mirrored_pose_is_a_mirrored_head():
    """A left-right check of the geometry, with light, gaze and hair in the middle."""
    base = MIDDLE._replace(gaze=np.float32(0))
    turned = render_faces(base._replace(yaw=np.float32([-0.3, 0.3])))[:, 20:56].astype(int)
    assert np.abs(turned[0] - turned[1][:, ::-1]).mean() < 2.5
    assert np.abs(turned[0] - turned[1]).mean() > 5


def test_light_comes_from_its_side():
    lit = render_faces(MIDDLE._replace(light_azimuth=np.float32([-1, 1]))).astype(float)
    left, right = lit[:, 30:44, 16:28].mean((1, 2, 3)), lit[:, 30:44, 36:48].mean((1, 2, 3))
    assert left[0] > right[0] + 10
    assert right[1] > left[1] + 10


def test_edges_are_soft():
    """A shift by a tenth of a pixel moves the picture a little, not in jumps of whole pixels."""
    shifts = render_faces(MIDDLE._replace(x=np.float32([0, 0.1 / 32]))).astype(int)
    change = np.abs(shifts[1] - shifts[0])
    assert 0 < change.max() < 45


def test_digits():
    datasets = pytest.importorskip("sklearn.datasets")
    splits = [open_dataset("digits", s) for s in ("train", "validation", "test")]
    assert [len(d) for d in splits] == [1437, 180, 180]
    assert splits[0].image_shape == (28, 28, 1)
    native = [open_dataset("digits", s, image_size=8) for s in ("train", "validation", "test")]
    values, labels = datasets.load_digits(return_X_y=True)
    stored = np.concatenate([d.images for d in native]).reshape(-1, 64)
    expected = np.rint(values * 255 / 16).astype(np.uint8)
    pairs = [(*row, label) for row, label in zip(expected.tolist(), labels, strict=True)]
    got = np.concatenate([d.labels for d in native])
    assert sorted(pairs) == sorted((*row, label) for row, label in zip(stored.tolist(), got, strict=True))
    for large, small in zip(splits, native, strict=True):
        assert np.array_equal(large.labels, small.labels)
        means = [d.images.mean((1, 2, 3)) for d in (large, small)]
        assert np.corrcoef(*means)[0, 1] > 0.98
