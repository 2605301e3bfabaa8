"""The folder of one run: its configuration, its metrics, its figures, its results, its lock.

    config.json       what the run was started with; a resumed run must repeat it
    metrics.jsonl     one JSON object per line: step, time (seconds since 1970), the named numbers
    tensorboard/      the same numbers as TensorBoard events, where tensorboardX is installed
    checkpoints/      see ``Checkpointer``
    *.png             figures; figures.json has their captions
    results.json      written when the run is finished
    .checkpointed     the identity of the run, once a checkpoint is sealed: where all are gone, or another run's are in
                      their place, it is not begun again in silence
    .lock             held by the process that writes to the folder; a crash frees it

JSON has no numbers for NaN and the infinities: they are written as the strings "nan", "inf" and
"-inf", which ``float`` understands and ``read_metrics`` turns back into numbers.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import jax

from spread_jax._files import read_json, remove_leftovers, write_atomically
from spread_jax._progress import tell
from spread_jax.training._config import RunDirectoryError, identity_of, plain, without
from spread_jax.training._folder import (
    CHECKPOINTS,
    MARK,
    SavedRun,
    absolute,
    lock,
    make_and_lock,
    read_run,
    results_of,
    write_config,
)
from spread_jax.training._metrics import Metrics, cannot_write
from spread_jax.training._processes import agree, several
from spread_jax.training.checkpoint import Checkpointer

__all__ = ["RunDirectory", "RunDirectoryError", "SavedRun", "read_run"]


class RunDirectory:
    """A run's folder, open for writing; made by ``RunDirectory.open``.

    In a run of several processes all open it, and process 0 alone holds and writes it. To the others it is a folder
    of their own that looks the same and is removed when it is closed; only ``checkpointer`` is that of all.

    Attributes:
      path: the folder.
      config: the configuration as it was written to ``config.json``.
      identity: a digest of the configuration without its resumable keys, the same for every process of a run, sealed
        with its checkpoints. After ``reopen`` that of the sealed ones, or None.

    Example:
      >>> import tempfile, os
      >>> workdir = os.path.join(tempfile.mkdtemp(), "small-0")
      >>> with RunDirectory.open(workdir, {"seed": 0}, tensorboard=False) as run:
      ...     run.log_metrics(1, {"bound": -2.5})
      ...     run.write_results({"bound": -2.5})
      ...     [(record["step"], record["bound"]) for record in run.read_metrics()], run.finished
      ([(1, -2.5)], True)
    """

    def __init__(
        self,
        path: Path,
        config: dict[str, Any],
        identity: str | None,
        lock: BinaryIO,
        *,
        log: Callable[[str], None],
        tensorboard: bool,
        on_log: Callable[[int, dict[str, float]], object] | None = None,
    ) -> None:
        """For ``open`` and ``reopen`` only."""
        self.path = path
        self.config = config
        self.identity = identity
        self._lock: BinaryIO | None = lock
        self._log = log
        self._metrics = Metrics(path, events=tensorboard, log=log)
        self._figures: dict[str, dict] | None = None
        self._shared = path
        self._temporary: tempfile.TemporaryDirectory | None = None
        self._on_log = on_log

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        config: Mapping[str, Any] | Any,
        *,
        resumable_keys: Collection[str] = (),
        local_keys: Collection[str] = (),
        log: Callable[[str], None] | None = None,
        tensorboard: bool = True,
        on_log: Callable[[int, dict[str, float]], object] | None = None,
    ) -> RunDirectory:
        """Opens the folder of a new run or of one to resume, and locks it.

        Args:
          path: the folder; it is made, with its parents, where it does not exist.
          config: a mapping or a dataclass of numbers, strings, lists and further mappings.
          resumable_keys: keys that may differ from the saved ones, such as the number of steps;
            nested keys are dotted, ``optimizer.learning_rate``, and a key stands for all below it.
          local_keys: keys of places and habits on this machine, such as the cache's folder: they are neither
            written nor read, since a run's folder may be untrusted.
          log: called with a sentence about something worth knowing; prints to stderr by default.
          tensorboard: whether to write TensorBoard events beside ``metrics.jsonl``.
          on_log: called with the step and the numbers of each record once it is in the file, to send them
            elsewhere. Training waits for it. An exception of it does not end the run: ``log`` gets one sentence,
            and it is not called again.

        Returns:
          The open folder; close it, or use it in a ``with`` statement.

        Raises:
          RunDirectoryError: the folder cannot be made or written, belongs to something else, is in
            use by another process, has a link or a pipe in it, or holds a run with another configuration.
          TypeError: ``config`` is neither a mapping nor a dataclass.

        Example:
          >>> import tempfile
          >>> with RunDirectory.open(tempfile.mkdtemp(), {"steps": 10}) as run:
          ...     run.finished
          False
        """
        config_now = plain(config, "config")
        if not isinstance(config_now, dict):
            raise TypeError(f"config is a {type(config).__name__}; give a mapping or a dataclass.")
        config_now = without(config_now, local_keys)
        folder, log = absolute(path), log or tell

        def open_here(folder: Path, tensorboard: bool, on_log: Callable | None, log: Callable) -> RunDirectory:
            held = make_and_lock(folder)
            try:
                remove_leftovers(folder)
                write_config(folder, config_now, resumable_keys, local_keys)
                identity = identity_of(config_now, resumable_keys)
                return cls(folder, config_now, identity, held, log=log, tensorboard=tensorboard, on_log=on_log)
            except BaseException:
                held.close()
                raise

        if not several():
            return open_here(folder, tensorboard, on_log, log)
        run, problem = None, None
        if jax.process_index() == 0:
            try:
                run = open_here(folder, tensorboard, on_log, log)
            except Exception as error:
                problem = error
        if agree(problem is not None):
            raise problem or RunDirectoryError(f"process 0 could not open {path}; it says why.")
        if run is None:
            temporary = tempfile.TemporaryDirectory(prefix="spread_jax-")
            run = open_here(Path(temporary.name), False, None, lambda sentence: None)  # the first one speaks
            run._temporary, run._shared = temporary, folder
            for name in ("metrics.jsonl", "results.json"):
                with contextlib.suppress(FileNotFoundError):
                    shutil.copy(folder / name, run.path / name)
        agree(0)  # process 0 goes on only when they have been read
        return run

    @classmethod
    def reopen(
        cls,
        path: str | os.PathLike[str],
        *,
        local_keys: Collection[str] = (),
        log: Callable[[str], None] | None = None,
    ) -> RunDirectory:
        """Opens and locks the folder of a run as it is, with the configuration it was started with.

        For what comes after training and has settings of its own, such as an evaluation.

        Args:
          path: the folder.
          local_keys: as in ``read_run``.
          log: as in ``open``.

        Returns:
          The open folder.

        Raises:
          RunDirectoryError: the folder is not that of a run, its configuration is damaged, there is a link or a pipe
            in it, or another process uses it.

        Example:
          >>> import tempfile
          >>> workdir = tempfile.mkdtemp()
          >>> RunDirectory.open(workdir, {"seed": 3}).close()
          >>> with RunDirectory.reopen(workdir) as run:
          ...     run.config
          {'seed': 3}
        """
        saved = read_run(path, local_keys=local_keys)
        return cls(saved.path, saved.config, saved.identity, lock(saved.path), log=log or tell, tensorboard=False)

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the files and frees the lock; closing twice is allowed."""
        self._metrics.close()
        if self._lock is not None:
            self._lock.close()
            self._lock = None
        if self._temporary is not None:
            self._temporary.cleanup()
            self._temporary = None

    # --- metrics

    def log_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends one line to ``metrics.jsonl``; it is in the file when this returns.

        Args:
          step: the step the numbers belong to.
          metrics: named numbers; NaN and the infinities are written as strings.

        Raises:
          RunDirectoryError: the line could not be written; the file keeps the lines before it.
          ValueError: a metric is named ``step`` or ``time``.

        Example:
          >>> import tempfile
          >>> with RunDirectory.open(tempfile.mkdtemp(), {}, tensorboard=False) as run:
          ...     run.log_metrics(3, {"loss": float("nan")})
          ...     run.read_metrics()[0]["loss"]
          nan
        """
        self._require_open()
        for name in ("step", "time"):
            if name in metrics:
                raise ValueError(f"a metric cannot be named {name!r}: every record has one already.")
        numbers = {str(name): float(value) for name, value in metrics.items()}
        self._metrics.append(int(step), numbers)
        self._call_hook(int(step), numbers)

    def read_metrics(self) -> list[dict[str, Any]]:
        """Reads every record; a last line that a crash left torn is not one.

        Returns:
          One dictionary per record, in the order they were written.

        Raises:
          RunDirectoryError: a line other than the last is damaged; the message has its number.

        Example:
          >>> import tempfile
          >>> with RunDirectory.open(tempfile.mkdtemp(), {}) as run:
          ...     run.read_metrics()
          []
        """
        return [record for _, record in self._metrics.read()]

    def truncate_metrics(self, step: int) -> None:
        """Drops the records after ``step``, so a resumed run leaves the file of an unbroken one.

        Call it once with the step that was restored (-1 for none) before logging. TensorBoard is told to forget the
        same steps; where records before the step are lost, ``log`` is told.

        Args:
          step: the last step to keep.

        Raises:
          RunDirectoryError: the file is damaged or could not be rewritten.

        Example:
          >>> import tempfile
          >>> with RunDirectory.open(tempfile.mkdtemp(), {}, tensorboard=False) as run:
          ...     for step in (1, 2, 3):
          ...         run.log_metrics(step, {"loss": 0.5})
          ...     run.truncate_metrics(2)
          ...     [record["step"] for record in run.read_metrics()]
          [1, 2]
        """
        self._require_open()
        self._metrics.truncate(int(step))

    def _call_hook(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._on_log is None:
            return
        try:
            self._on_log(step, dict(metrics))
        except Exception as error:  # whatever a tracking server that is down makes of it
            self._on_log = None  # each further call may wait for a timeout
            said = " ".join(f"{type(error).__name__}: {error}".split())
            self._log(f"on_log failed at step {step} and is not called again, metrics.jsonl continues: {said[:300]}")

    # --- results and figures

    @property
    def checkpoints_path(self) -> Path:
        """Where this run keeps its checkpoints."""
        return self._shared / CHECKPOINTS

    def checkpointer(self, **options: Any) -> Checkpointer:
        """Saves and restores the checkpoints of this run and of no other.

        A folder whose checkpoints are gone is an error, and no new run.

        Args:
          options: of ``Checkpointer``, such as ``best_metric``.

        Returns:
          The checkpointer; close it before the folder.

        Example:
          >>> import tempfile
          >>> with RunDirectory.open(tempfile.mkdtemp(), {}) as run, run.checkpointer() as checkpointer:
          ...     checkpointer.save(1, {"w": jax.numpy.ones(2)})
          ...     checkpointer.restore({"w": jax.numpy.zeros(2)}).step
          1
        """
        log = self._log if self._temporary is None else tell
        options = {"run": self.identity, "log": log, "mark": self._shared / MARK, **options}
        return Checkpointer(self.checkpoints_path, **options)

    @property
    def results(self) -> dict[str, Any] | None:
        """What ``write_results`` wrote, or None while the run is not finished.

        Raises:
          RunDirectoryError: it is there and cannot be read at this moment.
        """
        return results_of(self.path)

    @property
    def finished(self) -> bool:
        """Whether ``results.json`` is there and complete."""
        return self.results is not None

    @property
    def finished_steps(self) -> int:
        """The ``steps`` of the results, how far the run went when it was finished; 0 where it is not.

        Raises:
          RunDirectoryError: the results hold something else under that name.
        """
        steps = (self.results or {}).get("steps", 0)
        if type(steps) is not int:
            raise RunDirectoryError(
                f"{self.path / 'results.json'} is damaged: its steps are {json.dumps(steps)[:60]}. Delete it."
            )
        return steps

    def write_results(self, results: Mapping[str, Any]) -> None:
        """Writes ``results.json`` in one piece; from then on the run is finished.

        Args:
          results: numbers, strings, lists and mappings of them.

        Raises:
          RunDirectoryError: the file could not be written, or holds something JSON cannot.

        Example:
          >>> import tempfile
          >>> with RunDirectory.open(tempfile.mkdtemp(), {}) as run:
          ...     run.write_results({"error": 0.01})
          ...     run.results
          {'error': 0.01}
        """
        self._require_open()
        self.write_file("results.json", json.dumps(plain(results, "results"), indent=2) + "\n")

    def update_results(self, results: Mapping[str, Any]) -> None:
        """Adds to the results of a finished run, or replaces those of the same names.

        Args:
          results: as in ``write_results``.

        Raises:
          RunDirectoryError: the run is not finished, or as ``write_results``.

        Example:
          >>> import tempfile
          >>> with RunDirectory.open(tempfile.mkdtemp(), {}) as run:
          ...     run.write_results({"error": 0.01})
          ...     run.update_results({"distance": 3.5})
          ...     run.results
          {'error': 0.01, 'distance': 3.5}
        """
        self.require_finished()
        self.write_results({**self.results, **results})

    def require_finished(self) -> None:
        """Refuses a run without results.

        Raises:
          RunDirectoryError: the run is not finished; the message says how to finish it.

        Example:
          >>> import tempfile
          >>> with RunDirectory.open(tempfile.mkdtemp(), {}) as run:
          ...     run.write_results({})
          ...     run.require_finished()
        """
        if not self.finished:
            raise RunDirectoryError(
                f"the run in {self.path} is not finished: it has no results yet. Repeat its command to finish it."
            )

    def save_figure_path(
        self,
        name: str,
        *,
        caption: str | None = None,
        section: str = "Figures",
        grid: bool = False,
        real_images: bool = False,
    ) -> Path:
        """The path of a figure in this folder; what it shows is kept beside it, for the report.

        Args:
          name: a file name; ``.png`` is added where it has no suffix. Pictures ``name/step_000100.png`` in a folder of
            its name show the same at other steps.
          caption: what it shows; its name, if nothing is given.
          section: the heading that it stands under.
          grid: whether it is made of small images, which keep their pixels.
          real_images: whether it shows images of the data set, which a report can leave out.

        Returns:
          The path to save to.

        Raises:
          RunDirectoryError: the caption could not be written.
          ValueError: ``name`` is a path, or empty.

        Example:
          >>> import tempfile
          >>> with RunDirectory.open(tempfile.mkdtemp(), {}) as run:
          ...     run.save_figure_path("samples", caption="Samples x = g(z).", grid=True).name
          'samples.png'
        """
        if not name or Path(name).name != name:
            raise ValueError(f"a figure is named by a file name, not {name!r}.")
        name = name if Path(name).suffix else f"{name}.png"
        if caption is not None:
            path = self.path / "figures.json"
            if self._figures is None:
                try:
                    self._figures = read_json(path)
                except (OSError, ValueError):
                    self._figures = {}
            told = {"caption": caption, "section": section, "grid": grid, "real_images": real_images}
            if self._figures.get(name) != told:
                self._figures[name] = told
                self.write_file(path.name, json.dumps(self._figures, indent=1) + "\n")
        return self.path / name

    def write_file(self, name: str, content: str | bytes) -> Path:
        """Writes another file of this run in one piece, such as ``table.md``, which a report shows.

        Args:
          name: a file name.
          content: what it holds.

        Returns:
          Its path.

        Raises:
          RunDirectoryError: it could not be written.
          ValueError: ``name`` is a path, or empty.

        Example:
          >>> import tempfile
          >>> with RunDirectory.open(tempfile.mkdtemp(), {}) as run:
          ...     run.write_file("table.md", "| a | b |").name
          'table.md'
        """
        self._require_open()
        if not name or Path(name).name != name:
            raise ValueError(f"a file of a run is named by a file name, not {name!r}.")
        try:
            write_atomically(self.path / name, content)
        except OSError as error:
            raise cannot_write(self.path / name, error) from error
        return self.path / name

    def _require_open(self) -> None:
        if self._lock is None:
            raise RunDirectoryError(f"the run's folder {self.path} is closed.")
