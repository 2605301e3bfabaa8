"""Trains a deterministic generator x = g(z) of 64x64 images by minimising a spread divergence.

Data and model are spread by the same noise, and the evidence lower bound on the spread likelihood is maximised: a
delta-VAE. The noise may be learned, to discriminate, and the peers are one flag away.

  python -m experiments.celeba --preset demo                      synthetic faces, needs no download
  python -m experiments.celeba --preset small --data PATH         CelebA (or any folder or zip of images)
  python -m experiments.celeba --preset published --data PATH     the paper's networks and settings
  python -m experiments.celeba --image-size 32 ...                16, 32, 64, 128 or 256 pixels
  python -m experiments.celeba --noise low_rank ...               gaussian, laplace, low_rank, transformed
  python -m experiments.celeba --objective density_ratio ...      spread_elbo, elbo, importance, wae_mmd, spread_gan

--help shows the settings of the objective and the noise that are named beside it. The same command again resumes an
interrupted run, or says that it is finished. `demo` takes about 3 minutes on 2 cores and ends with a held-out ELBO of
-797 nats (seed 0), `small` 18 minutes (docs/results/faces.md).
"""

from __future__ import annotations

from spread_jax.cli import launch, train


def main(argv: list[str] | None = None) -> int:
    """Trains, or resumes, or says that the run is finished."""
    return train.train(
        argv, experiment="celeba", prog="python -m experiments.celeba", description=__doc__, default="demo"
    )


if __name__ == "__main__":
    launch.run_program(main, in_all_processes=True)
