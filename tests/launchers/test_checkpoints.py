from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pretraining import checkpoints
from pretraining.errors import LaunchError

OPTIMIZER = "bf16_zero_pp_rank_{}_mp_rank_00_optim_states.pt"


def make(output_dir: Path, step: int, ranks: int = 2) -> Path:
    folder = output_dir / f"checkpoint-{step}"
    states = folder / f"global_step{step}"
    states.mkdir(parents=True)
    torch.save({"a": torch.zeros(100)}, states / "mp_rank_00_model_states.pt")
    for rank in range(ranks):
        torch.save({"a": torch.zeros(100)}, states / OPTIMIZER.format(rank))
    torch.save({}, folder / "rng_state_0.pth")
    (folder / "latest").write_text(f"global_step{step}")
    (folder / "trainer_state.json").write_text("{}")
    return folder


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


DAMAGES: list[tuple[Callable[[Path], object], str]] = [
    (lambda c: c.rename(c.with_name("elsewhere")), "there is no such folder"),
    (lambda c: (c / "trainer_state.json").unlink(), "no trainer_state.json"),
    (lambda c: truncate(c / "trainer_state.json", 0), "no trainer_state.json"),
    (lambda c: (c / "latest").unlink(), "no file `latest`"),
    (lambda c: (c / "global_step5").rename(c / "global_step4"), "global_step5 with the model states is missing"),
    (lambda c: (c / "global_step5/mp_rank_00_model_states.pt").unlink(), "model states is missing"),
    (lambda c: truncate(c / "global_step5/mp_rank_00_model_states.pt", 500), r"model_states.pt was cut short \(500"),
    (lambda c: truncate(c / "global_step5" / OPTIMIZER.format(1), 0), r"optim_states.pt was cut short \(0 bytes"),
    (lambda c: (c / "global_step5" / OPTIMIZER.format(0)).unlink(), "rank 0 are missing"),
    (lambda c: truncate(c / "rng_state_0.pth", 20), "rng_state_0.pth was cut short"),
]


@pytest.mark.parametrize(("damage", "words"), DAMAGES)
def test_a_damaged_checkpoint_is_refused_with_the_remedy(
    tmp_path: Path, damage: Callable[[Path], object], words: str
) -> None:
    make(tmp_path, 3)
    damaged = make(tmp_path, 5)
    assert checkpoints.defect(damaged) is None
    damage(damaged)
    with pytest.raises(LaunchError, match=words) as error:
        checkpoints.resolve(str(damaged), str(tmp_path), world_size=2, config={})
    assert "newest whole one is" in str(error.value)
    assert "checkpoint-3" in str(error.value)


def test_last_is_the_newest_whole_one(tmp_path: Path) -> None:
    make(tmp_path, 90)
    make(tmp_path, 100)
    for word in ("last", "True"):
        chosen = checkpoints.resolve(word, str(tmp_path), world_size=2, config={})
        assert chosen == str(tmp_path / "checkpoint-100"), "by number, not by name"
    (tmp_path / "checkpoint-100/trainer_state.json").unlink()
    assert checkpoints.resolve("last", str(tmp_path), world_size=2, config={}) == str(tmp_path / "checkpoint-90")
    (tmp_path / "checkpoint-90/latest").unlink()
    with pytest.raises(LaunchError, match="holds no whole checkpoint"):
        checkpoints.resolve("last", str(tmp_path), world_size=2, config={})
    with pytest.raises(LaunchError, match="there is none"):
        checkpoints.resolve("last", str(tmp_path / "nowhere"), world_size=2, config={})


def test_no_resume(tmp_path: Path) -> None:
    assert checkpoints.resolve(None, str(tmp_path), world_size=1, config={}) is None
    assert checkpoints.resolve("False", str(tmp_path), world_size=1, config={}) is None


def test_another_number_of_processes(tmp_path: Path) -> None:
    saved = str(make(tmp_path, 5, ranks=2))
    with pytest.raises(LaunchError, match="saved by 2 processes, this run has 1"):
        checkpoints.resolve(saved, str(tmp_path), world_size=1, config={})
    universal = {"checkpoint": {"load_universal": True}}
    assert checkpoints.resolve(saved, str(tmp_path), world_size=1, config=universal) == saved
    # Stage 0 writes no optimizer states of its own: any number of processes can read it.
    whole = str(make(tmp_path / "zero", 5, ranks=0))
    assert checkpoints.resolve(whole, str(tmp_path), world_size=3, config={}) == whole


def test_two_runs_are_not_mixed(tmp_path: Path) -> None:
    checkpoints.refuse_mixing(tmp_path, resume=False, overwrite=False)
    make(tmp_path, 5)
    with pytest.raises(LaunchError, match=r"--resume_from_checkpoint last.*--overwrite_output_dir"):
        checkpoints.refuse_mixing(tmp_path, resume=False, overwrite=False)
    checkpoints.refuse_mixing(tmp_path, resume=True, overwrite=False)
    checkpoints.refuse_mixing(tmp_path, resume=False, overwrite=True)


def test_starting_over_removes_what_a_run_writes_and_nothing_else(tmp_path: Path) -> None:
    make(tmp_path, 5)
    (tmp_path / "model").mkdir()
    for name in ("metrics.csv", "summary.json", "curves.png", "notes.txt"):
        (tmp_path / name).write_text("old")
    checkpoints.clear(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
