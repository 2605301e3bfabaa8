"""Spread divergences in closed form: of deltas under each noise, of Gaussians under Gaussian noise."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from spread_jax._checks import check_batch, check_same_shape
from spread_jax._pairwise import flatten_events
from spread_jax.noise import (
    CauchyNoise,
    DiscreteNoise,
    GaussianNoise,
    LaplaceNoise,
    LogisticNoise,
    LowRankGaussianNoise,
    SpreadNoise,
    TransformedNoise,
)
from spread_jax.noise._product import fit_event

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
    if not hasattr(noise, "kl"):
        raise _no_closed_form("KL", noise)
    if not isinstance(noise, DiscreteNoise):
        mu_p, mu_q = check_batch("mu_p", mu_p), check_batch("mu_q", mu_q)
        check_same_shape("mu_p", mu_p, "mu_q", mu_q)
    return noise.kl(mu_p, mu_q)


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
    mu_p, mu_q, noise = _deltas(mu_p, mu_q, noise)
    if isinstance(noise, (GaussianNoise, LowRankGaussianNoise)):
        log_affinity = -0.25 * noise.kl(mu_p, mu_q)
    elif isinstance(noise, LaplaceNoise):
        half = 0.5 * _standard_distance(mu_p, mu_q, noise)
        log_affinity = (jnp.log1p(half) - half).sum(axis=1)
    elif isinstance(noise, LogisticNoise):
        # x / sinh(x) is the characteristic function of logistic noise of scale 1 / pi.
        half = 0.5 * _standard_distance(mu_p, mu_q, noise)
        near = half < 1e-3
        far = jnp.where(near, 1, half)
        log_ratio = jnp.log(2 * far) - far - jnp.log(-jnp.expm1(-2 * far))
        log_affinity = jnp.where(near, -jnp.square(half) / 6, log_ratio).sum(axis=1)
    else:
        raise _no_closed_form("Hellinger distance", noise)
    return -jnp.expm1(log_affinity)


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
    mu_p, mu_q, noise = _deltas(mu_p, mu_q, noise)
    if isinstance(noise, (GaussianNoise, LowRankGaussianNoise)):
        log_integral = 2 * noise.kl(mu_p, mu_q)
    elif isinstance(noise, LaplaceNoise):
        t = _standard_distance(mu_p, mu_q, noise)
        # (2 e^t + e^-2t) / 3 = e^t (1 - (1 - e^-3t) / 3)
        log_integral = (t + jnp.log1p(jnp.expm1(-3 * t) / 3)).sum(axis=1)
    elif isinstance(noise, CauchyNoise):
        log_integral = jnp.log1p(0.5 * jnp.square(_standard_distance(mu_p, mu_q, noise))).sum(axis=1)
    else:
        raise _no_closed_form("chi-squared divergence", noise)
    return jnp.expm1(log_integral)


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
    mu_p, mu_q, noise = _deltas(mu_p, mu_q, noise)
    if isinstance(noise, (GaussianNoise, LowRankGaussianNoise)):
        square = 0.25 * noise.kl(mu_p, mu_q)
        apart = square != 0  # the root of zero has no derivative; NaN stays NaN
        return jnp.where(apart, jax.lax.erf(jnp.sqrt(jnp.where(apart, square, 1))), 0)
    if not isinstance(noise, (LaplaceNoise, CauchyNoise, LogisticNoise)):
        raise _no_closed_form("total variation", noise)
    t = _standard_distance(mu_p, mu_q, noise)
    if t.shape[1] != 1:
        raise ValueError(
            f"mu_p must have events of one number for {type(noise).__name__}, got shape {mu_p.shape}; "
            "estimate with spread_divergence(..., divergence=total_variation)."
        )
    if isinstance(noise, LaplaceNoise):
        return -jnp.expm1(-0.5 * t[:, 0])
    if isinstance(noise, CauchyNoise):
        return 2 / math.pi * jnp.arctan(0.5 * t[:, 0])
    return jnp.tanh(0.25 * t[:, 0])


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
    u = jax.scipy.linalg.solve_triangular(middle, difference, lower=True)
    volumes = log_det(jnp.linalg.cholesky(cov_p)) + log_det(jnp.linalg.cholesky(cov_q))
    return -jnp.expm1(0.25 * volumes - 0.5 * log_det(middle) - 0.125 * jnp.square(u).sum())


def _deltas(mu_p, mu_q, noise):
    """The locations, and the noise around them, after checking that they fit."""
    mu_p, mu_q = check_batch("mu_p", mu_p), check_batch("mu_q", mu_q)
    check_same_shape("mu_p", mu_p, "mu_q", mu_q)
    while isinstance(noise, TransformedNoise):
        mu_p, mu_q, noise = noise.location(mu_p), noise.location(mu_q), noise.base
    return mu_p, mu_q, noise


def _standard_distance(mu_p, mu_q, noise):
    """|mu_p - mu_q| / scale, [batch, X]."""
    difference = mu_p - mu_q
    return flatten_events(jnp.abs(difference / noise._scale_like(difference)))


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
    spread = gaussian_noise_covariance(noise, "mean_p", mean_p)
    return mean_p - mean_q, cov_p + spread, cov_q + spread


def gaussian_noise_covariance(noise, name, mean):
    """C, [X, X], of Gaussian or low-rank Gaussian noise on events of the shape of `mean`, [X]."""
    if not isinstance(noise, (GaussianNoise, LowRankGaussianNoise)):
        raise TypeError(
            f"noise must be GaussianNoise or LowRankGaussianNoise for Gaussians to stay Gaussian, got "
            f"{type(noise).__name__}; estimate from samples instead."
        )
    (size,) = mean.shape
    scale = fit_event("scale", noise.scale, mean[None])
    covariance = jnp.diag(jnp.square(jnp.broadcast_to(scale, (size,))))
    if isinstance(noise, LowRankGaussianNoise):
        factor = jnp.asarray(noise.factor, mean.dtype)
        if factor.shape[:-1] != (size,):
            raise ValueError(f"factor must have shape ({size}, R) to fit {name}, got {factor.shape}.")
        covariance = covariance + factor @ factor.T
    return covariance


def _no_closed_form(what, noise):
    return TypeError(
        f"noise {type(noise).__name__} has no closed form for the {what} of two spread deltas; "
        "estimate it with spread_divergence."
    )
