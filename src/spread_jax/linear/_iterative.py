"""EM and natural gradient on the spread likelihood by importance sampling: their steps, and when they have arrived."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from spread_jax.linear._sampling import importance_moments, score_deviation, turn_gain

# Standard errors that the gradient may be away from zero when a sampling method is called converged. With 0.5, three of
# 162 fits of 500 to 3,000 examples stopped at a plateau, with 0.25 none did; 0.1 to 0.2 is what noise leaves.
STANDARD_ERRORS = 0.25
# EM steps between two looks at the mean of their gradients, and the last of them, whose A are averaged. With fresh
# noise in every step a mean over 15 gradients is itself up to 0.65 standard errors off, one over 50 up to 0.35.
_BETWEEN_LOOKS, _LAST = 50, 15
_LOOK_ROWS, _LOOK_SAMPLES = 2048, 64  # of the deviations that the gradient is measured in
_TURN_ROWS, _TURN_SAMPLES = 8192, 32  # of the look at turns of two columns


def paper_noise_scale(mixing):
    """max(0.001, 2.5 sqrt(mean(A A^T))), the mean over all entries."""
    # The mean over entries of A A^T is a squared length, which has no slope at zero: where columns sum to it.
    square = jnp.square(2.5 / mixing.shape[0] * mixing.sum(axis=0)).sum()
    above = square > 0.001**2
    return jnp.where(above, jnp.sqrt(jnp.where(above, square, 1)), 0.001)


def em_update(moments):
    return jnp.linalg.solve(moments.z_z, moments.y_z.T).T


def natural_update(mixing, moments, step_size):
    size = mixing.shape[1]
    eye = jnp.eye(size, dtype=mixing.dtype)
    f = moments.score_z - eye
    h = moments.score_square
    # h_i >= 1 with equality for a Gaussian source; the bound keeps steps short where sources are nearly so.
    m = (h[None, :] * f - f.T) / jnp.maximum(h[:, None] * h[None, :] - 1, 0.2)
    m = jnp.where(eye > 0, f, m)
    m = m * jnp.minimum(1, 0.3 / jnp.maximum(jnp.abs(m).max(), 1e-30))
    q, _ = jnp.linalg.qr(mixing)
    span = em_update(moments)
    return mixing + step_size * (mixing @ m) + span - q @ (q.T @ span)


def residual_of(gradient, mixing, x, noise_scale, observation_scale, source, key, tolerance):
    """What the data say against A, in standard errors over examples, and the mean of log p~.

    The largest entry of the relative gradient; where that is small, as it is at a plateau too, no less than what a turn
    of two columns gains.
    """
    rows = lambda most: x[:: max(x.shape[0] // most, 1)]
    model = {"noise_scale": noise_scale, "observation_scale": observation_scale, "source": source, "key": key}
    deviation, log_likelihood = score_deviation(mixing, rows(_LOOK_ROWS), num_samples=_LOOK_SAMPLES, **model)
    residual = math.sqrt(x.shape[0]) * jnp.max(jnp.abs(gradient) / deviation)
    turned = lambda: jnp.maximum(residual, turn_gain(mixing, rows(_TURN_ROWS), num_samples=_TURN_SAMPLES, **model))
    small = residual <= max(tolerance, STANDARD_ERRORS)
    return jax.lax.cond(small, turned, lambda: residual), log_likelihood


def fit_natural(x, start, source, noise_scale, observation_scale, key, *, max_iterations, tolerance, **options):
    """Full steps, then shorter ones; the mean of the last tenth."""
    noise_scale = jnp.asarray(noise_scale, x.dtype)
    e_step = _e_step(x, source, observation_scale, key, options)
    last = max(max_iterations // 10, 1)
    eye = jnp.eye(start.shape[1], dtype=x.dtype)

    def step(carry, t):
        mixing, mean, gradient = carry
        moments = e_step(mixing, noise_scale, t)
        step_size = jnp.where(t < 0.5 * max_iterations, 1.0, jnp.where(t < 0.75 * max_iterations, 0.3, 0.1))
        mixing = natural_update(mixing, moments, step_size.astype(x.dtype))
        share = jnp.where(t < max_iterations - last, 0, 1 / last).astype(x.dtype)
        return (mixing, mean + share * mixing, gradient + share * (moments.score_z - eye)), None

    carry = (start, jnp.zeros_like(start), jnp.zeros_like(eye))
    (_, mixing, gradient), _ = jax.lax.scan(step, carry, jnp.arange(max_iterations))
    residual, log_likelihood = residual_of(gradient, mixing, x, noise_scale, observation_scale, source, key, tolerance)
    return {
        "mixing": mixing,
        "noise_scale": noise_scale,
        "num_iterations": jnp.asarray(max_iterations),
        "residual": residual,
        "log_likelihood": log_likelihood,
    }


def fit_em(x, start, source, noise_scale, observation_scale, key, *, max_iterations, tolerance, **options):
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
        mixing = em_update(moments)
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
        measured = residual_of(gradient, mean, x, scale_of(mean), observation_scale, source, look_key, tolerance)
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
