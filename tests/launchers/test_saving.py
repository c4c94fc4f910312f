"""Checkpoints of one rank, made of hand-written files: what is renamed, proven, pruned and kept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from survival.control import Control
from survival.errors import Failed, Fenced
from survival.lease import Lease
from survival.saving import CheckpointSaver

from ds_quant.base import manifest, trainer_checkpoints


@pytest.fixture
def control(single_rank: None) -> Iterator[Control]:
    if dist.is_initialized():  # by another test of this process
        yield Control(30.0)
        return
    dist.init_process_group("gloo")
    yield Control(30.0)
    dist.destroy_process_group()


def write(part: Path) -> None:
    (part / "inner").mkdir(parents=True)
    (part / "inner" / "weights").write_bytes(bytes(1000))
    (part / "state").write_text("{}")


def saver(
    folder: Path, control: Control, limit: int | None, cls: type[CheckpointSaver] = CheckpointSaver
) -> CheckpointSaver:
    return cls(Lease.acquire(folder, patience=0), control, {"world_size": 1}, limit)


def names(folder: Path) -> list[str]:
    return [path.name for path in trainer_checkpoints.listed(folder)]


def test_older_ones_go_when_a_newer_one_is_there(tmp_path: Path, control: Control) -> None:
    own = saver(tmp_path, control, 2)
    for step in (1, 2, 3):
        assert own.save(step, write) == tmp_path / f"checkpoint-{step}"
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3"]
    own.save(4, write, keep="checkpoint-2")
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-4"], "the best one stays"
    found = manifest.read(tmp_path / "checkpoint-4")
    assert found is not None
    assert (found["step"], found["world_size"]) == (4, 1)
    assert [(entry.path, entry.size) for entry in found["files"]] == [("inner/weights", 1000), ("state", 2)]
    assert manifest.defect_of_contents(tmp_path / "checkpoint-4", found["files"]) is None

    everything = saver(tmp_path / "all", control, None)
    for step in (1, 2, 3):
        everything.save(step, write)
    assert len(names(tmp_path / "all")) == 3


class BadDisk(CheckpointSaver):
    """Gives back other bytes than it was given, which the system does not notice."""

    def _publish(self, part: Path, final: Path, entries: list[manifest.FileEntry], step: int) -> None:
        super()._publish(part, final, entries, step)
        (final / "inner" / "weights").write_bytes(bytes(999) + b"\1")


def test_nothing_is_pruned_before_the_newer_one_reads_back_right(tmp_path: Path, control: Control) -> None:
    saver(tmp_path, control, 1).save(1, write)
    with pytest.raises(Failed, match=r"checkpoint-2 was written, and reads back wrong: inner/weights is not what was"):
        saver(tmp_path, control, 1, BadDisk).save(2, write)
    assert names(tmp_path) == ["checkpoint-1", "checkpoint-2"]
    assert trainer_checkpoints.defect(tmp_path / "checkpoint-2", contents=True, ours=True) is not None


def test_one_of_the_same_step_is_replaced(tmp_path: Path, control: Control) -> None:
    own = saver(tmp_path, control, 1)
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5" / "half").write_text("")
    own.save(5, write)
    assert sorted(path.name for path in (tmp_path / "checkpoint-5").iterdir()) == ["inner", "manifest.json", "state"]
    assert not list(own._lease.writing.iterdir())


def test_who_was_taken_over_while_it_wrote_renames_nothing(
    tmp_path: Path, control: Control, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "3")
    own = saver(tmp_path, control, 1)

    def taken_over_meanwhile(part: Path) -> None:
        write(part)
        monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
        Lease.acquire(tmp_path, patience=0)

    with pytest.raises(Fenced, match="was taken over by another job"):
        own.save(1, taken_over_meanwhile)
    assert names(tmp_path) == []


def test_a_take_over_that_could_remove_nothing_fences_as_well(tmp_path: Path, control: Control) -> None:
    own = saver(tmp_path, control, 1)

    def taken_over_meanwhile(part: Path) -> None:
        write(part)
        (tmp_path / ".lease-2").write_text("{}")

    with pytest.raises(Fenced):
        own.save(1, taken_over_meanwhile)
    assert names(tmp_path) == []
