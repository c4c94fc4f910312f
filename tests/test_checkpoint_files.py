import os

import pytest
import torch

from ds_quant.checkpoint_files import check_files
from ds_quant.config import ConfigError


@pytest.fixture
def paths(tmp_path):
    found = [str(tmp_path / f"{name}.pt") for name in ("a", "b", "c")]
    for path in found:
        torch.save({"exp_avg": torch.arange(1000)}, path)
    return found


def test_whole_files_pass(paths):
    check_files(paths)
    check_files(iter(paths))
    check_files([])


def test_each_file_that_is_missing_or_cut_is_named(paths):
    missing, cut, good = paths
    os.remove(missing)
    size = os.path.getsize(cut)
    for length in (size - 1, size // 2, 0):
        os.truncate(cut, length)
        with pytest.raises(ConfigError) as caught:
            check_files([missing, cut, good])
        lines = str(caught.value).splitlines()
        assert len(lines) == 2
        assert lines[0].startswith(
            f'{missing}: got "no such file"; allowed: the moments of this rank; remedy: load another'
        )
        assert "ds_to_universal" in lines[0]
        assert lines[1].startswith(f'{cut}: got "a file of {length} bytes that ends too early')
        assert lines[1].endswith("remedy: load another tag, or copy the checkpoint again")


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        check_files([str(tmp_path)])


def test_tensors_are_not_read(paths, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("the file was loaded"))
    check_files(paths)
