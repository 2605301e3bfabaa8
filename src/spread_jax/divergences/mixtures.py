"""The spread of an empirical distribution: a mixture with one component for each atom, streamed."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from spread_jax._checks import (
    at_least_float32_dtype,
    check_batch,
    check_count,
    check_same_event,
    check_samples,
    is_concrete,
)
from spread_jax._pairwise import exp2, is_product, product, split_distances, squares
from spread_jax._pytree import frozen_pytree
from spread_jax.noise import SpreadNoise, TransformedNoise
from spread_jax.noise._protocol import check_noise, example_axes

__all__ = ["log_spread_density"]

# Default sizes of a block of pairs: an edge where pairs are a matrix product, numbers where events are
# expanded.
_PAIR_EDGE = 1024
_EXPANDED_NUMBERS = 2**22
# Where pairs are one product: rows of a block, and columns of it that are visited at once. At 20,000 points in 64
# dimensions on two cores 1.29 times the time of the product alone, 1.64 times with 1024 rows and 256 columns
# (python -m benchmarks --part density).
_ROWS, _TILE = 4096, 128
_LOG2_E = math.log2(math.e)
# Where sums of powers of two begin, and where they are still far from overflow.
_HEADROOM, _LARGE = 64.0, 2.0**100
_FIRST_LOOK = 64


def log_spread_density(
    y: jax.Array,
    atoms: jax.Array,
    noise: SpreadNoise,
    *,
    log_weights: jax.Array | None = None,
    chunk_size: int | None = None,
) -> jax.Array:
    r"""log p~(y) of the spread empirical distribution, log sum_n w_n p(y|x_n), in nats.

    Pairs (y, x_n) are visited in blocks of chunk_size x chunk_size and folded into a running logsumexp, so
    memory is O(chunk_size^2 + inputs) however many atoms there are; so are the derivatives, in either mode,
    to y, atoms, noise and log_weights: they recompute each block and weight it by its responsibilities.
    Gaussian noises compute a block by matrix products that keep their digits (noise.pairwise_log_prob).

    Args:
      y: [m, *event], where to evaluate.
      atoms: [n, *event], the samples x_n of p. Under a TransformedNoise the transform is applied to all of
        them, once.
      noise: the spread noise p(y|x). With a scale for each y, [m, 1, ...], the result for y is that of its scale; such
        pairs are expanded, in blocks of y, and `chunk_size` has no say.
      log_weights: [n], logarithms of the atoms' weights up to a constant (they are normalised here); -inf
        leaves an atom out. Equal weights by default.
      chunk_size: the edge of a block of pairs; by default at most 2^22 pairs, fewer where events must be
        expanded.

    Returns:
      [m].

    Raises:
      TypeError: an array is not floating point.
      ValueError: no atoms, shapes that do not fit, concrete atoms that are not finite, concrete
        weights none of which is positive, or chunk_size < 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from spread_jax import GaussianNoise
      >>> atoms = jnp.array([[-1.0], [1.0]])
      >>> print(log_spread_density(jnp.zeros((1, 1)), atoms, GaussianNoise(1.0)).round(4))
      [-1.4189]
    """
    y, atoms = check_batch("y", y), check_samples("atoms", atoms)
    check_noise("noise", noise)
    while isinstance(noise, TransformedNoise):
        atoms, noise = noise.location(atoms), noise.base
    check_same_event("y", y, "atoms", atoms)
    num_y, num_atoms = y.shape[0], atoms.shape[0]
    dtype = at_least_float32_dtype(jnp.result_type(y, atoms))  # sums over atoms leave narrower ones
    y, atoms = y.astype(dtype), atoms.astype(dtype)
    if log_weights is None:
        log_weights = jnp.full(num_atoms, -math.log(num_atoms), dtype)
    else:
        log_weights = check_batch("log_weights", log_weights).astype(dtype)
        if log_weights.shape != (num_atoms,):
            raise ValueError(f"log_weights must have shape ({num_atoms},), one for each atom, got {log_weights.shape}.")
        if is_concrete(log_weights):
            with jax.ensure_compile_time_eval():
                largest = float(log_weights.max())
            if not math.isfinite(largest):
                raise ValueError(
                    f"log_weights must hold a finite number, and no NaN or plus infinity, got a maximum of {largest}."
                )
        log_weights = jax.nn.log_softmax(log_weights)
    if num_y == 0:
        return jnp.zeros(0, dtype)
    if 0 in example_axes(noise, y):
        return _of_examples(y, atoms, log_weights, noise)
    edge = _chunk_edge(noise, y) if chunk_size is None else check_count("chunk_size", chunk_size)
    if hasattr(noise, "standardise") and num_atoms > edge:
        u, v, log_constant = noise.standardise(y, atoms)
        if is_product(u):
            rows = _ROWS if chunk_size is None else edge
            return log_constant + _log_sum_of_gaussians(u, v, log_weights, edge, rows)
    log_density = _streamed_log_density(
        _blocks(y, edge), _blocks(atoms, edge), _blocks(log_weights, edge, -jnp.inf), noise
    )
    return log_density.reshape(-1)[:num_y]


def _of_examples(y, atoms, log_weights, noise):
    """log p~(y) where each y has a noise of its own, a few of them at once."""
    leaves, structure = jax.tree_util.tree_flatten(noise)
    axes = example_axes(noise, y)
    own = [leaf for leaf, axis in zip(leaves, axes, strict=True) if axis == 0]

    def one(y_and_own):
        y, own = y_and_own
        own = iter(own)
        leaf_of_y = [next(own) if axis == 0 else leaf for leaf, axis in zip(leaves, axes, strict=True)]
        noise = jax.tree_util.tree_unflatten(structure, leaf_of_y)
        return jax.nn.logsumexp(noise.log_prob(jnp.broadcast_to(y, atoms.shape), atoms) + log_weights)

    at_once = max(1, _EXPANDED_NUMBERS // max(atoms.size, 1))
    return jax.lax.map(jax.checkpoint(one), (y, own), batch_size=min(at_once, y.shape[0]))


def _chunk_edge(noise, y):
    if hasattr(noise, "pairwise_log_prob"):
        return _PAIR_EDGE
    return max(int(math.sqrt(_EXPANDED_NUMBERS / max(math.prod(y.shape[1:]), 1))), 16)


def _blocks(values, chunk_size, fill=None, *, multiple=1):
    """[n, ...] -> [blocks, edge, ...] of nearly equal blocks; padded with the last entry, or with `fill`.

    The edge is a multiple of `multiple` if that is at most `chunk_size`.
    """
    count = values.shape[0]
    num_blocks = -(-count // chunk_size)
    edge = -(-count // num_blocks)
    edge = min(-(-edge // multiple) * multiple, chunk_size)
    missing = num_blocks * edge - count
    if missing:
        tail = jnp.repeat(values[-1:], missing, axis=0) if fill is None else jnp.full(missing, fill, values.dtype)
        values = jnp.concatenate([values, tail])
    return values.reshape(num_blocks, edge, *values.shape[1:])


def _log_sum_of_gaussians(u, v, log_weights, edge, rows):
    """log sum_n w_n exp(-|u - v_n|^2 / 2), [m], of u [m, X] and v [n, X] centred on v: one product for each block of
    pairs if that loses no digits, else three.
    """

    def by_one_product(u, v, log_weights):
        bias = log_weights - 0.5 * squares(v)
        atoms = _blocks(v, edge, multiple=_TILE), _blocks(bias, edge, -jnp.inf, multiple=_TILE)
        sums = _streamed_log_sum(_blocks(u, rows), *atoms)
        return sums.reshape(-1)[: len(u)] - 0.5 * squares(u)

    def by_split_products(u, v, log_weights):
        blocks = _blocks(u, edge), _blocks(v, edge), _blocks(log_weights, edge, -jnp.inf)
        return _streamed_log_density(*blocks, _SplitProducts()).reshape(-1)[: len(u)]

    # The rounding of one product, 16 eps X nats at most, is then that of the density of a point 4 sigma off.
    largest = jnp.maximum(squares(u).max(), squares(v).max())
    return jax.lax.cond(largest <= 16 * u.shape[1], by_one_product, by_split_products, u, v, log_weights)


@frozen_pytree
class _SplitProducts:
    """A unit Gaussian without its constant."""

    def pairwise_log_prob(self, y, x):
        return -0.5 * split_distances(y, x)


@jax.custom_jvp
def _streamed_log_sum(u, v, bias):
    """log sum_n exp(<u, v_n> + bias_n): [Y, c, X], [A, k, X], [A, k] -> [Y, c].

    The sum is kept in units of 2^unit, where the first few terms put it at 2^-64: terms from 2^62 below those, which
    change nothing, to 2^164 above them fit the range of float32. So a block costs one product and one pass over it,
    and none for its largest entry: that is looked for only where a block leaves the range, to choose a new unit.
    Logarithms are to base two inside, which saves a multiplication for each pair.
    """
    v, bias = v * _LOG2_E, bias * _LOG2_E
    tile = _TILE if v.shape[1] % _TILE == 0 and jax.default_backend() == "cpu" else v.shape[1]
    split = lambda values: values.reshape(-1, tile, *values.shape[1:])

    def one_block(u_block):
        def in_unit(log2_sum):
            return log2_sum + _HEADROOM, jnp.full_like(log2_sum, 2.0**-_HEADROOM)

        def add(carry, block):
            unit, total = carry
            v_block, bias_block = block

            def add_tile(total, tile):
                v_tile, bias_tile = tile
                joint = jax.lax.optimization_barrier(product(u_block, v_tile))  # XLA's own fusion is slower
                return total + exp2(joint + bias_tile[None] - unit[:, None]).sum(axis=1), None

            def in_new_unit():
                here = _log2_sum(product(u_block, v_block) + bias_block[None])
                return in_unit(jnp.logaddexp2(unit + jnp.log2(total), here))

            new = _scan(add_tile, total, (split(v_block), split(bias_block)))
            return jax.lax.cond((new < _LARGE).all(), lambda: (unit, new), in_new_unit), None

        few = (v[0, :_FIRST_LOOK], bias[0, :_FIRST_LOOK])
        unit = (product(u_block, few[0]) + few[1][None]).max(axis=1) + _HEADROOM
        unit, total = _scan(add, (unit, jnp.zeros_like(unit)), (v, bias))
        return unit + jnp.log2(total)

    return _map(one_block, u) / _LOG2_E


def _log2_sum(joint):
    largest = joint.max(axis=1)
    offset = jnp.where(jnp.isfinite(largest), largest, 0)
    return offset + jnp.log2(jnp.exp2(joint - offset[:, None]).sum(axis=1))


@functools.partial(_streamed_log_sum.defjvp, symbolic_zeros=True)
def _streamed_log_sum_jvp(primals, tangents):
    """d log sum = <du, R v> + <u, R dv> + R dbias, R the responsibilities: recomputed by block, kept by none."""
    log_sum = _streamed_log_sum(*primals)
    u, v, bias = primals
    du, dv, dbias = jax.tree_util.tree_map(_none_if_fixed, tangents)

    def one_block(block):
        u_block, du_block, log_sum_block = block

        @jax.checkpoint
        def block_tangent(primal, tangent):
            u_block, v_block, bias_block, log_sum_block = primal
            du_block, dv_block, dbias_block = tangent
            joint = jax.lax.optimization_barrier(product(u_block, v_block * _LOG2_E))
            share = exp2(joint + (bias_block * _LOG2_E)[None] - (log_sum_block * _LOG2_E)[:, None])
            total = jnp.zeros_like(log_sum_block)
            if du_block is not None:
                total += (du_block * product(share, v_block.T)).sum(axis=1)
            if dv_block is not None:
                total += (u_block * product(share, dv_block.T)).sum(axis=1)
            return total if dbias_block is None else total + share @ dbias_block

        def add(total, atom_block):
            v_block, dv_block, bias_block, dbias_block = atom_block
            primal = (u_block, v_block, bias_block, log_sum_block)
            return total + block_tangent(primal, (du_block, dv_block, dbias_block)), None

        return _scan(add, jnp.zeros_like(log_sum_block), (v, dv, bias, dbias))

    return log_sum, _map(one_block, (u, du, log_sum))


def _log_joint(y, atoms, log_weights, noise):
    """log w_n + log p(y_m|x_n) of one block, [m, n]."""
    if hasattr(noise, "pairwise_log_prob"):
        pairs = noise.pairwise_log_prob(y, atoms)
    else:
        pairs = jax.vmap(lambda row: noise.log_prob(jnp.broadcast_to(row, atoms.shape), atoms))(y)
    return pairs + log_weights[None]


@jax.custom_jvp
def _streamed_log_density(y, atoms, log_weights, noise):
    """[Y, c, *event], [A, k, *event], [A, k] -> [Y, c]: a running logsumexp over the blocks of atoms."""

    def one_block(y_block):
        def add(total, block):
            return jnp.logaddexp(total, jax.nn.logsumexp(_log_joint(y_block, *block, noise), axis=1)), None

        empty = jnp.full(y_block.shape[0], -jnp.inf, y_block.dtype)
        return _scan(add, empty, (atoms, log_weights))

    return _map(one_block, y)


@functools.partial(_streamed_log_density.defjvp, symbolic_zeros=True)
def _streamed_log_density_jvp(primals, tangents):
    """d log p~(y) = sum_n r_n d log(w_n p(y|x_n)), r_n the responsibilities, one block of pairs at a time.

    The tangent is linear in what is perturbed and each block is rematerialised, so transposing it (reverse
    mode) streams as well: nothing but the inputs and log p~ is kept.
    """
    log_density = _streamed_log_density(*primals)
    y, atoms, log_weights, noise = primals
    dy, datoms, dweights, dnoise = jax.tree_util.tree_map(_none_if_fixed, tangents)

    def one_block(block):
        y_block, dy_block, log_density_block = block

        @jax.checkpoint
        def block_tangent(primal, tangent):
            joint, djoint = _partial_jvp(_log_joint, primal, tangent)
            return (jnp.exp(joint - log_density_block[:, None]) * djoint).sum(axis=1)

        def add(total, atom_block):
            atoms_block, datoms_block, weights_block, dweights_block = atom_block
            primal = (y_block, atoms_block, weights_block, noise)
            return total + block_tangent(primal, (dy_block, datoms_block, dweights_block, dnoise)), None

        return _scan(add, jnp.zeros_like(log_density_block), (atoms, datoms, log_weights, dweights))

    return log_density, _map(one_block, (y, dy, log_density))


def _none_if_fixed(tangent):
    fixed = isinstance(tangent, jax.custom_derivatives.SymbolicZero) or tangent.dtype == jax.dtypes.float0
    return None if fixed else tangent


def _partial_jvp(function, primals, tangents):
    """jax.jvp with None as the tangent of what is not perturbed, at no cost for it."""
    leaves, structure = jax.tree_util.tree_flatten(primals)
    directions = jax.tree_util.tree_leaves(tangents, is_leaf=lambda leaf: leaf is None)
    moving = [index for index, direction in enumerate(directions) if direction is not None]

    def of_moving(values):
        moved = list(leaves)
        for index, value in zip(moving, values, strict=True):
            moved[index] = value
        return function(*jax.tree_util.tree_unflatten(structure, moved))

    return jax.jvp(of_moving, ([leaves[i] for i in moving],), ([directions[i] for i in moving],))


def _scan(add, total, blocks):
    """The last carry of a scan; a single block costs no loop."""
    if jax.tree_util.tree_leaves(blocks)[0].shape[0] == 1:
        return add(total, jax.tree_util.tree_map(lambda leaf: leaf[0], blocks))[0]
    return jax.lax.scan(add, total, blocks)[0]


def _map(function, blocks):
    if jax.tree_util.tree_leaves(blocks)[0].shape[0] == 1:
        return function(jax.tree_util.tree_map(lambda leaf: leaf[0], blocks))[None]
    return jax.lax.map(function, blocks)
