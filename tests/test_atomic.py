"""Files are whole or as they were, and no link or pipe is followed or waited for."""

import errno
import json
import os
import threading

import pytest

from spread_jax import _files
from spread_jax._files import (
    odd_entry,
    open_regular,
    read_json,
    read_regular,
    remove_leftovers,
    replacing,
    write_atomically,
)


def test_a_failure_leaves_what_was_there_and_has_the_name_of_the_file(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_atomically(path, "before")

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as the system says it: without a name

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=rf"No space left on device: '{path}'"):
            write_atomically(path, "after")
    for missing in (tmp_path / "none" / "file", path / "below"):
        with pytest.raises(OSError, match=rf"'{missing}'"):
            write_atomically(missing, "after")

    (tmp_path / "report.html").mkdir()
    with pytest.raises(IsADirectoryError, match=rf"Is a directory: '{tmp_path}/report\.html'$"):
        write_atomically(tmp_path / "report.html", "after")
    (tmp_path / "report.html").rmdir()

    def stopped():
        with replacing(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["results.json"]


def test_writers_at_the_same_time_do_not_mix(tmp_path):
    path = tmp_path / "page"
    texts = [str(n) * 100_000 for n in range(8)]
    threads = [threading.Thread(target=write_atomically, args=(path, text)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_text() in texts
    assert os.listdir(tmp_path) == ["page"]


def test_links_are_replaced_and_names_cannot_be_foreseen(tmp_path, monkeypatch):
    secret = tmp_path / "secret"
    secret.write_text("mine")
    (tmp_path / "report.html").symlink_to(secret)
    write_atomically(tmp_path / "report.html", "page \udcff")  # of a name that is no UTF-8
    assert (tmp_path / "report.html").read_text() == "page \\udcff"
    assert not (tmp_path / "report.html").is_symlink()
    monkeypatch.setattr(_files.secrets, "token_hex", lambda n: "0" * 16)  # had it been foreseen
    (tmp_path / f".spread_jax-{'0' * 16}.part").symlink_to(secret)
    with pytest.raises(FileExistsError):
        write_atomically(tmp_path / "report.html", "another")
    assert secret.read_text() == "mine"


def test_what_is_left_over_and_nothing_else_is_removed(tmp_path):
    mine = [".spread_jax-notes.part", ".spread_jax-0123456789abcdef.part.txt", "x.spread_jax-0123456789abcdef.part"]
    for name in (*mine, ".spread_jax-0123456789abcdef.part"):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(mine)


def test_only_regular_files_are_read(tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "pipe")
    assert read_regular(tmp_path / "file") == b"content"
    for name, flags in ((n, f) for n in ("link", "pipe") for f in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR | os.O_CREAT)):
        with pytest.raises(OSError, match=r"it is a symbolic link|it is neither a file nor a folder"):
            open_regular(tmp_path / name, flags)
    with pytest.raises(OSError, match="it holds more than 6 bytes"):
        read_regular(tmp_path / "file", most=6)
    with pytest.raises(IsADirectoryError):
        read_regular(tmp_path)
    assert odd_entry(tmp_path).name in ("link", "pipe")
    (tmp_path / "link").unlink()
    (tmp_path / "pipe").unlink()
    (tmp_path / "kept" / "deep").mkdir(parents=True)
    (tmp_path / "kept" / "deep" / "link").symlink_to("x")
    assert odd_entry(tmp_path, skip="kept") is None
    assert odd_entry(tmp_path) == tmp_path / "kept" / "deep" / "link"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "Expecting value"),
        (b"\xff", "no UTF-8"),
        (b"[1]", "holds no mapping"),
        (b"[" * 50_000, "nested too deeply"),
        (b'{"a":' * 101 + b"1" + b"}" * 101, "nested too deeply"),
    ],
)
def test_json_of_strangers(tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text(json.dumps({"a": [{"b": 1}]}))
    assert read_json(tmp_path / "config.json") == {"a": [{"b": 1}]}
