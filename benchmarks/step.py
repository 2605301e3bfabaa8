"""The train step of the CelebA model against the same model in PyTorch: time, compilation, memory."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks import _measure
from benchmarks._report import Table

LATENT_DIM = 16
TITLE = "A train step of the CelebA model against PyTorch"
NOTES = """\
Encoder of four 5x5 stride-2 convolutions, generator from 4x4 of four transposed ones and one to three channels, batch
normalisation, Adam, moving average of the generator, gradient norm; float32, one batch of uint8 images. Each
measurement is a process of its own, the sides in turn; a ratio is that of neighbouring medians, below 1 where this
library is faster. The last table says how far the two compute the same thing from the same parameters.

On a CPU this library's entry points let the C library keep freed memory instead of giving it back after each step. A
PyTorch program could have that too, from the environment: those are the sides "_kept"."""
KEPT = "_kept"
SIDES = (
    "spread_jax",
    *(f"{variant}{kept}" for variant in ("contiguous", "channels_last", "compile") for kept in ("", KEPT)),
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the comparison."""

    widths: tuple[int, ...] = (16, 32, 64, 128)
    """Channels of the encoder's first convolution."""
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

    def images_at(self, width: int) -> int:
        """The batch size of a width."""
        return self.batch_size if width < 128 else self.wide_batch_size


def images(batch_size: int) -> np.ndarray:
    """The batch, uint8 [n, 64, 64, 3]."""
    return np.random.default_rng(0).integers(0, 256, (batch_size, 64, 64, 3), np.uint8)


class Trainee:
    """The experiment's model under fixed Gaussian noise, as one jitted step of one player."""

    def __init__(self, config, *, native: bool):
        from experiments import _generator, _train
        from spread_jax.training import make_train_step

        self.model = _generator.Model(config, (64, 64, 3))
        self.encoder = self.model.encoder = self.model.encoder.clone(native_gradients=native)
        self.generator = self.model.generator = self.model.generator.clone(native_gradients=native)
        self.optimizer = self.model.optimizer
        self.averaged = _train.generator_variables
        self.train_step = make_train_step(self.loss, self.optimizer, ema_decay=config.ema_decay, averaged=self.averaged)

    def initial_state(self):
        """The state at step 0."""
        from spread_jax.training import create_train_state

        state = self.model.initial_state()
        return create_train_state(
            state.params, state.model_state, self.optimizer, key=state.key, averaged=self.averaged
        )

    def loss(self, params, model_state, batch, *, key, step):
        """Minus the mean spread ELBO of a uint8 batch, in nats per example."""
        return self.model.loss(params, {}, model_state, None, batch, key=key, step=step)

    def noise_scale(self, step):
        """Standard deviation of the noise at a step."""
        return self.model.noises.scale(step)


def build(width: int, *, dtype: str = "float32", native: bool = False) -> Trainee:
    """The experiment's model at a width, with this library's or XLA's own convolution gradients."""
    from experiments import celeba

    config = celeba.Config(width=width, latent_dim=LATENT_DIM, compute_dtype=dtype, warmup_steps=0)
    return Trainee(config, native=native)


def measure_jax(
    width: int,
    batch_size: int,
    steps: int,
    *,
    dtype: str = "float32",
    native: bool = False,
    precision: str | None = None,
    configure: bool = True,
) -> dict:
    """Seconds of each step of this library's model, and of its compilation."""
    if configure:
        from experiments import _launch

        _launch.configure_jax()
    import jax

    model = build(width, dtype=dtype, native=native)
    state = jax.block_until_ready(model.initial_state())
    batch = jax.device_put(images(batch_size))
    began = time.perf_counter()
    with jax.default_matmul_precision(precision):
        step = model.train_step.lower(state, batch).compile()
    compiled = time.perf_counter() - began

    def once():
        nonlocal state
        state, _ = step(state, batch)
        jax.block_until_ready(state)

    _measure.seconds_of(once, 2)
    return {"seconds": _measure.seconds_of(once, steps), "compile_seconds": compiled}


def measure_torch(width: int, batch_size: int, steps: int, variant: str, *, precision: str = "float32") -> dict:
    """The same of PyTorch: "contiguous", "channels_last" or "compile", on its accelerator if it has one."""
    import torch
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    from benchmarks.torch_model import SpreadVae

    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
    torch.backends.cudnn.benchmark = True
    layout = torch.channels_last if variant == "channels_last" else torch.contiguous_format
    model = SpreadVae(LATENT_DIM, width).to(device, memory_format=layout)
    loss = torch.compile(model) if variant == "compile" else model
    average = AveragedModel(model.generator, multi_avg_fn=get_ema_multi_avg_fn(0.995), use_buffers=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, betas=(0.5, 0.999), fused=True)
    batch = torch.from_numpy(images(batch_size).transpose(0, 3, 1, 2).copy()).to(device, memory_format=layout)

    def once():
        spread = torch.randn(batch.shape, device=device).contiguous(memory_format=layout)
        latent = torch.randn(batch_size, LATENT_DIM, device=device)
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16"):
            value = loss(batch, spread, latent, 0.5)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
        optimizer.step()
        average.update_parameters(model.generator)
        return value.item(), norm.item()  # waits for the device

    first = _measure.seconds_of(once, 2)[0]
    seconds = _measure.seconds_of(once, steps)
    return {"seconds": seconds, "compile_seconds": first - float(np.median(seconds))}


def agreement(width: int, batch_size: int) -> dict:
    """How far loss and gradient of the two models differ, from the same parameters, batch and noise."""
    import jax
    import torch

    from benchmarks.torch_model import from_flax, mirrored_images
    from spread_jax import GaussianNoise

    model, key = build(width), jax.random.key(1)
    state, batch = model.initial_state(), images(batch_size)
    objective = jax.jit(jax.value_and_grad(model.loss, has_aux=True))
    (value, _), gradient = objective(state.params, state.model_state, batch, key=key, step=0)

    spread_key, latent_key = jax.random.split(key)  # as spread_elbo draws
    zeros = jax.numpy.zeros(batch.shape)
    spread = np.asarray(GaussianNoise(1.0).sample(zeros, key=spread_key))
    latent = np.array(jax.random.normal(latent_key, (batch_size, LATENT_DIM)))
    peer = from_flax(state.params, LATENT_DIM, width)
    noises = mirrored_images(spread), torch.from_numpy(latent)
    theirs = peer(mirrored_images(batch), *noises, float(model.noise_scale(0)))
    theirs.backward()
    expected = dict(from_flax(gradient, LATENT_DIM, width).named_parameters())
    square = lambda tensor: float(tensor.detach().double().square().sum())
    pairs = [(parameter.grad, expected[name]) for name, parameter in peer.named_parameters()]
    error = sum(square(a - b) for a, b in pairs) / sum(square(b) for _, b in pairs)
    return {"loss": abs(theirs.item() / float(value) - 1), "gradient": error**0.5}


def run(config: Config) -> list[Table]:
    """Times, compilation and memory of each side at each width."""
    sides, agreements = list(config.sides), []
    try:
        import torch  # noqa: F401
    except ImportError:
        print("PyTorch is not installed: its rows are left out (pip install torch).", flush=True)
        sides = ["spread_jax"]
    times, costs = [], []
    for width in config.widths:
        with tempfile.TemporaryDirectory() as cache:
            found = _alternate(config, width, sides, Path(cache))
        for side, runs in found.items():
            times.append(_time_row(config, width, side, runs, found.get("spread_jax")))
            costs.append({
                "width": width,
                "batch": config.images_at(width),
                "side": side,
                "cold compile s": runs[0]["compile_seconds"],
                "warm compile s": float(np.median([run["compile_seconds"] for run in runs[1:]])) if runs[1:] else None,
                "peak MiB": float(np.median([run["peak_mib"] for run in runs])),
            })  # fmt: skip
    if len(sides) > 1:
        width = config.widths[0]
        found = _measure.in_new_process("benchmarks.step:agreement", width=width, batch_size=config.images_at(width))
        agreements = [{"width": width, "loss": found["loss"], "gradient": found["gradient"]}]
    tables = [
        Table(f"Time of a step, medians of {config.rounds} processes", times),
        Table("Compilation with a new and with a filled cache (PyTorch: first step less a later one), memory", costs),
    ]
    return [*tables, Table("Relative difference of PyTorch's loss and gradient", agreements)] if agreements else tables


def _alternate(config, width, sides, cache):
    """{side: one measurement for each round}; a side that fails says so once and is left out."""
    found: dict[str, list] = {side: [] for side in sides}
    for _ in range(config.rounds):
        for side in list(found):
            name, options = "measure_jax", {}
            if side != "spread_jax":
                name, options = "measure_torch", {"variant": side.removesuffix(KEPT)}
            environment = {"SPREAD_JAX_CACHE": str(cache / side), "TORCHINDUCTOR_CACHE_DIR": str(cache / side)}
            if side.endswith(KEPT):
                environment |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
            size = {"width": width, "batch_size": config.images_at(width), "steps": config.steps}
            try:
                result = _measure.in_new_process(f"benchmarks.step:{name}", environment=environment, **size, **options)
            except _measure.SideFailed as error:
                print(f"width {width}, {side}: did not run ({error})", flush=True)
                del found[side]
                continue
            found[side].append(result)
            print(f"width {width}, {side}: {1e3 * np.median(result['seconds']):.0f} ms", flush=True)
    return found


def _time_row(config, width, side, runs, ours):
    medians = [float(np.median(run["seconds"])) for run in runs]
    row = {
        "width": width,
        "batch": config.images_at(width),
        "side": side,
        "ms": 1e3 * float(np.median(medians)),
        "images/s": config.images_at(width) / float(np.median(medians)),
    }
    if side != "spread_jax" and ours:
        found = _measure.ratio([float(np.median(run["seconds"])) for run in ours], medians)
        row |= {"spread_jax / side": found["ratio"], "lowest": found["lowest"], "highest": found["highest"]}
    return row
