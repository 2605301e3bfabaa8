"""Densities of latents: against scikit-learn and SciPy, and what they draw against what they say."""

import io
import os
import sys

import jax
import numpy as np
import pytest
import scipy.stats
from sklearn.mixture import GaussianMixture

from spread_jax.models import (
    Encoded,
    LatentMixture,
    Posteriors,
    fit_flow,
    fit_mixture,
    posteriors,
    standard_normal,
)


@pytest.fixture(scope="module")
def curved():
    """Posteriors whose aggregate is a bent band, which no Gaussian fits: (train, validation)."""
    chance = np.random.default_rng(0)
    u = chance.normal(size=(1200, 2)).astype(np.float32)
    mean = np.stack([u[:, 0], 0.2 * u[:, 1] + np.square(u[:, 0]) - 1], axis=1)
    std = np.full_like(mean, 0.1)
    return Posteriors(mean[:900], std[:900]), Posteriors(mean[900:], std[900:])


def test_densities_of_latents_fit_better_than_the_prior_and_draw_what_they_say(curved):
    train, validation = curved
    z = validation.draw(jax.random.key(5))
    prior = standard_normal(2)
    mixture = fit_mixture(train, components=6, seed=0)
    flow = fit_flow(train, validation, seed=0, steps=200, couplings=2, width=16)
    one = fit_mixture(train, components=1, seed=0)
    score = {name: density.log_density(z).mean() for name, density in
             {"prior": prior, "one": one, "mixture": mixture, "flow": flow}.items()}  # fmt: skip
    assert score["prior"] < score["one"] < min(score["mixture"], score["flow"]) - 0.2
    np.testing.assert_allclose(prior.log_density(z), scipy.stats.multivariate_normal(np.zeros(2)).logpdf(z), rtol=1e-5)
    peer = GaussianMixture(6, reg_covar=1e-4, random_state=0, max_iter=200).fit(train.draw(jax.random.key(0)))
    np.testing.assert_allclose(mixture.log_density(z), peer.score_samples(z), atol=1e-2)
    for density in (mixture, flow):
        draws = density.sample(4000, jax.random.key(1))
        # E -log p of its own draws is its entropy; their mean log density must be that of held-out draws, nearly.
        assert density.log_density(draws).mean() == pytest.approx(density.log_density(z).mean(), abs=0.3)
        assert np.corrcoef(np.square(draws[:, 0]), draws[:, 1])[0, 1] > 0.8
        np.testing.assert_allclose(draws.mean(axis=0), train.mean.mean(axis=0), atol=0.15)


def test_latents_of_a_split_are_the_encoders(monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, size=(11, 4, 4, 1), dtype=np.uint8)

    class Split:
        def __len__(self):
            return len(self.images)

    def encode(run, images, *, seed):
        mean = images.reshape(len(images), -1)[:, :2].astype(np.float32)
        return Encoded(mean, np.full(mean.shape, run + seed), None)

    monkeypatch.setattr(sys.modules[posteriors.__module__], "encode", encode)
    split = Split()
    split.images = images
    found = posteriors(0.5, split, count=10, seed=2)
    np.testing.assert_array_equal(found.mean, images.reshape(11, -1)[:10, :2])
    np.testing.assert_array_equal(found.std, np.full((10, 2), 2.5))
    draws = found._replace(mean=np.zeros((5000, 2)), std=np.full((5000, 2), 0.5)).draw(jax.random.key(0))
    assert draws.std() == pytest.approx(0.5, rel=0.05)


@pytest.fixture
def mixture():
    roots = [[[0.5, 0.0], [0.3, 0.2]], [[1.0, 0.0], [-0.5, 2.0]]]
    return LatentMixture(np.array([0.3, 0.7]), np.array([[3.0, 0.0], [-1.0, 1.0]]), np.array(roots))


def test_a_mixture_of_latents_is_scipys_and_its_first_draws_stay(mixture):
    z = np.random.default_rng(0).normal(size=(7, 2))
    laws = [scipy.stats.multivariate_normal(m, L @ L.T) for m, L in zip(mixture.means, mixture.roots, strict=True)]
    wanted = np.log(sum(w * law.pdf(z) for w, law in zip(mixture.weights, laws, strict=True)))
    np.testing.assert_allclose(mixture.log_density(z), wanted, rtol=1e-10)
    draws = mixture.sample(40_000, jax.random.key(0))
    np.testing.assert_array_equal(mixture.sample(50, jax.random.key(0)), draws[:50])
    assert draws.dtype == np.float32
    assert np.abs(mixture.sample(50, jax.random.key(1)) - draws[:50]).max() > 0.1
    mean = mixture.weights @ mixture.means
    second = sum(
        w * (L @ L.T + np.outer(m, m)) for w, m, L in zip(mixture.weights, mixture.means, mixture.roots, strict=True)
    )
    error = np.sqrt(np.diag(second - np.outer(mean, mean)) / len(draws))
    assert np.all(np.abs(draws.mean(axis=0) - mean) < 4 * error)
    np.testing.assert_allclose(draws.T @ draws / len(draws), second, atol=0.1)


def test_a_file_of_latents_is_read_back_or_refused(mixture, tmp_path):
    path = tmp_path / "latents.npz"
    path.write_bytes(mixture.to_bytes())
    for mine, theirs in zip(LatentMixture.load(path), mixture, strict=True):
        np.testing.assert_array_equal(mine, theirs)

    def written(**arrays):
        file = io.BytesIO()
        np.savez(file, **{**mixture._asdict(), **arrays})
        return file.getvalue()

    packed = io.BytesIO()
    np.savez_compressed(packed, **{**mixture._asdict(), "means": np.zeros((2, 2000))})
    pickled = written(weights=np.array([print, 1], dtype=object))
    for content, said in (
        (b"", "no mixture"),
        (mixture.to_bytes()[:-40], "no mixture"),
        (packed.getvalue(), "packed"),
        (pickled, "no mixture"),
        (written(means=np.zeros((2, 3))), "shapes"),
        (written(weights=np.array([0.5, 0.6])), "none"),
        (written(weights=np.array([1.5, -0.5])), "none"),
        (written(roots=np.full((2, 2, 2), np.nan)), "none"),
        (written(roots=np.zeros((2, 2, 2))), "none"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=said):
            LatentMixture.load(path)
    path.unlink()
    (tmp_path / "elsewhere").write_bytes(mixture.to_bytes())
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="link"):
        LatentMixture.load(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(OSError, match="neither a file"):
        LatentMixture.load(path)
