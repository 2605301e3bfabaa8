"""Whatever bytes come in, what comes out is data or one of the library's own errors."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import struct
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spread_jax.cli import runs
from spread_jax.data import DatasetError, celeb_a, celeb_a_builder, idx
from spread_jax.data.files import list_zip
from spread_jax.data.images import Transform, decode_image, quiet_pillow
from spread_jax.errors import UsageError
from spread_jax.evaluation import write_report
from spread_jax.models import DeltaVae, SpreadGan, open_run
from spread_jax.models._saved import to_json
from spread_jax.training import Checkpointer, CheckpointError, RunDirectory, RunDirectoryError, _seal, read_run

CHAOS = bool(os.environ.get("SPREAD_JAX_CHAOS"))


def fuzz(count):
    """So many examples, always the same ones; ten times as many and others each time in the long form."""
    return settings(
        max_examples=10 * count if CHAOS else count,
        derandomize=not CHAOS,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


edits = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6)
cuts = st.one_of(st.just(1.0), st.floats(0, 1))


def mutate(data, edits, cut):
    """Some bytes changed, more of them near the beginning, where headers are; the end cut off."""
    data = bytearray(data)
    for place, value in edits if data else ():
        data[int(place**3 * len(data))] = value
    return bytes(data[: round(cut * len(data))])


# --- images and archives ---


@pytest.fixture(scope="module")
def pictures():
    image_module = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (12, 10, 4), np.uint8)
    found = []
    for kind, image in (
        ("PNG", image_module.fromarray(pixels)),
        ("PNG", image_module.fromarray(pixels[..., 0])),
        ("JPEG", image_module.fromarray(pixels[..., :3])),
        ("GIF", image_module.fromarray(pixels[..., 0])),
        ("BMP", image_module.fromarray(pixels[..., :3])),
        ("TIFF", image_module.fromarray(pixels[..., :3])),
        ("WEBP", image_module.fromarray(pixels[..., :3])),
        ("PPM", image_module.fromarray(pixels[..., :3])),
    ):
        file = io.BytesIO()
        image.save(file, kind)
        found.append(file.getvalue())
    return found


def test_images(pictures, tally):
    def check(data, channels):
        with contextlib.suppress(DatasetError):
            image = decode_image(data, Transform(6, None, channels), "here.png")
            assert image.shape == (6, 6, channels)
            assert image.dtype == np.uint8

    @fuzz(120)
    @given(st.one_of(st.sampled_from(pictures), st.binary(max_size=60)), edits, cuts, st.sampled_from([1, 3]))
    def decode(data, edits, cut, channels):
        tally("fuzzed image", check, mutate(data, edits, cut), channels)

    with quiet_pillow():
        decode()


def test_idx_files(tmp_path, tally):
    path = tmp_path / "file"

    def check():
        with contextlib.suppress(DatasetError):
            values = idx.read_idx(path)
            assert values.dtype.isnative
        with contextlib.suppress(DatasetError):
            idx.idx_source(path, "train", None, None, None).read(0, 1)

    sizes = st.one_of(st.integers(0, 4), st.integers(0, 2**32 - 1))

    @fuzz(150)
    @given(st.integers(0, 16), st.lists(sizes, max_size=5), st.binary(max_size=40), st.booleans(), edits, cuts)
    def read(code, shape, values, zipped, edits, cut):
        data = bytes([0, 0, code, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + values
        data = gzip.compress(data) if zipped else data
        path.write_bytes(mutate(data, edits, cut))
        tally("fuzzed idx file", check)

    read()


def test_archives(pictures, tmp_path, tally):
    path = tmp_path / "file.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(3):
            archive.writestr(f"train/{number}.png", pictures[0])
    whole = path.read_bytes()

    def check():
        with contextlib.suppress(DatasetError):
            listing = list_zip(path)
            try:
                for name in listing.stamps:
                    listing.read(name)
            finally:
                listing.close()

    @fuzz(150)
    @given(st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)), max_size=4), cuts)
    def read(edits, cut):
        data = bytearray(whole)
        for place, value in edits:
            data[place] = value
        path.write_bytes(data[: round(cut * len(data))])
        tally("fuzzed zip", check)

    read()


def test_split_lists(tmp_path, tally):
    path = tmp_path / "list.txt"

    def check():
        with contextlib.suppress(DatasetError):
            assert celeb_a.read_partition(path)
        with contextlib.suppress(DatasetError):
            assert celeb_a_builder._read_attributes(path)

    @fuzz(60)
    @given(st.one_of(st.binary(max_size=60), st.text("0123,. \n\tajpg", max_size=60).map(str.encode)))
    def read(data):
        path.write_bytes(data)
        tally("fuzzed list of splits", check)

    read()


# --- run folders ---

json_values = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.just(10**400), st.just("\x1b[2J")
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)),
    max_leaves=6,
)
DEEP = "[" * 50_000
NESTED = '{"a":' * 400 + "1" + "}" * 400


def test_run_folders(tmp_path, tally):
    """config.json, results.json and metrics.jsonl of any content."""
    told = st.dictionaries(st.sampled_from(["caption", "section", "grid", "real_images"]), json_values)
    figures = st.dictionaries(st.sampled_from(["a.png", "b.png", "\x1b"]), st.one_of(told, json_values))
    known = st.fixed_dictionaries({}, optional=dict.fromkeys(("seed", "steps", "preset", "evaluation"), json_values))
    texts = st.one_of(
        known.map(json.dumps), json_values.map(json.dumps), st.text(max_size=20), st.sampled_from([DEEP, NESTED])
    )
    lines = st.fixed_dictionaries({}, optional={"step": json_values, "loss": json_values}).map(json.dumps)
    folder = tmp_path / "run"
    folder.mkdir()

    def check():
        reopen = lambda: RunDirectory.reopen(folder)
        for use in (reopen, lambda: RunDirectory.open(folder, {"seed": 0}, tensorboard=False)):
            with contextlib.suppress(RunDirectoryError), use() as run:
                assert run.results is None or isinstance(run.results, dict)
                with contextlib.suppress(RunDirectoryError):
                    assert type(run.finished_steps) is int
                run.truncate_metrics(3)
                run.log_metrics(4, {"loss": 0.5})
                assert run.read_metrics()[-1]["step"] == 4
        with contextlib.suppress(RunDirectoryError):
            assert type(read_run(folder).last_step) in (int, type(None))
        write_report(folder)
        (row,) = runs.find(tmp_path)
        assert all(cell.isprintable() for cell in row)

    @fuzz(80)
    @given(
        texts,
        texts,
        st.one_of(st.lists(lines, max_size=3).map("\n".join), st.just(DEEP + "\n")),
        st.one_of(figures.map(json.dumps), texts),
        st.text(max_size=30),
    )
    def use(config, results, metrics, figures, table):
        names = ("config.json", "results.json", "metrics.jsonl", "figures.json", "table.md", "a.png")
        for name, text in zip(names, (config, results, metrics, figures, table, table), strict=True):
            (folder / name).write_text(text, encoding="utf-8", errors="surrogatepass")
        tally("fuzzed run folder", check)

    use()


def leaves_of(value, path=()):
    """Every path into a JSON mapping."""
    for name, inner in value.items() if isinstance(value, dict) else ():
        yield (*path, name)
        yield from leaves_of(inner, (*path, name))


def replaced(value, path, new):
    return {**value, path[0]: new if len(path) == 1 else replaced(value[path[0]], path[1:], new)}


def test_settings_of_a_run(tmp_path, tally):
    """A foreign config.json as sampling and evaluation load it: every setting of every type."""
    path = tmp_path / "config.json"
    whole = [
        {"seed": 0, "method": to_json(method), "data_fingerprint": "0"}
        for method in (DeltaVae(width=2, latent_dim=2, image_shape=(16, 16, 1)), SpreadGan(image_shape=(16, 16, 1)))
    ]
    places = [(n, place) for n, config in enumerate(whole) for place in leaves_of(config)]
    path.write_text(json.dumps(whole[0]))
    with pytest.raises(UsageError, match="has no checkpoint yet"):
        open_run(tmp_path)

    def check():
        with pytest.raises(UsageError, match=r"is not the config of a run|has no checkpoint yet"):
            open_run(tmp_path)

    odd = st.one_of(json_values, st.just([64, 64]), st.just([64, "64", 3]), st.just(-1), st.just(2**70))

    @fuzz(150)
    @given(st.sampled_from(places), odd)
    def load(place, value):
        path.write_text(json.dumps(replaced(whole[place[0]], place[1], value)))
        tally("fuzzed settings", check)

    load()
    for text in ("", "[1]", "{}", DEEP, NESTED, '{"method": {"name": "delta_vae"}}'):
        path.write_text(text)
        with pytest.raises(UsageError, match="is not the config of a run"):
            open_run(tmp_path)


# --- checkpoints ---


def replace_somewhere(value, place, new):
    """A copy of a JSON value with one of its parts, counted in order, replaced."""
    count = 0

    def walk(part):
        nonlocal count
        count += 1
        if count - 1 == place:
            return new
        if isinstance(part, dict):
            return {k: walk(v) for k, v in part.items()}
        if isinstance(part, list):
            return [walk(v) for v in part]
        return part

    return walk(value)


def test_forged_seals(tmp_path, tally):
    """A seal changed anywhere and sealed again: refused with a sentence, or what was saved comes back."""
    state = {"w": jnp.arange(6.0).reshape(2, 3), "key": jax.random.key(3), "n": 7}
    folder = tmp_path / "steps"
    with Checkpointer(folder) as checkpointer:
        checkpointer.save(2, state, metrics={"bound": 1.0})
    path = folder / "2" / _seal.SEAL
    whole = path.read_bytes()
    content = json.loads(whole)["content"]
    likely = st.sampled_from(["key", "float64", "fry", "../../etc", [2, 3], [-1], [2**40], 0, 1, {}])
    values = st.one_of(json_values, likely)

    def check(checkpointer):
        try:
            checkpointer.sound_steps()
            assert checkpointer.latest_step in (None, 2)
            restored = checkpointer.restore(state)
        except CheckpointError:
            pass
        else:
            assert restored.step == 2
            np.testing.assert_array_equal(restored.state["w"], state["w"])
            assert restored.state["n"] == 7
        for aside in folder.glob("2.unsound*"):
            os.rename(aside, folder / "2")

    with Checkpointer(folder, best_metric="bound", log=lambda _: None) as checkpointer:

        @fuzz(120)
        @given(st.integers(0, 120), values)
        def restore(place, new):
            forged = replace_somewhere(content, place, new)
            outer = {"content": forged, "digest": _seal.digest_of(forged)}
            path.write_text(_seal.seal_text(outer))
            tally("forged seal", check, checkpointer)

        restore()
        for impl in ("key", "philox2x32", "rbg", 3):  # of other words, or of as many
            forged = {**content, "leaves": {**content["leaves"], "key": {**content["leaves"]["key"], "impl": impl}}}
            path.write_text(_seal.seal_text({"content": forged, "digest": _seal.digest_of(forged)}))
            with pytest.raises(CheckpointError):
                checkpointer.restore(state)
            for aside in folder.glob("2.unsound*"):
                os.rename(aside, folder / "2")
        for data in (b"", b"\xff\xfe", DEEP.encode(), b'{"content": {}, "digest": 3}'):
            path.write_bytes(data)
            tally("forged seal", check, checkpointer)
        path.write_bytes(whole)
        assert checkpointer.restore(state).step == 2
