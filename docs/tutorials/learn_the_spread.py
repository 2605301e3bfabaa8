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
# # Learn the spread
#
# This takes fifteen minutes, on a problem where every number is exact: which noise best reveals that a model is wrong,
# why noise needs a constraint, how noise and model are trained in turn, and what is gained. Read
# [why the likelihood is zero](why_zero_likelihood.py) first. You need `pip install "spread-jax[train]"` and a notebook.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import spread_jax as sj
from spread_jax.training import LossOutput, Player, Round, create_train_state, make_train_step

# %% [markdown]
# ## 1. A line, and noise of three shapes
#
# Data lie on a line through the plane, $x = a z$ with $z \sim N(0, 1)$ and $a$ of length 1 at the angle 0.5. The model
# is such a line at another angle, so without noise the KL between them is infinite. With noise of covariance $C$ it is
# that of two Gaussians, $N(0, aa^\top + C)$ and $N(0, bb^\top + C)$.
#
# Which $C$? Isotropic noise treats all directions alike. A *low-rank* covariance $C = \sigma^2 I + LL^\top$ has a small
# $\sigma$ and one column $L$ along which there is much more noise. So that the comparison is fair, all noises here have
# the same entropy: the ellipses have the same area.

# %%
TRUTH, SIGMA, ISOTROPIC = 0.5, 0.2, 0.5
LENGTH = (ISOTROPIC**4 / SIGMA**2 - SIGMA**2) ** 0.5  # of L: the determinants of both covariances are then equal
direction = lambda angle: jnp.stack([jnp.cos(angle), jnp.sin(angle)])
line = lambda angle: jnp.outer(direction(angle), direction(angle))
zero = jnp.zeros(2)


def ridge(angle):
    """Noise that is larger along one direction."""
    return sj.LowRankGaussianNoise(SIGMA, LENGTH * direction(jnp.float32(angle))[:, None])


@jax.jit
def spread_kl(angle, noise):
    """Of the model at an angle, in nats."""
    return sj.spread_kl_gaussians(zero, line(TRUTH), zero, line(angle), noise)


entropy = jax.jit(lambda noise: noise.entropy(jnp.zeros((1, 2)))[0])
isotropic, across = sj.GaussianNoise(ISOTROPIC), ridge(TRUTH + jnp.pi / 2)
for name, noise in (("isotropic", isotropic), ("ridge", across)):
    print(f"entropy of the {name} noise: {entropy(noise):.3f} nats")

# %% [markdown]
# Take a model at the angle 0.9 and rotate the noise. Its direction decides how visible the error is:

# %%
wrong = 0.9
turns = np.linspace(0.0, np.pi, 181)
seen = np.asarray(jax.jit(jax.vmap(lambda turn: spread_kl(wrong, ridge(turn))))(turns))
best = turns[seen.argmax()]
print(f"isotropic noise sees {spread_kl(wrong, isotropic):.3f} nats")
print(f"the best direction, {best:.2f}, sees {seen.max():.3f}")
print(f"the worst direction, {turns[seen.argmin()]:.2f}, sees {seen.min():.3f}")

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
arrow = lambda angle: np.stack([np.cos(angle), np.sin(angle)])
circle = arrow(np.linspace(0.0, 2 * np.pi, 100))
for angle, name, colour in ((TRUTH, "data", "C0"), (wrong, "model", "C1")):
    left.plot(*np.outer(arrow(angle), [-2.0, 2.0]), color=colour, label=name)
for angle, name, colour in ((best, "best", "C2"), (best + np.pi / 2, "at a right angle to it", "C3")):
    half_axes = (SIGMA**2 + LENGTH**2) ** 0.5, SIGMA
    ellipse = sum(np.outer(arrow(angle + i * np.pi / 2), half_axes[i] * circle[i]) for i in (0, 1))
    left.plot(*ellipse, color=colour, linestyle="--", label=name)
left.plot(*(ISOTROPIC * circle), color="0.5", linestyle="--", label="isotropic")
left.set(aspect="equal", title="One standard deviation of three noises")
left.legend(frameon=False, fontsize=8)
right.plot(turns, seen, color="C2", label="ridge")
right.axhline(spread_kl(wrong, isotropic), color="0.5", linestyle="--", label="isotropic")
right.set(xlabel="direction of the noise", ylabel="spread KL, nats", title="How well the error is seen")
_ = right.legend(frameon=False)

# %% [markdown]
# The best noise lies nearly *along* the model's line: across it the spread model stays narrow, and data that are not on
# the line stand out. The worst noise lies across the line, and hides just that. (The smaller peak is noise along the
# data's line.)
#
# ## 2. Noise needs a constraint
#
# Less noise always discriminates more. If its size may change too, the noise shrinks, and in the limit the divergence
# is infinite again, which is where we started:

# %%
for size in (1.0, 0.5, 0.1, 0.01):
    smaller = sj.LowRankGaussianNoise(size * SIGMA, size * LENGTH * arrow(best).astype(np.float32)[:, None])
    print(f"{size:5.2f} times the noise: spread KL {spread_kl(wrong, smaller):12.1f} nats")

# %% [markdown]
# So the noise may rotate, but not shrink. `LowRankGaussianNoise(sigma, free).with_volume(v)` rescales a free factor to
# the volume $\det(L^\top L)^{1/2} = v$, here the length of the one column, so all that can be learned is its direction.
# (`with_entropy` fixes the entropy of the whole noise; for one column and one $\sigma$ the two are equivalent.)
#
# ## 3. Two players
#
# The model descends on the divergence, the noise ascends on it. Each is a `Player` with the part of the parameters that
# it moves, a loss that it minimises (the noise, minus the divergence) and its number of steps in a round. We compare
# three noises, each with the same model, start and learning rate:
#
# - isotropic noise, fixed;
# - a ridge that lies across the data's line, fixed: an unlucky choice, which one could not have known;
# - a ridge that starts there and is learned, with one step for every two of the model.
#
# The noise ascends on the *logarithm* of the divergence, which has its maximum at the same place and a gradient that
# does not fade as the model gets better. The batch holds $\sigma$ and the volume, since nothing is drawn at random
# here.


# %%
def divergence(params, batch):
    noise = sj.LowRankGaussianNoise(batch["sigma"], params["noise"]).with_volume(batch["volume"])
    return spread_kl(params["angle"], noise)


def model_loss(params, variables, batch, *, key, step):
    shown = {"angle": params["angle"], "free": params["noise"]}
    return divergence(params, batch), LossOutput({}, shown)


def noise_loss(params, variables, batch, *, key, step):
    return -jnp.log(divergence(params, batch) + 1e-6), LossOutput({}, {})


def players(noise_steps):
    return (
        Player("model", ("angle",), model_loss, optax.sgd(0.02), steps=2),
        Player("noise", ("noise",), noise_loss, optax.adam(0.1), steps=noise_steps),
    )


games = {"fixed": players(0), "learned": players(1)}
steps = {name: make_train_step(game) for name, game in games.items()}


def play(kind, sigma, volume, *, descents=60):
    """The model's error and the noise's direction before each of the model's steps."""
    angle, free = jnp.float32(1.5), jnp.asarray(arrow(2.0)[:, None], jnp.float32)
    state = create_train_state({"angle": angle, "noise": free}, {}, games[kind], key=jax.random.key(0))
    turns = Round(tuple(player.steps for player in games[kind]))
    batch = {"sigma": np.float32(sigma), "volume": np.float32(volume)}
    records = []
    for _ in range(turns.total_steps(descents)):
        state, metrics = steps[kind](state, batch)
        records.append(metrics)
    mine = [record for record in jax.device_get(records) if "angle" in record]
    errors = np.array([abs(record["angle"] - TRUTH) for record in mine])
    columns = np.array([record["free"][:, 0] for record in mine])
    return errors, np.arctan2(columns[:, 1], columns[:, 0]) % np.pi


played = {
    "isotropic": play("fixed", ISOTROPIC, 1e-6),
    "across": play("fixed", SIGMA, LENGTH),
    "learned": play("learned", SIGMA, LENGTH),
}
for name, (errors, _) in played.items():
    steps_needed = int((errors > 0.05).sum())
    print(f"{name}: {steps_needed if steps_needed < len(errors) else 'over 60'} steps to an error of 0.05")
print(f"the noise has learned the direction {played['learned'][1][-1]:.2f}")

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
for name, (errors, _) in played.items():
    left.plot(errors, label=name)
left.set(xlabel="steps of the model", ylabel="error of the angle", yscale="log", ylim=(1e-3, 2))
left.legend(frameon=False)
right.plot(played["learned"][1], color="C2")
right.axhline(TRUTH, color="0.6", linestyle=":")
_ = right.set(xlabel="steps of the model", ylabel="direction of the noise", title="dotted: the data's line")

# %% [markdown]
# Within a few steps the learned noise leaves its bad position and turns along the line. All three runs have the same
# optimum, the truth: noise changes what is seen on the way, but not where the way leads.
#
# ## 4. What is gained
#
# The number of steps depends on the learning rate, and a larger divergence has larger gradients. What no learning rate
# can buy is *information*: how much one spread example says about the angle. It is the Fisher information of the spread
# model, in closed form for Gaussians, and the standard error of the angle from $N$ examples is one over the root of $N$
# times it.

# %%
noises = {"isotropic": isotropic, "across": across, "learned": ridge(played["learned"][1][-1])}


@jax.jit
def information(noise):
    return sj.gaussian_fisher_information(lambda angle: zero, line, jnp.float32(TRUTH), noise=noise)[0, 0]


for name, noise in noises.items():
    of_one = float(information(noise))
    print(f"{name}: information {of_one:.2f}, standard error from 1,000 examples {(1000 * of_one) ** -0.5:.4f}")

# %% [markdown]
# To check this, draw 200 data sets of 1,000 examples, spread them, find the angle of largest spread likelihood in each,
# and look at how the estimates scatter. The likelihood depends on a data set only through its second moment.

# %%
angles = TRUTH + np.linspace(-0.2, 0.2, 401)
lines = np.einsum("ia,ja->aij", arrow(angles), arrow(angles))
draw = np.random.default_rng(1).normal
for name, noise in noises.items():
    covariance = noise.scale**2 * np.eye(2)
    if isinstance(noise, sj.LowRankGaussianNoise):
        covariance += np.asarray(noise.factor @ noise.factor.T)
    x = draw(size=(200, 1000, 1)) * arrow(TRUTH)
    y = x + draw(size=x.shape) @ np.linalg.cholesky(covariance).T
    moments = np.einsum("sni,snj->sij", y, y) / 1000
    models = lines + covariance
    traces = np.einsum("aij,sji->sa", np.linalg.inv(models), moments)
    estimates = angles[(traces + np.linalg.slogdet(models)[1]).argmin(axis=1)]
    print(f"{name}: measured standard error {estimates.std():.4f}")

# %% [markdown]
# ## 5. What it does not do
#
# - It is a game, and the noise follows what is wrong *now*. Here only one number had to be learned. If the length of
#   the line is unknown too, noise along the line hides the length: what one direction gains the other loses, and the
#   noise turns from one to the other as the model improves.
# - A bound on the divergence is not the divergence: noise that ascends on a bound can learn to make it loose. See [the
#   guide](../guides/learn_the_spread.md) for the gradient to cut, and [digits](../results/mnist.md) for what happens
#   otherwise.
#
# ## 6. Try
#
# 1. Give the noise 20 steps for each of the model, `steps=1` for the model and `steps=20` for it. Does the model get
#    there sooner?
# 2. Learn $a$ itself, both numbers: `line = lambda a: jnp.outer(a, a)`, starting from a length of 0.3. Plot the noise's
#    direction. Compare the steps with those of isotropic noise at the same learning rate before you trust
#    either.
# 3. Leave out `with_volume`. How long does it take until the divergence is infinite?
#
# Next: [choosing the noise](../guides/choose_the_noise.md), or images: `make demo ARGS="--noise low_rank"`.
