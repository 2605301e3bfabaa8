"""How likely held-out data are: bounds over a data set, and annealed importance sampling of log p~(y)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spread_jax._checks import check_batch, check_count
from spread_jax._random import check_one_key, normal
from spread_jax.noise import SpreadNoise

__all__ = ["AnnealedEstimate", "HeldOutBound", "annealed_importance_sampling", "held_out_bound"]

_TARGET_ACCEPTANCE = 0.75
_ADAPTATION_RATE = 0.25
_FIRST_STEP_SIZE = 0.3


class HeldOutBound(NamedTuple):
    """A bound averaged over a data set, in nats per example.

    Attributes:
      value: the mean over examples.
      standard_error: of the mean, from the spread over examples, which holds that of the draws.
      effective_sample_size: mean over examples, where the bound reports one; NaN where it does not.
      per_example: float64 [n], for paired comparisons of two models on the same data.
    """

    value: float
    standard_error: float
    effective_sample_size: float
    per_example: np.ndarray


def held_out_bound(bound: Callable[..., Any], data: np.ndarray, *, batch_size: int, key: jax.Array) -> HeldOutBound:
    """Mean of a per-example bound over a data set that need not fit the memory, with its standard error.

    Args:
      bound: called as bound(batch, key=key) -> [batch] in nats, or an object with `bound` or `elbo` of that shape,
        such as BoundTerms. Batches have one shape: compile it with `jax.jit` once. The batch has the dtype of
        `data`; bring it to [0, 1], say, inside.
      data: [n, *event], an array or a memory map.
      batch_size: examples in a call; at most n are used at once. The last batch wraps around to keep its shape,
        and what it repeats is not counted.
      key: a JAX random key; batch i gets fold_in(key, i).

    Returns:
      HeldOutBound(value, standard_error, effective_sample_size, per_example).

    Raises:
      ValueError: no data, or a bound of another shape.

    Example:
      >>> import jax, jax.numpy as jnp, numpy as np
      >>> from spread_jax import GaussianNoise, spread_importance_bound
      >>> encode = lambda y: (y[:, :1], jnp.zeros((y.shape[0], 1)))
      >>> decode = lambda z: jnp.concatenate([z, z], axis=1)
      >>> @jax.jit
      ... def bound(x, *, key):
      ...     return spread_importance_bound(x, encode, decode, GaussianNoise(0.5), key=key, num_samples=5)
      >>> held_out_bound(bound, np.ones((5, 2), np.float32), batch_size=2, key=jax.random.key(0)).per_example.shape
      (5,)
    """
    batch_size, key = check_count("batch_size", batch_size), check_one_key(key)
    count = len(data)
    if count == 0:
        raise ValueError("data must hold at least one example, got none.")
    size = min(batch_size, count)
    values, sizes = [], []
    for index, start in enumerate(range(0, count, size)):
        rows = np.arange(start, start + size) % count
        terms = bound(np.asarray(data[rows]), key=jax.random.fold_in(key, index))
        value = np.asarray(getattr(terms, "bound", getattr(terms, "elbo", terms)), np.float64)
        if value.shape != (size,):
            raise ValueError(f"bound must return one number for each example, shape {(size,)}, got {value.shape}.")
        values.append(value[: count - start])
        effective = getattr(terms, "effective_sample_size", np.full(size, np.nan))
        sizes.append(np.asarray(effective, np.float64)[: count - start])
    per_example = np.concatenate(values)
    error = per_example.std(ddof=1) / math.sqrt(count) if count > 1 else math.nan
    return HeldOutBound(float(per_example.mean()), float(error), float(np.concatenate(sizes).mean()), per_example)


class AnnealedEstimate(NamedTuple):
    """What annealed importance sampling returns for each y, each [batch].

    Attributes:
      log_likelihood: an estimate of log p~(y), in nats: exp of it is unbiased, so it lies below on average, and
        above by b nats with probability less than exp(-b).
      standard_error: of `log_likelihood`, to first order, from the chains' weights; NaN for one chain.
      effective_sample_size: (sum w)^2 / sum w^2 of the chains' weights. Near 1 the standard error is not to be
        trusted: take more steps.
      acceptance_rate: of the transitions, mean over steps and chains; about 0.75 where step sizes fit.
    """

    log_likelihood: jax.Array
    standard_error: jax.Array
    effective_sample_size: jax.Array
    acceptance_rate: jax.Array


def annealed_importance_sampling(
    y: jax.Array,
    decode: Callable[[jax.Array], jax.Array],
    noise: SpreadNoise,
    latent_dim: int,
    *,
    num_steps: int,
    num_chains: int,
    key: jax.Array,
    num_leapfrog_steps: int = 10,
    num_pilot_chains: int = 8,
) -> AnnealedEstimate:
    r"""Log-likelihood log p~(y) of a model x = g(z), z ~ N(0, I), spread by p(y|x); needs no encoder.

    Chains start from the prior and pass through p(z) p(y|g(z))^beta, beta rising from 0 to 1 in `num_steps` steps,
    each followed by one Hamiltonian transition that leaves its density invariant. The weight of a chain,

      log w = sum_t (beta_t - beta_{t-1}) log p(y|g(z_{t-1})),

    has mean p~(y). Step sizes, one for each y and beta, are tuned for their acceptance by pilot chains with keys of
    their own, and then stay fixed: chains that tuned themselves would bias the weights.

    Args:
      y: noisy data [batch, *event], floating point.
      decode: z [n, Z] -> x = g(z) [n, *event], differentiable; n is batch times the number of chains.
      noise: the spread noise p(y|x).
      latent_dim: Z.
      num_steps: intermediate betas; the estimate tightens with them.
      num_chains: independent chains for each y, which share the arithmetic of a step.
      key: a JAX random key.
      num_leapfrog_steps: gradients in a transition.
      num_pilot_chains: chains for each y that tune the step sizes.

    Returns:
      AnnealedEstimate(log_likelihood, standard_error, effective_sample_size, acceptance_rate), each [batch].

    Raises:
      TypeError: y is not floating point or a count is not an integer.
      ValueError: `decode` returns another shape.

    Source: Neal, Annealed Importance Sampling, 2001; for decoders, with the sigmoid-shaped schedule of betas used
    here, Wu et al., On the Quantitative Analysis of Decoder-Based Generative Models, ICLR 2017.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from spread_jax import GaussianNoise
      >>> estimate = jax.jit(lambda y: annealed_importance_sampling(
      ...     y, lambda z: z, GaussianNoise(1.0), 1, num_steps=30, num_chains=50, key=jax.random.key(0)))
      >>> found = estimate(jnp.ones((1, 1)))  # p~ = N(0, 2)
      >>> exact = -0.25 - 0.5 * jnp.log(4 * jnp.pi)
      >>> bool(jnp.abs(found.log_likelihood - exact)[0] < 5 * found.standard_error[0])
      True
    """
    y, key = check_batch("y", y), check_one_key(key)
    counts = {"latent_dim": latent_dim, "num_steps": num_steps, "num_chains": num_chains}
    counts |= {"num_leapfrog_steps": num_leapfrog_steps, "num_pilot_chains": num_pilot_chains}
    for name, count in counts.items():
        check_count(name, count)

    def log_likelihood(z):  # [chains, batch, Z] -> [chains, batch]
        chains, batch = z.shape[:2]
        x = decode(z.reshape(chains * batch, latent_dim))
        target = jnp.broadcast_to(y, (chains, *y.shape)).reshape(chains * batch, *y.shape[1:])
        if getattr(x, "shape", None) != target.shape:
            raise ValueError(
                f"decode must return shape [n, *event] = {target.shape} for z of shape "
                f"{(chains * batch, latent_dim)}, got {getattr(x, 'shape', type(x).__name__)}."
            )
        return noise.log_prob(target, x.astype(y.dtype)).reshape(chains, batch)

    def value_and_gradient(z):
        value, pull_back = jax.vjp(log_likelihood, z)
        return value, pull_back(jnp.ones_like(value))[0]

    betas = jax.nn.sigmoid(4 * jnp.linspace(-1.0, 1.0, num_steps + 1, dtype=y.dtype))
    betas = (betas - betas[0]) / (betas[-1] - betas[0])

    def transition(position, beta, step_size, key):
        """One Hamiltonian transition at `beta`; position is (z, log-likelihood, its gradient)."""
        momentum_key, jitter_key, accept_key = jax.random.split(key, 3)
        momentum = normal(momentum_key, position[0].shape, y.dtype)
        # Trajectories of one length can be periodic; the jitter does not look at the chain, so it is valid.
        jitter = jax.random.uniform(jitter_key, position[1].shape, y.dtype, 0.8, 1.2)
        step = (step_size * jitter)[..., None]
        force = lambda z, gradient: beta * gradient - z
        energy = lambda p, value, z: beta * value - 0.5 * (jnp.square(z) + jnp.square(p)).sum(axis=-1)

        def leapfrog(state, _):
            z, p, _, gradient = state
            p = p + 0.5 * step * force(z, gradient)
            z = z + step * p
            value, gradient = value_and_gradient(z)
            return (z, p + 0.5 * step * force(z, gradient), value, gradient), None

        z, value, gradient = position
        before = energy(momentum, value, z)
        start = (z, momentum, value, gradient)
        (z, momentum, value, gradient), _ = jax.lax.scan(leapfrog, start, length=num_leapfrog_steps)
        change = energy(momentum, value, z) - before
        probability = jnp.exp(jnp.minimum(jnp.where(jnp.isnan(change), -jnp.inf, change), 0))
        accepted = jax.random.uniform(accept_key, probability.shape, y.dtype) < probability
        choose = lambda new, old: jnp.where(accepted.reshape(accepted.shape + (1,) * (new.ndim - 2)), new, old)
        return jax.tree.map(choose, (z, value, gradient), position), probability.mean(axis=0)

    def initial(chains, key):
        z = normal(key, (chains, y.shape[0], latent_dim), y.dtype)
        return (z, *value_and_gradient(z))

    def tune(carry, step):
        position, log_step_size = carry
        beta, key = step
        position, probability = transition(position, beta, jnp.exp(log_step_size), key)
        log_step_size = log_step_size + _ADAPTATION_RATE * (probability - _TARGET_ACCEPTANCE)
        return (position, log_step_size), jnp.exp(log_step_size)

    def anneal(carry, step):
        position, log_weight = carry
        previous, beta, step_size, key = step
        log_weight = log_weight + (beta - previous) * position[1]
        position, probability = transition(position, beta, step_size, key)
        return (position, log_weight), probability

    pilot_key, pilot_start, chain_key, chain_start = jax.random.split(key, 4)
    first = jnp.full(y.shape[:1], math.log(_FIRST_STEP_SIZE), y.dtype)
    pilot = (betas[1:], jax.random.split(pilot_key, num_steps))
    _, step_sizes = jax.lax.scan(tune, (initial(num_pilot_chains, pilot_start), first), pilot)
    start = (initial(num_chains, chain_start), jnp.zeros((num_chains, y.shape[0]), y.dtype))
    steps = (betas[:-1], betas[1:], step_sizes, jax.random.split(chain_key, num_steps))
    (_, log_weights), acceptance = jax.lax.scan(anneal, start, steps)

    normalised = jax.nn.softmax(log_weights, axis=0)
    size = 1 / jnp.square(normalised).sum(axis=0)
    error = jnp.full_like(size, jnp.nan)
    if num_chains > 1:
        error = jnp.sqrt(jnp.maximum(num_chains / size - 1, 0) / (num_chains - 1))
    return AnnealedEstimate(
        log_likelihood=jax.nn.logsumexp(log_weights, axis=0) - math.log(num_chains),
        standard_error=error,
        effective_sample_size=size,
        acceptance_rate=acceptance.mean(axis=0),
    )
