"""One trainer of generators x = g(z) of images, for every spread noise and every objective.

`experiments.celeba`, `experiments.mnist` and `experiments.compare` are configs and pictures around it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from experiments import _launch, _train
from experiments._noise import LEARNED, NOISES, NoiseFamily, check_noise_config
from spread_jax import (
    SpreadNoise,
    elbo,
    jensen_shannon,
    kl,
    spread_elbo,
    spread_gan_losses,
    spread_importance_bound,
    wae_mmd_loss,
)
from spread_jax.data import Dataset, Loader, open_dataset
from spread_jax.evaluation import image_grid, save_image
from spread_jax.nn import Discriminator28, Discriminator64, Encoder28, Encoder64, Generator28, Generator64
from spread_jax.training import (
    AscentSchedule,
    Checkpointer,
    LossOutput,
    RunDirectory,
    create_alternating_state,
    learning_rate_schedule,
    make_alternating_step,
)

OBJECTIVES = ("spread_elbo", "elbo", "importance", "wae_mmd", "spread_gan")
SPREAD_BOUNDS = ("spread_elbo", "importance")
DIVERGENCES = {"js": jensen_shannon, "kl": kl}


@dataclasses.dataclass(frozen=True)
class GeneratorConfig:
    """Settings of a run. Images have values in [0, 1]; noise scales are in those units."""

    preset: str = "demo"
    """Whose values the other flags start from."""
    noise: Literal["gaussian", "laplace", "low_rank", "transformed"] = "gaussian"
    """The spread noise; `low_rank` learns its covariance, `transformed` its location."""
    objective: Literal["spread_elbo", "elbo", "importance", "wae_mmd", "spread_gan"] = "spread_elbo"
    """What is optimised: the spread ELBO (delta-VAE), the ELBO of clean images (VAE), the importance-weighted spread
    bound, the Wasserstein autoencoder's loss, or a GAN's whose discriminator sees spread images."""
    data: str = "faces"
    """A name or a path, as `spread_jax.data.open_dataset` takes it."""
    workdir: str | None = None
    """The run's folder."""
    seed: int = 0
    """Seed of the data order, the initial parameters and the noise."""
    steps: int = 2400
    """Optimiser steps of the model; a learned noise or a discriminator takes its own between them."""
    batch_size: int = 32
    """Images in a batch, over all devices and processes."""
    accumulate: int = 1
    """Parts of a batch computed one after another, to save memory; batch statistics are then those of a part."""
    devices: int | None = None
    """Devices over all processes; all there are if not given."""
    model_parallel: int = 1
    """Devices that share one copy of wide networks, each with a part of the output channels."""

    latent_dim: int = 16
    """Z, dimensions of z."""
    width: int = 16
    """Channels of the encoder's first convolution."""
    start: Literal[4, 8] = 4
    """Height and width of the generator's first layer, for 64x64 images."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the convolutions; parameters, statistics and the bound stay float32."""

    noise_scale: float = 0.5
    """Standard deviation of the noise added to each pixel, at the start."""
    final_noise_scale: float = 0.25
    """It is annealed down to this."""
    noise_decay: float = 0.9
    """Factor of each reduction."""
    noise_decay_every: int = 160
    """Steps of the model between reductions."""
    noise_scale_from_data: float | None = None
    """Start from this share of the standard deviation of the training images' pixels (root mean square over the
    pixels) in place of the noise scale, and scale the final one alike."""
    learned_scale: bool = False
    """Train the scale too, from the noise scale on; for `elbo`, whose noise belongs to the model."""
    num_spread_samples: int = 1
    """S_y, noisy copies of each image."""
    num_latent_samples: int = 1
    """S_z, latent draws for each noisy copy."""
    low_variance: bool = False
    """Evaluate the likelihood at the noise-free image."""
    importance_samples: int = 8
    """K, latent draws of the importance-weighted bound."""

    rank: int = 20
    """R, columns of the learned factor of the covariance (published: 20)."""
    factor_scale: float = 1.0
    """Geometric mean of the factor's singular values, fixed: its volume is this to the power R."""
    max_noise_entropy_ratio: float = 2.0
    """The learned covariance may add this many times the entropy it adds with equal singular values."""
    transform_features: int = 8
    """Channels inside the invertible residual block (published: 32)."""
    transform_coefficient: float = 0.9
    """Operator norm of each of its convolutions, below 1 (published: 0.1)."""
    descent_steps: int = 3
    """Steps of the model between ascents of the noise."""
    ascent_steps: int = 1
    """Steps of the noise in each ascent (published: 1000)."""
    through_encoder: bool = False
    """Let the noise follow the gradient through the encoder's input too: it then learns to mislead the encoder."""
    noise_learning_rate: float = 2e-3
    """Adam's learning rate for the noise."""

    mmd_weight: float = 100.0
    """Weight of the Wasserstein autoencoder's penalty on the latents (published for faces: 100)."""
    gan_divergence: Literal["js", "kl"] = "js"
    """The divergence whose lower bound the discriminator maximises; the generator's loss is the non-saturating one."""
    discriminator_width: int | None = None
    """Channels of the discriminator's first convolution; as of the encoder's if not given."""
    discriminator_steps: int = 1
    """Steps of the discriminator for each of the generator."""
    discriminator_learning_rate: float = 5e-4
    """Adam's learning rate for the discriminator."""
    generator_learning_rate: float = 3e-4
    """Adam's learning rate for a GAN's generator, in place of the model's: where it is the discriminator's or larger,
    the discriminator falls behind and its bound ends at 0 whatever the samples are."""

    learning_rate: float = 2e-3
    """Adam's learning rate for the model, after the warm-up; of a GAN, see --generator-learning-rate."""
    final_learning_rate_fraction: float = 0.1
    """Cosine decay to this fraction of the learning rate; 1 for none."""
    warmup_steps: int = 50
    """Steps of linear warm-up, at most half of all steps."""
    beta1: float = 0.5
    """Adam's first decay, of all players."""
    ema_decay: float = 0.995
    """Decay of the generator's moving average, which draws the samples."""

    crop: int | None = None
    """Side of the centre square cut out before resizing; 140 for CelebA if not given."""
    max_examples: int | None = None
    """Use only the first so many images of each split."""
    cache_dir: str | None = None
    """Folder of decoded images; ~/.cache/spread_jax if not given."""

    record_every: int = 20
    """Steps of all players between lines of metrics.jsonl."""
    sample_every: int = 600
    """Steps of all players between sample grids and held-out evaluations."""
    save_every: int = 600
    """Steps of all players between checkpoints."""
    keep: int = 3
    """Checkpoints to keep, besides the best."""
    held_out_examples: int = 500
    """Images of the test split in the final evaluation, of the validation split in the ones before."""
    on_log: str | None = None
    """A function of (step, metrics) to call for every record, to send it elsewhere: `package.module:function` or
    `path/to/file.py:function`. One that raises is told of once and not called again in that run."""
    quiet: bool = False
    """Print only the RESULT line and errors."""


# What may differ when a run is resumed: these change what is recorded and kept, not what is computed.
RESUMABLE = (
    "steps",
    "workdir",
    "data",  # may have moved; its pixels are compared by their fingerprint
    "cache_dir",
    "devices",
    "model_parallel",
    "record_every",
    "sample_every",
    "save_every",
    "keep",
    "held_out_examples",
    "quiet",
)

# Names of recorded numbers, of which a run has those of its objective and noise.
CURVES = {
    "nats per example": {
        "elbo": "ELBO, training batch",
        "importance_bound": "importance-weighted bound, training batch",
        "validation_elbo_nats": "ELBO, validation",
        "validation_importance_bound_nats": "importance-weighted bound, validation",
    },
    "KL, nats per example": {"kl": "KL(q(z|y) || p(z))"},
    "lower bound on the spread divergence, nats": {
        "divergence_bound": "training batch",
        "validation_divergence_bound_nats": "validation",
    },
    "MMD of latents, squared": {"mmd": "training batch", "validation_mmd": "validation"},
    "squared error per pixel": {"validation_reconstruction_mse": "reconstruction, validation"},
    "rise of the divergence in an ascent, nats": {"divergence_rise": "of its own batches"},
    "noise scale": {"noise_scale": "sigma"},
}


def curves(records: Sequence[Mapping[str, float]]) -> dict[str, dict[str, str]]:
    """The panels of CURVES that a run has points for; what is 0 throughout is not drawn."""
    has = {name for record in records for name, value in record.items() if value}
    kept = {label: {n: text for n, text in series.items() if n in has} for label, series in CURVES.items()}
    return {label: series for label, series in kept.items() if series}


def admitted_noises(objective: str) -> tuple[str, ...]:
    """The noises that have a meaning under an objective."""
    if objective == "wae_mmd":
        return ("gaussian",)  # the default, which it does not use
    return tuple(kind for kind in NOISES if objective != "elbo" or kind not in LEARNED)


def check_config(config: GeneratorConfig, image_shape: tuple[int, int, int]) -> None:
    """Refuses numbers that cannot work and combinations without a meaning, naming the flag."""
    _launch.require_at_least(
        config, 1, "steps", "batch_size", "latent_dim", "record_every", "sample_every", "save_every", "keep",
        "held_out_examples", "num_spread_samples", "num_latent_samples", "importance_samples", "discriminator_steps",
        "width", "accumulate", "model_parallel",
    )  # fmt: skip
    _launch.require_at_least(config, 0, "seed", "warmup_steps", "mmd_weight")
    _launch.require_positive(config, "learning_rate", "discriminator_learning_rate", "generator_learning_rate")
    check_noise_config(config, math.prod(image_shape))
    if image_shape[0] == 64 and config.width % 2:
        raise _launch.UsageError(f"--width must be an even number of at least 2, got {config.width}.")
    if config.discriminator_width is not None:
        _launch.require_at_least(config, 1, "discriminator_width")
    if config.noise_scale_from_data is not None:
        _launch.require_positive(config, "noise_scale_from_data")
    objective = config.objective
    if config.noise not in ("all", *admitted_noises(objective)):
        if objective == "wae_mmd":
            raise _launch.UsageError(f"--objective wae_mmd uses no noise: leave --noise {config.noise} out.")
        raise _launch.UsageError(
            f"--objective elbo spreads no images, so --noise {config.noise} has nothing to learn from: use gaussian or "
            "laplace, or --objective spread_elbo."
        )
    if config.learned_scale and objective != "elbo":
        raise _launch.UsageError(
            "--learned-scale is for --objective elbo alone: spread noise of no scale would be no spread at all; set "
            "its scale with --noise-scale or --noise-scale-from-data."
        )
    only = {
        "low_variance": ("spread_elbo",),
        "num_spread_samples": SPREAD_BOUNDS,
        "num_latent_samples": ("spread_elbo", "elbo"),
        "through_encoder": SPREAD_BOUNDS,
    }
    for name, objectives in only.items():
        if getattr(config, name) != getattr(GeneratorConfig, name) and objective not in objectives:
            raise _launch.UsageError(
                f"--{name.replace('_', '-')} is for --objective {' or '.join(objectives)}, not for {objective}."
            )
    if objective == "wae_mmd" and config.batch_size < 2:
        raise _launch.UsageError("--objective wae_mmd compares sets of latents: --batch-size must be at least 2.")


def default_workdir(config: GeneratorConfig, experiment: str) -> Path:
    """runs/<experiment>/<preset>-<seed>, and the objective and the noise where they are not the usual ones."""
    usual = type(config)()
    extra = [getattr(config, n) for n in ("objective", "noise") if getattr(config, n) != getattr(usual, n)]
    return Path("runs", experiment, "-".join([config.preset, str(config.seed), *extra]))


def open_splits(config: GeneratorConfig, image_size: int, channels: int | None = None) -> dict[str, Dataset]:
    """The training, validation and test images; refuses a batch that does not fit."""
    open_split = functools.partial(
        open_dataset,
        config.data,
        image_size=image_size,
        crop=config.crop,
        channels=channels,
        max_examples=config.max_examples,
        cache_dir=config.cache_dir,
        **({"progress": _launch.silent} if config.quiet else {}),
    )
    datasets = {split: open_split(split) for split in ("train", "validation", "test")}
    _loader(config, datasets["train"])
    _train.mesh_of(config)
    return datasets


def _loader(config: GeneratorConfig, dataset: Dataset) -> Loader:
    """The batches of this process."""
    return Loader(
        dataset,
        batch_size=config.batch_size,
        seed=config.seed,
        host_index=jax.process_index(),
        host_count=jax.process_count(),
    )


def with_scale_from_data(config: GeneratorConfig, dataset: Dataset) -> GeneratorConfig:
    """The config with the noise scale that its `noise_scale_from_data` means for the first 5,000 images."""
    if config.noise_scale_from_data is None:
        return config
    images = np.asarray(dataset.images[:5000]) / 255.0
    scale = round(config.noise_scale_from_data * float(np.sqrt(images.var(axis=0).mean())), 6)
    if not scale > 0:
        raise _launch.UsageError(f"{dataset.source} has no variance: give --noise-scale, not --noise-scale-from-data.")
    final = scale * config.final_noise_scale / config.noise_scale
    return dataclasses.replace(config, noise_scale=scale, final_noise_scale=final)


def saved_config(config: GeneratorConfig, dataset: Dataset) -> dict[str, Any]:
    """What a run's folder keeps of its settings; `load_config` reads it back.

    Not the hook of `on_log`, which is no part of the run: a folder from elsewhere must not name code.
    """
    return {
        **{name: value for name, value in _launch.as_dict(config).items() if name != "on_log"},
        "data_fingerprint": dataset.fingerprint,
        "image_shape": list(dataset.image_shape),
    }


def load_config(saved: Mapping[str, Any]) -> tuple[GeneratorConfig, tuple[int, int, int]]:
    """The training settings and the shape of an image of a saved config.

    Raises:
      KeyError, ValueError: it is that of something else.
      UsageError: its settings cannot work.
    """
    config, shape = _launch.config_from(GeneratorConfig, {**saved, "on_log": None}), saved["image_shape"]
    if not isinstance(shape, list) or len(shape) != 3 or not all(type(n) is int and 0 < n <= 4096 for n in shape):
        raise ValueError(f"image_shape is {json.dumps(shape)[:60]}")
    check_config(config, tuple(shape))
    return config, tuple(shape)


def latents(config: GeneratorConfig, num: int = 64) -> jax.Array:
    """The latents [num, Z] whose images are shown, the same throughout a run and for every noise and objective."""
    return jax.random.normal(evaluation_key(config), (num, config.latent_dim))


def evaluation_key(config: GeneratorConfig) -> jax.Array:
    """The random key of held-out numbers and pictures."""
    return jax.random.fold_in(jax.random.key(config.seed), 0x5EED)


class Model:
    """The networks, noise and objective of a config, and every compiled function of them; holds no state.

    One player, the model, descends: encoder and generator, of a GAN the generator. Another ascends where there is
    one: a learned noise, the discriminator of a GAN, or both of these together.

    Args:
      config: the settings.
      image_shape: (height, width, channels), of 64x64 or 28x28 pixels.
      mesh: the devices it is trained on; none for one device, or to use it only.
    """

    def __init__(self, config: GeneratorConfig, image_shape: tuple[int, int, int], mesh: Mesh | None = None):
        self.config, self.image_shape = config, tuple(image_shape)
        self.pixels = math.prod(image_shape)
        self.adversarial = config.objective == "spread_gan"
        self.encoder, self.generator, self.discriminator = _networks(config, self.image_shape)
        if self.adversarial:
            self.schedule = AscentSchedule(1, config.discriminator_steps)
        else:
            self.schedule = AscentSchedule(config.descent_steps, config.ascent_steps if self.learned_noise else 0)
        self.noises = NoiseFamily(config.noise, config, self.image_shape, self.schedule)
        self.num_steps = self.schedule.steps_for(config.steps)
        rate = learning_rate_schedule(
            config.generator_learning_rate if self.adversarial else config.learning_rate,
            num_steps=config.steps,
            warmup=min(config.warmup_steps, config.steps // 2),
            final_fraction=config.final_learning_rate_fraction,
        )
        self.optimizer = optax.adam(rate, b1=config.beta1)
        self.noise_optimizer = optax.adam(config.noise_learning_rate, b1=config.beta1)
        if self.adversarial:
            rate = learning_rate_schedule(
                config.discriminator_learning_rate,
                num_steps=config.steps * config.discriminator_steps,
                final_fraction=config.final_learning_rate_fraction,
            )
            players = {"discriminator": optax.adam(rate, b1=config.beta1), "noise": self.noise_optimizer}
            self.noise_optimizer = optax.partition(players, {name: name for name in players})
        self.train_step = make_alternating_step(
            self.loss,
            self.divergence,
            self.optimizer,
            self.noise_optimizer,
            self.schedule,
            ema_decay=config.ema_decay,
            averaged=_train.generator_variables,
            accumulate=config.accumulate,
            mesh=mesh,
        )

    @property
    def learned_noise(self) -> bool:
        """Whether the noise ascends."""
        return self.config.noise in LEARNED

    def initial_state(self) -> Any:
        """The state at step 0; the networks start alike under every noise and objective."""
        return self._create(jax.random.key(self.config.seed))

    @functools.cached_property
    def _create(self) -> Callable:
        def create(key):
            init_key, run_key, noise_key = self.split_key(key)
            encoder_key, generator_key = jax.random.split(init_key)
            image, latent = jnp.zeros((1, *self.image_shape)), jnp.zeros((1, self.config.latent_dim))
            variables = {"generator": self.generator.init(generator_key, latent, train=False)}
            if not self.adversarial:
                variables["encoder"] = self.encoder.init(encoder_key, image, train=False)
            params, batch_stats = (
                {name: v[part] for name, v in variables.items()} for part in ("params", "batch_stats")
            )
            if self.config.learned_scale:
                params["log_scale"] = jnp.full((), math.log(self.config.noise_scale))
            noise_params, noise_state = self.noises.initial(noise_key)
            if self.adversarial:
                critic = self.discriminator.init(jax.random.fold_in(noise_key, 1), image)["params"]
                noise_params = {"discriminator": critic, "noise": noise_params}
            return create_alternating_state(
                params,
                batch_stats,
                self.optimizer,
                noise_params,
                noise_state,
                self.noise_optimizer,
                key=run_key,
                averaged=_train.generator_variables,
            )

        return _launch.jit_for_few_calls(create)

    @staticmethod
    def split_key(key: jax.Array) -> jax.Array:
        """The keys of the networks, of the steps, and of the ascending player's start."""
        return jax.random.split(key, 3)

    def noise_params_of(self, noise_params: Any) -> Any:
        """The noise's part of what ascends."""
        return noise_params["noise"] if self.adversarial else noise_params

    def loss(self, params, noise_params, batch_stats, noise_state, batch, *, key, step):
        """What the model descends on, over a uint8 batch: see `GeneratorConfig.objective`."""
        noise = self._noise(params, noise_params, noise_state, step)
        x = _train.to_unit(batch)
        if self.adversarial:
            losses, metrics, new_stats = self._game(params, noise_params, batch_stats, noise, x, key, step)
            return losses.generator, LossOutput(new_stats, metrics)
        if self.config.objective == "wae_mmd":
            return self._autoencoder(params, batch_stats, x, key)
        bound, metrics, new_stats = self._bound(params, batch_stats, noise, x, key, step)
        return -bound, LossOutput(new_stats, metrics)

    def divergence(self, params, noise_params, batch_stats, noise_state, batch, *, key, step):
        """What a learned noise or a discriminator ascends on, over a uint8 batch, in nats.

        Of a GAN, the lower bound on the divergence of the spread distributions, which both can only raise towards
        its supremum. Of a bound on the likelihood, the upper bound on KL(p~ || p~_theta): see `NoiseFamily.metrics`.
        Then no gradient reaches the noise through the encoder's input unless `through_encoder` is set. Where q(z|y)
        is the posterior that gradient is zero, and where it is not it is that of the slack KL(q(z|y) || p(z|y))
        alone: noise that follows it learns to mislead the encoder instead of telling data and model apart.
        """
        noise_state = self.noises.updated(self.noise_params_of(noise_params), noise_state)
        noise = self._noise(params, noise_params, noise_state, step)
        x = _train.to_unit(batch)
        if self.adversarial:
            losses, metrics, _ = self._game(params, noise_params, batch_stats, noise, x, key, step)
            return losses.divergence, LossOutput(noise_state, metrics)
        see = (lambda y: y) if self.config.through_encoder else jax.lax.stop_gradient
        _, metrics, _ = self._bound(params, batch_stats, noise, x, key, step, see=see)
        return metrics["spread_kl_bound"], LossOutput(noise_state, metrics)

    def _noise(self, params, noise_params, noise_state, step) -> SpreadNoise:
        scale = jnp.exp(params["log_scale"]) if self.config.learned_scale else None
        return self.noises.at(self.noise_params_of(noise_params), noise_state, step, scale=scale)

    def _bound(self, params, batch_stats, noise, x, key, step, see=lambda y: y):
        """(mean bound on the log-likelihood, metrics, new batch statistics)."""
        config = self.config
        encoder, decode = self._networks(params, batch_stats, train=True)
        encode = lambda y: encoder(see(y))
        if config.objective == "importance":
            terms, auxiliary = spread_importance_bound(
                x, encode, decode, noise, key=key, num_samples=config.importance_samples,
                num_spread_samples=config.num_spread_samples, has_aux=True,
            )  # fmt: skip
            bound = terms.bound.mean()
            metrics = {"importance_bound": bound, "effective_sample_size": terms.effective_sample_size.mean()}
        else:
            options = {"key": key, "num_latent_samples": config.num_latent_samples, "has_aux": True}
            if config.objective == "elbo":
                terms, auxiliary = elbo(x, encode, decode, noise, **options)
            else:
                options |= {"num_spread_samples": config.num_spread_samples, "low_variance": config.low_variance}
                terms, auxiliary = spread_elbo(x, encode, decode, noise, **options)
            bound = terms.elbo.mean()
            metrics = {"elbo": bound, "log_likelihood": terms.log_likelihood.mean(), "kl": terms.kl.mean()}
        if config.objective in SPREAD_BOUNDS:
            metrics |= self.noises.metrics(noise, bound, step)
        else:
            scale = jnp.exp(params["log_scale"]) if config.learned_scale else self.noises.scale(step)
            metrics["noise_scale"] = scale
        return bound, metrics, _new_stats(("encoder", "generator"), auxiliary)

    def _autoencoder(self, params, batch_stats, x, key):
        encode, decode = self._networks(params, batch_stats, train=True)

        def encode_mean(x):
            (mean, _), new_stats = encode(x)
            return mean, new_stats

        terms, auxiliary = wae_mmd_loss(x, encode_mean, decode, key=key, weight=self.config.mmd_weight, has_aux=True)
        metrics = {"reconstruction_mse": terms.reconstruction.mean() / self.pixels, "mmd": terms.mmd}
        return terms.loss, LossOutput(_new_stats(("encoder", "generator"), auxiliary), metrics)

    def _game(self, params, noise_params, batch_stats, noise, x, key, step):
        latent_key, noise_key = jax.random.split(key)
        z = jax.random.normal(latent_key, (x.shape[0], self.config.latent_dim))
        decode = _train.network(self.generator, "generator", params, batch_stats, train=True)
        generated, auxiliary = decode(z)
        losses = spread_gan_losses(
            x, generated, self._critic(noise_params), noise, key=noise_key,
            divergence=DIVERGENCES[self.config.gan_divergence],
        )  # fmt: skip
        metrics = {
            "divergence_bound": losses.divergence,
            "generator_loss": losses.generator,
            "noise_scale": self.noises.scale(step),
        }
        if self.learned_noise:
            metrics |= self.noises.range_metrics(noise)
        return losses, metrics, _new_stats(("generator",), (auxiliary,))

    def _critic(self, noise_params):
        return functools.partial(self.discriminator.apply, {"params": noise_params["discriminator"]})

    def _networks(self, params, batch_stats, *, train):
        return (
            _train.network(self.encoder, "encoder", params, batch_stats, train=train),
            _train.network(self.generator, "generator", params, batch_stats, train=train),
        )

    def noise_of(self, state: Any) -> tuple[SpreadNoise, jax.Array] | None:
        """The noise of a state (of `elbo`, the decoder's distribution) and its entropy in nats; None of `wae_mmd`."""
        if self.config.objective == "wae_mmd":
            return None
        scale = {name: state.params[name] for name in ("log_scale",) if name in state.params}
        return self._noise_and_entropy(scale, state.noise_params, state.noise_state, state.step)

    @functools.cached_property
    def _noise_and_entropy(self) -> Callable:
        def create(*parts):
            noise = self._noise(*parts)
            return noise, noise.entropy(jnp.zeros((1, *self.image_shape)))[0]

        return _launch.jit_for_few_calls(create)

    def noise_scale(self, state: Any) -> float | None:
        """Standard deviation of the noise added to each pixel; None where there is no noise."""
        if self.config.objective == "wae_mmd":
            return None
        return float(jnp.exp(state.params["log_scale"]) if self.config.learned_scale else self.noises.scale(state.step))

    @functools.cached_property
    def _evaluate_batch(self) -> Callable:
        """(params, batch_stats, noise_params, noise, uint8 batch, key) -> named numbers, each [batch]."""
        config = self.config

        def evaluate(params, batch_stats, noise_params, noise, batch, key):
            x = _train.to_unit(batch)
            every = lambda value: jnp.broadcast_to(value, x.shape[:1])
            if self.adversarial:
                latent_key, noise_key = jax.random.split(key)
                z = jax.random.normal(latent_key, (x.shape[0], config.latent_dim))
                generated = self.generator.apply(_train.generator_variables(params, batch_stats), z, train=False)
                losses = spread_gan_losses(
                    x, generated, self._critic(noise_params), noise, key=noise_key,
                    divergence=DIVERGENCES[config.gan_divergence],
                )  # fmt: skip
                return {"divergence_bound_nats": every(losses.divergence)}
            encode, decode = self._networks(params, batch_stats, train=False)
            # Spread by the key that the bounds split off for it: XLA finds that it is the same, and encodes it once.
            seen = noise.sample(x, key=jax.random.split(key)[0]) if config.objective in SPREAD_BOUNDS else x
            error = jnp.square(decode(encode(seen)[0]) - x).reshape(x.shape[0], -1).mean(axis=1)
            if config.objective == "wae_mmd":
                terms = wae_mmd_loss(x, lambda x: encode(x)[0], decode, key=key, weight=config.mmd_weight)
                return {"loss": every(terms.loss), "mmd": every(terms.mmd), "reconstruction_mse": error}
            bound = elbo if config.objective == "elbo" else spread_elbo
            terms = bound(x, encode, decode, noise, key=key)
            found = {"elbo_nats": terms.elbo, "kl_nats": terms.kl, "reconstruction_mse": error}
            if config.objective == "importance":
                tighter = spread_importance_bound(
                    x, encode, decode, noise, key=key, num_samples=config.importance_samples
                )
                found["importance_bound_nats"] = tighter.bound
            return found

        return _launch.jit_for_few_calls(evaluate)

    def held_out(self, state: Any, dataset: Dataset, key: jax.Array) -> dict[str, float]:
        """Means over a split's first images of what the objective can tell.

        Of bounds on the likelihood `elbo_nats` with its standard error, `bits_per_dim`, `kl_nats`, where both sides
        are spread `spread_kl_bound_nats`, and of `importance` also `importance_bound_nats`; of these and `wae_mmd`
        `reconstruction_mse`; of `wae_mmd` `loss` and `mmd`; of `spread_gan` `divergence_bound_nats` alone.
        """
        noise, entropy = self.noise_of(state) or (None, None)
        values = _train.held_out(
            lambda batch, key: self._evaluate_batch(
                state.params, state.model_state, state.noise_params, noise, batch, key
            ),
            dataset,
            count=self.config.held_out_examples,
            batch_size=self.config.batch_size,
            key=key,
        )
        means = {name: mean for name, (mean, _) in values.items()}
        if "elbo_nats" in means:
            means["elbo_standard_error"] = values["elbo_nats"][1]
            means["bits_per_dim"] = -means["elbo_nats"] / (self.pixels * math.log(2))
        if "importance_bound_nats" in means:
            means["importance_bound_standard_error"] = values["importance_bound_nats"][1]
        if self.config.objective in SPREAD_BOUNDS:
            best = means.get("importance_bound_nats", means["elbo_nats"])
            means["spread_kl_bound_nats"] = -best - float(entropy)
        return means

    def encode(self, state: Any, batch: np.ndarray, key: jax.Array) -> tuple[jax.Array, jax.Array] | None:
        """Mean and standard deviation [n, Z] of q(z|y) for spread images, of q(z|x) where images are not spread.

        The Wasserstein autoencoder's encoder is deterministic: standard deviations of 0. None of a GAN.
        """
        return None if self.adversarial else self._encoded(state, batch, key)[:2]

    def reconstruct(self, state: Any, batch: np.ndarray, key: jax.Array) -> tuple[jax.Array, jax.Array] | None:
        """(what the encoder sees, images or noisy images y; g(mean of q)) of a uint8 batch; None of a GAN."""
        return None if self.adversarial else self._encoded(state, batch, key)[2:]

    def _encoded(self, state, batch, key):
        noise = self.noise_of(state)
        return self._encode_and_decode(state.params, state.model_state, noise and noise[0], batch, key)

    @functools.cached_property
    def _encode_and_decode(self) -> Callable:
        def run(params, batch_stats, noise, batch, key):
            encode, decode = self._networks(params, batch_stats, train=False)
            x = _train.to_unit(batch)
            seen = noise.sample(x, key=key) if self.config.objective in SPREAD_BOUNDS else x
            mean, log_std = encode(seen)
            std = jnp.zeros_like(mean) if self.config.objective == "wae_mmd" else jnp.exp(log_std)
            return mean, std, seen, decode(mean)

        return _launch.jit_for_few_calls(run)

    @functools.cached_property
    def generate(self) -> Callable:
        """(generator variables, as `averaged` or `current` give them, z) -> images x = g(z)."""
        return _launch.jit_for_few_calls(lambda variables, z: self.generator.apply(variables, z, train=False))

    @staticmethod
    def averaged(state: Any) -> Any:
        """Generator variables of the moving average."""
        return state.ema

    @staticmethod
    def current(state: Any) -> Any:
        """Generator variables of the last step."""
        return _train.generator_variables(state.params, state.model_state)

    @property
    def best_metric(self) -> tuple[str | None, Literal["max", "min"]]:
        """By what the best checkpoint is chosen; by nothing of a GAN, whose bound tells the two players' balance."""
        return {
            "spread_elbo": ("validation_elbo_nats", "max"),
            "elbo": ("validation_elbo_nats", "max"),
            "importance": ("validation_importance_bound_nats", "max"),
            "wae_mmd": ("validation_loss", "min"),
            "spread_gan": (None, "max"),
        }[self.config.objective]

    def headline(self, metrics: Mapping[str, float]) -> str:
        """The recorded numbers that the terminal shows while training."""
        if self.adversarial:
            return f"divergence at least {metrics['divergence_bound']:.3f} nats"
        if self.config.objective == "wae_mmd":
            return f"reconstruction error {metrics['reconstruction_mse']:.4f}, MMD^2 {metrics['mmd']:.4f}"
        if self.config.objective == "importance":
            return f"bound {metrics['importance_bound']:.0f} nats"
        return f"ELBO {metrics['elbo']:.0f} nats, KL {metrics['kl']:.0f}"

    def summary(self, numbers: Mapping[str, float]) -> str:
        """The held-out numbers that the terminal shows."""
        told = {
            "elbo_nats": "ELBO {:.1f} nats",
            "importance_bound_nats": "importance-weighted bound {:.1f} nats",
            "divergence_bound_nats": "divergence at least {:.3f} nats",
            "mmd": "MMD^2 {:.4f}",
            "reconstruction_mse": "reconstruction error {:.5f}",
        }
        return ", ".join(text.format(numbers[name]) for name, text in told.items() if name in numbers)


def _networks(config: GeneratorConfig, image_shape: tuple[int, int, int]) -> tuple[Any, Any, Any]:
    """Encoder, generator, discriminator for images of a size."""
    channels, dtype = image_shape[2], jnp.dtype(config.compute_dtype)
    critic_width = config.discriminator_width or config.width
    if image_shape[:2] == (64, 64):
        return (
            Encoder64(config.latent_dim, width=config.width, dtype=dtype),
            Generator64(width=config.width, channels=channels, start=config.start, dtype=dtype),
            Discriminator64(width=critic_width, dtype=dtype),
        )
    if image_shape[:2] == (28, 28):
        return (
            Encoder28(config.latent_dim, width=config.width, dtype=dtype),
            Generator28(width=config.width, channels=channels, dtype=dtype),
            Discriminator28(width=critic_width, dtype=dtype),
        )
    raise _launch.UsageError(
        f"There are networks for images of 64x64 and of 28x28 pixels, not of {image_shape[0]}x{image_shape[1]}."
    )


def _new_stats(names, auxiliary):
    return {name: a["batch_stats"] for name, a in zip(names, auxiliary, strict=True)}


def draw_samples(model: Model, state: Any, run: RunDirectory) -> None:
    """samples.png: the images of the config's latents."""
    images = np.asarray(model.generate(model.averaged(state), latents(model.config)))
    scale = 2 if model.image_shape[0] < 64 else 1
    save_image(image_grid(images, columns=8, scale=scale), run.save_figure_path("samples.png"))


def train_run(
    config: GeneratorConfig,
    run: RunDirectory,
    datasets: Mapping[str, Dataset],
    *,
    say: Callable[..., None],
    draw: Callable[[Model, Any, RunDirectory], None] = draw_samples,
    model_type: type[Model] = Model,
) -> tuple[Model, _train.Trained]:
    """Trains to `config.steps` in an open run folder, or resumes, or restores what is finished.

    Args:
      config: the settings, with the noise scale resolved: see `with_scale_from_data`.
      run: gets checkpoints, metrics.jsonl and the pictures; results are the caller's to write.
      datasets: the `train` and `validation` splits.
      say: as made by `_launch.talker`.
      draw: (model, state, run) draws pictures at every evaluation; samples.png if not given.
      model_type: `Model` or a subclass.

    Returns:
      The model and what `_train.fit` returns; of a run whose results have its steps, the state of its newest
      checkpoint, 0 seconds and no rates.
    """
    mesh = _train.mesh_of(config)
    model = model_type(config, datasets["train"].image_shape, mesh)
    metric, mode = model.best_metric
    with Checkpointer(
        run.checkpoints_path, keep=config.keep, best_metric=metric, best_mode=mode, run=run.identity
    ) as saver:
        if _launch.finished_steps(run) >= config.steps:
            state = saver.restore(jax.eval_shape(model.initial_state)).state
            return model, _train.Trained(state, 0.0, None, None, None)

        def evaluate(step: int, state: Any) -> tuple[dict[str, float], str]:
            numbers = model.held_out(state, datasets["validation"], evaluation_key(config))
            model.noises.check_state(step, model.noise_params_of(state.noise_params), state.noise_state)
            draw(model, state, run)
            rise = f", last ascent +{float(state.rise):.2f} nats" if model.learned_noise else ""
            sentence = f"step {step}: validation {model.summary(numbers)}{rise}; {run.path}/samples.png"
            return {f"validation_{name}": value for name, value in numbers.items()}, sentence

        trained = _train.fit(
            dataclasses.replace(config, steps=model.num_steps),
            run,
            saver,
            _loader(config, datasets["train"]),
            model.initial_state,
            model.train_step,
            evaluate,
            mesh=mesh,
            say=say,
            headline=model.headline,
            check=model.noises.check,
        )
    return model, trained
