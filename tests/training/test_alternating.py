"""Both players against finite differences and hand-written steps; phases; exact resume; the guard on the noise."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spread_jax import LowRankGaussianNoise, spread_elbo
from spread_jax.training import (
    AscentSchedule,
    Checkpointer,
    LossOutput,
    NoiseCollapseError,
    check_noise_range,
    create_alternating_state,
    make_alternating_step,
    train,
)

X, Z, R = 5, 2, 2
SEED = 3


def initial(dtype=np.float32):
    rng = np.random.default_rng(0)
    array = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    params = {"encode": array(X, Z), "log_std": array(Z), "decode": array(Z, X)}
    return params, {"factor": array(X, R)}, array(8, X)


def terms_of(params, noise_params, batch, key):
    """The bound of a linear model under noise of fixed volume."""
    noise = LowRankGaussianNoise(0.7, noise_params["factor"]).with_volume(2.0)
    encode = lambda y: (y @ params["encode"] / X, jnp.broadcast_to(params["log_std"], (len(y), Z)))
    terms = spread_elbo(batch, encode, lambda z: z @ params["decode"], noise, key=key)
    return terms.elbo.mean(), noise.entropy(batch).mean()


def loss(params, noise_params, model_state, noise_state, batch, *, key, step):
    elbo, entropy = terms_of(params, noise_params, batch, key)
    new = {"steps": model_state["steps"] + 1}
    return -elbo, LossOutput(new, {"noise_entropy": entropy, "step_seen": step})


def divergence(params, noise_params, model_state, noise_state, batch, *, key, step):
    elbo, entropy = terms_of(params, noise_params, batch, key)
    return -elbo - entropy, LossOutput(
        {"steps": noise_state["steps"] + 1}, {"noise_entropy": entropy, "step_seen": step}
    )


def start(optimizer, noise_optimizer=None, dtype=np.float32):
    params, noise_params, batch = initial(dtype)
    counts = [{"steps": jnp.zeros(())} for _ in range(2)]
    noise_optimizer = noise_optimizer or optimizer
    key = jax.random.key(SEED)
    state = create_alternating_state(params, counts[0], optimizer, noise_params, counts[1], noise_optimizer, key=key)
    return state, batch


def copied(tree):
    return jax.tree.map(jnp.copy, tree)


def plain(state):
    """The state's leaves as NumPy arrays."""
    return [
        np.asarray(leaf) for leaf in jax.tree.leaves(dataclasses.replace(state, key=jax.random.key_data(state.key)))
    ]


def test_the_phase_is_a_function_of_the_step():
    schedule = AscentSchedule(descent_steps=3, ascent_steps=2)
    turns = [bool(schedule.ascending(step)) for step in range(10)]
    assert turns == [False, False, False, True, True] * 2
    np.testing.assert_array_equal(jax.jit(jax.vmap(schedule.ascending))(jnp.arange(10)), turns)
    assert [bool(schedule.begins_ascent(step)) for step in range(10)] == [False, False, False, True, False] * 2
    np.testing.assert_array_equal(jax.vmap(schedule.descents)(jnp.arange(11)), np.cumsum([0, *(not t for t in turns)]))
    for descents in range(1, 8):
        steps = schedule.steps_for(descents)
        assert (schedule.descents(steps), schedule.descents(steps - 1)) == (descents, descents - 1)
    never = AscentSchedule(descent_steps=3, ascent_steps=0)
    assert (never.descents(7), never.steps_for(7)) == (7, 7)
    assert not any(never.ascending(step) or never.begins_ascent(step) for step in range(10))
    for settings, message in (((0, 2), "descent_steps must be at least 1"), ((1, -1), "ascent_steps must be at least")):
        with pytest.raises(ValueError, match=message):
            AscentSchedule(*settings)


def test_each_player_follows_its_own_gradient(x64):
    """A step of plain gradient descent of size 1 is the gradient; both against finite differences."""
    sgd = optax.sgd(1.0)
    state, batch = start(sgd, dtype=np.float64)
    step = make_alternating_step(loss, divergence, sgd, sgd, AscentSchedule(1, 1))
    before = copied(state)
    model_step, first = step(state, batch)
    after_model = copied(model_step)
    noise_step, second = step(model_step, batch)

    value = jax.jit(lambda params, noise_params, key: terms_of(params, noise_params, batch, key))

    def slope(function, tree, direction):
        moved = lambda t: function(jax.tree.map(lambda v, d: v + t * d, tree, direction))
        return (moved(1e-6) - moved(-1e-6)) / 2e-6

    def inner(a, b):
        return sum(jax.tree.leaves(jax.tree.map(lambda x, y: (x * y).sum(), a, b)))

    rng = np.random.default_rng(5)
    at = lambda t: jax.random.fold_in(jax.random.key(SEED), t)
    for _ in range(3):
        direction = jax.tree.map(lambda v: rng.normal(size=v.shape), before.params)
        update = jax.tree.map(jnp.subtract, after_model.params, before.params)
        want = slope(lambda params: -value(params, before.noise_params, at(0))[0], before.params, direction)
        np.testing.assert_allclose(inner(update, direction), -want, rtol=1e-6)

        direction = jax.tree.map(lambda v: rng.normal(size=v.shape), before.noise_params)
        update = jax.tree.map(jnp.subtract, noise_step.noise_params, before.noise_params)
        want = slope(lambda noise: -sum(value(after_model.params, noise, at(1))), before.noise_params, direction)
        np.testing.assert_allclose(inner(update, direction), want, rtol=1e-6)  # upwards
        assert abs(want) > 1e-3

    # Who was not on turn has not moved, nor have its state, its optimiser or the average.
    for name in ("noise_params", "noise_state", "noise_opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(before, name), getattr(after_model, name))
    for name in ("params", "model_state", "opt_state", "ema"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after_model, name), getattr(noise_step, name))
    assert (float(first["ascending"]), float(second["ascending"])) == (0.0, 1.0)
    assert (float(noise_step.model_state["steps"]), float(noise_step.noise_state["steps"])) == (1.0, 1.0)
    np.testing.assert_allclose(first["objective"], -value(before.params, before.noise_params, at(0))[0], rtol=1e-12)


def test_ascent_raises_the_divergence_and_says_by_how_much():
    """One key, the whole batch, a small learning rate: every step of the noise rises."""

    fixed = lambda *args, key, step: divergence(*args, key=jax.random.key(SEED), step=step)
    optimizer = optax.sgd(1e-2)
    state, batch = start(optimizer)
    step = make_alternating_step(loss, fixed, optimizer, optimizer, AscentSchedule(1, 30))
    state, _ = step(state, batch)
    metrics = []
    for _ in range(30):
        state, row = step(state, batch)
        metrics.append(row)
    # Read only now: what a step returned is not donated to the next.
    values = np.array([row["objective"] for row in metrics])
    assert (np.diff(values) > 0).all()
    assert values[-1] - values[0] > 0.05
    rises = np.array([row["divergence_rise"] for row in metrics])
    np.testing.assert_allclose(rises[:-1], values[1:] - values[0], atol=1e-4)
    # It holds through the descent that follows, and starts again with the next ascent.
    state, row = step(state, batch)
    assert float(row["divergence_rise"]) == rises[-1]
    state, row = step(state, batch)
    assert float(row["divergence_rise"]) < 0.5 * rises[-1]


def test_without_ascent_it_is_the_ordinary_step():
    adam = optax.adam(1e-2)
    state, batch = start(adam)
    step = make_alternating_step(loss, divergence, adam, adam, AscentSchedule(1, 0), ema_decay=0.9)
    params, noise_params, _ = initial()
    opt_state, average = adam.init(params), params

    @jax.jit
    def reference(params, opt_state, key):
        gradient = jax.grad(lambda params: -terms_of(params, noise_params, batch, key)[0])(params)
        updates, opt_state = adam.update(gradient, opt_state)
        return optax.apply_updates(params, updates), opt_state

    for t in range(4):
        state, metrics = step(state, batch)
        params, opt_state = reference(params, opt_state, jax.random.fold_in(jax.random.key(SEED), t))
        decay = min(0.9, (1 + t) / (10 + t))
        average = jax.tree.map(lambda old, new, d=decay: d * old + (1 - d) * new, average, params)
        assert int(metrics["step_seen"]) == t
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), state.params, params)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), state.ema, average)
    jax.tree.map(np.testing.assert_array_equal, state.noise_params, noise_params)


def test_resumed_in_the_middle_of_an_ascent_it_ends_the_same(tmp_path):
    """Through the checkpointer, after step 5 of phases 3 + 4: two ascent steps are done and two are left."""
    adam, noise_adam = optax.adam(1e-2), optax.adam(3e-3)
    _, _, data = initial()
    traces = []

    def counted(*args, **options):
        traces.append("loss")
        return loss(*args, **options)

    def counted_divergence(*args, **options):
        traces.append("divergence")
        return divergence(*args, **options)

    step = make_alternating_step(counted, counted_divergence, adam, noise_adam, AscentSchedule(3, 4))

    def run(state, first, last, save_every=0):
        batches = (jnp.roll(data, t, axis=0)[:6] for t in range(first, last))
        options = {"start_step": first, "num_steps": last, "on_record": lambda record: None, "record_every": 2}
        with Checkpointer(tmp_path) as saver:
            save = lambda step, state, metrics: saver.save(step, state, metrics=metrics)
            return train(state, step, batches, **options, **({"save": save, "save_every": 5} if save_every else {}))

    state, _ = start(adam, noise_adam)
    unbroken = plain(run(state, 0, 12))
    first = len(traces)
    state, _ = start(adam, noise_adam)
    run(state, 0, 5, save_every=5)
    with Checkpointer(tmp_path) as saver:
        restored = saver.restore(jax.eval_shape(lambda: start(adam, noise_adam)[0]))
    assert restored.step == 5
    assert restored.state.rise != 0
    resumed = plain(run(restored.state, 5, 12))
    for got, want in zip(resumed, unbroken, strict=True):
        np.testing.assert_array_equal(got, want)
    # Traced once each; the program of the ascent holds the divergence twice.
    assert traces.count("loss") == 1
    assert traces.count("divergence") == 2
    assert len(traces) == first


def test_a_state_from_elsewhere_is_not_taken_for_the_last_one():
    adam = optax.adam(1e-2)
    state, batch = start(adam)
    step = make_alternating_step(loss, divergence, adam, adam, AscentSchedule(2, 1))
    turns = []
    for t in (0, 1, 2, 3, 2, 2, 0, 5):
        state = dataclasses.replace(state, step=jnp.int32(t)) if t != int(state.step) else state
        state, metrics = step(state, batch)
        turns.append(int(metrics["ascending"]))
    assert turns == [0, 0, 1, 0, 1, 1, 0, 1]


@pytest.mark.parametrize(
    ("value", "message"),
    [(-0.1, "collapsed: noise_entropy is -0.1 after step 40"), (9.0, "blew up"), (math.nan, "is not a number")],
)
def test_noise_out_of_its_range_stops_the_run(value, message):
    limits = {"noise_entropy": (0.0, 5.0)}
    check_noise_range(40, {"noise_entropy": 0.0, "elbo": -3.0}, limits)
    check_noise_range(40, {"noise_entropy": 5.0}, limits)
    with pytest.raises(NoiseCollapseError, match=message) as caught:
        check_noise_range(40, {"noise_entropy": value}, limits)
    assert (caught.value.step, caught.value.name) == (40, "noise_entropy")


def test_unconstrained_noise_vanishes_and_the_guard_says_so():
    """What the constraint is for: noise that may shrink, does, and the divergence grows without end."""

    def shrinking(params, noise_params, model_state, noise_state, batch, *, key, step):
        scale = jnp.exp(noise_params["log_scale"])
        value = 0.5 * jnp.square(batch - params["mean"]).sum(axis=1).mean() / scale**2  # KL of two spread deltas
        return value, LossOutput(None, {"noise_scale": scale})

    sgd, adam = optax.sgd(0.05), optax.adam(0.3)
    params, noise_params = {"mean": jnp.zeros(X)}, {"log_scale": jnp.zeros(())}
    state = create_alternating_state(params, None, sgd, noise_params, None, adam, key=jax.random.key(SEED))
    step = make_alternating_step(shrinking, shrinking, sgd, adam, AscentSchedule(1, 10))
    check = lambda record: check_noise_range(record.step, record.metrics, {"noise_scale": (0.1, 10.0)})
    batches = (jnp.full((4, X), 2.0) for _ in range(11))
    with pytest.raises(NoiseCollapseError, match="collapsed: noise_scale is"):
        train(state, step, batches, start_step=0, num_steps=11, on_record=check, record_every=1)


def test_bad_arguments_are_refused():
    sgd = optax.sgd(0.1)
    with pytest.raises(ValueError, match=r"ema_decay must be in \[0, 1\), got 1.0"):
        make_alternating_step(loss, divergence, sgd, sgd, AscentSchedule(1, 1), ema_decay=1.0)
    other = lambda *args, **options: (divergence(*args, **options)[0], LossOutput(None, {"noise_entropy": 0.0}))
    state, batch = start(sgd)
    with pytest.raises(ValueError, match="metrics of the same names; only one of them has step_seen"):
        make_alternating_step(loss, other, sgd, sgd, AscentSchedule(1, 1))(state, batch)
