"""Norms against dense matrices written out by hand; injectivity against Jacobians; inverses and their gradients."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.errors import ModifyScopeVariableError

from spread_jax import GaussianNoise, TransformedNoise, spread_divergence, spread_elbo
from spread_jax.nn import (
    InvertibleResidual,
    SpectralConv,
    check_invertible,
    convolution_norm,
    convolution_norm_bound,
    invert,
    lipschitz_bound,
)

SIZE = (5, 4)


def dense(kernel, height, width):
    """The matrix of a zero-padded correlation, entry by entry."""
    rows, columns, fan_in, fan_out = kernel.shape
    top, left = (rows - 1) // 2, (columns - 1) // 2
    matrix = np.zeros((height, width, fan_out, height, width, fan_in))
    for i, j, a, b in itertools.product(range(height), range(width), range(rows), range(columns)):
        k, m = i + a - top, j + b - left
        if 0 <= k < height and 0 <= m < width:
            matrix[i, j, :, k, m, :] = kernel[a, b].T
    return matrix.reshape(height * width * fan_out, -1)


def operator(layer, variables, channels):
    """The matrix of a layer as it acts, less its bias."""
    basis = jnp.eye(np.prod(SIZE) * channels).reshape(-1, *SIZE, channels)
    return np.asarray(layer.apply(variables, basis) - layer.apply(variables, 0 * basis)).reshape(len(basis), -1)


def jittered(variables, scale, seed=0):
    """Every parameter moved at random, as training would."""
    leaves, tree = jax.tree.flatten(variables["params"])
    rng = np.random.default_rng(seed)
    moved = [leaf + jnp.asarray(scale * rng.normal(size=leaf.shape), leaf.dtype) for leaf in leaves]
    return {**variables, "params": jax.tree.unflatten(tree, moved)}


@functools.cache
def make_network(channels):
    """Two blocks with large kernels, so that every normalisation acts."""
    module = InvertibleResidual(features=4, blocks=2, coefficient=0.8)
    variables = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, *SIZE, channels)))
    variables = jittered(variables, 1.0)
    step = functools.partial(module.apply, train=True, mutable=["spectral_stats"])
    x = jax.random.normal(jax.random.key(1), (6, *SIZE, channels))
    many = jax.jit(lambda v: jax.lax.fori_loop(0, 200, lambda _, v: {**v, **step(v, x)[1]}, v))
    return module, many(variables), x


@pytest.fixture(scope="module")
def network():
    return make_network(3)


@pytest.mark.parametrize("shape", [(3, 3, 2, 3), (5, 3, 1, 2), (1, 1, 3, 2), (4, 2, 2, 1)])
def test_norm_is_that_of_the_matrix_and_the_bound_is_above_it(shape, dtype):
    rng = np.random.default_rng(sum(shape))
    kernel = rng.normal(size=shape)
    exact = np.linalg.norm(dense(kernel, *SIZE), 2)
    kernel = kernel.astype(dtype)
    np.testing.assert_allclose(convolution_norm(kernel, *SIZE), exact, rtol=1e-5 if dtype == "float32" else 1e-12)
    bound = float(convolution_norm_bound(kernel, *SIZE))
    assert bound >= exact * (1 - 1e-6)
    if shape[:2] == (1, 1):
        np.testing.assert_allclose(bound, exact, rtol=1e-6)
    # It comes down to the norm as images grow, from no further than twice.
    assert bound < 2 * exact
    # The reshaped kernel, which is often taken instead, says less than the operator does.
    reshaped = np.linalg.norm(kernel.reshape(-1, shape[3]), 2)
    assert shape[:2] == (1, 1) or abs(reshaped / exact - 1) > 0.02


@pytest.mark.parametrize("along", ["height", "width"])
def test_the_bound_holds_where_the_circular_norm_of_the_images_own_size_does_not(along):
    # A second difference along five pixels: the matrix is tridiagonal (-1, 2, -1), its norm 2 + 2 cos(pi / 6). The
    # highest frequency, which has the most of it, is none of those of a circle of five, but nearly of one of seven.
    kernel, size = jnp.asarray([-1.0, 2.0, -1.0]).reshape(3, 1, 1, 1), (5, 1)
    if along == "width":
        kernel, size = kernel.transpose(1, 0, 2, 3), (1, 5)
    exact, bound = 2 + 2 * np.cos(np.pi / 6), 2 - 2 * np.cos(2 * np.pi * 3 / 7)
    np.testing.assert_allclose(convolution_norm(kernel, *size), exact, rtol=1e-6)
    np.testing.assert_allclose(convolution_norm_bound(kernel, *size), bound, rtol=1e-6)
    assert 2 - 2 * np.cos(2 * np.pi * 2 / 5) < exact < convolution_norm_bound(kernel, *size)
    # A layer of it, its leading singular vector known: the fastest sine that is zero beyond both ends.
    u = np.sin(5 * np.pi * np.arange(1, 6) / 6).reshape(1, *size, 1) / np.sqrt(3)
    one = lambda leaf: {"block_0": {"conv_0": leaf}}
    variables = {"params": one({"kernel": kernel}), "spectral_stats": one({"u": jnp.asarray(u, jnp.float32)})}
    found = lipschitz_bound(InvertibleResidual(coefficient=0.8), variables)["block_0"]
    np.testing.assert_allclose([found["conv_0"], found["g"]], 0.8 * bound / exact, rtol=1e-5)


def test_the_bound_is_close_on_larger_images():
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(3, 3, 1, 2)), jnp.float32)
    exact, bound = convolution_norm(kernel, 20, 20), convolution_norm_bound(kernel, 20, 20)
    assert exact <= bound * (1 + 1e-6)
    np.testing.assert_allclose(bound, exact, rtol=0.03)


@pytest.mark.parametrize(("size", "coefficient"), [(5.0, 0.3), (1e-3, 0.3)])
def test_layer_has_the_norm_it_is_given_or_less(size, coefficient):
    layer, x = SpectralConv(3, coefficient=coefficient), jnp.zeros((1, *SIZE, 2))
    variables = layer.init(jax.random.key(0), x)
    kernel = size * variables["params"]["kernel"]
    variables["params"]["kernel"] = kernel
    plain = np.linalg.norm(dense(np.asarray(kernel), *SIZE), 2)
    assert (plain > coefficient) == (size > 1)
    np.testing.assert_allclose(np.linalg.norm(operator(layer, variables, 2), 2), min(plain, coefficient), rtol=2e-3)


def test_state_moves_in_training_only():
    layer, x = SpectralConv(3, coefficient=0.3), jnp.ones((2, *SIZE, 2))
    variables = layer.init(jax.random.key(0), x)
    kernel = jnp.asarray(np.random.default_rng(1).normal(size=(3, 3, 2, 3)), jnp.float32)
    variables = {**variables, "params": {**variables["params"], "kernel": kernel}}
    _, unchanged = layer.apply(variables, x, mutable=["spectral_stats"])
    np.testing.assert_array_equal(unchanged["spectral_stats"]["u"], variables["spectral_stats"]["u"])
    with pytest.raises(ModifyScopeVariableError):
        layer.apply(variables, x, train=True)
    # The new kernel's norm is not known at once, and is after some steps, from below.
    step = jax.jit(functools.partial(layer.apply, train=True, mutable=["spectral_stats"]))
    norms = []
    for _ in range(60):
        norms.append(np.linalg.norm(operator(layer, variables, 2), 2) if len(norms) in (0, 59) else 0.0)
        variables = {**variables, **step(variables, x)[1]}
    assert norms[0] > 0.3 * 1.1
    np.testing.assert_allclose(norms[-1], 0.3, rtol=1e-3)
    with pytest.raises(ValueError, match=r"x must be images of shape \(5, 4, 2\), for which SpectralConv knows"):
        layer.apply(variables, jnp.ones((1, 6, 4, 2)))


def test_gradient_is_that_of_the_kernel_over_its_exact_norm(x64):
    # At the singular vectors, holding u and v fixed is exact (the envelope theorem).
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(1, *SIZE, 1)), rng.normal(size=(3, 3, 1, 2))
    leading = np.linalg.svd(dense(kernel, *SIZE))[2][0].reshape(x.shape)
    layer = SpectralConv(2, coefficient=0.3)
    variables = {"params": {"kernel": kernel, "bias": np.zeros(2)}, "spectral_stats": {"u": leading}}

    @jax.jit
    def loss(kernel):
        params = {**variables["params"], "kernel": kernel}
        return jnp.sin(layer.apply({**variables, "params": params}, x)).sum()

    def reference(kernel):
        matrix = dense(kernel, *SIZE)
        return np.sin(0.3 / np.linalg.norm(matrix, 2) * (matrix @ np.asarray(x).ravel())).sum()

    np.testing.assert_allclose(loss(kernel), reference(kernel), rtol=1e-9)
    got = np.asarray(jax.grad(loss)(kernel))
    for index in [(0, 0, 0, 0), (1, 1, 0, 1), (2, 0, 0, 1)]:
        step_to = np.zeros_like(kernel)
        step_to[index] = 1e-5
        want = (reference(kernel + step_to) - reference(kernel - step_to)) / 2e-5
        np.testing.assert_allclose(got[index], want, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("channels", [1, 3])
def test_singular_values_of_the_jacobian_are_within_the_bounds(channels):
    module, variables, x = make_network(channels)
    jacobian = jax.jit(jax.vmap(jax.jacrev(lambda x: module.apply(variables, x[None])[0])))(x)
    values = np.linalg.svd(np.asarray(jacobian).reshape(len(x), x[0].size, x[0].size), compute_uv=False)
    g = np.array([float(bounds["g"]) for bounds in lipschitz_bound(module, variables).values()])
    assert (g < 1).all()
    assert values.min() >= np.prod(1 - g)
    assert values.max() <= np.prod(1 + g)
    assert values.max() > 1.02  # the map does something, so the test can fail


def test_lipschitz_bound_is_above_the_exact_norms(network):
    module, variables, _ = network
    bounds = jax.jit(functools.partial(lipschitz_bound, module))(variables)
    assert set(bounds) == {"block_0", "block_1"}
    for block, layers in bounds.items():
        for layer in ("conv_0", "conv_1", "conv_2"):
            params = variables["params"][block][layer]
            stats = variables["spectral_stats"][block][layer]
            alone = SpectralConv(params["kernel"].shape[3], coefficient=0.8)
            matrix = operator(alone, {"params": params, "spectral_stats": stats}, params["kernel"].shape[2])
            exact = np.linalg.norm(matrix, 2)
            np.testing.assert_allclose(exact, 0.8, rtol=5e-3)
            assert exact <= layers[layer] * (1 + 1e-5)
            assert layers[layer] < 1.3 * exact
        np.testing.assert_allclose(layers["g"], np.prod([layers[f"conv_{i}"] for i in range(3)]), rtol=1e-5)
    check_invertible(module, variables)


def stale(variables, u):
    """conv_1 of block_0 with a u that sees none of its norm."""
    layers = dict(variables["params"]["block_0"])
    stats = dict(variables["spectral_stats"]["block_0"])
    layers["conv_1"] = {**layers["conv_1"], "kernel": 100 * layers["conv_1"]["kernel"]}
    stats["conv_1"] = {"u": u * stats["conv_1"]["u"]}
    return {
        "params": {**variables["params"], "block_0": layers},
        "spectral_stats": {**variables["spectral_stats"], "block_0": stats},
    }


@pytest.mark.parametrize(("u", "bound"), [(0.0, r"of up to \d"), (jnp.nan, "of up to nan")])
def test_a_transform_that_may_not_be_injective_is_refused_by_the_layers_name(network, u, bound):
    module, variables, _ = network
    with pytest.raises(ValueError, match=f"block_0/conv_1 has an operator norm {bound}.*where 0.8 is allowed"):
        check_invertible(module, stale(variables, u))


def test_inverse_is_one_and_says_when_it_is_not(network):
    module, variables, x = network
    f = jax.jit(module.apply)
    solve = jax.jit(functools.partial(invert, module), static_argnames=("tolerance", "max_iterations"))
    y = f(variables, x)
    assert np.abs(y - x).max() > 0.05
    found = solve(variables, y)
    assert found.converged.all()
    np.testing.assert_allclose(found.x, x, atol=5e-5)
    np.testing.assert_allclose(found.error, np.abs(f(variables, found.x) - y).max(axis=(1, 2, 3)), atol=1e-6)
    early = solve(variables, y, max_iterations=1)
    assert not early.converged.any()
    assert (early.error > 1e-5).all()
    each = jax.jit(jax.vmap(lambda y: invert(module, variables, y[None]).x[0]))(y[:2])
    np.testing.assert_allclose(each, x[:2], atol=5e-5)


def test_an_inverse_is_judged_by_its_tolerance(network):
    """Image by image, by f(x) in every pixel; and iterations go on until that is met."""
    module, variables, x = network
    f = jax.jit(module.apply)
    y = f(variables, x)
    solve = jax.jit(functools.partial(invert, module), static_argnames=("tolerance", "max_iterations"))
    early = solve(variables, y, max_iterations=1)
    error = np.abs(f(variables, early.x) - y).max(axis=(1, 2, 3))
    np.testing.assert_allclose(early.error, error, rtol=1e-3)
    nearest = float(early.error.min())
    assert np.sort(error)[1] < 8 * nearest
    for factor, converged in ((0.99, 0), (1.01, 1), (1.01 * float(early.error.max()) / nearest, len(x))):
        found = solve(variables, y, tolerance=factor * nearest, max_iterations=1)
        assert int(found.converged.sum()) == converged
    for tolerance in (1e-2, 1e-4):
        found = solve(variables, y, tolerance=tolerance)
        assert np.abs(f(variables, found.x) - y).max() <= tolerance


@pytest.mark.parametrize("tolerance", [1e-2, 1e-4])
def test_a_slow_iteration_goes_on_until_the_tolerance_is_met(tolerance):
    """g(x) = c^3 x, of convolutions that copy positive pixels: an error falls by 0.73 only, and x = y / (1 + c^3)."""
    module, shape = InvertibleResidual(features=1, coefficient=0.9), (2, 3, 3, 1)
    copy = jnp.zeros((3, 3, 1, 1)).at[1, 1].set(1.0)
    layers = {f"conv_{i}": {"kernel": copy, "bias": jnp.zeros(1)} for i in range(3)}
    stats = {f"conv_{i}": {"u": jnp.full((1, *shape[1:]), 1 / 3)} for i in range(3)}
    variables = {"params": {"block_0": layers}, "spectral_stats": {"block_0": stats}}
    y = jnp.linspace(1.0, 3.0, 18).reshape(shape)
    found = jax.jit(functools.partial(invert, module, tolerance=tolerance))(variables, y)
    slope = 1 + 0.9**3
    error = np.abs(slope * np.asarray(found.x, np.float64) - y).max(axis=(1, 2, 3))
    np.testing.assert_allclose(found.error, error, atol=2e-6)
    assert found.converged.all()
    assert 0.05 * tolerance < error.max() <= tolerance


def test_gradients_of_the_inverse_are_those_of_finite_differences(x64):
    module = InvertibleResidual(features=2, blocks=2, coefficient=0.9)
    rng = np.random.default_rng(2)
    y = jnp.asarray(rng.normal(size=(1, 3, 4, 1)))
    variables = jittered(jax.jit(module.init)(jax.random.key(0), y), 1.0)
    variables = jax.tree.map(lambda v: v.astype(float), variables)
    weights = jnp.asarray(rng.normal(size=y.shape))

    @jax.jit
    def loss(variables, y):
        return (weights * invert(module, variables, y, tolerance=1e-13, max_iterations=500).x).sum()

    of_variables, of_y = jax.jit(jax.grad(loss, argnums=(0, 1)))(variables, y)
    direction = jnp.asarray(rng.normal(size=y.shape))
    want = (loss(variables, y + 1e-6 * direction) - loss(variables, y - 1e-6 * direction)) / 2e-6
    np.testing.assert_allclose((of_y * direction).sum(), want, rtol=1e-6)
    # Along the biases, on which the norms do not depend: u and v are held fixed in the gradient.
    leaves = jax.tree_util.tree_leaves_with_path(of_variables["params"])
    along = sum(leaf.sum() for path, leaf in leaves if "bias" in jax.tree_util.keystr(path))

    def shifted(t):
        move = lambda path, v: v + t * ("bias" in jax.tree_util.keystr(path))
        return {**variables, "params": jax.tree_util.tree_map_with_path(move, variables["params"])}

    want = (loss(shifted(1e-6), y) - loss(shifted(-1e-6), y)) / 2e-6
    assert abs(want) > 1e-3
    np.testing.assert_allclose(along, want, rtol=1e-6)


def test_it_is_the_location_of_a_noise_wherever_one_is_used(network, key):
    _, variables, x = network
    module = InvertibleResidual(features=4, coefficient=0.8)
    variables = {name: {"block_0": part["block_0"]} for name, part in variables.items()}
    weights = jnp.asarray(np.random.default_rng(4).normal(size=(x[0].size, 2)), jnp.float32) / 5

    def noise_of(variables):
        return TransformedNoise(GaussianNoise(0.5), jax.tree_util.Partial(module.apply, variables))

    def encode(y):
        mean = y.reshape(len(y), -1) @ weights
        return mean, jnp.zeros_like(mean)

    decode = lambda z: (z @ weights.T).reshape(-1, *x.shape[1:])

    bound = lambda variables: spread_elbo(x, encode, decode, noise_of(variables), key=key).elbo.mean()

    def divergence_and_kernel(noise, x):
        divergence = spread_divergence(x[:3], x[3:], noise, num_samples=8, key=key)
        return divergence.value, noise.mmd_kernel(x[:3], x[3:])

    @jax.jit
    def values(variables):
        expected = divergence_and_kernel(GaussianNoise(0.5), module.apply(variables, x))
        return divergence_and_kernel(noise_of(variables), x), expected, jax.grad(bound)(variables)["params"]

    (divergence, kernel), expected, gradient = values(variables)
    np.testing.assert_allclose(divergence, expected[0], rtol=1e-4)
    np.testing.assert_allclose(kernel, expected[1], rtol=1e-3)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient)) > 1e-3


@pytest.mark.parametrize(
    ("settings", "shape", "message"),
    [
        ({"coefficient": 1.0}, (1, 4, 4, 1), "coefficient must be between 0 and 1, got 1.0"),
        ({"blocks": 0}, (1, 4, 4, 1), "blocks must be at least 1, got 0"),
        ({}, (4, 4, 1), r"x must be images \[batch, height, width, channels\], got shape \(4, 4, 1\)"),
    ],
)
def test_bad_arguments_are_refused(settings, shape, message):
    with pytest.raises(ValueError, match=message):
        InvertibleResidual(**settings).init(jax.random.key(0), jnp.ones(shape))
