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
# # One sigma or many?
#
# Ten minutes on a choice that decides what pictures look like: how large the noise is. With one $\sigma$ it is a
# compromise, with a law of many it need not be one. Read [why the likelihood is zero](why_zero_likelihood.py) first.
# You need `pip install "spread-jax[train]"` and a notebook.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import spread_jax as sj

# %% [markdown]
# ## 1. Two point masses
#
# The data are one point at 0 and the model is one point at distance $d$. Their KL is infinite for every $d > 0$, so it
# does not say where to go. Spread by noise of one scale $\sigma$, the squared Hellinger distance is
# $1 - e^{-d^2 / 8\sigma^2}$. Its slope is what gradient descent follows.

# %%
LAW = sj.LogUniformScales(0.05, 2.0)
zero = jnp.zeros((1, 1))


def at_scale(distance, sigma):
    """Squared Hellinger distance of two points under noise of one scale."""
    return sj.spread_hellinger_deltas(zero, jnp.full((1, 1), distance), sj.GaussianNoise(sigma))[0]


def over_scales(distance):
    """Its mean over the law of scales, by quadrature."""
    return sj.divergence_over_scales(lambda sigma: at_scale(distance, sigma), LAW)


objectives = {
    "sigma = 0.05": lambda d: at_scale(d, 0.05),
    "sigma = 0.5": lambda d: at_scale(d, 0.5),
    "sigma = 2": lambda d: at_scale(d, 2.0),
    "log-uniform on [0.05, 2]": over_scales,
}
distances = jnp.geomspace(0.01, 6.0, 200)
slopes = {name: np.asarray(jax.jit(jax.vmap(jax.grad(of)))(distances)) for name, of in objectives.items()}

figure, axes = plt.subplots(figsize=(7, 4))
for name, slope in slopes.items():
    axes.loglog(distances, np.maximum(slope, 1e-8), label=name, lw=3 if "log" in name else 1.5)
axes.set(xlabel="distance d of data and model", ylabel="slope of the divergence", ylim=(1e-4, 30))
axes.legend()
plt.show()

# %% [markdown]
# A small $\sigma$ has a steep slope nearby and none at all from a few $\sigma$ on: spread data and spread model do not
# overlap, every critic wins, and nothing says where to go. A large $\sigma$ sees the model from afar, and hardly
# notices the last steps. The law of scales has a useful slope at every distance: an eighth or more of the best of the
# three scales for that distance, without anybody having chosen it.

# %%
best = np.max([slope for name, slope in slopes.items() if "log" not in name], axis=0)
law = slopes["log-uniform on [0.05, 2]"]
print(f"slope at d = 3: sigma 0.05 {slopes['sigma = 0.05'][np.searchsorted(distances, 3.0)]:.0e}, "
      f"the law {law[np.searchsorted(distances, 3.0)]:.2f}")  # fmt: skip
assert slopes["sigma = 0.05"][np.searchsorted(distances, 3.0)] < 1e-6
print(f"the law over the best single scale, at worst: {(law / best).min():.2f}")
assert (law > best / 20).all()

# %% [markdown]
# Gradient descent from $d = 3$ with steps of 0.05 shows what that means: how many of them until the model is within
# 0.01 of the data?

# %%


@jax.jit
def descend(slope_table):
    """Steps until |d| < 0.01, at most 20,000."""
    slope = lambda d: jnp.sign(d) * jnp.interp(jnp.abs(d), distances, slope_table, left=slope_table[0])
    far = lambda state: (jnp.abs(state[0]) > 0.01) & (state[1] < 20_000)
    return jax.lax.while_loop(far, lambda state: (state[0] - 0.05 * slope(state[0]), state[1] + 1), (3.0, 0))


steps = {name: int(descend(jnp.asarray(slope))[1]) for name, slope in slopes.items()}
for name, number in steps.items():
    print(f"{name:26s} {'never' if number == 20_000 else number}")
assert steps["sigma = 0.05"] == 20_000
assert steps["log-uniform on [0.05, 2]"] < 1.2 * min(steps["sigma = 0.5"], steps["sigma = 2"])

# %% [markdown]
# The law needs about as many as the best of the three, which we could choose only because we knew where the data were.

# %% [markdown]
# ## 2. Mass and detail
#
# Images have both: where the mass is (is there a second cluster?) and what it looks like (is a cluster one blob, or two
# thin lines?). Take data with two clusters, each two points 0.3 apart, and two wrong models: one *misses a cluster*,
# the other *blurs* the clusters, a point in the middle of each. Which noise tells that they are wrong?

# %%
points = lambda *x: jnp.asarray(x, jnp.float32)[:, None]
data = points(-2.15, -1.85, 1.85, 2.15)
models = {"misses a cluster": points(-2.15, -1.85), "blurs the clusters": points(-2.0, 2.0)}
scales = np.geomspace(0.03, 4.0, 13)


def jensen_shannon(model, sigma):
    """Of data and model under noise of one scale, from 4,000 draws of y each."""
    return sj.spread_divergence(
        data, model, sj.GaussianNoise(sigma), divergence=sj.jensen_shannon, num_samples=4000, key=jax.random.key(0)
    )


figure, axes = plt.subplots(figsize=(7, 4))
found = {}
for name, model in models.items():
    each = jax.jit(lambda sigmas, model=model: jax.lax.map(lambda sigma: jensen_shannon(model, sigma), sigmas))(scales)
    found[name] = np.asarray(each.value)
    axes.errorbar(scales, each.value, each.standard_error, label=name, marker="o")
axes.set(xlabel="sigma", ylabel="spread Jensen-Shannon divergence, nats", xscale="log")
axes.legend()
plt.show()

# %% [markdown]
# At $\sigma = 1$ the missing cluster is plain to see and the blur has vanished in the noise: a model trained at that
# scale has no reason to be sharp. At $\sigma = 0.03$ both are near their largest value, $\log 2$ for the blur: data and
# model hardly overlap there, and by section 1 there is no slope to follow. This is why one scale gives blurred
# pictures, or a game that does not train, and why annealing from large to small helps, but forgets the mass in the end.

# %%
at = lambda name, sigma: found[name][np.abs(scales - sigma).argmin()]
print(
    f"at sigma near 1: missing cluster {at('misses a cluster', 1.0):.3f}, blur {at('blurs the clusters', 1.0):.4f} nats"
)
assert at("misses a cluster", 1.0) > 0.1 > 20 * at("blurs the clusters", 1.0)
assert found["blurs the clusters"][0] > 0.8 * np.log(2)

# %% [markdown]
# ## 3. In practice
#
# `density_ratio_losses` trains one critic for all scales, which is told the $\sigma$ of each example, and
# `spread-jax train --objective density_ratio` trains a generator of images by it. `--lowest-noise-scale` says how fine
# the detail is that anything looks at: what is finer stays in the samples as grain. `--highest-noise-scale` should be
# large enough for data and untrained samples to overlap; for images in [0, 1], 1 is. With few images, or where samples
# become alike, `--objective density_ratio_vae` compares images with what is made of their own latents, and keeps the
# bound of the delta-VAE as a term: the bound covers the data, the critic sharpens. Latents of samples are then drawn
# from a mixture of Gaussians fitted to those of the images.
