# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # ICA without observation noise
#
# This takes twenty minutes. Sources are mixed without noise, $x = A z$, and we want to find $A$ from $x$ alone. EM does
# not move; we show why, what spreading the data changes and what it does not, which method to use, and how to find more
# sources than there are measurements. Read [why the likelihood is zero](why_zero_likelihood.py) first. You need
# `pip install "spread-jax[train]"` and a notebook.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from spread_jax.linear import ica, mixing_error

# %% [markdown]
# ## 1. Two sources, three measurements
#
# The sources $z$ are independent, with Laplace's law and variance 1. Three microphones hear mixtures of them. The data
# lie in a plane, so every $A$ whose columns do not span exactly this plane has likelihood zero.

# %%
key = jax.random.key(0)
MIXING = np.array([[1.0, 0.4], [0.3, 1.0], [-0.6, 0.5]], np.float32)
N = 4000
z = jax.random.laplace(key, (N, 2)) / 2**0.5
x = z @ MIXING.T
variances = jnp.linalg.eigvalsh(jnp.cov(x.T))[::-1]
print("variances along principal axes:", np.abs(variances).round(4))

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
left.scatter(*z.T, s=3, color="0.5")
left.set(title="sources", xlabel="$z_1$", ylabel="$z_2$", aspect="equal")
right.scatter(*x[:, :2].T, s=3, color="0.5")
for number, column in enumerate(MIXING.T):
    right.plot(*np.outer(column[:2], [-6, 6]), color=f"C{number}", label=f"column {number + 1} of A")
right.set(title="two of three measurements", xlabel="$x_1$", ylabel="$x_2$", aspect="equal")
_ = right.legend(frameon=False)

# %% [markdown]
# Second moments tell which plane it is, and no more: $A$ times any rotation of the sources has the same covariance.
# What remains to be found is that rotation, which is possible only because the sources are not Gaussian. The error
# below is the mean deviation of entries of $A$, relative to their mean size, after its columns have been put in order
# and scaled to the right length, which only the scale of $z$ decides.

# %%
error = lambda mixing: mixing_error(mixing, MIXING, kind="direction")
directions, scales, _ = np.linalg.svd(np.cov(x.T))
turn = lambda angle: np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
start = (directions[:, :2] * scales[:2] ** 0.5) @ turn(1.2)
print(f"error of a random rotation within the plane: {error(start):.3f}")

# %% [markdown]
# ## 2. EM stalls
#
# The usual remedy is to assume a little noise, $x = Az + \gamma\epsilon$, and to use EM. Here the data really have such
# noise, and EM knows the true $\gamma$. Its E-step draws $z$ from a Gaussian around the
# solution of least squares and weights the draws.

# %%
STEPS = 100


def run_em(data, **noise):
    """Errors along the steps of EM."""
    step = jax.jit(lambda mixing, key: ica.em_step(mixing, data[:2000], num_samples=64, key=key, **noise))
    mixing, errors = jnp.asarray(start, jnp.float32), [error(start)]
    for number in range(STEPS):
        mixing = step(mixing, jax.random.fold_in(key, number))
        errors.append(error(np.asarray(mixing)))
    return errors


figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), sharey=True, layout="constrained")
for gamma in (1.0, 0.3, 0.1, 0.01):
    noisy = x + gamma * jax.random.normal(jax.random.key(1), x.shape)
    errors = run_em(noisy, noise_scale=0.0, observation_scale=gamma)
    print(f"EM, true noise {gamma:g}: error {errors[-1]:.3f} after {STEPS} steps")
    left.semilogy(errors, label=rf"$\gamma$ = {gamma:g}")
left.set(title=r"EM with the true $\gamma$", xlabel="steps", ylabel="error of directions")
left.legend(frameon=False)
for sigma in (1.0, 0.3, 0.1, 0.01):
    errors = run_em(x, noise_scale=sigma)
    print(f"spread EM, sigma {sigma:g}: error {errors[-1]:.3f} after {STEPS} steps")
    right.semilogy(errors, label=rf"$\sigma$ = {sigma:g}")
right.set(title=r"spread EM, no noise in the data", xlabel="steps")
_ = right.legend(frameon=False)

# %% [markdown]
# The smaller the noise, the slower is EM: one step is, to first order, a step of length $\gamma^2$ along a gradient,
#
# $$A \leftarrow A + \gamma^2 A (A^\top A)^{-1} \left(E[\psi(u) u^\top] - I\right) C_u^{-1},
# \qquad u = A^{+} x, \quad \psi = -\nabla \log p(z).$$
#
# So at $\gamma = 0.01$ a step is ten thousand times smaller than at 1. *Spread* EM, on the right, adds noise of scale
# $\sigma$ to the data and to the model, and makes the same step with $\sigma^2$: at a small $\sigma$ it is as slow.
#
# What is gained is that $\sigma$ is free. The noise $\gamma$ of the data is given, and a model that assumes a larger
# one has its optimum elsewhere. Spread noise is added to both sides, so the optimum is the true $A$ for every $\sigma$,
# and $\sigma$ can be large: the data here have no noise at all, and at $\sigma = 1$ EM arrives.

# %% [markdown]
# ## 3. Do not use EM
#
# The formula shows what slows EM down, and so how to avoid it. Leave out the factor $\sigma^2$ and the matrices, which
# gives the natural gradient of the spread likelihood. Or solve for its zero directly by Newton's method, since a
# Laplace law spread by Gaussian noise has a density in closed form. `fit` does the latter by default.

# %%
results = {
    "closed form": ica.fit(x, 2, source="laplace", key=key),
    "natural gradient": ica.fit(x, 2, method="natural_gradient", key=key),
}
unit = np.linalg.norm(MIXING, axis=0)
# Without noise, unmixed sources are exact up to a matrix I + E; each off-diagonal entry of E has variance 2 / (3 N).
rng = np.random.default_rng(0)
limits = []
for _ in range(500):
    mixture = rng.normal(size=(2, 2)) * (2 / (3 * N)) ** 0.5
    np.fill_diagonal(mixture, 0.0)
    limits.append(error(MIXING + MIXING @ mixture))
print(f"Cramer-Rao limit: error {np.mean(limits):.4f} on average over data sets")
for name, result in results.items():
    found = error(np.asarray(result.mixing))
    print(f"{name}: error {found:.4f} after {int(result.num_iterations)} steps, converged: {bool(result.converged)}")

# %% [markdown]
# `converged` looks at the gradient of the likelihood and not at how little a step moved, because EM that has stalled
# does not move either. It also checks whether rotating two columns would increase the likelihood, as it does where EM
# rests on a plateau with the two still mixed.

# %%
stalled = ica.fit(x, 2, method="spread_em", noise_scale=0.01, num_samples=64, max_iterations=60, key=key)
print(f"stalled: error {error(np.asarray(stalled.mixing)):.3f}, converged: {bool(stalled.converged)}")

# %% [markdown]
# ## 4. What if the sources are not Laplace?
#
# You need not know their law: by default (`source="auto"`) the score of each source is estimated from the data. Here
# one source is flat and the other has very heavy tails:

# %%
flat, heavy = jax.random.split(jax.random.key(2))
others = jnp.stack([
    jax.random.uniform(flat, (N,), minval=-(3**0.5), maxval=3**0.5),
    jax.random.t(heavy, 5.0, (N,)) * 0.6**0.5,
], axis=1)  # fmt: skip
result = ica.fit(others @ MIXING.T, 2, key=key)
print(f"uniform and Student sources: error {error(np.asarray(result.mixing)):.4f}")

# %% [markdown]
# ## 5. More sources than measurements
#
# With three sources in a plane $A$ has no left inverse, so the sources cannot be computed from $x$ even if $A$ is
# known, and methods that whiten and rotate, like FastICA, do not apply. The likelihood is still well defined, and $A$
# can be found by sampling the sources (`method="gibbs"`, which is chosen automatically here).

# %%
angles = np.array([0.2, 1.2, 2.3])
WIDE = np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32)
three = jax.random.laplace(jax.random.key(3), (N, 3)) / 2**0.5 @ WIDE.T
wide = ica.fit(three, 3, key=key)
found = np.asarray(wide.mixing)
print(f"three sources from two measurements: error {mixing_error(found, WIDE, kind='direction'):.3f}")

figure, axes = plt.subplots(figsize=(4.5, 4.5), layout="constrained")
axes.scatter(*three.T, s=3, color="0.7")
for number in range(3):
    name = ("truth", "found") if number == 0 else (None, None)
    axes.plot(*np.outer(WIDE[:, number], [-5, 5]), color="0.2", linewidth=1, label=name[0])
    axes.plot(*np.outer(found[:, number], [-5, 5]), "--", color="C1", label=name[1])
axes.set(xlabel="$x_1$", ylabel="$x_2$", xlim=(-5, 5), ylim=(-5, 5), aspect="equal")
_ = axes.legend(frameon=False)

# %% [markdown]
# ## Where to go from here
#
# - [ICA for scikit-learn users](../guides/ica_for_scikit_learn.md): the same as an estimator, beside FastICA.
# - [The mathematics](../mathematics.md#why-em-stalls) of the stall, and [results](../results/ica.md) with ten sources
#   in twenty dimensions, against the noise and against the number of examples.
# - `make ica PRESET=audio` unmixes sounds and writes them to listen to; `make ica PRESET=images` finds the features of
#   photographs.
