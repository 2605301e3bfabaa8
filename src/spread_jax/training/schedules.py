"""Schedules of the step: noise scale and learning rate. Optax's own, under the names of this field."""

from __future__ import annotations

import optax

from spread_jax._checks import check_positive

__all__ = ["learning_rate_schedule", "noise_scale_schedule"]


def noise_scale_schedule(
    initial: float, final: float, *, decay: float = 0.9, every: int = 1, begin: int = 0
) -> optax.Schedule:
    r"""The published annealing of sigma: multiplied by `decay` every `every` steps, down to `final`.

      sigma(t) = max(final, initial * decay^floor((t - begin) / every)), and initial before `begin`.

    Args:
      initial: sigma at the start, in units of x.
      final: the smallest sigma; equal to `initial` for no annealing.
      decay: factor of each reduction, in (0, 1).
      every: steps between reductions.
      begin: the step from which reductions count.

    Returns:
      An Optax schedule, step -> sigma, that may be called on a traced step.

    Raises:
      ValueError: a scale is not positive, `final` exceeds `initial`, or `decay` is outside (0, 1).

    Source: Zhang et al., Spread Divergence, ICML 2020, CelebA experiment (0.5 to 0.1 in factors of 0.9).

    Example:
      >>> schedule = noise_scale_schedule(0.5, 0.1, every=100)
      >>> round(float(schedule(250)), 3)
      0.405
    """
    check_positive("initial", initial)
    check_positive("final", final)
    if final > initial:
        raise ValueError(f"final must not exceed initial, got final {final} and initial {initial}.")
    if not 0 < decay < 1:
        raise ValueError(f"decay must be in (0, 1), got {decay}.")
    if final == initial:
        return optax.constant_schedule(initial)
    return optax.exponential_decay(
        initial,
        transition_steps=every,
        decay_rate=decay,
        transition_begin=begin,
        staircase=True,
        end_value=final,
    )


def learning_rate_schedule(
    peak: float, *, num_steps: int, warmup: int = 0, final_fraction: float = 1.0, decay_start: float = 0.0
) -> optax.Schedule:
    """Linear warm-up from zero, the peak, then a cosine to a fraction of it (1: constant).

    Args:
      peak: learning rate after the warm-up.
      num_steps: steps of the whole run.
      warmup: steps of warm-up.
      final_fraction: learning rate at `num_steps` as a fraction of `peak`, in [0, 1].
      decay_start: share of `num_steps`, in [0, 1), from which on the cosine falls; 0: from the end of the warm-up.

    Returns:
      An Optax schedule, step -> learning rate.

    Raises:
      ValueError: a number is out of its range.

    Example:
      >>> schedule = learning_rate_schedule(1e-3, num_steps=100, warmup=10, final_fraction=0.1)
      >>> round(float(schedule(10)), 6), round(float(schedule(100)), 6)
      (0.001, 0.0001)
    """
    check_positive("peak", peak)
    if not 0 <= final_fraction <= 1:
        raise ValueError(f"final_fraction must be in [0, 1], got {final_fraction}.")
    if not 0 <= decay_start < 1:
        raise ValueError(f"decay_start must be in [0, 1), got {decay_start}.")
    if not 0 <= warmup < max(num_steps, 1):
        raise ValueError(f"warmup must be in [0, num_steps), got {warmup} of {num_steps} steps.")
    if final_fraction == 1.0:
        after = optax.constant_schedule(peak)
    else:
        begin = max(warmup, int(decay_start * num_steps))
        cosine = optax.cosine_decay_schedule(peak, num_steps - begin, alpha=final_fraction)
        after = optax.join_schedules([optax.constant_schedule(peak), cosine], [begin - warmup])
    if warmup == 0:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])
