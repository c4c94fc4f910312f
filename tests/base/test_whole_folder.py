"""Files that are replaced whole or not at all."""

import os

import pytest

from ds_quant.base.whole_folder import whole_file, write_whole


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
