"""Features order images by their damage; files keep their seal; Inception's errors are sentences."""

import json
import socket
import sys
import time
import tomllib
import types
from pathlib import Path

import jax
import numpy as np
import pytest
import scipy.ndimage
import scipy.special

from spread_jax.data import Dataset, render_faces, sample_factors
from spread_jax.data import faces as faces_module
from spread_jax.evaluation import (
    FeatureNetwork,
    FeaturesError,
    Moments,
    features,
    frechet_distance,
    inception_features,
    packaged_features,
    train_features,
)
from spread_jax.models import scores


@pytest.fixture(scope="module")
def faces():
    """Images 16x16 of synthetic faces, small ones: every fourth pixel."""
    images = render_faces(sample_factors(np.random.default_rng(1), 480))
    return np.ascontiguousarray(images[:, ::4, ::4])


@pytest.fixture(scope="module")
def network(faces):
    return train_features(
        faces[:240], key=jax.random.key(0), num_steps=150, batch_size=32, width=8, data="faces", data_fingerprint="f1"
    )


def test_training_learns_its_tasks(network):
    learned = network.config["last_steps"]
    assert learned["rotation_accuracy"] > 0.4  # chance is a quarter
    assert learned["view_accuracy"] > 4 / 32  # chance is 1 / 32
    assert "label_accuracy" not in learned
    assert (network.config["train_images"], network.config["data_fingerprint"]) == (240, "f1")


def test_labels_are_learned_too():
    chance = np.random.default_rng(0)
    labels = chance.integers(0, 2, 64)
    images = (chance.integers(0, 40, (64, 12, 12, 1)) + 200 * labels[:, None, None, None]).astype(np.uint8)
    seen = []
    network = train_features(
        images,
        labels,
        key=jax.random.key(1),
        num_steps=25,
        batch_size=16,
        width=4,
        on_step=lambda step, metrics: seen.append((step, metrics)),
    )
    assert network.config["num_labels"] == 2
    assert [step for step, _ in seen] == [25]
    assert seen[0][1]["label_accuracy"] > 0.9


def test_views_are_told_apart_both_ways_round(faces, monkeypatch):
    """Which second view belongs to a first one, and which first to a second: the mean of both by SciPy."""
    monkeypatch.setattr(features, "_view", lambda image, draws, flip: image * draws[0])
    x, key = faces[:6] / np.float32(255), jax.random.key(3)
    params = features._initial_params(np.random.default_rng(1), 3, 8, 0)
    params |= {"rotation": np.zeros((96, 4), np.float32)}
    _, metrics = features._training_loss(params, x, None, key, flip=False)

    draws = np.asarray(jax.random.uniform(key, (11, 6)))[:, :, None, None, None]
    sides = [np.float64(features._features(params, x * draws[row])) @ params["view"] for row in (1, 6)]
    first, second = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in sides)
    similarity = first @ second.T / features._TEMPERATURE
    errors = [scipy.special.logsumexp(similarity, axis=axis) - np.diagonal(similarity) for axis in (0, 1)]
    assert abs(errors[0].mean() - errors[1].mean()) > 0.002  # or nothing is tested
    np.testing.assert_allclose(metrics["view_loss"], np.mean(errors), rtol=1e-4)
    np.testing.assert_allclose(metrics["rotation_loss"], np.log(4), rtol=1e-6)


def test_features_are_standardised_deterministic_and_batch_free(network, faces):
    found = network(faces[:240])
    assert found.shape == (240, 96)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found.mean(axis=0), 0, atol=1e-4)
    assert found.var(axis=0).mean() == pytest.approx(1, rel=1e-3)
    np.testing.assert_allclose(network(faces[:7]), found[:7], atol=1e-5)
    np.testing.assert_allclose(network(faces[:7] / 255.0), found[:7], atol=1e-4)


def test_the_packages_features_are_those_of_the_documentation(faces):
    found = packaged_features()
    root = Path(__file__).parents[2]
    assert f"features {found.fingerprint}" in (root / "docs/results/faces.md").read_text()
    assert (found.name, found.image_shape, found.dimension) == ("a network trained on faces", (64, 64, 3), 192)
    assert (found.config["train_images"], found.config["num_steps"]) == (8000, 600)
    rendered = render_faces(faces_module.factors_at(0, "train", 0, 16))
    assert found(rendered).var(axis=0).mean() == pytest.approx(1, abs=0.3)  # standardised over such images
    # The wheel is the whole folder, small as the file is.
    assert tomllib.loads((root / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"] == {
        "packages": ["src/spread_jax"]
    }
    assert (Path(features.__file__).parent / "trained/faces.npz").stat().st_size < 400_000


def test_synthetic_faces_get_the_packages_features_and_other_images_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(scores, "train_and_save_features", lambda *args, **options: "trained now")
    images = np.zeros((8000, 64, 64, 3), np.uint8)
    images[:4] = render_faces(faces_module.factors_at(0, "train", 0, 4))
    images[2, 5, 5] += np.uint8(images[2, 5, 5] < 255)  # as another processor may round
    said = []

    def found(images, name="faces"):
        dataset = Dataset.from_array(images, name=name)
        return scores.find_features(None, dataset, cache_dir=str(tmp_path), steps=1, say=said.append)

    assert found(images).fingerprint == packaged_features().fingerprint
    assert not said
    assert {found(images, "folder"), found(images[:7999]), found(images[::-1])} == {"trained now"}
    assert len(said) == 3
    # One's own come first.
    own = FeatureNetwork({**packaged_features().params, "scale": np.float32(2)}, packaged_features().config)
    dataset = Dataset.from_array(images, name="faces")
    scores.features_path(dataset, str(tmp_path)).parent.mkdir()
    own.save(scores.features_path(dataset, str(tmp_path)))
    assert found(images).fingerprint == own.fingerprint


def test_distances_grow_with_every_damage(network, faces):
    real, other = Moments.of(network(faces[240:])), faces[:240] / 255.0
    distance = lambda images: frechet_distance(Moments.of(network(images)), real)
    clean = distance(other)
    chance = np.random.default_rng(2)
    noise = chance.standard_normal(other.shape)
    blurred = [distance(scipy.ndimage.gaussian_filter(other, (0, s, s, 0))) for s in (1, 2)]
    noisy = [distance(np.clip(other + s * noise, 0, 1)) for s in (0.1, 0.2)]
    mixed = [distance((1 - a) * other + a * other[::-1]) for a in (0.25, 0.5)]
    lost = [distance(np.repeat(other[: len(other) // n], n, axis=0)) for n in (8, 24)]
    for damaged in (blurred, noisy, mixed, lost):
        assert clean < damaged[0] < damaged[1]


def test_a_file_comes_back_and_a_damaged_one_is_refused(network, faces, tmp_path):
    path = tmp_path / "features.npz"
    network.save(path)
    loaded = FeatureNetwork.load(path)
    assert loaded.fingerprint == network.fingerprint
    assert loaded.config == network.config
    np.testing.assert_array_equal(loaded(faces[:4]), network(faces[:4]))
    assert [p.name for p in tmp_path.iterdir()] == ["features.npz"]

    with np.load(path) as file:
        arrays = dict(file)
    arrays["param:conv0"] = arrays["param:conv0"] + 1e-6
    np.savez(tmp_path / "changed.npz", **arrays)
    with pytest.raises(FeaturesError, match=f"damaged: it does not have the fingerprint {network.fingerprint}"):
        FeatureNetwork.load(tmp_path / "changed.npz")
    (tmp_path / "torn.npz").write_bytes(path.read_bytes()[:1000])
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    np.savez(tmp_path / "pickle.npz", config=np.array([{}], dtype=object))
    np.savez_compressed(tmp_path / "packed.npz", **arrays)  # may unpack to anything
    for key, value in (("width", "4"), ("image_shape", [16, 16]), ("data", None), ("image_shape", 3)):
        odd = np.array(json.dumps({**network.config, key: value}))
        np.savez(tmp_path / f"{key}-{value}.npz", **{**arrays, "config": odd})
    np.savez(tmp_path / "deep.npz", **{**arrays, "config": np.array("[" * 50_000)})
    np.savez(tmp_path / "double.npz", **{**arrays, "param:mean": arrays["param:mean"].astype(np.float64)})
    (tmp_path / "changed.npz").unlink()
    for name in sorted({p.name for p in tmp_path.iterdir()} - {"features.npz"}):
        with pytest.raises(FeaturesError, match="is not a file of features, or is damaged"):
            FeatureNetwork.load(tmp_path / name)
    with pytest.raises(FeaturesError, match=r"no file of features at .*spread-jax features"):
        FeatureNetwork.load(tmp_path / "none.npz")


def test_the_fingerprint_depends_on_config_and_numbers(network):
    other = FeatureNetwork(network.params, {**network.config, "data": "else"})
    changed = FeatureNetwork({**network.params, "mean": network.params["mean"] + 1}, network.config)
    assert len({f.fingerprint for f in (network, other, changed)}) == 3
    assert json.loads(json.dumps(network.config)) == network.config


def test_what_is_refused(network, faces):
    with pytest.raises(ValueError, match=r"images must be \[n, 16, 16, 3\]"):
        network(faces[:, :8])
    with pytest.raises(ValueError, match="uint8 or floating point"):
        network(faces.astype(int))
    with pytest.raises(ValueError, match="at least two square ones"):
        train_features(faces[:, :8], key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"labels must be integers \[480\]"):
        train_features(faces, np.zeros(3, int), key=jax.random.key(0))


# --- Inception


@pytest.fixture
def fidelity(monkeypatch, tmp_path):
    """Stands in for torch and torch-fidelity: what is asked of them, and features that can be checked."""

    class Network:
        def __init__(self, name, layers, feature_extractor_weights_path):
            self.layers, self.weights = layers, feature_extractor_weights_path

        def __call__(self, batch):
            assert batch.dtype == np.uint8
            assert batch.shape[1] == 3
            assert len(batch) <= 4
            return (FakeTensor(batch.astype(np.float32).mean(axis=(2, 3))),)

    class FakeTensor:
        def __init__(self, values):
            self.values = values

        def numpy(self):
            return self.values

    class NoGradient:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

    def fetched(*_, **__):
        raise AssertionError("nothing may be downloaded here")

    torch = types.ModuleType("torch")
    torch.hub = types.SimpleNamespace(get_dir=lambda: str(tmp_path / "hub"), download_url_to_file=fetched)
    torch.no_grad, torch.from_numpy = NoGradient, lambda array: array
    package = types.ModuleType("torch_fidelity")
    package.__spec__ = types.SimpleNamespace()
    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = Network
    for fake in (torch, package, module):
        monkeypatch.setitem(sys.modules, fake.__name__, fake)
    return torch


def test_without_the_package_one_sentence(monkeypatch):
    monkeypatch.setattr(features.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FeaturesError, match=r'need torch-fidelity: pip install "spread-jax\[fid\]"'):
        inception_features()


@pytest.mark.usefixtures("fidelity")
def test_without_a_network_it_is_said_within_two_seconds(monkeypatch):
    def never_answers(*_, **__):
        time.sleep(8)
        raise OSError("timed out")

    monkeypatch.setattr(socket, "create_connection", never_answers)
    start = time.monotonic()
    with pytest.raises(FeaturesError, match=r"github\.com cannot be reached \(no answer in 2 seconds\): put weights"):
        inception_features()
    assert time.monotonic() - start < 4


def test_a_failed_download_and_a_missing_path_are_sentences(fidelity, monkeypatch, tmp_path):
    monkeypatch.setattr(features, "why_unreachable", lambda host: None)

    def fails(url, path, *, hash_prefix, progress):
        assert url.endswith("weights-inception-2015-12-05-6726825d.pth")
        assert hash_prefix == "6726825d"
        raise RuntimeError("invalid hash value")

    fidelity.hub.download_url_to_file = fails
    for stderr in (features.sys.stderr, None):  # None where it is closed
        with monkeypatch.context() as patch:
            patch.setattr(features.sys, "stderr", stderr)
            with pytest.raises(FeaturesError, match=r"could not be downloaded \(invalid hash value\): put"):
                inception_features()
    with pytest.raises(FeaturesError, match="There is no file of Inception weights"):
        inception_features(tmp_path / "none.pth")


@pytest.mark.usefixtures("fidelity")
def test_other_weights_are_refused_before_they_are_unpickled(tmp_path):
    (tmp_path / "weights.pth").write_bytes(b"something else")
    with pytest.raises(FeaturesError, match=r"its SHA-256 begins with .*, not 6726825d"):
        inception_features(tmp_path / "weights.pth")


@pytest.mark.usefixtures("fidelity")
def test_images_reach_the_network_as_it_wants_them(monkeypatch, tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(b"the weights")
    digest = features.hashlib.sha256(b"the weights").hexdigest()
    monkeypatch.setattr(features, "_INCEPTION_DIGEST", digest[:8])
    extractor = inception_features(path, batch_size=4)
    assert extractor.fingerprint == digest[:16]
    assert (extractor.network.layers, extractor.network.weights) == (["2048"], str(path))
    images = np.random.default_rng(0).integers(0, 256, (10, 6, 5, 3), np.uint8)
    np.testing.assert_allclose(extractor(images), images.mean(axis=(1, 2)), rtol=1e-6)
    np.testing.assert_array_equal(extractor(images / 255.0), extractor(images))
    grey = extractor(images[..., :1])
    np.testing.assert_array_equal(grey[:, 0], grey[:, 2])
    with pytest.raises(ValueError, match=r"images must be \[n, height, width, 1 or 3\]"):
        extractor(images[..., :2])
