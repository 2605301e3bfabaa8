"""The whole of a run as one pytree, and the pure step that advances it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from spread_jax._pytree import frozen_pytree

__all__ = ["LossOutput", "TrainState", "create_train_state", "make_train_step"]

PyTree = Any


class LossOutput(NamedTuple):
    """What a loss returns beside its value.

    Attributes:
      model_state: the new non-trained variables (batch statistics), or None.
      metrics: named scalars to record.
    """

    model_state: PyTree
    metrics: Mapping[str, jax.Array]


@frozen_pytree
class TrainState:
    """Everything a run needs to go on exactly where it was.

    Attributes:
      step: int32 scalar, optimiser steps taken.
      params: trained parameters.
      model_state: variables the network updates itself, such as batch statistics; None if there are none.
      opt_state: Optax's state.
      ema: exponential moving average of a part of (params, model_state), see `make_train_step`.
      key: the run's random key; step t draws from fold_in(key, t).
    """

    step: jax.Array
    params: PyTree
    model_state: PyTree
    opt_state: optax.OptState
    ema: PyTree
    key: jax.Array


# loss(params, model_state, batch, *, key, step) -> (scalar, LossOutput)
Loss = Callable[..., tuple[jax.Array, LossOutput]]
Averaged = Callable[[PyTree, PyTree], PyTree]


def params_only(params: PyTree, model_state: PyTree) -> PyTree:
    """The part whose moving average is kept unless another is named."""
    del model_state
    return params


def moving_average(average: PyTree, new: PyTree, decay: float, step: jax.Array) -> PyTree:
    """The average moved towards `new`, with the decay min(decay, (1 + step) / (10 + step))."""
    decay = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda old, new: (decay * old + (1 - decay) * new).astype(old.dtype), average, new)


def create_train_state(
    params: PyTree,
    model_state: PyTree,
    optimizer: optax.GradientTransformation,
    *,
    key: jax.Array,
    averaged: Averaged = params_only,
) -> TrainState:
    """A state at step 0.

    Args:
      params: initial parameters.
      model_state: initial batch statistics or the like, or None.
      optimizer: an Optax transformation.
      key: the run's random key.
      averaged: (params, model_state) -> the part whose moving average is kept; the same function must go to
        `make_train_step`.

    Returns:
      A `TrainState` of step 0.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> state = create_train_state({"w": jnp.zeros(3)}, None, optax.sgd(0.1), key=jax.random.key(0))
      >>> int(state.step)
      0
    """
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        model_state=model_state,
        opt_state=optimizer.init(params),
        # A copy: the state is donated to the step, and one buffer cannot be donated twice.
        ema=jax.tree.map(jnp.copy, averaged(params, model_state)),
        key=key,
    )


def make_train_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    ema_decay: float = 0.999,
    averaged: Averaged = params_only,
) -> Callable[[TrainState, PyTree], tuple[TrainState, dict[str, jax.Array]]]:
    r"""The compiled step: gradient, Optax update, moving average; the state is donated.

    The average of step t uses the decay min(ema_decay, (1 + t) / (10 + t)), so that early samples do not
    show the initial parameters.

    Args:
      loss: loss(params, model_state, batch, *, key, step) -> (scalar, LossOutput). `step` is traced, so a
        schedule of it (a noise scale, say) changes without compiling again.
      optimizer: an Optax transformation.
      ema_decay: decay of the moving average, in [0, 1).
      averaged: (params, model_state) -> the part whose moving average is kept.

    Returns:
      step(state, batch) -> (state, metrics), jitted; the state passed in must not be used again. The metrics
      hold the loss's own and `loss` and `gradient_norm`.

    Raises:
      ValueError: `ema_decay` is outside [0, 1).

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> def loss(params, model_state, batch, *, key, step):
      ...     return jnp.square(params["w"] - batch).mean(), LossOutput(model_state, {})
      >>> state = create_train_state({"w": jnp.zeros(())}, None, optax.sgd(0.1), key=jax.random.key(0))
      >>> state, metrics = make_train_step(loss, optax.sgd(0.1))(state, jnp.ones(4))
      >>> int(state.step), float(metrics["loss"])
      (1, 1.0)
    """
    if not 0 <= ema_decay < 1:
        raise ValueError(f"ema_decay must be in [0, 1), got {ema_decay}.")

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state: TrainState, batch: PyTree) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(state.key, state.step)
        objective = functools.partial(loss, key=key, step=state.step)
        (value, output), gradient = jax.value_and_grad(objective, has_aux=True)(state.params, state.model_state, batch)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = moving_average(state.ema, averaged(params, output.model_state), ema_decay, state.step)
        metrics = {**output.metrics, "loss": value, "gradient_norm": optax.tree.norm(gradient)}
        new_state = TrainState(
            step=state.step + 1,
            params=params,
            model_state=output.model_state,
            opt_state=opt_state,
            ema=ema,
            key=state.key,
        )
        return new_state, metrics

    return train_step
