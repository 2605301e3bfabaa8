"""ICA by the spread score of one source: FastICA's fixed point, then relative Newton, on whitened data.

Notation: v is whitened data [Z, N], W an unmixing of it, u = W v estimates of the sources. The model's sources are
spread with scale s and the data with scale d in the same coordinates (s = d unless the data bring noise of their
own), so that psi~(u) = E psi_s(u + d epsilon) is the score that the spread likelihood averages over the data.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from spread_jax._pytree import frozen_pytree
from spread_jax.linear.sources import Source

# psi~ is tabulated at these arguments (standard deviations of a source) and continued linearly outside.
_REACH = 10.0
_POINTS = 2049
_STEP = 2 * _REACH / (_POINTS - 1)
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(21)
# Columns handled at once: a few MB for ten sources, whatever the number of examples.
CHUNK = 2**15
# Spread scales to choose from when the law of the sources is not given: from nearly the clean score of the
# source, best if the law is right, to the smooth and robust.
SCALES = (0.1, 0.15, 0.2, 0.3, 0.45, 0.7, 1.0)
# Examples that the fixed point looks at; Newton's steps look at all.
_FIRST_LOOK = 8192
_FIRST_STEPS = 50
_FIRST_SCALE = 0.5


def score_table(source: Source, model_scale: jax.Array, data_scale: jax.Array, dtype) -> jax.Array:
    """psi~(u) = E psi_s(u + d epsilon), epsilon ~ N(0, 1), on the grid of u: [rows, points].

    By 21-node Gauss-Hermite quadrature, for rows of (s, d).
    """
    s, d = jnp.asarray(model_scale, dtype), jnp.asarray(data_scale, dtype)
    margin = _POINTS  # psi_s is needed as far out as the largest node, 7.85 d, reaches
    wide = jnp.asarray(_STEP * (np.arange(_POINTS + 2 * margin) - margin) - _REACH, dtype)
    grid = wide[margin : margin + _POINTS]
    psi = source.spread_score(wide[None, :], s[:, None])

    def add(total, node_and_weight):
        node, weight = node_and_weight
        position = (grid + node * d[:, None] - wide[0]) / _STEP
        return total + weight * jax.vmap(_interpolate)(psi, position)[0], None

    nodes = jnp.asarray(_NODES, dtype), jnp.asarray(_WEIGHTS / _WEIGHTS.sum(), dtype)
    return jax.lax.scan(add, jnp.zeros((len(d), _POINTS), dtype), nodes)[0]


def _interpolate(row, position):
    """Value and rise per step at fractional positions of a row, linear within and beyond it."""
    index = jnp.clip(position.astype(jnp.int32), 0, row.shape[0] - 2)
    low = row.at[index].get(mode="promise_in_bounds")
    rise = row.at[index + 1].get(mode="promise_in_bounds") - low
    return low + (position - index.astype(position.dtype)) * rise, rise


def look_up(table: jax.Array, u: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(psi~(u), psi~'(u)) for u [Z, n] from the rows of a table [Z, points]; each [Z, n]."""
    psi, rise = jax.vmap(_interpolate)(table, (u + _REACH) / _STEP)
    return psi, rise / _STEP


def blocks(v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Splits [Z, N] into [blocks, Z, n] and weights [blocks, n], zero where padded.

    Neighbouring columns go to different blocks, so that columns laid out over devices stay where they are.
    """
    count = v.shape[1]
    num = -(-count // CHUNK)
    width = -(-count // num)
    v = jnp.pad(v, ((0, 0), (0, num * width - count)))
    weights = (jnp.arange(num * width) < count).astype(v.dtype) / count
    split = lambda a: jnp.moveaxis(a.reshape(*a.shape[:-1], width, num), -1, 0)
    return split(v), split(weights)


def mean_over(statistics, v_blocks):
    """The weighted sum of `statistics(v [Z, n], weights [n])`, a pytree, over blocks."""
    v, weights = v_blocks
    if v.shape[0] == 1:
        return statistics(v[0], weights[0])

    def step(total, block):
        return jax.tree.map(jnp.add, total, statistics(*block)), None

    start = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(statistics, v[0], weights[0]))
    return jax.lax.scan(step, start, (v, weights))[0]


def polar(w: jax.Array) -> jax.Array:
    """The orthogonal matrix nearest to w."""
    left, _, right = jnp.linalg.svd(w, full_matrices=False)
    return left @ right


def fixed_point(v: jax.Array, table: jax.Array, start: jax.Array, *, max_iterations: int, tolerance: float):
    """W <- polar(E[psi~(W v) v^T] - diag(E psi~') W) until the rows stop turning.

    Args:
      v: [Z, n], whitened.
      table: [1, points].
      start: [Z, Z], orthogonal.

    Returns:
      (W, iterations, contrast); the contrast of independent sources is the larger, whatever their law.
    """
    size = start.shape[0]
    rows = jnp.broadcast_to(table, (size, table.shape[1]))

    def body(carry):
        w, _, t = carry
        psi, slope = look_up(rows, w @ v)
        new = polar(psi @ v.T / v.shape[1] - slope.mean(axis=1)[:, None] * w)
        turn = jnp.max(jnp.abs(1 - jnp.abs((new * w).sum(axis=1))))
        return new, turn, t + 1

    carry = (start, jnp.asarray(jnp.inf, v.dtype), 0)
    w, _, t = jax.lax.while_loop(lambda c: (c[1] > tolerance) & (c[2] < max_iterations), body, carry)
    # How far E[psi~(u) u] lies from its value for a Gaussian, E psi~'(u): both signs of kurtosis count.
    u = w @ v
    psi, slope = look_up(rows, u)
    return w, t, jnp.square((psi * u).mean(axis=1) - slope.mean(axis=1)).sum()


def moments(w: jax.Array, table: jax.Array, v_blocks) -> dict[str, jax.Array]:
    """The averages over data that a Newton step needs, for u = W v."""

    def statistics(v, weights):
        u = w @ v
        psi, slope = look_up(table, u)
        weighted = u * weights
        return {
            "psi_u": psi @ weighted.T,  # [Z, Z], E psi~(u_i) u_j
            "slope": slope @ weights,  # [Z]
            "slope_square": (slope * u * u) @ weights,  # [Z]
            "square": (u * weighted).sum(axis=1),  # [Z]
        }

    return mean_over(statistics, v_blocks)


def newton(v_blocks, table, data_scale, start, noise, *, unit_variance: bool, max_iterations: int, tolerance: float):
    """Relative Newton on the spread likelihood, W <- (I - M) W, until max|M| < tolerance.

    F_ij = E[psi~(u_i) u_j] is zero off the diagonal for independent sources. Its expected derivative couples
    (i, j) with (j, i) only: h_ij M_ij + a_i M_ji = F_ij with h_ij = E psi~'_i E u_j^2 and a_i = E[psi~_i u_i].
    The diagonal sets scales: that of the likelihood, E[psi~_i u_i] + d^2 E psi~'_i = 1, or unit variance.

    Args:
      data_scale: [Z], d.
      start: [Z, Z].
      noise: [Z, Z], covariance of observation noise in the coordinates of v; zero without.

    Returns:
      (W, iterations, largest |M| of the last step).
    """
    eye = jnp.eye(start.shape[0], dtype=start.dtype)

    def body(carry):
        w, _, t = carry
        m = moments(w, table, v_blocks)
        noise_u = w @ noise @ w.T
        a = jnp.diagonal(m["psi_u"])
        f = m["psi_u"] - noise_u * m["slope"][:, None]  # Stein: E psi(z_i + e_i)(z_j + e_j) = E psi' Cov(e_i, e_j)
        h = m["slope"][:, None] * (m["square"] - jnp.diagonal(noise_u))[None, :]
        a_clean = a - jnp.diagonal(noise_u) * m["slope"]
        determinant = h * h.T - a_clean[:, None] * a_clean[None, :]
        # Two sources that the score cannot tell apart (Gaussian ones) have none: leave such a pair alone.
        safe = jnp.abs(determinant) > 1e-3 * jnp.abs(h * h.T)
        step = jnp.where(safe, (h.T * f - a_clean[:, None] * f.T) / jnp.where(safe, determinant, 1), 0)
        if unit_variance:
            scales = 0.5 * (m["square"] - jnp.diagonal(noise_u) - 1)
        else:
            d2 = jnp.square(data_scale)
            scales = (a + d2 * m["slope"] - 1) / (m["slope_square"] + a + 2 * d2 * m["slope"])
        step = jnp.where(eye > 0, scales[:, None], step)
        size = jnp.max(jnp.abs(step))
        # Full steps, then shrinking ones: few examples can make the full ones go round in circles.
        step = step * jnp.minimum(jnp.minimum(1, 20 / (t + 1)), 0.3 / jnp.maximum(size, 1e-30))
        return w - step @ w, size, t + 1

    carry = (start, jnp.asarray(jnp.inf, start.dtype), 0)
    # A NaN ends the loop too: the comparison is false.
    return jax.lax.while_loop(lambda c: (c[1] > tolerance) & (c[2] < max_iterations), body, carry)


def choose_scales(w: jax.Array, tables: jax.Array, v_blocks) -> jax.Array:
    """For each source the row of `tables` whose estimating equation has the least asymptotic variance.

    For two sources of the same law and variance one, with h = E psi~', a = E[psi~ u] and b = E psi~^2, the error of
    M_ij has variance ((b + a^2) / (h + a)^2 + (b - a^2) / (h - a)^2) / (2 N). No law of the sources is assumed.

    Args:
      w: [Z, Z], an unmixing to sources of variance one.
      tables: [rows, points].

    Returns:
      [Z], row numbers.
    """

    def variances(table):
        table = jnp.broadcast_to(table, (w.shape[0], table.shape[0]))

        def statistics(v, weights):
            u = w @ v
            psi, slope = look_up(table, u)
            return slope @ weights, (psi * u) @ weights, jnp.square(psi) @ weights, jnp.square(u) @ weights

        h, a, b, power = mean_over(statistics, v_blocks)
        h, b = h * power, b * power  # with the power, b >= a^2 holds for averages too
        return 0.5 * ((b + a**2) / (h + a) ** 2 + (b - a**2) / (h - a) ** 2)

    return jnp.argmin(jax.lax.map(variances, tables), axis=0)


@frozen_pytree
class Whitened:
    """Data in the leading principal directions of the signal, scaled to its unit variance.

    Args:
      mean: [X].
      v: [Z, N], examples as columns.
      to_white: V [Z, X], v = V (x - mean).
      from_white: D [X, Z]; D V projects onto the directions.
      variances: [min(N, X)], of x along its principal directions, largest first.
    """

    mean: jax.Array
    v: jax.Array
    to_white: jax.Array
    from_white: jax.Array
    variances: jax.Array


def whiten(x: jax.Array, num_sources: int, observation_scale: jax.Array) -> Whitened:
    """Whitens x [N, X]; the signal's covariance is that of x less the observation noise."""
    count, size = x.shape
    mean = x.mean(axis=0)
    centred = x - mean
    if count < size:
        _, singular, right = jnp.linalg.svd(centred, full_matrices=False)
        variances, vectors = jnp.square(singular) / count, right[:num_sources].T
    else:
        variances, vectors = jnp.linalg.eigh(centred.T @ centred / count)
        variances, vectors = variances[::-1], vectors[:, ::-1][:, :num_sources]
    variance = jnp.square(observation_scale)
    tiny = jnp.finfo(x.dtype).eps * variances[0]
    deviations = jnp.sqrt(jnp.maximum(variances[:num_sources] - variance, tiny))
    v = vectors.T @ centred.T / deviations[:, None]
    # Squaring x lost digits of the small directions; a second pass in whitened coordinates restores them.
    covariance = v @ v.T / count - jnp.diag(variance / jnp.square(deviations))
    factor = jnp.linalg.cholesky(covariance)
    v = jax.scipy.linalg.solve_triangular(factor, v, lower=True)
    to_white = jax.scipy.linalg.solve_triangular(factor, vectors.T / deviations[:, None], lower=True)
    from_white = (vectors * deviations) @ factor
    return Whitened(mean, v, to_white, from_white, variances)


def default_scale(count: int) -> float:
    """The spread scale for N examples of known law: small, but so wide that enough examples share a kernel."""
    return min(max(3.3 / math.sqrt(count), 0.05), 0.3)


def fit(
    whitened,
    source,
    noise_scale,
    observation_scale,
    key,
    *,
    known_law,
    observed,
    num_restarts,
    max_iterations,
    tolerance,
):
    """The whole estimate; see `spread_jax.linear.ica.fit`.

    Args:
      whitened: the data.
      noise_scale: s and d of every source, or None for a choice.
      known_law: whether `source` is the law of the sources; if not, scales are chosen from the data and the
        likelihood's scale of a source is used only where it agrees with unit variance.
      observed: whether observation_scale may be anything but zero.

    Returns:
      A dict of mixing, unmixing, noise_scale, num_iterations and residual, the largest entry of the last step.
    """
    v = whitened.v
    dtype = v.dtype
    num_sources, count = v.shape
    noise_white = jnp.square(observation_scale) * (whitened.to_white @ whitened.to_white.T)

    first = score_table(source, jnp.full(1, _FIRST_SCALE), jnp.full(1, _FIRST_SCALE), dtype)
    look = v[:, :: max(count // _FIRST_LOOK, 1)]
    starts = jax.vmap(lambda k: polar(jax.random.normal(k, (num_sources, num_sources), dtype)))(
        jax.random.split(key, num_restarts)
    )
    first_steps = min(max_iterations, _FIRST_STEPS)
    run = lambda start: fixed_point(look, first, start, max_iterations=first_steps, tolerance=1e-4)
    w, turns, contrast = jax.vmap(run)(starts) if num_restarts > 1 else jax.tree.map(lambda a: a[None], run(starts[0]))
    best = jnp.argmax(contrast)
    w, turns = w[best], turns[best]

    v_blocks = blocks(v)
    if noise_scale is None and not known_law:
        scales = jnp.asarray([s for s in SCALES if s > 0.9 * default_scale(count)], dtype)
        wanted = scales[choose_scales(w, score_table(source, scales, scales, dtype), v_blocks)]
    else:
        scale = default_scale(count) if noise_scale is None else noise_scale
        wanted = jnp.broadcast_to(jnp.asarray(scale, dtype), (num_sources,))

    def refine(w):
        # Observation noise spreads the data already; what is added makes up the rest.
        noise_u = jnp.diagonal(w @ noise_white @ w.T)
        s = jnp.sqrt(jnp.maximum(jnp.square(wanted), noise_u))
        d = jnp.sqrt(jnp.square(s) - noise_u)
        table = score_table(source, s, d, dtype)
        limits = {"unit_variance": not known_law, "max_iterations": max_iterations, "tolerance": tolerance}
        return s, d, table, *newton(v_blocks, table, d, w, noise_white, **limits)

    s, d, table, w, change, steps = refine(w)
    if observed:  # its share in each source is known only now
        s, d, table, w, change, more = refine(w)
        steps = steps + more
    if not known_law:
        w = w * likelihood_scales(w, table, d, v_blocks, noise_white, count)[:, None]
    return {
        # D W^-1
        "mixing": jnp.linalg.solve(w.T, whitened.from_white.T).T,
        "unmixing": w @ whitened.to_white,
        "noise_scale": s,
        "num_iterations": turns + steps,
        "residual": change,
    }


def likelihood_scales(w, table, data_scale, v_blocks, noise, count):
    """Factors [Z] from unit variance to the likelihood's scale, for sources that do not contradict the law.

    The likelihood's scale is the better estimate if the law is right and inconsistent if not. Where the two differ
    by more than three standard errors of their difference (Hausman's test), unit variance stays.
    """
    d2 = jnp.square(data_scale)
    noise_u = jnp.diagonal(w @ noise @ w.T)

    def statistics(v, weights):
        u = w @ v
        psi, slope = look_up(table, u)
        return (slope * u * u) @ weights, (psi * u) @ weights, slope @ weights, jnp.square(u) @ weights

    slope_square, a, slope, power = mean_over(statistics, v_blocks)
    step = (a + d2 * slope - 1) / (slope_square + a + 2 * d2 * slope)
    gap = step - 0.5 * (power - noise_u - 1)
    # For a Laplace source the two have variances 1/N and 5/(4N), and their difference 1/(4N).
    return jnp.where(jnp.abs(gap) <= 3 * 0.5 / math.sqrt(count), 1 - step, 1)
