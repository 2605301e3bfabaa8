"""The spread noises an experiment can train with: fixed ones, and learned ones with what keeps them in bounds."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from experiments import _launch
from spread_jax import GaussianNoise, LaplaceNoise, LowRankGaussianNoise, TransformedNoise
from spread_jax.nn import InvertibleResidual, check_invertible
from spread_jax.training import AscentSchedule, check_noise_range, noise_scale_schedule

NOISES = ("laplace", "gaussian", "low_rank", "transformed")
LEARNED = ("low_rank", "transformed")


class NoiseFamily:
    """One kind of spread noise over its parameters and the step; holds no state.

    Args:
      kind: one of NOISES. `laplace` and `gaussian` have the same standard deviation; `low_rank` is Gaussian with
        a learned covariance of fixed volume, `transformed` Gaussian around a learned invertible map.
      config: has `noise_scale`, `final_noise_scale`, `noise_decay`, `noise_decay_every`, `rank`, `factor_scale`,
        `max_noise_entropy_ratio`, `transform_features` and `transform_coefficient`.
      image_shape: (height, width, channels).
      schedule: which steps are the model's; the noise is annealed by those.
    """

    def __init__(self, kind: str, config: Any, image_shape: tuple[int, int, int], schedule: AscentSchedule):
        self.kind, self.config, self.image_shape, self.schedule = kind, config, image_shape, schedule
        self.transform = InvertibleResidual(
            config.transform_features, coefficient=config.transform_coefficient, num_iterations=5
        )
        self._scale = noise_scale_schedule(
            config.noise_scale, config.final_noise_scale, decay=config.noise_decay, every=config.noise_decay_every
        )

    def initial(self, key: jax.Array) -> tuple[Any, Any]:
        """(parameters, state) to start from; ({}, None) of a fixed noise."""
        if self.kind == "low_rank":
            # Columns of about unit length: what is trained has the scale of what is used.
            shape = (*self.image_shape, self.config.rank)
            return {"factor": jax.random.normal(key, shape) / math.sqrt(math.prod(self.image_shape))}, None
        if self.kind == "transformed":
            variables = self.transform.init(key, jnp.zeros((1, *self.image_shape)))
            return variables["params"], variables["spectral_stats"]
        return {}, None

    def scale(self, step: Any) -> Any:
        """The standard deviation after so many steps of both players; it is annealed by the model's."""
        return self._scale(self.schedule.descents(step))

    def at(self, params: Any, state: Any, step: Any, *, scale: Any = None) -> Any:
        """The spread noise p(y|x) at a step, or of a scale."""
        scale = self.scale(step) if scale is None else scale
        if self.kind == "laplace":
            return LaplaceNoise(scale / math.sqrt(2))  # of standard deviation `scale`
        if self.kind == "low_rank":
            # volume^(1/R) is the geometric mean of the singular values; the volume itself might overflow.
            unit = LowRankGaussianNoise(scale, params["factor"]).with_volume(1.0).factor
            return LowRankGaussianNoise(scale, self.config.factor_scale * unit)
        if self.kind == "transformed":
            f = jax.tree_util.Partial(self.transform.apply, {"params": params, "spectral_stats": state})
            return TransformedNoise(GaussianNoise(scale), f)
        return GaussianNoise(scale)

    def updated(self, params: Any, state: Any) -> Any:
        """The state moved towards what belongs to the parameters."""
        if self.kind != "transformed":
            return state
        variables, image = {"params": params, "spectral_stats": state}, jnp.zeros((1, *self.image_shape))
        return self.transform.apply(variables, image, train=True, mutable=["spectral_stats"])[1]["spectral_stats"]

    def metrics(self, noise: Any, elbo: jax.Array, step: Any) -> dict[str, jax.Array]:
        r"""Named scalars of a noise and the mean ELBO under it, in nats.

        `spread_kl_bound` is at least KL(p~ || p~_theta) = -H(p~) - E log p~_theta, for -E log p~_theta <= -ELBO and
        spreading cannot make an image less uncertain than the noise is: H(p~) = H(p(y|x)) + I(x; y).
        """
        entropy = noise.entropy(jnp.zeros((1, *self.image_shape)))[0]
        return {"spread_kl_bound": -elbo - entropy, "noise_scale": self.scale(step), **self.range_metrics(noise)}

    def range_metrics(self, noise: Any) -> dict[str, jax.Array]:
        """The named scalars by which `check` tells that a learned covariance is in its range."""
        if self.kind != "low_rank":
            return {}
        # The entropy L adds, over what it adds with equal singular values, the least at its volume.
        x = jnp.zeros((1, *self.image_shape))
        added = noise.entropy(x)[0] - GaussianNoise(noise.scale).entropy(x)[0]
        equal = 0.5 * self.config.rank * jnp.log1p(jnp.square(self.config.factor_scale / noise.scale))
        return {"noise_entropy_ratio": added / equal}

    def check(self, step: int, metrics: dict[str, float]) -> None:
        """Stops a run whose learned covariance has left its range."""
        if self.kind == "low_rank":
            check_noise_range(step, metrics, {"noise_entropy_ratio": (0.99, self.config.max_noise_entropy_ratio)})

    def check_state(self, step: int, params: Any, state: Any) -> None:
        """Stops a run whose learned location may not be injective."""
        if self.kind == "transformed":
            try:
                check_invertible(self.transform, {"params": params, "spectral_stats": state})
            except ValueError as error:
                raise _launch.UsageError(f"After step {step}: {error}") from None


def check_noise_config(config: Any, pixels: int) -> None:
    """Refuses settings of the noise that cannot work, naming the flag."""
    _launch.require_at_least(
        config, 1, "noise_decay_every", "rank", "transform_features", "descent_steps", "max_noise_entropy_ratio"
    )
    _launch.require_at_least(config, 0, "ascent_steps")
    _launch.require_positive(config, "factor_scale", "noise_learning_rate")
    if not 0 < config.final_noise_scale <= config.noise_scale:
        raise _launch.UsageError(
            f"--final-noise-scale must be positive and at most --noise-scale, "
            f"got {config.final_noise_scale} and {config.noise_scale}."
        )
    for name in ("noise_decay", "transform_coefficient"):
        if not 0 < getattr(config, name) < 1:
            raise _launch.UsageError(
                f"--{name.replace('_', '-')} must be between 0 and 1, got {getattr(config, name)}."
            )
    if config.rank > pixels:
        raise _launch.UsageError(f"--rank must be at most {pixels}, the numbers in an image, got {config.rank}.")
