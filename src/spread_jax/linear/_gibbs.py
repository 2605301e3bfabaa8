"""Overcomplete models by Gibbs chains: one run, and what several runs agree on."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp

from spread_jax._random import normal
from spread_jax.linear._closed_form import polar
from spread_jax.linear._sampling import gibbs_sweep, pseudo_inverse

STEP = 0.5
_LAST_STEP = 0.1
# While it searches, a run takes heavy-ball steps: columns close to each other part slowly.
_SEARCH_STEP, _MOMENTUM = 0.2, 0.95
# Two runs found the same column if its cosine exceeds this: estimates of one column, at the precision at which the
# method is of use, are closer, and mixtures with another are not.
_CLOSE = 0.93
_REPEATED = 0.9
_ROUNDS = 2
_SURE = 2 / 3  # share of the runs that must agree on a column before it is kept while the others are drawn anew


def update(mixing, z, y, variance, source, step_size, key):
    """A sweep of the chains and a step of A; also the relative gradient."""
    z = gibbs_sweep(mixing, z, y, variance=variance, source=source, key=key)
    f = _gradient(z, source)
    return _moved(mixing, step_size * f), z, f


def _gradient(z, source):
    return source.score(z) @ z.T / z.shape[1] - jnp.eye(z.shape[0], dtype=z.dtype)


def _moved(mixing, step):
    return mixing + mixing @ (step * jnp.minimum(1, 0.3 / jnp.maximum(jnp.abs(step).max(), 1e-30)))


def random_start(from_white, num_sources, key):
    """A with A A^T the covariance of the signal, up to a random rotation."""
    return from_white @ polar(jax.random.normal(key, (from_white.shape[1], num_sources), from_white.dtype))


def fit(x, from_white, num_sources, source, noise_scale, observation_scale, key, *, max_iterations, num_restarts, **_):
    """The estimate of one run, or of several that vote; centred x [N, X]."""
    problem = x, source, noise_scale, observation_scale
    if num_restarts == 1:
        start_key, key = jax.random.split(key)
        start = random_start(from_white, num_sources, start_key)
        last = max(max_iterations // 5, 1)
        return _run(start, *problem, key, step=STEP, early=max_iterations - last, last=last, sweeps=max_iterations)
    return _fit_by_vote(from_white, num_sources, *problem, key, num_restarts, max_iterations)


def _spread(start, x, noise_scale, key):
    """Spread data [X, N] and where the chains [Z, N] start; both stay as they are in memory, examples last."""
    noise_key, chain_key = jax.random.split(key)
    y = (x + noise_scale * normal(noise_key, x.shape, x.dtype)).T
    z = pseudo_inverse(start) @ y
    return y, z + 0.1 * normal(chain_key, z.shape, x.dtype)


def _run(start, x, source, noise_scale, observation_scale, key, *, step, early, last, sweeps):
    """Chains kept from step to step; the mean over the last, shorter steps."""
    spread_key, key = jax.random.split(key)
    y, z = _spread(start, x, noise_scale, spread_key)
    variance = jnp.square(noise_scale) + jnp.square(observation_scale)

    def advance(carry, t):
        mixing, z, mean, gradient = carry
        step_size = jnp.where(t < early, step, _LAST_STEP).astype(x.dtype)
        mixing, z, f = update(mixing, z, y, variance, source, step_size, jax.random.fold_in(key, t))
        share = jnp.where(t < early, 0, 1 / last).astype(x.dtype)
        return (mixing, z, mean + share * mixing, gradient + share * f), None

    carry = (start, z, jnp.zeros_like(start), jnp.zeros((start.shape[1],) * 2, x.dtype))
    (_, z, mixing, gradient), _ = jax.lax.scan(advance, carry, jnp.arange(early + last))
    # Independent sources: the entries of psi(z) z^T have second moments E psi^2 E z^2.
    deviation = jnp.sqrt(jnp.square(source.score(z)).mean(axis=1)[:, None] * jnp.square(z).mean(axis=1))
    return {
        "mixing": mixing,
        "noise_scale": noise_scale,
        "num_iterations": jnp.asarray(sweeps),
        "residual": math.sqrt(x.shape[0]) * jnp.max(jnp.abs(gradient) / deviation),
    }


def _fit_by_vote(from_white, num_sources, x, source, noise_scale, observation_scale, key, num_restarts, max_iterations):
    """Several searches, a vote on their columns, searches again for what was not sure, and a run from the outcome.

    Columns of A that are close to each other leave a flat direction in the likelihood, and a run stays in a mixture
    of the two. Which columns it leaves mixed differs from run to run; what is not mixed does not.

    Source: J. Himberg and A. Hyvarinen, Icasso: software for investigating the reliability of ICA estimates by
      clustering and visualization, 2003, for estimates kept by the agreement of several runs.
    """
    search_sweeps = max(max_iterations // 3, 1)
    variance = jnp.square(noise_scale) + jnp.square(observation_scale)
    typical = jnp.sqrt(jnp.square(from_white).sum() / num_sources)

    def search(start, key, sweeps):
        spread_key, key = jax.random.split(key)
        y, z = _spread(start, x, noise_scale, spread_key)
        last = max(sweeps // 5, 1)

        def step(carry, t):
            mixing, z, velocity, mean = carry
            z = gibbs_sweep(mixing, z, y, variance=variance, source=source, key=jax.random.fold_in(key, t))
            velocity = _MOMENTUM * velocity + _gradient(z, source)
            mixing = _moved(mixing, _SEARCH_STEP * velocity)
            share = jnp.where(t < sweeps - last, 0, 1 / last).astype(x.dtype)
            return (mixing, z, velocity, mean + share * mixing), None

        zeros = jnp.zeros((num_sources,) * 2, x.dtype), jnp.zeros_like(start)
        (*_, mean), _ = jax.lax.scan(step, (start, z, *zeros), jnp.arange(sweeps))
        return mean

    def search_anew(agreed, sure, key):
        """Keeps the sure columns and draws the others from what these leave of the covariance."""
        start_key, key = jax.random.split(key)
        rest = from_white @ from_white.T - jnp.where(sure, agreed, 0) @ agreed.T
        lengths, axes = jnp.linalg.eigh(rest)
        drawn = jax.random.normal(start_key, agreed.shape, x.dtype)
        drawn = axes * jnp.sqrt(jnp.maximum(lengths, 1e-3 * jnp.abs(lengths).max())) @ drawn
        drawn = drawn * typical / jnp.linalg.norm(drawn, axis=0)
        return search(jnp.where(sure, agreed, drawn), key, max(search_sweeps // 2, 1))

    def search_first(key):
        start_key, key = jax.random.split(key)
        return search(random_start(from_white, num_sources, start_key), key, search_sweeps)

    # One run after another: side by side they would need the memory of all.
    first_key, last_key, *round_keys = jax.random.split(key, 2 + _ROUNDS)
    pool = jax.lax.map(search_first, jax.random.split(first_key, num_restarts))
    for round_key in round_keys:
        agreed, votes = vote(pool)
        sure = votes >= _SURE * len(pool)
        new = jax.lax.map(partial(search_anew, agreed, sure), jax.random.split(round_key, num_restarts))
        pool = jnp.concatenate([pool, new])
    agreed, _ = vote(pool)
    # The vote finds which columns there are; along flat directions of the likelihood it is far from its maximum.
    last = max(max_iterations // 2, 1)
    searched = num_restarts * (search_sweeps + _ROUNDS * max(search_sweeps // 2, 1))
    return _run(
        agreed, x, source, noise_scale, observation_scale, last_key,
        step=STEP, early=max_iterations, last=last, sweeps=searched + max_iterations + last,
    )  # fmt: skip


def vote(pool: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The columns that most runs found, and how many found each.

    Greedily: the column with the most and closest counterparts, one from each run at most, is averaged with these,
    signs aligned, and they are out of the vote.

    Args:
      pool: [runs, X, Z], estimates of A.

    Returns:
      ([X, Z], [Z] counts from 1 to the number of runs).
    """
    runs, _, size = pool.shape
    columns = jnp.moveaxis(pool, 2, 1).reshape(runs * size, -1)
    unit = columns / jnp.maximum(jnp.linalg.norm(columns, axis=1, keepdims=True), jnp.finfo(columns.dtype).tiny)
    cosines = unit @ unit.T
    rows = jnp.arange(runs * size)

    def choose(carry, _):
        free, fresh = carry
        near = jnp.where(free, jnp.abs(cosines), 0).reshape(-1, runs, size)
        best = near.max(axis=2)
        support = jnp.where(best > _CLOSE, best, 0).sum(axis=1)
        # What is left of a column that was chosen comes after every other.
        support = jnp.where(free, jnp.where(fresh, support, support - runs), -2 * runs)
        i = jnp.argmax(support)
        members = jnp.arange(runs) * size + near[i].argmax(axis=1)
        weight = jnp.where(best[i] > _CLOSE, jnp.sign(cosines[i, members]), 0)
        count = jnp.abs(weight).sum()
        free = free & ~((rows[:, None] == members) & (weight != 0)).any(axis=1)
        column = weight @ columns[members] / count
        fresh = fresh & (jnp.abs(unit @ column) < _REPEATED * jnp.linalg.norm(column))
        return (free, fresh), (column, count)

    everything = jnp.ones(runs * size, bool)
    _, (agreed, votes) = jax.lax.scan(choose, (everything, everything), length=size)
    return agreed.T, votes
