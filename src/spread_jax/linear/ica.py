r"""Independent component analysis of x = A z: deterministic, so its likelihood is zero off the span of A.

Spread both sides with sigma epsilon and it is defined: p~(y) is the density of A z + sigma epsilon. Four ways to use
it, from the paper's EM to a closed form, and Gibbs sampling for more sources than dimensions:

  em                standard EM, for data with observation noise gamma > 0 of known scale
  spread_em         the paper's EM on spread data
  natural_gradient  the same E-step, and a step along the Fisher-preconditioned gradient of log p~
  closed_form       the score of one spread source in closed form; a fixed point, then relative Newton
  gibbs             natural gradient with Gibbs chains, for overcomplete models

To first order both EMs make the same step, A+ = A + s^2 A (A^T A)^-1 (E[psi(u) u^T] - I) C^-1 with s the total noise,
C the covariance of u = A^+ y and psi the source's score. So standard EM freezes as gamma -> 0, and spread EM at an
equally small sigma freezes too. Spreading the data allows a large sigma without a bias of the scale of A; the other
methods do not freeze at any sigma.

Conventions: x is [N, X], A is [X, Z], sources have unit variance, Z <= X unless the method is gibbs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from spread_jax._checks import check_batch, check_count, check_positive, check_samples
from spread_jax._pytree import frozen_pytree
from spread_jax.linear import _closed_form, _gibbs
from spread_jax.linear._order import stable_order
from spread_jax.linear._sampling import (
    PosteriorMoments,
    importance_moments,
    pseudo_inverse,
    score_deviation,
    turn_gain,
)
from spread_jax.linear.sources import LaplaceSource, Source, as_source

__all__ = [
    "IcaResult",
    "PosteriorMoments",
    "em_step",
    "fit",
    "gibbs_step",
    "natural_gradient_step",
    "paper_noise_scale",
    "posterior_moments",
]

METHODS = ("auto", "closed_form", "natural_gradient", "spread_em", "em", "gibbs")
_ITERATIONS = {"closed_form": 200, "natural_gradient": 80, "spread_em": 500, "em": 500, "gibbs": 1100}
_SAMPLES = {"natural_gradient": 8, "spread_em": 1000, "em": 1000}
# Standard errors that the gradient may be away from zero when a sampling method is called converged. With 0.5, three of
# 162 fits of 500 to 3,000 examples stopped at a plateau, with 0.25 none did; 0.1 to 0.2 is what noise leaves.
_STANDARD_ERRORS = 0.25
# EM steps between two looks at the mean of their gradients, and the last of them, whose A are averaged. With fresh
# noise in every step a mean over 15 gradients is itself up to 0.65 standard errors off, one over 50 up to 0.35.
_BETWEEN_LOOKS, _LAST = 50, 15
_LOOK_ROWS, _LOOK_SAMPLES = 2048, 64  # of the deviations that the gradient is measured in
_TURN_ROWS, _TURN_SAMPLES = 8192, 32  # of the look at turns of two columns


@frozen_pytree
class IcaResult:
    """An estimate x = mean + A z.

    Args:
      mixing: [X, Z], A, in units of x; sources have unit variance under the model. The column that explains most
        variance, |a_j|^2, comes first; those whose variances follow each other within a twentieth are in the order of
        their cosine with a fixed direction, which rounding does not change. In each column the first entry within a
        twentieth of the largest is positive.
      unmixing: [Z, X], the pseudo-inverse of A: z = (x - mean) @ unmixing.T.
      mean: [X].
      noise_scale: the spread noise used: [] in units of x, or [Z] in units of a source for closed_form.
      num_iterations: [], steps taken.
      converged: [], whether the gradient of the spread likelihood vanished to tolerance, not merely whether the
        steps became small: the steps of EM do so without it. The gradient vanishes at a plateau too, where columns are
        still mixed, so that EM and natural_gradient also look whether turning two of them is likelier.
      residual: [], what was compared with the tolerance.
    """

    mixing: jax.Array
    unmixing: jax.Array
    mean: jax.Array
    noise_scale: jax.Array
    num_iterations: jax.Array
    converged: jax.Array
    residual: jax.Array


def paper_noise_scale(mixing: jax.Array) -> jax.Array:
    """The paper's rule sigma = max(0.001, 2.5 sqrt(mean(A A^T))), the mean over all entries.

    Args:
      mixing: [X, Z], A.

    Returns:
      [], in units of x.

    Source: Zhang et al., Spread Divergence, ICML 2020, section on deterministic ICA.

    Example:
      >>> import jax.numpy as jnp
      >>> print(paper_noise_scale(jnp.ones((4, 1))))
      2.5
    """
    mixing = check_batch("mixing", mixing)
    # The mean over entries of A A^T is a squared length.
    return jnp.maximum(0.001, 2.5 * jnp.linalg.norm(mixing.sum(axis=0)) / mixing.shape[0])


def posterior_moments(
    mixing: jax.Array,
    x: jax.Array,
    *,
    noise_scale: float | jax.Array = 0.0,
    observation_scale: float | jax.Array = 0.0,
    source: str | Source | Callable[[jax.Array], jax.Array] = "laplace",
    num_samples: int = 1000,
    num_spread_samples: int = 1,
    rows_per_draw: int | None = None,
    chunk_size: int | None = None,
    key: jax.Array,
) -> PosteriorMoments:
    r"""The E-step: averages over y = x + sigma epsilon and p(z|y) by self-normalised importance sampling.

    p(z|y) is proportional to N(z; A^+ y, (sigma^2 + gamma^2)(A^T A)^-1) prod_i p(z_i). Samples come from the Gaussian
    in antithetic pairs; N x samples x Z numbers are never held, only a block of them.

    Args:
      mixing: [X, Z], A, with Z <= X.
      x: [N, X], centred data.
      noise_scale: sigma >= 0, the spread noise added to x, in units of x.
      observation_scale: gamma >= 0, noise that x is known to hold already. sigma and gamma must not both be 0.
      source: the law of a source, see `sources.as_source`.
      num_samples: of z for each y (made even).
      num_spread_samples: of y for each x.
      rows_per_draw: how many rows share the same standard normal draws: more rows cost fewer random numbers, and
        make the errors of those rows dependent, which the antithetic pairs keep small. 64 if not given, for more
        than 32 samples; else 1.
      chunk_size: rows handled at once; by default about 2^18 numbers.
      key: a JAX random key.

    Returns:
      A PosteriorMoments.

    Raises:
      TypeError, ValueError: arrays that do not fit, or counts below one.

    Source: Zhang et al., Spread Divergence, ICML 2020, appendix on deterministic ICA.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> x = jax.random.laplace(jax.random.key(0), (500, 2)) / 2**0.5
      >>> moments = posterior_moments(jnp.eye(2), x, noise_scale=0.1, num_samples=8, key=jax.random.key(1))
      >>> print(bool(jnp.abs(moments.score_z - jnp.eye(2)).max() < 0.3))
      True
    """
    mixing, x = _check_model(mixing, x)
    _check_noise(noise_scale, observation_scale)
    if mixing.shape[1] > mixing.shape[0]:
        raise ValueError(
            f"mixing must have at most as many columns as rows for importance sampling, got shape {mixing.shape}; "
            f"use gibbs_step for more sources than dimensions."
        )
    return importance_moments(
        mixing,
        x,
        noise_scale=jnp.asarray(noise_scale, x.dtype),
        observation_scale=jnp.asarray(observation_scale, x.dtype),
        source=as_source(source),
        num_samples=check_count("num_samples", num_samples),
        num_spread_samples=check_count("num_spread_samples", num_spread_samples),
        rows_per_draw=None if rows_per_draw is None else check_count("rows_per_draw", rows_per_draw),
        chunk_size=None if chunk_size is None else check_count("chunk_size", chunk_size),
        key=key,
    )


def em_step(mixing: jax.Array, x: jax.Array, *, key: jax.Array, **e_step) -> jax.Array:
    r"""One EM step, A <- E[y z^T] E[z z^T]^-1.

    Standard EM has noise_scale 0 and the known observation_scale gamma; the paper's has noise_scale sigma > 0.

    Args:
      mixing: [X, Z], A.
      x: [N, X], centred data.
      key: a JAX random key.
      **e_step: as for `posterior_moments`.

    Returns:
      [X, Z], the new A.

    Source: Zhang et al., Spread Divergence, ICML 2020, appendix on deterministic ICA.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> x = jax.random.laplace(jax.random.key(0), (500, 2)) / 2**0.5
      >>> mixing = em_step(jnp.eye(2), x, noise_scale=0.5, num_samples=64, key=jax.random.key(1))
      >>> print(mixing.shape)
      (2, 2)
    """
    return _em_update(posterior_moments(mixing, x, key=key, **e_step))


def natural_gradient_step(
    mixing: jax.Array,
    x: jax.Array,
    *,
    step_size: float | jax.Array = 1.0,
    num_samples: int = 8,
    key: jax.Array,
    **e_step,
) -> jax.Array:
    r"""One natural-gradient step on log p~, A <- A + eta A M + (I - A A^+) A_EM.

    The relative gradient is F = E[psi(z) z^T] - I. M is F preconditioned by the Fisher information of independent
    sources, which couples (i, j) with (j, i) only: M_ij = (h_j F_ij - F_ji) / (h_i h_j - 1), h_i = E psi(z_i)^2. The
    last term is the EM step of the span of A, which needs no step size.

    Args:
      mixing: [X, Z], A.
      x: [N, X], centred data.
      step_size: eta, of (0, 1].
      num_samples: of z for each y.
      key: a JAX random key.
      **e_step: as for `posterior_moments`.

    Returns:
      [X, Z], the new A.

    Source: S. Amari, Natural gradient works efficiently in learning, Neural Computation 10, 1998; Zhang et al., Spread
      Divergence, ICML 2020, for the E-step.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> x = jax.random.laplace(jax.random.key(0), (500, 2)) / 2**0.5
      >>> mixing = natural_gradient_step(jnp.eye(2), x, noise_scale=0.1, key=jax.random.key(1))
      >>> print(mixing.shape)
      (2, 2)
    """
    moments = posterior_moments(mixing, x, num_samples=num_samples, key=key, **e_step)
    return _natural_update(jnp.asarray(mixing), moments, step_size)


def gibbs_step(
    mixing: jax.Array,
    z: jax.Array,
    y: jax.Array,
    *,
    noise_scale: float | jax.Array,
    step_size: float | jax.Array = 0.5,
    source: str | Source = "laplace",
    key: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    r"""A Gibbs sweep of every chain z ~ p(z|y), then A <- A + eta A (E[psi(z) z^T] - I); X < Z is allowed.

    Args:
      mixing: [X, Z], A.
      z: [N, Z], one chain for each example, kept from step to step.
      y: [N, X], spread data; kept too, as it is what the chains are conditioned on.
      noise_scale: total standard deviation of the model's noise, > 0, in units of x.
      step_size: eta.
      source: "laplace", "student_t" or "bernoulli_gauss": scale mixtures of Gaussians.
      key: a JAX random key.

    Returns:
      (A, z).

    Raises:
      ValueError: for a source that is no scale mixture, or arrays that do not fit.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> z = jax.random.laplace(jax.random.key(0), (500, 3)) / 2**0.5
      >>> mixing = jnp.array([[1.0, 0.0, 0.7], [0.0, 1.0, 0.7]])
      >>> mixing, z = gibbs_step(mixing, z, z @ mixing.T, noise_scale=0.1, key=jax.random.key(1))
      >>> print(mixing.shape, z.shape)
      (2, 3) (500, 3)
    """
    mixing, y = _check_model(mixing, y, name="y")
    z = check_batch("z", z)
    if z.shape != (y.shape[0], mixing.shape[1]):
        raise ValueError(f"z must have shape {(y.shape[0], mixing.shape[1])}, one chain for each y, got {z.shape}.")
    source = _check_scale_mixture(as_source(source))
    check_positive("noise_scale", noise_scale)
    variance = jnp.square(jnp.asarray(noise_scale, y.dtype))
    mixing, columns, _ = _gibbs.update(mixing, z.T, y.T, variance, source, step_size, key)
    return mixing, columns.T


def fit(
    x: jax.Array,
    num_sources: int | None = None,
    *,
    method: str = "auto",
    source: str | Source | Callable[[jax.Array], jax.Array] = "auto",
    noise_scale: float | jax.Array | None = None,
    observation_scale: float | jax.Array = 0.0,
    num_samples: int | None = None,
    num_spread_samples: int = 1,
    rows_per_draw: int | None = None,
    max_iterations: int | None = None,
    tolerance: float | None = None,
    num_restarts: int = 1,
    key: jax.Array,
) -> IcaResult:
    r"""Estimates A of x = mean + A z, z independent with unit variance, by a spread likelihood.

    Pure and differentiable code under jit and vmap; checks of the numbers in x happen where x is concrete.

    Args:
      x: [N, X], data, float32 or float64.
      num_sources: Z; X if not given. More than X makes the model overcomplete.
      method: "closed_form" (the default "auto" for Z <= X), "natural_gradient", "spread_em", "em" or "gibbs" (the
        default for Z > X).
      source: the law of a source: "auto", a name, a `Source`, or a log-density. With "auto", closed_form uses the
        Laplace law's score at the spread scale which suits each source best, and scales sources to unit variance
        unless the Laplace law holds; the other methods take it for "laplace".
      noise_scale: sigma. For closed_form in units of a source, chosen from the data if not given. For the others in
        units of x: by default 0.2 (natural_gradient) or 0.1 (gibbs) root-mean-square entries of A, the paper's rule
        from the current A (spread_em).
      observation_scale: gamma, standard deviation of noise that x is known to hold, in units of x.
      num_samples: of z for each y in importance sampling; 8 for natural_gradient, 1000 for EM.
      num_spread_samples: of y for each x.
      rows_per_draw: as in `posterior_moments`.
      max_iterations: most steps; 200, 80, 500, 500 or 1100 in the order of the methods above.
      tolerance: closed_form stops when no entry of a relative step exceeds it (1e-5). EM stops, and every sampling
        method is called converged, when no entry of the mean relative gradient exceeds it, in standard errors of that
        mean over examples (0.25): what is left to gain is then less than the data can tell. Nor may turning two columns
        of A, by pi/8 or pi/4, be likelier by more standard errors than that (not looked at by gibbs).
      num_restarts: random starts, run side by side by vmap; the best likelihood (contrast, for closed_form) is kept.
        Chains have no likelihood to compare, so for gibbs the runs vote: a column counts that most of them found.
        All of it takes 2 num_restarts / 3 + 3 / 2 times max_iterations.
      key: a JAX random key.

    Returns:
      An IcaResult.

    Raises:
      TypeError: if x is not floating point.
      ValueError: for shapes, names and numbers that cannot work; concrete data that are not finite or whose rank
        is below num_sources.

    Source: Zhang et al., Spread Divergence, ICML 2020, section on deterministic ICA; A. Hyvarinen, FastICA, 1999,
      for the fixed point; J.-F. Cardoso and B. Laheld, 1996, for relative steps.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> z = jax.random.laplace(jax.random.key(0), (2000, 2)) / 2**0.5
      >>> result = fit(z @ jnp.array([[1.0, 1.0], [0.0, 1.0], [1.0, -1.0]]).T, 2, key=jax.random.key(1))
      >>> print(result.mixing.shape, bool(result.converged))
      (3, 2) True
    """
    x = check_samples("x", x)
    if x.ndim != 2:
        raise ValueError(f"x must have shape [N, X], got {x.shape}.")
    size = x.shape[1] if num_sources is None else check_count("num_sources", num_sources)
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, got {method!r}.")
    if method == "auto":
        method = "closed_form" if size <= x.shape[1] else "gibbs"
    if method != "gibbs" and size > x.shape[1]:
        raise ValueError(
            f"num_sources must be at most {x.shape[1]}, the dimensions of x, for method {method!r}, got {size}; "
            f"method 'gibbs' fits more."
        )
    directions = min(size, x.shape[1])
    if x.shape[0] <= directions:
        raise ValueError(f"x must have more than {directions} rows to fit {size} sources, got {x.shape[0]}.")
    if method == "em" and isinstance(observation_scale, (int, float)) and not observation_scale > 0:
        raise ValueError(
            f"observation_scale must be positive for method 'em', got {observation_scale}: without noise the "
            f"likelihood is zero and EM does not move; use 'spread_em' or 'closed_form'."
        )
    if method == "closed_form" and noise_scale is not None:
        check_positive("noise_scale", noise_scale)
    elif noise_scale is not None:
        _check_noise(noise_scale, observation_scale)
    _check_not_negative("observation_scale", observation_scale)
    if tolerance is not None:
        check_positive("tolerance", tolerance)
    known_law = source != "auto" if isinstance(source, str) else True
    source = as_source(source) if known_law else LaplaceSource()
    if method == "gibbs":
        _check_scale_mixture(source)
    options = {
        "method": method,
        "num_sources": size,
        "observed": not (isinstance(observation_scale, (int, float)) and observation_scale == 0),
        "known_law": known_law,
        "num_restarts": check_count("num_restarts", num_restarts),
        "num_samples": check_count("num_samples", _SAMPLES.get(method, 1) if num_samples is None else num_samples),
        "num_spread_samples": check_count("num_spread_samples", num_spread_samples),
        "rows_per_draw": None if rows_per_draw is None else check_count("rows_per_draw", rows_per_draw),
        "max_iterations": check_count(
            "max_iterations", _ITERATIONS[method] if max_iterations is None else max_iterations
        ),
        "tolerance": (1e-5 if method == "closed_form" else _STANDARD_ERRORS) if tolerance is None else tolerance,
    }
    result, variances = _fit(x, source, noise_scale, observation_scale, key, **options)
    if not isinstance(variances, jax.core.Tracer) and variances.is_fully_addressable:
        _check_rank(np.asarray(variances), directions)
    return result


def _check_not_negative(name, value):
    """Refuses a concrete number that is negative or not finite; traced numbers pass unchecked."""
    if isinstance(value, (int, float, np.number)) and not 0 <= value < math.inf:
        raise ValueError(f"{name} must not be negative, and finite, got {value}.")


def _check_noise(noise_scale, observation_scale):
    """Refuses a model without any noise, whose likelihood is zero."""
    concrete = all(isinstance(value, (int, float, np.number)) for value in (noise_scale, observation_scale))
    _check_not_negative("noise_scale", noise_scale)
    _check_not_negative("observation_scale", observation_scale)
    if concrete and not noise_scale > 0 and not observation_scale > 0:
        raise ValueError(
            "noise_scale and observation_scale must not both be 0: without noise the likelihood of x = A z is zero."
        )


def _check_rank(variances, directions):
    floor = np.finfo(variances.dtype).eps * max(len(variances), 8) * variances[0]
    rank = int((variances > floor).sum())
    if rank < directions:
        raise ValueError(
            f"num_sources must be at most the rank of x, which is {rank}, got {directions}: columns of x are constant "
            f"or depend linearly on others."
        )


def _check_model(mixing, x, name="x"):
    mixing, x = check_batch("mixing", mixing), check_batch(name, x)
    if x.ndim != 2 or mixing.ndim != 2 or mixing.shape[0] != x.shape[1]:
        raise ValueError(
            f"{name} must have shape [N, X] and mixing [X, Z], got {name} {x.shape} and mixing {mixing.shape}."
        )
    return mixing.astype(x.dtype), x


def _check_scale_mixture(source):
    if not hasattr(source, "conditional_variance"):
        raise ValueError(
            f"source must be a scale mixture of Gaussians for Gibbs sampling (Laplace, Student-t or Bernoulli-Gauss), "
            f"got {type(source).__name__}."
        )
    return source


def _em_update(moments):
    return jnp.linalg.solve(moments.z_z, moments.y_z.T).T


def _natural_update(mixing, moments, step_size):
    size = mixing.shape[1]
    eye = jnp.eye(size, dtype=mixing.dtype)
    f = moments.score_z - eye
    h = moments.score_square
    # h_i >= 1 with equality for a Gaussian source; the bound keeps steps short where sources are nearly so.
    m = (h[None, :] * f - f.T) / jnp.maximum(h[:, None] * h[None, :] - 1, 0.2)
    m = jnp.where(eye > 0, f, m)
    m = m * jnp.minimum(1, 0.3 / jnp.maximum(jnp.abs(m).max(), 1e-30))
    q, _ = jnp.linalg.qr(mixing)
    span = _em_update(moments)
    return mixing + step_size * (mixing @ m) + span - q @ (q.T @ span)


@functools.partial(
    jax.jit,
    static_argnames=(
        "method",
        "num_sources",
        "observed",
        "known_law",
        "num_restarts",
        "num_samples",
        "num_spread_samples",
        "rows_per_draw",
        "max_iterations",
        "tolerance",
    ),
)
def _fit(x, source, noise_scale, observation_scale, key, *, method, num_sources, observed, known_law, **options):
    observation_scale = jnp.asarray(observation_scale, x.dtype)
    directions = min(num_sources, x.shape[1])
    whitened = _closed_form.whiten(x, directions, observation_scale)
    if method == "closed_form":
        names = ("num_restarts", "max_iterations", "tolerance")
        found = _closed_form.fit(
            whitened,
            source,
            noise_scale,
            observation_scale,
            key,
            known_law=known_law,
            observed=observed,
            **{name: options[name] for name in names},
        )
        return _result(found, whitened.mean, options["tolerance"]), whitened.variances
    mean, from_white = whitened.mean, whitened.from_white
    typical = jnp.sqrt(jnp.square(from_white).sum() / (x.shape[1] * num_sources))

    if method == "gibbs":
        scale = 0.1 * typical if noise_scale is None else jnp.asarray(noise_scale, x.dtype)
        found = _gibbs.fit(x - mean, from_white, num_sources, source, scale, observation_scale, key, **options)
        found["unmixing"] = pseudo_inverse(found["mixing"])
        return _result(found, mean, options["tolerance"]), whitened.variances
    start_key, key = jax.random.split(key)

    def one(start_key, key):
        start = _gibbs.random_start(from_white, num_sources, start_key)
        scale = noise_scale
        if scale is None and method == "natural_gradient":
            scale = 0.2 * typical
        run = _fit_natural if method == "natural_gradient" else _fit_em
        scale = 0.0 if method == "em" else scale
        return run(x - mean, start, source, scale, observation_scale, key, **options)

    num_restarts = options["num_restarts"]
    keys = jax.random.split(start_key, num_restarts), jax.random.split(key, num_restarts)
    if num_restarts == 1:
        found = one(keys[0][0], keys[1][0])
    else:
        found = jax.vmap(one)(*keys)
        found = jax.tree.map(lambda a: a[jnp.argmax(found["log_likelihood"])], found)
    found["unmixing"] = pseudo_inverse(found["mixing"])
    return _result(found, mean, options["tolerance"]), whitened.variances


def _result(found, mean, tolerance):
    order, signs = stable_order(found["mixing"])
    scale = found["noise_scale"]
    return IcaResult(
        mixing=(found["mixing"] * signs)[:, order],
        unmixing=(found["unmixing"] * signs[:, None])[order],
        mean=mean,
        noise_scale=scale[order] if scale.ndim else scale,
        num_iterations=found["num_iterations"],
        converged=found["residual"] <= tolerance,
        residual=found["residual"],
    )


def _residual(gradient, mixing, x, noise_scale, observation_scale, source, key, tolerance):
    """What the data say against A, in standard errors over examples, and the mean of log p~.

    The largest entry of the relative gradient; where that is small, as it is at a plateau too, no less than what a turn
    of two columns gains.
    """
    rows = lambda most: x[:: max(x.shape[0] // most, 1)]
    model = {"noise_scale": noise_scale, "observation_scale": observation_scale, "source": source, "key": key}
    deviation, log_likelihood = score_deviation(mixing, rows(_LOOK_ROWS), num_samples=_LOOK_SAMPLES, **model)
    residual = math.sqrt(x.shape[0]) * jnp.max(jnp.abs(gradient) / deviation)
    turned = lambda: jnp.maximum(residual, turn_gain(mixing, rows(_TURN_ROWS), num_samples=_TURN_SAMPLES, **model))
    small = residual <= max(tolerance, _STANDARD_ERRORS)
    return jax.lax.cond(small, turned, lambda: residual), log_likelihood


def _fit_natural(x, start, source, noise_scale, observation_scale, key, *, max_iterations, tolerance, **options):
    """Full steps, then shorter ones; the mean of the last tenth."""
    noise_scale = jnp.asarray(noise_scale, x.dtype)
    e_step = _e_step(x, source, observation_scale, key, options)
    last = max(max_iterations // 10, 1)
    eye = jnp.eye(start.shape[1], dtype=x.dtype)

    def step(carry, t):
        mixing, mean, gradient = carry
        moments = e_step(mixing, noise_scale, t)
        step_size = jnp.where(t < 0.5 * max_iterations, 1.0, jnp.where(t < 0.75 * max_iterations, 0.3, 0.1))
        mixing = _natural_update(mixing, moments, step_size.astype(x.dtype))
        share = jnp.where(t < max_iterations - last, 0, 1 / last).astype(x.dtype)
        return (mixing, mean + share * mixing, gradient + share * (moments.score_z - eye)), None

    carry = (start, jnp.zeros_like(start), jnp.zeros_like(eye))
    (_, mixing, gradient), _ = jax.lax.scan(step, carry, jnp.arange(max_iterations))
    residual, log_likelihood = _residual(gradient, mixing, x, noise_scale, observation_scale, source, key, tolerance)
    return {
        "mixing": mixing,
        "noise_scale": noise_scale,
        "num_iterations": jnp.asarray(max_iterations),
        "residual": residual,
        "log_likelihood": log_likelihood,
    }


def _fit_em(x, start, source, noise_scale, observation_scale, key, *, max_iterations, tolerance, **options):
    """Steps until their mean gradient vanishes; the mean of the last few A."""
    e_step = _e_step(x, source, observation_scale, key, options)
    scale_of = paper_noise_scale if noise_scale is None else lambda mixing: jnp.asarray(noise_scale, x.dtype)
    steps = min(_BETWEEN_LOOKS, max_iterations)
    last = min(_LAST, steps)

    def step(carry, t):
        mixing, total, gradient = carry
        scale = scale_of(mixing)
        moments = e_step(mixing, scale, t, with_score=False)
        # Fisher's identity: the samples of the step itself give the gradient.
        variance = jnp.square(scale) + jnp.square(observation_scale)
        gradient += mixing.T @ mixing @ moments.deviation_z / variance
        mixing = _em_update(moments)
        return (mixing, total + mixing, gradient), None

    def body(carry):
        mixing, _, t, _, _ = carry
        zeros = jnp.zeros_like(mixing), jnp.zeros((mixing.shape[1],) * 2, x.dtype)
        (mixing, _, gradient), _ = jax.lax.scan(step, (mixing, *zeros), t + jnp.arange(steps - last))
        found = jax.lax.scan(step, (mixing, zeros[0], gradient), t + jnp.arange(steps - last, steps))
        (mixing, total, gradient), _ = found
        mean = total / last
        look_key = jax.random.fold_in(key, t)
        gradient /= steps
        measured = _residual(gradient, mean, x, scale_of(mean), observation_scale, source, look_key, tolerance)
        return mixing, mean, t + steps, *measured

    infinite = jnp.asarray(jnp.inf, x.dtype)
    carry = (start, start, jnp.asarray(0), infinite, -infinite)
    going = lambda carry: (carry[3] > tolerance) & (carry[2] + steps <= max_iterations)
    _, mixing, t, residual, log_likelihood = jax.lax.while_loop(going, body, carry)
    return {
        "mixing": mixing,
        "noise_scale": scale_of(mixing),
        "num_iterations": t,
        "residual": residual,
        "log_likelihood": log_likelihood,
    }


def _e_step(x, source, observation_scale, key, options):
    names = ("num_samples", "num_spread_samples", "rows_per_draw")
    draws = {name: options[name] for name in names}

    def e_step(mixing, noise_scale, t, with_score=True):
        return importance_moments(
            mixing,
            x,
            noise_scale=noise_scale,
            observation_scale=observation_scale,
            source=source,
            chunk_size=None,
            key=jax.random.fold_in(key, t),
            with_score=with_score,
            **draws,
        )

    return e_step
