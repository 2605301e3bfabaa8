"""What makes a spread noise trainable, as values: initial numbers, constraint, state, and the range it must stay in."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from spread_jax._checks import check_count, check_positive
from spread_jax._random import check_one_key
from spread_jax.noise._protocol import SpreadNoise
from spread_jax.noise.gaussian import GaussianNoise
from spread_jax.noise.laplace import LaplaceNoise
from spread_jax.noise.low_rank import LowRankGaussianNoise
from spread_jax.noise.transformed import TransformedNoise

__all__ = [
    "FixedGaussian",
    "FixedLaplace",
    "LearnedCovariance",
    "LearnedLocation",
    "LearnedNoise",
    "NoiseCollapseError",
    "NoiseModel",
    "check_noise_range",
]

PyTree = Any


@dataclasses.dataclass(frozen=True)
class NoiseModel(abc.ABC):
    r"""One kind of spread noise over its parameters psi and a standard deviation: what a training loop is given.

    A value and no pytree: its fields are plain numbers, so it can be hashed, written to a config and typed at a
    command line; what is trained are the parameters that `init` returns. To learn psi, maximise a spread
    divergence over it under `noise(psi, state, scale)`, whose form is the constraint without which noise that is
    told to tell data and model apart vanishes.

    A subclass is a frozen dataclass that defines `name` and `noise`; the other methods are those of a fixed noise
    until they are overridden.

    Attributes:
      name: a label for records and flags.
      learned: whether there are parameters to train.

    Source: Zhang et al., Spread Divergence, ICML 2020, section on maximising the spread.

    Example:
      >>> import dataclasses, jax, jax.numpy as jnp
      >>> from spread_jax import GaussianNoise, NoiseModel
      >>> @dataclasses.dataclass(frozen=True)
      ... class LearnedScales(NoiseModel):  # a scale for each dimension, of a fixed geometric mean
      ...     name, learned = "scales", True
      ...     def init(self, event_shape, *, key):
      ...         return {"log": jnp.zeros(event_shape)}, None
      ...     def noise(self, params, state, scale):
      ...         return GaussianNoise(scale * jnp.exp(params["log"] - params["log"].mean()))
      >>> model = LearnedScales()
      >>> params, state = model.init((3,), key=jax.random.key(0))
      >>> print(model.noise(params, state, 0.5).scale)
      [0.5 0.5 0.5]
    """

    name: ClassVar[str]
    learned: ClassVar[bool] = False

    def validate(self, event_shape: tuple[int, ...]) -> None:  # noqa: B027 (a fixed noise has none)
        """Refuses fields that cannot work on events of this shape: a ValueError that names the field."""

    def init(self, event_shape: tuple[int, ...], *, key: jax.Array) -> tuple[PyTree, PyTree]:
        """(params, state) to start from; ({}, None) of a fixed noise."""
        return {}, None

    @abc.abstractmethod
    def noise(self, params: PyTree, state: PyTree, scale: float | jax.Array) -> SpreadNoise:
        """The spread noise p(y|x) of standard deviation `scale`, differentiable in both.

        Args:
          params: psi.
          state: what belongs to it.
          scale: > 0, a number, or one for each example, [batch, 1, ...].
        """

    def advance(self, params: PyTree, state: PyTree) -> PyTree:
        """The state moved towards what belongs to the parameters, as by a power iteration."""
        return state

    def diagnostics(self, noise: SpreadNoise, event_shape: tuple[int, ...]) -> dict[str, jax.Array]:
        """Named scalars of a noise that `noise` made, by which its training is watched."""
        return {}

    def limits(self) -> Mapping[str, tuple[float, float]]:
        """The diagnostics' allowed (lowest, highest) values, for `check_noise_range`."""
        return {}

    def check(self, params: PyTree, state: PyTree) -> None:  # noqa: B027
        """Refuses, on the host, parameters that break the constraint: a ValueError that says which."""


@dataclasses.dataclass(frozen=True)
class FixedGaussian(NoiseModel):
    """Gaussian noise N(y; x, sigma^2 I) with nothing to learn.

    Example:
      >>> FixedGaussian().noise({}, None, 0.5)
      GaussianNoise(scale=0.5)
    """

    name: ClassVar[str] = "gaussian"

    def noise(self, params: PyTree, state: PyTree, scale: float | jax.Array) -> GaussianNoise:
        return GaussianNoise(scale)


@dataclasses.dataclass(frozen=True)
class FixedLaplace(NoiseModel):
    """Laplace noise with nothing to learn, of the standard deviation that it is given: b = sigma / sqrt(2).

    Example:
      >>> print(f"{FixedLaplace().noise({}, None, 1.0).scale:.4f}")
      0.7071
    """

    name: ClassVar[str] = "laplace"

    def noise(self, params: PyTree, state: PyTree, scale: float | jax.Array) -> LaplaceNoise:
        return LaplaceNoise(scale / math.sqrt(2))


@dataclasses.dataclass(frozen=True)
class LearnedNoise(NoiseModel):
    """Noise with parameters to train, and how they take turns with the model's.

    Source: Zhang et al., Spread Divergence, ICML 2020, CelebA experiment: 1,000 steps every 10 epochs at 1e-5.
    """

    learned: ClassVar[bool] = True

    descent_steps: int = 3
    """Steps of the model between the noise's turns."""
    ascent_steps: int = 1
    """Steps of the noise in each of its turns (published: 1000); 0 keeps it as it starts."""
    noise_learning_rate: float = 2e-3
    """Adam's learning rate for the noise (published: 1e-5)."""
    through_encoder: bool = False
    """Let the noise follow the gradient through the encoder's input too: it then learns to mislead the encoder."""

    def validate(self, event_shape: tuple[int, ...]) -> None:
        check_count("descent_steps", self.descent_steps)
        if self.ascent_steps != 0:
            check_count("ascent_steps", self.ascent_steps)
        check_positive("noise_learning_rate", self.noise_learning_rate)


@dataclasses.dataclass(frozen=True)
class LearnedCovariance(LearnedNoise):
    r"""Gaussian noise of a learned covariance, N(y; x, sigma^2 I + L L^T), L of R columns and a fixed volume.

    What is trained is L before it is rescaled to det(L^T L)^(1/2) = c^R, c = `factor_scale`: its directions and the
    proportions of its singular values. The volume keeps L from vanishing, not from growing in a few directions
    at the cost of others, of which `noise_entropy_ratio` tells: the entropy that L adds to the noise, over what it
    adds with R equal singular values, the least at its volume.

    Source: Zhang et al., Spread Divergence, ICML 2020, section on learning the noise covariance.

    Example:
      >>> import jax
      >>> model = LearnedCovariance(rank=2)
      >>> params, state = model.init((5,), key=jax.random.key(0))
      >>> noise = model.noise(params, state, 0.5)
      >>> noise.factor.shape, bool(abs(noise.log_volume()) < 1e-5)
      ((5, 2), True)
    """

    name: ClassVar[str] = "low_rank"

    rank: int = 20
    """R, the columns of L; at most the numbers in an event."""
    factor_scale: float = 1.0
    """The geometric mean of L's singular values, in units of the data."""
    max_entropy_ratio: float = 2.0
    """Training stops when L adds more than this many times the least entropy that its volume allows."""

    def validate(self, event_shape: tuple[int, ...]) -> None:
        super().validate(event_shape)
        rank = check_count("rank", self.rank)
        check_positive("factor_scale", self.factor_scale)
        if not self.max_entropy_ratio >= 1:
            raise ValueError(f"max_entropy_ratio must be at least 1, got {self.max_entropy_ratio}.")
        if rank > math.prod(event_shape):
            raise ValueError(f"rank must be at most {math.prod(event_shape)}, the numbers in an event, got {rank}.")

    def init(self, event_shape: tuple[int, ...], *, key: jax.Array) -> tuple[PyTree, PyTree]:
        # Columns of about unit length: what is trained has the scale of what is used.
        shape = (*event_shape, self.rank)
        return {"factor": jax.random.normal(check_one_key(key), shape) / math.sqrt(math.prod(event_shape))}, None

    def noise(self, params: PyTree, state: PyTree, scale: float | jax.Array) -> LowRankGaussianNoise:
        # volume^(1/R) is the geometric mean of the singular values; the volume itself might overflow.
        unit = LowRankGaussianNoise(scale, params["factor"]).with_volume(1.0).factor
        return LowRankGaussianNoise(scale, self.factor_scale * unit)

    def diagnostics(self, noise: LowRankGaussianNoise, event_shape: tuple[int, ...]) -> dict[str, jax.Array]:
        for_each = jnp.ndim(noise.scale) > len(event_shape)
        x = jnp.zeros((len(noise.scale) if for_each else 1, *event_shape))
        added = noise.entropy(x) - GaussianNoise(noise.scale).entropy(x)
        scale = jnp.reshape(noise.scale, -1) if for_each else noise.scale
        equal = 0.5 * self.rank * jnp.log1p(jnp.square(self.factor_scale / scale))
        return {"noise_entropy_ratio": (added / equal).mean()}

    def limits(self) -> Mapping[str, tuple[float, float]]:
        return {"noise_entropy_ratio": (0.99, self.max_entropy_ratio)}


@dataclasses.dataclass(frozen=True)
class LearnedLocation(LearnedNoise):
    r"""Gaussian noise around a learned injective map, y = f(x) + sigma epsilon.

    A subclass says what f is, by `transform`, and that it has stayed injective, by `check`. The parameters are f's
    "params", the state is its collection of power iterations.

    Source: Zhang et al., Spread Divergence, ICML 2020, section on learning the mean transformation.
    """

    name: ClassVar[str] = "transformed"
    collection: ClassVar[str] = "spectral_stats"

    @abc.abstractmethod
    def transform(self) -> Any:
        """f, with `init(key, x)` -> variables and `apply(variables, x, train=, mutable=)` as of a Flax module."""

    @abc.abstractmethod
    def check(self, params: PyTree, state: PyTree) -> None:
        """Refuses, on the host, parameters of an f that is not certain to be injective: a ValueError."""

    def example(self, state: PyTree) -> jax.Array:
        """An input [1, *event] of f, for `advance`: zeros like the state's first array, the first layer's image."""
        return jnp.zeros_like(jax.tree_util.tree_leaves(state)[0])

    def init(self, event_shape: tuple[int, ...], *, key: jax.Array) -> tuple[PyTree, PyTree]:
        variables = self.transform().init(check_one_key(key), jnp.zeros((1, *event_shape)))
        return variables["params"], variables[self.collection]

    def noise(self, params: PyTree, state: PyTree, scale: float | jax.Array) -> TransformedNoise:
        f = jax.tree_util.Partial(self.transform().apply, self._variables(params, state))
        return TransformedNoise(GaussianNoise(scale), f)

    def advance(self, params: PyTree, state: PyTree) -> PyTree:
        variables, x = self._variables(params, state), self.example(state)
        return self.transform().apply(variables, x, train=True, mutable=[self.collection])[1][self.collection]

    def _variables(self, params, state):
        return {"params": params, self.collection: state}


class NoiseCollapseError(RuntimeError):
    """The learned noise left the range in which it is trusted.

    Attributes:
      step: steps taken.
      name: the metric.
      value: what it was.
    """

    def __init__(self, step: int, name: str, value: float, low: float, high: float):
        self.step, self.name, self.value = step, name, value
        way = "blew up" if value > high else "collapsed" if value < low else "is not a number"
        super().__init__(
            f"The learned noise {way}: {name} is {value:.6g} after step {step}, outside [{low:.6g}, {high:.6g}]. "
            "Lower the noise's learning rate, take fewer ascent steps, or tighten its constraint."
        )


def check_noise_range(step: int, metrics: Mapping[str, float], limits: Mapping[str, tuple[float, float]]) -> None:
    """Refuses noise that has collapsed or blown up; for the host, where metrics are fetched.

    Args:
      step: steps taken.
      metrics: named numbers, such as the `diagnostics` of a `NoiseModel`.
      limits: metric name -> (lowest, highest) value allowed, such as the `limits` of a `NoiseModel`.

    Raises:
      NoiseCollapseError: a metric is outside its limits or no number; the message names it and what to do.
      KeyError: a metric is missing.

    Example:
      >>> check_noise_range(10, {"noise_entropy": 3.0}, {"noise_entropy": (0.0, 5.0)})
    """
    for name, (low, high) in limits.items():
        value = float(metrics[name])
        if not low <= value <= high:
            raise NoiseCollapseError(step, name, value, low, high)
