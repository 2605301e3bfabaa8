"""Flags for the settings of one method and noise, of every noise, of every method."""

import dataclasses

import pytest

from spread_jax.cli.flags import parse_training
from spread_jax.errors import UsageError
from spread_jax.models import METHODS, NOISES, PRESETS

PAPER = ("--objective", "spread_elbo")  # not what the demo trains


def parsed(*argv, **options):
    return parse_training([*argv], prog="train", description="Trains.", presets=PRESETS, default="demo", **options)


def settings_of(value):
    return {field.name for field in dataclasses.fields(value)} - {"image_shape", "networks", "noise"}


def test_one_method_and_noise_have_their_settings_and_no_others(capsys):
    found = parsed("--noise", "low_rank", "--rank", "3", "--width", "4")
    assert (found.objective, found.noises, found.preset) == ("spread_elbo", ("low_rank",), "demo")
    assert set(found.settings) == settings_of(METHODS["spread_elbo"]) | settings_of(NOISES["low_rank"])
    assert (found.method.name, found.method.width) == ("spread_elbo", 4)
    assert found.method.noise == dataclasses.replace(NOISES["low_rank"], rank=3)
    for argv in (["--rank", "3", *PAPER], ["--noise", "low_rank", "--critic-steps", "2"], ["--mmd-weight", "1"]):
        with pytest.raises(SystemExit) as stopped:
            parsed(*argv)
        assert stopped.value.code == 2
    assert "--rank" in capsys.readouterr().err


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_built_with_what_was_typed(name):
    found = parsed("--objective", name, "--latent-dim", "5")
    assert type(found.method) is METHODS[name]
    assert found.method.latent_dim == 5
    assert set(found.settings) == settings_of(METHODS[name])


def test_all_noises_have_flags_and_each_gets_its_own():
    found = parsed("--rank", "3", "--transform-features", "2", "--descent-steps", "7", *PAPER, all_noises=True)
    assert found.noises == tuple(NOISES)
    assert found.build("spread_elbo", "low_rank").noise == dataclasses.replace(
        NOISES["low_rank"], rank=3, descent_steps=7
    )
    assert found.build("spread_elbo", "transformed").noise == dataclasses.replace(
        NOISES["transformed"], transform_features=2, descent_steps=7
    )
    assert found.build("spread_elbo", "laplace").noise == NOISES["laplace"]
    assert parsed("--noise", "laplace", all_noises=True).noises == ("laplace",)


def test_all_noises_are_those_that_the_method_admits():
    assert parsed("--objective", "elbo", all_noises=True).noises == ("gaussian", "laplace")
    assert parsed("--objective", "wae_mmd", all_noises=True).noises == ()
    with pytest.raises(UsageError, match="--objective wae_mmd uses no noise: leave --noise laplace out"):
        parsed("--objective", "wae_mmd", "--noise", "laplace")


def test_all_methods_have_flags_and_each_gets_its_own():
    found = parsed("--mmd-weight", "3", "--critic-steps", "2", "--rank", "5", "--width", "4", all_methods=True)
    every = [*METHODS.values(), *map(type, NOISES.values())]
    assert set(found.settings) == set.union(*map(settings_of, every))
    assert found.build("wae_mmd").mmd_weight == 3
    assert found.build("spread_gan").critic_steps == 2
    assert found.build("importance", "low_rank").noise.rank == 5
    assert found.build("elbo", learned_scale=True).learned_scale
    assert all(found.build(name).width == 4 for name in METHODS)
    assert all(type(found.build(name)) is kind for name, kind in METHODS.items())
    with pytest.raises(SystemExit):
        parsed("--objective", "elbo", all_methods=True)


def test_help_tells_of_each_setting_of_all(capsys):
    with pytest.raises(SystemExit):
        parsed("--help", all_methods=True)
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for told in ("Weight of the penalty on the latents", "R, the columns of L", "Steps of the critic for each"):
        assert told in text


@pytest.mark.parametrize("flag", ["--preset", "--objective", "--noise"])
def test_a_name_that_there_is_not_is_refused_with_those_that_there_are(flag, capsys):
    with pytest.raises(SystemExit) as stopped:
        parsed(flag, "nothing")
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    assert "nothing" in told
    assert {"--preset": "published", "--objective": "wae_mmd", "--noise": "low_rank"}[flag] in told
