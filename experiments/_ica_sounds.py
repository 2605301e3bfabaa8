"""Sounds, mixed and unmixed: `python -m experiments.ica --preset audio`."""

from __future__ import annotations

import wave
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np

from spread_jax.errors import UsageError
from spread_jax.evaluation import save_figure
from spread_jax.linear import ica, match_columns, mixing_error

if TYPE_CHECKING:
    from experiments.ica import Config

RATE = 16_000


def synthesised(seed: int) -> list[np.ndarray]:
    """Four seconds each of a plucked melody, a drum and a gliding voice."""
    rng = np.random.default_rng(seed)
    count = 4 * RATE
    melody = np.zeros(count)
    for beat, semitone in enumerate((0, 4, 7, 12, 7, 4, 5, 9, 12, 9, 5, 0, 2, 7, 11, 14)):
        period = round(RATE / (220 * 2 ** (semitone / 12)))
        string, note = rng.uniform(-1, 1, period), np.empty(RATE // 2)
        for start in range(0, len(note), period):  # Karplus-Strong: a delay line that loses its high notes
            stop = min(start + period, len(note))
            note[start:stop] = string[: stop - start]
            string = 0.498 * (string + np.roll(string, 1))
        begin = beat * RATE // 4
        stop = min(begin + len(note), count)
        melody[begin:stop] += note[: stop - begin]
    drum = np.zeros(count)
    t = np.arange(RATE // 3) / RATE
    for beat in range(11):
        hit = np.exp(-18 * t) * np.sin(2 * np.pi * (90 * t + 8 * (1 - np.exp(-30 * t))))
        if beat % 2:
            hit = np.exp(-25 * t) * rng.normal(size=len(t))
        begin = round(beat * 0.36 * RATE)
        stop = min(begin + len(hit), count)
        drum[begin:stop] += hit[: stop - begin]
    t = np.arange(count) / RATE
    pitch = 140 + 30 * np.sin(2 * np.pi * 0.7 * t) + 12 * np.sin(2 * np.pi * 5 * t)
    phase = 2 * np.pi * np.cumsum(pitch) / RATE
    formant = 700 + 400 * np.sin(2 * np.pi * 0.4 * t)
    voice = sum(np.sin(k * phase) * np.exp(-(((k * pitch - formant) / 250) ** 2)) for k in range(1, 20))
    voice = voice * np.clip(np.sin(2 * np.pi * 1.3 * t), 0, 1)
    return [melody, drum, voice]


def read_sounds(config: Config) -> tuple[list[np.ndarray], int]:
    """The sounds to mix, cut to one length, and their rate."""
    if not config.sounds:
        return synthesised(config.seed), RATE
    if len(config.sounds) < 2:
        raise UsageError("--sounds needs at least two files to mix.")
    found, rates = [], set()
    for name in config.sounds:
        try:
            with wave.open(name, "rb") as file:
                if file.getsampwidth() != 2:
                    raise UsageError(f"--sounds: {name} has {8 * file.getsampwidth()} bits a sample; give 16-bit WAV.")
                frames = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(np.float64)
                found.append(frames.reshape(-1, file.getnchannels()).mean(axis=1))
                rates.add(file.getframerate())
        except (OSError, EOFError, wave.Error) as error:
            raise UsageError(f"--sounds: {name} cannot be read as a WAV file ({error}).") from error
    if len(rates) > 1:
        raise UsageError(f"--sounds: the files must share one rate, got {sorted(rates)} Hz.")
    length = min(map(len, found))
    if length < 1000:
        raise UsageError(f"--sounds: the shortest file has {length} samples; at least 1000 are needed.")
    return [sound[:length] for sound in found], rates.pop()


def write_sound(path: Path, sound: np.ndarray, rate: int) -> None:
    """A 16-bit mono WAV file at nine tenths of full scale."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.round(sound / np.abs(sound).max() * 0.9 * 32767).astype("<i2").tobytes())


def audio(config: Config, run, say) -> dict:
    """Mixes sounds, unmixes them and writes all as WAV files."""
    sounds, rate = read_sounds(config)
    z = np.stack([(sound - sound.mean()) / sound.std() for sound in sounds], axis=1)
    truth = np.random.default_rng(config.seed).uniform(0.3, 1.0, (len(sounds) + 1, len(sounds)))
    x = (z @ truth.T).astype(np.float32)
    result = ica.fit(x, len(sounds), num_restarts=4, key=jax.random.key(config.seed))
    estimate = np.asarray((x - result.mean) @ result.unmixing.T, np.float64)
    matched = match_columns(estimate, z, kind="direction")
    ratio = lambda u: (10 * np.log10((z**2).sum(axis=0) / ((u - z) ** 2).sum(axis=0))).tolist()
    best = [np.abs(np.corrcoef(x.T, column)[-1, :-1]).argmax() for column in z.T]
    mixed = np.stack([x[:, i] * (x[:, i] @ z[:, j]) / (x[:, i] @ x[:, i]) for j, i in enumerate(best)], axis=1)
    for name, group in (("source", z), ("mixed", x), ("unmixed", matched)):
        for index, sound in enumerate(group.T):
            write_sound(run.path / f"{name}_{index + 1}.wav", sound, rate)
    draw_sounds(z, x, matched, rate, run.save_figure_path("sounds.png"))
    before, after = ratio(mixed), ratio(matched)
    say("signal to noise, dB: " + ", ".join(f"{b:.1f} -> {a:.1f}" for b, a in zip(before, after, strict=True)))
    return {
        "converged": bool(result.converged),
        "decibels_of_the_best_microphone": before,
        "decibels_unmixed": after,
        "direction": mixing_error(np.asarray(result.mixing), truth, kind="direction"),
    }


def draw_sounds(z: np.ndarray, x: np.ndarray, matched: np.ndarray, rate: int, path: Path) -> None:
    """Waveforms: sources, microphones, unmixed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 1.25 * x.shape[1] + 0.6), layout="constrained")
    grid = figure.subplots(x.shape[1], 3, sharex=True, squeeze=False)
    seconds = np.arange(len(z)) / rate
    for column, (name, group) in enumerate((("sources", z), ("microphones", x), ("unmixed", matched))):
        for row in range(len(grid)):
            axes = grid[row, column]
            if row < group.shape[1]:
                axes.plot(seconds, group[:, row], linewidth=0.3, color=f"C{column}")
                axes.set_yticks([])
            else:
                axes.axis("off")
        grid[0, column].set_title(name, fontsize=11)
        last = grid[group.shape[1] - 1, column]
        last.set_xlabel("seconds")
        last.tick_params(labelbottom=True)
    save_figure(figure, path)
