"""Divergences over many scales of noise, D_w = E_{sigma ~ w} lambda(sigma) D(p~_sigma || q~_sigma)."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from spread_jax._checks import check_callable
from spread_jax._random import check_one_key
from spread_jax.divergences.estimators import Estimate, spread_divergence
from spread_jax.divergences.f_divergences import FDivergence, kl
from spread_jax.noise import GaussianNoise, ScaleLaw, SpreadNoise
from spread_jax.noise.scales import check_law

__all__ = ["divergence_over_scales", "spread_divergence_over_scales"]


def divergence_over_scales(
    divergence: Callable[[jax.Array], jax.Array],
    law: ScaleLaw,
    *,
    weight: Callable[[jax.Array], jax.Array] | None = None,
    num_scales: int = 32,
) -> jax.Array:
    r"""E_{sigma ~ w} lambda(sigma) D(sigma) of a divergence that is known at each scale, by quadrature in log sigma.

    Args:
      divergence: sigma, a scalar -> D(sigma), of any shape: a closed form such as `spread_kl_gaussians`.
      law: w.
      weight: sigma -> lambda(sigma) > 0, elementwise; 1 by default.
      num_scales: nodes; a grid has its own.

    Returns:
      The mean, of the shape of D(sigma), differentiable in everything, the law's ends included.

    Raises:
      TypeError: `divergence` or `weight` is not callable, or `law` is no law of scales.

    Source: He et al., Training Neural Samplers with Reverse Diffusive KL Divergence, AISTATS 2025.

    Example:
      >>> import jax.numpy as jnp
      >>> from spread_jax import GaussianNoise, LogUniformScales, spread_kl_deltas
      >>> zero, one = jnp.zeros((1, 1)), jnp.ones((1, 1))
      >>> at = lambda sigma: spread_kl_deltas(zero, one, GaussianNoise(sigma))[0]
      >>> print(f"{divergence_over_scales(at, LogUniformScales(0.5, 1.0)):.4f}")  # 3 / (4 log 2)
      1.0820
    """
    check_callable("divergence", divergence)
    scales, weights = _weighted(law, weight, num_scales)
    return jnp.tensordot(weights, jax.vmap(divergence)(scales), axes=1)


def spread_divergence_over_scales(
    p_samples: jax.Array,
    q_samples: jax.Array,
    law: ScaleLaw,
    noise: Callable[[jax.Array], SpreadNoise] = GaussianNoise,
    *,
    divergence: FDivergence = kl,
    weight: Callable[[jax.Array], jax.Array] | None = None,
    num_samples: int,
    num_scales: int = 16,
    key: jax.Array,
    chunk_size: int | None = None,
) -> Estimate:
    r"""D_w of two empirical distributions: `spread_divergence` at each node of the quadrature over scales.

    Args:
      p_samples: [n, *event], samples of p.
      q_samples: [m, *event], samples of q.
      law: w.
      noise: sigma -> the spread noise of that scale.
      divergence: which f.
      weight: sigma -> lambda(sigma) > 0, elementwise; 1 by default.
      num_samples: draws of y from each side, at each scale.
      num_scales: nodes of the quadrature; a grid has its own.
      key: a JAX random key.
      chunk_size: as in `log_spread_density`.

    Returns:
      Estimate(value, standard_error), of the two sample sets given: see `spread_divergence`. The standard error is
      that of the draws of y; the quadrature's own error falls exponentially with `num_scales`.

    Raises:
      TypeError: as `spread_divergence`, or `law` is no law of scales, or `noise` or `weight` is not callable.
      ValueError: as `spread_divergence`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from spread_jax import LogUniformScales
      >>> zero, one = jnp.zeros((1, 1)), jnp.ones((1, 1))
      >>> law, options = LogUniformScales(0.5, 1.0), {"num_samples": 500, "key": jax.random.key(0)}
      >>> estimate = spread_divergence_over_scales(zero, one, law, **options)
      >>> bool(abs(estimate.value - 1.0820) < 6 * estimate.standard_error)
      True
    """
    check_callable("noise", noise)
    scales, weights = _weighted(law, weight, num_scales)

    def at(scale_and_key):
        scale, key = scale_and_key
        options = {"divergence": divergence, "num_samples": num_samples, "key": key, "chunk_size": chunk_size}
        return spread_divergence(p_samples, q_samples, noise(scale), **options)

    each = jax.lax.map(at, (scales, jax.random.split(check_one_key(key), scales.shape[0])))
    error = jnp.sqrt(jnp.square(weights * each.standard_error).sum())
    return Estimate((weights * each.value).sum(), jax.lax.stop_gradient(error))


def _weighted(law, weight, num_scales):
    """Nodes, and their weights times lambda."""
    check_law("law", law)
    scales, weights = law.quadrature(num_scales)
    if weight is not None:
        check_callable("weight", weight)
        weights = weights * weight(scales)
    return scales, weights
