"""Spread noise for discrete variables."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from spread_jax._checks import check_count, check_positive, is_concrete
from spread_jax._pairwise import flatten_events
from spread_jax._pytree import frozen_pytree
from spread_jax.noise._product import sum_event
from spread_jax.noise._protocol import CheckedNoise, all_pairs, per_example
from spread_jax.noise.validity import SpreadCondition

__all__ = ["DiscreteNoise"]


@frozen_pytree
class DiscreteNoise(CheckedNoise):
    r"""Spread noise on labels 0 .. n-1, p(y=i|x=j) = P_ij.

    Spreading multiplies a probability vector by P. It is valid if P has positive entries (one support for
    all) and is invertible (P p = P q implies p = q): `check_valid_spread` says which holds. Labels of an
    event with several entries are spread independently.

    Args:
      matrix: P, [n, n], floating point; each column sums to one. A pytree leaf; a concrete matrix is
        checked here. Concrete labels out of range are refused by each method; traced ones give NaN.

    Raises:
      TypeError: if `matrix` is not floating point.
      ValueError: if `matrix` is not square, or a concrete one has a negative entry or a column that does not
        sum to one.

    Source: Zhang et al., Spread Divergence, ICML 2020, section on discrete spread divergences.

    Example:
      >>> import jax.numpy as jnp
      >>> noise = DiscreteNoise.uniform_mixture(2, 0.5)
      >>> print(noise.spread(jnp.array([1.0, 0.0])))
      [0.75 0.25]
    """

    matrix: jax.Array

    def __post_init__(self):
        shape, dtype = jnp.shape(self.matrix), jnp.result_type(self.matrix)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(f"matrix must have a floating-point dtype, got {dtype}; convert it first.")
        if len(shape) != 2 or shape[0] != shape[1] or shape[0] == 0:
            raise ValueError(f"matrix must be square, [n, n], got shape {shape}.")
        if isinstance(self.matrix, jax.core.Tracer):
            return
        matrix = np.asarray(self.matrix, np.float64)
        error = np.abs(matrix.sum(axis=0) - 1).max()
        if not (matrix.min() >= 0 and error < 1e-4):
            raise ValueError(
                f"matrix must have non-negative entries and columns that sum to one, got minimum entry "
                f"{matrix.min():g} and a column off by {error:g}; divide it by matrix.sum(axis=0)."
            )

    @classmethod
    def uniform_mixture(cls, num_labels: int, rate: float | jax.Array) -> DiscreteNoise:
        """Keeps a label with probability 1 - rate, else draws one of `num_labels` uniformly; 0 < rate < 1."""
        num_labels = check_count("num_labels", num_labels)
        check_positive("rate", rate)
        if not isinstance(rate, jax.core.Tracer) and not (np.asarray(rate) < 1).all():
            raise ValueError(f"rate must be below 1, or every label is forgotten, got {rate}.")
        identity = jnp.eye(num_labels)
        return cls((1 - rate) * identity + rate / num_labels)

    @per_example
    def sample(self, x: jax.Array, *, key: jax.Array) -> jax.Array:
        """Draws labels y ~ p(y|x) of the shape and dtype of x, [batch, *event] integers."""
        logits = jnp.log(self.matrix).T[x]
        return jax.random.categorical(key, logits, axis=-1).astype(x.dtype)

    @per_example
    def log_prob(self, y: jax.Array, x: jax.Array) -> jax.Array:
        """log p(y|x) in nats, [batch], for labels y and x of one shape [batch, *event]."""
        return sum_event(_entries(jnp.log(self.matrix), y, x))

    @per_example
    def kl(self, x: jax.Array, x2: jax.Array) -> jax.Array:
        """KL(p(y|x) || p(y|x2)) in nats, [batch]."""
        cross = self._cross_entropies()
        table = cross - jnp.diagonal(cross)[:, None]
        return sum_event(_entries(table, x, x2))

    @per_example
    def expected_log_prob(self, x: jax.Array, x2: jax.Array) -> jax.Array:
        """E log p(y|x2) over y ~ p(y|x), in nats, [batch]."""
        return -sum_event(_entries(self._cross_entropies(), x, x2))

    @all_pairs
    def mmd_kernel(self, x: jax.Array, x2: jax.Array) -> jax.Array:
        """The sum of p(y|x) p(y|x2) over y, [n, m]: entries of P^T P."""
        gram = self.matrix.T @ self.matrix
        x, x2 = flatten_events(x), flatten_events(x2)
        return _entries(gram, x[:, None, :], x2[None, :, :]).prod(axis=-1)

    def spread(self, probabilities: jax.Array) -> jax.Array:
        """p~ = P p, for probabilities of the n labels along the last axis."""
        probabilities = jnp.asarray(probabilities)
        if probabilities.shape[-1:] != self.matrix.shape[:1]:
            raise ValueError(
                f"probabilities must have {self.matrix.shape[0]} entries along the last axis, "
                f"got shape {probabilities.shape}."
            )
        return probabilities @ self.matrix.T

    def example_axes(self, x: jax.Array) -> list[int | None]:
        """None: one matrix serves all examples."""
        return [None]

    def spread_conditions(self):
        """The conditions of validity, for `check_valid_spread`."""
        matrix = np.asarray(self.matrix, np.float64)
        smallest = matrix.min()
        if smallest > 0:
            yield SpreadCondition("support", True, f"every entry is positive, the smallest is {smallest:.3g}")
        else:
            row, column = np.unravel_index(matrix.argmin(), matrix.shape)
            yield SpreadCondition("support", False, f"p(y={row}|x={column}) is zero, so supports can differ")
        singular = np.linalg.svd(matrix, compute_uv=False)
        condition_number = singular[0] / max(singular[-1], np.finfo(np.float64).tiny)
        if singular[-1] > singular[0] * len(matrix) * np.finfo(np.float32).eps:
            reason = f"the matrix is invertible, condition number {condition_number:.3g}"
            yield SpreadCondition("injective", True, reason)
        else:
            yield SpreadCondition("injective", False, "the matrix is singular, so different p spread to the same p~")

    def _array(self, name, value):
        array = jnp.asarray(value)
        if not jnp.issubdtype(array.dtype, jnp.integer):
            raise TypeError(f"{name} must have an integer dtype (labels 0 .. n-1), got {array.dtype}.")
        if array.ndim == 0:
            raise ValueError(f"{name} must have shape [batch, *event], got a scalar.")
        if array.size and is_concrete(array):
            num_labels = self.matrix.shape[0]
            with jax.ensure_compile_time_eval():
                low, high = int(array.min()), int(array.max())
            if low < 0 or high >= num_labels:
                raise ValueError(f"{name} must hold labels 0 .. {num_labels - 1}, got labels from {low} to {high}.")
        return array

    def _cross_entropies(self):
        """-sum_i P_ij log P_ik for each pair (j, k); 0 log 0 = 0."""
        used = self.matrix > 0
        logs = jnp.log(jnp.where(used, self.matrix, 1))
        # Infinity is put in last: its product with a gradient of zero would be none.
        infinite = (used[:, :, None] & ~used[:, None, :]).any(axis=0)
        return jnp.where(infinite, jnp.inf, -(self.matrix[:, :, None] * logs[:, None, :]).sum(axis=0))


def _entries(table, i, j):
    """table[i, j], NaN where a traced label is out of range: indexing alone would take its neighbour's value."""
    i, j = (jnp.where(index < 0, table.shape[0], index) for index in (i, j))
    return table.at[i, j].get(mode="fill", fill_value=jnp.nan)
