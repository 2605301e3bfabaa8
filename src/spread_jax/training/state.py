"""The whole of a run as one pytree, and the pure step that advances it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from spread_jax._checks import check_count
from spread_jax._pytree import frozen_pytree
from spread_jax._random import example_keys
from spread_jax.training.parallel import kept_in_place

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


def in_micro_batches(
    function: Callable[[PyTree, PyTree, jax.Array], tuple[PyTree, PyTree]],
    state: PyTree,
    batch: PyTree,
    *,
    key: jax.Array,
    accumulate: int,
    keys_per_example: bool,
) -> tuple[PyTree, PyTree]:
    """function(state, batch, key) -> (numbers, new state), over micro-batches one after another.

    Returns:
      (the numbers' means, the state after the last).
    """
    if accumulate == 1 and not keys_per_example:
        return function(state, batch, key)
    size = jax.tree.leaves(batch)[0].shape[0]
    if keys_per_example:
        key = example_keys(key, jnp.arange(size))
    if accumulate == 1:
        return function(state, batch, key)
    if size % accumulate:
        raise ValueError(f"accumulate must divide the batch size, got {accumulate} and {size} examples.")

    def split(leaf):
        # Micro-batch i holds the rows i, i + k, ...: each device has its share of every one, so that no row moves.
        return jnp.swapaxes(leaf.reshape(size // accumulate, accumulate, *leaf.shape[1:]), 0, 1)

    def one(carry, micro):
        total, state = carry
        numbers, state = function(state, *micro)
        return (jax.tree.map(jnp.add, total, numbers), state), None

    keys = split(key) if keys_per_example else jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(accumulate))
    batches = jax.tree.map(split, batch)
    first = jax.tree.map(lambda leaf: leaf[0], (batches, keys))
    numbers, _ = jax.eval_shape(function, state, *first)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), numbers)
    (total, state), _ = jax.lax.scan(one, (zeros, state), (batches, keys))
    return jax.tree.map(lambda leaf: leaf / accumulate, total), state


def with_gradient(objective: Callable) -> Callable:
    """objective(params, state, batch, key) -> (value, LossOutput), made to return what `in_micro_batches` averages."""

    def function(params, state, batch, key):
        (value, output), gradient = jax.value_and_grad(objective, has_aux=True)(params, state, batch, key)
        return (value, dict(output.metrics), gradient), output.model_state

    return function


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
    accumulate: int = 1,
    keys_per_example: bool = False,
    mesh: Mesh | None = None,
) -> Callable[[TrainState, PyTree], tuple[TrainState, dict[str, jax.Array]]]:
    r"""The compiled step: gradient, Optax update, moving average; the state is donated.

    The average of step t uses the decay min(ema_decay, (1 + t) / (10 + t)), so that early samples do not
    show the initial parameters.

    With `accumulate` = k the batch is cut into k micro-batches, one after another inside the step (a `lax.scan`),
    and their gradients are averaged: of the activations only those of a micro-batch are in memory. It is one step
    all the same, with one update, one move of the average and one count, where `optax.MultiSteps` would make k
    steps of it for schedules, keys and the average, and keep a gradient in the state. The mean over examples is
    that of the whole batch; what a loss computes from a set of examples, such as batch statistics or an MMD, it
    computes from each micro-batch, and running statistics move k times in a step.

    Args:
      loss: loss(params, model_state, batch, *, key, step) -> (scalar, LossOutput). `step` is traced, so a
        schedule of it (a noise scale, say) changes without compiling again.
      optimizer: an Optax transformation.
      ema_decay: decay of the moving average, in [0, 1).
      averaged: (params, model_state) -> the part whose moving average is kept.
      accumulate: k, micro-batches in a step; it divides the batch size.
      keys_per_example: give the loss `example_keys` instead of one key. A loss without batch statistics has then
        the same value and gradient with every k, and inside of `jax.pmap` and `jax.shard_map`.
      mesh: where `place_state` has put the state; it stays there. Not needed on one device.

    Returns:
      step(state, batch) -> (state, metrics), jitted; the state passed in must not be used again. The metrics
      hold the loss's own and `loss` and `gradient_norm`.

    Raises:
      TypeError: `accumulate` is no integer.
      ValueError: `ema_decay` is outside [0, 1), or `accumulate` below 1, or, at the first step, it does not divide
        the batch size.

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
    check_count("accumulate", accumulate)

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state: TrainState, batch: PyTree) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(state.key, state.step)
        objective = with_gradient(
            lambda params, model_state, batch, key: loss(params, model_state, batch, key=key, step=state.step)
        )
        (value, metrics, gradient), model_state = in_micro_batches(
            functools.partial(objective, state.params),
            state.model_state,
            batch,
            key=key,
            accumulate=accumulate,
            keys_per_example=keys_per_example,
        )
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = moving_average(state.ema, averaged(params, model_state), ema_decay, state.step)
        metrics = {**metrics, "loss": value, "gradient_norm": optax.tree.norm(gradient)}
        new_state = TrainState(
            step=state.step + 1,
            params=params,
            model_state=model_state,
            opt_state=opt_state,
            ema=ema,
            key=state.key,
        )
        return kept_in_place(new_state, mesh), metrics

    return train_step
