"""The lock of a killed build: DeepSpeed would wait for it for ever, without a word."""

import os
import subprocess
import sys
import threading
import time

import pytest
from torch.utils import cpp_extension

import ds_quant
from ds_quant.config import ConfigError
from ds_quant.engine import extension_locks
from ds_quant.engine.extension_locks import STALE_SECONDS, check_extension_locks

OPS = {"deepspeed_shm_comm", "fused_adam"}


@pytest.fixture(autouse=True)
def files_are_locks(monkeypatch):
    """As torch has it up to 2.13, whichever is installed."""
    monkeypatch.setattr(extension_locks, "FILES_ARE_LOCKS", True)


@pytest.fixture
def lock(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    path = tmp_path / "deepspeed_shm_comm" / "lock"
    path.parent.mkdir()
    path.touch()
    return path


def make_old(path):
    old = time.time() - STALE_SECONDS - 5
    for entry in (path, path.parent):
        os.utime(entry, (old, old))


def test_a_stale_lock_is_named_with_its_fix(lock):
    make_old(lock)
    with pytest.raises(ConfigError, match=f"{lock}: got a lock that no process holds.*fix: rm {lock}"):
        check_extension_locks(OPS)
    with pytest.raises(ConfigError, match="rm "):
        ds_quant.enable()
    lock.unlink()
    check_extension_locks(OPS)


def test_files_stay_where_they_are_no_locks(lock, monkeypatch):
    make_old(lock)
    monkeypatch.setattr(extension_locks, "FILES_ARE_LOCKS", False)
    check_extension_locks(OPS)


@pytest.mark.slow
def test_torch_itself_leaves_nothing_that_is_refused(tmp_path, monkeypatch):
    """Whichever torch is installed: after a build of its own."""
    monkeypatch.undo()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    source = "#include <torch/extension.h>\nPYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {}\n"
    cpp_extension.load_inline("fused_adam", source)
    lock = tmp_path / "fused_adam" / "lock"
    assert lock.exists() != extension_locks.FILES_ARE_LOCKS
    if lock.exists():
        make_old(lock)
    check_extension_locks(OPS)


def test_a_lock_that_somebody_holds_is_a_build(lock):
    program = "import sys; f = open(sys.argv[1]); print('open', flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", program, lock]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as builder:
        builder.stdout.readline()
        make_old(lock)
        check_extension_locks(OPS)
        builder.stdin.close()
        builder.wait()
        with pytest.raises(ConfigError):
            check_extension_locks(OPS)


def test_other_peoples_extensions_are_none_of_our_business(lock):
    make_old(lock)
    check_extension_locks({"fused_adam"})


def test_a_fresh_lock_may_be_another_hosts(lock, monkeypatch):
    said = []
    timer = threading.Timer(1.5, lock.unlink)
    timer.start()
    check_extension_locks(OPS, said.append)
    assert len(said) == 1
    assert str(lock) in said[0]
    lock.touch()
    monkeypatch.setattr(extension_locks, "STALE_SECONDS", 0.2)
    with pytest.raises(ConfigError, match="no process holds"):
        check_extension_locks(OPS)


def test_the_default_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    check_extension_locks(OPS)
    lock = tmp_path / "torch_extensions" / "py311_cpu" / "fused_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    make_old(lock)
    with pytest.raises(ConfigError, match="py311_cpu/fused_adam/lock"):
        check_extension_locks(OPS)
