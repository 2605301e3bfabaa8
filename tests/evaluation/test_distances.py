"""Distances against closed forms, SciPy, scikit-learn and brute force; standard errors against repeated draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.signal
from sklearn.neighbors import NearestNeighbors

from spread_jax import mmd_squared
from spread_jax.evaluation import (
    Moments,
    frechet_distance,
    frechet_infinity,
    kernel_distance,
    nearest_neighbours,
    precision_recall_density_coverage,
    relative_sharpness,
    sharpness,
)
from spread_jax.evaluation.distances import _extrapolate


@pytest.fixture
def chance():
    return np.random.default_rng(7)


# --- moments


def test_moments_of_batches_are_those_of_all_even_far_from_zero(chance):
    features = chance.standard_normal((101, 4)) @ chance.standard_normal((4, 4)) + 1e8
    moments = Moments.of(features[:1])
    for start, stop in ((1, 40), (40, 41), (41, 101)):
        moments = moments.update(features[start:stop])
    halves = Moments.of(features[50:]).merge(Moments.of(features[:50]))
    for found in (moments, halves):
        assert found.count == 101
        np.testing.assert_allclose(found.mean, features.mean(axis=0), rtol=1e-15)
        # A sum of squares about zero would have no digit left here: 1e16 times 1e-16.
        np.testing.assert_allclose(found.covariance, np.cov(features - 1e8, rowvar=False), rtol=1e-6, atol=1e-6)


def test_stored_moments_are_those_of_the_features(chance):
    p, q, more = chance.standard_normal((3, 40, 3))
    stored = Moments.from_covariance(p.mean(axis=0), np.cov(p, rowvar=False), count=40)
    assert frechet_distance(stored, Moments.of(q)) == pytest.approx(frechet_distance(Moments.of(p), Moments.of(q)))
    whole = stored.update(more)
    np.testing.assert_allclose(whole.covariance, np.cov(np.concatenate([p, more]), rowvar=False), rtol=1e-12)
    unknown = Moments.from_covariance(stored.mean, stored.covariance, count=2)
    assert frechet_distance(unknown, Moments.of(q)) == pytest.approx(frechet_distance(stored, Moments.of(q)), rel=1e-12)


def test_moments_are_a_frozen_pytree(chance):
    moments = Moments.of(chance.standard_normal((5, 2)))
    assert len(jax.tree.leaves(moments)) == 3
    with pytest.raises(AttributeError):
        moments.count = 3


# --- Fréchet distance


def textbook(p, q):
    """The formula as the literature computes it, with SciPy's general matrix square root."""
    first, second = (np.atleast_2d(np.cov(f, rowvar=False)) for f in (p, q))
    root = scipy.linalg.sqrtm(first @ second).real
    return np.square(p.mean(axis=0) - q.mean(axis=0)).sum() + np.trace(first + second - 2 * root)


def by_eigenvalues(p, q):
    """The formula by eigenvalues of the unsymmetric product."""
    first, second = (np.atleast_2d(np.cov(f, rowvar=False)) for f in (p, q))
    roots = np.sqrt(np.linalg.eigvals(first @ second).astype(complex)).real.sum()
    return np.square(p.mean(axis=0) - q.mean(axis=0)).sum() + np.trace(first + second) - 2 * roots


@pytest.mark.parametrize("dimension", [1, 5, 60])
def test_frechet_distance_is_the_textbooks(dimension, chance):
    p = chance.standard_normal((300, dimension)) @ chance.standard_normal((dimension, dimension))
    q = 1 + chance.standard_normal((200, dimension)) * np.linspace(0.01, 3, dimension)
    found = frechet_distance(Moments.of(p), Moments.of(q))
    assert found == pytest.approx(by_eigenvalues(p, q), rel=1e-6)
    assert found == pytest.approx(textbook(p, q), rel=1e-6)
    assert frechet_distance(Moments.of(q), Moments.of(p)) == pytest.approx(found, rel=1e-10)


def test_frechet_distance_of_commuting_covariances_is_closed_form():
    first, second = np.array([4.0, 1.0, 0.0]), np.array([1.0, 9.0, 0.0])  # one direction has no variance at all
    p = Moments(11, np.zeros(3), 10 * np.diag(first))
    q = Moments(11, np.array([1.0, 2.0, 2.0]), 10 * np.diag(second))
    expected = 9 + np.square(np.sqrt(first) - np.sqrt(second)).sum()
    assert frechet_distance(p, q) == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_with_fewer_examples_than_dimensions(chance):
    p, q = chance.standard_normal((20, 200)), 0.5 + chance.standard_normal((30, 200))
    # tr (C_p^{1/2} C_q C_p^{1/2})^{1/2} is the sum of singular values of the centred cross products.
    centred = [(f - f.mean(axis=0)) / np.sqrt(len(f) - 1) for f in (p, q)]
    shared = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    expected = np.square(p.mean(axis=0) - q.mean(axis=0)).sum()
    expected += sum(np.square(f).sum() for f in centred) - 2 * shared
    assert frechet_distance(Moments.of(p), Moments.of(q)) == pytest.approx(expected, rel=1e-7)
    assert frechet_distance(Moments.of(p), Moments.of(p)) < 1e-9


def test_extrapolation_removes_the_bias_and_its_error_is_the_spread_over_draws(chance):
    values, errors, plain = [], [], []
    for i in range(40):
        p, q = chance.standard_normal((2, 160, 6))
        q[:, 0] += 1  # the true distance is 1
        estimate = frechet_infinity(p, q, key=jax.random.key(i))
        values.append(estimate.value)
        errors.append(estimate.standard_error)
        plain.append(frechet_distance(Moments.of(p), Moments.of(q)))
    error_of_mean = np.std(values, ddof=1) / np.sqrt(40)
    assert abs(np.mean(values) - 1) < 4 * error_of_mean
    assert np.mean(plain) - 1 > 4 * np.std(plain, ddof=1) / np.sqrt(40)
    # A standard deviation from 40 draws is known to 11 %; four of those.
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(np.std(values, ddof=1), rel=0.45)


def test_the_line_is_weighted_by_the_examples_that_each_point_rests_on(chance):
    """In one dimension, by the normal equations: weights 1 / Var, which falls like 1 / n and like 1 / subsets."""
    p, q = chance.standard_normal((46, 1)), 0.3 + 2 * chance.standard_normal((46, 1))
    rows = []
    for size in (12, 14, 18, 26, 46):  # 46 / n evenly between 4 and 1, rounded
        parts = [(p[i : i + size], q[i : i + size]) for i in range(0, 46 - size + 1, size)]
        distances = [(a.mean() - b.mean()) ** 2 + (a.std(ddof=1) - b.std(ddof=1)) ** 2 for a, b in parts]
        rows.append((1 / size, np.mean(distances), size * len(parts)))
    u, d, w = np.array(rows).T
    slope = (w.sum() * (w * u * d).sum() - (w * u).sum() * (w * d).sum()) / (
        w.sum() * (w * u * u).sum() - (w * u).sum() ** 2
    )
    expected = (w * (d - slope * u)).sum() / w.sum()
    assert _extrapolate(p, q, 5) == pytest.approx(expected, rel=1e-10)
    assert abs(np.polyfit(u, d, 1)[1] / expected - 1) > 0.01  # the weights count


def test_extrapolation_with_fewer_examples_than_dimensions_is_the_same(chance, key):
    """Columns of zeros change no distance, but make n smaller than d."""
    p, q = chance.standard_normal((2, 80, 5))
    few = frechet_infinity(p, q, key=key)
    many = frechet_infinity(*(np.pad(f, ((0, 0), (0, 100))) for f in (p, q)), key=key)
    np.testing.assert_allclose(many, few, rtol=1e-6, atol=1e-8)


# --- kernel distance


def cubic(x, y):
    return (x @ y.T / x.shape[1] + 1) ** 3


@pytest.mark.parametrize("chunk_size", [7, 1000])
def test_kernel_distance_is_the_squared_mmd(chunk_size, chance, x64):
    p, q = chance.standard_normal((23, 3)), chance.standard_normal((31, 3)) + 0.5
    found = kernel_distance(p, q, chunk_size=chunk_size).value
    assert found == pytest.approx(float(mmd_squared(jnp.asarray(p), jnp.asarray(q), cubic)), rel=1e-12)
    within = lambda f: (cubic(f, f).sum() - np.trace(cubic(f, f))) / (len(f) * (len(f) - 1))
    assert found == pytest.approx(within(p) + within(q) - 2 * cubic(p, q).mean(), rel=1e-12)


@pytest.mark.parametrize("shift", [0.0, 0.6])
def test_standard_error_of_the_kernel_distance_is_its_spread_over_draws(shift, chance):
    """Also for equal distributions, where the first-order term vanishes."""
    estimates = [
        kernel_distance(chance.standard_normal((40, 3)), chance.standard_normal((60, 3)) + shift) for _ in range(300)
    ]
    values, errors = np.array(estimates).T
    truth = kernel_distance(*(chance.standard_normal((4000, 3)) + s for s in (0, shift)))
    assert abs(values.mean() - truth.value) < 4 * np.hypot(values.std() / np.sqrt(300), truth.standard_error)
    # 300 draws know a standard deviation to 4 % (more for a cubic's tails); without a shift the error is kept large.
    ratio = np.sqrt(np.square(errors).mean()) / values.std(ddof=1)
    assert (0.88 < ratio < 1.15) if shift else (0.9 < ratio < 1.5)


def test_subsets_average_to_the_whole(chance, key):
    p, q = chance.standard_normal((100, 4)), chance.standard_normal((80, 4)) + 0.3
    whole = kernel_distance(p, q).value
    subsets = kernel_distance(p, q, num_subsets=200, subset_size=20, key=key)
    assert abs(subsets.value - whole) < 4 * subsets.standard_error
    assert subsets == kernel_distance(p, q, num_subsets=200, subset_size=20, key=key)
    one = kernel_distance(p, q, num_subsets=1, subset_size=80, key=key)
    assert np.isnan(one.standard_error)


# --- neighbours


def pairwise(x, y):
    return np.sqrt(np.square(x[:, None] - y[None]).sum(axis=-1))


def by_brute_force(real, fake, k):
    """(precision, recall, density, coverage) from all distances at once."""
    real_radii, fake_radii = (np.sort(pairwise(f, f), axis=1)[:, k] for f in (real, fake))
    inside = pairwise(real, fake) <= real_radii[:, None]
    return (
        inside.any(axis=0).mean(),
        (pairwise(real, fake) <= fake_radii).any(axis=1).mean(),
        inside.sum() / (k * len(fake)),
        inside.any(axis=1).mean(),
    )


@pytest.mark.parametrize("chunk_size", [5, 17, 1000])
def test_precision_recall_density_coverage_by_brute_force(chunk_size, chance):
    real, fake, k = chance.standard_normal((60, 3)), 0.7 * chance.standard_normal((45, 3)) + 0.4, 3
    expected = by_brute_force(real, fake, k)
    found = precision_recall_density_coverage(real, fake, k=k, chunk_size=chunk_size)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert len(set(expected)) == 4

    peer = NearestNeighbors(n_neighbors=k + 1).fit(real)
    radii = peer.kneighbors(real)[0][:, k]
    nearest = NearestNeighbors(n_neighbors=1).fit(fake).kneighbors(real)[0][:, 0]
    assert found.coverage == pytest.approx((nearest <= radii).mean(), rel=1e-12)


def test_ties_are_those_of_brute_force(chance):
    """Examples at just the radius of a ball, which are inside, as on grids; no rounding decides."""
    real, fake = np.array([[3.0], [1.0], [4.0]]), np.array([[3.0], [3.0], [4.0]])
    scores = precision_recall_density_coverage(real, fake, k=1)
    assert scores.density == pytest.approx(8 / 3)
    assert scores.coverage == 1
    for _ in range(200):
        size = chance.integers(4, 12, 2)
        dimension, k = chance.integers(1, 4), int(chance.integers(1, 4))
        real, fake = (chance.integers(0, 5, (n, dimension)).astype(float) for n in size)
        for offset in (0.0, 1000.0):
            found = precision_recall_density_coverage(real + offset, fake + offset, k=k, chunk_size=5)
            assert found == pytest.approx(by_brute_force(real, fake, k), rel=1e-12)


def test_distances_far_below_the_spread_keep_their_digits(chance):
    x = chance.standard_normal((9, 3))
    near = x + 2e-7 * np.eye(3)[chance.integers(0, 3, 9)]
    indices, distances = nearest_neighbours(x, near[::-1], chunk_size=4)
    np.testing.assert_array_equal(indices[:, 0], np.arange(9)[::-1])
    np.testing.assert_allclose(distances, 2e-7, rtol=1e-8)
    found, distances = nearest_neighbours(x, np.concatenate([near, near - 1e-9, x + 3]), k=2, chunk_size=4)
    np.testing.assert_array_equal(np.sort(found % 9, axis=1), np.arange(9)[:, None].repeat(2, axis=1))
    assert (distances > 1e-7).all()


def test_copies_of_real_examples_are_inside_and_a_lost_mode_is_missed(chance):
    real = np.concatenate([chance.standard_normal((50, 4)) * 1e-3 + 100, chance.standard_normal((50, 4)) - 100])
    scores = precision_recall_density_coverage(real, real)
    assert scores[:2] == (1, 1)
    assert scores.coverage == 1
    half = precision_recall_density_coverage(real, np.repeat(real[:50], 2, axis=0))
    assert half.precision == 1
    assert half.coverage == 0.5
    assert half.recall == 0.5


@pytest.mark.parametrize("chunk_size", [4, 100])
def test_nearest_neighbours_are_scikit_learns(chunk_size, chance):
    x, others = chance.standard_normal((31, 5)) + 1e4, chance.standard_normal((27, 5)) + 1e4
    distances, indices = NearestNeighbors(n_neighbors=4, algorithm="brute").fit(others - 1e4).kneighbors(x - 1e4)
    found, found_distances = nearest_neighbours(x, others, k=4, chunk_size=chunk_size)
    np.testing.assert_array_equal(found, indices)
    np.testing.assert_allclose(found_distances, distances, rtol=1e-8)
    np.testing.assert_array_equal(nearest_neighbours(others, others)[1], 0)


# --- sharpness


def test_sharpness_is_the_variance_of_the_laplacian(chance):
    images = chance.integers(0, 256, (3, 9, 12, 3), np.uint8)
    stencil = np.array([[0, 1, 0], [1, -4, 1], [0, 1, 0]])
    for image, found in zip(images, sharpness(images), strict=True):
        laplacian = scipy.signal.convolve2d(image.mean(axis=2) / 255, stencil, mode="valid")
        assert found == pytest.approx(laplacian.var(), rel=1e-12)
    np.testing.assert_allclose(sharpness(images), sharpness(images / 255), rtol=1e-12)


def test_relative_sharpness_falls_with_blur_and_has_the_right_error(chance):
    draw = lambda n: chance.random((n, 8, 8, 1)) * chance.uniform(0.2, 1, (n, 1, 1, 1))
    for contrast, of_real in ((1.0, 60), (0.4, 15)):  # few real images of less contrast: their error is most of it
        estimates = [relative_sharpness(draw(60), contrast * draw(of_real)) for _ in range(400)]
        values, errors = np.array(estimates).T
        assert values.mean() == pytest.approx(contrast**-2, rel=0.1)
        assert np.sqrt(np.square(errors).mean()) == pytest.approx(values.std(ddof=1), rel=0.25)
    sharp = draw(50)
    blurred = (sharp + np.roll(sharp, 1, axis=1) + np.roll(sharp, 1, axis=2)) / 3
    assert relative_sharpness(blurred, sharp).value < 0.5


# --- what is refused

P = np.random.default_rng(0).standard_normal((70, 2))
BAD = [
    (lambda: Moments.of(np.zeros(3)), r"features must have shape \[n, d\]"),
    (lambda: Moments.of(np.full((2, 2), np.nan)), "features must be finite"),
    (lambda: Moments.of(P).merge(Moments.of(P[:, :1])), "other must have features of dimension 2, got 1"),
    (lambda: frechet_distance(Moments.of(P), Moments.of(P[:1])), "at least 2 examples, got 1"),
    (lambda: frechet_infinity(P, P[:20], key=jax.random.key(0)), "got 5, 8 and 20 examples"),
    (lambda: kernel_distance(P, P[:3]), "at least 4 examples each, got 3"),
    (lambda: kernel_distance(P, P, num_subsets=2, subset_size=71, key=jax.random.key(0)), "subset_size must be"),
    (lambda: kernel_distance(P, P, num_subsets=2, subset_size=20), "key must be a JAX random key"),
    (lambda: precision_recall_density_coverage(P, P[:5]), "more than k = 5 examples, got 70 and 5"),
    (lambda: nearest_neighbours(P, P, k=71), "k must be at most the number of others, 70, got 71"),
    (lambda: Moments.from_covariance(np.zeros(2), np.eye(3), count=9), r"got \(2,\) and \(3, 3\)"),
    (lambda: Moments.from_covariance(np.zeros(2), np.eye(2), count=1), "count must be at least 2"),
    (lambda: Moments.from_covariance(np.zeros(2), np.array([[1, 0.5], [0, 1]]), count=9), "must be symmetric"),
    (lambda: Moments.from_covariance(np.zeros(2), -np.eye(2), count=9), "no negative variance"),
    (lambda: Moments.from_covariance(np.zeros(1), np.full((1, 1), np.nan), count=9), "must be finite"),
    (lambda: sharpness(np.zeros((1, 2, 9, 3))), "at least 3x3 pixels"),
    (lambda: relative_sharpness(np.zeros((2, 4, 4, 1)), np.zeros((2, 4, 4, 1))), "with some detail"),
    (lambda: relative_sharpness(np.zeros((2, 4, 4, 1)), np.zeros((2, 5, 4, 1))), "share their size"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input_gets_a_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("other", [P, (P.mean(axis=0), np.cov(P.T))], ids=["features", "mean and covariance"])
def test_what_are_no_moments_is_told_how_to_make_them(other):
    message = rf"must be Moments, got {type(other).__name__}; make them with Moments.of\(features\) or Moments.from_cov"
    for call in (
        lambda: frechet_distance(Moments.of(P), other),
        lambda: frechet_distance(other, Moments.of(P)),
        lambda: Moments.of(P).merge(other),
    ):
        with pytest.raises(TypeError, match=message):
            call()


def test_the_kernel_distances_error_is_never_nothing(chance):
    """Of equal distributions what is subtracted from its variance exceeds that at times: then a floor holds."""
    found = [kernel_distance(*chance.normal(size=(2, 10, 2))) for _ in range(200)]
    values, errors = np.array(found).T
    assert errors.min() > 0.05 * values.std()
    assert 0.5 < np.sqrt(np.square(errors).mean()) / values.std() < 2
