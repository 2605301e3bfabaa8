"""A batch is a function of (seed, step), whatever happened before and however many hosts."""

from __future__ import annotations

import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spread_jax.data import Dataset, DatasetError, Loader


def numbered(n: int) -> Dataset:
    """Images whose pixels spell their index."""
    images = np.arange(n, dtype="<u2").view(np.uint8).reshape(n, 1, 2, 1)
    return Dataset.from_array(images, np.arange(n))


def loader_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "spread_jax-loader"]


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 40),
    data=st.data(),
    hosts=st.integers(1, 4),
    seed=st.integers(0, 2**64 - 1),
)
def test_every_epoch_visits_every_example_once_and_hosts_share_the_batch(n, data, hosts, seed):
    batch_size = hosts * data.draw(st.integers(1, max(1, n // hosts)))
    if batch_size > n:
        return
    dataset = numbered(n)
    loader = Loader(dataset, batch_size=batch_size, seed=seed)
    stream = np.concatenate([loader.indices(step) for step in range(-(-3 * n // batch_size))])
    for epoch in range(3):
        assert sorted(stream[epoch * n : (epoch + 1) * n]) == list(range(n))
    parts = [Loader(dataset, batch_size=batch_size, seed=seed, host_index=h, host_count=hosts) for h in range(hosts)]
    for step in (0, 2, 7):
        whole = loader.batch(step)
        assert np.array_equal(whole.reshape(-1, 2).view("<u2").ravel(), loader.indices(step))
        assert np.array_equal(loader.batch_labels(step), loader.indices(step))
        assert np.array_equal(np.concatenate([part.batch(step) for part in parts]), whole)
        assert {len(part.batch(step)) for part in parts} == {batch_size // hosts}


def test_the_order_is_fixed_for_good():
    """These numbers are what a resumed run relies on: they must survive every release."""
    loader = Loader(numbered(10), batch_size=7, seed=3)
    script = (
        "import numpy as np; from spread_jax.data import *;"
        "d = Dataset.from_array(np.zeros((10, 1, 1, 1), np.uint8));"
        "print(Loader(d, batch_size=7, seed=3).indices(5).tolist())"
    )
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    assert other.stdout.decode().strip() == str(loader.indices(5).tolist())
    assert loader.indices(5).tolist() == [0, 4, 8, 1, 5, 8, 0]
    assert loader.indices(5).dtype == np.int64


def test_epochs_and_seeds_differ():
    loader = Loader(numbered(1000), batch_size=1000, seed=0)
    orders = [loader.indices(0), loader.indices(1), np.arange(1000)]
    orders.append(Loader(numbered(1000), batch_size=1000, seed=1).indices(0))
    for i, a in enumerate(orders):
        for b in orders[:i]:
            assert np.mean(a == b) < 0.02


def test_iterate_resumes_and_its_thread_ends_with_it():
    loader = Loader(numbered(30), batch_size=8, seed=1)
    batches = loader.iterate(start_step=5)
    for expected in range(5, 12):
        step, batch = next(batches)
        assert step == expected
        assert np.array_equal(batch, loader.batch(expected))
    assert len(loader_threads()) == 1
    batches.close()
    assert not loader_threads()
    without = Loader(numbered(30), batch_size=8, seed=1, prefetch=0).iterate(5)
    assert np.array_equal(next(without)[1], loader.batch(5))


def test_prefetching_is_bounded():
    loader = Loader(numbered(30), batch_size=8, seed=1, prefetch=2)
    asked, original, enough = [], loader.batch, threading.Event()

    def counting(step):
        asked.append(step)
        if len(asked) == 4:
            enough.set()
        return original(step)

    loader.batch = counting
    batches = loader.iterate()
    next(batches)
    assert enough.wait(5)
    # One taken, two in the queue, one in the thread's hand.
    assert not threading.Event().wait(0.2)
    assert asked == [0, 1, 2, 3]
    batches.close()


@pytest.mark.parametrize("prefetch", [0, 2])
def test_batches_are_placed_in_the_thread(prefetch):
    loader = Loader(numbered(30), batch_size=8, seed=1, prefetch=prefetch)
    threads = []

    def place(batch):
        threads.append(threading.current_thread())
        if len(threads) == 3:
            raise RuntimeError("no such device")
        return batch.tobytes()

    batches = loader.iterate(start_step=5, place=place)
    assert [next(batches) for _ in range(2)] == [(step, loader.batch(step).tobytes()) for step in (5, 6)]
    assert (threading.main_thread() in threads) == (prefetch == 0)
    with pytest.raises(RuntimeError, match="no such device"):
        next(batches)


def test_an_exception_in_the_thread_reaches_the_consumer():
    loader = Loader(numbered(30), batch_size=8, seed=1)
    original = loader.batch

    def failing(step):
        if step == 2:
            raise RuntimeError("disk gone")
        return original(step)

    loader.batch = failing
    batches = loader.iterate()
    assert [next(batches)[0], next(batches)[0]] == [0, 1]
    with pytest.raises(RuntimeError, match="disk gone"):
        next(batches)
    assert not loader_threads()


@pytest.mark.parametrize(
    ("n", "arguments", "message"),
    [
        (0, {"batch_size": 1}, "no examples"),
        (4, {"batch_size": 5}, "batch_size is 5.*only 4"),
        (4, {"batch_size": 0}, "batch_size is 0"),
        (4, {"batch_size": 3, "host_count": 2}, "host_count=2"),
        (4, {"batch_size": 2, "host_index": 2, "host_count": 2}, "host_index is 2"),
        (4, {"batch_size": 2, "seed": -1}, "seed is -1"),
    ],
)
def test_wrong_arguments(n, arguments, message):
    with pytest.raises(DatasetError, match=message):
        Loader(numbered(n), **{"seed": 0, **arguments})
