"""A run's configuration as JSON: what makes it another run, and what may change."""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import json
import math
import os
from collections.abc import Collection, Mapping
from typing import Any


class RunDirectoryError(RuntimeError):
    """A run's folder cannot be used; the message says why and what to do."""


def plain(value: Any, where: str) -> Any:
    """The value as JSON can hold it; tuples become lists, paths and enums become strings."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):  # an array or a number of NumPy or JAX
        return plain(value.tolist(), where)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise RunDirectoryError(
        f"{where} is a {type(value).__name__}, which JSON cannot hold: use numbers, strings, lists and mappings."
    )


def without(config: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    """The configuration less some keys and all below them; nested keys are dotted."""
    kept = {}
    for key, value in config.items():
        if key in keys:
            continue
        below = {name.removeprefix(f"{key}.") for name in keys if name.startswith(f"{key}.")}
        kept[key] = without(value, below) if below and isinstance(value, Mapping) else value
    return kept


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _is_resumable(key: str, resumable_keys: Collection[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in resumable_keys)


def _canonical(value: Any) -> Any:
    """1 and 1.0 are the same setting."""
    if isinstance(value, list):
        return [_canonical(item) for item in value]
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if is_whole and abs(value) <= 2**53 else value


def identity_of(config: Mapping[str, Any], resumable_keys: Collection[str]) -> str:
    fixed = {key: _canonical(v) for key, v in _flatten(config).items() if not _is_resumable(key, resumable_keys)}
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()[:16]


def differences(saved: Mapping, now: Mapping, resumable_keys: Collection[str]) -> list[str]:
    """One line per key whose change makes this another run."""
    old, new = _flatten(saved), _flatten(now)
    lines = []
    for key in sorted(old.keys() | new.keys()):
        was = f"saved {json.dumps(old[key])}" if key in old else "not saved"
        is_now = f"now {json.dumps(new[key])}" if key in new else "now absent"
        if not _is_resumable(key, resumable_keys) and (key in old, old.get(key)) != (key in new, new.get(key)):
            lines.append(f"{key}: {was}, {is_now}")
    return lines
