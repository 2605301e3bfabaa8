"""Distances between mixing matrices against brute force over all signed permutations."""

import builtins
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spread_jax.linear import amari_distance, match_columns, mixing_error


def brute_force(estimate, truth, kind):
    """The least mean |A_est - A| / mean |A| over every order and every sign."""
    size, best = truth.shape[1], np.inf
    for order in itertools.permutations(range(size)):
        columns = estimate[:, order]
        if kind == "direction":
            columns = columns / np.linalg.norm(columns, axis=0) * np.linalg.norm(truth, axis=0)
        for signs in itertools.product((-1, 1), repeat=size):
            best = min(best, np.abs(columns * signs - truth).mean() / np.abs(truth).mean())
    return best


@pytest.mark.parametrize("kind", ["raw", "direction"])
def test_error_is_the_least_over_signed_permutations(kind):
    rng = np.random.default_rng(0)
    for noise in (0.1, 1.0, 5.0):  # at 5 the matching is far from greedy
        truth = rng.normal(size=(5, 4))
        truth[0, 1] = 0
        order = rng.permutation(4)
        estimate = (truth + noise * rng.normal(size=truth.shape))[:, order] * rng.choice([-1, 1], 4)
        expected = brute_force(estimate, truth, kind)
        assert mixing_error(estimate, truth, kind=kind) == pytest.approx(expected, rel=1e-12)
        matched = match_columns(estimate, truth, kind=kind)
        assert np.abs(matched - truth).mean() / np.abs(truth).mean() == pytest.approx(expected, rel=1e-12)


def test_error_of_sign_matrices_is_the_papers():
    rng = np.random.default_rng(1)
    truth = rng.choice([-1.0, 1.0], (6, 3))
    estimate = truth + 0.1 * rng.normal(size=truth.shape)
    expected = np.mean(np.abs(estimate - truth) / np.abs(truth))
    assert mixing_error(-estimate[:, ::-1], truth) == pytest.approx(expected)
    assert mixing_error(3 * truth, truth) == pytest.approx(2)
    assert mixing_error(3 * truth, truth, kind="direction") == pytest.approx(0, abs=1e-12)


def test_a_zero_column_of_the_estimate_is_an_error_of_its_own_size():
    truth = np.eye(3)
    estimate = np.diag([1.0, 1.0, 0.0])
    for kind in ("raw", "direction"):
        assert mixing_error(estimate, truth, kind=kind) == pytest.approx(1 / 3)


def amari_by_loops(p):
    size, total = len(p), 0.0
    for i in range(size):
        total += sum(p[i, j] / max(p[i]) for j in range(size)) - 1
        total += sum(p[j, i] / max(p[:, i]) for j in range(size)) - 1
    return total / (2 * size * (size - 1))


def test_amari_distance(dtype):
    rng = np.random.default_rng(2)
    unmixing, mixing = rng.normal(size=(7, 3, 5)), rng.normal(size=(7, 5, 3))
    distances = jax.jit(jax.vmap(amari_distance))(jnp.asarray(unmixing, dtype), jnp.asarray(mixing, dtype))
    expected = [amari_by_loops(np.abs(w @ a)) for w, a in zip(unmixing, mixing, strict=True)]
    np.testing.assert_allclose(distances, expected, rtol=1e-4 if dtype == "float32" else 1e-12)
    assert (distances < 1).all()
    eye = jnp.eye(4, dtype=dtype)
    assert amari_distance(-3 * eye[::-1] * jnp.arange(1.0, 5, dtype=dtype), eye) == 0
    assert amari_distance(jnp.ones((3, 3), dtype), jnp.eye(3, dtype=dtype)) == 1  # the worst
    assert amari_distance(jnp.ones((1, 2), dtype), jnp.ones((2, 1), dtype)) == 0
    slope = jax.jit(jax.grad(lambda w: amari_distance(w, jnp.asarray(mixing[0], dtype))))(
        jnp.asarray(unmixing[0], dtype)
    )
    assert np.isfinite(slope).all()
    # It ignores length: no slope along W.
    assert abs((slope * unmixing[0]).sum()) < 1e-5


def test_bad_input_gets_a_sentence(monkeypatch):
    one = np.ones((2, 2))
    with pytest.raises(ValueError, match=r"same shape \[X, Z\], got \(2, 2\) and \(2, 1\)"):
        mixing_error(one, one[:, :1])
    with pytest.raises(ValueError, match="kind must be 'raw' or 'direction', got 'sign'"):
        mixing_error(one, one, kind="sign")
    with pytest.raises(ValueError, match="estimate must be finite"):
        match_columns(one * np.nan, one)
    with pytest.raises(ValueError, match="truth must have an entry that is not zero"):
        mixing_error(one, 0 * one)
    with pytest.raises(ValueError, match=r"unmixing must have shape \[Z, X\] and mixing \[X, Z\]"):
        amari_distance(jnp.ones((3, 2)), jnp.ones((3, 2)))
    real = builtins.__import__

    def without_scipy(name, *args, **kwargs):
        if name.startswith("scipy"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_scipy)
    with pytest.raises(ImportError, match=r"spread-jax\[eval\]"):
        match_columns(one, one)
