"""Evaluates a finished run of any noise and objective: samples against held-out images, bounds, a memorisation check.

  python -m experiments.evaluate runs/celeba/demo-0                          features trained on the run's own data
  python -m experiments.evaluate runs/celeba/demo-0 --features inception     the literature's FID and KID

Adds `evaluation` to the run's results.json, draws neighbours.png and writes report.html. What it takes:

  frechet_distance     of samples and held-out images; frechet_infinity is extrapolated to infinitely many
  kernel_distance      unbiased, with its standard error
  precision, recall, density, coverage; sharpness over that of real images (1 is as sharp)
  real_*               the same for training against held-out images: what a perfect generator would get
  importance_bound     on the spread log-likelihood of held-out images, nats per example at the run's last noise, where
                       an encoder of spread images was trained; annealed importance sampling needs none
  memorised_share      of samples nearer to a training image than 99 % of the held-out images are: expect 0.01

Features of the run's own data are trained once for each data set, a few minutes on 2 cores, see
`experiments.features`. Distances compare only where `features_fingerprint` is the same. The rest takes about a minute
for the demo. Expect a distance that falls as training goes on, and stays well above real_frechet_distance.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from experiments import _launch, _scores
from experiments import features as feature_training
from experiments._generator import Model
from experiments.sample import draw, load_run
from spread_jax import spread_importance_bound
from spread_jax.data import Dataset, open_dataset
from spread_jax.evaluation import (
    annealed_importance_sampling,
    held_out_bound,
    image_grid,
    nearest_neighbours,
    save_image,
    write_report,
)
from spread_jax.training import RunDirectory

_DRAWN = 2048  # samples in memory as floats


@dataclasses.dataclass(frozen=True)
class Config:
    """What to evaluate, and how thoroughly."""

    run: tyro.conf.Positional[Path]
    """The run's folder, as printed when it was trained."""
    features: str | None = None
    """`inception`, or a file made by experiments.features; the one of the run's data, trained if need be, if not
    given."""
    samples: int = 10_000
    """Held-out images at most, and as many samples."""
    importance_examples: int = 200
    """Held-out images for the importance-weighted bound; 0 for none."""
    importance_samples: int = 50
    """K, draws of z for each of them."""
    annealed_examples: int = 0
    """Held-out images for annealed importance sampling, which is slow; 0 for none."""
    annealed_steps: int = 500
    """Its intermediate distributions."""
    annealed_chains: int = 8
    """Its chains for each image."""
    feature_steps: int = feature_training.Config.steps
    """Training steps of the features, where they are trained here."""
    data: str | None = None
    """Where the run's data is now; where it was if not given."""
    cache_dir: str | None = None
    """Folder of decoded images and features; the run's if not given."""
    real_images: bool = True
    """Draw nearest training images and show real images in the report."""
    step: int | None = None
    """Evaluate the checkpoint of this step; the newest sound one if not given."""
    seed: int = 0
    """Seed of samples, noise and subsets."""
    quiet: bool = False
    """Print only the RESULT line and errors."""


def check_config(config: Config) -> None:
    """Refuses numbers that cannot work, naming the flag."""
    _launch.require_at_least(config, 0, "seed", "importance_examples", "annealed_examples")
    _launch.require_at_least(config, 1, "importance_samples", "annealed_steps", "annealed_chains", "feature_steps")
    _launch.require_at_least(config, _scores.FEWEST, "samples")


def open_data(config: Config, model: Model, saved: dict) -> tuple[Dataset, Dataset]:
    """The training and test splits that the run was trained with."""
    trained = model.config
    open_split = functools.partial(
        open_dataset,
        config.data or trained.data,
        image_size=model.image_shape[0],
        channels=model.image_shape[2],
        crop=trained.crop,
        max_examples=trained.max_examples,
        cache_dir=config.cache_dir or trained.cache_dir,
        **({"progress": _launch.silent} if config.quiet else {}),
    )
    train, test = open_split("train"), open_split("test")
    if train.fingerprint != saved.get("data_fingerprint"):
        raise _launch.UsageError(
            f"{train.source} is not what the run was trained on: its pixels have the fingerprint {train.fingerprint}, "
            f"the run's {saved.get('data_fingerprint')}. Pass the run's data with --data."
        )
    _scores.require_enough(train, test)
    return train, test


def draw_samples(model: Model, variables, num: int, seed: int) -> np.ndarray:
    """uint8 samples [num, height, width, channels], as an image file would hold them."""
    images = []
    for start in range(0, num, _DRAWN):
        # Parts of their own seeds: draw() makes the first ones anew each time.
        part = draw(model, variables, num=min(_DRAWN, num - start), seed=seed + 1_000_003 * (start // _DRAWN))
        images.append(_scores.as_stored(part))
    return np.concatenate(images)


class _Unspread:
    """Leaves data as they are and scores them under the decoder's distribution: the one-sided case of a VAE."""

    def __init__(self, noise):
        self.log_prob, self.location = noise.log_prob, noise.location

    def sample(self, x: jax.Array, *, key: jax.Array) -> jax.Array:
        """x itself."""
        return x


def likelihoods(config: Config, model: Model, state, test: Dataset, say) -> dict[str, float]:
    """The importance-weighted bound, and annealed importance sampling, of held-out images.

    Of images spread by the run's last noise; of `elbo`, of the images themselves under its decoder's distribution. The
    first needs an encoder of these, so a GAN has the second alone, and the Wasserstein autoencoder, which has no noise,
    has neither.
    """
    if model.config.objective == "wae_mmd":
        return {}
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    noise, _ = model.noise_of(state)
    if model.config.objective == "elbo":
        noise = _Unspread(noise)
    networks = {
        name: functools.partial(
            module.apply, {"params": state.params[name], "batch_stats": state.model_state[name]}, train=False
        )
        for name, module in (("encoder", model.encoder), ("generator", model.generator))
        if name in state.params
    }
    encode, decode = networks.get("encoder"), networks["generator"]
    unit = lambda batch: batch.astype(jnp.float32) / 255
    found: dict[str, float] = {"noise_scale": model.noise_scale(state)}

    @jax.jit
    def bound(batch, *, key):
        return spread_importance_bound(
            unit(batch), encode, decode, noise, key=key, num_samples=config.importance_samples
        )

    @jax.jit
    def annealed(batch, *, key):
        noise_key, chain_key = jax.random.split(key)
        y = noise.sample(unit(batch), key=noise_key)
        return annealed_importance_sampling(
            y, decode, noise, model.config.latent_dim,
            num_steps=config.annealed_steps, num_chains=config.annealed_chains, key=chain_key,
        )  # fmt: skip

    if config.importance_examples and encode is not None:
        images = test.images[: config.importance_examples]
        result = held_out_bound(bound, images, batch_size=10, key=key)
        found |= {
            "importance_bound_nats": result.value,
            "importance_bound_standard_error": result.standard_error,
            "importance_effective_sample_size": result.effective_sample_size,
            "importance_samples": config.importance_samples,
            "importance_examples": len(images),
        }
        say(f"importance-weighted bound: {result.value:.1f} ± {result.standard_error:.1f} nats")
    if config.annealed_examples:
        images = test.images[: config.annealed_examples]
        terms = []

        def kept(batch, *, key):
            terms.append(annealed(batch, key=key))
            return terms[-1].log_likelihood

        result = held_out_bound(kept, images, batch_size=4, key=key)
        found |= {
            "annealed_log_likelihood_nats": result.value,
            "annealed_log_likelihood_standard_error": result.standard_error,
            "annealed_acceptance_rate": float(np.mean([t.acceptance_rate for t in terms])),
            "annealed_effective_sample_size": float(np.mean([t.effective_sample_size for t in terms])),
            "annealed_examples": len(images),
        }
        say(f"annealed importance sampling: {result.value:.1f} ± {result.standard_error:.1f} nats")
    return found


def evaluate(config: Config, run: RunDirectory, say) -> dict:
    """Everything, as one dictionary."""
    model, state = load_run(run.path, config.step)
    train, test = open_data(config, model, run.config)
    cache_dir = config.cache_dir or model.config.cache_dir
    extract = _scores.find_features(config.features, train, cache_dir=cache_dir, steps=config.feature_steps, say=say)
    count = min(config.samples, len(test))
    say(f"{count} samples of step {int(state.step)} against {count} held-out images; features: {extract.name}")

    samples = draw_samples(model, state.ema, count, config.seed)
    held_out = np.asarray(test.images[:count])
    sample_features, held_out_features = extract(samples), extract(held_out)
    train_features = _scores.features_of(extract, train.images)
    # A random part of the training images, as large as the held-out part, stands for a perfect generator.
    some = _scores.random_rows(len(train), count, config.seed)
    key = jax.random.key(config.seed)
    found = _scores.distances(sample_features, held_out_features, infinity_key=key)
    if len(some) == count:
        real = _scores.distances(train_features[some], held_out_features, infinity_key=key)
        found |= {f"real_{name}": value for name, value in real.items()}
    found |= _scores.sharpness(samples, held_out)
    told = found["frechet_distance"], found.get("real_frechet_distance", math.nan)
    say(f"Fréchet distance {told[0]:.2f} (training images: {told[1]:.2f}), sharpness {found['sharpness']:.2f}")

    # Memorisation: do samples lie nearer to training images than unseen real images do?
    neighbours, distances = nearest_neighbours(sample_features, train_features, k=min(5, len(train)))
    _, of_held_out = nearest_neighbours(held_out_features, train_features)
    found |= {
        "memorised_share": float((distances[:, 0] < np.quantile(of_held_out, 0.01)).mean()),
        "nearest_training_distance_median": float(np.median(distances[:, 0])),
        "real_nearest_training_distance_median": float(np.median(of_held_out)),
    }
    picture = run.save_figure_path("neighbours.png")
    if config.real_images:
        rows = [np.concatenate([samples[i][None], train.images[np.array(neighbours[i])]]) for i in range(min(8, count))]
        save_image(image_grid(np.concatenate(rows), columns=len(rows[0])), picture)
    else:
        picture.unlink(missing_ok=True)

    return {
        "step": int(state.step),
        "samples": count,
        "features": extract.name,
        "features_fingerprint": extract.fingerprint,
        **found,
        **likelihoods(config, model, state, test, say),
    }


def main(argv: list[str] | None = None) -> int:
    """Evaluates, adds to the results, reports."""
    config = _launch.parse_plain(Config, __doc__, argv)
    check_config(config)
    _launch.configure_jax()
    say = _launch.talker(quiet=config.quiet)
    with RunDirectory.reopen(config.run) as run:
        run.require_finished()
        began = time.perf_counter()
        found = {**evaluate(config, run, say), "seed": config.seed}
        found["seconds"] = round(time.perf_counter() - began, 2)
        run.update_results({"evaluation": found})
        report = write_report(run.path, real_images=config.real_images)
        say(f"results: {run.path}/results.json, report: {report}")
    _launch.print_result({"experiment": "evaluate", "run": str(config.run), **found, "versions": _launch.versions()})
    return 0


if __name__ == "__main__":
    _launch.run(main)
