"""spread_elbo with plain jax: the networks are functions of a dictionary of arrays."""

import jax
import jax.numpy as jnp
import optax

from spread_jax import GaussianNoise, spread_elbo


def network(layers, x):
    hidden, output = layers
    return jnp.tanh(x @ hidden["w"] + hidden["b"]) @ output["w"] + output["b"]


def loss(params, x, key):
    encode = lambda y: jnp.split(network(params["encoder"], y), 2, axis=1)  # mean, log_std
    decode = lambda z: network(params["decoder"], z)
    return -spread_elbo(x, encode, decode, GaussianNoise(0.3), key=key).elbo.mean()


def loss_and_gradient(weights, x, key):
    """The loss and its gradient; weights {"encoder" and "decoder": two layers {"w": [in, out], "b": [out]}}."""
    return jax.jit(jax.value_and_grad(loss))(weights, x, key)


def main(steps=500):
    layer = lambda key, m, n: {"w": jax.random.normal(key, (m, n)) / m**0.5, "b": jnp.zeros(n)}
    keys = jax.random.split(jax.random.key(0), 5)
    angle = jax.random.uniform(keys[0], (1000, 1), maxval=6.28)
    x = jnp.concatenate([jnp.cos(angle), jnp.sin(angle), jnp.sin(2 * angle)], axis=1)  # a closed curve in space
    params = {
        "encoder": [layer(keys[1], 3, 16), layer(keys[2], 16, 4)],
        "decoder": [layer(keys[3], 2, 16), layer(keys[4], 16, 3)],
    }
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
