"""Players that train beside one another, each on its own loss: the state of a run and the pure step that advances it.

One player is ordinary training. Two are a game: a model against a critic or against a noise that learns to tell it
from the data. Players take turns in a fixed round, and whose turn it is depends on the step alone, so a run resumed in
the middle of a turn continues in it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from spread_jax._checks import at_least_float32, check_count
from spread_jax._pytree import frozen_pytree
from spread_jax._random import check_one_key, example_keys
from spread_jax.training.parallel import kept_in_place

__all__ = ["LossOutput", "Player", "Round", "TrainState", "create_train_state", "make_train_step"]

PyTree = Any


class LossOutput(NamedTuple):
    """What a loss returns beside its value.

    Attributes:
      variables: part -> its new variables (batch statistics, say), of those parts alone that have changed.
      metrics: named scalars to record.
    """

    variables: Mapping[str, PyTree]
    metrics: Mapping[str, jax.Array]


# loss(params, variables, batch, *, key, step) -> (scalar, LossOutput)
Loss = Callable[..., tuple[jax.Array, LossOutput]]
Averaged = Callable[[Mapping[str, PyTree], Mapping[str, PyTree]], PyTree]


class Player(NamedTuple):
    """One who trains: what it moves, what it minimises, how, and for how long in a round.

    Attributes:
      name: its key in the optimisers' states, and the first word of its metrics.
      moves: the parts of the parameters that its gradient is taken for.
      loss: loss(params, variables, batch, *, key, step) -> (scalar, LossOutput), always minimised; a player that
        maximises a divergence minimises minus it. It sees every part. `step` counts the steps of all players and is
        traced, so that a schedule of it does not compile again.
      optimizer: an Optax transformation of {part: parameters} of the parts it moves. It counts this player's steps.
      steps: its steps in each round.
      look_again: evaluate the loss once more after the update, on the same batch and key. The variables kept are then
        those of the new parameters, and the metric <name>_gain says by how much this turn has lowered the loss so far.
    """

    name: str
    moves: tuple[str, ...]
    loss: Loss
    optimizer: optax.GradientTransformation
    steps: int = 1
    look_again: bool = False


@dataclasses.dataclass(frozen=True)
class Round:
    """Whose turn it is: some steps of the first player, then of the second, and so on, and again.

    Args:
      steps: of each player, in their order. At least one of the first; a player with 0 never has a turn.

    Raises:
      TypeError: a number is no integer.
      ValueError: there is no player, the first has no step, or a number is negative.

    Source: Zhang et al., Spread Divergence, ICML 2020, CelebA experiment: noise for 1,000 steps every 10 epochs.

    Example:
      >>> turns = Round((3, 2))
      >>> [int(turns.player(step)) for step in range(7)]
      [0, 0, 0, 1, 1, 0, 0]
      >>> turns.own_steps(0, 7), turns.total_steps(4)
      (5, 6)
    """

    steps: tuple[int, ...]

    def __post_init__(self):
        if not self.steps:
            raise ValueError("steps must name the steps of at least one player, got none.")
        for player, steps in enumerate(self.steps):
            if player == 0 or steps != 0:
                check_count(f"steps[{player}]", steps)

    @property
    def length(self) -> int:
        """Steps of a round."""
        return sum(self.steps)

    def player(self, step: jax.Array | int) -> jax.Array | int:
        """The index of the player who takes the step after `step` steps."""
        place, ends = step % self.length, self._ends()
        return sum(_number(place >= end) for end in ends[:-1])

    def begins_turn(self, player: int, step: jax.Array | int) -> jax.Array | bool:
        """Whether that step is the first of a turn of this player's."""
        return (step % self.length == self._ends()[player] - self.steps[player]) & (self.steps[player] > 0)

    def own_steps(self, player: int, step: jax.Array | int) -> jax.Array | int:
        """How many of the first `step` steps are this player's."""
        own, past = self.steps[player], step % self.length - (self._ends()[player] - self.steps[player])
        within = past * _number(past > 0) - (past - own) * _number(past > own)
        return step // self.length * own + within

    def total_steps(self, own: int) -> int:
        """The steps of all players in which the first takes `own`, the last of them its own."""
        return own + (own - 1) // self.steps[0] * (self.length - self.steps[0])

    def _ends(self) -> tuple[int, ...]:
        return tuple(sum(self.steps[: player + 1]) for player in range(len(self.steps)))


@frozen_pytree
class TrainState:
    """Everything a run needs to go on exactly where it was.

    Attributes:
      step: int32 scalar, steps of all players.
      params: part -> trained parameters.
      variables: part -> what it updates itself, such as batch statistics.
      opt_state: player -> Optax's state.
      gain: player -> float32 scalar, of those who look again: by how much the turn in progress, or the last one, has
        lowered their loss: the sum of its steps' differences, each before and after on one batch and key.
      ema: exponential moving average of a part of (params, variables), see `make_train_step`.
      key: the run's random key; step t draws from fold_in(key, t).
    """

    step: jax.Array
    params: dict[str, PyTree]
    variables: dict[str, PyTree]
    opt_state: dict[str, optax.OptState]
    gain: dict[str, jax.Array]
    ema: PyTree
    key: jax.Array


def params_only(params: PyTree, variables: PyTree) -> PyTree:
    """What the moving average is of, unless something else is named."""
    del variables
    return params


def create_train_state(
    params: Mapping[str, PyTree],
    variables: Mapping[str, PyTree],
    players: Sequence[Player],
    *,
    key: jax.Array,
    averaged: Averaged = params_only,
) -> TrainState:
    """A state at step 0.

    Args:
      params: part -> initial parameters.
      variables: part -> initial batch statistics or the like; {} if there are none.
      players: who trains.
      key: the run's random key.
      averaged: (params, variables) -> what the moving average is kept of; the same function must go to
        `make_train_step`.

    Returns:
      A `TrainState` of step 0.

    Raises:
      TypeError: `params` is no mapping.
      ValueError: two players have one name, or one moves a part that `params` lacks.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> player = Player("model", ("w",), lambda *args, **options: None, optax.sgd(0.1))
      >>> int(create_train_state({"w": jnp.zeros(3)}, {}, [player], key=jax.random.key(0)).step)
      0
    """
    players = check_players(players)
    for player in players:
        _check_parts(player, params)
    params, variables = dict(params), dict(variables)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        variables=variables,
        opt_state={p.name: p.optimizer.init({part: params[part] for part in p.moves}) for p in players},
        gain={p.name: jnp.zeros((), jnp.float32) for p in players if p.look_again},
        # A copy: the state is donated to the step, and one buffer cannot be donated twice.
        ema=jax.tree.map(jnp.copy, averaged(params, variables)),
        key=check_one_key(key),
    )


def make_train_step(
    players: Sequence[Player],
    *,
    ema_decay: float = 0.999,
    averaged: Averaged = params_only,
    accumulate: int = 1,
    keys_per_example: bool = False,
    mesh: Mesh | None = None,
) -> Callable[[TrainState, PyTree], tuple[TrainState, dict[str, jax.Array]]]:
    r"""The step of whoever's turn it is: gradient, Optax update, moving average; the state is donated.

    Each player has a compiled program of its own: one program with both branches would be 4 times slower on a CPU.
    The moving average follows the first player. That of step t uses the decay min(ema_decay, (1 + t) / (10 + t)), so
    that early samples do not show the initial parameters.

    With `accumulate` = k the batch is cut into k micro-batches, one after another inside the step (a `lax.scan`),
    and their gradients are averaged: of the activations only those of a micro-batch are in memory. It is one step
    all the same, with one update, one move of the average and one count, where `optax.MultiSteps` would make k
    steps of it for schedules, keys and the average, and keep a gradient in the state. The mean over examples is
    that of the whole batch; what a loss computes from a set of examples, such as batch statistics or an MMD, it
    computes from each micro-batch, and running statistics move k times in a step.

    Args:
      players: who trains, in the order of their turns; the first is the model.
      ema_decay: decay of the moving average, in [0, 1).
      averaged: (params, variables) -> what the moving average is kept of.
      accumulate: k, micro-batches in a step; it divides the batch size.
      keys_per_example: give the losses `example_keys` instead of one key. A loss without batch statistics has then
        the same value and gradient with every k, and inside of `jax.pmap` and `jax.shard_map`.
      mesh: where `place_state` has put the state; it stays there. Not needed on one device.

    Returns:
      step(state, batch) -> (state, metrics), compiled; the state passed in must not be used again. The metrics are
      those of the player whose turn it was, and its <name>_loss (before the update), <name>_gradient_norm and, where
      it looks again, <name>_gain (see `TrainState.gain`).

    Raises:
      TypeError: `accumulate` is no integer.
      ValueError: `ema_decay` is outside [0, 1), `accumulate` is below 1, two players have one name, or the first has
        no step in the round; at a first step, `accumulate` does not divide the batch size, or a player moves a part
        that does not exist.

    Source: Zhang et al., Spread Divergence, ICML 2020, section on maximising the spread.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> def gap(params, variables, batch, *, key, step):
      ...     return jnp.square(params["w"] - batch).mean() * jnp.exp(params["s"]), LossOutput({}, {})
      >>> def minus_gap(*args, **options):
      ...     value, output = gap(*args, **options)
      ...     return -value, output
      >>> players = (
      ...     Player("model", ("w",), gap, optax.sgd(0.1)),
      ...     Player("noise", ("s",), minus_gap, optax.sgd(0.1), look_again=True),
      ... )
      >>> params = {"w": jnp.zeros(()), "s": jnp.zeros(())}
      >>> state = create_train_state(params, {}, players, key=jax.random.key(0))
      >>> step = make_train_step(players)
      >>> state, first = step(state, jnp.ones(4))
      >>> state, second = step(state, jnp.ones(4))
      >>> float(first["model_loss"]), bool(second["noise_gain"] > 0)
      (1.0, True)
    """
    players = check_players(players)
    turns = Round(tuple(player.steps for player in players))
    if not 0 <= ema_decay < 1:
        raise ValueError(f"ema_decay must be in [0, 1), got {ema_decay}.")
    check_count("accumulate", accumulate)
    over = functools.partial(in_micro_batches, accumulate=accumulate, keys_per_example=keys_per_example)

    def program(index: int, player: Player):
        def advance(state: TrainState, batch: PyTree) -> tuple[TrainState, dict[str, jax.Array]]:
            _check_parts(player, state.params)
            key = jax.random.fold_in(state.key, state.step)

            def objective(moved, variables, batch, key):
                value, output = player.loss({**state.params, **moved}, variables, batch, key=key, step=state.step)
                return value, output._replace(variables={**variables, **(output.variables or {})})

            def with_gradient(moved, variables, batch, key):
                (value, output), gradient = jax.value_and_grad(objective, has_aux=True)(moved, variables, batch, key)
                return (value, dict(output.metrics), gradient), output.variables

            own = {part: state.params[part] for part in player.moves}
            (value, metrics, gradient), variables = over(
                functools.partial(with_gradient, own), state.variables, batch, key=key
            )
            with jax.numpy_dtype_promotion("standard"):  # Adam takes a float to the power of its integer count
                updates, opt_state = player.optimizer.update(gradient, state.opt_state[player.name], own)
            moved = optax.apply_updates(own, updates)
            gain = state.gain
            if player.look_again:

                def again(variables, batch, key):
                    value, output = objective(moved, variables, batch, key)
                    return value, output.variables

                after, variables = over(again, state.variables, batch, key=key)
                before = jnp.where(turns.begins_turn(index, state.step), 0.0, gain[player.name])
                gain = {**gain, player.name: before + (value - after).astype(before.dtype)}
                metrics |= {f"{player.name}_gain": gain[player.name]}
            params = {**state.params, **moved}
            ema = state.ema
            if index == 0:
                ema = moving_average(ema, averaged(params, variables), ema_decay, state.step)
            metrics |= {
                f"{player.name}_loss": value,
                f"{player.name}_gradient_norm": optax.tree.norm(gradient),
            }
            new = dataclasses.replace(
                state,
                step=state.step + 1,
                params=params,
                variables=variables,
                opt_state={**state.opt_state, player.name: opt_state},
                gain=gain,
                ema=ema,
            )
            return kept_in_place(new, mesh), metrics

        return jax.jit(advance, donate_argnums=0)

    programs = [program(index, player) for index, player in enumerate(players)]
    if len(players) == 1:
        return programs[0]
    known: tuple[Any, int] = (None, 0)  # the step array returned last, and its value

    def train_step(state: TrainState, batch: PyTree) -> tuple[TrainState, dict[str, jax.Array]]:
        nonlocal known
        # Read from the device for a state from elsewhere only: waiting for every step would stall dispatch.
        array, count = known
        count = count if state.step is array else int(state.step)
        new, metrics = programs[turns.player(count)](state, batch)
        known = new.step, count + 1
        return new, metrics

    return train_step


def check_players(players: Sequence[Player]) -> tuple[Player, ...]:
    """The players as a tuple, after a look at their names and types."""
    players = tuple(players)
    for player in players:
        if not isinstance(player, Player):
            raise TypeError(f"players must be Player values, got {type(player).__name__}.")
    names = [player.name for player in players]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"Two players are named {name!r}: each needs a name of its own, under which its optimizer's state is "
                "kept."
            )
    return players


def _check_parts(player: Player, params: Mapping[str, PyTree]) -> None:
    if not isinstance(params, Mapping):
        raise TypeError(f"params must map the names of parts to their parameters, got {type(params).__name__}.")
    for part in player.moves:
        if part not in params:
            raise ValueError(
                f"Player {player.name!r} moves {part!r}, and the parameters have no such part: there are "
                f"{', '.join(map(repr, params)) or 'none'}."
            )


def _number(condition):
    """1 or 0, of a Python or NumPy or JAX boolean: also where JAX is told to promote no dtypes."""
    return condition.astype(int) if hasattr(condition, "astype") else int(condition)


def moving_average(average: PyTree, new: PyTree, decay: float, step: jax.Array) -> PyTree:
    """The average moved towards `new`, with the decay min(decay, (1 + step) / (10 + step))."""
    step = jnp.asarray(step, jnp.float32)
    decay = jnp.minimum(decay, (1.0 + step) / (10.0 + step))

    def moved(old, new):
        wide, wide_new = at_least_float32(old), at_least_float32(new)
        share = decay.astype(wide.dtype)
        return (share * wide + (1 - share) * wide_new).astype(old.dtype)

    return jax.tree.map(moved, average, new)


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
