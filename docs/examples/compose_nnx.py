"""spread_elbo with Flax NNX: split the model into a static graph and a state, merge it inside the loss."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from spread_jax import GaussianNoise, spread_elbo


class Network(nnx.Module):
    def __init__(self, size_in, size_out, rngs):
        self.hidden = nnx.Linear(size_in, 16, rngs=rngs)
        self.output = nnx.Linear(16, size_out, rngs=rngs)

    def __call__(self, x):
        return self.output(nnx.tanh(self.hidden(x)))


def create(rngs):
    """(graph, state): the state is a pytree, which jax and optax take as any other."""
    return nnx.split(nnx.Dict(encoder=Network(3, 4, rngs), decoder=Network(2, 3, rngs)))


def loss(state, graph, x, key):
    model = nnx.merge(graph, state, copy=True)  # copies: the state belongs to the caller's trace
    encode = lambda y: jnp.split(model.encoder(y), 2, axis=1)  # mean, log_std
    return -spread_elbo(x, encode, model.decoder, GaussianNoise(0.3), key=key).elbo.mean()


def loss_and_gradient(weights, x, key):
    """As in compose_jax.py, whose weights replace those of the state."""
    graph, state = create(nnx.Rngs(0))
    layer = lambda values: {"kernel": values["w"], "bias": values["b"]}
    nnx.replace_by_pure_dict(state, {k: {"hidden": layer(v[0]), "output": layer(v[1])} for k, v in weights.items()})
    value, gradient = jax.jit(jax.value_and_grad(loss), static_argnums=1)(state, graph, x, key)
    dense = lambda values: {"w": values["kernel"], "b": values["bias"]}
    pure = nnx.to_pure_dict(gradient)
    return value, {k: [dense(v["hidden"]), dense(v["output"])] for k, v in pure.items()}


def main(steps=500):
    key = jax.random.key(0)
    angle = jax.random.uniform(key, (1000, 1), maxval=6.28)
    x = jnp.concatenate([jnp.cos(angle), jnp.sin(angle), jnp.sin(2 * angle)], axis=1)  # a closed curve in space
    graph, state = create(nnx.Rngs(1))
    optimizer = optax.adam(1e-2)
    opt_state = optimizer.init(state)

    @jax.jit
    def step(state, opt_state, key):
        value, gradient = jax.value_and_grad(loss)(state, graph, x, key)
        updates, opt_state = optimizer.update(gradient, opt_state)
        return optax.apply_updates(state, updates), opt_state, value

    for t in range(steps):
        state, opt_state, value = step(state, opt_state, jax.random.fold_in(key, t))
    print(f"bound: {-value:.3f} nats per example")


if __name__ == "__main__":
    main()
