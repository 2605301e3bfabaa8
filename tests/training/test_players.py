"""Players against finite differences and hand-written steps; whose turn it is; exact resume; what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spread_jax import LowRankGaussianNoise, NoiseCollapseError, check_noise_range, spread_elbo
from spread_jax.training import Checkpointer, LossOutput, Player, Round, create_train_state, make_train_step, train
from spread_jax.training.players import in_micro_batches

X, Z, R = 5, 2, 2
SEED = 3


def initial(dtype=np.float32):
    rng = np.random.default_rng(0)
    array = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    params = {"networks": {"encode": array(X, Z), "log_std": array(Z), "decode": array(Z, X)}}
    return {**params, "noise": {"factor": array(X, R)}}, array(8, X)


def terms_of(params, batch, key):
    """The bound of a linear model under noise of fixed volume."""
    noise = LowRankGaussianNoise(0.7, params["noise"]["factor"]).with_volume(2.0)
    networks = params["networks"]
    encode = lambda y: (y @ networks["encode"] / X, jnp.broadcast_to(networks["log_std"], (len(y), Z)))
    terms = spread_elbo(batch, encode, lambda z: z @ networks["decode"], noise, key=key)
    return terms.elbo.mean(), noise.entropy(batch).mean()


def loss(params, variables, batch, *, key, step):
    elbo, entropy = terms_of(params, batch, key)
    return -elbo, LossOutput({"networks": variables["networks"] + 1}, {"noise_entropy": entropy, "step_seen": step})


def minus_divergence(params, variables, batch, *, key, step):
    elbo, entropy = terms_of(params, batch, key)
    return elbo + entropy, LossOutput({"noise": variables["noise"] + 1}, {"ascent_seen": step})


def pair(optimizer, noise_optimizer=None, steps=(1, 1), losses=(loss, minus_divergence)):
    model = Player("model", ("networks",), losses[0], optimizer, steps=steps[0])
    noise = Player("noise", ("noise",), losses[1], noise_optimizer or optimizer, steps=steps[1], look_again=True)
    return model, noise


def start(players, dtype=np.float32):
    params, batch = initial(dtype)
    variables = {"networks": jnp.zeros(()), "noise": jnp.zeros(())}
    return create_train_state(params, variables, players, key=jax.random.key(SEED)), batch


def copied(tree):
    return jax.tree.map(jnp.copy, tree)


def plain(state):
    """The state's leaves as NumPy arrays."""
    return [
        np.asarray(leaf) for leaf in jax.tree.leaves(dataclasses.replace(state, key=jax.random.key_data(state.key)))
    ]


def test_the_turn_is_a_function_of_the_step():
    turns = Round((3, 2, 0, 1))
    want = [0, 0, 0, 1, 1, 3] * 2
    assert [int(turns.player(step)) for step in range(12)] == want
    np.testing.assert_array_equal(jax.jit(jax.vmap(turns.player))(jnp.arange(12)), want)
    for player in range(4):
        own = np.cumsum([0, *(turn == player for turn in want)])
        np.testing.assert_array_equal(jax.vmap(functools.partial(turns.own_steps, player))(jnp.arange(13)), own)
        assert [turns.own_steps(player, step) for step in range(13)] == own.tolist()
        begins = [turn == player and (step == 0 or want[step - 1] != player) for step, turn in enumerate(want)]
        assert [bool(turns.begins_turn(player, step)) for step in range(12)] == begins
    for own in range(1, 8):
        steps = turns.total_steps(own)
        assert (turns.own_steps(0, steps), turns.own_steps(0, steps - 1)) == (own, own - 1)
    alone = Round((3,))
    assert (alone.own_steps(0, 7), alone.total_steps(7), alone.player(7)) == (7, 7, 0)
    for steps, message in (
        ((0, 2), r"steps\[0\] must be at least 1"),
        ((1, -1), r"steps\[1\] must be"),
        ((), "got none"),
    ):
        with pytest.raises(ValueError, match=message):
            Round(steps)


def test_a_step_is_gradient_descent_with_a_moving_average():
    """One player, by hand: least squares with noise from the key, in one program that donates its state."""

    def square(params, variables, batch, *, key, step):
        value = jnp.square(params["w"] - batch - 0.1 * jax.random.normal(key, batch.shape)).mean()
        return value, LossOutput({"seen": variables["seen"] + 1}, {"step_seen": step})

    player = Player("model", ("w",), square, optax.sgd(0.1))
    w = np.array([1.0, -2.0])
    params, average = {"w": jnp.asarray(w, jnp.float32), "still": jnp.ones(())}, w.copy()
    averaged = lambda params, variables: params["w"]
    state = create_train_state(params, {"seen": jnp.zeros(())}, [player], key=jax.random.key(7), averaged=averaged)
    step = make_train_step([player], ema_decay=0.9, averaged=averaged)
    first = state.params["w"]
    for t in range(5):
        batch = np.full(2, float(t))
        gradient = w - batch - 0.1 * np.asarray(jax.random.normal(jax.random.fold_in(jax.random.key(7), t), (2,)))
        state, metrics = step(state, jnp.asarray(batch, jnp.float32))
        np.testing.assert_allclose(metrics["model_gradient_norm"], np.linalg.norm(gradient), rtol=1e-5)
        np.testing.assert_allclose(metrics["model_loss"], np.square(gradient).mean(), rtol=1e-5)
        assert int(metrics["step_seen"]) == t
        w = w - 0.1 * gradient
        decay = min(0.9, (1 + t) / (10 + t))
        average = decay * average + (1 - decay) * w
        np.testing.assert_allclose(state.params["w"], w, rtol=1e-5)
        np.testing.assert_allclose(state.ema, average, rtol=1e-5)
    assert (int(state.step), float(state.variables["seen"]), float(state.params["still"])) == (5, 5.0, 1.0)
    assert step._cache_size() == 1
    assert first.is_deleted()


def test_each_player_follows_its_own_gradient(x64):
    """A step of plain gradient descent of size 1 is the gradient; both against finite differences."""
    players = pair(optax.sgd(1.0))
    state, batch = start(players, dtype=np.float64)
    step = make_train_step(players)
    before = copied(state)
    model_step, first = step(state, batch)
    after_model = copied(model_step)
    noise_step, second = step(model_step, batch)

    value = jax.jit(lambda params, key: terms_of(params, batch, key))

    def slope(function, params, part, direction):
        moved = lambda t: function({**params, part: jax.tree.map(lambda v, d: v + t * d, params[part], direction)})
        return (moved(1e-6) - moved(-1e-6)) / 2e-6

    def inner(a, b):
        return sum(jax.tree.leaves(jax.tree.map(lambda x, y: (x * y).sum(), a, b)))

    rng = np.random.default_rng(5)
    at = lambda t: jax.random.fold_in(jax.random.key(SEED), t)
    losses = {
        "networks": (before, after_model, lambda params: -value(params, at(0))[0]),
        "noise": (after_model, noise_step, lambda params: sum(value(params, at(1)))),
    }
    for part, (old, new, function) in losses.items():
        for _ in range(3):
            direction = jax.tree.map(lambda v: rng.normal(size=v.shape), old.params[part])
            update = jax.tree.map(jnp.subtract, new.params[part], old.params[part])
            want = slope(function, old.params, part, direction)
            np.testing.assert_allclose(inner(update, direction), -want, rtol=1e-6)
            assert abs(want) > 1e-3

    # Who was not on turn has not moved, nor have its variables, its optimiser or the average.
    same = functools.partial(jax.tree.map, np.testing.assert_array_equal)
    for old, new, part, player in (
        (before, after_model, "noise", "noise"),
        (after_model, noise_step, "networks", "model"),
    ):
        same(old.params[part], new.params[part])
        same(old.variables[part], new.variables[part])
        same(old.opt_state[player], new.opt_state[player])
    same(after_model.ema, noise_step.ema)
    assert [float(noise_step.variables[part]) for part in ("networks", "noise")] == [1.0, 1.0]
    np.testing.assert_allclose(first["model_loss"], -value(before.params, at(0))[0], rtol=1e-12)
    assert set(first) & set(second) == set()


def test_who_looks_again_says_how_far_its_turn_has_come():
    """One key, the whole batch, a small learning rate: every step of the noise lowers its loss."""

    fixed = lambda *args, key, step: minus_divergence(*args, key=jax.random.key(SEED), step=step)
    players = pair(optax.sgd(1e-2), steps=(1, 30), losses=(loss, fixed))
    state, batch = start(players)
    step = make_train_step(players)
    state, _ = step(state, batch)
    metrics = []
    for _ in range(30):
        state, row = step(state, batch)
        metrics.append(row)
    # Read only now: what a step returned is not donated to the next.
    values = np.array([row["noise_loss"] for row in metrics])
    assert (np.diff(values) < 0).all()
    assert values[0] - values[-1] > 0.05
    gains = np.array([row["noise_gain"] for row in metrics])
    np.testing.assert_allclose(gains[:-1], values[0] - values[1:], atol=1e-4)
    # It holds through the model's turn that follows, and starts again with the next of its own.
    state, row = step(state, batch)
    assert float(state.gain["noise"]) == gains[-1]
    state, row = step(state, batch)
    assert float(row["noise_gain"]) < 0.5 * gains[-1]


def test_who_looks_again_keeps_the_statistics_of_the_second_look():
    """Those of the parameters as they are now, from what was before the step: counted once."""

    def loss(params, variables, batch, *, key, step):
        value = 0.5 * jnp.square(params["a"] - batch.mean())
        return value, LossOutput({"seen": params["a"], "looks": variables["looks"] + 1}, {})

    players = [Player("model", ("a",), loss, optax.sgd(0.25), look_again=True)]
    variables = {"seen": jnp.float32(0), "looks": jnp.float32(0)}
    state = create_train_state({"a": jnp.float32(1)}, variables, players, key=jax.random.key(0))
    state, metrics = make_train_step(players)(state, jnp.full(3, 4.0))
    assert {name: float(value) for name, value in state.variables.items()} == {"seen": 1.75, "looks": 1}
    assert float(metrics["model_gain"]) == 0.5 * (3**2 - 2.25**2)


def test_three_players_take_turns_on_losses_of_their_own():
    """A quadratic each: x follows y, y follows z, z the batch; by hand."""
    follow = lambda a, b: lambda params, variables, batch, **_: (
        0.5 * jnp.square(params[a] - (params[b] if b else batch.mean())), LossOutput({}, {f"{a}_seen": params[a]})
    )  # fmt: skip
    players = [
        Player(part, (part,), follow(part, other), optax.sgd(0.5), steps=steps)
        for part, other, steps in (("x", "y", 1), ("y", "z", 2), ("z", None, 1))
    ]
    values = {"x": 0.0, "y": 1.0, "z": 2.0}
    state = create_train_state({k: jnp.asarray(v) for k, v in values.items()}, {}, players, key=jax.random.key(0))
    step = make_train_step(players)
    for turn in "xyyzxyyz":
        state, metrics = step(state, jnp.full(3, 4.0))
        assert float(metrics[f"{turn}_seen"]) == values[turn]
        target = {"x": values["y"], "y": values["z"], "z": 4.0}[turn]
        values[turn] += 0.5 * (target - values[turn])
        assert {part: float(value) for part, value in state.params.items()} == values
    assert set(state.opt_state) == {"x", "y", "z"}
    assert state.gain == {}
    # The average is the first player's: it moved in the two steps of x alone.
    assert {part: float(value) for part, value in state.ema.items()} != values


def test_a_player_without_turns_changes_nothing():
    adam = optax.adam(1e-2)
    players = pair(adam, steps=(1, 0))
    state, batch = start(players)
    step = make_train_step(players, ema_decay=0.9)
    params, _ = initial()
    networks, noise = params["networks"], params["noise"]
    opt_state = adam.init({"networks": networks})

    @jax.jit
    def reference(networks, opt_state, key):
        value = lambda part: -terms_of({**part, "noise": noise}, batch, key)[0]
        updates, opt_state = adam.update(jax.grad(value)({"networks": networks}), opt_state)
        return optax.apply_updates({"networks": networks}, updates)["networks"], opt_state

    for t in range(3):
        state, metrics = step(state, batch)
        networks, opt_state = reference(networks, opt_state, jax.random.fold_in(jax.random.key(SEED), t))
        assert int(metrics["step_seen"]) == t
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), state.params["networks"], networks)
    jax.tree.map(np.testing.assert_array_equal, state.params["noise"], noise)


def test_resumed_in_the_middle_of_a_turn_it_ends_the_same(tmp_path):
    """Through the checkpointer, after step 5 of turns 3 + 4: two steps of the noise are done and two are left."""
    _, data = initial()
    traces = []

    def counted(name, function):
        def call(*args, **options):
            traces.append(name)
            return function(*args, **options)

        return call

    losses = (counted("loss", loss), counted("divergence", minus_divergence))
    players = pair(optax.adam(1e-2), optax.adam(3e-3), steps=(3, 4), losses=losses)
    step = make_train_step(players)

    def run(state, first, last, save_every=0):
        batches = (jnp.roll(data, t, axis=0)[:6] for t in range(first, last))
        options = {"start_step": first, "num_steps": last, "on_record": lambda record: None, "record_every": 2}
        with Checkpointer(tmp_path) as saver:
            save = lambda step, state, metrics: saver.save(step, state, metrics=metrics)
            return train(state, step, batches, **options, **({"save": save, "save_every": 5} if save_every else {}))

    unbroken = plain(run(start(players)[0], 0, 12))
    first = len(traces)
    run(start(players)[0], 0, 5, save_every=5)
    with Checkpointer(tmp_path) as saver:
        restored = saver.restore(jax.eval_shape(lambda: start(players)[0]))
    assert restored.step == 5
    assert restored.state.gain["noise"] != 0
    resumed = plain(run(restored.state, 5, 12))
    for got, want in zip(resumed, unbroken, strict=True):
        np.testing.assert_array_equal(got, want)
    # Traced once each; the program of the noise holds its loss twice.
    assert (traces.count("loss"), traces.count("divergence"), len(traces)) == (1, 2, first)


def test_a_state_from_elsewhere_is_not_taken_for_the_last_one():
    players = pair(optax.sgd(1e-2), steps=(2, 1))
    state, batch = start(players)
    step = make_train_step(players)
    turns = []
    for t in (0, 1, 2, 3, 2, 2, 0, 5):
        state = dataclasses.replace(state, step=jnp.int32(t)) if t != int(state.step) else state
        state, metrics = step(state, batch)
        turns.append(int("noise_loss" in metrics))
    assert turns == [0, 0, 1, 0, 1, 1, 0, 1]


def test_unconstrained_noise_vanishes_and_the_guard_says_so():
    """What the constraint is for: noise that may shrink, does, and the divergence grows without end."""

    def gap(sign, params, variables, batch, *, key, step):
        scale = jnp.exp(params["log_scale"])
        value = 0.5 * jnp.square(batch - params["mean"]).sum(axis=1).mean() / scale**2  # KL of two spread deltas
        return sign * value, LossOutput({}, {"noise_scale": scale})

    players = (
        Player("model", ("mean",), functools.partial(gap, 1.0), optax.sgd(0.05)),
        Player("noise", ("log_scale",), functools.partial(gap, -1.0), optax.adam(0.3), steps=10),
    )
    params = {"mean": jnp.zeros(X), "log_scale": jnp.zeros(())}
    state = create_train_state(params, {}, players, key=jax.random.key(SEED))
    check = lambda record: check_noise_range(record.step, record.metrics, {"noise_scale": (0.1, 10.0)})
    batches = (jnp.full((4, X), 2.0) for _ in range(11))
    with pytest.raises(NoiseCollapseError, match="collapsed: noise_scale is"):
        train(state, make_train_step(players), batches, start_step=0, num_steps=11, on_record=check, record_every=1)


def test_bad_arguments_are_refused():
    model, noise = pair(optax.sgd(0.1))
    params, batch = initial()
    create = functools.partial(create_train_state, params, {}, key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"ema_decay must be in \[0, 1\), got 1.0"):
        make_train_step([model, noise], ema_decay=1.0)
    lost = noise._replace(moves=("nois",))
    message = "Player 'noise' moves 'nois', and the parameters have no such part: there are 'networks', 'noise'"
    with pytest.raises(ValueError, match=message):
        create([model, lost])
    state, _ = start([model])
    with pytest.raises(ValueError, match=message):
        make_train_step([lost])(state, batch)
    twins = [model, noise._replace(name="model")]
    for make in (make_train_step, create):
        with pytest.raises(ValueError, match="Two players are named 'model': each needs a name of its own"):
            make(twins)
    with pytest.raises(TypeError, match="players must be Player values, got str"):
        make_train_step(["model"])
    with pytest.raises(ValueError, match="steps must name the steps of at least one player"):
        make_train_step([])
    with pytest.raises(TypeError, match="params must map the names of parts to their parameters, got "):
        create_train_state(jnp.ones(3), {}, [model], key=jax.random.key(0))


def test_micro_batches_take_every_kth_row_so_that_no_row_leaves_its_device():
    see = lambda state, batch, key: (batch.sum(), jnp.concatenate([state[1:], batch[None]]))
    total, seen = in_micro_batches(
        see, jnp.zeros((4, 2)), jnp.arange(8.0), key=jax.random.key(0), accumulate=4, keys_per_example=False
    )
    np.testing.assert_array_equal(seen, [[0, 4], [1, 5], [2, 6], [3, 7]])
    assert total == 28 / 4
