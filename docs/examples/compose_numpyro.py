"""spread_elbo with NumPyro: the bound enters the model through `factor`, and SVI maximises it."""

import jax
import jax.numpy as jnp
import numpyro
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.util import log_density

from spread_jax import GaussianNoise, spread_elbo

SIZES = {"encoder": (3, 16, 4), "decoder": (2, 16, 3)}


def network(name, x):
    """Two layers whose weights are parameters of the program."""
    for i, (m, n) in enumerate(zip(SIZES[name][:-1], SIZES[name][1:], strict=True)):
        w = numpyro.param(f"{name}_{i}_w", lambda key, m=m, n=n: jax.random.normal(key, (m, n)) / m**0.5)
        x = (jnp.tanh(x) if i else x) @ w + numpyro.param(f"{name}_{i}_b", jnp.zeros(n))
    return x


def model(x, key):
    encode = lambda y: jnp.split(network("encoder", y), 2, axis=1)  # mean, log_std
    decode = lambda z: network("decoder", z)
    numpyro.factor("bound", spread_elbo(x, encode, decode, GaussianNoise(0.3), key=key).elbo.mean())


def loss(params, x, key):
    """Minus the log-density of the program, which is minus the bound."""
    return -log_density(model, (x, key), {}, params)[0]


def loss_and_gradient(weights, x, key):
    """As in compose_jax.py, whose weights are the program's parameters by name."""
    params = {f"{k}_{i}_{p}": layer[p] for k, layers in weights.items() for i, layer in enumerate(layers) for p in "wb"}
    value, gradient = jax.jit(jax.value_and_grad(loss))(params, x, key)
    return value, {k: [{p: gradient[f"{k}_{i}_{p}"] for p in "wb"} for i in (0, 1)] for k in SIZES}


def main(steps=500):
    key = jax.random.key(0)
    angle = jax.random.uniform(key, (1000, 1), maxval=6.28)
    x = jnp.concatenate([jnp.cos(angle), jnp.sin(angle), jnp.sin(2 * angle)], axis=1)  # a closed curve in space
    guide = lambda x, key: None  # the program has no latent sites: spread_elbo integrates z out
    svi = SVI(model, guide, numpyro.optim.Adam(1e-2), Trace_ELBO())
    state = svi.init(jax.random.key(1), x, key)
    step = jax.jit(lambda state, key: svi.update(state, x, key))
    for t in range(steps):
        state, value = step(state, jax.random.fold_in(key, t))
    print(f"bound: {-value:.3f} nats per example")


if __name__ == "__main__":
    main()
