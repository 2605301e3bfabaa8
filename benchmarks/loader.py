"""Images for each second of CPU time: the cached loader against Grain and PyTorch's DataLoader on the same files."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks._report import Table

TITLE = "Batches of images against Grain and PyTorch's DataLoader"
NOTES = """\
Synthetic faces (seed 0) as JPEG files of 178x218 pixels, resized to 64x64, in shuffled batches of uint8. "files"
decodes each image in every epoch, as the peers do; "array" reads decoded images from memory, as the peers can be told
to. This library decodes once into a memory-mapped array; "50 epochs" spreads that cost over 50 epochs, which is the
honest figure for a run. CPU time is that of the process, its threads and its child processes. The last column says
how many times as many images this library's loader serves for the same CPU time."""
EPOCHS = 50


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of the comparison."""

    images: int = 2000
    """JPEG files."""
    batch_size: int = 100
    """Images in a batch."""
    seconds: float = 4.0
    """CPU time of each measurement."""


def write_jpegs(folder: Path, count: int) -> None:
    """Synthetic faces in the size of CelebA's files."""
    from PIL import Image

    from spread_jax.data import render_faces, sample_factors

    faces = render_faces(sample_factors(np.random.default_rng(0), min(count, 64)))
    for i in range(count):
        image = Image.fromarray(faces[i % len(faces)]).resize((178, 218), Image.Resampling.BICUBIC)
        image.save(folder / f"{i:06d}.jpg", quality=90)


def decode(path: str) -> np.ndarray:
    """One file as this library reads it: the centre square, antialiased bilinear to 64x64."""
    from PIL import Image

    with Image.open(path) as image:
        left, top = (image.width - 140) // 2, (image.height - 140) // 2
        box = (left, top, left + 140, top + 140)
        return np.asarray(image.convert("RGB").resize((64, 64), Image.Resampling.BILINEAR, box=box))


def rate(batches: Iterator, batch_size: int, seconds: float) -> float:
    """Images for each CPU second of this process, all threads counted."""
    next(batches)
    began, count, used = time.process_time(), 0, 0.0
    while used < seconds:
        next(batches)
        count += 1
        used = time.process_time() - began
    return count * batch_size / used


def run(config: Config) -> list[Table]:
    """Rates of each loader over files and over decoded images."""
    from spread_jax.data import Loader, open_dataset

    with tempfile.TemporaryDirectory() as folder:
        files = Path(folder) / "images" / "train"
        files.mkdir(parents=True)
        write_jpegs(files, config.images)
        paths = sorted(map(str, files.iterdir()))
        began = time.process_time()
        dataset = open_dataset(
            files.parent, crop=140, cache_dir=Path(folder) / "cache", progress=lambda message, done, total: None
        )
        decoding = (time.process_time() - began) / len(dataset)
        batches = Loader(dataset, batch_size=config.batch_size, seed=0).iterate()
        cached = rate((batch for _, batch in batches), config.batch_size, config.seconds)
        batches.close()
        images = np.asarray(dataset.images)
        whole_run = 1 / (decoding / EPOCHS + 1 / cached)
        rows = [
            {"loader": "spread_jax", "reads": "array", "images / CPU s": cached},
            {"loader": "spread_jax", "reads": f"files, {EPOCHS} epochs", "images / CPU s": whole_run},
        ]
        for name, peer in (("Grain", _grain), ("PyTorch", _torch)):
            try:
                rows += [{"loader": name, **row} for row in peer(paths, images, config)]
            except ImportError as error:
                print(f"{name} is left out: {error}", flush=True)
        for row in rows[2:]:
            ours = rows[0 if row["reads"] == "array" else 1]["images / CPU s"]
            row["spread_jax / this"] = ours / row["images / CPU s"]
    return [Table(f"{config.images:,} images, batch {config.batch_size}", rows)]


def _grain(paths, images, config):
    import grain

    def dataset(source, read):
        chain = grain.MapDataset.source(source).seed(0).shuffle().repeat().map(read)
        return iter(chain.batch(config.batch_size).to_iter_dataset())

    return [
        {"reads": reads, "images / CPU s": rate(dataset(source, read), config.batch_size, config.seconds)}
        for reads, source, read in (("array", range(len(images)), images.__getitem__), ("files", paths, decode))
    ]


def _torch(paths, images, config):
    import torch
    from torch.utils.data import DataLoader

    class Images(torch.utils.data.Dataset):
        def __init__(self, source, read):
            self.source, self.read = source, read

        def __len__(self):
            return len(self.source)

        def __getitem__(self, index):
            return torch.from_numpy(np.array(self.read(self.source[index])))

    def endless(loader):
        while True:
            yield from loader

    return [
        {
            "reads": reads,
            "images / CPU s": rate(
                endless(DataLoader(Images(source, read), config.batch_size, shuffle=True, drop_last=True)),
                config.batch_size,
                config.seconds,
            ),
        }
        for reads, source, read in (("array", range(len(images)), images.__getitem__), ("files", paths, decode))
    ]
