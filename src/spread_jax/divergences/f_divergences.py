"""f-divergences as functions of the log-ratio t = log p - log q, and their variational (f-GAN) forms."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

__all__ = [
    "FDivergence",
    "check_divergence",
    "chi_squared",
    "f_divergence",
    "jensen_shannon",
    "kl",
    "reverse_kl",
    "squared_hellinger",
    "total_variation",
]

ArrayFunction = Callable[[jax.Array], jax.Array]

# The table of a critic's functions over v: e^26 cubed fits float32, e^26 has digits beside 1 in float64.
_TABLE_END, _TABLE_NODES = 26.0, 2601


@dataclasses.dataclass(frozen=True, eq=False)
class FDivergence:
    r"""D_f(p||q) = E_q[f(p/q)] with f convex and f(1) = 0.

    Everything is a function of the log-ratio t = log p - log q, so no ratio is ever formed where it could
    overflow: a value is infinite only where the integrand itself exceeds the largest number, and neither
    values nor gradients are NaN. The three integrands have one expectation, under three distributions:

      E_{y~q} from_q(t) = E_{y~p} from_p(t) = E_{y~m} from_mixture(t),   m = (p + q) / 2.

    `from_mixture` uses f with f'(1) = 0, so it is non-negative at each t and vanishes to second order at t
    = 0; for all but chi-squared it grows no faster than |t|, and estimates by it have a small variance.

    Attributes:
      name: what it is called.
      from_q: f(e^t).
      from_p: e^-t f(e^t).
      from_mixture: 2 f(e^t) / (1 + e^t).
      activation: v -> T, from any real number onto the values a critic may take: the domain of the conjugate.
      conjugate_of_activation: v -> f*(activation(v)), in one stable expression.
      tight: t -> the v at which the bound below is tight where the log-ratio is t, so that activation(tight(t)) =
        f'(e^t); None where f is straight on either side of 1, and tells no more than the sign of t.
      conjugate: s -> f*(s) = sup_u (s u - f(u)); None where it was not given.
      upper_bound: the largest value D_f takes.

    The variational lower bound, tight at T = f'(p/q), is

      D_f(p||q) >= E_p activation(v(y)) - E_q conjugate_of_activation(v(y)).

    Values of this class are static: compare and hash by identity, and close over them in jit.

    Source: Nowozin, Cseke and Tomioka, f-GAN, NIPS 2016, tables 1 and 2; with the factors of the definitions
    here (Jensen-Shannon at most log 2, squared Hellinger and total variation at most 1).
    """

    name: str
    from_q: ArrayFunction
    from_p: ArrayFunction
    from_mixture: ArrayFunction
    activation: ArrayFunction
    conjugate_of_activation: ArrayFunction
    tight: ArrayFunction | None = None
    conjugate: ArrayFunction | None = None
    upper_bound: float = math.inf

    def __repr__(self) -> str:
        return f"<FDivergence {self.name}>"

    def between(self, log_p: jax.Array, log_q: jax.Array) -> jax.Array:
        """D_f of two discrete distributions, exactly.

        Args:
          log_p: [..., n], log-probabilities; -inf of a label that has none.
          log_q: [..., n], log-probabilities.

        Returns:
          [...], in nats.

        Example:
          >>> import jax.numpy as jnp
          >>> p, q = jnp.array([0.5, 0.5]), jnp.array([0.25, 0.75])
          >>> print(total_variation.between(jnp.log(p), jnp.log(q)).round(4))
          0.25
        """
        log_p, log_q = jnp.asarray(log_p), jnp.asarray(log_q)
        if log_p.shape != log_q.shape or log_p.ndim == 0:
            raise ValueError(f"log_p and log_q must have one shape [..., n], got {log_p.shape} and {log_q.shape}.")
        mixture = 0.5 * (jnp.exp(log_p) + jnp.exp(log_q))
        # At the ends of t the integrand has its limit, or grows without one.
        far = 1e30
        either = (log_p > -jnp.inf) | (log_q > -jnp.inf)
        t = jnp.clip(jnp.where(either, log_p, 0) - jnp.where(either, log_q, 0), -far, far)
        terms = self.from_mixture(t)
        terms = jnp.where((jnp.abs(t) == far) & (terms > jnp.sqrt(far)), jnp.inf, terms)
        return jnp.where(either, mixture * terms, 0).sum(axis=-1)


def check_divergence(name: str, value) -> None:
    """Refuses what is no FDivergence."""
    if not isinstance(value, FDivergence):
        raise TypeError(
            f"{name} must be an FDivergence such as spread_jax.kl, got {type(value).__name__}; make one of your own f "
            "with f_divergence(f)."
        )


def f_divergence(
    f: ArrayFunction,
    *,
    name: str = "custom",
    conjugate: ArrayFunction | None = None,
    upper_bound: float = math.inf,
) -> FDivergence:
    r"""The f-divergence of any convex f with f(1) = 0.

    Beyond ratios that fit the dtype (e^+-26 in float32, e^+-212 in float64, so that f may cube them) the
    integrands continue linearly in t, which is exact for every f that grows at its ends like a power times
    at most a logarithm and whose integrand stays finite. The critic of the variational bound is the
    log-ratio itself, activation(v) = f'(e^v), so no conjugate is needed: f*(f'(u)) = u f'(u) - f(u). Both are
    tabulated in double precision here, as that difference cancels, and continued linearly in v.

    Args:
      f: u -> f(u), elementwise on positive arrays, differentiable by jax (almost everywhere), convex, f(1)
        = 0.
      name: what it is called.
      conjugate: s -> f*(s), if there is a closed form; kept as an attribute, used nowhere.
      upper_bound: the largest value of the divergence, if it is known.

    Returns:
      FDivergence.

    Raises:
      TypeError: if `f` is not callable.
      ValueError: if f(1) is not zero, or f lies below its tangent at 1 somewhere on a grid (it is not
        convex).

    Example:
      >>> import jax.numpy as jnp
      >>> triangular = f_divergence(lambda u: (u - 1) ** 2 / (u + 1), name="triangular")
      >>> print(triangular.from_mixture(jnp.array([0.0, 300.0])).round(3))
      [0. 2.]
    """
    if not callable(f):
        raise TypeError(f"f must be callable, got {type(f).__name__}.")
    with jax.ensure_compile_time_eval():
        grid = jnp.array([1e-3, 0.1, 0.5, 0.9, 1.0, 1.1, 2.0, 10.0, 1e3], jnp.float32)
        values, at_one = f(grid), float(f(jnp.float32(1)))
        below, slope, above = (float(jax.grad(f)(jnp.float32(u))) for u in (0.999, 1.0, 1.001))
        if above - below > 0.1 * (1 + abs(slope)):  # a kink: its middle subgradient
            slope = 0.5 * (below + above)
        gaps = values - slope * (grid - 1)
        convex = bool((gaps >= -1e-5 * (1 + jnp.abs(values))).all())
    if not abs(at_one) < 1e-6:
        raise ValueError(f"f(1) must be 0, got {at_one:g}; subtract that constant from f.")
    if not convex:
        raise ValueError("f must be convex, but it lies below its tangent at 1; check its sign.")

    def from_q(t):
        return _continued(lambda t: f(jnp.exp(t)), t)

    def from_p(t):
        return _continued(lambda t: jnp.exp(-t) * f(jnp.exp(t)), t)

    def from_mixture(t):
        t = jnp.asarray(t)
        # E_m of 2 (u - 1) / (u + 1) = 2 tanh(t / 2) is zero: removing the tangent keeps the expectation.
        tangent = 2 * slope * jnp.tanh(0.5 * t)
        positive = t > 0
        above, below = jnp.where(positive, t, 0), jnp.where(positive, 0, t)
        of_p, of_q = 2 * from_p(above) * jax.nn.sigmoid(above), 2 * from_q(below) * jax.nn.sigmoid(-below)
        return jnp.where(positive, of_p, of_q) - tangent

    slope_of = jax.grad(lambda u: f(u).sum())
    slopes, conjugates = _critic_tables(f, slope_of)
    activation = _tabulated(lambda v: slope_of(jnp.exp(v)), slopes)
    conjugate_of_activation = _tabulated(lambda v: jnp.exp(v) * slope_of(jnp.exp(v)) - f(jnp.exp(v)), conjugates)
    of_critic = activation, conjugate_of_activation, lambda t: t
    return FDivergence(name, from_q, from_p, from_mixture, *of_critic, conjugate, upper_bound)


def _critic_tables(f, slope_of):
    """Values and slopes in v of f'(e^v) and of f*(f'(e^v)), [nodes] in double precision."""
    with jax.ensure_compile_time_eval(), jax.enable_x64(True):
        u = jnp.exp(jnp.linspace(-_TABLE_END, _TABLE_END, _TABLE_NODES, dtype=jnp.float64))
        slope, curvature = jax.jvp(slope_of, (u,), (jnp.ones_like(u),))
        tables = (slope, u * curvature), (u * slope - f(u), jnp.square(u) * curvature)
        return jax.tree_util.tree_map(np.asarray, tables)


def _tabulated(function, table):
    """`function` near zero, where it has its digits; further off cubic between the nodes of a table, then linear."""

    def interpolated(v):
        values, slopes = (jnp.asarray(part, v.dtype) for part in table)
        step = 2 * _TABLE_END / (_TABLE_NODES - 1)
        inside = jnp.clip(v, -_TABLE_END, _TABLE_END)
        place = (inside + _TABLE_END) / step
        left = jnp.clip(jnp.floor(place), 0, _TABLE_NODES - 2).astype(int)
        w = place - left.astype(v.dtype)
        (y, y2), (d, d2) = ((part[left], part[left + 1]) for part in (values, slopes))
        rise = y2 - y
        cubic = y + w * (step * d + w * (3 * rise - step * (2 * d + d2) + w * (step * (d + d2) - 2 * rise)))
        return cubic + jnp.where(v > 0, slopes[-1], slopes[0]) * (v - inside)

    def of_any(v):
        v = jnp.asarray(v)
        near = jnp.abs(v) < (8 if jnp.finfo(v.dtype).eps < 1e-10 else 2)
        return jnp.where(near, function(jnp.where(near, v, 0)), interpolated(v))

    return of_any


def _continued(function, t):
    """function(t), continued linearly where e^t would leave the dtype."""
    t = jnp.asarray(t)
    limit = 0.3 * math.log(float(jnp.finfo(t.dtype).max))  # f and its derivative may cube their argument
    inside = jnp.clip(t, -limit, limit)
    fixed = jax.lax.stop_gradient(inside)
    slope = jax.jvp(function, (fixed,), (jnp.ones_like(fixed),))[1]
    outside = jax.lax.stop_gradient(slope) * (t - fixed)
    return jnp.where(jnp.abs(t) <= limit, function(inside), function(fixed) + outside)


def _times_exp(t):
    """t e^t, which is 0 and not NaN at -inf."""
    far = t < -1e30
    return jnp.where(far, 0, t * jnp.exp(jnp.where(far, 0, t)))


def _skewed_information(t):
    """2 (t sigmoid(t) - tanh(t / 2)) = t (1 + x) - 2 x with x = tanh(t / 2): about t^2 / 2 at zero."""
    far = t < -20  # where 1 + x has lost its digits and 1 + e^t is 1
    below, near = jnp.where(far, t, -20), jnp.where(far, 0, t)
    x = jnp.tanh(0.5 * near)
    return jnp.where(far, 2 + 2 * _times_exp(below) - 4 * jnp.exp(below), near * (1 + x) - 2 * x)


def _jensen_shannon_mixture(t):
    """log 2 minus the entropy of a coin of log-odds t: (t x + log(1 - x^2)) / 2 with x = tanh(t / 2)."""
    a = jnp.abs(t)
    near = a < 1
    small, large = jnp.where(near, a, 0), jnp.where(near, 1, a)
    x = jnp.tanh(0.5 * small)
    below = 0.5 * (small * x + jnp.log1p(-jnp.square(x)))
    above = math.log(2.0) - jnp.log1p(jnp.exp(-large)) - large * jax.nn.sigmoid(-large)
    return jnp.where(near, below, above)


@jax.custom_jvp
def _jensen_shannon_from_q(t):
    """f(e^t) = (1 + e^t) from_mixture(t) / 2; its derivative is written out, or it were 0 times infinity."""
    return 0.5 * _jensen_shannon_mixture(t) * (1 + jnp.exp(t))


@_jensen_shannon_from_q.defjvp
def _jensen_shannon_from_q_jvp(primals, tangents):
    (t,), (dt,) = primals, tangents
    return _jensen_shannon_from_q(t), 0.5 * jnp.exp(t) * (math.log(2.0) - jax.nn.softplus(-t)) * dt


def _hellinger_mixture(t):
    """(e^(t/2) - 1)^2 / (1 + e^t), which is even in t."""
    half = jnp.exp(-0.5 * jnp.abs(t))
    return jnp.square(jnp.expm1(-0.5 * jnp.abs(t))) / (1 + jnp.square(half))


def _chi_squared_mixture(t):
    """2 (e^t - 1) tanh(t / 2), without the product of infinity and a derivative of zero."""
    far = t > 40
    above, near = jnp.where(far, t, 40), jnp.where(far, 0, t)
    return jnp.where(far, 2 * jnp.exp(above) - 6, 2 * jnp.expm1(near) * jnp.tanh(0.5 * near))


def _below(s, limit, function):
    """function(s) for s below `limit`, infinity from there on."""
    s = jnp.asarray(s)
    inside = s < limit
    return jnp.where(inside, function(jnp.where(inside, s, 0)), jnp.inf)


def _chi_squared_conjugate(s):
    """s + s^2 / 4, and -1 below s = -2, where the supremum over u >= 0 sits at u = 0."""
    s = jnp.maximum(s, -2)
    return s + 0.25 * jnp.square(s)


kl = FDivergence(
    name="kl",
    from_q=_times_exp,
    from_p=lambda t: t,
    from_mixture=_skewed_information,
    activation=lambda v: v,
    conjugate_of_activation=lambda v: jnp.exp(v - 1),
    tight=lambda t: t + 1,
    conjugate=lambda s: jnp.exp(s - 1),
)
"""KL(p||q) = E_p log(p/q), in nats: f(u) = u log u."""

reverse_kl = FDivergence(
    name="reverse_kl",
    from_q=lambda t: -t,
    from_p=lambda t: _times_exp(-t),
    from_mixture=lambda t: _skewed_information(-t),
    activation=lambda v: -jnp.exp(-v),
    conjugate_of_activation=lambda v: v - 1,
    tight=lambda t: t,
    conjugate=lambda s: jnp.where(s < 0, -1 - jnp.log(jnp.where(s < 0, -s, 1)), jnp.inf),
)
"""KL(q||p), in nats: f(u) = -log u."""

jensen_shannon = FDivergence(
    name="jensen_shannon",
    from_q=_jensen_shannon_from_q,
    from_p=lambda t: _jensen_shannon_from_q(-t),
    from_mixture=_jensen_shannon_mixture,
    activation=lambda v: 0.5 * (math.log(2.0) - jax.nn.softplus(-v)),
    conjugate_of_activation=lambda v: 0.5 * (jax.nn.softplus(v) - math.log(2.0)),
    tight=lambda t: t,
    conjugate=lambda s: _below(s, 0.5 * math.log(2.0), lambda s: -0.5 * jnp.log(2 - jnp.exp(2 * s))),
    upper_bound=math.log(2.0),
)
"""KL(p||m) / 2 + KL(q||m) / 2 with m = (p + q) / 2, in nats, at most log 2."""

squared_hellinger = FDivergence(
    name="squared_hellinger",
    from_q=lambda t: 0.5 * jnp.square(jnp.expm1(0.5 * t)),
    from_p=lambda t: 0.5 * jnp.square(jnp.expm1(-0.5 * t)),
    from_mixture=_hellinger_mixture,
    activation=lambda v: -0.5 * jnp.expm1(-v),
    conjugate_of_activation=lambda v: 0.5 * jnp.expm1(v),
    tight=lambda t: 0.5 * t,
    conjugate=lambda s: _below(s, 0.5, lambda s: s / (1 - 2 * s)),
    upper_bound=1.0,
)
"""1 - E_q sqrt(p/q), at most 1: f(u) = (sqrt(u) - 1)^2 / 2."""

total_variation = FDivergence(
    name="total_variation",
    from_q=lambda t: 0.5 * jnp.abs(jnp.expm1(t)),
    from_p=lambda t: 0.5 * jnp.abs(jnp.expm1(-t)),
    from_mixture=lambda t: jnp.abs(jnp.tanh(0.5 * t)),
    activation=lambda v: 0.5 * jnp.tanh(v),
    conjugate_of_activation=lambda v: 0.5 * jnp.tanh(v),
    conjugate=lambda s: jnp.where(s <= 0.5, jnp.maximum(s, -0.5), jnp.inf),
    upper_bound=1.0,
)
"""E_q |p/q - 1| / 2, at most 1."""

chi_squared = FDivergence(
    name="chi_squared",
    from_q=lambda t: jnp.square(jnp.expm1(t)),
    from_p=lambda t: 4 * jnp.square(jnp.sinh(0.5 * t)),
    from_mixture=_chi_squared_mixture,
    activation=lambda v: v,
    conjugate_of_activation=_chi_squared_conjugate,
    tight=lambda t: 2 * jnp.expm1(t),
    conjugate=_chi_squared_conjugate,
)
"""Pearson's E_q (p/q - 1)^2: f(u) = (u - 1)^2."""
