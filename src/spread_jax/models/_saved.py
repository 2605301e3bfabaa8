"""Methods and settings as JSON in a run's folder, and back: what is read may come from anywhere."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any

from spread_jax.models.method import Method
from spread_jax.models.noises import NOISES
from spread_jax.noise import NoiseModel

T = typing.TypeVar("T")


def to_json(value: Any) -> dict[str, Any]:
    """A method, a noise or settings as plain values; networks of the caller's as what they print."""
    found: dict[str, Any] = {"name": value.name} if hasattr(type(value), "name") else {}
    for field in dataclasses.fields(value):
        of_field = getattr(value, field.name)
        if field.name == "networks":
            of_field = {part: " ".join(repr(module).split()) for part, module in of_field.items()}
        elif dataclasses.is_dataclass(of_field):
            of_field = to_json(of_field)
        elif isinstance(of_field, tuple):
            of_field = list(of_field)
        found[field.name] = of_field
    return found


def from_json(kind: type[T], saved: Any, **given: Any) -> T:
    """The value of a class that was saved as JSON.

    Args:
      kind: the class.
      saved: what was read.
      given: fields that are not read.

    Raises:
      KeyError: a setting is missing.
      ValueError: a setting is of another type than its field.
    """
    if not isinstance(saved, Mapping):
        raise ValueError(f"its settings are {json.dumps(saved)[:60]}")
    hints = typing.get_type_hints(kind, include_extras=False)
    values = dict(given)
    for field in dataclasses.fields(kind):
        if field.name in given:
            continue
        value, hint = saved[field.name], hints[field.name]
        if isinstance(hint, type) and issubclass(hint, NoiseModel):
            values[field.name] = noise_from_json(value)
            continue
        if not _is_a(hint, value):
            raise ValueError(f"{field.name} is {json.dumps(value)[:60]}")
        values[field.name] = tuple(value) if isinstance(value, list) else value
    return kind(**values)


def noise_from_json(saved: Any) -> NoiseModel:
    """The noise that was saved as JSON, if it is one of `NOISES`."""
    name = saved.get("name") if isinstance(saved, Mapping) else None
    if not isinstance(name, str) or name not in NOISES:
        raise ValueError(f"noise is {json.dumps(saved)[:60]}")
    return from_json(type(NOISES[name]), saved)


def method_from_json(saved: Any, methods: Mapping[str, type[Method]], networks: Mapping[str, Any]) -> Method:
    """The method that was saved as JSON, with the caller's networks in the places they had."""
    name = saved.get("name") if isinstance(saved, Mapping) else None
    if not isinstance(name, str) or name not in methods:
        raise ValueError(f"its method is {json.dumps(name)[:60]}, and there are {', '.join(methods)}")
    method = from_json(methods[name], saved, networks=networks)
    had = saved["networks"]
    if not isinstance(had, Mapping) or set(had) != set(networks):
        parts = ", ".join(sorted(map(str, had))) if isinstance(had, Mapping) and had else "none"
        raise ValueError(f"it was trained with own networks for: {parts}; pass these as networks")
    return method


def _is_a(hint: Any, value: Any) -> bool:
    kind, parts = typing.get_origin(hint), typing.get_args(hint)
    if kind is Annotated:
        return _is_a(parts[0], value)
    if kind is typing.Literal:
        return any(value == part and type(value) is type(part) for part in parts)
    if kind in (typing.Union, types.UnionType):
        return any(_is_a(part, value) for part in parts)
    if kind is tuple:
        of_items = parts[:1] * len(value) if isinstance(value, list) and parts[1:] == (...,) else parts
        return isinstance(value, list) and len(value) == len(of_items) and all(map(_is_a, of_items, value))
    if hint is int:
        return type(value) is int and abs(value) < 2**63
    if hint is float:
        return type(value) in (int, float) and abs(value) < 1e300
    return type(value) is hint
