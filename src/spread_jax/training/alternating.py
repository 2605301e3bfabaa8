"""Two players in one pure step: the model descends on its loss, the noise ascends on the divergence."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from spread_jax._checks import check_count
from spread_jax._pytree import frozen_pytree
from spread_jax.training.parallel import kept_in_place
from spread_jax.training.state import Averaged, LossOutput, in_micro_batches, moving_average, params_only, with_gradient

__all__ = [
    "AlternatingState",
    "AscentSchedule",
    "NoiseCollapseError",
    "check_noise_range",
    "create_alternating_state",
    "make_alternating_step",
]

PyTree = Any

# objective(params, noise_params, model_state, noise_state, batch, *, key, step) -> (scalar, LossOutput)
Objective = Callable[..., tuple[jax.Array, LossOutput]]


@dataclasses.dataclass(frozen=True)
class AscentSchedule:
    """Whose turn it is: `descent_steps` of the model, `ascent_steps` of the noise, and again.

    The phase is a function of the step alone, so a run resumed in the middle of a phase goes on in it. Both
    the published schedule (1000 ascent steps every 10 epochs) and a ratio n:m of single steps are of this form.

    Args:
      descent_steps: steps of the model in each period.
      ascent_steps: steps of the noise that follow them; 0 keeps the noise fixed.

    Raises:
      TypeError: a number is no integer.
      ValueError: `descent_steps` is below 1 or `ascent_steps` below 0.

    Source: Zhang et al., Spread Divergence, ICML 2020, CelebA experiment.

    Example:
      >>> schedule = AscentSchedule(descent_steps=3, ascent_steps=2)
      >>> [bool(schedule.ascending(step)) for step in range(7)]
      [False, False, False, True, True, False, False]
    """

    descent_steps: int
    ascent_steps: int

    def __post_init__(self):
        check_count("descent_steps", self.descent_steps)
        if self.ascent_steps != 0:
            check_count("ascent_steps", self.ascent_steps)

    def ascending(self, step: jax.Array | int) -> jax.Array | bool:
        """Whether the step after `step` steps is the noise's."""
        return self._place(step) >= self.descent_steps

    def begins_ascent(self, step: jax.Array | int) -> jax.Array | bool:
        """Whether that step is the first of its ascent."""
        return (self._place(step) == self.descent_steps) & (self.ascent_steps > 0)

    def descents(self, step: jax.Array | int) -> jax.Array | int:
        """How many of the first `step` steps are the model's."""
        period = self.descent_steps + self.ascent_steps
        place = self._place(step)
        surplus = (place - self.descent_steps) * (place > self.descent_steps)
        return step // period * self.descent_steps + place - surplus

    def steps_for(self, descents: int) -> int:
        """The steps of both players in which the model takes `descents`, the last of them its own."""
        return descents + (descents - 1) // self.descent_steps * self.ascent_steps

    def _place(self, step):
        return step % (self.descent_steps + self.ascent_steps)


@frozen_pytree
class AlternatingState:
    """Everything an alternating run needs to go on exactly where it was.

    Attributes:
      step: int32 scalar, steps of both players.
      params: the model's parameters.
      model_state: variables the model updates itself, such as batch statistics; None if there are none.
      opt_state: Optax's state for the model; it counts the model's steps only.
      noise_params: the noise's parameters.
      noise_state: variables the noise updates itself, such as the vectors of a power iteration, or None.
      noise_opt_state: Optax's state for the noise; it counts the noise's steps only.
      rise: float32 scalar, what the ascent in progress, or the last one, has added to the divergence: the sum of
        its steps' differences, each before and after on one batch and key.
      ema: exponential moving average of a part of (params, model_state).
      key: the run's random key; step t draws from fold_in(key, t).
    """

    step: jax.Array
    params: PyTree
    model_state: PyTree
    opt_state: optax.OptState
    noise_params: PyTree
    noise_state: PyTree
    noise_opt_state: optax.OptState
    rise: jax.Array
    ema: PyTree
    key: jax.Array


def create_alternating_state(
    params: PyTree,
    model_state: PyTree,
    optimizer: optax.GradientTransformation,
    noise_params: PyTree,
    noise_state: PyTree,
    noise_optimizer: optax.GradientTransformation,
    *,
    key: jax.Array,
    averaged: Averaged = params_only,
) -> AlternatingState:
    """A state at step 0.

    Args:
      params: the model's initial parameters.
      model_state: its initial batch statistics or the like, or None.
      optimizer: an Optax transformation for the model.
      noise_params: the noise's initial parameters.
      noise_state: its initial variables, or None.
      noise_optimizer: an Optax transformation for the noise.
      key: the run's random key.
      averaged: (params, model_state) -> the part whose moving average is kept; the same function must go to
        `make_alternating_step`.

    Returns:
      An `AlternatingState` of step 0.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> sgd, key = optax.sgd(0.1), jax.random.key(0)
      >>> state = create_alternating_state({"w": jnp.zeros(3)}, None, sgd, {"l": jnp.ones(3)}, None, sgd, key=key)
      >>> int(state.step)
      0
    """
    return AlternatingState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        model_state=model_state,
        opt_state=optimizer.init(params),
        noise_params=noise_params,
        noise_state=noise_state,
        noise_opt_state=noise_optimizer.init(noise_params),
        rise=jnp.zeros((), jnp.float32),
        # A copy: the state is donated to the step, and one buffer cannot be donated twice.
        ema=jax.tree.map(jnp.copy, averaged(params, model_state)),
        key=key,
    )


def make_alternating_step(
    loss: Objective,
    divergence: Objective,
    optimizer: optax.GradientTransformation,
    noise_optimizer: optax.GradientTransformation,
    schedule: AscentSchedule,
    *,
    ema_decay: float = 0.999,
    averaged: Averaged = params_only,
    accumulate: int = 1,
    keys_per_example: bool = False,
    mesh: Mesh | None = None,
) -> Callable[[AlternatingState, PyTree], tuple[AlternatingState, dict[str, jax.Array]]]:
    r"""The compiled step of min over theta, max over psi of a spread divergence; the state is donated.

    In the model's phase theta descends on `loss` and psi is left alone; in the noise's phase psi ascends on
    `divergence`, which is evaluated once more after the update to tell by how much it rose. Each player has a
    compiled program of its own, chosen by the step in the state. (One program with a `lax.cond` inside took 4.4
    times as long a step on a CPU, with the 28x28 networks: convolutions in a conditional leave XLA's fast path.)

    Both objectives have the form

      objective(params, noise_params, model_state, noise_state, batch, *, key, step) -> (scalar, LossOutput)

    Args:
      loss: minimised over `params`; its LossOutput holds the new model_state.
      divergence: maximised over `noise_params`; its LossOutput holds, as model_state, the new noise_state, which
        is taken from the evaluation after the update. It must rest on a constraint, for noise without one
        vanishes: see `LowRankGaussianNoise.with_volume` and `spread_jax.nn.InvertibleResidual`. If it is an upper
        bound that rests on an encoder, as one from `spread_elbo` does, keep ascents short or slow: the encoder
        learns in the model's steps only, and a long ascent raises the bound's slack more than the divergence.
      optimizer: an Optax transformation for the model.
      noise_optimizer: an Optax transformation for the noise, as for a descent.
      schedule: whose turn it is.
      ema_decay: decay of the model's moving average, in [0, 1), as in `make_train_step`.
      averaged: (params, model_state) -> the part whose moving average is kept.
      accumulate: micro-batches in a step of either player, as in `make_train_step`.
      keys_per_example: give both objectives one key for each example, as in `make_train_step`.
      mesh: where `place_state` has put the state, as in `make_train_step`.

    Returns:
      step(state, batch) -> (state, metrics), compiled; the state passed in must not be used again. The metrics
      hold those of the objective whose turn it was, which must have the same names in both, and
      `objective` (its value before the update), `gradient_norm`, `ascending` (0 or 1) and `divergence_rise`
      (see `AlternatingState.rise`).

    Raises:
      TypeError: `accumulate` is no integer.
      ValueError: `ema_decay` is outside [0, 1), or `accumulate` below 1, or, at the first step, it does not divide
        the batch size or the metrics' names differ.

    Source: Zhang et al., Spread Divergence, ICML 2020, section on maximising the spread.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> def loss(params, noise_params, model_state, noise_state, batch, *, key, step):
      ...     return jnp.square(params - batch).mean() * jnp.exp(noise_params), LossOutput(None, {})
      >>> sgd, key = optax.sgd(0.1), jax.random.key(0)
      >>> state = create_alternating_state(jnp.zeros(()), None, sgd, jnp.zeros(()), None, sgd, key=key)
      >>> step = make_alternating_step(loss, loss, sgd, sgd, AscentSchedule(descent_steps=1, ascent_steps=1))
      >>> state, first = step(state, jnp.ones(4))
      >>> state, second = step(state, jnp.ones(4))
      >>> float(first["ascending"]), float(second["ascending"]), bool(second["divergence_rise"] > 0)
      (0.0, 1.0, True)
    """
    if not 0 <= ema_decay < 1:
        raise ValueError(f"ema_decay must be in [0, 1), got {ema_decay}.")
    check_count("accumulate", accumulate)
    over = functools.partial(in_micro_batches, accumulate=accumulate, keys_per_example=keys_per_example)

    def descend(state, batch):
        key = jax.random.fold_in(state.key, state.step)

        def objective(params, model_state, batch, key):
            return loss(params, state.noise_params, model_state, state.noise_state, batch, key=key, step=state.step)

        one = functools.partial(with_gradient(objective), state.params)
        (value, metrics, gradient), model_state = over(one, state.model_state, batch, key=key)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = moving_average(state.ema, averaged(params, model_state), ema_decay, state.step)
        new = dataclasses.replace(
            state, params=params, model_state=model_state, opt_state=opt_state, ema=ema, step=state.step + 1
        )
        return kept_in_place(new, mesh), _metrics(metrics, value, gradient, new.rise)

    def ascend(state, batch):
        key = jax.random.fold_in(state.key, state.step)

        def objective(noise_params, noise_state, batch, key):
            return divergence(
                state.params, noise_params, state.model_state, noise_state, batch, key=key, step=state.step
            )

        one = functools.partial(with_gradient(objective), state.noise_params)
        (value, metrics, gradient), _ = over(one, state.noise_state, batch, key=key)
        downhill = jax.tree.map(jnp.negative, gradient)
        updates, opt_state = noise_optimizer.update(downhill, state.noise_opt_state, state.noise_params)
        noise_params = optax.apply_updates(state.noise_params, updates)

        def again(noise_state, batch, key):
            after, output = objective(noise_params, noise_state, batch, key)
            return after, output.model_state

        after, noise_state = over(again, state.noise_state, batch, key=key)
        gained = (after - value).astype(state.rise.dtype)
        new = dataclasses.replace(
            state,
            noise_params=noise_params,
            noise_state=noise_state,  # of the new parameters
            noise_opt_state=opt_state,
            rise=jnp.where(schedule.begins_ascent(state.step), 0.0, state.rise) + gained,
            step=state.step + 1,
        )
        return kept_in_place(new, mesh), _metrics(metrics, value, gradient, new.rise)

    players = {False: jax.jit(descend, donate_argnums=0), True: jax.jit(ascend, donate_argnums=0)}
    checked = schedule.ascent_steps == 0
    known: tuple[Any, int] = (None, 0)  # the step array returned last, and its value

    def alternating_step(state: AlternatingState, batch: PyTree) -> tuple[AlternatingState, dict[str, jax.Array]]:
        nonlocal checked, known
        if not checked:
            names = [set(jax.eval_shape(player, state, batch)[1]) for player in (descend, ascend)]
            if names[0] != names[1]:
                raise ValueError(
                    f"loss and divergence must return metrics of the same names; only one of them has "
                    f"{', '.join(sorted(names[0] ^ names[1]))}."
                )
            checked = True
        # Read from the device for a state from elsewhere only: waiting for every step would stall dispatch.
        array, count = known
        count = count if state.step is array else int(state.step)
        ascending = bool(schedule.ascending(count))
        new, metrics = players[ascending](state, batch)
        known = new.step, count + 1
        return new, {**metrics, "ascending": np.float32(ascending)}

    return alternating_step


def _metrics(metrics, value, gradient, rise):
    return {
        **metrics,
        "objective": value,
        "gradient_norm": optax.tree.norm(gradient),
        "divergence_rise": rise,
    }


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
      metrics: named numbers, such as those of a `StepRecord`.
      limits: metric name -> (lowest, highest) value allowed, such as that of the noise's entropy, its volume or
        the Lipschitz bound of its transform.

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
