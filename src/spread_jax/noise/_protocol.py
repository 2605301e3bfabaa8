"""What a spread noise is."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import jax

__all__ = ["SpreadNoise", "check_noise"]


@runtime_checkable
class SpreadNoise(Protocol):
    """A spread noise p(y|x): anything with these three methods works in every objective.

    The first axis of x and y is the batch, all others are the event. A noise is a pytree, so its numbers can
    be annealed, vmapped or trained. Where a closed form exists a noise also offers

      - `expected_log_prob(x, x2)` -> [batch], the integral of p(y|x) log p(y|x2) over y, in nats;
      - `kl(x, x2)` -> [batch], KL(p(y|x) || p(y|x2)), in nats;
      - `characteristic_function(omega)` -> [batch], the Fourier transform of a stationary kernel;
      - `mmd_kernel(x, x2)` -> [n, m], the integral of p(y|x) p(y|x2) over y;
      - `pairwise_log_prob(y, x)` -> [m, n], log p(y_i|x_j), where all pairs are cheaper than one by one;
      - `standardise(y, x)` -> (u [m, X], v [n, X], c), where log p(y_i|x_j) = c - |u_i - v_j|^2 / 2.
    """

    def sample(self, x: jax.Array, *, key: jax.Array) -> jax.Array:
        """Draws y ~ p(y|x), of the shape of x."""
        ...

    def log_prob(self, y: jax.Array, x: jax.Array) -> jax.Array:
        """log p(y|x) in nats, one number for each example: [batch]."""
        ...

    def location(self, x: jax.Array) -> jax.Array:
        """The noise-free y: x itself, or f(x) for a transformed noise."""
        ...


def check_noise(name: str, noise) -> None:
    """Refuses what lacks a method of a spread noise."""
    if not isinstance(noise, SpreadNoise):
        raise TypeError(
            f"{name} must be a spread noise, such as spread_jax.GaussianNoise(0.5), with methods sample, log_prob and "
            f"location, got {type(noise).__name__}."
        )
