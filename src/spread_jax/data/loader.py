"""Batches as a pure function of (seed, step)."""

from __future__ import annotations

import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from spread_jax.data.dataset import Dataset
from spread_jax.data.errors import DatasetError
from spread_jax.data.stall import read_timeout, stalled


class Loader:
    r"""Shuffled batches of a data set; a batch depends on the seed and the step, on nothing else.

    Example number $g = \text{step} \cdot \text{batch\_size} + i$ of the endless stream is
    `permutation(seed, g // N)[g % N]`. Batches run across the end of an epoch, so that nothing is
    dropped and each epoch visits each example exactly once. To resume, ask for the next step.

    Args:
        dataset: what `open_dataset` returned, with N examples.
        batch_size: examples in the global batch, over all hosts.
        seed: non-negative integer; determines every permutation.
        host_index: which host this is.
        host_count: hosts that share the global batch. Of its `batch_size = n * host_count` rows, in the order of
            the global shuffle, this one reads the n from `host_index * n` on: the hosts' rows one after another
            are then the batch of a single host, row for row, and what is drawn for each row is the same.
        prefetch: batches that `iterate` prepares ahead in its thread; 0 for no thread.

    Raises:
        DatasetError: the data set is empty, the batch is larger than the data set or cannot be
            divided among the hosts, or an argument is out of range.

    Example:
        >>> import numpy as np
        >>> from spread_jax.data import Dataset, Loader
        >>> images = np.zeros((10, 4, 4, 1), np.uint8)
        >>> loader = Loader(Dataset.from_array(images), batch_size=4, seed=0)
        >>> loader.batch(0).shape, loader.steps_per_epoch
        ((4, 4, 4, 1), 2.5)
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        batch_size: int,
        seed: int,
        host_index: int = 0,
        host_count: int = 1,
        prefetch: int = 2,
    ):
        size = len(dataset)
        if size == 0:
            raise DatasetError(f"The data set {dataset.name} ({dataset.split}) has no examples.")
        if batch_size < 1:
            raise DatasetError(f"batch_size is {batch_size}: it must be 1 or more.")
        if batch_size > size:
            raise DatasetError(
                f"batch_size is {batch_size}, but {dataset.name} ({dataset.split}) has only {size} "
                f"examples: pass batch_size={size} or less, or a larger max_examples."
            )
        if host_count < 1 or not 0 <= host_index < host_count:
            raise DatasetError(
                f"host_index is {host_index} and host_count {host_count}: host_index must lie in 0..host_count-1."
            )
        if batch_size % host_count:
            raise DatasetError(
                f"batch_size is {batch_size}, which cannot be divided among host_count="
                f"{host_count} hosts: pass a multiple of {host_count}."
            )
        if not 0 <= seed < 2**64:
            raise DatasetError(f"seed is {seed}: it must lie in 0..2**64-1.")
        if prefetch < 0:
            raise DatasetError(f"prefetch is {prefetch}: it must be 0 or more.")
        self.dataset = dataset
        self.batch_size = batch_size
        self.seed = seed
        self.host_index = host_index
        self.host_count = host_count
        self.prefetch = prefetch
        # A plain view: indexing np.memmap itself costs more per call.
        self._images = np.asarray(dataset.images)
        self._permutations: OrderedDict[int, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def steps_per_epoch(self) -> float:
        """Steps in which N examples go by; not an integer unless batch_size divides N."""
        return len(self.dataset) / self.batch_size

    def indices(self, step: int) -> np.ndarray:
        """The examples of the global batch.

        Args:
            step: number of the batch, 0 or more.

        Returns:
            int64 array [batch_size] of indices into the data set.
        """
        if step < 0:
            raise DatasetError(f"step is {step}: it must be 0 or more.")
        size = len(self.dataset)
        epoch, start = divmod(step * self.batch_size, size)
        stop = start + self.batch_size
        head = self._permutation(epoch)[start:stop]
        if stop <= size:
            return head.copy()
        return np.concatenate((head, self._permutation(epoch + 1)[: stop - size]))

    def batch(self, step: int) -> np.ndarray:
        """The rows of the batch that belong to this host.

        Args:
            step: number of the batch, 0 or more.

        Returns:
            uint8 array [batch_size // host_count, H, W, C], owned by the caller.
        """
        return np.take(self._images, self._host_indices(step), axis=0)

    def batch_labels(self, step: int) -> np.ndarray:
        """The labels of `batch(step)`, [batch_size // host_count]."""
        if self.dataset.labels is None:
            raise DatasetError(f"The data set {self.dataset.name} has no labels.")
        return np.take(self.dataset.labels, self._host_indices(step), axis=0)

    def iterate(
        self, start_step: int = 0, *, place: Callable[[np.ndarray], Any] | None = None
    ) -> Iterator[tuple[int, Any]]:
        """Yield (step, batch) from `start_step` on, without end.

        One thread prepares up to `prefetch` batches ahead. An exception in it is raised here, and
        closing or dropping the iterator ends it.

        Args:
            start_step: number of the first batch.
            place: batch -> what is yielded in its stead, called in the thread: with `jax.device_put` the batch
                is on the device before the step asks for it. Up to `prefetch` + 2 batches are there at once.

        Raises:
            DatasetError: a batch took longer than $SPREAD_JAX_READ_TIMEOUT seconds (300); not seen without a thread.

        Example:
            >>> import jax, numpy as np
            >>> from spread_jax.data import Dataset, Loader
            >>> loader = Loader(Dataset.from_array(np.zeros((10, 4, 4, 1), np.uint8)), batch_size=4, seed=0)
            >>> step, batch = next(loader.iterate(7, place=jax.device_put))
            >>> step, batch.shape, isinstance(batch, jax.Array)
            (7, (4, 4, 4, 1), True)
        """
        placed = self.batch if place is None else lambda step: place(self.batch(step))
        if self.prefetch == 0:
            step = start_step
            while True:
                yield step, placed(step)
                step += 1

        ready: queue.Queue = queue.Queue(maxsize=self.prefetch)
        stopped = threading.Event()
        seconds = read_timeout()

        def put(item: tuple) -> None:
            while not stopped.is_set():
                try:
                    return ready.put(item, timeout=0.1)
                except queue.Full:
                    continue

        def work() -> None:
            step = start_step
            try:
                while not stopped.is_set():
                    put((step, placed(step), None))
                    step += 1
            except BaseException as error:
                put((step, None, error))

        thread = threading.Thread(target=work, name="spread_jax-loader", daemon=True)
        thread.start()
        stuck = False
        try:
            while True:
                try:
                    step, batch, error = ready.get(timeout=seconds)
                except queue.Empty:
                    stuck = True
                    file = getattr(self.dataset.images, "filename", None) or self.dataset.source
                    raise stalled(file, seconds) from None
                if error is not None:
                    raise error
                yield step, batch
        finally:
            stopped.set()
            if not stuck:
                thread.join()

    def _host_indices(self, step: int) -> np.ndarray:
        rows = self.batch_size // self.host_count
        return self.indices(step)[self.host_index * rows :][:rows]

    def _permutation(self, epoch: int) -> np.ndarray:
        with self._lock:
            if epoch not in self._permutations:
                # The raw stream of Philox is the same in every version of NumPy; the methods of
                # Generator, permutation() among them, are not promised to be.
                bits = np.random.Philox(key=self.seed, counter=[0, 0, 0, epoch])
                order = np.argsort(bits.random_raw(len(self.dataset)), kind="stable")
                self._permutations[epoch] = order.astype(np.int64, copy=False)
                while len(self._permutations) > 2:
                    self._permutations.popitem(last=False)
            self._permutations.move_to_end(epoch)
            return self._permutations[epoch]
