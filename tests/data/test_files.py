"""Folders and zips: what is found, which split it goes to, and what is refused."""

from __future__ import annotations

import functools
import operator
import os
import subprocess
import time
import zipfile

import numpy as np
import pytest

from spread_jax.data import DatasetError, files, open_dataset
from spread_jax.data.files import assign_splits, list_folder, list_zip, split_folders


def make_zip(path, members: dict[str, bytes], compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def test_a_zip_and_its_folder_give_the_same_images(photos, tmp_path):
    zipped = make_zip(tmp_path / "photos.zip", {f.name: f.read_bytes() for f in photos.iterdir()})
    for split in ("train", "validation", "test"):
        a, b = (open_dataset(path, split, image_size=9) for path in (photos, zipped))
        assert np.array_equal(a.images, b.images)
    renamed = zipped.rename(tmp_path / "photos.data")  # known by its content
    assert np.array_equal(open_dataset(renamed, "test", image_size=9).images, a.images)


def test_searched_to_the_bottom_and_other_files_passed_over(photos, picture):
    deep = photos / "more" / "and more"
    deep.mkdir(parents=True)
    (deep / "deep.JPEG").write_bytes(picture(20, kind="JPEG"))
    (photos / "__MACOSX").mkdir()
    for name in ("README.md", ".DS_Store", "Thumbs.db", "._0.png", "__MACOSX/0.png"):
        (photos / name).write_bytes(b"no image")
    assert sorted(list_folder(photos).stamps) == sorted([*(f"{n}.png" for n in range(10)), "more/and more/deep.JPEG"])


def test_a_zip_with_other_files(tmp_path, picture):
    names = ["a/1.png", "a/README", "__MACOSX/a/._1.png", "a/.DS_Store", "a/.hidden/2.png"]
    zipped = make_zip(tmp_path / "x.zip", dict.fromkeys(names, picture()))
    assert list(list_zip(zipped).stamps) == ["a/1.png"]


# Splits ---------------------------------------------------------------------------------------


def test_splits_by_name_cover_all_and_no_file_moves_when_others_come(tmp_path):
    names = [f"{n:06d}.jpg" for n in range(4000)]
    before, after = assign_splits(names[::2], tmp_path), assign_splits(names, tmp_path)
    assert sorted(functools.reduce(operator.iadd, after.values(), [])) == names
    for split, share in (("train", 0.9), ("validation", 0.05), ("test", 0.05)):
        assert set(before[split]) <= set(after[split])
        # Six standard deviations of a binomial count.
        assert abs(len(after[split]) - 4000 * share) < 6 * np.sqrt(4000 * share * (1 - share))


@pytest.mark.parametrize("n", [3, 4, 7])
def test_a_small_set_has_no_empty_split(n, tmp_path):
    names = [f"{k}.png" for k in range(n)]
    splits = assign_splits(names, tmp_path)
    assert all(splits.values())
    assert sorted(functools.reduce(operator.iadd, splits.values(), [])) == names
    assert splits == assign_splits(names[::-1], tmp_path)


@pytest.mark.parametrize("top", ["", "mydata/"])
@pytest.mark.parametrize("word", ["validation", "val", "Valid"])
def test_folders_named_after_splits(top, word, tmp_path):
    names = [f"{top}{folder}/cat/{k}.png" for folder in ("Train", word, "test") for k in range(3)]
    splits = assign_splits(names, tmp_path)
    for folder, split in (("Train", "train"), (word, "validation"), ("test", "test")):
        assert splits[split] == [f"{top}{folder}/cat/{k}.png" for k in range(3)]


def test_train_and_test_folders_only(tmp_path):
    names = [f"{folder}/{k}.png" for folder in ("train", "test") for k in range(500)]
    splits = assign_splits(names, tmp_path)
    assert len(splits["test"]) == 500
    assert 20 < len(splits["validation"]) < 85
    assert all(name.startswith("train/") for name in splits["train"] + splits["validation"])


def test_classes_are_not_splits(tmp_path):
    names = [f"{folder}/{k}.png" for folder in ("exam", "test") for k in range(200)]
    assert {name.split("/")[0] for name in assign_splits(names, tmp_path)["train"]} == {
        "exam",
        "test",
    }


def test_images_beside_split_folders_are_not_dropped_silently(tmp_path):
    with pytest.raises(DatasetError, match=r"folder named train.*lone\.png"):
        assign_splits(["train/0.png", "test/0.png", "lone.png"], tmp_path)


@pytest.mark.parametrize(
    "folders",
    [
        ("training", "testing"),
        ("Train_Set", "val-set", "Tests"),
        ("train2017", "val2017", "test2017"),
        ("train_images", "dev", "test images"),
        ("TrainData", "validate", "testdata"),
        ("trainA", "testA"),
    ],
)
def test_folders_named_like_splits(folders, tmp_path):
    names = [f"{folder}/{k}.png" for folder in folders for k in range(40)]
    splits = assign_splits(names, tmp_path)
    assert splits["test"] == sorted(name for name in names if name.startswith(folders[-1]))
    assert {name.split("/")[0] for name in splits["train"]} == {folders[0]}
    assert splits["validation"]
    assert sum(map(len, splits.values())) == len(names)


def test_folders_of_splits_below_those_of_classes(tmp_path):
    """cats/train, dogs/train: what is in cats/test is not trained on."""
    names = [f"{kind}/{split}/{k}.png" for kind in ("cats", "dogs") for split in ("train", "test") for k in range(20)]
    for prefix in ("", "all/"):  # a common folder above
        splits = assign_splits([prefix + name for name in names], tmp_path)
        assert splits["test"] == sorted(prefix + name for name in names if "/test/" in name)
        assert {name.removeprefix(prefix).split("/")[1] for name in splits["train"] + splits["validation"]} == {"train"}
    with pytest.raises(DatasetError, match=r"folder named train, but 1 images lie outside .*birds/0\.png"):
        split_folders([*names, "birds/0.png"], tmp_path)
    assert split_folders([name.replace("train", "old") for name in names], tmp_path) is None


@pytest.mark.parametrize("folder", ["contest", "trainer", "valley", "testimony", "train_station", "evaluate"])
def test_other_words_are_no_splits(folder, tmp_path):
    assert split_folders([f"{folder}/{k}.png" for k in range(4)] + ["cat/0.png"], tmp_path) is None


def test_pictures_of_other_kinds_are_told_of_once(tmp_path, own_cache, picture):
    folder = tmp_path / "photos"
    folder.mkdir()
    for n, name in enumerate(("a.jfif", "b.JPE", "c.jpg", "d.jpeg")):
        (folder / name).write_bytes(picture(n, kind="JPEG"))
    for name in ("1.heic", "2.HEIC", "3.avif", "notes.txt"):
        (folder / name).write_bytes(b"")
    zipped = make_zip(tmp_path / "photos.zip", {path.name: path.read_bytes() for path in folder.iterdir()})
    for path in (folder, zipped):
        messages = []
        report = lambda message, done, total, to=messages: message and to.append(message)
        found = [len(open_dataset(path, split, image_size=4, progress=report)) for split in ("train", "test")]
        assert found == [2, 1]
        assert messages == ["1 .avif and 2 .heic files are skipped: convert them to JPEG or PNG to use them"]
    for path in folder.glob("[a-d]*"):
        path.unlink()
    with pytest.raises(DatasetError, match=r"holds no image files: .*\. 1 \.avif and 2 \.heic files are skipped"):
        open_dataset(folder)


def test_an_empty_split(tmp_path, picture):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "train").mkdir()
    (tmp_path / "one" / "train" / "0.png").write_bytes(picture())
    with pytest.raises(DatasetError, match=r"The test split of folder .*one is empty"):
        open_dataset(tmp_path / "one", "test")


# Refusals -------------------------------------------------------------------------------------


def test_missing_path_and_unknown_name(tmp_path):
    with pytest.raises(DatasetError, match=r"'mnst' is neither.*faces, digits, celeb_a, mnist"):
        open_dataset("mnst")
    with pytest.raises(DatasetError, match=f"{tmp_path}/nowhere"):
        open_dataset(tmp_path / "nowhere")
    with pytest.raises(DatasetError, match="neither"):
        open_dataset("")


def test_empty_folder_and_zip_and_other_file(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "README").write_text("x")
    with pytest.raises(DatasetError, match=r"empty holds no image files.*jpg"):
        open_dataset(tmp_path / "empty")
    with pytest.raises(DatasetError, match=r"none\.zip holds no image files"):
        open_dataset(make_zip(tmp_path / "none.zip", {"README": b""}))
    (tmp_path / "empty" / "photos.zip").touch()
    with pytest.raises(DatasetError, match=r"empty holds no image files.* Pass its photos\.zip, or extract it\."):
        open_dataset(tmp_path / "empty")
    (tmp_path / "notes.txt").write_text("notes")
    with pytest.raises(DatasetError, match=r"notes\.txt is a single file"):
        open_dataset(tmp_path / "notes.txt")


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_truncated_zip(tmp_path, photos, keep):
    path = make_zip(tmp_path / "cut.zip", {f.name: f.read_bytes() for f in photos.iterdir()})
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(DatasetError, match=r"cut\.zip is not a whole zip"):
        open_dataset(path)


def test_a_zip_damaged_inside(tmp_path, picture):
    members = {f"{n}.png": picture(n) for n in range(3)}
    path = make_zip(tmp_path / "bad.zip", members, zipfile.ZIP_STORED)
    data = bytearray(path.read_bytes())
    for member in members.values():
        data[data.find(member) + 200] ^= 255
    path.write_bytes(bytes(data))
    with pytest.raises(DatasetError, match=r"\.png of .*bad\.zip cannot be read.*CRC"):
        open_dataset(path)


@pytest.mark.parametrize("name", ["../x.png", "a/../../x.png", "/etc/x.png", "C:/x.png", "..\\x.png"])
def test_zip_members_that_point_outside(tmp_path, picture, name):
    path = make_zip(tmp_path / "evil.zip", {"ok.png": picture(), name: picture()})
    with pytest.raises(DatasetError, match=r"evil\.zip has a member named.*outside"):
        open_dataset(path)


def test_a_member_too_large_for_an_image(tmp_path, monkeypatch):
    assert files.MAX_BYTES == 256 * 1024 * 1024
    monkeypatch.setattr(files, "MAX_BYTES", 5000)
    path = make_zip(tmp_path / "large.zip", {"0.png": bytes(5001)})
    with pytest.raises(DatasetError, match=r"0\.png of .* unpacks to 5,001 bytes"):
        open_dataset(path)


def test_symbolic_links(photos, tmp_path, picture):
    (photos / "sub").mkdir()
    (photos / "sub" / "in.png").symlink_to(photos / "0.png")
    (photos / "sub" / "up").symlink_to(photos)  # a circle, not followed for ever
    (photos / "again").symlink_to(photos / "sub")  # each folder is found once, under its own name
    (photos / ".pool").mkdir()
    (photos / ".pool" / "deep.png").write_bytes(picture(30))
    (photos / "pool").symlink_to(photos / ".pool")  # or that of a link, if its own is hidden
    assert list(list_folder(photos).stamps) == [*(f"{n}.png" for n in range(10)), "pool/deep.png", "sub/in.png"]

    outside = tmp_path / "outside.png"
    outside.write_bytes(picture())
    for link, target in (("link.png", outside), ("folder", tmp_path)):
        (photos / link).symlink_to(target)
        with pytest.raises(DatasetError, match=f"{link} is a symbolic link to .*outside"):
            list_folder(photos)
        (photos / link).unlink()
    (photos / "gone.png").symlink_to(photos / "nothing.png")
    with pytest.raises(DatasetError, match=r"gone\.png is a symbolic link.*does not exist"):
        list_folder(photos)
    (photos / "gone.png").unlink()
    (photos / "self.png").symlink_to(photos / "self.png")
    with pytest.raises(DatasetError, match=r"self\.png is a symbolic link"):
        list_folder(photos)


def test_names_that_are_no_utf8(tmp_path, picture):
    folder = tmp_path / os.fsdecode(b"ph\xffotos")
    folder.mkdir()
    for n in range(4):
        (folder / os.fsdecode(b"\xe9%d.png" % n)).write_bytes(picture(n))
    first = open_dataset(folder, image_size=4, progress=lambda *_: None)
    assert len(first) == 2
    again = []
    assert len(open_dataset(folder, image_size=4, progress=lambda *call: again.append(call))) == 2
    assert again == []


def test_many_links_and_deep_folders_take_linear_time(photos, picture):
    """Every order of eight linked folders would be 100,000 paths; a folder in each of 1,500 is beyond the stack."""
    for n in range(8):
        (photos / f"f{n}").mkdir()
        for m in range(8):
            (photos / f"f{n}" / f"l{m}").symlink_to(photos / f"f{m}")
    began = time.monotonic()
    assert len(list_folder(photos).stamps) == 10
    assert time.monotonic() - began < 2
    deep = photos.joinpath(*["d"] * 1500)
    try:
        for parent in reversed([deep, *list(deep.parents)[:1499]]):
            parent.mkdir()
        (deep / "deep.png").write_bytes(picture())
        assert len(list_folder(photos).stamps) == 11
    finally:
        subprocess.run(["rm", "-r", photos / "d"], check=True)  # Python's own way is as deep as the stack


def test_a_pipe_does_not_hang(photos):
    os.mkfifo(photos / "pipe.png")
    with pytest.raises(DatasetError, match=r"pipe\.png is neither a file nor a folder"):
        list_folder(photos)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "dev"}, "split is 'dev'"),
        ({"channels": 4}, "channels is 4"),
        ({"image_size": 0}, "image_size is 0"),
        ({"crop": -1}, "crop is -1"),
        ({"max_examples": 0}, "max_examples is 0"),
        ({"crop": 17}, r"\d\.png is 20x16 .*17x17.*crop=16"),
    ],
)
def test_wrong_arguments(photos, arguments, message):
    with pytest.raises(DatasetError, match=message):
        open_dataset(photos, **arguments)
