"""Spread divergences in closed form: of deltas under each noise, of Gaussians under Gaussian noise."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from spread_jax._checks import at_least_float32, check_batch, check_same_shape
from spread_jax.noise import GaussianNoise, LowRankGaussianNoise, SpreadNoise

__all__ = [
    "spread_chi_squared_deltas",
    "spread_hellinger_deltas",
    "spread_hellinger_gaussians",
    "spread_kl_deltas",
    "spread_kl_gaussians",
    "spread_total_variation_deltas",
]


def spread_kl_deltas(mu_p: jax.Array, mu_q: jax.Array, noise: SpreadNoise) -> jax.Array:
    r"""KL of two spread deltas, KL(p(y|mu_p) || p(y|mu_q)), in nats: the post's first example.

    Gaussian noise gives |mu_p - mu_q|^2 / (2 sigma^2), low-rank noise half the Mahalanobis distance,
    Laplace noise |d|/b + exp(-|d|/b) - 1 summed over dimensions, Cauchy noise log(1 + d^2 / (4 b^2)),
    logistic noise (d/s) coth(d/(2s)) - 2. Without noise it is infinite wherever mu_p and mu_q differ.

    Args:
      mu_p: [batch, *event], where the deltas of p sit.
      mu_q: [batch, *event].
      noise: any noise with a `kl` method.

    Returns:
      [batch].

    Raises:
      TypeError: if this noise has no closed form.
      ValueError: if shapes differ.

    Source: Zhang et al., Spread Divergence, ICML 2020, section 2 (two deltas).

    Example:
      >>> import jax.numpy as jnp
      >>> from spread_jax import GaussianNoise
      >>> print(spread_kl_deltas(jnp.zeros((1, 1)), jnp.full((1, 1), 2.0), GaussianNoise(1.0)))
      [2.]
    """
    return _of_deltas("kl", "KL", mu_p, mu_q, noise)


def spread_hellinger_deltas(mu_p: jax.Array, mu_q: jax.Array, noise: SpreadNoise) -> jax.Array:
    r"""Squared Hellinger distance of two spread deltas, 1 - BC with BC = ∫ sqrt(p(y|mu_p) p(y|mu_q)) dy.

    In one dimension, at distance d, BC is exp(-d^2 / (8 sigma^2)) for Gaussian noise,
    (1 + |d|/(2b)) exp(-|d|/(2b)) for Laplace, and (d/(2s)) / sinh(d/(2s)) for logistic noise; over
    dimensions it multiplies.

    Args:
      mu_p: [batch, *event].
      mu_q: [batch, *event].
      noise: Gaussian, low-rank Gaussian, Laplace or logistic noise, transformed or not.

    Returns:
      [batch], between 0 and 1.

    Raises:
      TypeError: if this noise has no closed form.
    """
    return _of_deltas("squared_hellinger", "Hellinger distance", mu_p, mu_q, noise)


def spread_chi_squared_deltas(mu_p: jax.Array, mu_q: jax.Array, noise: SpreadNoise) -> jax.Array:
    r"""Pearson chi-squared divergence of two spread deltas, ∫ p(y|mu_p)^2 / p(y|mu_q) dy - 1.

    In one dimension, at distance d, the integral is exp(d^2 / sigma^2) for Gaussian noise,
    (2 exp(t) + exp(-2 t)) / 3 with t = |d|/b for Laplace, and 1 + d^2 / (2 b^2) for Cauchy noise; over
    dimensions it multiplies.

    Args:
      mu_p: [batch, *event].
      mu_q: [batch, *event].
      noise: Gaussian, low-rank Gaussian, Laplace or Cauchy noise, transformed or not.

    Returns:
      [batch].

    Raises:
      TypeError: if this noise has no closed form.
    """
    return _of_deltas("chi_squared", "chi-squared divergence", mu_p, mu_q, noise)


def spread_total_variation_deltas(mu_p: jax.Array, mu_q: jax.Array, noise: SpreadNoise) -> jax.Array:
    r"""Total variation of two spread deltas, half of ∫ |p(y|mu_p) - p(y|mu_q)| dy.

    Gaussian noises: erf(m / (2 sqrt 2)) with m the Mahalanobis distance, in any dimension. Other kernels
    have one peak and are even, so in one dimension it is the mass within half the distance: 1 -
    exp(-|d|/(2b)) for Laplace, (2/pi) arctan(|d|/(2b)) for Cauchy, tanh(|d|/(4s)) for logistic noise.

    Args:
      mu_p: [batch, *event].
      mu_q: [batch, *event]; events of one number each, unless the noise is Gaussian.
      noise: Gaussian, low-rank Gaussian, Laplace, Cauchy or logistic noise, transformed or not.

    Returns:
      [batch], between 0 and 1.

    Raises:
      TypeError: if this noise has no closed form.
      ValueError: if the noise is not Gaussian and an event has more than one dimension.
    """
    return _of_deltas("total_variation", "total variation", mu_p, mu_q, noise)


def spread_kl_gaussians(
    mean_p: jax.Array,
    cov_p: jax.Array,
    mean_q: jax.Array,
    cov_q: jax.Array,
    noise: GaussianNoise | LowRankGaussianNoise,
) -> jax.Array:
    r"""KL(N(m_p, S_p + C) || N(m_q, S_q + C)) in nats, C the noise covariance: KL of two spread Gaussians.

    The covariances may be singular: two Gaussians on different subspaces have an infinite KL, and a finite
    spread KL.

    Args:
      mean_p: [X].
      cov_p: [X, X], symmetric, positive semi-definite.
      mean_q: [X].
      cov_q: [X, X].
      noise: Gaussian or low-rank Gaussian noise. Use jax.vmap for many pairs.

    Returns:
      Scalar; NaN where a covariance is so indefinite that the spread one is not positive definite.

    Raises:
      TypeError: if the noise is not Gaussian.
      ValueError: if shapes do not fit.

    Source: Zhang et al., Spread Divergence, ICML 2020, section on deterministic PCA.

    Example:
      >>> import jax.numpy as jnp
      >>> from spread_jax import GaussianNoise
      >>> zero, flat = jnp.zeros(2), jnp.diag(jnp.array([1.0, 0.0]))
      >>> value = spread_kl_gaussians(zero, flat, zero, jnp.zeros((2, 2)), GaussianNoise(1.0))
      >>> print(f"{value:.4f}")  # (1 - log 2) / 2
      0.1534
    """
    difference, cov_p, cov_q = _spread_gaussians(mean_p, cov_p, mean_q, cov_q, noise)
    chol_p, chol_q = jnp.linalg.cholesky(cov_p), jnp.linalg.cholesky(cov_q)
    solve = lambda b: jax.scipy.linalg.solve_triangular(chol_q, b, lower=True)
    # With T = chol_q^-1 chol_p: trace T T^T - X - 2 log det T, whose terms are small where p is near q.
    t = solve(chol_p)
    diagonal = jnp.diagonal(t)
    off_diagonal = jnp.square(t).sum() - jnp.square(diagonal).sum()
    excess = diagonal - 1
    volume = (excess * (diagonal + 1) - 2 * jnp.log(diagonal)).sum()
    return 0.5 * (off_diagonal + volume + jnp.square(solve(difference)).sum())


def spread_hellinger_gaussians(
    mean_p: jax.Array,
    cov_p: jax.Array,
    mean_q: jax.Array,
    cov_q: jax.Array,
    noise: GaussianNoise | LowRankGaussianNoise,
) -> jax.Array:
    r"""Squared Hellinger distance of two spread Gaussians, singular covariances included.

    1 - (|A| |B|)^(1/4) / |M|^(1/2) exp(-(m_p - m_q)^T M^-1 (m_p - m_q) / 8), with A and B the spread
    covariances and M = (A + B) / 2.

    Args:
      mean_p: [X].
      cov_p: [X, X], symmetric, positive semi-definite.
      mean_q: [X].
      cov_q: [X, X].
      noise: Gaussian or low-rank Gaussian noise.

    Returns:
      Scalar, between 0 and 1.

    Raises:
      TypeError: if the noise is not Gaussian.
      ValueError: if shapes do not fit.
    """
    difference, cov_p, cov_q = _spread_gaussians(mean_p, cov_p, mean_q, cov_q, noise)
    log_det = lambda cholesky: 2 * jnp.log(jnp.diagonal(cholesky)).sum()
    middle = jnp.linalg.cholesky(0.5 * (cov_p + cov_q))
    solve = lambda b: jax.scipy.linalg.solve_triangular(middle, b, lower=True)
    volumes = log_det(jnp.linalg.cholesky(cov_p)) + log_det(jnp.linalg.cholesky(cov_q))
    far = 0.25 * volumes - 0.5 * log_det(middle)
    # |A| |B| / |M|^2 = |I - E^2| with E = (A - B) / 2 in units of M, where the three determinants would cancel.
    halves = jnp.linalg.eigvalsh(solve(solve(0.5 * (cov_p - cov_q)).T))
    near = jnp.square(halves).max() < 0.25
    log_affinity = jnp.where(near, 0.25 * jnp.log1p(-jnp.square(jnp.where(near, halves, 0))).sum(), far)
    return -jnp.expm1(log_affinity - 0.125 * jnp.square(solve(difference)).sum())


def _of_deltas(name, words, mu_p, mu_q, noise):
    """The noise's own closed form of a divergence between two shifts."""
    if not hasattr(noise, name):
        raise TypeError(
            f"noise {type(noise).__name__} has no closed form for the {words} of two spread deltas; "
            "estimate it with spread_divergence."
        )
    check = getattr(noise, "_array", check_batch)
    mu_p, mu_q = check("mu_p", mu_p), check("mu_q", mu_q)
    check_same_shape("mu_p", mu_p, "mu_q", mu_q)
    return getattr(noise, name)(mu_p, mu_q)


def _spread_gaussians(mean_p, cov_p, mean_q, cov_q, noise):
    mean_p, mean_q = check_batch("mean_p", mean_p), check_batch("mean_q", mean_q)
    cov_p, cov_q = check_batch("cov_p", cov_p), check_batch("cov_q", cov_q)
    if mean_p.ndim != 1:
        raise ValueError(f"mean_p must have shape [X], got {mean_p.shape}; use jax.vmap for many pairs.")
    size = mean_p.shape[0]
    for name, value, shape in (
        ("mean_p", mean_p, (size,)),
        ("cov_p", cov_p, (size, size)),
        ("mean_q", mean_q, (size,)),
        ("cov_q", cov_q, (size, size)),
    ):
        if value.shape != shape:
            raise ValueError(f"{name} must have shape {shape} to fit mean_p, got {value.shape}.")
    # Factorisations need float32 at least.
    mean_p, mean_q, cov_p, cov_q = (at_least_float32(part) for part in (mean_p, mean_q, cov_p, cov_q))
    spread = gaussian_noise_covariance(noise, mean_p)
    return mean_p - mean_q, cov_p + spread, cov_q + spread


def gaussian_noise_covariance(noise, mean):
    """C, [X, X], of Gaussian noise on events of the shape of `mean`, [X]."""
    if not hasattr(noise, "covariance"):
        raise TypeError(
            f"noise must be GaussianNoise or LowRankGaussianNoise for Gaussians to stay Gaussian, got "
            f"{type(noise).__name__}; estimate from samples instead."
        )
    return noise.covariance(mean[None])
