"""Where data lies on this machine is known from this user's own cache, never from the folder of a run."""

import os

import pytest

from spread_jax.data import open_dataset
from spread_jax.data.places import recall, remember


def test_a_place_is_kept_for_the_pixels_that_lay_there(photos, own_cache, monkeypatch):
    dataset = open_dataset(photos, image_size=4)
    monkeypatch.chdir(photos.parent)
    remember(dataset, "photos")
    assert recall(dataset.fingerprint) == str(photos)
    assert recall(dataset.fingerprint, cache_dir=own_cache / "another") == str(photos)
    remember(open_dataset("faces", "test", max_examples=1), "faces")
    assert os.listdir(own_cache / "places") == [dataset.fingerprint]


@pytest.mark.parametrize("fingerprint", [None, 3, "", "../../../etc/passwd", "0" * 15, "0" * 16, "G" * 16, ["0" * 16]])
def test_a_strangers_fingerprint_finds_nothing(fingerprint, own_cache):
    assert recall(fingerprint) is None


def test_what_cannot_be_kept_or_read_is_asked_for(photos, own_cache):
    dataset = open_dataset(photos, image_size=4)
    (own_cache / "places").write_text("a file in the way")
    remember(dataset, str(photos))
    assert recall(dataset.fingerprint) is None
    (own_cache / "places").unlink()
    (own_cache / "places").mkdir()
    (own_cache / "places" / dataset.fingerprint).symlink_to("/etc/passwd")
    assert recall(dataset.fingerprint) is None
    (own_cache / "places" / dataset.fingerprint).unlink()
    (own_cache / "places" / dataset.fingerprint).write_text("relative/path")
    assert recall(dataset.fingerprint) is None
