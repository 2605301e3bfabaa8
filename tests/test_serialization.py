"""Flax's serialisation of noises and of the state of a run: what is read is what was written."""

import subprocess
import sys

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import spread_jax as sj
from spread_jax.training import Player, create_train_state

AFFINE = jax.tree_util.Partial(lambda params, x: params["w"] * x, {"w": jnp.arange(1.0, 3.0)})
VALUES = {
    "gaussian": sj.GaussianNoise(0.5),
    "student": sj.StudentTNoise(jnp.array([0.5, 2.0]), 3.0),
    "low rank": sj.LowRankGaussianNoise(1.0, jnp.ones((2, 1))),
    "discrete": sj.DiscreteNoise.uniform_mixture(3, 0.5),
    "around a function": sj.TransformedNoise(sj.LaplaceNoise(1.0), jnp.tanh),
    "around a network": sj.TransformedNoise(sj.LaplaceNoise(1.0), AFFINE),
    "kernels": sj.MixtureKernel([sj.GaussianKernel(s) for s in (0.5, 2.0)], [0.25, 0.75]),
}


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("name", VALUES)
def test_noises_and_kernels(name):
    value = VALUES[name]
    other = jax.tree.map(lambda leaf: leaf * 0 + 7, value)
    same(flax.serialization.from_bytes(other, flax.serialization.to_bytes(value)), value)


def test_the_state_of_a_run(key):
    player = Player("model", ("w", "noise"), lambda *args, **options: None, optax.adam(0.1), look_again=True)
    make = lambda w, key: create_train_state(
        {"w": w, "noise": sj.GaussianNoise(w[0] + 1)}, {}, [player], key=jax.random.fold_in(key, 0)
    )
    state, other = make(jnp.arange(3.0), key), make(jnp.zeros(3), jax.random.key(99))
    found = flax.serialization.from_bytes(other, flax.serialization.to_bytes(state))
    assert jax.random.key_impl(found.key) == jax.random.key_impl(key)
    plain = lambda state: jax.tree.map(
        lambda leaf: jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf, state
    )
    same(plain(found), plain(state))


def test_fields_of_another_class_are_refused_by_name():
    state = flax.serialization.to_state_dict(VALUES["low rank"])
    with pytest.raises(ValueError, match="GaussianNoise must have the fields scale, got factor, scale"):
        flax.serialization.from_state_dict(VALUES["gaussian"], state)


def test_flax_may_be_imported_later_and_is_not_needed():
    program = """
import sys
import spread_jax
noise = spread_jax.LaplaceNoise(0.5)
assert "flax" not in sys.modules
import flax.serialization
class Own(spread_jax.GaussianNoise):
    pass
for value in (spread_jax.LaplaceNoise(2.0), Own(3.0)):
    print(flax.serialization.to_state_dict(value))
flax.serialization.register_serialization_state(spread_jax.CauchyNoise, lambda n: {"own": n.scale}, None)
print(flax.serialization.to_state_dict(spread_jax.CauchyNoise(4.0)))
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert found.splitlines() == ["{'scale': 2.0}", "{'scale': 3.0}", "{'own': 4.0}"]
