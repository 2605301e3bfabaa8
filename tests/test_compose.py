"""The programs of the guide: every library gives the loss and the gradient of plain jax, and trains."""

import re
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spread_jax import GaussianNoise, spread_elbo

GUIDE = (Path(__file__).parents[1] / "docs" / "guides" / "compose.md").read_text(encoding="utf-8")
EXAMPLES = {
    library: program
    for library, program in re.findall(r"^## ([^\n]+)\n\n```python\n(.*?)^```$", GUIDE, flags=re.M | re.S)
    if "__main__" in program
}


def load(library):
    module = types.ModuleType(library)
    exec(compile(EXAMPLES[library], library, "exec"), module.__dict__)
    return module


@pytest.fixture(scope="module")
def problem():
    """Weights, data, key, and the loss and gradient of plain jax."""
    rng = np.random.default_rng(0)
    array = lambda *shape: (0.5 * rng.normal(size=shape)).astype(np.float32)
    layer = lambda m, n: {"w": array(m, n), "b": array(n)}
    weights = {"encoder": [layer(3, 16), layer(16, 4)], "decoder": [layer(2, 16), layer(16, 3)]}
    x, key = array(20, 3), jax.random.key(3)

    def loss(weights):
        def network(name, x):
            a, b = weights[name]
            return jnp.tanh(x @ a["w"] + a["b"]) @ b["w"] + b["b"]

        def encode(y):
            both = network("encoder", y)
            return both[:, :2], both[:, 2:]

        decode = lambda z: network("decoder", z)
        return -spread_elbo(x, encode, decode, GaussianNoise(0.3), key=key).elbo.sum() / 20

    return weights, x, key, jax.jit(jax.value_and_grad(loss))(weights)


def test_there_is_one_for_each_library():
    assert set(EXAMPLES) == {"JAX", "Flax Linen", "Flax NNX", "Equinox", "Haiku", "NumPyro"}


@pytest.mark.parametrize("library", EXAMPLES)
def test_loss_and_gradient_are_those_of_plain_jax_and_it_trains(library, problem, capsys):
    assert len(EXAMPLES[library].splitlines()) <= 70
    weights, x, key, (want, want_gradient) = problem
    example = load(library)
    value, gradient = example.loss_and_gradient(weights, x, key)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    want_leaves, structure = jax.tree.flatten(want_gradient)
    leaves, got_structure = jax.tree.flatten(gradient)
    assert got_structure == structure
    for a, b in zip(leaves, want_leaves, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())

    example.main(steps=60)
    assert float(capsys.readouterr().out.split()[1]) > -7  # untrained networks are below -10, trained ones near -3.6


def test_the_first_hour_has_the_program_of_plain_jax():
    first_hour = (Path(__file__).parents[1] / "docs" / "guides" / "first_hour.md").read_text(encoding="utf-8")
    program = re.sub(r"def loss_and_gradient.*?\n\n\n", "", EXAMPLES["JAX"], flags=re.S)
    assert f"```python\n{program}```" in first_hour
