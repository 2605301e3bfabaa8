"""Trains a deterministic generator x = g(z) of 64x64 images by minimising a spread divergence.

Data and model are spread by the same noise. `demo` and `small` compare them at many scales of noise, by a critic;
`published` is the paper's delta-VAE, which maximises the evidence lower bound on the spread likelihood. The noise of
that may be learned, to discriminate. Every other way is one flag away.

  python -m experiments.celeba --preset demo                      synthetic faces, needs no download
  python -m experiments.celeba --preset small --data PATH         CelebA (or any folder or zip of images)
  python -m experiments.celeba --preset published --data PATH     the paper's networks and settings
  python -m experiments.celeba --image-size 32 ...                16, 32, 64, 128 or 256 pixels
  python -m experiments.celeba --objective spread_elbo ...        or elbo, importance, wae_mmd, spread_gan,
                                                                  density_ratio, density_ratio_vae, score_difference
  python -m experiments.celeba --noise low_rank ...               gaussian, laplace, low_rank, transformed

--help shows the settings of the objective and the noise that are named beside it. The same command again resumes an
interrupted run, or says that it is finished. `demo` takes about 4 minutes on 2 cores, `small` about 20
(docs/results/faces.md).
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
