"""Files that are replaced whole or not at all."""

import os

import pytest

from ds_quant.base.whole_folder import replace_folder, whole_file, write_whole


@pytest.mark.parametrize("fails", ["fsync", "replace", "the writer"])
def test_a_file_that_could_not_be_written_leaves_the_old_one(tmp_path, monkeypatch, fails):
    path = tmp_path / "summary.json"
    path.write_text("old")

    def full(*args):
        raise OSError(28, "No space left on device")

    def write(beside):
        beside.write_text("new")
        if fails == "the writer":
            full()

    if fails != "the writer":
        monkeypatch.setattr(os, fails, full)
    with pytest.raises(OSError, match="No space left"), whole_file(path) as beside:
        write(beside)
    assert [(found.name, found.read_text()) for found in tmp_path.iterdir()] == [("summary.json", "old")]


def test_text_and_bytes_replace_a_file(tmp_path):
    path = tmp_path / "out"
    write_whole(path, "\u00e4")
    assert path.read_bytes() == b"\xc3\xa4"
    write_whole(path, b"\x00")
    assert [(found.name, found.read_bytes()) for found in tmp_path.iterdir()] == [("out", b"\x00")]


@pytest.fixture
def flushed(monkeypatch):
    """Names of what was flushed to the disk, in order, up to ".tmp"."""
    names, fsync = [], os.fsync

    def record(number):
        path = os.readlink(f"/proc/self/fd/{number}")
        names.append(os.path.basename(path).split(".tmp")[0])
        fsync(number)

    monkeypatch.setattr(os, "fsync", record)
    return names


def test_only_caches_do_not_wait_for_the_disk(tmp_path, flushed):
    write_whole(tmp_path / "cache", "text", durable=False)
    assert flushed == []
    write_whole(tmp_path / "file", "text")
    assert len(flushed) == 2
    assert flushed[0].startswith(".file.")
    assert flushed[1] == tmp_path.name


def test_a_folder_is_replaced_by_one_that_is_on_the_disk(tmp_path, flushed):
    old, new = tmp_path / "model", tmp_path / ".model.tmp"
    old.mkdir()
    (old / "old").write_text("old")
    (new / "inner").mkdir(parents=True)
    (new / "a").write_text("a")
    (new / "inner" / "b").write_text("b")
    replace_folder(new, old)
    assert sorted(flushed) == sorted(["a", "b", "inner", ".model", tmp_path.name])
    assert flushed[-1] == tmp_path.name
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert sorted(str(path.relative_to(old)) for path in old.rglob("*")) == ["a", "inner", "inner/b"]
