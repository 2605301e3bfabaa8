"""Checkpoints that are either bit-exact or refused.

Orbax writes and reads the arrays. This module adds the seal: once a step is on the disk, every one
of its files is hashed into a manifest, and a step is restored only while all of them still match.
A step goes through these names in the checkpoint folder, each reached by one atomic rename:

    40.unsealed    being written, or left by a crash: ignored, removed at the next save
    40             sealed: complete, hashed and flushed to the disk
    40.deleting    no longer kept, being removed
    40.unsound     no longer matches its seal: set aside by ``restore``, never deleted

so a process that is killed at any moment leaves the last sealed step as it was. Nothing is
pickled or unpickled: a step holds JSON and arrays of numbers, and none of its files runs code. The
seal shows damage; it is no signature, and whoever can write to the folder can write a seal.

Several processes may share one checkpoint folder (on a shared file system): all of them call
``save``, ``wait`` and ``restore`` in the same order, each writes its own shards, and process 0
alone seals, deletes and decides which step is restored.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
import hashlib
import json
import logging
import math
import os
import re
import shutil
import stat
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from spread_jax._files import flush_folder, reason, write_atomically
from spread_jax._progress import tell
from spread_jax.training._processes import agree

PyTree = Any

_SEAL = "SEAL.json"
_FORMAT = 1
_HASH = "sha256"  # twice as fast as blake2b where the processor has SHA instructions
_LEFTOVER = re.compile(r"\d+\.(unsealed|deleting)")
_SET_ASIDE = re.compile(r"\d+\.unsound")
_LISTED = 8  # names of leaves printed in one message


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or none of those present can be trusted."""


class Restored(NamedTuple):
    """What ``Checkpointer.restore`` found.

    Attributes:
      step: the step that was restored.
      state: the restored tree, shaped like the abstract state.
      metrics: the metrics given when the step was saved.
    """

    step: int
    state: PyTree
    metrics: dict[str, float]


class _Unsound(Exception):
    """A step does not match its seal; the message says which file and how."""


# --- the state as named leaves ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _LeafSpec:
    """What the seal records of one leaf; it decides whether a model fits a checkpoint."""

    kind: str  # "array", "key" (typed random key) or "number" (of Python or NumPy, no array)
    dtype: str
    shape: tuple[int, ...]
    impl: str | None = None  # of a random key
    stored_shape: tuple[int, ...] | None = None  # of a random key: its words are a last axis

    def to_json(self) -> dict[str, Any]:
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> _LeafSpec:
        stored = fields.get("stored_shape")
        spec = cls(
            kind=fields["kind"],
            dtype=fields["dtype"],
            shape=tuple(fields["shape"]),
            impl=fields.get("impl"),
            stored_shape=None if stored is None else tuple(stored),
        )
        # Of another writer than this module: whatever follows may rely on these.
        texts = (spec.kind, spec.dtype, spec.impl if spec.kind == "key" else "")
        sizes = (*spec.shape, *(spec.stored_shape or ()))
        if spec.kind not in ("array", "key", "number") or not all(isinstance(text, str) for text in texts):
            raise ValueError("a leaf is of no known kind")
        if not all(type(size) is int and size >= 0 for size in sizes):
            raise ValueError("a leaf has an impossible shape")
        return spec

    @property
    def array_shape(self) -> tuple[int, ...]:
        return self.shape if self.stored_shape is None else self.stored_shape

    def accepts(self, wanted: _LeafSpec) -> bool:
        if (self.kind, self.dtype, self.shape) == (wanted.kind, wanted.dtype, wanted.shape):
            return True
        # A number traced by jax.eval_shape becomes an array without axes, and the reverse.
        return (
            {self.kind, wanted.kind} == {"number", "array"}
            and self.shape == wanted.shape == ()
            and np.dtype(self.dtype).kind == np.dtype(wanted.dtype).kind
        )

    def __str__(self) -> str:
        kind = {"array": "", "key": "", "number": "number "}[self.kind]
        return f"{kind}{self.dtype}{list(self.shape)}"


def _is_key(leaf: Any) -> bool:
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)


def _is_number(leaf: Any) -> bool:
    return isinstance(leaf, bool | int | float | complex | np.generic)


def _spec(name: str, leaf: Any) -> _LeafSpec:
    if _is_number(leaf):
        return _LeafSpec("number", np.asarray(leaf).dtype.name, ())
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        raise CheckpointError(
            f"leaf {name!r} of the state is a {type(leaf).__name__}; a checkpoint holds arrays, "
            "random keys and numbers: remove the leaf or make it static in its pytree."
        )
    shape = tuple(leaf.shape)
    if _is_key(leaf):
        return _LeafSpec("key", str(leaf.dtype), shape)
    dtype = np.dtype(leaf.dtype)
    if dtype.kind in "OSUMm":
        raise CheckpointError(f"leaf {name!r} of the state has dtype {dtype}; a checkpoint holds numbers only.")
    return _LeafSpec("array", dtype.name, shape)


def _named_leaves(state: PyTree) -> tuple[dict[str, Any], Any]:
    """Names every leaf by its path, ``params/Dense_0/kernel``; two leaves never share a name."""
    paths, treedef = jax.tree_util.tree_flatten_with_path(state)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") or "." for path, _ in paths]
    if len(set(names)) < len(names):  # e.g. {"a/b": x, "a": {"b": y}}
        names = [jax.tree_util.keystr(path) for path, _ in paths]
    return dict(zip(names, (leaf for _, leaf in paths), strict=True)), treedef


def _to_arrays(leaves: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, _LeafSpec]]:
    """The arrays Orbax writes, and the description of every leaf."""
    arrays, specs = {}, {}
    for name, leaf in leaves.items():
        spec = _spec(name, leaf)
        if spec.kind == "key":
            if not isinstance(leaf, jax.Array):
                raise CheckpointError(f"leaf {name!r} of the state is an abstract random key.")
            impl = str(jax.random.key_impl(leaf))
            leaf = jax.random.key_data(leaf)
            spec = dataclasses.replace(spec, impl=impl, stored_shape=tuple(leaf.shape))
        elif isinstance(leaf, jax.ShapeDtypeStruct):
            raise CheckpointError(f"leaf {name!r} of the state is abstract: it holds no values.")
        elif not isinstance(leaf, jax.Array):
            leaf = np.asarray(leaf)
        specs[name] = spec
        if math.prod(spec.array_shape):  # there is nothing to store of an array without elements
            arrays[name] = leaf
    return arrays, specs


def _placement(leaf: Any) -> jax.sharding.Sharding | None:
    """Where a restored leaf must live, or None for the default device, uncommitted."""
    if isinstance(leaf, jax.Array):
        return leaf.sharding if leaf.committed else None
    sharding = getattr(leaf, "sharding", None)
    # A mesh without devices, as eval_shape reports it under jax.set_mesh, places nothing.
    mesh = getattr(sharding, "mesh", None)
    return None if isinstance(mesh, jax.sharding.AbstractMesh) else sharding


def _check_fit(saved: Mapping[str, _LeafSpec], wanted: Mapping[str, _LeafSpec], where: str) -> None:
    differences = []
    for name in [*wanted, *(n for n in saved if n not in wanted)]:
        if name not in saved:
            differences.append(f"{name}: not in the checkpoint, {wanted[name]} in the model")
        elif name not in wanted:
            differences.append(f"{name}: {saved[name]} in the checkpoint, not in the model")
        elif not saved[name].accepts(wanted[name]):
            differences.append(f"{name}: {saved[name]} in the checkpoint, {wanted[name]} in the model")
    if differences:
        shown = "\n  ".join(differences[:_LISTED])
        rest = len(differences) - _LISTED
        more = f"\n  and {rest} more" if rest > 0 else ""
        raise CheckpointError(
            f"{where} holds another model; {len(differences)} leaves differ:\n  {shown}{more}\n"
            "Restore with the configuration it was saved with, or use another folder."
        )


def _holds(value: Any, spec: _LeafSpec) -> bool:
    """Whether a stored array is what the seal says; it is, unless another program wrote the seal."""
    dtype = np.dtype(np.uint32) if spec.kind == "key" else np.dtype(spec.dtype)
    return tuple(np.shape(value)) == spec.array_shape and np.dtype(value.dtype) == dtype


def _to_leaf(name: str, value: Any, saved: _LeafSpec, wanted: Any) -> Any:
    """Turns the stored array into a leaf of the type, dtype and placement of ``wanted``."""
    placement = _placement(wanted)
    if saved.kind == "key":
        if placement is None:
            value = jnp.array(value)
        try:
            key = jax.random.wrap_key_data(value, impl=saved.impl)
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"the random key {name!r} cannot be restored: {reason(error)}") from error
        if key.dtype != wanted.dtype:
            raise CheckpointError(f"the random key {name!r} is a {key.dtype} where its seal says {saved.dtype}.")
        return key if placement is None else jax.device_put(key, placement)
    if _is_number(wanted):
        return type(wanted)(np.asarray(value).item())
    if saved.kind == "number":
        number = np.asarray(value)
        value = number.astype(wanted.dtype)
        if number.dtype.kind in "iu" and value != number:
            raise CheckpointError(f"leaf {name!r} was saved as the number {number}, which {wanted.dtype} cannot hold.")
    if isinstance(wanted, np.ndarray):
        return np.array(value)
    if isinstance(value, jax.Array):  # Orbax has placed it
        return value
    value = jnp.array(value, dtype=wanted.dtype)  # a copy: never an alias of the reader's buffer
    return value if placement is None else jax.device_put(value, placement)


# --- the seal -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Seal:
    step: int
    metrics: dict[str, float]
    leaves: dict[str, _LeafSpec]
    files: dict[str, tuple[int, str]]  # relative path -> bytes, digest
    run: str | None = None

    def to_text(self) -> str:
        content = {
            "format": _FORMAT,
            "step": self.step,
            "run": self.run,
            "saved": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "metrics": {k: v if math.isfinite(v) else str(v) for k, v in self.metrics.items()},
            "hash": _HASH,
            "files": {k: {"bytes": n, _HASH: digest} for k, (n, digest) in self.files.items()},
            "leaves": {name: leaf.to_json() for name, leaf in self.leaves.items()},
        }
        return _seal_text({"content": content, "digest": _digest(content)})

    @classmethod
    def from_text(cls, text: str, folder: Path) -> _Seal:
        try:
            outer = json.loads(text)
            content = outer["content"]
            if outer["digest"] != _digest(content) or text != _seal_text(outer):
                raise _Unsound(f"{_SEAL}: it does not match its own digest")
            if content["format"] > _FORMAT:
                raise CheckpointError(
                    f"{folder} has checkpoint format {content['format']}; this version of "
                    f"spread_jax reads up to {_FORMAT}: upgrade spread_jax."
                )
            return cls(
                step=content["step"],
                metrics={k: float(v) for k, v in content["metrics"].items()},
                leaves={k: _LeafSpec.from_json(v) for k, v in content["leaves"].items()},
                files={k: (v["bytes"], v[_HASH]) for k, v in content["files"].items()},
                run=content.get("run"),
            )
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise _Unsound(f"{_SEAL}: it cannot be read ({error})") from error


def _seal_text(outer: dict[str, Any]) -> str:
    return json.dumps(outer, indent=1) + "\n"


def _digest(content: Any) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.new(_HASH, canonical.encode()).hexdigest()


def _hash_file(path: Path, *, flush: bool = False) -> tuple[int, str]:
    with open(path, "rb") as file:
        if flush:
            os.fsync(file.fileno())
        digest = hashlib.file_digest(file, _HASH)
        return file.tell(), digest.hexdigest()


def _refuse_odd_entries(folder: Path) -> None:
    """A link leads out of what is sealed, a pipe is waited for: a step has folders and files only."""
    for parent, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = Path(parent, name)
            mode = path.lstat().st_mode
            if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
                raise _Unsound(f"{path.relative_to(folder).as_posix()}: it is neither a file nor a folder")


def _files(folder: Path) -> list[str]:
    found = [
        Path(parent, name).relative_to(folder).as_posix() for parent, _, names in os.walk(folder) for name in names
    ]
    return sorted(name for name in found if name != _SEAL)


def _write_seal(folder: Path, step: int, metrics: dict[str, float], leaves: dict, run: str | None = None) -> None:
    files = {name: _hash_file(folder / name, flush=True) for name in _files(folder)}
    for parent, _, _ in os.walk(folder):
        flush_folder(Path(parent))
    write_atomically(folder / _SEAL, _Seal(step, metrics, leaves, files, run).to_text())


def _read_seal(folder: Path) -> _Seal:
    try:
        if not stat.S_ISREG((folder / _SEAL).lstat().st_mode):
            raise _Unsound(f"{_SEAL}: it is not a file")
        text = (folder / _SEAL).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise _Unsound(f"{_SEAL}: it is missing") from error
    except (OSError, UnicodeDecodeError) as error:
        raise _Unsound(f"{_SEAL}: it cannot be read ({error})") from error
    seal = _Seal.from_text(text, folder)
    if str(seal.step) != folder.name:
        raise _Unsound(f"{_SEAL}: it belongs to step {seal.step}")
    return seal


def _verify(folder: Path) -> _Seal:
    seal = _read_seal(folder)
    try:
        _refuse_odd_entries(folder)
    except OSError as error:
        raise _Unsound(f"it cannot be read ({error})") from error
    present = _files(folder)
    for name in seal.files:
        if name not in present:
            raise _Unsound(f"{name}: it is missing")
    for name in present:
        if name not in seal.files:
            raise _Unsound(f"{name}: it is not listed in the seal")
    for name, (size, digest) in seal.files.items():
        try:
            found_size = os.path.getsize(folder / name)
            if found_size != size:
                raise _Unsound(f"{name}: it has {found_size} bytes and was sealed with {size}")
            if _hash_file(folder / name)[1] != digest:
                raise _Unsound(f"{name}: its contents changed since it was sealed")
        except OSError as error:
            raise _Unsound(f"{name}: it cannot be read ({error})") from error
    return seal


# --- the checkpointer ---------------------------------------------------------------------------


class _HideOrbax(logging.Filter):
    """Drops what Orbax logs; its failures reach the caller as a CheckpointError instead."""

    def filter(self, record: logging.LogRecord) -> bool:
        return f"{os.sep}orbax{os.sep}" not in record.pathname


def _free_bytes(folder: Path) -> int | None:
    try:
        usage = shutil.disk_usage(folder)
    except OSError:
        return None
    return usage.free if usage.total else None  # some network file systems report nothing


def _vacant(path: Path) -> Path:
    candidate, number = path, 1
    while os.path.lexists(candidate):
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate


class Checkpointer:
    """Saves and restores a training state; what it restores is what was saved, to the last bit.

    The newest ``keep`` steps stay on the disk, and the best one by ``best_metric``. A folder
    belongs to one run at a time: ``RunDirectory`` holds the lock. While it is open, log records of
    Orbax are dropped; its failures are raised as ``CheckpointError``. Use it in a ``with``
    statement: a process that ends without ``close`` loses the save in flight.

    Args:
      directory: the folder of the checkpoints; made at the first save.
      keep: how many of the newest steps to keep, at least 1; None keeps all.
      best_metric: the name of the metric whose best step is kept as well; it may be missing from a
        save without metrics, and a value that is not finite is never the best.
      best_mode: "max" or "min"; of equal values the earlier step is the best.
      asynchronous: whether ``save`` returns once the state has left the device, leaving writing,
        hashing and flushing to a thread; otherwise it returns when the step is sealed.
      run: what identifies the run, such as `RunDirectory.identity`; it is sealed with every step, and a step that
        was sealed with another is refused. None accepts every step.
      log: called with a sentence when a checkpoint is found damaged; prints to stderr by default.

    Raises:
      CheckpointError: ``directory`` is a file.
      ValueError: ``keep`` or ``best_mode`` is not one of those above.

    Example:
      >>> import tempfile, jax.numpy as jnp
      >>> with Checkpointer(tempfile.mkdtemp()) as checkpointer:
      ...     checkpointer.save(10, {"w": jnp.arange(3.0)}, metrics={"bound": -1.5})
      ...     step, state, metrics = checkpointer.restore({"w": jnp.zeros(3)})
      >>> step, state["w"].tolist(), metrics
      (10, [0.0, 1.0, 2.0], {'bound': -1.5})
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep: int | None = 3,
        best_metric: str | None = None,
        best_mode: Literal["max", "min"] = "max",
        asynchronous: bool = True,
        run: str | None = None,
        log: Callable[[str], None] | None = None,
    ) -> None:
        if keep is not None and keep < 1:
            raise ValueError(f"keep is {keep}; it must be at least 1, or None to keep every step.")
        if best_mode not in ("max", "min"):
            raise ValueError(f"best_mode is {best_mode!r}; it must be 'max' or 'min'.")
        self.directory = Path(directory).expanduser().absolute()
        if self.directory.exists() and not self.directory.is_dir():
            raise CheckpointError(f"{self.directory} is a file, not a folder of checkpoints; give another folder.")
        self._keep = keep
        self._best_metric = best_metric
        self._best_mode = best_mode
        self._asynchronous = asynchronous
        self._run = run
        self._log = log or tell
        self._thread: threading.Thread | None = None
        self._failure: CheckpointError | None = None
        self._closed = False
        self._hide_orbax = _HideOrbax()
        logging.getLogger("absl").addFilter(self._hide_orbax)
        self._orbax = self._new_orbax()

    @staticmethod
    def _new_orbax() -> ocp.AsyncCheckpointer:
        # Trained weights hardly compress (8 %), and compressing them doubles the time of a save.
        # Folders made in the background leave threads waiting for ten minutes when that fails.
        return ocp.AsyncCheckpointer(
            ocp.PyTreeCheckpointHandler(use_compression=False),
            async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False),
        )

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, exc_type: type | None, *_: object) -> None:
        try:
            self.close()
        except CheckpointError as error:
            if exc_type is None:
                raise
            self._log(str(error))  # never in the place of the error that ended the run

    # --- saving

    def save(self, step: int, state: PyTree, *, metrics: Mapping[str, float] | None = None) -> None:
        """Saves a state as ``step``; the caller may donate or overwrite it as soon as this returns.

        A step that is sealed already is left as it is, so a resumed run may pass through a step
        it has saved before. One save is in flight at a time: a second call waits for the first.

        Args:
          step: the number of the step, 0 or more.
          state: any pytree whose leaves are arrays, typed random keys or Python numbers.
          metrics: named numbers to keep in the seal, among them ``best_metric``.

        Raises:
          CheckpointError: this save or the one before it failed; earlier steps are untouched.
          ValueError: ``step`` is negative.

        Example:
          >>> import tempfile, jax.numpy as jnp
          >>> with Checkpointer(tempfile.mkdtemp(), best_metric="bound") as checkpointer:
          ...     checkpointer.save(0, {"w": jnp.ones(2)}, metrics={"bound": -3.0})
        """
        self.wait()
        step = int(step)
        if step < 0:
            raise ValueError(f"step is {step}; it must be 0 or more.")
        metrics = {str(name): float(value) for name, value in (metrics or {}).items()}
        if metrics and self._best_metric is not None and self._best_metric not in metrics:
            raise CheckpointError(
                f"the best step is chosen by {self._best_metric!r}, and the metrics of step {step} "
                f"hold {sorted(metrics)}: pass it, or give another best_metric."
            )
        if agree(step in self._sealed()):
            return
        arrays, specs = _to_arrays(_named_leaves(state)[0])
        if not arrays:
            raise CheckpointError(f"the state of step {step} holds no numbers: nothing to save.")
        needed = sum(leaf.nbytes for leaf in arrays.values())
        unsealed = self.directory / f"{step}.unsealed"
        try:
            if jax.process_index() == 0:
                self.directory.mkdir(parents=True, exist_ok=True)
                self._sweep()
                self._make_way(step)
                free = _free_bytes(self.directory)
                if free is not None and free < needed:  # say so before the disk is full to the brim
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            # On return the values are on the host: Orbax has copied the NumPy arrays and those
            # on an accelerator. Of an array on the CPU it holds a view, and XLA leaves a donated
            # buffer alone while a view of it is held.
            self._orbax.save(unsealed, args=ocp.args.PyTreeSave(arrays))
        except Exception as error:
            raise self._failed(step, needed, error) from error
        self._thread = threading.Thread(
            target=self._finish, args=(step, unsealed, needed, metrics, specs), name=f"seal-{step}"
        )
        self._thread.start()
        if not self._asynchronous:
            self.wait()

    def _finish(self, step: int, unsealed: Path, needed: int, metrics: dict, specs: dict) -> None:
        """Runs in a thread: seals the step when Orbax has committed it, then drops old steps."""
        try:
            self._orbax.wait_until_finished()
            if jax.process_index() == 0:
                _write_seal(unsealed, step, metrics, specs, self._run)
                os.rename(unsealed, self.directory / str(step))
                flush_folder(self.directory)
        except Exception as error:
            self._failure = self._failed(step, needed, error)
            return
        if jax.process_index() == 0:
            try:
                self._drop_old(step)
            except OSError as error:
                self._log(f"an old checkpoint in {self.directory} could not be removed: {error}")

    def _failed(self, step: int, needed: int, error: Exception) -> CheckpointError:
        """Clears away a save that failed and says what happened."""
        with contextlib.suppress(Exception):  # it may raise the failure at hand once more
            self._orbax.close()
        self._orbax = self._new_orbax()
        with contextlib.suppress(CheckpointError):
            for entry in self._entries():
                if entry.startswith(f"{step}.unsealed"):
                    shutil.rmtree(self.directory / entry, ignore_errors=True)
        free = _free_bytes(self.directory)
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        why = "the disk is full." if full else reason(error)
        failure = CheckpointError(
            f"the checkpoint of step {step} could not be written to {self.directory} (it needs "
            f"{needed:,} bytes, {'an unknown number' if free is None else f'{free:,}'} are free): "
            f"{why} Earlier checkpoints are untouched; {'make room' if full else 'mend this'} and "
            "run the same command again to resume."
        )
        failure.__cause__ = error
        return failure

    def _make_way(self, step: int) -> None:
        folder = self.directory / str(step)
        if os.path.lexists(folder):
            self._set_aside(step, "it has no valid seal")

    def _sweep(self) -> None:
        """Removes what a crash left behind; none of it was ever sealed, or still kept."""
        for entry in self._entries():
            if _LEFTOVER.match(entry):
                shutil.rmtree(self.directory / entry, ignore_errors=True)

    def _drop_old(self, newest: int) -> None:
        if self._keep is None:
            return
        seals = self._sealed()
        # The step just saved stays even where older, higher numbers lie in the folder.
        kept = {newest, *sorted(seals)[-self._keep :], self._best_of(seals)}
        for step in sorted(seals):
            if step not in kept:
                # One rename takes the step out of sight, so half a deletion is never a checkpoint.
                deleting = _vacant(self.directory / f"{step}.deleting")
                os.rename(self.directory / str(step), deleting)
                shutil.rmtree(deleting)

    def wait(self) -> None:
        """Waits until the save in flight is sealed.

        Raises:
          CheckpointError: that save failed; its message names the folder and the free space.
        """
        if self._closed:
            raise CheckpointError(f"the checkpointer of {self.directory} is closed.")
        in_flight = self._thread is not None
        self._join()
        failure, self._failure = self._failure, None
        failed = failure is not None
        if in_flight:
            failed = bool(agree(failed))
        if failure is not None:
            raise failure
        if failed:
            raise CheckpointError(f"process 0 could not seal the checkpoint in {self.directory}.")

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def close(self) -> None:
        """Waits for the save in flight and lets go of Orbax; closing twice is allowed.

        Raises:
          CheckpointError: the save in flight failed.
        """
        if self._closed:
            return
        try:
            self.wait()
        finally:
            if self._thread is None:
                self._closed = True
                self._orbax.close()
                logging.getLogger("absl").removeFilter(self._hide_orbax)

    # --- what is there

    def _entries(self) -> list[str]:
        try:
            return os.listdir(self.directory)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise CheckpointError(f"{self.directory} cannot be read: {reason(error)}") from error

    def _steps(self) -> list[int]:
        """Steps with a folder, newest first, whether or not the seal is valid."""
        return sorted(int(e) for e in self._entries() if e.isdecimal() and str(int(e)) == e)[::-1]

    def _sealed(self) -> dict[int, _Seal]:
        seals = {}
        for step in self._steps():
            with contextlib.suppress(_Unsound):
                seals[step] = _read_seal(self.directory / str(step))
        return seals

    def _best_of(self, seals: Mapping[int, _Seal]) -> int | None:
        sign = 1.0 if self._best_mode == "max" else -1.0
        scores = {
            step: sign * seal.metrics[self._best_metric]
            for step, seal in sorted(seals.items())
            if self._best_metric in seal.metrics and math.isfinite(seal.metrics[self._best_metric])
        }
        return max(scores, key=scores.__getitem__) if scores else None

    @property
    def latest_step(self) -> int | None:
        """The newest sealed step, or None; reads the seals and hashes nothing."""
        return max(self._sealed(), default=None)

    @property
    def best_step(self) -> int | None:
        """The sealed step with the best finite ``best_metric``, or None; hashes nothing."""
        return self._best_of(self._sealed())

    def sound_steps(self) -> list[int]:
        """Steps whose every file matches its seal, oldest first; reads and hashes all of them.

        Returns:
          The steps ``restore`` would accept.

        Example:
          >>> import tempfile, jax.numpy as jnp
          >>> with Checkpointer(tempfile.mkdtemp()) as checkpointer:
          ...     checkpointer.save(5, {"w": jnp.ones(2)})
          ...     checkpointer.sound_steps()
          [5]
        """
        self._join()
        sound = []
        for step in sorted(self._steps()):
            try:
                _verify(self.directory / str(step))
            except _Unsound:
                continue
            sound.append(step)
        return sound

    # --- restoring

    def restore(self, abstract_state: PyTree, *, step: int | None = None) -> Restored | None:
        """Restores the newest sound step, or the given one.

        A step that no longer matches its seal is reported through ``log``, set aside as
        ``<step>.unsound``, and the next older step is tried.

        Args:
          abstract_state: the tree to fill: arrays, or ``jax.ShapeDtypeStruct`` from
            ``jax.eval_shape``. Every leaf lands with its dtype, shape and sharding; a leaf without
            a sharding lands on the default device as ``jnp.zeros`` would.
          step: restore this step and no other.

        Returns:
          ``Restored(step, state, metrics)``, or None where nothing was ever saved.

        Raises:
          CheckpointError: there are checkpoints and none is sound, the given step is missing or
            not sound, or the checkpoint is that of another run or model: the message names its
            leaves.

        Example:
          >>> import tempfile, jax, jax.numpy as jnp
          >>> init = lambda: {"w": jnp.ones(2), "key": jax.random.key(0)}
          >>> with Checkpointer(tempfile.mkdtemp()) as checkpointer:
          ...     assert checkpointer.restore(init()) is None
          ...     checkpointer.save(1, init())
          ...     checkpointer.restore(jax.eval_shape(init)).state["w"].tolist()
          [1.0, 1.0]
        """
        self._join()
        if step is not None:
            found, problem = int(step), None
            if jax.process_index() == 0:
                problem = self._problem_of(found)
        else:
            found, problem = -1, None
            if jax.process_index() == 0:
                found, problem = self._newest_sound()
        if problem is None and found >= 0 and jax.process_index() == 0:
            problem = self._problem_of_run(found)
        if agree(problem is not None):
            raise CheckpointError(problem or f"process 0 found no sound step in {self.directory}.")
        found = agree(found)
        if found < 0:
            return None
        return self._read(found, abstract_state)

    def _problem_of(self, step: int) -> str | None:
        if step not in self._steps():
            return f"{self.directory} has no step {step}; its steps are {sorted(self._steps())}."
        try:
            _verify(self.directory / str(step))
        except _Unsound as unsound:
            return (
                f"the checkpoint {self.directory / str(step)} is not sound: {unsound}. "
                "Restore without a step to use the newest one that is sound."
            )
        return None

    def _problem_of_run(self, step: int) -> str | None:
        folder = self.directory / str(step)
        with contextlib.suppress(_Unsound):  # changed since it was verified: reading it will say so
            sealed_for = _read_seal(folder).run
            if None not in (self._run, sealed_for) and self._run != sealed_for:
                return (
                    f"{folder} was saved by a run with other settings (it is sealed for {sealed_for}, this run is "
                    f"{self._run}). Put back this run's own step, or move the folder away."
                )
        return None

    def _newest_sound(self) -> tuple[int, str | None]:
        """The newest sound step, or -1 and what to tell the user if all are damaged."""
        problems = []
        for step in self._steps():
            try:
                _verify(self.directory / str(step))
                return step, None
            except _Unsound as unsound:
                problems.append(f"step {step}: {unsound}")
                self._set_aside(step, str(unsound))
        aside = sorted(entry for entry in self._entries() if _SET_ASIDE.match(entry))
        if not problems and not aside:
            return -1, None
        found = "; ".join(problems) or f"earlier damage was set aside as {', '.join(aside)}"
        return -1, (
            f"{self.directory} has checkpoints and none of them is sound ({found}). Put back a "
            "copy of a sound step, or move the folder away to start from the beginning."
        )

    def _set_aside(self, step: int, problem: str) -> None:
        folder = self.directory / str(step)
        target = _vacant(self.directory / f"{step}.unsound")
        message = f"WARNING: the checkpoint {folder} is not sound: {problem}."
        try:
            os.rename(folder, target)
            message += f" It is set aside as {target.name} and not used."
        except OSError as error:
            message += f" It is not used; it could not be renamed ({reason(error)})"
        self._log(message)

    def _read(self, step: int, abstract_state: PyTree) -> Restored:
        folder = self.directory / str(step)
        try:
            seal = _read_seal(folder)
        except _Unsound as unsound:
            raise CheckpointError(f"{folder} changed while it was restored: {unsound}.") from None
        leaves, treedef = _named_leaves(abstract_state)
        wanted = {name: _spec(name, leaf) for name, leaf in leaves.items()}
        _check_fit(seal.leaves, wanted, str(folder))
        requests = {}
        for name, spec in seal.leaves.items():
            if not math.prod(spec.array_shape):
                continue
            placement = _placement(leaves[name])
            if placement is None or spec.kind == "number":
                requests[name] = ocp.RestoreArgs(restore_type=np.ndarray)
            else:
                requests[name] = ocp.ArrayRestoreArgs(sharding=placement, global_shape=spec.array_shape)
        try:
            arrays = self._orbax.restore(
                folder,
                args=ocp.args.PyTreeRestore(item=dict.fromkeys(requests, 0), restore_args=requests),
            )
        except Exception as error:
            raise CheckpointError(f"{folder} matches its seal and Orbax cannot read it: {reason(error)}") from error
        for name, spec in seal.leaves.items():
            if name not in arrays:
                dtype = np.uint32 if spec.kind == "key" else np.dtype(spec.dtype)
                arrays[name] = np.zeros(spec.array_shape, dtype)
            elif not _holds(arrays[name], spec):
                raise CheckpointError(f"{folder} is not sound: the array {name!r} is not what its seal says.")
        restored = [_to_leaf(name, arrays[name], seal.leaves[name], leaf) for name, leaf in leaves.items()]
        return Restored(step, jax.tree_util.tree_unflatten(treedef, restored), seal.metrics)
