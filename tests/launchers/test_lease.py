"""Who may write into an output folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT
from survival import lease
from survival.errors import Fenced, LaunchError
from survival.lease import Lease


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


def owned_elsewhere(folder: Path, **changes: object) -> Path:
    """The lease of a process on another machine."""
    path = folder / ".lease-3"
    owner = {"host": "elsewhere", "boot": "x", "pid": 1, "job_id": "5", "restart_count": 0, "beat": "a"}
    path.write_text(json.dumps(owner | changes))
    return path


def test_a_folder_that_was_given_back_is_free_at_once(tmp_path: Path) -> None:
    first = Lease.acquire(tmp_path / "out", patience=0)
    assert first.generation == 1
    first.writing.mkdir()
    first.check()
    first.release()
    assert not first.writing.exists()
    begin = time.monotonic()
    second = Lease.acquire(tmp_path / "out", patience=30)
    assert time.monotonic() - begin < 5
    assert second.generation == 2
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lease-2"]


def test_the_one_before_is_fenced_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    old = Lease.acquire(tmp_path, patience=0)
    old.keep_alive()
    (old.writing / "checkpoint-5").mkdir(parents=True)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    new = Lease.acquire(tmp_path, patience=0)
    assert old.lost()
    assert not new.lost()
    with pytest.raises(Fenced, match=r"was taken over by another job \(job 12, process \d+ on"):
        old.check()
    with pytest.raises(FileNotFoundError):
        os.replace(old.writing / "checkpoint-5", tmp_path / "checkpoint-5")
    (old.writing / "checkpoint-6").mkdir(parents=True)  # begun before the take-over was noticed
    before = (tmp_path / ".lease-2").read_text()
    old.release()
    assert not old.writing.exists()
    assert (tmp_path / ".lease-2").read_text() == before
    (old.writing / "checkpoint-7").mkdir(parents=True)  # by a process that then died
    # Generations go on: the one before must not come to own a later lease of its own number.
    new.release()
    assert [path.name for path in tmp_path.iterdir()] == [".lease-2"]
    Lease.acquire(tmp_path, patience=0)
    assert old.lost()
    assert new.lost()


def test_a_higher_generation_fences_though_the_own_file_is_still_there(tmp_path: Path) -> None:
    own = Lease.acquire(tmp_path, patience=0)
    (tmp_path / ".lease-2").write_text("{}")
    assert (tmp_path / ".lease-1").exists()
    with pytest.raises(Fenced):
        own.check()


def test_a_dead_owner_on_this_machine_is_known_to_be_dead(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    first = Lease.acquire(tmp_path, patience=0)
    owner = json.loads((tmp_path / ".lease-1").read_text()) | {"pid": child.pid}
    (tmp_path / ".lease-1").write_text(json.dumps(owner))
    assert Lease.acquire(tmp_path, patience=60).generation == 2
    assert first.lost()


def test_a_silent_owner_elsewhere_is_waited_for_and_then_replaced(tmp_path: Path) -> None:
    owned_elsewhere(tmp_path)
    said: list[str] = []
    begin = time.monotonic()
    assert Lease.acquire(tmp_path, patience=1.0, say=said.append).generation == 4
    assert time.monotonic() - begin >= 1.0
    assert "job 5, process 1 on elsewhere" in said[0]


@pytest.mark.parametrize("restart_count", [0, 1])
def test_a_living_owner_elsewhere_refuses_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restart_count: int
) -> None:
    # The same job without a higher count is an accident as well: two steps of one job.
    monkeypatch.setenv("SLURM_JOB_ID", "5")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    path = owned_elsewhere(tmp_path, restart_count=restart_count)
    if restart_count == 0:
        assert Lease.acquire(tmp_path, patience=60).generation == 4, "started again by Slurm: it is ours"
        return
    beat = threading.Timer(0.5, lambda: owned_elsewhere(tmp_path, restart_count=restart_count, beat="b"))
    beat.start()
    with pytest.raises(LaunchError, match="is writing there, and two jobs in one folder"):
        Lease.acquire(tmp_path, patience=30, say=lambda _: None)
    beat.join()
    assert path.exists()
    assert not (tmp_path / ".lease-4").exists()


def test_a_lease_that_cannot_be_read_is_no_reason_to_stop(tmp_path: Path) -> None:
    (tmp_path / ".lease-8").write_text("{half")
    assert Lease.acquire(tmp_path, patience=0.3, say=lambda _: None).generation == 9


def test_a_beat_changes_the_file_and_ends_with_the_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_SECONDS", 0.05)
    own = Lease.acquire(tmp_path, patience=0)
    own.keep_alive()
    path = tmp_path / ".lease-1"
    first = path.read_text()
    deadline = time.monotonic() + 30
    while path.read_text() in (first, "") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert json.loads(path.read_text())["beat"] != json.loads(first)["beat"]
    own.release()
    last = path.read_text()
    time.sleep(0.2)
    assert path.read_text() == last


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "out", tmp_path / "file"):
        with pytest.raises(LaunchError, match=r"--output_dir: got .*file.*, which cannot be written to"):
            Lease.acquire(path, patience=0)


RACE = """
import sys, time
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from survival import lease
from survival.errors import LaunchError
lease.BEAT_SECONDS = 0.1
print("ready", flush=True)
sys.stdin.readline()
try:
    own = lease.Lease.acquire(Path(sys.argv[2]), patience=20, say=lambda _: None)
except LaunchError:
    print("refused")
else:
    own.keep_alive()
    print("mine", flush=True)
    sys.stdin.readline()
    own.release()
"""


def test_of_many_at_once_one_gets_it(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RACE, str(ROOT / "launchers"), str(tmp_path / "out")]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(5)]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        answers = [process.stdout.readline().strip() for process in processes if process.stdout is not None]
        assert sorted(answers) == ["mine"] + ["refused"] * 4
    finally:
        for process in processes:
            process.kill()
            process.communicate()
