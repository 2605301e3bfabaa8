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
# # Why the likelihood is zero, and what to do
#
# This takes twenty minutes and follows the argument step by step: a model without noise has likelihood zero almost
# everywhere; adding the same noise to data and model repairs this without moving the optimum; adding it to one side
# moves the optimum; not every noise will do; and a generator can be trained in this way. You need
# `pip install "spread-jax[train]"` and a notebook, and it all runs on a laptop.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax

import spread_jax as sj

key = jax.random.key(0)

# %% [markdown]
# ## 1. A model that gives probability to almost nothing
#
# Take one latent number $z \sim N(0, 1)$ and place it on a line in the plane, $x = a z$. Both the data and the model
# are of this kind, and only the direction of the line has to be learned.

# %%
direction = lambda angle: jnp.stack([jnp.cos(angle), jnp.sin(angle)])
truth, guess = direction(0.5), direction(0.7)
z = jax.random.normal(key, (200, 1))
data, model = z * truth, z * guess

figure, axes = plt.subplots(figsize=(5, 4))
axes.scatter(*data.T, s=8, label="data")
axes.scatter(*model.T, s=8, label="model")
axes.set(xlabel="$x_1$", ylabel="$x_2$", aspect="equal", title="Two lines that meet in one point")
axes.legend(frameon=False)
figure.tight_layout()

# %% [markdown]
# The model's covariance $a a^\top$ has determinant zero, so its density is infinite on its own line and zero off it.
# All data except those at the crossing have likelihood zero. The log-likelihood is $-\infty$ for *every* wrong angle,
# near or far, so it cannot say which of two wrong angles is better, and it has no gradient.

# %%
for angle in (0.5, 0.51, 0.7, 1.5):
    a = direction(angle)
    off_the_line = jnp.abs(data @ jnp.array([-a[1], a[0]])).max()
    determinant = abs(jnp.linalg.det(jnp.outer(a, a)))
    print(f"angle {angle}: determinant {determinant:.6f}, farthest data point off the line: {off_the_line:.2f}")

# %% [markdown]
# ## 2. The smallest case: two point masses
#
# Let all the mass of $p$ be at 0 and all the mass of $q$ at $d$. For every $d \neq 0$, $\mathrm{KL}(p\|q) = \infty$.
# Now *spread* both: replace $x$ by $y = x + \sigma\epsilon$. Then $\tilde p = N(0, \sigma^2)$, $\tilde q = N(d,
# \sigma^2)$ and
#
# $$\mathrm{KL}(\tilde p\|\tilde q) = \frac{d^2}{2\sigma^2},$$
#
# which is finite, is zero only at $d = 0$, and has a gradient that points to the answer.

# %%
distances = jnp.linspace(0.0, 3.0, 100)[:, None]
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.5))
y = jnp.linspace(-4, 6, 300)[:, None]
for location, name in ((0.0, r"$\tilde p$"), (2.0, r"$\tilde q$")):
    left.plot(y[:, 0], jnp.exp(sj.GaussianNoise(1.0).log_prob(y, jnp.full_like(y, location))), label=name)
    left.axvline(location, color="0.6", linestyle=":")
left.set(xlabel="y", title="Point masses (dotted) and their spread densities", ylim=(0, None))
left.legend(frameon=False)
for noise, name in (
    (sj.GaussianNoise(1.0), r"Gaussian, $\sigma = 1$"),
    (sj.GaussianNoise(2.0), r"Gaussian, $\sigma = 2$"),
    (sj.LaplaceNoise(1.0), "Laplace, b = 1"),
    (sj.CauchyNoise(1.0), "Cauchy, b = 1"),
):
    right.plot(distances, sj.spread_kl_deltas(jnp.zeros_like(distances), distances, noise), label=name)
right.set(xlabel="distance d", ylabel="spread KL, nats", title="Infinite without noise, finite with it")
right.legend(frameon=False)
figure.tight_layout()

# %% [markdown]
# Every $f$-divergence becomes useful in the same way. From samples, it can be estimated with an error bar:

# %%
zero, two = jnp.zeros((1, 1)), jnp.full((1, 1), 2.0)
for divergence in (sj.kl, sj.jensen_shannon, sj.squared_hellinger, sj.total_variation):
    value, error = sj.spread_divergence(
        zero, two, noise=sj.GaussianNoise(1.0), divergence=divergence, num_samples=2000, key=key
    )
    print(f"{divergence.name:18s} {value:.3f} ± {error:.3f}")

# %% [markdown]
# ## 3. Back to the line
#
# Once spread, the model of the line is $N(0, a a^\top + \sigma^2 I)$, and the spread KL to the truth is that between
# two Gaussians. Now nearby angles are better than distant ones, and the minimum is at the truth *for every noise
# scale*: noise flattens the objective, but does not move its optimum.

# %%
angles = jnp.linspace(-0.8, 1.8, 261)


def spread_kl_of_angle(angle, sigma):
    line = lambda angle: jnp.outer(direction(angle), direction(angle))
    return sj.spread_kl_gaussians(jnp.zeros(2), line(0.5), jnp.zeros(2), line(angle), sj.GaussianNoise(sigma))


figure, axes = plt.subplots(figsize=(6, 3.5))
for sigma in (0.1, 0.3, 1.0):
    curve = jax.vmap(lambda angle, sigma=sigma: spread_kl_of_angle(angle, sigma))(angles)
    axes.plot(angles, curve, label=rf"$\sigma = {sigma}$")
    print(f"sigma {sigma}: smallest at angle {angles[curve.argmin()]:.2f}")
axes.axvline(0.5, color="0.6", linestyle=":")
axes.set(xlabel="angle of the model's line", ylabel="spread KL, nats", yscale="log", ylim=(1e-4, 100))
axes.legend(frameon=False)
figure.tight_layout()

# %% [markdown]
# ## 4. Why both sides
#
# A variational autoencoder puts noise on the model only. For data of variance $v$ and a model $N(0, a)$ with added
# noise of variance $\sigma^2$, maximum likelihood finds $\max(v - \sigma^2, 0)$: the model shrinks to make room for its
# own noise. With noise on the data only it finds $v + \sigma^2$, and with noise on both it finds $v$.

# %%
scales = jnp.linspace(0.01, 1.5, 60)
figure, axes = plt.subplots(figsize=(6, 3.5))
for side in ("both", "model", "data"):
    found = jax.vmap(lambda s, side=side: sj.gaussian_mle_variance(jnp.float32(1), sj.GaussianNoise(s), spread=side))
    axes.plot(scales, found(scales), label=f"noise on: {side}")
axes.set(xlabel=r"noise scale $\sigma$", ylabel="estimated variance (truth 1)")
axes.legend(frameon=False)
figure.tight_layout()

# %% [markdown]
# ## 5. Not every noise will do
#
# Two conditions are needed: the spread densities must share their support, and different $p$ must spread to different
# $\tilde p$. The first condition fails for noise of bounded support:

# %%
for noise in (sj.LaplaceNoise(1.0), sj.UniformNoise(1.0)):
    print(type(noise).__name__, "is", sj.check_valid_spread(noise), end="\n\n")

# %% [markdown]
# ## 6. Train a generator
#
# For a curved $g$ there is no closed form, but there is a lower bound on $\log\tilde p(y)$ with an encoder $q(z|y)$, as
# in a variational autoencoder; `spread_elbo` adds the noise to the data too. The data lie on a closed curve.

# %%
t = jax.random.uniform(jax.random.fold_in(key, 1), (300,), maxval=2 * jnp.pi)
curve = jnp.stack([jnp.cos(t), jnp.sin(t) * jnp.cos(t) + 0.5 * jnp.sin(t)], axis=1)


def init(key, sizes):
    keys = jax.random.split(key, len(sizes))
    return [
        (jax.random.normal(k, (m, n)) / m**0.5, jnp.zeros(n)) for k, m, n in zip(keys, sizes, sizes[1:], strict=False)
    ]


def apply(layers, x):
    for w, b in layers[:-1]:
        x = jnp.tanh(x @ w + b)
    return x @ layers[-1][0] + layers[-1][1]


params = {
    "encoder": init(jax.random.fold_in(key, 2), (2, 32, 32, 4)),
    "decoder": init(jax.random.fold_in(key, 3), (2, 32, 32, 2)),
}
before = params
optimizer = optax.adam(5e-3)


@jax.jit
def step(params, opt_state, key, sigma):
    def loss(params):
        encode = lambda y: jnp.split(apply(params["encoder"], y), 2, axis=1)  # mean and log_std of q(z|y)
        decode = lambda z: apply(params["decoder"], z)
        return -sj.spread_elbo(curve, encode, decode, sj.GaussianNoise(sigma), key=key).elbo.mean()

    value, gradient = jax.value_and_grad(loss)(params)
    updates, opt_state = optimizer.update(gradient, opt_state)
    return optax.apply_updates(params, updates), opt_state, value


opt_state = optimizer.init(params)
for i in range(900):
    sigma = max(0.1, 0.5 * 0.9 ** (i // 40))  # from large noise, easy to see far with, to small, which shows detail
    params, opt_state, value = step(params, opt_state, jax.random.fold_in(key, i), sigma)
    if i % 300 == 299:
        print(f"step {i + 1}: bound {-value:.3f} nats at sigma {sigma:.2f}")

# %%
latent = jax.random.normal(jax.random.fold_in(key, 4), (300, 2))
figure, panels = plt.subplots(1, 3, figsize=(11, 3.4), sharex=True, sharey=True)
for panel, points, title in zip(
    panels,
    (curve, apply(before["decoder"], latent), apply(params["decoder"], latent)),
    ("data", "samples before training", "samples after"),
    strict=True,
):
    panel.scatter(*points.T, s=5)
    panel.set(title=title, aspect="equal")


def mean_distance(points, others):
    return jnp.linalg.norm(points[:, None] - others[None], axis=2).min(axis=1).mean()


samples = apply(params["decoder"], latent)
print(f"mean distance from samples to data: {mean_distance(samples, curve):.3f}")
print(f"mean distance from data to samples: {mean_distance(curve, samples):.3f}")

# %% [markdown]
# The samples are $g(z)$ without any noise: the noise was needed to compare, not to generate.
#
# ## 7. Try
#
# 1. Keep $\sigma$ at 0.5 in section 6. What is lost? (Detail below the noise scale hardly changes the objective.)
# 2. Start at $\sigma = 0.1$. What is lost now? (Distant parts of the curve give little gradient.)
# 3. Replace `sj.spread_elbo` by `sj.elbo` at a fixed $\sigma = 0.5$: the samples shrink inwards, as in section 4.
#
# Next: [the mathematics](../mathematics.md), [choosing the noise](../guides/choose_the_noise.md), or
# [your own images](../guides/train_on_your_images.md).
