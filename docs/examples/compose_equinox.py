"""spread_elbo with Equinox: modules work on one example, so the callables are their vmap."""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

from spread_jax import GaussianNoise, spread_elbo


class Network(eqx.Module):
    hidden: eqx.nn.Linear
    output: eqx.nn.Linear

    def __init__(self, size_in, size_out, key):
        first, second = jax.random.split(key)
        self.hidden = eqx.nn.Linear(size_in, 16, key=first)
        self.output = eqx.nn.Linear(16, size_out, key=second)

    def __call__(self, x):
        return self.output(jnp.tanh(self.hidden(x)))


def loss(model, x, key):
    encode = lambda y: jnp.split(jax.vmap(model["encoder"])(y), 2, axis=1)  # mean, log_std
    decode = jax.vmap(model["decoder"])
    return -spread_elbo(x, encode, decode, GaussianNoise(0.3), key=key).elbo.mean()


def create(key):
    first, second = jax.random.split(key)
    return {"encoder": Network(3, 4, first), "decoder": Network(2, 3, second)}


def loss_and_gradient(weights, x, key):
    """As in compose_jax.py, whose weights replace the modules' own; Equinox stores [out, in]."""
    names = ("encoder", "decoder")
    linears = lambda model: [layer for name in names for layer in (model[name].hidden, model[name].output)]
    arrays = lambda model: [array for linear in linears(model) for array in (linear.weight, linear.bias)]
    given = [array for name in names for layer in weights[name] for array in (layer["w"].T, layer["b"])]
    model = eqx.tree_at(arrays, create(key), given)
    value, gradient = eqx.filter_jit(eqx.filter_value_and_grad(loss))(model, x, key)
    dense = lambda linear: {"w": linear.weight.T, "b": linear.bias}
    return value, {name: [dense(gradient[name].hidden), dense(gradient[name].output)] for name in names}


def main(steps=500):
    key = jax.random.key(0)
    angle = jax.random.uniform(key, (1000, 1), maxval=6.28)
    x = jnp.concatenate([jnp.cos(angle), jnp.sin(angle), jnp.sin(2 * angle)], axis=1)  # a closed curve in space
    model, optimizer = create(jax.random.key(1)), optax.adam(1e-2)
    opt_state = optimizer.init(eqx.filter(model, eqx.is_array))

    @eqx.filter_jit
    def step(model, opt_state, key):
        value, gradient = eqx.filter_value_and_grad(loss)(model, x, key)
        updates, opt_state = optimizer.update(gradient, opt_state)
        return eqx.apply_updates(model, updates), opt_state, value

    for t in range(steps):
        model, opt_state, value = step(model, opt_state, jax.random.fold_in(key, t))
    print(f"bound: {-value:.3f} nats per example")


if __name__ == "__main__":
    main()
