from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from survival import checkpoints, resize
from survival.errors import LaunchError

from ds_quant.base import manifest, trainer_checkpoints

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
    manifest.write(folder, manifest.digest(folder, manifest.list_files(folder)), {"step": step})
    return folder


def truncate(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def flip(path: Path) -> None:
    """Change one bit in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES: list[tuple[Callable[[Path], object], str]] = [
    (lambda c: c.rename(c.with_name("elsewhere")), "there is no such folder"),
    (lambda c: (c / "trainer_state.json").unlink(), "trainer_state.json is missing"),
    (lambda c: truncate(c / "trainer_state.json", 0), "trainer_state.json has 0 bytes instead of 2"),
    (lambda c: (c / "latest").unlink(), "latest is missing"),
    (lambda c: (c / "global_step5").rename(c / "global_step4"), "global_step5/.* is missing"),
    (lambda c: truncate(c / "global_step5/mp_rank_00_model_states.pt", 500), "model_states.pt has 500 bytes instead"),
    (lambda c: (c / "global_step5" / OPTIMIZER.format(0)).unlink(), "zero_pp_rank_0_.* is missing"),
    (lambda c: truncate(c / "manifest.json", 40), "manifest.json was cut short"),
    (
        lambda c: (c / "manifest.json").write_text('{"format": 2, "files": []}'),
        "has format 2, and this program knows 1",
    ),
    (lambda c: flip(c / "global_step5" / OPTIMIZER.format(1)), "optim_states.pt is not what was written"),
]
"""What the manifest tells."""
DAMAGES_WITHOUT: list[tuple[Callable[[Path], object], str]] = [
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
"""What can be seen of a checkpoint that another program wrote."""


@pytest.mark.parametrize(("damage", "words"), DAMAGES)
def test_a_damaged_checkpoint_is_refused_with_the_fix(
    tmp_path: Path, damage: Callable[[Path], object], words: str
) -> None:
    make(tmp_path, 3)
    damaged = make(tmp_path, 5)
    assert trainer_checkpoints.defect(damaged, contents=True) is None
    damage(damaged)
    with pytest.raises(LaunchError, match=words) as error:
        checkpoints.choose(str(damaged), tmp_path, contents=True)
    assert "newest whole one is" in str(error.value)
    assert "checkpoint-3" in str(error.value)


@pytest.mark.parametrize(("damage", "words"), DAMAGES_WITHOUT)
def test_a_damaged_checkpoint_of_another_program(tmp_path: Path, damage: Callable[[Path], object], words: str) -> None:
    damaged = make(tmp_path, 5)
    (damaged / "manifest.json").unlink()
    assert checkpoints.choose(str(damaged), tmp_path, contents=True) == damaged, "named by the user: taken"
    damage(damaged)
    with pytest.raises(LaunchError, match=words):
        checkpoints.choose(str(damaged), tmp_path, contents=True)


def test_last_is_the_newest_whole_one(tmp_path: Path) -> None:
    make(tmp_path, 90)
    make(tmp_path, 100)
    for word in ("last", "True", "auto"):
        chosen = checkpoints.choose(word, tmp_path, contents=True)
        assert chosen == tmp_path / "checkpoint-100", "by number, not by name"
    said: list[str] = []
    (tmp_path / "checkpoint-100/manifest.json").unlink()
    assert checkpoints.choose("last", tmp_path, contents=False, say=said.append) == tmp_path / "checkpoint-90"
    assert len(said) == 1
    assert "checkpoint-100: it has no manifest.json" in said[0]
    flip(tmp_path / "checkpoint-90/rng_state_0.pth")
    assert checkpoints.choose("last", tmp_path, contents=False) == tmp_path / "checkpoint-90", "sizes alone are right"
    assert checkpoints.choose("auto", tmp_path, contents=True) is None
    with pytest.raises(LaunchError, match="holds no whole checkpoint"):
        checkpoints.choose("last", tmp_path, contents=True)
    with pytest.raises(LaunchError, match="there is none"):
        checkpoints.choose("last", tmp_path / "nowhere", contents=True)
    assert checkpoints.choose("auto", tmp_path / "nowhere", contents=True) is None


def test_no_resume(tmp_path: Path) -> None:
    make(tmp_path, 5)
    assert checkpoints.choose(None, tmp_path, contents=True) is None
    assert checkpoints.choose("False", tmp_path, contents=True) is None


def test_another_number_of_processes(tmp_path: Path) -> None:
    saved = make(tmp_path, 5, ranks=2)
    assert resize.needs_universal(saved, 1, {})
    assert not resize.needs_universal(saved, 2, {})
    assert not resize.needs_universal(saved, 1, {"checkpoint": {"load_universal": True}}), "the user has seen to it"
    # Stage 0 writes no optimizer states of its own: any number of processes can read it.
    assert not resize.needs_universal(make(tmp_path / "zero", 5, ranks=0), 3, {})


def flags(**changed: int) -> dict[str, int]:
    return {
        "global_batch_size": 16,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
    } | changed


def keep(
    values: dict[str, int], saved: Path, world_size: int, *explicit: str, fixed: tuple[str, ...] = ()
) -> str | None:
    return resize.keep_global_batch(
        values, saved, explicit=frozenset(explicit), fixed=frozenset(fixed), world_size=world_size
    )


def test_the_global_batch_stays(tmp_path: Path) -> None:
    saved = make(tmp_path, 5)
    about = {"step": 5, "global_batch_size": 32}
    manifest.write(saved, manifest.digest(saved, manifest.list_files(saved)), about)
    same = flags(global_batch_size=32)
    assert keep(same, saved, 2) is None
    assert same == flags(global_batch_size=32)

    cut = flags()
    line = keep(cut, saved, 2)
    assert line is not None
    assert "stays 32 sequences" in line
    assert cut == flags(global_batch_size=32, gradient_accumulation_steps=4)
    for world_size in (1, 4, 8, 16, 32):
        cut = flags()
        keep(cut, saved, world_size)
        product = cut["per_device_train_batch_size"] * cut["gradient_accumulation_steps"] * world_size
        assert product == cut["global_batch_size"] == 32
        assert cut["per_device_train_batch_size"] <= 4
    with pytest.raises(LaunchError, match=r"run 1, 2, 4, 8, 16 or 32 processes, or"):
        keep(flags(), saved, 3)
    with pytest.raises(LaunchError, match="--global_batch_size 32, or start afresh"):
        keep(flags(), saved, 2, "global_batch_size")
    # What the DeepSpeed JSON fixes stays: the other one follows, and both together may not fit.
    per_device, accumulation = "per_device_train_batch_size", "gradient_accumulation_steps"
    cut = flags()
    keep(cut, saved, 2, fixed=(accumulation,))
    assert cut == flags(global_batch_size=32, per_device_train_batch_size=8)
    cut = flags()
    keep(cut, saved, 4, fixed=(per_device,))
    assert cut == flags(global_batch_size=32)
    with pytest.raises(LaunchError, match="--gradient_accumulation_steps 2 does not make"):
        keep(flags(), saved, 2, fixed=(per_device, accumulation))


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
