"""f-divergences against NumPy in extended precision, and their inequalities on random distributions."""

import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

from spread_jax import (
    DiscreteNoise,
    chi_squared,
    f_divergence,
    jensen_shannon,
    kl,
    reverse_kl,
    squared_hellinger,
    total_variation,
)

# f as the textbooks write it; the generators with f'(1) = 0 differ by a multiple of u - 1.
TEXTBOOK = {
    kl: lambda u: u * np.log(u),
    reverse_kl: lambda u: -np.log(u),
    jensen_shannon: lambda u: 0.5 * (u * np.log(u) - (1 + u) * np.log((1 + u) / 2)),
    squared_hellinger: lambda u: 0.5 * (np.sqrt(u) - 1) ** 2,
    total_variation: lambda u: 0.5 * np.abs(u - 1),
    chi_squared: lambda u: (u - 1) ** 2,
}
TANGENT = {kl: 1.0, reverse_kl: -1.0}
ALL = pytest.mark.parametrize("divergence", TEXTBOOK, ids=lambda d: d.name)
LONG = np.longdouble


@ALL
def test_integrands_match_extended_precision_from_e_minus_300_to_e_300(divergence, dtype):
    t = np.array([-300, -88, -21, -19, -3, -0.7, -0.01, 0.01, 0.7, 3, 19, 21, 88, 300], LONG)
    f, u = TEXTBOOK[divergence](np.exp(t)), np.exp(t)
    exact = {
        "from_q": f,
        "from_p": f / u,
        "from_mixture": 2 * (f - TANGENT.get(divergence, 0.0) * (u - 1)) / (1 + u),
    }
    largest = np.finfo(dtype).max
    functions = {name: jax.vmap(jax.value_and_grad(getattr(divergence, name))) for name in exact}
    # The last digits are those of the programs that users get, which LLVM optimises.
    options = {"xla_backend_optimization_level": 3}
    results = jax.jit(lambda t: {name: function(t) for name, function in functions.items()}, compiler_options=options)(
        t.astype(dtype)
    )
    for name, want in exact.items():
        value, slope = map(np.asarray, results[name])
        fits = np.abs(want) < largest / 10
        # 0.01 leaves the textbook form about four digits fewer than the dtype has.
        rtol = 1e-4 if dtype == "float32" else 1e-11
        np.testing.assert_allclose(value[fits], want[fits].astype(float), rtol=rtol, atol=1e-30, err_msg=name)
        assert np.isposinf(value[np.abs(want) > 10 * LONG(largest)]).all()
        assert not np.isnan(value).any(), name
        assert not np.isnan(slope).any(), name
        step = LONG(1e-6)
        move = lambda t, name=name: _exact(divergence, name, t)
        want_slope = (move(t + step) - move(t - step)) / (2 * step)
        fits &= np.abs(want_slope) < largest / 10
        np.testing.assert_allclose(slope[fits], want_slope[fits].astype(float), rtol=1e-4, atol=2e-6, err_msg=name)


def _exact(divergence, name, t):
    u = np.exp(t)
    f = TEXTBOOK[divergence](u)
    if name == "from_mixture":
        return 2 * (f - TANGENT.get(divergence, 0.0) * (u - 1)) / (1 + u)
    return f if name == "from_q" else f / u


@ALL
def test_a_custom_f_agrees_with_the_built_in_one(divergence, dtype):
    jax_forms = {
        "kl": lambda u: u * jnp.log(u),
        "reverse_kl": lambda u: -jnp.log(u),
        "jensen_shannon": lambda u: 0.5 * (u * jnp.log(u) - (1 + u) * jnp.log((1 + u) / 2)),
        "squared_hellinger": lambda u: 0.5 * (jnp.sqrt(u) - 1) ** 2,
        "total_variation": lambda u: 0.5 * jnp.abs(u - 1),
        "chi_squared": lambda u: (u - 1) ** 2,
    }
    custom = f_divergence(jax_forms[divergence.name])
    ends = [-20.0, 20.0] if divergence is chi_squared else [-300.0, -40.0, 40.0, 300.0]
    t = jnp.asarray([*ends, -2.0, -0.3, 0.4, 2.0], dtype)
    both = [jax.vmap(jax.value_and_grad(d.from_mixture)) for d in (custom, divergence)]
    value, want = jax.jit(lambda t: [function(t) for function in both])(t)
    # The textbook forms themselves keep few digits in float32 at e^40, and continue from there.
    tol = {"rtol": 2e-4, "atol": 3e-3} if dtype == "float32" else {"rtol": 1e-9, "atol": 1e-9}
    for got, expected in zip(value, want, strict=True):
        np.testing.assert_allclose(got, expected, **tol)


@ALL
def test_conjugate_is_the_supremum_and_the_bound_is_tight_at_the_optimal_critic(divergence, x64):
    v = np.array([-2.5, -0.4, 0.3, 1.7])
    critic = np.asarray(divergence.activation(v))
    stable = np.asarray(divergence.conjugate_of_activation(v))
    np.testing.assert_allclose(divergence.conjugate(critic), stable, rtol=1e-10)
    f = TEXTBOOK[divergence]
    for s, want in zip(critic, stable, strict=True):
        search = scipy.optimize.minimize_scalar(
            lambda log_u, s=s: f(np.exp(log_u)) - s * np.exp(log_u), bounds=(-40, 8), method="bounded",
            options={"xatol": 1e-10},
        )  # fmt: skip
        np.testing.assert_allclose(-search.fun, want, atol=1e-7)
    # Random critics stay below D_f, on three labels; the best critic reaches it.
    p, q = np.array([0.2, 0.5, 0.3]), np.array([0.6, 0.1, 0.3])
    exact = (q * f(p / q)).sum()
    activation, conjugate = jax.jit(divergence.activation), jax.jit(divergence.conjugate_of_activation)
    bound = lambda v: (p * np.asarray(activation(v)) - q * np.asarray(conjugate(v))).sum()
    for seed in range(5):
        assert bound(np.random.default_rng(seed).normal(size=3)) <= exact + 1e-12
    best = scipy.optimize.minimize(lambda v: -float(bound(v)), np.zeros(3), method="Nelder-Mead",
                                   options={"maxiter": 2000, "xatol": 1e-7, "fatol": 1e-13})  # fmt: skip
    np.testing.assert_allclose(-best.fun, exact, rtol=1e-4)


def test_custom_bound_needs_no_conjugate(x64):
    custom = f_divergence(lambda u: (u - 1) ** 2 / (u + 1), name="triangular")
    p, q = np.array([0.2, 0.5, 0.3]), np.array([0.6, 0.1, 0.3])
    exact = ((p - q) ** 2 / (p + q)).sum()
    v = np.log(p / q)
    bound = lambda v: (p * custom.activation(v)).sum() - (q * custom.conjugate_of_activation(v)).sum()
    np.testing.assert_allclose(jax.jit(bound)(v), exact, rtol=1e-12)
    np.testing.assert_allclose(custom.between(np.log(p), np.log(q)), exact, rtol=1e-12)


PROBABILITIES = hypothesis.extra.numpy.arrays(np.float64, 4, elements=st.floats(0.01, 1.0)).map(lambda a: a / a.sum())


@ALL
@hypothesis.given(p=PROBABILITIES, q=PROBABILITIES, rate=st.floats(0.01, 0.9))
@hypothesis.settings(max_examples=15, deadline=None, derandomize=True)
def test_non_negative_exact_symmetric_where_due_and_smaller_after_noise(divergence, p, q, rate):
    with jax.enable_x64(True):
        between = lambda p, q: float(BETWEEN[divergence](np.log(p), np.log(q)))
        value = between(p, q)
        np.testing.assert_allclose(value, (q * TEXTBOOK[divergence](p / q)).sum(), rtol=1e-9, atol=1e-14)
        assert -1e-15 <= value <= divergence.upper_bound
        assert between(p, p) == 0
        if divergence in (jensen_shannon, squared_hellinger, total_variation):
            np.testing.assert_allclose(value, between(q, p), rtol=1e-9, atol=1e-14)
        matrix = (1 - rate) * np.eye(4) + rate / 4
        assert between(matrix @ p, matrix @ q) <= value * (1 + 1e-9) + 1e-14


BETWEEN = {divergence: jax.jit(divergence.between) for divergence in TEXTBOOK}


def test_spreading_makes_disjoint_distributions_comparable():
    noise = DiscreteNoise.uniform_mixture(3, 0.3)
    p, q = jnp.array([1.0, 0.0, 0.0]), jnp.array([0.0, 1.0, 0.0])
    assert not np.isfinite(kl.between(jnp.log(p), jnp.log(q)))
    spread = kl.between(jnp.log(noise.spread(p)), jnp.log(noise.spread(q)))
    np.testing.assert_allclose(spread, 0.7 * np.log(8), rtol=1e-5)
    np.testing.assert_allclose(noise.kl(np.array([0]), np.array([1])), [spread], rtol=1e-5)


def test_bad_f_is_refused():
    with pytest.raises(ValueError, match="f\\(1\\) must be 0"):
        f_divergence(lambda u: u**2)
    with pytest.raises(ValueError, match="must be convex"):
        f_divergence(lambda u: jnp.log(u))
    with pytest.raises(TypeError, match="f must be callable"):
        f_divergence(3.0)
    with pytest.raises(ValueError, match="one shape"):
        kl.between(jnp.zeros(3), jnp.zeros(2))


def test_the_conjugate_of_total_variation_is_bounded_by_the_range_of_its_critic():
    """sup over u >= 0 of s u - |u - 1| / 2, on a grid: -1/2 below -1/2, infinite above 1/2."""
    s = np.array([-2.0, -0.6, -0.5, -0.2, 0.3, 0.5])
    u = np.linspace(0, 50, 500_001)
    want = [np.max(each * u - 0.5 * np.abs(u - 1)) for each in s]
    np.testing.assert_allclose(total_variation.conjugate(jnp.asarray(s, jnp.float32)), want, atol=1e-6)
    assert total_variation.conjugate(jnp.float32(0.501)) == np.inf
