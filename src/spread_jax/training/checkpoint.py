"""Checkpoints that are either bit-exact or rejected.

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
import errno
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
import numpy as np
import orbax.checkpoint as ocp

from spread_jax._files import flush_folder, reason, write_atomically
from spread_jax._progress import tell
from spread_jax.runtime import numerics
from spread_jax.training._leaves import (
    CheckpointError,
    check_fit,
    holds,
    named_leaves,
    placement_of,
    spec_of,
    to_arrays,
    to_leaf,
)
from spread_jax.training._processes import agree, several
from spread_jax.training._seal import Seal, Unsound, read_seal, verify, write_seal

__all__ = ["CheckpointError", "Checkpointer", "Restored"]

PyTree = Any

# Names that this module makes and no other: what a crash can leave, and what was set aside.
_LEFTOVER = re.compile(r"\d+\.(unsealed(\.orbax-checkpoint-tmp(-\d+)?)?|deleting(-\d+)?)")
_SET_ASIDE = re.compile(r"\d+\.unsound(-\d+)?")


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


def _changes(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """What of the compiler and the device has changed since a step was saved."""
    return ", ".join(
        f"{name} {before[name] or 'none'} (now {now[name] or 'none'})"
        for name in now
        if before.get(name, now[name]) != now[name]
    )


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
      mark: a file outside of ``directory`` that is written once a step is sealed, and holds ``run``; where it is there,
        a folder without any step is an error and no new run.
      read_only: whether nothing in the folder may be changed: ``save`` is refused and damaged steps are skipped.
      log: called with a sentence when a checkpoint is found damaged; prints to stderr by default.

    Raises:
      CheckpointError: ``directory`` is a file, or its name is no UTF-8.
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
        mark: str | os.PathLike[str] | None = None,
        read_only: bool = False,
        log: Callable[[str], None] | None = None,
    ) -> None:
        if keep is not None and keep < 1:
            raise ValueError(f"keep is {keep}; it must be at least 1, or None to keep every step.")
        if best_mode not in ("max", "min"):
            raise ValueError(f"best_mode is {best_mode!r}; it must be 'max' or 'min'.")
        self.directory = Path(directory).expanduser().absolute()
        if self.directory.exists() and not self.directory.is_dir():
            raise CheckpointError(f"{self.directory} is a file, not a folder of checkpoints; give another folder.")
        try:
            os.fspath(self.directory).encode()
        except UnicodeEncodeError:
            raise CheckpointError(
                f"{str(self.directory)!a} is no name in UTF-8, which Orbax needs; give another folder."
            ) from None
        self._keep = keep
        self._best_metric = best_metric
        self._best_mode = best_mode
        self._asynchronous = asynchronous
        self._run = run
        self._mark = None if mark is None else Path(mark)
        self._marked = False
        self._read_only = read_only
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
        # Orbax takes time by the clock on the wall, and one that is set forward would end a save; between processes a
        # limit is needed.
        options = ocp.options.AsyncOptions(create_directories_asynchronously=False)
        if not several():
            options.timeout_secs = 10**9
        return ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler(use_compression=False), async_options=options)

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
        if self._read_only:
            raise CheckpointError(f"the checkpointer of {self.directory} is for reading only.")
        if step < 0:
            raise ValueError(f"step is {step}; it must be 0 or more.")
        metrics = {str(name): float(value) for name, value in (metrics or {}).items()}
        if metrics and self._best_metric is not None and self._best_metric not in metrics:
            raise CheckpointError(
                f"the best step is chosen by {self._best_metric!r}, and the metrics of step {step} "
                f"hold {sorted(metrics)}: pass it, or give another best_metric."
            )
        if self._asked_of_the_first(lambda: step in self._sealed()):
            return
        arrays, specs = to_arrays(named_leaves(state)[0])
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
                write_seal(unsealed, step, metrics, specs, self._run)
                os.rename(unsealed, self.directory / str(step))
                flush_folder(self.directory)
                if self._mark is not None and not self._marked:
                    write_atomically(self._mark, self._run or "")
                    self._marked = True
        except Exception as error:
            self._failure = self._failed(step, needed, error)
            return
        if jax.process_index() == 0:
            try:
                self._drop_old(step)
            except (OSError, CheckpointError) as error:
                self._log(f"an old checkpoint in {self.directory} could not be removed: {error}")

    def _failed(self, step: int, needed: int, error: Exception) -> CheckpointError:
        """Clears away a save that failed and says what happened."""
        with contextlib.suppress(Exception):  # it may raise the failure at hand once more
            self._orbax.close()
        self._orbax = self._new_orbax()
        with contextlib.suppress(CheckpointError):
            self._sweep(f"{step}.unsealed")
        free = _free_bytes(self.directory)
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        why = "the disk is full." if full else reason(error)
        failure = CheckpointError(
            f"the checkpoint of step {step} could not be written to {self.directory} (it needs "
            f"{needed:,} bytes, {'an unknown number' if free is None else f'{free:,}'} are free): "
            f"{why} Earlier checkpoints are untouched; {'make room' if full else 'fix this'} and "
            "run the same command again to resume."
        )
        failure.__cause__ = error
        return failure

    def _make_way(self, step: int) -> None:
        folder = self.directory / str(step)
        if os.path.lexists(folder):
            self._set_aside(step, "it has no valid seal")

    def _sweep(self, start: str = "") -> None:
        """Removes what a crash left behind; none of it was ever sealed, or still kept."""
        for entry in self._entries():
            if _LEFTOVER.fullmatch(entry) and entry.startswith(start):
                path = self.directory / entry
                if stat.S_ISDIR(path.lstat().st_mode):
                    shutil.rmtree(path, ignore_errors=True)
                else:  # a link, or a pipe that rmtree would wait for
                    path.unlink()

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

    def _sealed(self) -> dict[int, Seal]:
        seals = {}
        for step in self._steps():
            with contextlib.suppress(Unsound):
                seals[step] = read_seal(self.directory / str(step))
        return seals

    def _best_of(self, seals: Mapping[int, Seal]) -> int | None:
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
                verify(self.directory / str(step))
            except Unsound:
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
          ``Restored(step, state, metrics)``, or None where nothing was ever saved. Where the step was computed with
          another compiler, flag or kind of device than there is now, ``log`` is told.

        Raises:
          CheckpointError: there are checkpoints and none is sound, the given step is missing or
            not sound, the checkpoint is that of another run or model: the message names its
            leaves; or it cannot be read at this moment, and is left as it is.

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
        found = self._asked_of_the_first(lambda: self._choose(step))
        return None if found < 0 else self._read(found, abstract_state)

    def _asked_of_the_first(self, question: Callable[[], int]) -> int:
        """The answer that process 0 finds in the folder, in all processes."""
        answer, problem = -1, None
        if jax.process_index() == 0:
            try:
                answer = question()
            except CheckpointError as error:
                problem = error
        if agree(problem is not None):
            raise problem or CheckpointError(f"process 0 found no sound step in {self.directory}; it says why.")
        return agree(answer)

    def _choose(self, step: int | None) -> int:
        """The step to restore, which is sound and of this run; -1 where nothing was ever saved."""
        if step is None:
            found, seal = self._newest_sound()
            if seal is None:
                return -1
        else:
            found = int(step)
            if found not in self._steps():
                raise CheckpointError(f"{self.directory} has no step {found}; its steps are {sorted(self._steps())}.")
            try:
                seal = verify(self.directory / str(found))
            except Unsound as unsound:
                raise CheckpointError(
                    f"the checkpoint {self.directory / str(found)} is not sound: {unsound}. "
                    "Restore without a step to use the newest one that is sound."
                ) from None
        folder = self.directory / str(found)
        if None not in (self._run, seal.run) and self._run != seal.run:
            raise CheckpointError(
                f"{folder} was saved by a run with other settings (it is sealed for {seal.run}, this run is "
                f"{self._run}). Put back this run's own step, or move the folder away."
            )
        if not self._read_only and (changed := _changes(seal.made_with, numerics())):
            self._log(f"{folder} was computed with {changed}: the last digits may differ from now on.")
        return found

    def _newest_sound(self) -> tuple[int, Seal | None]:
        problems = []
        for step in self._steps():
            try:
                return step, verify(self.directory / str(step))
            except Unsound as unsound:
                problems.append(f"step {step}: {unsound}")
                self._set_aside(step, str(unsound))
        aside = sorted(entry for entry in self._entries() if _SET_ASIDE.fullmatch(entry))
        if problems or aside:
            found = "; ".join(problems) or f"earlier damage was set aside as {', '.join(aside)}"
            raise CheckpointError(
                f"{self.directory} has checkpoints and none of them is sound ({found}). Put back a "
                "copy of a sound step, or move the folder away to start from the beginning."
            )
        if self._mark is not None and os.path.lexists(self._mark):
            raise CheckpointError(
                f"{self.directory} holds no checkpoint, and this run has saved some: put the folder back, or delete "
                f"{self._mark} to start from the beginning."
            )
        return -1, None

    def _set_aside(self, step: int, problem: str) -> None:
        folder = self.directory / str(step)
        target = _vacant(self.directory / f"{step}.unsound")
        message = f"WARNING: the checkpoint {folder} is not sound: {problem}."
        if self._read_only:
            return self._log(f"{message} It is not used.")
        try:
            os.rename(folder, target)
            message += f" It is set aside as {target.name} and not used."
        except OSError as error:
            message += f" It is not used; it could not be renamed ({reason(error)})"
        self._log(message)

    def _read(self, step: int, abstract_state: PyTree) -> Restored:
        folder = self.directory / str(step)
        try:
            seal = read_seal(folder)
        except Unsound as unsound:
            raise CheckpointError(f"{folder} changed while it was restored: {unsound}.") from None
        leaves, treedef = named_leaves(abstract_state)
        wanted = {name: spec_of(name, leaf) for name, leaf in leaves.items()}
        check_fit(seal.leaves, wanted, str(folder))
        requests = {}
        for name, spec in seal.leaves.items():
            if not math.prod(spec.array_shape):
                continue
            placement = placement_of(leaves[name])
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
            elif not holds(arrays[name], spec):
                raise CheckpointError(f"{folder} is not sound: the array {name!r} is not what its seal says.")
        restored = [to_leaf(name, arrays[name], seal.leaves[name], leaf) for name, leaf in leaves.items()]
        return Restored(step, jax.tree_util.tree_unflatten(treedef, restored), seal.metrics)
