"""Laws of one source of a linear model: zero mean, unit variance, and what spreading does to them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import log_ndtr, logsumexp

from spread_jax._checks import check_positive, is_concrete
from spread_jax._pytree import frozen_pytree
from spread_jax._random import normal, uniform

__all__ = [
    "BernoulliGaussSource",
    "CustomSource",
    "LaplaceSource",
    "LogisticSource",
    "Source",
    "StudentTSource",
    "as_source",
]


@runtime_checkable
class Source(Protocol):
    """What a source law offers; every method works elementwise on arrays of any shape."""

    def log_prob(self, z: jax.Array) -> jax.Array:
        """log p(z) of each element, in nats."""

    def score(self, z: jax.Array) -> jax.Array:
        """psi(z) = -d/dz log p(z)."""

    def spread_score(self, y: jax.Array, scale: jax.Array) -> jax.Array:
        """psi_s(y) = -d/dy log p_s(y), p_s the density of z + s epsilon with epsilon ~ N(0, 1)."""

    def spread_log_prob(self, y: jax.Array, scale: jax.Array) -> jax.Array:
        """log p_s(y) in nats."""


class _Source:
    """Score by differentiation and spread law by quadrature, for sources without closed forms."""

    # y - z in units of s: the trapezoid rule is spectrally accurate for the smooth, and good to 1e-4 at a kink.
    _nodes: ClassVar[np.ndarray] = np.linspace(-9.0, 9.0, 181)

    def score(self, z: jax.Array) -> jax.Array:
        """psi(z) = -d/dz log p(z), elementwise."""
        z = jnp.asarray(z)
        _, slope = jax.jvp(self.log_prob, (z,), (jnp.ones_like(z),))
        return -slope

    def spread_log_prob(self, y: jax.Array, scale: float | jax.Array) -> jax.Array:
        """log p_s(y), the integral of p(z) N(y; z, s^2) over z: elementwise, in nats."""
        terms, _ = self._joint(y, scale)
        step = self._nodes[1] - self._nodes[0]
        return logsumexp(terms, axis=-1) + math.log(step)

    def spread_score(self, y: jax.Array, scale: float | jax.Array) -> jax.Array:
        """psi_s(y) = (y - E[z|y]) / s^2, elementwise."""
        terms, nodes = self._joint(y, scale)
        return (jax.nn.softmax(terms, axis=-1) * nodes).sum(axis=-1) / scale

    def _joint(self, y, scale):
        y = jnp.asarray(y)
        nodes = jnp.asarray(self._nodes, y.dtype)
        scale = jnp.asarray(scale, y.dtype)
        nodes = nodes.reshape((1,) * max(y.ndim, scale.ndim) + (-1,))  # no rank is promoted
        z = y[..., None] - (scale[..., None] if scale.ndim else scale) * nodes
        return self.log_prob(z) - 0.5 * jnp.square(nodes) - 0.5 * math.log(2 * math.pi), nodes


@frozen_pytree
class LaplaceSource(_Source):
    r"""The Laplace law of unit variance, p(z) = exp(-sqrt(2) |z|) / sqrt(2).

    Spread by N(0, s^2) it has a closed form. With lambda = sqrt(2) and
    l+- = -+lambda y + log Phi((+-y - lambda s^2) / s),

      log p_s(y) = log(lambda / 2) + lambda^2 s^2 / 2 + logaddexp(l+, l-),  psi_s(y) = lambda tanh((l+ - l-) / 2).

    Example:
      >>> import jax.numpy as jnp
      >>> print(LaplaceSource().spread_score(jnp.array([0.0, 5.0]), 0.1).round(4))
      [0.     1.4142]
    """

    def log_prob(self, z: jax.Array) -> jax.Array:
        """log p(z) of each element, in nats."""
        return -math.sqrt(2.0) * jnp.abs(z) - 0.5 * math.log(2.0)

    def score(self, z: jax.Array) -> jax.Array:
        """psi(z) = sqrt(2) sign(z), elementwise."""
        return math.sqrt(2.0) * jnp.sign(z)

    def _branches(self, y, scale):
        rate = math.sqrt(2.0)
        right = -rate * y + log_ndtr(y / scale - rate * scale)
        left = rate * y + log_ndtr(-y / scale - rate * scale)
        return right, left

    def spread_log_prob(self, y: jax.Array, scale: float | jax.Array) -> jax.Array:
        """log p_s(y) in nats, in closed form."""
        return jnp.logaddexp(*self._branches(y, scale)) + jnp.square(scale) - 0.5 * math.log(2.0)

    def spread_score(self, y: jax.Array, scale: float | jax.Array) -> jax.Array:
        """psi_s(y) in closed form."""
        right, left = self._branches(y, scale)
        return math.sqrt(2.0) * jnp.tanh(0.5 * (right - left))

    def conditional_variance(self, z: jax.Array, *, key: jax.Array) -> jax.Array:
        """Draws tau^2 given z, for z ~ N(0, tau^2) with tau^2 ~ Exp(1): 1 / tau^2 ~ InvGauss(sqrt(2) / |z|, 2)."""
        normal_key, uniform_key = jax.random.split(key)
        w = jnp.square(normal(normal_key, z.shape, z.dtype)) / 4
        inverse_mean = jnp.abs(z) * math.sqrt(0.5)
        # The two roots of Michael, Schucany and Haas (1976), as inverses: neither cancels nor overflows at z = 0.
        large = inverse_mean + w + jnp.sqrt(w * (2 * inverse_mean + w))
        small = jnp.square(inverse_mean) / jnp.maximum(large, jnp.finfo(z.dtype).tiny)
        first = uniform(uniform_key, z.shape, z.dtype) * (large + inverse_mean) <= large
        return jnp.where(first, large, small)

    def sample(self, shape: tuple[int, ...], *, key: jax.Array) -> jax.Array:
        """Independent draws of the given shape."""
        return jax.random.laplace(key, shape) * math.sqrt(0.5)


@frozen_pytree
class LogisticSource(_Source):
    r"""The logistic law of unit variance, p(z) = sech^2(z / (2 b)) / (4 b) with b = sqrt(3) / pi.

    Example:
      >>> import jax.numpy as jnp
      >>> print(LogisticSource().score(jnp.array([1.0])).round(4))
      [1.3053]
    """

    def log_prob(self, z: jax.Array) -> jax.Array:
        """log p(z) of each element, in nats."""
        b = math.sqrt(3.0) / math.pi
        u = jnp.abs(z) / b
        return -u - 2 * jnp.log1p(jnp.exp(-u)) - math.log(b)

    def score(self, z: jax.Array) -> jax.Array:
        """psi(z) = tanh(z / (2 b)) / b, elementwise."""
        b = math.sqrt(3.0) / math.pi
        return jnp.tanh(z / (2 * b)) / b

    def sample(self, shape: tuple[int, ...], *, key: jax.Array) -> jax.Array:
        """Independent draws of the given shape."""
        return jax.random.logistic(key, shape) * (math.sqrt(3.0) / math.pi)


@frozen_pytree
class StudentTSource(_Source):
    r"""Student's law of unit variance, p(z) proportional to (1 + z^2 / (df - 2))^(-(df + 1) / 2).

    Args:
      df: degrees of freedom, > 2, so that a variance exists. A pytree leaf.

    Raises:
      ValueError: if a concrete `df` is not finite and above 2.

    Example:
      >>> import jax.numpy as jnp
      >>> print(StudentTSource(5.0).score(jnp.array([1.0])))
      [1.5]
    """

    df: float | jax.Array = 5.0

    def __post_init__(self):
        if is_concrete(self.df) and not 2 < float(self.df) < math.inf:
            raise ValueError(f"df must be finite and above 2, so that the variance exists, got {self.df}.")

    def log_prob(self, z: jax.Array) -> jax.Array:
        """log p(z) of each element, in nats."""
        lgamma = jax.scipy.special.gammaln
        df = jnp.asarray(self.df, jnp.result_type(z))
        constant = lgamma((df + 1) / 2) - lgamma(df / 2) - 0.5 * jnp.log(math.pi * (df - 2))
        return constant - (df + 1) / 2 * jnp.log1p(jnp.square(z) / (df - 2))

    def score(self, z: jax.Array) -> jax.Array:
        """psi(z) = (df + 1) z / (df - 2 + z^2), elementwise."""
        return (self.df + 1) * z / (self.df - 2 + jnp.square(z))

    def conditional_variance(self, z: jax.Array, *, key: jax.Array) -> jax.Array:
        """Draws tau^2 given z, for z ~ N(0, tau^2): inverse gamma with shape (df + 1) / 2, rate (df - 2 + z^2) / 2."""
        gamma = jax.random.gamma(key, jnp.broadcast_to((self.df + 1) / 2, z.shape).astype(z.dtype))
        return (self.df - 2 + jnp.square(z)) / (2 * gamma)

    def sample(self, shape: tuple[int, ...], *, key: jax.Array) -> jax.Array:
        """Independent draws of the given shape."""
        return jax.random.t(key, self.df, shape) * jnp.sqrt((self.df - 2) / self.df)


@frozen_pytree
class BernoulliGaussSource(_Source):
    r"""A sparse source of unit variance: active with probability pi, nearly zero otherwise.

    p(z) = pi N(z; 0, v) + (1 - pi) N(z; 0, w^2) with v such that the variance is 1. Both parts stay Gaussian
    under spread noise, so even the spike w -> 0, a point mass, has a spread density.

    Args:
      probability: pi in (0, 1), of being active. A pytree leaf.
      spike_scale: w > 0, standard deviation when not active. A pytree leaf.

    Raises:
      ValueError: if a concrete number is out of its range.

    Example:
      >>> import jax.numpy as jnp
      >>> print(BernoulliGaussSource(0.5, 0.1).spread_log_prob(jnp.zeros(1), 1.0).round(4))
      [-1.1589]
    """

    probability: float | jax.Array = 0.2
    spike_scale: float | jax.Array = 0.05

    def __post_init__(self):
        if is_concrete(self.probability) and not 0 < float(self.probability) < 1:
            raise ValueError(f"probability must lie between 0 and 1, got {self.probability}.")
        check_positive("spike_scale", self.spike_scale)
        if is_concrete(self.spike_scale) and float(self.spike_scale) >= 1:
            raise ValueError(f"spike_scale must be below 1, the scale of the source, got {self.spike_scale}.")

    def _parts(self, z, scale):
        dtype = jnp.result_type(z)
        p, w = jnp.asarray(self.probability, dtype), jnp.asarray(self.spike_scale, dtype)
        extra = jnp.square(jnp.asarray(scale, dtype))
        wide, narrow = (1 - (1 - p) * jnp.square(w)) / p + extra, jnp.square(w) + extra
        normal = lambda v: -0.5 * jnp.square(z) / v - 0.5 * jnp.log(2 * math.pi * v)
        return jnp.log(p) + normal(wide), jnp.log1p(-p) + normal(narrow), wide, narrow

    def log_prob(self, z: jax.Array) -> jax.Array:
        """log p(z) of each element, in nats."""
        return self.spread_log_prob(z, 0.0)

    def score(self, z: jax.Array) -> jax.Array:
        """psi(z) = -d/dz log p(z), elementwise."""
        return self.spread_score(z, 0.0)

    def spread_log_prob(self, y: jax.Array, scale: float | jax.Array) -> jax.Array:
        """log p_s(y) in nats, in closed form."""
        active, idle, _, _ = self._parts(y, scale)
        return jnp.logaddexp(active, idle)

    def spread_score(self, y: jax.Array, scale: float | jax.Array) -> jax.Array:
        """psi_s(y) in closed form."""
        active, idle, wide, narrow = self._parts(y, scale)
        share = jax.nn.sigmoid(active - idle)
        return y * (share / wide + (1 - share) / narrow)

    def conditional_variance(self, z: jax.Array, *, key: jax.Array) -> jax.Array:
        """Draws the variance given z: that of the active or of the idle part."""
        active, idle, wide, narrow = self._parts(z, 0.0)
        return jnp.where(jax.random.bernoulli(key, jax.nn.sigmoid(active - idle)), wide, narrow)

    def sample(self, shape: tuple[int, ...], *, key: jax.Array) -> jax.Array:
        """Independent draws of the given shape."""
        which, how = jax.random.split(key)
        _, _, wide, narrow = self._parts(jnp.zeros(()), 0.0)
        active = jax.random.bernoulli(which, self.probability, shape)
        return jax.random.normal(how, shape) * jnp.sqrt(jnp.where(active, wide, narrow))


@frozen_pytree
class CustomSource(_Source):
    r"""A source given by its log-density; the score is its derivative and spreading is done by quadrature.

    Args:
      log_density: elementwise z -> log p(z) in nats, up to a constant: zero mean and unit variance are up to
        the caller. A callable that is a pytree (`jax.tree_util.Partial`) keeps its parameters as leaves; any
        other is a static part, so define it once.

    Raises:
      TypeError: if `log_density` is not callable.

    Example:
      >>> import jax.numpy as jnp
      >>> source = CustomSource(lambda z: -0.25 * z**4)
      >>> print(source.score(jnp.array([2.0])))
      [8.]
    """

    log_density: Callable[[jax.Array], jax.Array]

    def __post_init__(self):
        if not callable(self.log_density):
            raise TypeError(f"log_density must be callable, got {type(self.log_density).__name__}.")
        if jax.tree_util.all_leaves([self.log_density]):
            object.__setattr__(self, "log_density", jax.tree_util.Partial(self.log_density))

    def log_prob(self, z: jax.Array) -> jax.Array:
        """log p(z) of each element, in nats."""
        return self.log_density(z)


NAMED = {
    "laplace": LaplaceSource,
    "logistic": LogisticSource,
    "student_t": StudentTSource,
    "bernoulli_gauss": BernoulliGaussSource,
}


def as_source(source: str | Source | Callable[[jax.Array], jax.Array]) -> Source:
    """A source law from its name, itself, or a log-density.

    Args:
      source: "laplace", "logistic", "student_t", "bernoulli_gauss", a `Source`, or an elementwise callable
        z -> log p(z).

    Returns:
      A `Source`.

    Raises:
      ValueError: for an unknown name.
      TypeError: for anything else.

    Example:
      >>> as_source("laplace")
      LaplaceSource()
    """
    if isinstance(source, str):
        if source not in NAMED:
            raise ValueError(f"source must be one of {', '.join(map(repr, NAMED))}, got {source!r}.")
        return NAMED[source]()
    if isinstance(source, Source):
        return source
    if callable(source):
        return CustomSource(source)
    raise TypeError(f"source must be a name, a Source or a log-density, got {type(source).__name__}.")
