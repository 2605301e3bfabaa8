"""Blinks taken out of a simulated EEG recording by MNE-Python's ICA, with each method.

  python -m experiments._ica_eeg     needs MNE (pip install mne); about a minute, most of it Infomax's

32 channels, 120 s at 250 Hz, in volts: cortical sources with alpha rhythm, hum of the mains, muscle, sensor noise, an
average reference, a bad channel, and blinks whose field falls off from the eyes. Writes docs/images/ica_eeg.png.
"""

from __future__ import annotations

import time
import warnings
from pathlib import Path

import numpy as np

from spread_jax.linear import eeg

RATE, SECONDS, COMPONENTS = 250, 120, 20


def simulate(seed: int):
    """Raw in volts and the blinks alone, [channels, times], in the average reference."""
    import mne

    montage = mne.channels.make_standard_montage("standard_1020")
    names = "Fp1 Fp2 F7 F3 Fz F4 F8 FC5 FC1 FC2 FC6 T7 C3 Cz C4 T8 TP9 CP5 CP1 CP2 CP6 TP10 P7 P3 Pz P4 P8"
    names += " PO9 O1 Oz O2 PO10"
    names = names.split()
    info = mne.create_info(names, RATE, "eeg").set_montage(montage)
    places = np.array([montage.get_positions()["ch_pos"][name] for name in names])
    places = places / np.linalg.norm(places, axis=1, keepdims=True)
    rng = np.random.default_rng(seed)
    count = RATE * SECONDS
    t = np.arange(count) / RATE

    def field(centre, width):
        return np.exp(-np.square(places - centre / np.linalg.norm(centre)).sum(axis=1) / (2 * width**2))

    data = np.zeros((len(names), count))
    for _ in range(14):  # cortex: coloured noise whose amplitude waxes and wanes
        spectrum = np.fft.rfft(rng.laplace(size=count)) / np.maximum(np.fft.rfftfreq(count, 1 / RATE), 1) ** 0.6
        course = np.fft.irfft(spectrum, count) * np.exp(0.5 * np.sin(2 * np.pi * rng.uniform(0.02, 0.3) * t))
        centre = rng.normal(size=3) * [1, 1, 0.4] + [0, 0, 0.6]
        data += 8e-6 * np.outer(field(centre, rng.uniform(0.35, 0.8)), course / course.std())
    alpha = np.sin(2 * np.pi * 10 * t + 0.5 * np.cumsum(rng.normal(size=count)) / RATE) * (1 + np.sin(0.4 * t))
    data += 8e-6 * np.outer(field(np.array([0, -1, 0.3]), 0.5), alpha)
    data += 3e-6 * np.outer(field(np.array([-1, 0, -0.2]), 0.5), np.sin(2 * np.pi * 50 * t))
    data += 6e-6 * np.outer(field(np.array([1, 0.3, -0.4]), 0.3), rng.laplace(size=count) * (np.sin(0.7 * t) > 0))
    blinks = np.zeros(count)
    for at in np.sort(rng.choice(count - RATE, 30, replace=False)):
        blinks[at : at + RATE // 3] += rng.uniform(0.7, 1.3) * np.hanning(RATE // 3)
    eyes = 1.2e-4 * np.outer(field(np.array([0, 1, -0.15]), 0.45), blinks)
    data += eyes + 4e-7 * rng.normal(size=data.shape)
    data[12] += 2e-4 * rng.normal(size=count)
    raw = mne.io.RawArray(data, info)
    raw.info["bads"] = [names[12]]
    raw.set_eeg_reference("average")
    good = np.arange(len(names)) != 12
    return raw, eyes[good] - eyes[good].mean(axis=0)


def clean(raw, blinks: np.ndarray, method: str, seed: int):
    """What remains when the component that follows the blinks is taken out.

    Returns:
      (amplitude of blinks left in the channel where they are largest, in microvolts; what is left of them and what was
      taken out besides, as a share of them; CPU seconds; ICA; Raw).
    """
    import mne

    extended = {"fit_params": {"extended": True}} if method == "infomax" else {}
    name = "infomax" if method == "spread" else method
    ica = mne.preprocessing.ICA(COMPONENTS, method=name, random_state=seed, max_iter="auto", **extended)
    began = time.process_time()
    ica = eeg.fit_mne(ica, raw, random_state=seed) if method == "spread" else ica.fit(raw)
    seconds = time.process_time() - began
    largest = np.abs(blinks).max(axis=1).argmax()
    course = blinks[largest]
    correlation = np.abs(np.corrcoef(np.vstack([ica.get_sources(raw).get_data(), course]))[-1, :-1])
    ica.exclude = [int(correlation.argmax())]
    cleaned = ica.apply(raw.copy())
    picks = [name for name in raw.ch_names if name not in raw.info["bads"]]
    removed = raw.get_data(picks) - cleaned.get_data(picks)
    centred = [a - a.mean(axis=1, keepdims=True) for a in (removed, blinks)]
    rest = centred[1] - centred[0]
    share = rest[largest] @ centred[1][largest] / np.square(centred[1][largest]).sum()
    amplitude = 1e6 * abs(share) * np.abs(course).max()
    return amplitude, np.linalg.norm(rest) / np.linalg.norm(centred[1]), seconds, ica, cleaned


def draw(raw, ica, cleaned, path: Path) -> None:
    """Topographies and courses of a few components, and two channels before and after."""
    import mne
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6.4), layout="constrained")
    grid = figure.add_gridspec(4, 4, width_ratios=[1, 3, 0.1, 4])
    chosen = [ica.exclude[0], *[index for index in range(4) if index != ica.exclude[0]]][:4]
    fields, sources = ica.get_components(), ica.get_sources(raw).get_data()
    info = mne.pick_info(raw.info, mne.pick_channels(raw.info["ch_names"], ica.ch_names))
    span = slice(0, 12 * RATE)
    seconds = raw.times[span]
    for row, index in enumerate(chosen):
        axes = figure.add_subplot(grid[row, 0])
        mne.viz.plot_topomap(fields[:, index], info, axes=axes, show=False, contours=4)
        axes.set_title(f"component {index}" + (", out" if index == ica.exclude[0] else ""), fontsize=9)
        axes = figure.add_subplot(grid[row, 1])
        axes.plot(seconds, sources[index, span], linewidth=0.5, color="C3" if index == ica.exclude[0] else "C0")
        axes.set_yticks([])
    axes.set_xlabel("seconds")
    for row, name in enumerate(("Fp1", "Fz", "Cz", "Oz")):
        axes = figure.add_subplot(grid[row, 3])
        for data, colour, label in ((raw, "C7", "recorded"), (cleaned, "C0", "without the component")):
            axes.plot(seconds, 1e6 * data.get_data([name])[0, span], linewidth=0.6, color=colour, label=label)
        axes.set_ylabel(f"{name}, µV", fontsize=9)
        if row == 0:
            axes.legend(frameon=False, fontsize=8, loc="upper right")
    axes.set_xlabel("seconds")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Prints a row for each method."""
    import mne

    mne.set_log_level("error")
    warnings.simplefilter("ignore")  # of peers that did not converge
    print("| method | amplitude left, µV | left or taken out besides | CPU seconds |\n|---|---|---|---|")
    for method in ("spread", "picard", "fastica", "infomax"):
        found = []
        for seed in range(2):
            raw, blinks = simulate(seed)
            amplitude, left, seconds, ica, cleaned = clean(raw, blinks, method, seed)
            found.append((amplitude, left, seconds))
            if method == "spread" and seed == 0:
                draw(raw, ica, cleaned, Path("docs/images/ica_eeg.png"))
        amplitude, left, seconds = np.mean(found, axis=0)
        print(f"| {method} | {amplitude:.2f} | {100 * left:.1f} % | {seconds:.2f} |", flush=True)
    print(f"Blinks: {1e6 * np.abs(blinks).max():.0f} µV.")


if __name__ == "__main__":
    main()
