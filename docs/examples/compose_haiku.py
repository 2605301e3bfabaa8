"""spread_elbo with Haiku: transform each network, and drop the key that its `apply` does not use."""

import haiku as hk
import jax
import jax.numpy as jnp
import optax

from spread_jax import GaussianNoise, spread_elbo


def network(size):
    layers = lambda x: hk.Sequential([hk.Linear(16), jnp.tanh, hk.Linear(size)])(x)
    return hk.without_apply_rng(hk.transform(layers))


encoder, decoder = network(4), network(3)


def loss(params, x, key):
    encode = lambda y: jnp.split(encoder.apply(params["encoder"], y), 2, axis=1)  # mean, log_std
    decode = lambda z: decoder.apply(params["decoder"], z)
    return -spread_elbo(x, encode, decode, GaussianNoise(0.3), key=key).elbo.mean()


def loss_and_gradient(weights, x, key):
    """As in compose_jax.py, whose layers are Haiku's by another name."""
    names = ("linear", "linear_1")
    params = {k: dict(zip(names, layers, strict=True)) for k, layers in weights.items()}
    value, gradient = jax.jit(jax.value_and_grad(loss))(params, x, key)
    return value, {k: [v[name] for name in names] for k, v in gradient.items()}


def main(steps=500):
    keys = jax.random.split(jax.random.key(0), 3)
    angle = jax.random.uniform(keys[0], (1000, 1), maxval=6.28)
    x = jnp.concatenate([jnp.cos(angle), jnp.sin(angle), jnp.sin(2 * angle)], axis=1)  # a closed curve in space
    params = {"encoder": encoder.init(keys[1], x), "decoder": decoder.init(keys[2], x[:, :2])}
    optimizer = optax.adam(1e-2)
    opt_state = optimizer.init(params)

    @jax.jit
    def step(params, opt_state, key):
        value, gradient = jax.value_and_grad(loss)(params, x, key)
        updates, opt_state = optimizer.update(gradient, opt_state)
        return optax.apply_updates(params, updates), opt_state, value

    for t in range(steps):
        params, opt_state, value = step(params, opt_state, jax.random.fold_in(keys[0], t))
    print(f"bound: {-value:.3f} nats per example")


if __name__ == "__main__":
    main()
