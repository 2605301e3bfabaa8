"""Gaussian spread noise with a low-rank covariance."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from spread_jax._checks import at_least_float32, check_positive, is_concrete
from spread_jax._pairwise import flatten_events, squared_distances
from spread_jax._pytree import frozen_pytree
from spread_jax._threefry import normal
from spread_jax.noise._product import fit_batch, fit_event, positive_log
from spread_jax.noise._protocol import CheckedNoise, all_pairs, per_example
from spread_jax.noise.gaussian import GaussianShifts
from spread_jax.noise.validity import positive_everywhere

__all__ = ["LowRankGaussianNoise"]


@frozen_pytree
class LowRankGaussianNoise(GaussianShifts, CheckedNoise):
    r"""Gaussian spread noise with learned directions, p(y|x) = N(y; x, S + L L^T), S = diag(sigma^2).

    L has R columns, R much smaller than the X dimensions of an event. No X x X matrix is ever formed:
    densities go through the R x R matrix I + W^T W, with W = S^(-1/2) L, in O(X R) for each example. The
    quadratic form is written as a sum of squares,

      u^T (I + W W^T)^-1 u = |u - W a|^2 + |a|^2,   a = (I + W^T W)^-1 W^T u,

    which stays accurate (and non-negative) where L is much larger than sigma and the subtracting form does
    not.

    Args:
      scale: sigma > 0, a number, an array that broadcasts against one event, or one number for each example,
        [batch, 1, ...].
      factor: L, of shape [*event, R].
        Both are pytree leaves. To learn L by maximising a divergence it must be constrained: see
        `with_volume` and `with_entropy`.

    Raises:
      ValueError: if a concrete `scale` is not positive and finite, or `factor` has fewer than two axes or is
        concrete and not finite.
      TypeError: if `factor` is not floating point.

    Source: Zhang et al., Spread Divergence, ICML 2020, section on learning the noise covariance.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> noise = LowRankGaussianNoise(0.5, jnp.ones((3, 1)))
      >>> x = jnp.zeros((4, 3))
      >>> noise.log_prob(noise.sample(x, key=jax.random.key(0)), x).shape
      (4,)
    """

    scale: float | jax.Array
    factor: jax.Array

    def __post_init__(self):
        check_positive("scale", self.scale)
        if not hasattr(self.factor, "shape"):
            raise TypeError(f"factor must be an array of shape [*event, R], got {type(self.factor).__name__}.")
        shape, dtype = jnp.shape(self.factor), jnp.result_type(self.factor)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(f"factor must have a floating-point dtype, got {dtype}; convert it first.")
        if len(shape) < 2 or 0 in shape:
            raise ValueError(f"factor must have shape [*event, R] with R of at least 1, got {shape}.")
        if is_concrete(self.factor) and not np.isfinite(np.asarray(self.factor)).all():
            raise ValueError("factor must be finite, got NaN or infinity.")

    @per_example
    def sample(self, x: jax.Array, *, key: jax.Array) -> jax.Array:
        """Draws y = x + sigma epsilon + L eta, with epsilon ~ N(0, I_X) and eta ~ N(0, I_R).

        Args:
          x: [batch, *event], floating point.
          key: a JAX random key.

        Returns:
          y with the shape and dtype of x.
        """
        scale, factor = self._parts_like(x)
        wide_key, low_key = jax.random.split(key)
        low = normal(low_key, (x.shape[0], factor.shape[1]), x.dtype)
        wide = scale * normal(wide_key, x.shape, x.dtype)
        return x + wide + (low @ factor.T).reshape(x.shape)

    @per_example
    def log_prob(self, y: jax.Array, x: jax.Array) -> jax.Array:
        """log N(y; x, S + L L^T) in nats, in float32 at least, as are the other results.

        Args:
          y: [batch, *event].
          x: [batch, *event], the locations.

        Returns:
          [batch].
        """
        whiten, constant = self._whitening(x)
        return constant - 0.5 * jnp.square(whiten(y - x)).sum(axis=1)

    def pairwise_log_prob(self, y: jax.Array, x: jax.Array) -> jax.Array:
        """log p(y_i|x_j) for all pairs, in nats.

        Args:
          y: [m, *event].
          x: [n, *event].

        Returns:
          [m, n].
        """
        u, v, constant = self.standardise(y, x)
        return constant - 0.5 * squared_distances(u, v)

    @all_pairs
    def standardise(self, y: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Coordinates, centred on x, in which this is a unit Gaussian: log p(y_i|x_j) = c - |u_i - v_j|^2 / 2.

        Args:
          y: [m, *event].
          x: [n, *event].

        Returns:
          u [m, X + R], v [n, X + R] and c, a scalar in nats.
        """
        fit_event("scale", self.scale, x)
        whiten, constant = self._whitening(x)
        centre = jax.lax.stop_gradient(x.mean(axis=0, keepdims=True))
        return whiten(y - centre), whiten(x - centre), constant

    def covariance(self, x: jax.Array) -> jax.Array:
        """The covariance of p(y|x), S + L L^T, [X, X], for events [X]."""
        scale, factor = self._parts_like(x, fit_event)
        return jnp.diag(jnp.square(jnp.broadcast_to(scale, x.shape[1:]))) + factor @ factor.T

    def example_axes(self, x: jax.Array) -> list[int | None]:
        """Of scale and factor, 0 if it has an entry for each example of x, or None."""
        return [0 if jnp.ndim(self.scale) == x.ndim else None, None]

    def spread_conditions(self):
        """The conditions of validity, for `check_valid_spread`."""
        return positive_everywhere(self, "is a Gaussian, positive everywhere")

    @per_example
    def kl(self, x: jax.Array, x2: jax.Array) -> jax.Array:
        """KL(p(y|x) || p(y|x2)) = (x - x2)^T (S + L L^T)^-1 (x - x2) / 2 in nats, [batch]."""
        whiten, _ = self._whitening(x)
        return 0.5 * jnp.square(whiten(x - x2)).sum(axis=1)

    @per_example
    def entropy(self, x: jax.Array) -> jax.Array:
        """The entropy of p(y|x) in nats, [batch]; it depends on the shape of x only."""
        _, constant = self._whitening(x)
        return jnp.broadcast_to(0.5 * math.prod(x.shape[1:]) - constant, x.shape[:1])

    def expected_log_prob(self, x: jax.Array, x2: jax.Array) -> jax.Array:
        """E log p(y|x2) over y ~ p(y|x), in nats: [batch]."""
        return -self.kl(x, x2) - self.entropy(x)

    @per_example
    def characteristic_function(self, omega: jax.Array) -> jax.Array:
        """The Fourier transform of the kernel, exp(-(|sigma omega|^2 + |L^T omega|^2) / 2).

        Args:
          omega: [batch, *event], frequencies in radians per unit of x.

        Returns:
          [batch], real and positive.
        """
        scale, factor = self._parts_like(omega)
        wide = jnp.square(flatten_events(scale * omega)).sum(axis=1)
        return jnp.exp(-0.5 * (wide + jnp.square(flatten_events(omega) @ factor).sum(axis=1)))

    @all_pairs
    def log_mmd_kernel(self, x: jax.Array, x2: jax.Array) -> jax.Array:
        """log N(x; x2, 2 S + 2 L L^T), [n, m]: the logarithm of `mmd_kernel`, which can be held in any dimensions."""
        return LowRankGaussianNoise(self.scale * math.sqrt(2.0), self.factor * math.sqrt(2.0)).pairwise_log_prob(x, x2)

    def mmd_kernel(self, x: jax.Array, x2: jax.Array) -> jax.Array:
        """The integral of p(y|x) p(y|x2) over y, N(x; x2, 2 S + 2 L L^T): [n, m]."""
        return jnp.exp(self.log_mmd_kernel(x, x2))

    def log_volume(self) -> jax.Array:
        """log det(L^T L)^(1/2), the logarithm of the R-dimensional volume that L spans."""
        factor = self.factor.reshape(-1, self.factor.shape[-1])
        if factor.shape[0] < factor.shape[1]:
            raise ValueError(
                f"factor must have at most as many columns as an event has dimensions for its volume to be "
                f"positive, got shape {self.factor.shape}."
            )
        # The triangle of a QR factorisation squares no condition number.
        return jnp.log(jnp.abs(jnp.diagonal(jnp.linalg.qr(factor)[1]))).sum()

    def with_volume(self, volume: float | jax.Array = 1.0) -> LowRankGaussianNoise:
        """The same noise with L rescaled to det(L^T L)^(1/2) = `volume`.

        Without a constraint, noise that maximises a divergence vanishes. This one, of the paper, fixes the
        entropy that L brings while leaving its directions free. Differentiable: build the noise as
        `LowRankGaussianNoise(sigma, free_factor).with_volume()` inside the loss and train `free_factor`.

        Args:
          volume: > 0, in units of x to the power R.

        Returns:
          A new LowRankGaussianNoise.

        Raises:
          ValueError: if a concrete `volume` is not positive, R exceeds the dimensions of an event, or the volume
            of a concrete L is zero.
        """
        check_positive("volume", volume)
        log_volume = self.log_volume()
        if not isinstance(log_volume, jax.core.Tracer) and log_volume == -jnp.inf:
            raise ValueError("factor must have independent columns for a volume to be reached by scaling it.")
        log_ratio = (jnp.log(jnp.asarray(volume, self.factor.dtype)) - log_volume) / self.factor.shape[-1]
        return LowRankGaussianNoise(self.scale, self.factor * jnp.exp(log_ratio))

    def with_entropy(self, entropy: float | jax.Array) -> LowRankGaussianNoise:
        r"""The same noise with L rescaled so that the entropy of p(y|x) is `entropy`, exactly.

        With lambda_r the eigenvalues of W^T W, the factor c >= 0 that L is multiplied by solves

          X/2 log(2 pi e) + sum_d log sigma_d + 1/2 sum_r log(1 + c^2 lambda_r) = entropy.

        `with_volume` fixes the volume of L alone, which is this entropy only where L is much larger than
        sigma. Differentiable to any order, by the implicit function theorem.

        Args:
          entropy: in nats, more than the entropy X/2 log(2 pi e) + sum_d log sigma_d without L.

        Returns:
          A new LowRankGaussianNoise; its factor is NaN where a traced entropy is too small, or L is zero.

        Raises:
          ValueError: if a concrete `entropy` is not above the entropy without L, or a concrete L is zero.

        Example:
          >>> import jax.numpy as jnp
          >>> noise = LowRankGaussianNoise(0.5, jnp.ones((3, 1))).with_entropy(4.0)
          >>> print(noise.entropy(jnp.zeros((1, 3))))
          [4.]
        """
        event, dtype = self.factor.shape[:-1], self.factor.dtype
        scale, factor = self._parts_like(jnp.zeros((1, *event), dtype), fit_event)
        scale = jnp.broadcast_to(scale, event).reshape(-1)
        without = 0.5 * scale.size * math.log(2 * math.pi * math.e) + positive_log(scale).sum()
        excess = 2 * (jnp.asarray(entropy, dtype) - without)
        if not isinstance(excess, jax.core.Tracer) and not (excess > 0 and jnp.isfinite(excess)):
            raise ValueError(
                f"entropy must be finite and above that of the noise without its factor, {without:g} nats, "
                f"got {entropy:g}."
            )
        w = factor / scale[:, None]
        if not isinstance(w, jax.core.Tracer) and not (w != 0).any():
            raise ValueError("factor must not be zero for an entropy to be reached by scaling it.")
        return LowRankGaussianNoise(self.scale, self.factor * jnp.exp(0.5 * _log_gain(w, excess)))

    def _parts_like(self, x, fit=fit_batch):
        event = x.shape[1:]
        if self.factor.shape[:-1] != event:
            raise ValueError(
                f"factor must have shape [*event, R] for events of shape {event}, got {self.factor.shape}."
            )
        factor = jnp.asarray(self.factor, x.dtype)
        return fit("scale", self.scale, x), factor.reshape(-1, factor.shape[-1])

    def _whitening(self, x):
        """A linear map whose squared norm is the quadratic form, and the log-density at the location."""
        of_examples = self.example_axes(x)[0] == 0
        parts = self._parts_like(x, fit_batch if of_examples else fit_event)
        scale, factor = (at_least_float32(part) for part in parts)
        if of_examples:
            return _whitening_of_examples(scale, factor)
        size = factor.shape[0]
        scale = jnp.broadcast_to(scale, x.shape[1:]).reshape(-1)
        w = factor / scale[:, None]
        cholesky = jnp.linalg.cholesky(jnp.eye(w.shape[1], dtype=w.dtype) + w.T @ w)

        def whiten(difference):
            u = flatten_events(at_least_float32(difference)) / scale[None]
            a = jax.scipy.linalg.cho_solve((cholesky, True), (u @ w).T).T
            return jnp.concatenate([u - a @ w.T, a], axis=1)

        log_determinant = positive_log(scale).sum() + jnp.log(jnp.diagonal(cholesky)).sum()
        return whiten, -log_determinant - 0.5 * size * math.log(2 * math.pi)


def _whitening_of_examples(scale, factor):
    """As `LowRankGaussianNoise._whitening`, for one scale for each example: its W is L / sigma, [X, R]."""
    if math.prod(scale.shape[1:]) != 1:
        raise ValueError(f"scale must be one number for each example beside a factor, got shape {scale.shape}.")
    (size, rank), scale = factor.shape, scale.reshape(-1, 1)
    gram = (factor.T @ factor)[None] / jnp.square(scale)[:, :, None]
    cholesky = jnp.linalg.cholesky(jnp.eye(rank, dtype=gram.dtype)[None] + gram)

    def whiten(difference):
        u = flatten_events(at_least_float32(difference)) / scale
        solve = jax.vmap(lambda c, b: jax.scipy.linalg.cho_solve((c, True), b))
        a = solve(cholesky, (u @ factor) / scale)
        return jnp.concatenate([u - (a @ factor.T) / scale, a], axis=1)

    log_determinant = size * positive_log(scale[:, 0]) + jnp.log(jnp.diagonal(cholesky, axis1=1, axis2=2)).sum(axis=1)
    return whiten, -log_determinant - 0.5 * size * math.log(2 * math.pi)


def _log_gain(w, excess):
    """The u at which log det(I + e^u W^T W) = excess; NaN where there is none."""
    gram = w.T @ w
    identity = jnp.eye(gram.shape[0], dtype=gram.dtype)

    def residual(u):
        return 2 * jnp.log(jnp.diagonal(jnp.linalg.cholesky(identity + jnp.exp(u) * gram))).sum() - excess

    def solve(_, start):
        # Bisection on the sum of softplus(u + log lambda), which keeps its digits where the excess is small.
        # The largest eigenvalue alone bounds u from above, R copies of it from below.
        log_eigenvalues = jnp.log(jnp.maximum(jnp.linalg.eigvalsh(gram), 0))
        inverse_softplus = lambda v: v + jnp.log(-jnp.expm1(-v))
        low, high = (inverse_softplus(part) - log_eigenvalues[-1] for part in (excess / w.shape[1], excess))

        def halve(_, bracket):
            low, high = bracket
            middle = 0.5 * (low + high)
            below = jax.nn.softplus(middle + log_eigenvalues).sum() < excess
            return jnp.where(below, middle, low), jnp.where(below, high, middle)

        low, high = jax.lax.fori_loop(0, jnp.finfo(w.dtype).nmant + 8, halve, (low, high))
        return 0.5 * (low + high) + start

    u = jax.lax.custom_root(residual, jnp.zeros((), w.dtype), solve, lambda slope, v: v / slope(jnp.ones_like(v)))
    return jnp.where(excess > 0, u, jnp.nan)
