"""Features of images for the distances: a small network trained on the data at hand, or Inception's.

A feature extractor is any callable from images [n, height, width, channels], uint8 or floating point in [0, 1], to
features [n, d]. The two here also carry a `fingerprint`: distances compare only where it is the same.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spread_jax._checks import check_count
from spread_jax._files import UNREADABLE_ARRAYS, refuse_packed, replacing
from spread_jax._network import why_unreachable
from spread_jax._random import check_one_key

__all__ = [
    "FeatureNetwork",
    "FeaturesError",
    "InceptionFeatures",
    "inception_features",
    "packaged_features",
    "train_features",
]

_BATCH = 128
_PROJECTION = 64
_TEMPERATURE = 0.2


class FeaturesError(RuntimeError):
    """Features cannot be had; the message says why and what to do."""


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureNetwork:
    """Features by a small convolutional network, made by `train_features` or `load`.

    Four 3x3 stride-2 convolutions of width, 2 width, 4 width and 8 width channels; the features are the means over
    pixels of the last two, centred and divided by one number, so that their variance over the images of the training
    is 1 on average.

    Args:
      params: named float32 arrays.
      config: what the network is and was trained on, as JSON can hold it.

    Example:
      >>> import jax, numpy as np
      >>> images = np.random.default_rng(0).integers(0, 256, (32, 16, 16, 1), np.uint8)
      >>> network = train_features(images, key=jax.random.key(0), num_steps=2, batch_size=8, width=4)
      >>> network(images).shape
      (32, 48)
    """

    params: Mapping[str, np.ndarray]
    config: Mapping[str, Any]

    @property
    def fingerprint(self) -> str:
        """Hexadecimal digest of the parameters and the config."""
        sha = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for name in sorted(self.params):
            array = np.ascontiguousarray(self.params[name])
            sha.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
            sha.update(array.tobytes())
        return sha.hexdigest()[:16]

    @property
    def name(self) -> str:
        """For people."""
        return f"a network trained on {self.config['data']}"

    @property
    def dimension(self) -> int:
        """d, features of an image."""
        return 12 * self.config["width"]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of the images it takes."""
        return tuple(self.config["image_shape"])

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Features [n, 12 width] of images [n, *image_shape], float32."""
        images = _check_images(images, self.image_shape)
        features = []
        for start in range(0, len(images), _BATCH):
            batch = np.asarray(images[start : start + _BATCH])
            missing = _BATCH - len(batch)  # one shape, one compilation
            padded = np.concatenate([batch, np.repeat(batch[-1:], missing, axis=0)])
            features.append(np.asarray(_standardised(dict(self.params), _to_unit(padded)))[: len(batch)])
        return np.concatenate(features)

    def save(self, path: str | os.PathLike) -> None:
        """Writes arrays, config and fingerprint as .npz, without pickle, atomically."""
        with replacing(path) as file:
            np.savez(file, **{f"param:{k}": v for k, v in self.params.items()},
                     config=np.array(json.dumps(self.config)), fingerprint=np.array(self.fingerprint))  # fmt: skip

    @classmethod
    def load(cls, path: str | os.PathLike) -> FeatureNetwork:
        """Reads what `save` wrote.

        Raises:
          FeaturesError: the file is missing, is something else, or is damaged: its fingerprint does not fit.
        """
        make = "Make one with `spread-jax features`."
        try:
            with open(path, "rb") as file:
                refuse_packed(file)
                arrays = dict(np.load(file, allow_pickle=False))
            params = {n.removeprefix("param:"): array for n, array in arrays.items() if n.startswith("param:")}
            network = cls(params, json.loads(str(arrays["config"])))
            _check_network(network)
            saved = str(arrays["fingerprint"])
        except FileNotFoundError:
            raise FeaturesError(f"There is no file of features at {path}. {make}") from None
        except (OSError, RecursionError, *UNREADABLE_ARRAYS) as error:
            raise FeaturesError(f"{path} is not a file of features, or is damaged ({error}). {make}") from None
        if network.fingerprint != saved:
            raise FeaturesError(f"{path} is damaged: it does not have the fingerprint {saved} that it names. {make}")
        return network


def packaged_features() -> FeatureNetwork:
    """Features of the 64x64 synthetic faces, which come with the package.

    The distances in the documentation are taken in them. Trained again on another kind of processor they would be
    rounded differently and have another fingerprint, and distances compare only where the fingerprint is the same.

    Example:
      >>> packaged_features().fingerprint
      'b55a900ae7748bb8'
    """
    return FeatureNetwork.load(Path(__file__).parent / "trained" / "faces.npz")


def _check_network(network: FeatureNetwork) -> None:
    """Raises ValueError, KeyError or TypeError where the config or the arrays are not those of a network."""
    config, params = network.config, network.params
    shape, width = config["image_shape"], config["width"]
    if not isinstance(config["data"], str) or type(width) is not int or len(shape) != 3:
        raise ValueError("its config is of another kind")
    if not all(type(size) is int and size > 0 for size in (*shape, width)):
        raise ValueError("its config is of another kind")
    names = {"mean", "scale", *(f"conv{i}{part}" for i in range(4) for part in ("", "_bias"))}
    if set(params) != names or not all(array.dtype == np.float32 for array in params.values()):
        raise ValueError("its arrays are of another kind")


def train_features(
    images: np.ndarray,
    labels: np.ndarray | None = None,
    *,
    key: jax.Array,
    num_steps: int = 600,
    batch_size: int = 64,
    width: int = 16,
    learning_rate: float = 2e-3,
    data: str = "images",
    data_fingerprint: str = "",
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> FeatureNetwork:
    r"""Trains a small network on three tasks that need no labels, or two and the labels.

    The loss is a sum of cross-entropies: which of four quarter turns was applied; which of the batch's images a
    second random crop, with other brightness and contrast, belongs to; and the label, where there are labels.

    Args:
      images: uint8 [n, side, side, channels], an array or a memory map.
      labels: integers [n] from 0, or None.
      key: a JAX random key; the same key and data give the same network on the same machine.
      num_steps: Adam steps, on a cosine schedule.
      batch_size: images in a step; each is seen three times.
      width: channels of the first convolution; features are 12 times as many.
      learning_rate: at the start.
      data: the data set's name, for people.
      data_fingerprint: of the data set, kept in the config.
      on_step: called with the step and its metrics, every 50 steps.

    Returns:
      A FeatureNetwork. Its config records settings, data and the training accuracy of each task in the last steps.

    Raises:
      FeaturesError: Optax is not installed.
      ValueError: images or labels of another kind.

    Source: rotations Gidaris et al., ICLR 2018; the contrast of two views Chen et al., SimCLR, ICML 2020,
    equation 1; features of a network trained on the data in place of Inception's, as for digits in Binkowski et
    al., ICLR 2018.

    Example: see FeatureNetwork.
    """
    try:
        import optax
    except ImportError:
        raise FeaturesError('Training features needs Optax: pip install "spread-jax[eval]".') from None

    num_steps, batch_size = check_count("num_steps", num_steps), check_count("batch_size", batch_size)
    width = check_count("width", width)
    shape = np.shape(images)
    if len(shape) != 4 or shape[1] != shape[2] or images.dtype != np.uint8 or shape[0] < 2:
        raise ValueError(
            f"images must be at least two square ones, uint8 [n, side, side, channels], got {images.dtype} {shape}."
        )
    if labels is not None and (np.shape(labels) != shape[:1] or not np.issubdtype(labels.dtype, np.integer)):
        raise ValueError(f"labels must be integers [{shape[0]}], got {labels.dtype} {np.shape(labels)}.")
    batch_size = min(batch_size, shape[0])
    num_labels = 0 if labels is None else int(labels.max()) + 1
    order_key, step_key = jax.random.split(check_one_key(key))
    chance = np.random.default_rng(np.asarray(jax.random.key_data(order_key)).ravel())
    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, num_steps, alpha=0.02))
    params = _initial_params(chance, shape[3], width, num_labels)
    opt_state = optimizer.init(params)

    @jax.jit
    def step(params, opt_state, batch, targets, key):
        objective = lambda p: _training_loss(p, _to_unit(batch), targets, key, flip=num_labels == 0)
        (_, metrics), gradient = jax.value_and_grad(objective, has_aux=True)(params)
        updates, opt_state = optimizer.update(gradient, opt_state)
        return optax.apply_updates(params, updates), opt_state, metrics

    recent: list[dict] = []
    for index in range(num_steps):
        rows = np.sort(chance.choice(shape[0], batch_size, replace=False))
        targets = np.zeros(batch_size, np.int32) if labels is None else np.asarray(labels[rows], np.int32)
        params, opt_state, metrics = step(
            params, opt_state, np.asarray(images[rows]), targets, jax.random.fold_in(step_key, index)
        )
        recent = [*recent[-49:], metrics]
        if on_step is not None and ((index + 1) % 50 == 0 or index + 1 == num_steps):
            on_step(index + 1, {name: float(value) for name, value in metrics.items()})

    kept = {name: np.asarray(value) for name, value in params.items() if name.startswith("conv")}
    some = np.sort(chance.choice(shape[0], min(shape[0], 4096), replace=False))
    kept |= {"mean": np.float32(0), "scale": np.float32(1)}
    raw = FeatureNetwork(kept, {"image_shape": shape[1:]})(np.asarray(images[some])).astype(np.float64)
    # One scale for all: one for each would blow up features that hardly vary, and whatever is unlike the data there.
    kept["mean"] = raw.mean(axis=0).astype(np.float32)
    kept["scale"] = np.float32(max(math.sqrt(raw.var(axis=0).mean()), 1e-6))
    averages = {name: float(np.mean([float(m[name]) for m in recent])) for name in recent[0]}
    config = {
        "data": data,
        "data_fingerprint": data_fingerprint,
        "image_shape": list(shape[1:]),
        "train_images": shape[0],
        "num_labels": num_labels,
        "width": width,
        "num_steps": num_steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "last_steps": averages,
    }
    return FeatureNetwork(kept, config)


@dataclasses.dataclass(frozen=True, eq=False)
class InceptionFeatures:
    """Inception-v3 features of dimension 2048, those of the literature's FID; made by `inception_features`.

    Args:
      network: torch-fidelity's extractor, uint8 [n, 3, height, width] -> (features [n, 2048],).
      fingerprint: hexadecimal digest of the weights file.
      batch_size: images in a call of the network.
    """

    network: Callable[[Any], tuple]
    fingerprint: str
    batch_size: int = 64
    name: str = "Inception-v3, 2015-12-05, by torch-fidelity"

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Features [n, 2048] of images [n, height, width, 1 or 3]; grey ones are repeated to three channels."""
        import torch

        images = _check_images(images, None)
        features = []
        for start in range(0, len(images), self.batch_size):
            batch = np.asarray(images[start : start + self.batch_size])
            if batch.dtype != np.uint8:
                batch = np.round(np.clip(batch, 0, 1) * 255).astype(np.uint8)
            batch = np.broadcast_to(batch, (*batch.shape[:3], 3)).transpose(0, 3, 1, 2)
            with torch.no_grad():
                features.append(self.network(torch.from_numpy(np.ascontiguousarray(batch)))[0].numpy())
        return np.concatenate(features)


_INCEPTION_HOST = "github.com"
_INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
_INCEPTION_DIGEST = "6726825d"  # the first digits of the file's SHA-256, as its name has them


def inception_features(weights: str | os.PathLike | None = None, *, batch_size: int = 64) -> InceptionFeatures:
    """The features of the literature's Fréchet Inception distance, through torch-fidelity.

    Distances from other ports of Inception differ by whole points: only these weights, with their own resizing of
    images to 299x299, give numbers that stand beside published ones.

    Args:
      weights: the path of torch-fidelity's `weights-inception-2015-12-05-6726825d.pth`; None to take it from
        torch's cache or download it (91 MB) into it.
      batch_size: images in a call of the network.

    Returns:
      A callable from images [n, height, width, 1 or 3] to features [n, 2048], with `name` and `fingerprint`.

    Raises:
      FeaturesError: torch-fidelity is not installed, the weights are missing and cannot be downloaded (said within
        two seconds where there is no network), or they are another file.

    Source: Heusel et al., NeurIPS 2017; Obukhov et al., torch-fidelity, 2020.
    """
    batch_size = check_count("batch_size", batch_size)
    if importlib.util.find_spec("torch_fidelity") is None:
        raise FeaturesError('Inception features need torch-fidelity: pip install "spread-jax[fid]".')
    import torch
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = Path(weights) if weights is not None else Path(torch.hub.get_dir()) / "checkpoints" / _INCEPTION_FILE
    if not path.is_file():
        by_hand = f"put {_INCEPTION_FILE} of torch-fidelity's releases at {path}, or pass the path of a copy"
        if weights is not None:
            raise FeaturesError(f"There is no file of Inception weights at {path}: {by_hand}.")
        if why := why_unreachable(_INCEPTION_HOST):
            raise FeaturesError(
                f"The Inception weights are missing here, and {_INCEPTION_HOST} cannot be reached ({why}): {by_hand}."
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(
                f"https://{_INCEPTION_HOST}/toshas/torch-fidelity/releases/download/v0.2.0/{_INCEPTION_FILE}",
                str(path),
                hash_prefix=_INCEPTION_DIGEST,
                progress=sys.stderr is not None and sys.stderr.isatty(),
            )
        except (OSError, RuntimeError) as error:
            raise FeaturesError(f"The Inception weights could not be downloaded ({error}): {by_hand}.") from None
    # Before they are unpickled: a pickle runs code.
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not digest.startswith(_INCEPTION_DIGEST):
        raise FeaturesError(
            f"{path} is not {_INCEPTION_FILE}: its SHA-256 begins with {digest[:8]}, not {_INCEPTION_DIGEST}, so its "
            "distances would not compare with published ones; delete it, and it is downloaded again."
        )
    network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path))
    return InceptionFeatures(network, digest[:16], batch_size)


def _check_images(images, image_shape: tuple[int, ...] | None) -> np.ndarray:
    shape, dtype = np.shape(images), getattr(images, "dtype", None)
    wanted = image_shape or ("height", "width", "1 or 3")
    fits = len(shape) == 4 and shape[0] > 0 and (shape[1:] == image_shape if image_shape else shape[3] in (1, 3))
    if not fits or not (dtype == np.uint8 or np.issubdtype(dtype, np.floating)):
        raise ValueError(
            f"images must be [n, {', '.join(map(str, wanted))}] with n > 0, uint8 or floating point in [0, 1], "
            f"got {dtype} {shape}."
        )
    return images


def _to_unit(images):
    return images.astype(jnp.float32) / 255.0 if images.dtype == np.uint8 else images.astype(jnp.float32)


# --- the network: plain functions of a dictionary of arrays, so that this folder needs no network library


def _initial_params(chance: np.random.Generator, channels: int, width: int, num_labels: int) -> dict[str, np.ndarray]:
    """Drawn on the host: a shape each would cost JAX a compilation each."""
    normal = lambda *shape: chance.standard_normal(shape, np.float32)
    params = {}
    sizes = [channels, width, 2 * width, 4 * width, 8 * width]
    for i, (before, after) in enumerate(itertools.pairwise(sizes)):
        params[f"conv{i}"] = normal(3, 3, before, after) * np.float32(math.sqrt(2 / (9 * before)))
        params[f"conv{i}_bias"] = np.zeros(after, np.float32)
    heads = {"rotation": 4, "view": _PROJECTION} | ({"label": num_labels} if num_labels else {})
    for name, outputs in heads.items():
        params[name] = normal(12 * width, outputs) / np.float32(math.sqrt(12 * width))
    return params


def _features(params: Mapping[str, Any], x: jax.Array) -> jax.Array:
    levels = []
    h = 2 * x - 1
    for i in range(4):
        h = jax.lax.conv_general_dilated(
            h, jnp.asarray(params[f"conv{i}"]), (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        h = jax.nn.leaky_relu(h + params[f"conv{i}_bias"], 0.1)
        levels.append(h.mean(axis=(1, 2)))
    return jnp.concatenate(levels[2:], axis=1)


@jax.jit
def _standardised(params, x):
    return (_features(params, x) - params["mean"]) / params["scale"]


def _training_loss(params, x, labels, key, *, flip):
    count = x.shape[0]
    # One draw for everything: each call to the generator costs a second of compilation on a CPU.
    draws = jax.random.uniform(key, (11, count))
    turns = (4 * draws[0]).astype(jnp.int32)
    quarter = jnp.stack([jnp.rot90(x, r, axes=(1, 2)) for r in range(4)])
    turned = quarter[turns, jnp.arange(count)]
    views = [jax.vmap(_view, (0, 1, None))(x, d, flip) for d in (draws[1:6], draws[6:11])]
    plain = [x] if "label" in params else []
    features = _features(params, jnp.concatenate([turned, *views, *plain]))
    rotated, first, second, *plain = jnp.split(features, 3 + len(plain))

    unit = lambda f: f / (jnp.linalg.norm(f, axis=1, keepdims=True) + 1e-6)
    similarity = unit(first @ params["view"]) @ unit(second @ params["view"]).T / _TEMPERATURE
    own = jnp.arange(count)
    tasks = {"rotation": (rotated @ params["rotation"], turns), "view": (similarity, own)}
    if "label" in params:
        tasks["label"] = (plain[0] @ params["label"], labels)
    total, metrics = 0.0, {}
    for name, (logits, target) in tasks.items():
        loss = -jnp.take_along_axis(jax.nn.log_softmax(logits), target[:, None], axis=1).mean()
        if name == "view":  # both ways round
            loss = 0.5 * (loss - jnp.diagonal(jax.nn.log_softmax(similarity, axis=0)).mean())
        total = total + loss
        metrics[f"{name}_loss"] = loss
        metrics[f"{name}_accuracy"] = (logits.argmax(axis=1) == target).mean()
    return total, metrics


def _view(image: jax.Array, draws: jax.Array, flip: bool) -> jax.Array:
    """A crop of 60 to 100 % of the side, enlarged again, with other brightness and contrast; draws are uniform [5]."""
    side = image.shape[0]
    zoom = 1 / (0.6 + 0.4 * draws[0])
    offset = -draws[1:3] * side * (zoom - 1)
    scale = jnp.full(2, zoom)
    if flip:
        image = jnp.where(draws[4] < 0.5, image[:, ::-1], image)
    cropped = jax.image.scale_and_translate(image, image.shape, (0, 1), scale, offset, "linear", antialias=False)
    return (
        (0.8 + 0.4 * draws[3]) * cropped - 0.2 + 0.4 * (2 * draws[4] % 1)
    )  # twice a half of [0, 1): uniform, whatever the mirror
