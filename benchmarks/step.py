"""Train steps of the CelebA model, a critic and a denoiser against PyTorch's: time, compilation, memory."""

from __future__ import annotations

import dataclasses
import math
import tempfile
import time
from pathlib import Path
from typing import Literal

import numpy as np

from benchmarks import _measure
from benchmarks._report import Table

Network = Literal["model", "scale_critic", "denoiser"]
LATENT_DIM = 16
TITLE = "Train steps against PyTorch"
NOTES = """\
model: encoder of four 5x5 stride-2 convolutions, generator from 4x4 of four transposed ones and one to three channels,
batch normalisation, Adam, moving average of the generator, gradient norm. scale_critic and denoiser:
`spread_jax.nn.ScaleCritic` under the logistic loss and `Denoiser` under the weighted squared error, at noise of random
scales, Adam, gradient norm. All float32, one batch of uint8 images. Each measurement is a process of its own, the sides
in turn; a ratio is that of neighbouring medians, below 1 where this library is faster. The last table says how far the
two compute the same thing from the same parameters.

On a CPU this library's entry points let the C library keep freed memory instead of giving it back after each step. A
PyTorch program could have that too, from the environment: those are the sides "_kept"."""
KEPT = "_kept"
KEPT_SETTINGS = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
SIDES = (
    "spread_jax",
    *(f"{variant}{kept}" for variant in ("contiguous", "channels_last", "compile") for kept in ("", KEPT)),
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the comparison."""

    widths: tuple[int, ...] = (16, 32, 64, 128)
    """Channels of the encoder's first convolution."""
    conditional_widths: tuple[int, ...] = (16, 64)
    """Channels of the first convolution of the critic and of the denoiser."""
    networks: tuple[Network, ...] = ("model", "scale_critic", "denoiser")
    """What is trained."""
    batch_size: int = 32
    """Images in a batch."""
    wide_batch_size: int = 8
    """Images in a batch from width 128 on, where 32 would take a second a step."""
    steps: int = 12
    """Timed steps in each process, after two that are not."""
    rounds: int = 3
    """Processes for each side."""
    sides: tuple[str, ...] = SIDES
    """What is compared: spread_jax and PyTorch's variants, `_kept` where freed memory is."""

    def widths_of(self, network: Network) -> tuple[int, ...]:
        """The widths that a network is trained at."""
        return self.widths if network == "model" else self.conditional_widths

    def images_at(self, width: int) -> int:
        """The batch size of a width."""
        return self.batch_size if width < 128 else self.wide_batch_size


def images(batch_size: int) -> np.ndarray:
    """The batch, uint8 [n, 64, 64, 3]."""
    return np.random.default_rng(0).integers(0, 256, (batch_size, 64, 64, 3), np.uint8)


class Trainee:
    """A delta-VAE of 64x64 images under fixed Gaussian noise, as one jitted step of one player."""

    def __init__(self, width: int, *, dtype: str, native: bool):
        from spread_jax.models import DeltaVae, FitSettings
        from spread_jax.training import make_train_step

        method = DeltaVae(latent_dim=LATENT_DIM, width=width, compute_dtype=dtype, warmup_steps=0)
        networks = {part: module.clone(native_gradients=native) for part, module in method.modules.items()}
        self.method, self.num_steps = dataclasses.replace(method, networks=networks), FitSettings().steps
        (player,) = self.method.players(self.num_steps)
        self.loss = player.loss
        self.train_step = make_train_step(
            [player], ema_decay=method.ema_decay, averaged=self.method.generator_variables
        )

    def initial_state(self):
        """The state at step 0."""
        import jax

        return jax.jit(self.method.initial_state, static_argnums=1)(jax.random.key(0), self.num_steps)


def build(width: int, *, dtype: str = "float32", native: bool = False) -> Trainee:
    """The model at a width, with this library's or XLA's own convolution gradients."""
    return Trainee(width, dtype=dtype, native=native)


def conditional_loss(network: Network, width: int, *, dtype: str = "float32", native: bool = False):
    """The module, and its loss(params, y, x, sigma) at noised images y of x: half are data, half are not."""
    import jax
    import jax.numpy as jnp

    from spread_jax import nn

    kind = {"scale_critic": nn.ScaleCritic, "denoiser": nn.Denoiser}[network]
    module = kind(width=width, dtype=jnp.dtype(dtype), native_gradients=native)

    def loss(params, y, x, sigma):
        output = module.apply({"params": params}, y, sigma)
        if network == "denoiser":
            weight = 1 / sigma**2 + 1 / module.data_scale**2
            return jnp.mean(weight * jnp.square(output - x).mean(axis=(1, 2, 3)))
        return jax.nn.softplus(jnp.where(jnp.arange(len(y)) % 2, output, -output)).mean()

    return module, loss


def conditional_step(network: Network, width: int, **settings):
    """The state at step 0, and the jitted step of a batch."""
    import jax
    import jax.numpy as jnp
    import optax

    from spread_jax import GaussianNoise

    module, loss = conditional_loss(network, width, **settings)
    optimizer = optax.adam(3e-4, b1=0.0, b2=0.99)

    def step(state, batch):
        params, opt_state, count = state
        noise_key, scale_key = jax.random.split(jax.random.fold_in(jax.random.key(0), count))
        x = batch.astype(jnp.float32) / 255
        sigma = jnp.exp(jax.random.uniform(scale_key, (len(x),), minval=jnp.log(0.02), maxval=0.0))
        noise = GaussianNoise(1.0).sample(jnp.zeros_like(x), key=noise_key)
        y = x + sigma[:, None, None, None] * noise
        value, gradient = jax.value_and_grad(loss)(params, y, x, sigma)
        updates, opt_state = optimizer.update(gradient, opt_state)
        state = optax.apply_updates(params, updates), opt_state, count + 1
        return state, (value, optax.tree.norm(gradient))

    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 64, 64, 3)), 1.0)["params"]
    return (params, optimizer.init(params), jnp.int32(0)), jax.jit(step, donate_argnums=0)


def measure_jax(
    width: int,
    batch_size: int,
    steps: int,
    *,
    network: Network = "model",
    dtype: str = "float32",
    native: bool = False,
    precision: str | None = None,
    configure: bool = True,
) -> dict:
    """Seconds of each step of this library's model, and of its compilation."""
    if configure:
        from spread_jax import runtime

        runtime.configure()
    import jax

    if network == "model":
        model = build(width, dtype=dtype, native=native)
        state, train_step = model.initial_state(), model.train_step
    else:
        state, train_step = conditional_step(network, width, dtype=dtype, native=native)
    state = jax.block_until_ready(state)
    batch = jax.device_put(images(batch_size))
    began = time.perf_counter()
    with jax.default_matmul_precision(precision):
        step = train_step.lower(state, batch).compile()
    compiled = time.perf_counter() - began

    def once():
        nonlocal state
        state, _ = step(state, batch)
        jax.block_until_ready(state)

    _measure.seconds_of(once, 2)
    return {"seconds": _measure.seconds_of(once, steps), "compile_seconds": compiled}


def measure_torch(
    width: int,
    batch_size: int,
    steps: int,
    variant: str,
    *,
    network: Network = "model",
    precision: str = "float32",
) -> dict:
    """The same of PyTorch: "contiguous", "channels_last" or "compile", on its accelerator if it has one."""
    import torch
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    from benchmarks import torch_model

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.benchmark = True
    layout = torch.channels_last if variant == "channels_last" else torch.contiguous_format
    whole = network == "model"
    model = torch_model.SpreadVae(LATENT_DIM, width) if whole else torch_model.CONDITIONAL[network](width)
    model = model.to(device, memory_format=layout)
    compute = torch.compile(model) if variant == "compile" else model
    rate, betas = (2e-3, (0.5, 0.999)) if whole else (3e-4, (0.0, 0.99))
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, betas=betas, fused=True)
    batch = torch.from_numpy(images(batch_size).transpose(0, 3, 1, 2).copy()).to(device, memory_format=layout)
    if whole:
        average = AveragedModel(model.generator, multi_avg_fn=get_ema_multi_avg_fn(0.995), use_buffers=True)

    def loss():
        noise = torch.randn(batch.shape, device=device).contiguous(memory_format=layout)
        if whole:
            return compute(batch, noise, torch.randn(batch_size, LATENT_DIM, device=device), 0.5)
        sigma = torch.exp(math.log(0.02) * torch.rand(batch_size, device=device))
        x = batch.float() / 255
        return torch_model.conditional_loss(compute(x + sigma[:, None, None, None] * noise, sigma), x, sigma)

    def once():
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
            value = loss()
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
        optimizer.step()
        if whole:
            average.update_parameters(model.generator)
        return value.item(), norm.item()  # waits for the device

    first = _measure.seconds_of(once, 2)[0]
    seconds = _measure.seconds_of(once, steps)
    return {"seconds": seconds, "compile_seconds": first - float(np.median(seconds))}


def agreement(width: int, batch_size: int, network: Network = "model") -> dict:
    """How far loss and gradient of the two differ, from the same parameters, batch and noise."""
    objective = _model_of_both if network == "model" else _conditional_of_both
    value, theirs, peer, expected = objective(network, width, batch_size)
    theirs.backward()
    expected = dict(expected.named_parameters())
    square = lambda tensor: float(tensor.detach().double().square().sum())
    pairs = [(parameter.grad, expected[name]) for name, parameter in peer.named_parameters()]
    error = sum(square(a - b) for a, b in pairs) / sum(square(b) for _, b in pairs)
    return {"loss": abs(theirs.item() / float(value) - 1), "gradient": error**0.5}


def _model_of_both(network, width, batch_size):
    """Our loss, PyTorch's, its model, and a model that holds our gradient in place of parameters."""
    import jax
    import torch

    from benchmarks.torch_model import from_flax, mirrored_images
    from spread_jax import GaussianNoise

    model, key = build(width), jax.random.key(1)
    state, batch = model.initial_state(), images(batch_size)
    objective = jax.jit(jax.value_and_grad(model.loss, has_aux=True))
    (value, _), gradient = objective(state.params, state.variables, batch, key=key, step=0)

    spread_key, latent_key = jax.random.split(key)  # as spread_elbo draws
    zeros = jax.numpy.zeros(batch.shape)
    spread = np.asarray(GaussianNoise(1.0).sample(zeros, key=spread_key))
    latent = np.array(jax.random.normal(latent_key, (batch_size, LATENT_DIM)))
    peer = from_flax(state.params, LATENT_DIM, width)
    noises = mirrored_images(spread), torch.from_numpy(latent)
    theirs = peer(mirrored_images(batch), *noises, float(model.method.scale_at(0)))
    return value, theirs, peer, from_flax(gradient, LATENT_DIM, width)


def _conditional_of_both(network, width, batch_size):
    """The same, from parameters that are nowhere 0."""
    import jax
    import torch

    from benchmarks import torch_model

    rng = np.random.default_rng(0)
    module, loss = conditional_loss(network, width)
    x = images(batch_size).astype(np.float32) / 255
    sigma = np.exp(np.log(0.02) * rng.random(batch_size)).astype(np.float32)
    y = x + sigma[:, None, None, None] * rng.standard_normal(x.shape).astype(np.float32)
    params = jax.jit(module.init)(jax.random.key(0), y, sigma)["params"]
    params = jax.tree.map(lambda leaf: leaf + np.float32(0.1) * rng.standard_normal(leaf.shape, np.float32), params)
    value, gradient = jax.jit(jax.value_and_grad(loss))(params, y, x, sigma)
    peer, expected = (torch_model.CONDITIONAL[network](width) for _ in range(2))
    peer.copy_from(params)
    expected.copy_from(gradient)
    mirrored = torch_model.mirrored_images
    output = peer(mirrored(y), torch.from_numpy(sigma))
    theirs = torch_model.conditional_loss(output, mirrored(x), torch.from_numpy(sigma))
    return value, theirs, peer, expected


def run(config: Config) -> list[Table]:
    """Times, compilation and memory of each side at each width."""
    sides, agreements = list(config.sides), []
    try:
        import torch  # noqa: F401
    except ImportError:
        print("PyTorch is not installed: its rows are left out (pip install torch).", flush=True)
        sides = ["spread_jax"]
    times, costs = [], []
    for network in config.networks:
        for width in config.widths_of(network):
            with tempfile.TemporaryDirectory() as cache:
                found = _alternate(config, network, width, sides, Path(cache))
            size = {"network": network, "width": width, "batch": config.images_at(width)}
            for side, runs in found.items():
                times.append({**size, "side": side, **_time_of(size["batch"], side, runs, found.get("spread_jax"))})
                warm = [run["compile_seconds"] for run in runs[1:]]
                costs.append({
                    **size,
                    "side": side,
                    "cold compile s": runs[0]["compile_seconds"],
                    "warm compile s": float(np.median(warm)) if warm else None,
                    "peak MiB": float(np.median([run["peak_mib"] for run in runs])),
                })  # fmt: skip
        if len(sides) > 1:
            width = config.widths_of(network)[0]
            size = {"width": width, "batch_size": config.images_at(width), "network": network}
            found = _measure.in_new_process("benchmarks.step:agreement", **size)
            agreements.append({
                "network": network, "width": width, "loss": found["loss"], "gradient": found["gradient"]
            })  # fmt: skip
    tables = [
        Table(f"Time of a step, medians of {config.rounds} processes", times),
        Table("Compilation with a new and with a filled cache (PyTorch: first step less a later one), memory", costs),
    ]
    return [*tables, Table("Relative difference of PyTorch's loss and gradient", agreements)] if agreements else tables


def _alternate(config, network, width, sides, cache):
    """{side: one measurement for each round}; a side that fails says so once and is left out."""
    found: dict[str, list] = {side: [] for side in sides}
    for _ in range(config.rounds):
        for side in list(found):
            name, options = "measure_jax", {}
            if side != "spread_jax":
                name, options = "measure_torch", {"variant": side.removesuffix(KEPT)}
            environment = {"SPREAD_JAX_CACHE": str(cache / side), "TORCHINDUCTOR_CACHE_DIR": str(cache / side)}
            if side.endswith(KEPT):
                environment |= KEPT_SETTINGS
            size = {"width": width, "batch_size": config.images_at(width), "steps": config.steps, "network": network}
            try:
                result = _measure.in_new_process(f"benchmarks.step:{name}", environment=environment, **size, **options)
            except _measure.SideFailed as error:
                print(f"{network}, width {width}, {side}: did not run ({error})", flush=True)
                del found[side]
                continue
            found[side].append(result)
            print(f"{network}, width {width}, {side}: {1e3 * np.median(result['seconds']):.0f} ms", flush=True)
    return found


def _time_of(batch_size, side, runs, ours):
    medians = [float(np.median(run["seconds"])) for run in runs]
    seconds = float(np.median(medians))
    row = {"ms": 1e3 * seconds, "images/s": batch_size / seconds}
    if side != "spread_jax" and ours:
        found = _measure.ratio([float(np.median(run["seconds"])) for run in ours], medians)
        row |= {"spread_jax / side": found["ratio"], "lowest": found["lowest"], "highest": found["highest"]}
    return row
