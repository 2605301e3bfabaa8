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
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from spread_jax._checks import (
    check_batch,
    check_count,
    check_non_negative,
    check_positive,
    check_samples,
    is_concrete,
)
from spread_jax._pytree import frozen_pytree
from spread_jax._random import check_one_key
from spread_jax.linear import _closed_form, _gibbs, _iterative
from spread_jax.linear._host import library, normal_draws, promotes_as_numpy
from spread_jax.linear._order import stable_order
from spread_jax.linear._sampling import PosteriorMoments, importance_moments, pseudo_inverse
from spread_jax.linear._whiten import principal_axes, whiten
from spread_jax.linear.sources import NAMED, LaplaceSource, Source, as_source

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
_TOLERANCES = {"closed_form": 0.1}
_SAMPLES = {"natural_gradient": 8, "spread_em": 1000, "em": 1000}


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
      leakage: [Z, Z], for closed_form: how much of source j is in the estimate of source i, as the standard deviation
        that is predicted for the error of this fit, where sources have unit variance. It is 1 for two sources that
        the data cannot tell apart, as those of two Gaussian laws are. Other methods give NaN.
    """

    mixing: jax.Array
    unmixing: jax.Array
    mean: jax.Array
    noise_scale: jax.Array
    num_iterations: jax.Array
    converged: jax.Array
    residual: jax.Array
    leakage: jax.Array

    @property
    def column_errors(self) -> jax.Array:
        """[Z], the predicted error of each column of A: the root-mean-square length of a_est - a over that of a.

        Of its direction: a_est - a = sum over i of a_i e_ij, with `leakage` the standard deviations of e_ij.
        """
        squares = (jnp if isinstance(self.mixing, jax.Array) else np).square(self.mixing).sum(axis=0)
        return (squares @ self.leakage**2 / squares) ** 0.5


@promotes_as_numpy
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
    return _iterative.paper_noise_scale(check_batch("mixing", mixing))


@promotes_as_numpy
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
    key = check_one_key(key)
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


@promotes_as_numpy
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
    return _iterative.em_update(posterior_moments(mixing, x, key=key, **e_step))


@promotes_as_numpy
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
    return _iterative.natural_update(jnp.asarray(mixing), moments, step_size)


@promotes_as_numpy
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
    key, variance = check_one_key(key), jnp.square(jnp.asarray(noise_scale, y.dtype))
    mixing, columns, _ = _gibbs.update(mixing, z.T, y.T, variance, source, step_size, key)
    return mixing, columns.T


@promotes_as_numpy
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

    Pure code under jit and vmap; checks of the numbers in x happen where x is concrete. `natural_gradient` and `gibbs`
    take a fixed number of steps, through which `jax.grad` goes; the other methods stop where they have arrived, so that
    only forward derivatives, `jax.jvp` and `jax.jacfwd`, go through them.

    Args:
      x: [N, X], data, float32 or float64. With closed_form a NumPy array is fitted by NumPy, with nothing to compile,
        and gives NumPy arrays: whitened in double precision, its rotation found in float32 unless `tolerance` asks for
        more. A JAX array is fitted where it lies, in its own precision.
      num_sources: Z; X if not given. More than X makes the model overcomplete.
      method: "closed_form" (the default "auto" for Z <= X), "natural_gradient", "spread_em", "em" or "gibbs" (the
        default for Z > X).
      source: the law of a source: "auto", a name, a `Source`, or a log-density. With "auto", closed_form estimates the
        score of each source from the data, whatever its law, with no spread noise; the other methods take it for
        "laplace". With a law, closed_form weighs its score against u for each source, so that a source of another law
        does no harm, and the likelihood of that law, not unit variance, sets the scales of sources.
      noise_scale: sigma. For closed_form in units of a source, by default 3.3 / N^(1/2), but from 0.05 to 0.3; with
        source "auto" a number given stands for the spread Laplace law, scaled to unit variance. For the others in
        units of x: by default 0.2 (natural_gradient) or 0.1 (gibbs) root-mean-square entries of A, the paper's rule
        from the current A (spread_em).
      observation_scale: gamma, standard deviation of noise that x is known to hold, in units of x.
      num_samples: of z for each y in importance sampling; 8 for natural_gradient, 1000 for EM.
      num_spread_samples: of y for each x.
      rows_per_draw: as in `posterior_moments`.
      max_iterations: most steps; 200, 80, 500, 500 or 1100 in the order of the methods above.
      tolerance: in standard errors over examples. closed_form stops when no entry of what is predicted to be left of
        its way exceeds it (0.1).
        EM stops, and every sampling method is called converged, when no entry of the mean relative gradient exceeds it
        (0.25): what is left to gain is then less than the data can tell. Nor may turning two columns of A, by pi/8 or
        pi/4, be likelier by more standard errors than that (not looked at by gibbs).
      num_restarts: random starts, run side by side by vmap; the best likelihood (contrast, for closed_form) is kept.
        Of two sources closed_form looks at all angles.
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
      for the fixed point; J.-F. Cardoso and B. Laheld, 1996, for relative steps; D. T. Pham and P. Garat, 1997, for
      scores estimated by projection.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> z = jax.random.laplace(jax.random.key(0), (2000, 2)) / 2**0.5
      >>> result = fit(z @ jnp.array([[1.0, 1.0], [0.0, 1.0], [1.0, -1.0]]).T, 2, key=jax.random.key(1))
      >>> print(result.mixing.shape, bool(result.converged))
      (3, 2) True
    """
    key = check_one_key(key)
    host = isinstance(x, np.ndarray) and x.dtype in (np.float32, np.float64)
    if not host or x.size == 0:
        x, host = check_samples("x", x), False
    elif not np.isfinite(x).all():
        raise ValueError("x must be finite, got NaN or infinity; remove those samples first.")
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
    if method == "em" and _is_zero(observation_scale):
        raise ValueError(
            f"observation_scale must be positive for method 'em', got {observation_scale}: without noise the "
            f"likelihood is zero and EM does not move; use 'spread_em' or 'closed_form'."
        )
    if method == "closed_form" and noise_scale is not None:
        check_positive("noise_scale", noise_scale)
    elif noise_scale is not None:
        _check_noise(noise_scale, observation_scale)
    check_non_negative("observation_scale", observation_scale)
    if tolerance is not None:
        check_positive("tolerance", tolerance)
    source = source_of(source)
    known_law = source is not None
    source = source if known_law else LaplaceSource()
    observed = not _is_zero(observation_scale)
    if method == "gibbs":
        _check_scale_mixture(source)
    options = {
        "method": method,
        "num_sources": size,
        "observed": observed,
        "known_law": known_law,
        "num_restarts": check_count("num_restarts", num_restarts),
        "num_samples": check_count("num_samples", _SAMPLES.get(method, 1) if num_samples is None else num_samples),
        "num_spread_samples": check_count("num_spread_samples", num_spread_samples),
        "rows_per_draw": None if rows_per_draw is None else check_count("rows_per_draw", rows_per_draw),
        "max_iterations": check_count(
            "max_iterations", _ITERATIONS[method] if max_iterations is None else max_iterations
        ),
        "tolerance": _TOLERANCES.get(method, _iterative.STANDARD_ERRORS) if tolerance is None else tolerance,
    }
    if host and method == "closed_form":
        observation_scale = float(observation_scale)
        axes = principal_axes(x, observation_scale**2 if observed else None)
        _check_rank(axes.rank, size)
        return _closed_form_fit(x, axes, source, noise_scale, observation_scale, key, **options)
    result, deviations = _fit(jnp.asarray(x), source, noise_scale, observation_scale, key, **options)
    if is_concrete(deviations):
        _check_rank(int((deviations > 0).sum()), directions)
    return result


def source_of(source: str | Source | Callable[[jax.Array], jax.Array]) -> Source | None:
    """The law that `fit` takes for its `source`; None for "auto"."""
    if isinstance(source, str) and source not in ("auto", *NAMED):
        raise ValueError(f"source must be one of {', '.join(map(repr, ('auto', *NAMED)))}, got {source!r}.")
    return None if isinstance(source, str) and source == "auto" else as_source(source)


def _is_zero(scale):
    """Whether this is known to be no noise: a traced number may be some."""
    return is_concrete(scale) and not np.asarray(scale).any()  # of NumPy, also where a trace is open


def _check_noise(noise_scale, observation_scale):
    """Refuses a model without any noise, whose likelihood is zero."""
    check_non_negative("noise_scale", noise_scale)
    check_non_negative("observation_scale", observation_scale)
    if _is_zero(noise_scale) and _is_zero(observation_scale):
        raise ValueError(
            "noise_scale and observation_scale must not both be 0: without noise the likelihood of x = A z is zero."
        )


def _check_rank(rank, directions):
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
    variance = jnp.square(observation_scale) if observed else None
    axes = principal_axes(x, variance)
    if method == "closed_form":
        options |= {"num_sources": num_sources, "observed": observed, "known_law": known_law}
        found = _closed_form_fit(x, axes, source, noise_scale, observation_scale, key, **options)
        return found, axes.deviations
    mean = axes.mean
    _, from_white, _, _ = whiten(x, axes, min(num_sources, x.shape[1]), variance)
    typical = jnp.sqrt(jnp.square(from_white).sum() / (x.shape[1] * num_sources))

    if method == "gibbs":
        scale = 0.1 * typical if noise_scale is None else jnp.asarray(noise_scale, x.dtype)
        found = _gibbs.fit(x - mean, from_white, num_sources, source, scale, observation_scale, key, **options)
        found["unmixing"] = pseudo_inverse(found["mixing"])
        return _result(found, mean, options["tolerance"]), axes.deviations
    start_key, key = jax.random.split(key)

    def one(start_key, key):
        start = _gibbs.random_start(from_white, num_sources, start_key)
        scale = noise_scale
        if scale is None and method == "natural_gradient":
            scale = 0.2 * typical
        run = _iterative.fit_natural if method == "natural_gradient" else _iterative.fit_em
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
    return _result(found, mean, options["tolerance"]), axes.deviations


def _closed_form_fit(
    x, axes, source, noise_scale, observation_scale, key, *, num_sources, observed, known_law, **options
):
    """The closed form's result, in NumPy or in JAX as x is."""
    xp = library(x)
    dtype = x.dtype
    if xp is np and options["tolerance"] / len(x) ** 0.5 > _closed_form.rounding(np.float32):
        dtype = np.float32  # for the rotation; x is whitened in double precision
    v, from_white, to_white, noise = whiten(x, axes, num_sources, observation_scale**2 if observed else None, dtype)
    shape = options["num_restarts"], num_sources, num_sources
    if num_sources == 2:  # all angles are looked at
        starts = xp.eye(2, dtype=v.dtype)[None]
    elif xp is np:  # JAX's generator would have to be compiled
        starts = normal_draws(tuple(np.asarray(jax.random.key_data(key)).tolist()), shape)
    else:
        starts = jax.random.normal(key, shape, v.dtype)
    found = _closed_form.fit(
        v,
        _closed_form.polar(starts),
        source if known_law or noise_scale is not None else None,
        noise_scale,
        noise,
        likelihood=known_law,
        max_iterations=options["max_iterations"],
        tolerance=options["tolerance"],
    )
    rotation = found["rotation"]
    found["mixing"] = xp.linalg.solve(rotation.T, from_white.T).T  # D W^-1
    found["unmixing"] = rotation @ to_white
    if xp is np:
        found = {name: np.asarray(value, x.dtype if name != "num_iterations" else int) for name, value in found.items()}
    return _result(found, axes.mean.astype(x.dtype), options["tolerance"])


def _result(found, mean, tolerance):
    order, signs = stable_order(found["mixing"])
    scale = found["noise_scale"]
    leakage = found["leakage"] if "leakage" in found else jnp.full((len(order),) * 2, jnp.nan, scale.dtype)
    return IcaResult(
        mixing=(found["mixing"] * signs)[:, order],
        unmixing=(found["unmixing"] * signs[:, None])[order],
        mean=mean,
        noise_scale=scale[order] if scale.ndim else scale,
        num_iterations=found["num_iterations"],
        converged=found["residual"] <= tolerance,
        residual=found["residual"],
        leakage=leakage[order][:, order],
    )
