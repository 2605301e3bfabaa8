"""The seal of a checkpoint: what every file of it must be, to the last bit."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spread_jax._files import (
    flush_folder,
    is_lasting,
    odd_entry,
    open_regular,
    read_regular,
    reason,
    write_atomically,
)
from spread_jax.runtime import numerics
from spread_jax.training._leaves import CheckpointError, LeafSpec

SEAL = "SEAL.json"
FORMAT = 1
_HASH = "sha256"  # twice as fast as blake2b where the processor has SHA instructions


class Unsound(Exception):
    """A step does not match its seal; the message says which file and how."""


@dataclasses.dataclass(frozen=True)
class Seal:
    """What is known of a sealed step."""

    step: int
    metrics: dict[str, float]
    leaves: dict[str, LeafSpec]
    files: dict[str, tuple[int, str]]  # relative path -> bytes, digest
    run: str | None = None
    made_with: Mapping[str, str] = dataclasses.field(default_factory=dict)  # as `numerics` names it

    def to_text(self) -> str:
        content = {
            "format": FORMAT,
            "step": self.step,
            "run": self.run,
            "saved": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "made_with": dict(self.made_with),
            "metrics": {k: v if math.isfinite(v) else str(v) for k, v in self.metrics.items()},
            "hash": _HASH,
            "files": {k: {"bytes": n, _HASH: digest} for k, (n, digest) in self.files.items()},
            "leaves": {name: leaf.to_json() for name, leaf in self.leaves.items()},
        }
        return seal_text({"content": content, "digest": digest_of(content)})

    @classmethod
    def from_text(cls, text: str, folder: Path) -> Seal:
        try:
            outer = json.loads(text)
            content = outer["content"]
            if outer["digest"] != digest_of(content) or text != seal_text(outer):
                raise Unsound(f"{SEAL}: it does not match its own digest")
            if content["format"] > FORMAT:
                raise CheckpointError(
                    f"{folder} has checkpoint format {content['format']}; this version of "
                    f"spread_jax reads up to {FORMAT}: upgrade spread_jax."
                )
            return cls(
                step=content["step"],
                metrics={k: float(v) for k, v in content["metrics"].items()},
                leaves={k: LeafSpec.from_json(v) for k, v in content["leaves"].items()},
                files={k: (v["bytes"], v[_HASH]) for k, v in content["files"].items()},
                run=content.get("run"),
                made_with={str(k): str(v) for k, v in content.get("made_with", {}).items()},
            )
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise Unsound(f"{SEAL}: it cannot be read ({error})") from error


def seal_text(outer: dict[str, Any]) -> str:
    """What a seal's file holds."""
    return json.dumps(outer, indent=1) + "\n"


def digest_of(content: Any) -> str:
    """The digest of a seal's content."""
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.new(_HASH, canonical.encode()).hexdigest()


def _hash_file(path: Path, *, flush: bool = False) -> tuple[int, str]:
    with open_regular(path) as file:
        if flush:
            os.fsync(file.fileno())
        digest = hashlib.file_digest(file, _HASH)
        return file.tell(), digest.hexdigest()


def files_of(folder: Path) -> list[str]:
    """Relative paths of the files of a step, but for its seal."""
    found = [
        Path(parent, name).relative_to(folder).as_posix() for parent, _, names in os.walk(folder) for name in names
    ]
    return sorted(name for name in found if name != SEAL)


def write_seal(folder: Path, step: int, metrics: dict[str, float], leaves: dict, run: str | None = None) -> None:
    """Hashes every file of a step, flushes them to the disk, and seals them."""
    files = {name: _hash_file(folder / name, flush=True) for name in files_of(folder)}
    for parent, _, _ in os.walk(folder):
        flush_folder(Path(parent))
    write_atomically(folder / SEAL, Seal(step, metrics, leaves, files, run, numerics()).to_text())


def read_seal(folder: Path) -> Seal:
    """The seal of a step, which is not verified.

    Raises:
      Unsound: it is missing or damaged.
      CheckpointError: it cannot be read at this moment.
    """
    if folder.is_symlink():
        raise Unsound(".: it is a link")
    try:
        seal = Seal.from_text(read_regular(folder / SEAL).decode(), folder)
    except FileNotFoundError as error:
        raise Unsound(f"{SEAL}: it is missing") from error
    except UnicodeDecodeError as error:
        raise Unsound(f"{SEAL}: it cannot be read ({error})") from error
    except OSError as error:
        raise _unreadable(folder, SEAL, error) from error
    if str(seal.step) != folder.name:
        raise Unsound(f"{SEAL}: it belongs to step {seal.step}")
    return seal


def verify(folder: Path) -> Seal:
    """The seal of a step, every file of which matches it.

    Raises:
      Unsound: one does not.
      CheckpointError: it cannot be read at this moment.
    """
    name = "."
    try:
        # A link leads out of what is sealed, a pipe is waited for: a step has folders and files only.
        if (odd := odd_entry(folder)) is not None:
            raise Unsound(f"{odd.relative_to(folder).as_posix()}: it is neither a file nor a folder")
        seal = read_seal(folder)
        present = files_of(folder)
        for name in seal.files:
            if name not in present:
                raise Unsound(f"{name}: it is missing")
        for name in present:
            if name not in seal.files:
                raise Unsound(f"{name}: it is not listed in the seal")
        for name, (size, digest) in seal.files.items():
            found_size = os.path.getsize(folder / name)
            if found_size != size:
                raise Unsound(f"{name}: it has {found_size} bytes and was sealed with {size}")
            if _hash_file(folder / name)[1] != digest:
                raise Unsound(f"{name}: its contents changed since it was sealed")
    except OSError as error:
        raise _unreadable(folder, name, error) from error
    return seal


def _unreadable(folder: Path, name: str, error: OSError) -> Exception:
    if is_lasting(error):
        return Unsound(f"{name}: it cannot be read ({error})")
    return CheckpointError(
        f"{folder / name} cannot be read: {reason(error)} Nothing was changed. Repeat the command once it can be read, "
        f"or move {folder} away to continue from the step before."
    )
