"""The order and signs of components: the same whatever order, signs and rounding they arrive with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spread_jax.linear._order import MARGIN, stable_order


def in_order(mixing):
    order, signs = stable_order(mixing)
    return np.asarray((mixing * signs)[:, order])


def test_the_column_with_most_variance_comes_first_and_its_largest_entry_is_positive():
    mixing = np.array([[0.1, -3.0, 0.5], [-1.0, 1.0, 0.5 * (1 - MARGIN / 2)]])
    np.testing.assert_array_equal(in_order(mixing), [[3.0, -0.1, 0.5], [-1.0, 1.0, 0.5 * (1 - MARGIN / 2)]])


@pytest.mark.parametrize("kind", ["signs", "dense", "one row"])
def test_rounding_changes_neither_order_nor_signs(kind, dtype):
    rng = np.random.default_rng(0)
    together = jax.jit(jax.vmap(lambda mixing: (mixing * stable_order(mixing)[1])[:, stable_order(mixing)[0]]))
    shape = {"signs": (12, 6), "dense": (5, 5), "one row": (1, 4)}[kind]
    arriving, expected = [], []
    for _ in range(40):
        # Columns of +-1 have the same length, and their entries the same size, up to an error of estimation.
        mixing = rng.normal(size=shape) if kind != "signs" else rng.choice([-1.0, 1.0], shape)
        mixing += 0.001 * rng.normal(size=shape)
        expected.append(in_order(mixing.astype(dtype)))
        turned = (mixing * rng.choice([-1.0, 1.0], shape[1]))[:, rng.permutation(shape[1])]
        arriving.append((turned * (1 + 1e-6 * rng.normal(size=shape))).astype(dtype))
    for ordered in (together(jnp.asarray(np.array(arriving))), [in_order(mixing) for mixing in arriving]):
        np.testing.assert_allclose(ordered, expected, rtol=1e-4)
        assert ordered[0].dtype == dtype


def test_columns_of_any_unit_or_zero_have_an_order():
    mixing = np.array([[1.0, 0.0, 2.0], [0.5, 0.0, -1.0]])
    for scale in (1e-30, 1.0, 1e30):
        np.testing.assert_allclose(in_order(scale * mixing), scale * np.array([[2.0, 1.0, 0.0], [-1.0, 0.5, 0.0]]))


def test_of_two_entries_of_nearly_one_size_the_first_is_made_positive(dtype):
    """Whichever of them an error of estimation has made the larger."""
    for second in (1 - MARGIN / 2, 1 + MARGIN / 2):
        for xp in (np, jnp):
            order, signs = stable_order(xp.asarray([[-1.0], [second]], dtype))
            assert (int(order[0]), float(signs[0])) == (0, -1.0), second
    assert float(stable_order(np.array([[-1.0], [1 + 2 * MARGIN]]))[1][0]) == 1.0
