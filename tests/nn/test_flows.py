"""The coupling flow: inverse, determinant, total mass, moments, a fit, and bad input."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from spread_jax.nn import CouplingFlow


def jittered(flow, dtype=jnp.float32):
    """Variables away from the identity that a flow starts as."""
    variables = jax.eval_shape(flow.init, jax.random.key(0), jnp.zeros((1, flow.dim)))
    rng = np.random.default_rng(flow.dim)
    return jax.tree.map(lambda v: jnp.asarray(0.4 * rng.normal(size=v.shape), dtype), variables)


def test_inverse_and_determinant_are_those_of_the_map(dtype):
    flow = CouplingFlow(dim=5, num_couplings=6, width=7)
    variables = jittered(flow, dtype)
    u = jnp.asarray(np.random.default_rng(1).normal(size=(4, 5)), dtype)

    @jax.jit
    def everything(variables, u):
        z, log_determinant = flow.apply(variables, u)
        back, backwards = flow.apply(variables, z, method="inverse")
        jacobian = jax.vmap(jax.jacfwd(lambda u: flow.apply(variables, u[None])[0][0]))(u)
        return z, log_determinant, back, backwards, jacobian, flow.apply(variables, z, method="log_density")

    z, log_determinant, back, backwards, jacobian, density = everything(variables, u)
    assert z.dtype == density.dtype == dtype
    tolerance = {"atol": 1e-4, "rtol": 1e-4} if dtype == "float32" else {"atol": 1e-10, "rtol": 1e-10}
    assert np.abs(z - u).min(axis=0).max() > 0.01
    assert np.count_nonzero(np.abs(jacobian).min(axis=0)) == 25  # every coordinate reaches every other
    np.testing.assert_allclose(back, u, **tolerance)
    np.testing.assert_allclose(log_determinant, np.linalg.slogdet(np.asarray(jacobian, float))[1], **tolerance)
    np.testing.assert_allclose(backwards, -log_determinant, **tolerance)
    normal = -0.5 * (np.square(u).sum(axis=1) + 5 * math.log(2 * math.pi))
    np.testing.assert_allclose(density, normal - log_determinant, **tolerance)


@pytest.mark.parametrize("dim", [1, 2])
def test_the_density_has_mass_one_and_the_moments_of_the_draws(dim, x64):
    flow = CouplingFlow(dim=dim, num_couplings=2 * dim, width=5)
    variables = jittered(flow, float)
    u = np.random.default_rng(3).normal(size=(20_000, dim))
    draws = np.asarray(jax.jit(flow.apply)(variables, u)[0])
    # A box that holds all but e^-50 of the mass: the map is affine outside a bounded set, up to its bounded scales.
    edges = [np.linspace(low - 4 * width, high + 4 * width, 3001 if dim == 1 else 901)
             for low, high, width in zip(draws.min(0), draws.max(0), draws.std(0), strict=True)]  # fmt: skip
    grid = np.stack(np.meshgrid(*edges, indexing="ij"), axis=-1).reshape(-1, dim)
    density = np.exp(np.asarray(jax.jit(functools.partial(flow.apply, method="log_density"))(variables, grid)))
    weights = density * math.prod(e[1] - e[0] for e in edges)
    assert weights.sum() == pytest.approx(1, abs=2e-3)
    mean = weights @ grid
    error = draws.std(axis=0) / math.sqrt(len(draws))
    assert (np.abs(draws.mean(axis=0) - mean) < 5 * error + 5e-3).all()


def test_it_starts_as_the_identity_and_fits_what_a_gaussian_cannot():
    flow = CouplingFlow(dim=2, num_couplings=2, width=16)
    start = flow.init(jax.random.key(0), np.zeros((1, 2), np.float32))
    u = np.random.default_rng(0).normal(size=(2000, 2)).astype(np.float32)
    banana = np.stack([u[:, 0], 0.3 * u[:, 1] + np.square(u[:, 0])], axis=1)
    exact = -np.square(u).sum(axis=1).mean() / 2 - math.log(2 * math.pi) - math.log(0.3)
    covariance = np.cov(np.asarray(banana).T)
    gaussian = -0.5 * (np.linalg.slogdet(covariance)[1] + 2 + 2 * math.log(2 * math.pi))
    optimizer = optax.adam(1e-2)

    @jax.jit
    def fit(variables):
        def step(carry, _):
            variables, state = carry
            loss = lambda v: -flow.apply(v, banana, method="log_density").mean()
            value, gradient = jax.value_and_grad(loss)(variables)
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(variables, updates), state), value

        return flow.apply(variables, u)[0], jax.lax.scan(step, (variables, optimizer.init(variables)), length=200)[1]

    z, losses = fit(start)
    np.testing.assert_array_equal(z, u)
    assert -losses[-1] > gaussian + 0.8 * (exact - gaussian)


@pytest.mark.parametrize(
    ("settings", "shape", "message"),
    [
        ({"dim": 0}, (1, 2), "dim must be at least 1, got 0"),
        ({"dim": 2, "num_couplings": 0}, (1, 2), "num_couplings must be at least 1, got 0"),
        ({"dim": 2}, (1, 3), r"u must have shape \[batch, 2\], got \(1, 3\)"),
        ({"dim": 2}, (2,), r"u must have shape \[batch, 2\], got \(2,\)"),
    ],
)
def test_bad_arguments_are_refused(settings, shape, message):
    with pytest.raises(ValueError, match=message):
        CouplingFlow(**settings).init(jax.random.key(0), jnp.ones(shape))


@pytest.mark.parametrize("dim", [3, 4, 7])
def test_every_two_coordinates_are_on_different_sides_of_some_coupling(dim):
    """Else one would never be moved as a function of the other directly; and each moves in half of the couplings."""
    flow = CouplingFlow(dim=dim, num_couplings=2 * (dim - 1).bit_length())
    masks = np.array(flow._masks(float))
    assert set(masks.ravel()) == {0, 1}
    np.testing.assert_array_equal(masks.mean(axis=0), 0.5)
    for i in range(dim):
        for j in range(i):
            assert (masks[:, i] != masks[:, j]).any(), (i, j)
