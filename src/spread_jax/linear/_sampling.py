"""Posterior averages of the sources given spread data, by importance sampling and by Gibbs sampling."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from spread_jax._pytree import frozen_pytree
from spread_jax._random import normal
from spread_jax.linear.sources import Source

__all__ = ["PosteriorMoments", "gibbs_sweep", "importance_moments", "pseudo_inverse"]

# Numbers in one block of samples: it stays in a CPU's cache and still fills a GPU.
_BLOCK_NUMBERS = 2**18
# Rows that share normal draws where there are many. For N = 20,000, X = 20, Z = 10 and 1,000 samples an EM step takes
# 1.2 s of one core with 1, 0.12 with 16, 0.08 with 64; its deviation over keys is 3e-5 with each.
_ROWS_PER_DRAW = 64


@frozen_pytree
class PosteriorMoments:
    """Averages over data and posterior p(z|y).

    Args:
      y_z: [X, Z], E[y z^T].
      z_z: [Z, Z], E[z z^T].
      deviation_z: [Z, Z], E[(z - A^+ y) z^T]. The relative gradient of log p~ with respect to A is
        -A^T A `deviation_z` / (sigma^2 + gamma^2), by Fisher's identity, ...
      score_z: [Z, Z], E[psi(z) z^T]. ... and, after an integration by parts, it is `score_z` - I.
      score_square: [Z], E psi(z_i)^2.
      effective_sample_size: [], mean over data, out of num_samples.
      log_likelihood: [], mean log p~(y) in nats, estimated (from below, on average).
    """

    y_z: jax.Array
    z_z: jax.Array
    deviation_z: jax.Array
    score_z: jax.Array
    score_square: jax.Array
    effective_sample_size: jax.Array
    log_likelihood: jax.Array


def pseudo_inverse(mixing: jax.Array) -> jax.Array:
    """(A^T A)^-1 A^T for A [X, Z] with independent columns, A^T (A A^T)^-1 with independent rows: [Z, X]."""
    if mixing.shape[0] >= mixing.shape[1]:
        return jnp.linalg.solve(mixing.T @ mixing, mixing.T)
    return jnp.linalg.solve(mixing @ mixing.T, mixing).T


@functools.partial(
    jax.jit, static_argnames=("num_samples", "num_spread_samples", "rows_per_draw", "chunk_size", "with_score")
)
def importance_moments(
    mixing: jax.Array,
    x: jax.Array,
    *,
    noise_scale: jax.Array,
    observation_scale: jax.Array,
    source: Source,
    num_samples: int,
    num_spread_samples: int,
    rows_per_draw: int | None,
    chunk_size: int | None,
    key: jax.Array,
    with_score: bool = True,
) -> PosteriorMoments:
    """Moments of p(z|y), y = x + sigma epsilon, by self-normalised importance sampling.

    p(z|y) is proportional to N(z; A^+ y, (sigma^2 + gamma^2) (A^T A)^-1) prod_i p(z_i). Samples come from the Gaussian
    in antithetic pairs, so the prior is the weight. Blocks of rows are visited one after another.
    """
    num_rows, size = x.shape[0], mixing.shape[1]
    pairs = -(-num_samples // 2)
    if rows_per_draw is None:
        rows_per_draw = 1 if pairs <= _FEW_PAIRS else _ROWS_PER_DRAW
    if chunk_size is None:
        # Per example: all deviations with few pairs, else two weights for each pair and a share of the deviations.
        numbers = pairs * size if pairs <= _FEW_PAIRS else pairs * (2 + size / rows_per_draw)
        chunk_size = max(int(_BLOCK_NUMBERS / numbers), 1)
    num_blocks = -(-num_rows // chunk_size)
    groups = math.ceil(num_rows / (num_blocks * rows_per_draw))
    edge = groups * rows_per_draw
    # Rows n and n + 1 go to different blocks: rows laid out over devices stay where they are.
    padded = jnp.pad(x.T, ((0, 0), (0, num_blocks * edge - num_rows)))
    weights = (jnp.arange(num_blocks * edge) < num_rows).astype(x.dtype) / (num_rows * num_spread_samples)
    x_blocks = jnp.moveaxis(padded.reshape(-1, edge, num_blocks), 2, 0)
    weight_blocks = weights.reshape(edge, num_blocks).T
    sampler = _Sampler.of(mixing, noise_scale, observation_scale, source)

    def step(total, index):
        at = index % num_blocks
        draw = sampler.draw(x_blocks[at], pairs, groups, jax.random.fold_in(key, index))
        return jax.tree.map(jnp.add, total, draw.moments(source, weight_blocks[at], with_score)), None

    num_steps = num_blocks * num_spread_samples
    zero = functools.partial(jnp.zeros, dtype=x.dtype)
    square = zero((size, size))
    start = PosteriorMoments(zero(mixing.shape), square, square, square, zero(size), zero(()), zero(()))
    if num_steps == 1:
        return step(start, 0)[0]
    return jax.lax.scan(step, start, jnp.arange(num_steps))[0]


@functools.partial(jax.jit, static_argnames="num_samples")
def score_deviation(
    mixing: jax.Array,
    x: jax.Array,
    *,
    noise_scale: jax.Array,
    observation_scale: jax.Array,
    source: Source,
    num_samples: int,
    key: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Deviation over examples of E[psi(z) z^T|y], [Z, Z], and the mean of log p~(y)."""
    sampler = _Sampler.of(mixing, noise_scale, observation_scale, source)
    draw = sampler.draw(x.T, -(-num_samples // 2), x.shape[0], key)
    z, share = draw.samples()
    each = jnp.einsum("ink,jnk->ijn", source.score(z), share * z)
    return jnp.std(each, axis=-1), draw.log_evidence.mean()


@functools.partial(jax.jit, static_argnames="num_samples")
def turn_gain(
    mixing: jax.Array,
    x: jax.Array,
    *,
    noise_scale: jax.Array,
    observation_scale: jax.Array,
    source: Source,
    num_samples: int,
    key: jax.Array,
) -> jax.Array:
    """How much likelier turning two columns of A makes y, in standard errors over examples: the most over all pairs.

    Turns are by pi/8 either way and pi/4. A turned by R has p~(y) = int N(y; A w) p(R^T w) dw: the samples stay and
    only their prior changes, so each turn costs two log-densities a sample.
    """
    size = mixing.shape[1]
    if size < 2:
        return jnp.zeros((), x.dtype)
    sampler = _Sampler.of(mixing, noise_scale, observation_scale, source)
    z, share = sampler.draw(x.T, -(-num_samples // 2), x.shape[0], key).samples()

    def of_pair(pair):
        first, second = z[pair[0]], z[pair[1]]
        before = source.log_prob(first) + source.log_prob(second)
        gains = []
        for angle in (math.pi / 8, -math.pi / 8, math.pi / 4):
            cos, sin = math.cos(angle), math.sin(angle)
            after = source.log_prob(cos * first + sin * second) + source.log_prob(cos * second - sin * first)
            gain = jax.nn.logsumexp(after - before, b=share, axis=-1)
            gains.append(gain.mean() / jnp.maximum(gain.std(), jnp.finfo(gain.dtype).tiny))
        return jnp.stack(gains).max()

    pairs = jnp.stack(jnp.triu_indices(size, 1), axis=1)
    return math.sqrt(x.shape[0]) * jax.lax.map(of_pair, pairs).max()


# With few pairs the examples come last in every array and sums over pairs are unrolled; with many the pairs do, and
# the deviations that the examples of a group share are held once. Either way the loops run over a long last axis, and
# no reduction runs over another: those are tens of times slower.
_FEW_PAIRS = 16
_UNROLLED_SOURCES = 64


@frozen_pytree
class _Draw:
    """Antithetic samples z = mean +- deviation for a block of n = groups x members examples.

    Args:
      y: [X, n].
      mean: [Z, n].
      deviation: [Z, pairs, n], or [Z, groups, pairs] if there are many.
      plus, minus: the weights of the samples, up to `total`: [pairs, n] or [groups, members, pairs].
      total: [n], their sum.
      log_evidence: [n], log p~(y).
    """

    y: jax.Array
    mean: jax.Array
    deviation: jax.Array
    plus: jax.Array
    minus: jax.Array
    total: jax.Array
    log_evidence: jax.Array

    @property
    def few(self) -> bool:
        """Whether examples come last."""
        return self.plus.ndim == 2

    def moments(self, source: Source, weight: jax.Array, with_score: bool) -> PosteriorMoments:
        """The moments summed over examples with weights [n]; those of the score are zero if not wanted."""
        size, each = len(self.mean), weight / self.total
        even, odd = self.plus + self.minus, self.plus - self.minus
        flat = self.deviation.reshape(size, -1)
        if self.few:
            shift = _sum_pairs(odd * self.deviation) * each
            spread = (even * each * self.deviation).reshape(size, -1)
            squares = _sum_pairs(jnp.square(self.plus) + jnp.square(self.minus))
        else:
            members = each.reshape(self.plus.shape[:2])
            shift = jnp.einsum("gmk,zgk->zgm", odd, self.deviation).reshape(size, -1) * each
            spread = (jnp.einsum("gmk,gm->gk", even, members) * self.deviation).reshape(size, -1)
            squares = (jnp.square(self.plus) + jnp.square(self.minus)).sum(axis=-1).reshape(-1)
        # shift [Z, n] takes `mean` to the posterior mean; `scatter` is E[(z - mean)(z - mean)^T].
        mean_weighted, scatter = self.mean * weight, spread @ flat.T
        off_mean = shift @ self.mean.T
        score_z, score_square = jnp.zeros((size, size), weight.dtype), jnp.zeros(size, weight.dtype)
        if with_score:
            rows, pairs, score_square = self._scores(source, each)
            score_z = rows @ self.mean.T + pairs.reshape(size, -1) @ flat.T
        return PosteriorMoments(
            y_z=self.y @ (mean_weighted + shift).T,
            z_z=mean_weighted @ self.mean.T + off_mean + off_mean.T + scatter,
            deviation_z=off_mean + scatter,
            score_z=score_z,
            score_square=score_square,
            effective_sample_size=weight @ (jnp.square(self.total) / squares),
            log_likelihood=weight @ self.log_evidence,
        )

    def _scores(self, source, each):
        """Sums of psi(z_i): over samples [Z, n], over members with the sign of the deviation, and of its square [Z]."""

        def one(mean, deviation):
            if self.few:
                plus, minus = self.plus * each, self.minus * each
                above, below = source.score(mean + deviation), source.score(mean - deviation)
                rows, pairs = _sum_pairs, lambda values: values
            else:
                members = each.reshape(*self.plus.shape[:2], 1)
                plus, minus = self.plus * members, self.minus * members
                centre = mean.reshape(members.shape)
                above, below = (source.score(centre + sign * deviation[:, None, :]) for sign in (1, -1))
                rows = lambda values: values.sum(axis=-1).reshape(-1)
                pairs = lambda values: values.sum(axis=1)
            above_weighted, below_weighted = plus * above, minus * below
            return (
                rows(above_weighted + below_weighted),
                pairs(above_weighted - below_weighted),
                rows(above_weighted * above + below_weighted * below).sum(),
            )

        if len(self.mean) > _UNROLLED_SOURCES:
            return jax.vmap(one)(self.mean, self.deviation)
        found = [one(self.mean[i], self.deviation[i]) for i in range(len(self.mean))]
        return tuple(jnp.stack(values) for values in zip(*found, strict=True))

    def samples(self):
        """z [Z, n, samples] and weights [n, samples]."""
        deviation, plus, minus = self.deviation, self.plus, self.minus
        count = self.mean.shape[1]
        if self.few:
            deviation, plus, minus = jnp.moveaxis(deviation, 1, 2), plus.T, minus.T
        else:
            members = count // deviation.shape[1]
            deviation = jnp.repeat(deviation, members, axis=1, total_repeat_length=count)
            plus, minus = plus.reshape(count, -1), minus.reshape(count, -1)
        z = self.mean[:, :, None] + jnp.concatenate([deviation, -deviation], axis=2)
        return z, jnp.concatenate([plus, minus], axis=1) / self.total[:, None]


def _sum_pairs(values):
    """Sums [..., pairs, n] over pairs."""
    return functools.reduce(jnp.add, [values[..., k, :] for k in range(values.shape[-2])])


@frozen_pytree
class _Sampler:
    """What importance sampling needs of A, factorised once: A = Q R, (A^T A)^-1 = R^-1 R^-T."""

    source: Source
    noise_scale: jax.Array
    variance: jax.Array
    q: jax.Array
    inverse: jax.Array  # R^-1
    constant: jax.Array  # of log p~

    @classmethod
    def of(cls, mixing, noise_scale, observation_scale, source) -> _Sampler:
        variance = jnp.square(noise_scale) + jnp.square(observation_scale)
        q, r = jnp.linalg.qr(mixing)
        inverse = jax.scipy.linalg.solve_triangular(r, jnp.eye(mixing.shape[1], dtype=mixing.dtype))
        constant = -0.5 * (mixing.shape[0] - mixing.shape[1]) * jnp.log(2 * math.pi * variance)
        constant = constant - jnp.log(jnp.abs(jnp.diagonal(r))).sum()
        return cls(source, noise_scale, variance, q, inverse, constant)

    def draw(self, x: jax.Array, pairs: int, groups: int, key: jax.Array) -> _Draw:
        """Spreads x [X, n] to y and samples p(z|y); the n / groups examples of a group share normal draws."""
        size, count = self.inverse.shape[0], x.shape[1]
        few = pairs <= _FEW_PAIRS
        noise_key, draw_key = jax.random.split(key)
        y = x + self.noise_scale * normal(noise_key, x.shape, x.dtype)
        inside = self.q.T @ y
        mean = self.inverse @ inside
        deviation = jnp.sqrt(self.variance) * self.inverse @ normal(draw_key, (size, pairs * groups), x.dtype)
        if few:
            shared = deviation.reshape(size, pairs, groups, 1)
            deviation = jnp.broadcast_to(shared, (size, pairs, groups, count // groups)).reshape(size, pairs, count)
            centre, against, top_axis = mean[:, None, :], deviation, 0
        else:
            deviation = deviation.reshape(size, groups, pairs)
            centre, against, top_axis = mean.reshape(size, groups, -1, 1), deviation[:, :, None, :], 2
        plus = self._log_prior(centre, against, 1)
        minus = self._log_prior(centre, against, -1)
        top = jnp.maximum(plus, minus).max(axis=top_axis, keepdims=True)
        plus, minus = jnp.exp(plus - top), jnp.exp(minus - top)
        total = _sum_pairs(plus + minus) if few else (plus + minus).sum(axis=-1).reshape(-1)
        outside = jnp.square(y).sum(axis=0) - jnp.square(inside).sum(axis=0)
        log_evidence = top.reshape(-1) + jnp.log(total / (2 * pairs)) - 0.5 * jnp.maximum(outside, 0) / self.variance
        return _Draw(y, mean, deviation, plus, minus, total, log_evidence + self.constant)

    def _log_prior(self, centre, deviation, sign):
        log_prob = lambda i: self.source.log_prob(centre[i] + sign * deviation[i])
        if len(deviation) > _UNROLLED_SOURCES:
            return log_prob(slice(None)).sum(axis=0)
        return functools.reduce(jnp.add, map(log_prob, range(len(deviation))))


def gibbs_sweep(
    mixing: jax.Array, z: jax.Array, y: jax.Array, *, variance: jax.Array, source, key: jax.Array
) -> jax.Array:
    """One blocked Gibbs sweep over scales and sources: z given tau^2 given z, for p(z|y) with y = A z + noise.

    A source that is a scale mixture of Gaussians draws tau^2 given z; then z given tau^2 is Gaussian and is drawn
    exactly, by conditioning a draw from its prior on y.

    Args:
      z: [Z, N], the chains.
      y: [X, N].
      variance: of the noise.

    Returns:
      [Z, N].
    """
    scale_key, prior_key, noise_key = jax.random.split(key, 3)
    tau2 = source.conditional_variance(z, key=scale_key)
    prior = jnp.sqrt(tau2) * normal(prior_key, z.shape, z.dtype)
    noise = jnp.sqrt(variance) * normal(noise_key, y.shape, y.dtype)
    size = mixing.shape[0]
    outer = (mixing[:, None, :] * mixing[None, :, :]).reshape(size * size, -1)
    covariance = (outer @ tau2).reshape(size, size, -1) + variance * jnp.eye(size, dtype=z.dtype)[:, :, None]
    return prior + tau2 * (mixing.T @ solve_positive(covariance, y - mixing @ prior - noise))


# Above this size the unrolled elimination compiles slowly and LAPACK's call per matrix no longer dominates.
_UNROLLED = 32


def solve_positive(matrices: jax.Array, right: jax.Array) -> jax.Array:
    """Solves N symmetric positive systems laid out [X, X, N] and [X, N], elimination vectorised over N."""
    size = matrices.shape[0]
    if size > _UNROLLED:
        factor = jnp.linalg.cholesky(jnp.moveaxis(matrices, -1, 0))
        return jax.scipy.linalg.cho_solve((factor, True), right.T[..., None])[..., 0].T
    pivots, columns, values = [], [], []
    for _ in range(size):
        pivot, column = matrices[0, 0], matrices[1:, 0] / matrices[0, 0]
        values.append(right[0])
        right = right[1:] - column * right[0]
        matrices = matrices[1:, 1:] - column[:, None] * matrices[0, 1:]
        pivots.append(pivot)
        columns.append(column)
    solution = jnp.zeros((0, *values[0].shape), values[0].dtype)
    for pivot, column, value in zip(reversed(pivots), reversed(columns), reversed(values), strict=True):
        solution = jnp.concatenate([(value / pivot - (column * solution).sum(axis=0))[None], solution])
    return solution
