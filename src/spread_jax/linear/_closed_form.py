"""ICA by the estimated score of each source: FastICA's fixed point, then relative Newton, on whitened data.

Notation: v is whitened data [Z, N], W an unmixing of it, u = W v estimates of the sources, psi_i the score of source i
as `_scores.project` finds it. The same code runs in NumPy and in JAX.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from spread_jax.linear import _scores
from spread_jax.linear._host import blocks, cond, library, mean_over, some_columns, while_loop, within

# Examples that the fixed point and, of more than twice as many, the first of Newton's steps look at; with many sources
# 4 Z^2: the fewer, the more steps it takes, and from Z^2 / 2 it finds nothing.
_FIRST_LOOK = 8192
# Scores are estimated from all examples where a histogram tells of them; else from a quarter of them, but from no fewer
# and no more than these.
_FEWEST, _MOST = 4096, 32768
_FIRST_STEPS = 100
# Scores follow the sources until a step is this small, in standard errors, and for so many steps at most: shorter ones
# hardly change them, and scores that go on to follow the sources can go round in circles with them.
_SETTLED, _FOLLOW = 3.0, 4
# Steps before it is asked whether the estimates are correlated.
_FREE = 5


def polar(w):
    """The orthogonal matrix nearest to w."""
    left, _, right = library(w).linalg.svd(w, full_matrices=False)
    return left @ right


def fixed_point(v, start, *, max_iterations: int, tolerance: float):
    """W <- polar(E[g(W v) v^T] - diag(E g') W), g(u) = u / (1 + u^2)^(1/2), until the rows stop turning.

    Args:
      v: [Z, n], whitened.
      start: [Z, Z], orthogonal.

    Returns:
      (W, iterations).
    """
    xp = library(v)
    v_blocks = blocks(v)

    def body(carry):
        w, _, t = carry
        g_v, slope = _contrast_averages(w, v_blocks)
        new = polar(g_v - slope[:, None] * w)
        return new, 1 - xp.abs(xp.vecdot(new, w)).min(), t + 1

    carry = (start, xp.asarray(math.inf, start.dtype), 0)
    w, _, t = while_loop(lambda c: (c[1] > tolerance) & (c[2] < max_iterations), body, carry, xp)
    return w, t


def _contrast_averages(w, v_blocks):
    """E[g(u) v^T] and E g'(u) for u = W v."""
    xp = library(w)

    def statistics(v, weigh):
        u = w.astype(v.dtype) @ v
        r = 1 / xp.sqrt(1 + u * u)
        return weigh(u * r) @ v.T, xp.vecdot(r * r, weigh(r))

    return mean_over(statistics, v_blocks)


def turn_of_two(v):
    """The rotation [2, 2] of two white columns at which they are least Gaussian, of all: there is but one angle.

    Non-Gaussian is what E[g(u) u] - E g'(u) and E[h(u) u] - E h'(u) are not zero for, with h(u) = 1 / (3/2 + u^2) and
    g(u) = u h(u). Between steps of pi/32 by a parabola.

    Args:
      v: [2, n], whitened.

    Returns:
      W [2, 2], a rotation.
    """
    xp = library(v)
    angles = np.arange(32) * (math.pi / 32)
    y = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(v.dtype) @ v
    r = 1 / (1.5 + y * y)
    yr = y * r
    odd = 1 - (0.5 * r.sum(axis=1) + 3 * xp.vecdot(r, r)) / v.shape[1]
    even = (yr.sum(axis=1) + 2 * xp.vecdot(yr, r)) / v.shape[1]
    found = odd * odd + even * even
    found = found[:16] + found[16:]
    best = xp.argmax(found)
    before, most, after = found[best - 1], found[best], found[(best + 1) % 16]
    angle = (best + 0.5 * (before - after) / xp.minimum(before - 2 * most + after, -1e-30)) * (math.pi / 32)
    a, b = xp.cos(angle), xp.sin(angle)
    return xp.stack([xp.stack([a, b]), xp.stack([-b, a])])


def contrast(v, w):
    """How far E[g(u) u] lies from its value for a Gaussian, E g'(u): largest for independent sources of any law."""
    g_v, slope = _contrast_averages(w, blocks(v))
    return library(v).square((g_v * w).sum(axis=1) - slope).sum()


def part_pairs(v, w, doubtful):
    """Turns pairs of rows of W that still mix two sources alike, where a fixed point can rest.

    Such a pair is uncorrelated and yet dependent. The pairs whose 1 / (3/2 + u^2) are most correlated, eight at most,
    are turned against each other by the multiple of pi/16 at which both are least Gaussian.

    Args:
      v: [Z, n], whitened.
      w: [Z, Z].
      doubtful: [Z, Z], pairs that are to be turned in any case.

    Returns:
      W.
    """
    xp, count, size = library(v), v.shape[1], len(w)
    eye = xp.eye(size, dtype=w.dtype)
    # What chance leaves in as many pairs.
    significant = math.sqrt((10 + 4 * math.log(size)) / count)

    def dependence(w, tried):
        u = w.astype(v.dtype) @ v
        r = 1 / (1.5 + u * u)
        r = r - r.mean(axis=1, keepdims=True)
        r = r / xp.sqrt(xp.maximum(xp.vecdot(r, r), 1e-30))[:, None]
        return u, xp.where(tried, 0, xp.abs(r @ r.T) + doubtful)

    def contrast(y):
        r = 1 / (1.5 + y * y)
        odd = (y * y * r - r + 2 * xp.square(y * r)).mean(axis=1)  # E g u - E g'
        even = (y * r + 2 * y * r * r).mean(axis=1)
        return odd * odd + even * even

    def body(carry):
        w, tried, u, correlation, t = carry
        angles = np.arange(8) * (math.pi / 16)
        cos, sin = (xp.asarray(f(angles), v.dtype)[:, None] for f in (np.cos, np.sin))
        place = xp.argmax(correlation)
        first, second = eye[place // size], eye[place % size]
        one, two = first.astype(v.dtype) @ u, second.astype(v.dtype) @ u
        found = contrast(cos * one + sin * two) + contrast(cos * two - sin * one)
        best = xp.where(found.max() > 1.05 * found[0], xp.argmax(found), 0)
        a, b = cos[best, 0], sin[best, 0]
        both = first[:, None] * first + second[:, None] * second
        swap = first[:, None] * second - second[:, None] * first
        w = (eye + (a - 1) * both + b * swap).astype(w.dtype) @ w
        tried = tried | (swap * swap > 0)
        return w, tried, *dependence(w, tried), t + 1

    tried = eye > 0
    going = lambda carry: (carry[3].max() > significant) & (carry[4] < 8)
    return while_loop(going, body, (w, tried, *dependence(w, tried), 0), xp)[0]


def equations(slope, variance, a, own, count, untold, orthogonal):
    """How a relative step follows from F, and what is left of source j in estimate i.

    F_ij = E[psi_i(u_i) u_j] is zero off the diagonal for independent sources. Its expected derivative couples (i, j)
    with (j, i) only: h_ij M_ij + a_i M_ji = F_ij with h_ij = E psi_i' E u_j^2 and a_i = E[psi_i u_i]. Over data
    Var F_ij = E psi_i^2 E u_j^2 / N and Cov(F_ij, F_ji) = a_i a_j / N, hence those of M. With psi the score, a = 1,
    h = J >= 1, the information, and Var M_ij = J_j / ((J_i J_j - 1) N). Only if both are Gaussian is that infinite.

    If `orthogonal`, rows of W only turn, M_ij = -M_ji = (F_ij - F_ji) / (h_ij - a_i + h_ji - a_j), of variance
    (1 / (J_i + J_j - 2) + 1/4) / N: less is made of the data, and less asked of them.

    Args:
      slope, variance, a: [Z], E psi', Var psi and E[psi u], for sources of unit variance.
      own: [Z], variance of observation noise in u, or 0.
      count: N.
      untold: the variance from which on a pair cannot be told apart.

    Returns:
      (P, Q, deviations), each [Z, Z] with a diagonal of zero: M = P * F + Q * F^T, and the standard deviations of its
      entries, 1 for a pair that cannot be told apart: it is made uncorrelated and not turned.
    """
    xp = library(slope)
    off = ~np.eye(len(slope), dtype=bool)
    column = lambda row: row[:, None]
    clean = a - own * slope

    def free(_):
        both = xp.outer(clean, clean)
        product = xp.outer(slope, slope)
        determinant = product - both
        of_f = column(variance) * (1 + own)
        squares = slope**2 * of_f + column(clean**2) * of_f.T - 2 * slope * column(clean) * xp.outer(a, a)
        safe = determinant > 1e-6 * xp.abs(product)
        divisor = xp.where(safe, determinant, 1)
        squares = xp.where(safe, xp.maximum(squares, 0) / (divisor * divisor * count), 1)
        told = safe & (squares < untold)
        told = told & told.T
        total = slope + clean
        alike = 1 / xp.maximum(column(total) + total, 1e-30)
        p, q = xp.where(told, slope / divisor, alike), xp.where(told, -column(clean) / divisor, alike)
        return off * p, off * q, off * xp.sqrt(xp.where(told, squares, 1))

    def turning(_):
        rise, rest = slope - clean, variance - a * a
        rise, rest = column(rise) + rise, column(rest) + rest
        squares = (rest / xp.maximum(rise * rise, 1e-30) + 0.25) / count
        told = off & (rise > 1e-6) & (squares < untold)
        p = xp.where(told, 1 / xp.where(told, rise, 1), 0)
        return p, -p, off * xp.sqrt(xp.where(told, squares, 1))

    return cond(orthogonal, turning, free, None, xp)


def rounding(dtype) -> float:
    """The length of a step below which rounding, not the data, makes it."""
    return 2000 * float(np.finfo(dtype).eps)


def newton(v, law, start, noise, orthogonal, first, *, max_iterations: int, tolerance: float):
    """Newton's steps until what is left of the way is predicted to be below `tolerance` standard errors.

    The scores are estimated anew while steps are long. The estimates of independent sources are uncorrelated, but for
    what N examples leave to chance. Once those of a free W are not, the sources are not independent either, and from
    there on W is orthogonal.

    Args:
      start: [Z, Z].
      orthogonal: whether W is to be orthogonal from the beginning.
      noise: [Z, Z], covariance of observation noise in the coordinates of v, or None.
      first: iterations made before.

    Returns:
      (W, iterations, largest entry of what is left in standard errors, standard deviations [Z, Z] as in `equations`,
      whether W is orthogonal).
    """
    xp, count, v_blocks = library(v), v.shape[1], blocks(v, 4)
    num_looked = count if law.smooth else min(max(count // 4, _FEWEST), _MOST, count)
    look = v_blocks if law.smooth else blocks(some_columns(v, num_looked), 4 * law.size)
    least = np.asarray(rounding(v.dtype) + np.eye(len(start)), start.dtype)
    slope_error = min(15 / math.sqrt(count), 0.3)
    pairs = max(len(start) * (len(start) - 1) / 2, 1)

    def dependent(w):
        correlations = w @ w.T
        squares = 0.5 * (xp.square(correlations).sum() - len(w)) / pairs
        return squares * count > 2 + 8 / math.sqrt(pairs)

    def body(carry):
        w, scores, system, previous, left, t, orthogonal, last = carry
        asked = (t >= first + _FREE) | (left <= tolerance)
        turning = cond(asked, lambda w: orthogonal | dependent(w), lambda _: orthogonal, w, xp)
        follow = (previous > _SETTLED) & (t < first + _FOLLOW)
        scores = cond(follow, lambda w: _scores.project(law, w, look, num_looked), lambda _: scores, w, xp)
        coefficients, slope, variance = scores
        f = psi_u = cross_moments(law, coefficients, w, v_blocks)
        own = 0
        if noise is not None:  # Stein: E psi(z_i + e_i)(z_j + e_j) = E psi' Cov(e_i, e_j)
            noise_u = w @ noise @ w.T
            f, own = psi_u - noise_u * slope[:, None], xp.diagonal(noise_u)
        renew = lambda _: equations(slope, variance, xp.diagonal(psi_u), own, count, law.untold, turning)
        renewed = follow | (turning != orthogonal)
        system = cond(renewed, renew, lambda _: system, None, xp)
        p, q, deviation = system
        step = p * f + q * f.T
        scaled = step / (deviation + least)
        residual, length = xp.abs(scaled).max(), xp.abs(step).max()
        # What the next step is of this one: as much as the last time, and no less than the chance in slopes and the
        # second order of this step leave to it.
        rate = within(residual / previous, within(length, slope_error, 0.9, xp), 0.9, xp)
        # Full steps, then shrinking ones: few examples can make the full ones go round in circles.
        share = within(20 / (t - first + 1), 0, 1, xp) / within(length / 0.3, 1, math.inf, xp)
        move = (share * step) @ w

        def secant(_):
            """The step to where F would vanish on the line through this and the last of W."""
            change = scaled - last[2]
            how_far = within((change * scaled).sum() / ((change * change).sum() + 1e-30), -4.0, 1.0, xp)
            return w - move - how_far * (w - last[0] - move + last[1])

        along = (previous < _SETTLED) & ~renewed
        last, w = (w, move, scaled), cond(along, secant, lambda _: w - move, None, xp)
        # White data of unit variance have sources of unit variance.
        w = cond(turning, polar, lambda w: w / xp.sqrt(xp.vecdot(w, w))[:, None], w, xp)
        return w, scores, system, residual, residual * rate / (1 - rate), t + 1, turning, last

    def going(carry):  # a NaN ends the loop too: the comparison is false
        w, *_, left, t, orthogonal, _ = carry
        arrived = (left <= tolerance) & ~orthogonal
        return cond(arrived, dependent, lambda _: left > tolerance, w, xp) & (t < max_iterations)

    nothing, infinite = xp.zeros_like(start), xp.asarray(math.inf, start.dtype)
    scores = xp.zeros((len(start), law.size), start.dtype), nothing[0], nothing[0]
    carry = (start, scores, (nothing,) * 3, infinite, infinite, first, orthogonal, (nothing,) * 3)
    w, _, (_, _, deviation), _, left, t, orthogonal, _ = while_loop(going, body, carry, xp)
    return w, t, left, deviation, orthogonal


def cross_moments(law, coefficients, w, v_blocks):
    """E[psi_i(u_i) u_j], u = W v."""

    def statistics(v, weigh):
        u = w.astype(v.dtype) @ v
        return (weigh(law.score(coefficients.astype(v.dtype), u)) @ u.T,)

    return mean_over(statistics, v_blocks)[0]


def default_scale(count: int) -> float:
    """The spread scale for N examples of known law: small, but so wide that enough examples share a kernel."""
    return min(max(3.3 / math.sqrt(count), 0.05), 0.3)


def fit(v, starts, source, noise_scale, noise, *, likelihood: bool, max_iterations: int, tolerance: float):
    """The whole estimate from whitened data; see `spread_jax.linear.ica.fit`.

    Args:
      v: [Z, N], NumPy or JAX.
      starts: [restarts, Z, Z], orthogonal.
      source: the law whose spread score serves, or None for `_scores.AnyLaw`.
      noise_scale: s and d of every source for a law; None for `default_scale`.
      noise: [Z, Z], covariance of observation noise in the coordinates of v, or None.
      likelihood: whether the likelihood of the law sets the scale of a source; else it has unit variance.

    Returns:
      A dict of rotation W, noise_scale, num_iterations, residual and leakage.
    """
    xp = library(v)
    num_sources, count = v.shape
    first_look = min(max(_FIRST_LOOK, 4 * num_sources**2), count)
    look = v if xp is np and count <= 2 * first_look else some_columns(v, first_look)
    first_steps = max(min(max_iterations // 2, _FIRST_STEPS), 1)
    few = max(_FEWEST // 4, 4 * num_sources**2)
    looks = [look]
    if num_sources == 2:
        looks = [look] if first_look > 3 * few else []
    elif xp is np and first_look > 3 * few:  # JAX would compile it all twice
        looks = [some_columns(look, few), look]

    def run(w):
        t = 0
        if num_sources == 2:
            w, t = turn_of_two(some_columns(look, few)).astype(w.dtype), 1
        for v in looks:
            # Until a row turns by less than its standard error, or so little that the next turn will be far less.
            close = max(3e-4, 0.2 * num_sources / v.shape[1])
            most = first_steps - t if v is look else min(first_steps - 1, 10)
            w, more = fixed_point(v, w, max_iterations=most, tolerance=close)
            t = t + more
        return w, t

    if len(starts) == 1:
        w, t = run(starts[0])
    else:
        both = lambda start: (lambda w, t: (w, t, contrast(look, w)))(*run(start))
        found = [both(start) for start in starts] if xp is np else jax.vmap(both)(starts)
        found = tuple(map(np.stack, zip(*found, strict=True))) if xp is np else found
        best = xp.argmax(found[2])
        w, t = found[0][best], found[1][best]

    observed = noise is not None
    noise = noise.astype(v.dtype) if observed else None

    def law_at(w):
        # Observation noise spreads the data already; what is added makes up the rest.
        own = xp.diagonal(w @ noise @ w.T) if observed else xp.zeros(num_sources, v.dtype)
        if source is None:
            if observed:
                noisy = own > 0  # the root's derivative at 0 is no number
                own = xp.where(noisy, xp.sqrt(xp.where(noisy, own, 1)), 0)
            return _scores.AnyLaw.of(num_sources, count), own, None
        scale = default_scale(count) if noise_scale is None else noise_scale
        s = xp.sqrt(xp.maximum(xp.square(xp.broadcast_to(xp.asarray(scale, v.dtype), own.shape)), own))
        d = xp.sqrt(xp.maximum(xp.square(s) - own, 0))
        rows = slice(None) if observed else slice(1)
        table = _scores.score_table(source, s[rows], d[rows], jnp.result_type(float) if xp is np else v.dtype)
        return _scores.NamedLaw(np.asarray(table, v.dtype) if xp is np else table), s, d

    def settle(carry):
        w, t, _, leakage, orthogonal, rounds = carry
        if num_sources > 2:
            w = part_pairs(some_columns(look, _FEWEST), w, leakage == 1)
        if xp is np and count > 2 * first_look and not rounds:  # JAX would compile it all twice
            limits = {"max_iterations": max_iterations - 2, "tolerance": _SETTLED}
            w, t, _, _, orthogonal = newton(look, law, w, noise, orthogonal, t, **limits)
        limits = {"max_iterations": max_iterations, "tolerance": tolerance}
        return *newton(v, law, w, noise, orthogonal, t, **limits), rounds + 1

    # Pairs that cannot be told apart may rest where they look alike: they are turned and all settles once more.
    going = lambda carry: (carry[-1] < 1) | ((carry[-1] < rounds) & (carry[3] == 1).any() & (carry[1] < max_iterations))
    rounds = 2 if num_sources > 2 else 1
    orthogonal = xp.asarray(False)
    # The share of observation noise in each source, and with it the law, is known only after a first fit.
    for _ in range(2 if observed and source is not None else 1):
        law, s, d = law_at(w)
        carry = w, t, xp.asarray(math.inf, w.dtype), xp.zeros_like(w), orthogonal, 0
        w, t, residual, leakage, orthogonal, _ = while_loop(going, settle, carry, xp)
    if likelihood:
        w = _likelihood_scale(w, law, d, blocks(v))
    return {"rotation": w, "noise_scale": s, "num_iterations": t, "residual": residual, "leakage": leakage}


def _likelihood_scale(w, law, d, v_blocks):
    """Rows of W such that E[psi~(u) u] + d^2 E psi~'(u) = 1, the scale of largest spread likelihood: W [Z, Z]."""
    xp = library(w)

    def statistics(v, weigh):
        u = w.astype(v.dtype) @ v
        psi, slope = _scores.look_up(law.table, u)
        return tuple(weigh(value).sum(axis=1) for value in (psi * u, slope, slope * u * u))

    for _ in range(3):
        a, slope, slope_square = mean_over(statistics, v_blocks)
        step = (a + d * d * slope - 1) / (slope_square + a + 2 * d * d * slope)
        w = w * (1 - xp.clip(step, -0.3, 0.3))[:, None]
    return w
