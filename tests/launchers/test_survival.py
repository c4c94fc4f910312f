"""A run that is stopped, killed, starved, fenced off or ruined ends clearly, and goes on exactly where it can."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenize_corpus
import torch
from conftest import PATIENCE, ROOT
from helpers.launching import Ranks, run_ranks
from survival import status
from transformers import AutoModelForCausalLM

from ds_quant.base import trainer_checkpoints
from ds_quant.cli.shared.run_folder import read_metrics

SCRIPT = ROOT / "launchers" / "pretrain.py"
BASELINE = ROOT / "ds_configs" / "baseline.json"
FLAGS = [
    *("--config_overrides", "num_hidden_layers=2,hidden_size=32,intermediate_size=64"),
    *("--context_length", "32", "--global_batch_size", "4", "--max_eval_sequences", "8"),
    *("--warmup_steps", "1", "--disable_tqdm", "true"),
    # Not at every step: what was summed up since the last log must survive as well.
    *("--logging_steps", "7", "--eval_steps", "20", "--save_steps", "20", "--save_total_limit", "10"),
    *("--overwrite_output_dir", "false"),
]
TEXT = ["--vocab_size", "320", "--validation_fraction", "0.2"]
STEPS = 150
"""More than one epoch of 135: its end must be the same for any number of ranks."""
pytestmark = [pytest.mark.distributed, pytest.mark.timeout(280)]


def arguments(
    out: Path, corpus: Path | None, *flags: object, steps: int = STEPS, config: Path = BASELINE
) -> list[object]:
    """What a run is started with; without a corpus, `flags` name the data."""
    text = [] if corpus is None else [*TEXT, "--train_file", corpus]
    return ["--deepspeed", config, *FLAGS, "--max_steps", steps, *text, "--output_dir", out, *flags]


ENV = {"OMP_WAIT_POLICY": "PASSIVE"}


@pytest.fixture
def start(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Ranks]]:
    """Starts a run on forked ranks that goes on meanwhile; whatever still lives at the test's end is killed."""
    with contextlib.ExitStack() as stack:

        def begin(
            out: Path, *flags: object, ranks: int = 0, steps: int = STEPS, text: bool = True, **env: str
        ) -> Ranks:
            command, folder = (
                arguments(out, corpus if text else None, *flags, steps=steps),
                tmp_path_factory.mktemp("ranks"),
            )
            return stack.enter_context(Ranks(folder, SCRIPT, *command, ranks=ranks, timeout=250, env={**ENV, **env}))

        yield begin


def forked(command: list[object], *, ranks: int, expect: int = 0, **env: str) -> str:
    """Run the script on forked ranks to its end, which must have the status `expect`. Returns what was printed."""
    ranks = ranks if ranks > 1 else 0  # one has no launcher
    ended, output = run_ranks(SCRIPT, *command, ranks=ranks, timeout=200, env={**ENV, **env}, check=False)
    assert ended == expect, output
    return output


@pytest.fixture
def run_to_end(corpus: Path) -> Callable[..., str]:
    """Runs as `start` does, on forked ranks, to the end; what was printed. For runs that nothing is done to."""

    def run(
        out: Path,
        *flags: object,
        expect: int = 0,
        ranks: int = 1,
        steps: int = STEPS,
        config: Path = BASELINE,
        text: bool = True,
        **env: str,
    ) -> str:
        command = arguments(out, corpus if text else None, *flags, steps=steps, config=config)
        return forked(command, expect=expect, ranks=ranks, **env)

    return run


def end(run: Ranks, expect: int | None = 0, timeout: float = 120) -> str:
    """What a run printed; it must end with this status."""
    ended = run.wait(timeout)
    assert expect in (None, ended), run.printed()
    return run.printed()


def wait_for(done: Callable[[], Any], run: Ranks, timeout: float = 120) -> Any:
    deadline = time.monotonic() + PATIENCE * timeout
    while not (found := done()):
        assert run.poll() is None, f"it ended too early:\n{run.printed()}"
        assert time.monotonic() < deadline, "it did not come so far"
        time.sleep(0.02)
    return found


def step_of(out: Path) -> int:
    """The last step that status.json tells of."""
    return int((status.read(out) or {}).get("step", 0))


def metrics_of(out: Path) -> str:
    return (out / "metrics.csv").read_text()


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two ranks that all others are compared with."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    forked(arguments(out, corpus), ranks=2)
    return out


def test_a_signal_stops_all_ranks_and_a_lost_rank_ends_the_others(
    start: Callable[..., Any], run_to_end: Callable[..., str], undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    # One rank alone is told: the other must hear of it and write its part.
    first = start(out, "--resume_from_checkpoint", "auto", ranks=2)
    wait_for(lambda: step_of(out) >= 7, first)
    first.send_signal(signal.SIGUSR1, rank=1)
    output = end(first, 75)
    stopped = status.read(out)
    assert stopped is not None, output
    assert (stopped["state"], stopped["retry"]) == ("stopped", True)
    assert trainer_checkpoints.newest_whole(out, contents=True) == out / f"checkpoint-{stopped['step']}"
    assert not (out / "summary.json").exists()

    # The second goes on, and loses a rank for which there is no warning.
    second = start(out, "--resume_from_checkpoint", "auto", ranks=2)
    wait_for(lambda: step_of(out) >= 35, second)
    second.send_signal(signal.SIGKILL, rank=1)
    output = end(second, -signal.SIGKILL)
    assert f"Resuming from {out}/checkpoint-{stopped['step']}" in output
    lost = status.read(out)
    assert lost is not None
    assert lost["state"] in ("failed", "running")
    if lost["state"] == "failed":
        assert lost["retry"]
        assert lost["reason"].startswith(f"rank 0, step {lost['step']}: the connection to the other ranks broke")

    run_to_end(out, "--resume_from_checkpoint", "auto", ranks=2)
    assert metrics_of(out) == metrics_of(undisturbed)
    assert (out / "model/model.safetensors").read_bytes() == (undisturbed / "model/model.safetensors").read_bytes()
    assert status.read(out)["state"] == "done"  # type: ignore[index]
    assert status.main([str(out)]) == 0


def test_a_rank_that_hangs_is_given_up(start: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "run"
    run = start(out, "--ddp_timeout", "5", ranks=2, steps=100_000)
    wait_for(lambda: step_of(out) >= 14, run)
    run.send_signal(signal.SIGSTOP, rank=1)
    ended = wait_for(lambda: (status.read(out) or {}).get("state") != "running" and status.read(out), run, 60)
    assert (ended["state"], ended["retry"], ended["rank"]) == ("failed", True, 0)
    assert f"rank 0, step {ended['step']}: " in ended["reason"]
    assert "no progress for" in ended["reason"] or "did not answer for 5 s" in ended["reason"]
    assert "1 failed to pass monitoredBarrier" in ended["reason"], "says who is missing"


def test_other_numbers_of_ranks_go_on_with_the_same_batches(
    run_to_end: Callable[..., str], undisturbed: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(undisturbed / "checkpoint-60", out / "checkpoint-60")
    # One sequence at a time: other micro-batches, and an epoch that is no multiple of the global batch.
    one = ["--per_device_train_batch_size", "1"]
    output = run_to_end(out, "--resume_from_checkpoint", "auto", *one, ranks=1)
    assert "was saved by 2 ranks, this run has 1: converting" in output
    moved = json.loads((out / "summary.json").read_text())
    assert (moved["world_size"], moved["resumed_from_step"], moved["tokens"]) == (1, 60, STEPS * 4 * 32)
    check_losses(out, undisturbed)

    # And back to two, from the middle of what the one did.
    for step in (140, STEPS):
        shutil.rmtree(out / f"checkpoint-{step}", ignore_errors=True)
    output = run_to_end(out, "--resume_from_checkpoint", "auto", ranks=2)
    assert f"{out}/checkpoint-120 was saved by 1 ranks, this run has 2" in output
    check_losses(out, undisturbed)
    (out / "summary.json").unlink()
    refused = run_to_end(out, "--resume_from_checkpoint", "auto", "--global_batch_size", "8", expect=2)
    assert "--global_batch_size: got 8; allowed: the 4 sequences that " in refused


def check_losses(out: Path, other: Path) -> None:
    """Equal but for the order of sums in bf16: 7e-4 was seen at most; with batches in another order 0.04 to 0.07."""
    mine, theirs = (
        {row["step"]: row["train_loss"] for row in read_metrics(run / "metrics.csv")} for run in (out, other)
    )
    assert mine.keys() == theirs.keys()
    for step, loss in mine.items():
        assert loss == pytest.approx(theirs[step], abs=0.004), step


def test_accumulated_micro_steps_draw_their_own_bits_again(run_to_end: Callable[..., str], tmp_path: Path) -> None:
    """Gradients rounded stochastically, three micro steps a step: a resumed run draws what the undisturbed one drew."""
    flags = [
        "--per_device_train_batch_size",
        "2",
        "--global_batch_size",
        "6",
        "--save_steps",
        "3",
        "--logging_steps",
        "1",
    ]
    config = ROOT / "ds_configs" / "w8a8g8.json"
    assert json.loads(config.read_text())["ds_quant"]["linear"]["gradient"]["rounding"] == "stochastic"
    whole, out = tmp_path / "whole", tmp_path / "run"
    run_to_end(whole, *flags, steps=7, config=config)
    assert json.loads((whole / "summary.json").read_text())["tokens"] == 7 * 6 * 32
    shutil.copytree(whole / "checkpoint-3", out / "checkpoint-3")
    run_to_end(out, *flags, "--resume_from_checkpoint", "auto", steps=7, config=config)
    assert json.loads((out / "summary.json").read_text())["resumed_from_step"] == 3
    mine, theirs = (
        {row["step"]: row["train_loss"] for row in read_metrics(run / "metrics.csv")} for run in (out, whole)
    )
    assert all(mine[step] == theirs[step] for step in range(4, 8))
    assert (out / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", ["shards", "stream"])
def test_shards_and_streams_go_on_exactly(
    start: Callable[..., Any], run_to_end: Callable[..., str], corpus: Path, tmp_path: Path, kind: str
) -> None:
    if kind == "shards":
        tokens = tmp_path / "tokens"
        tokenize = ["--train_file", corpus, "--vocab_size", 320]
        tokenize += ["--output_dir", tokens, "--validation_fraction", "0.2", "--shard_tokens", "5000"]
        assert tokenize_corpus.main([str(word) for word in tokenize]) == 0
        flags: list[object] = ["--train_shards", tokens]
    else:
        folder = tmp_path / "folder"
        folder.mkdir()
        shutil.copy(corpus, folder / "train.jsonl")
        flags = ["--dataset_name", folder, "--streaming", "--validation_documents", "8", "--vocab_size", "320"]
    whole, out = tmp_path / "whole", tmp_path / "run"
    run_to_end(whole, *flags, text=False)
    first = start(out, *flags, "--resume_from_checkpoint", "auto", text=False)
    wait_for(lambda: step_of(out) >= 28, first)
    first.send_signal(signal.SIGUSR1)
    end(first, 75)
    stopped = step_of(out)
    # Workers that read ahead must not have used what no step did.
    worker = ["--dataloader_num_workers", "1"]
    output = run_to_end(out, *flags, "--resume_from_checkpoint", "auto", *worker, text=False)
    assert f"checkpoint-{stopped}" in output
    assert metrics_of(out) == metrics_of(whole)


def test_the_second_writer_is_fenced_off(
    start: Callable[..., Any], run_to_end: Callable[..., str], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    old = start(out, steps=100_000, SLURM_JOB_ID="7", SLURM_RESTART_COUNT="0")
    wait_for(lambda: trainer_checkpoints.newest_whole(out), old)

    other = run_to_end(out, "--resume_from_checkpoint", "auto", SLURM_JOB_ID="8", expect=2)
    assert "job 7, process" in other
    assert "is writing there, and two jobs in one folder would mix" in other
    assert old.poll() is None, "the first goes on"
    assert status.read(out)["state"] == "running"  # type: ignore[index]

    # The same job, started again by Slurm, which believes that its first node is dead.
    new = start(out, "--resume_from_checkpoint", "auto", steps=100_000, SLURM_JOB_ID="7", SLURM_RESTART_COUNT="1")
    assert "was taken over by another job (job 7" in end(old, 4)
    wait_for(lambda: (out / ".lease-2").exists() and (step := step_of(out)) and step > 0, new)
    before = trainer_checkpoints.newest_whole(out)
    wait_for(lambda: trainer_checkpoints.newest_whole(out) != before, new)
    new.send_signal(signal.SIGTERM)
    end(new, 75)
    ended = status.read(out)
    assert ended is not None
    assert (ended["state"], ended["restart_count"]) == ("stopped", 1)
    assert sorted(path.name for path in out.glob(".*")) == [".lease-2"]


def test_a_full_disk_keeps_the_older_checkpoint(run_to_end: Callable[..., str], tmp_path: Path) -> None:
    out = tmp_path / "small"
    out.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", out], capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.decode().strip()}")
    try:
        # In bf16 the file system holds one checkpoint and not two.
        output = run_to_end(out, "--bf16", "true", expect=4)
        ended = status.read(out)
        assert ended is not None
        assert (ended["state"], ended["retry"]) == ("failed", False)
        assert "the checkpoint could not be written: the disk is full" in ended["reason"]
        assert ended["reason"] in output
        whole = trainer_checkpoints.newest_whole(out, contents=True)
        assert whole is not None
        assert trainer_checkpoints.step_of(whole) == ended["step"] - 20, "nothing lost beyond the last one"
        assert not list(out.glob(".writing-*"))
    finally:
        subprocess.run(["umount", out], check=True)


def test_a_ruined_run_ends_as_diverged(
    start: Callable[..., Any], run_to_end: Callable[..., str], tmp_path: Path
) -> None:
    # A loss of NaN: weights that hold one.
    good, bad = tmp_path / "good", tmp_path / "bad"
    run_to_end(good, steps=20)
    shutil.copytree(good / "model", bad)
    model = AutoModelForCausalLM.from_pretrained(bad)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    model.save_pretrained(bad)
    nan = tmp_path / "nan"
    flags = ["--model_name_or_path", bad, "--config_overrides", "use_cache=false"]
    output = run_to_end(nan, *flags, expect=3)
    ended = status.read(nan)
    assert ended is not None
    assert (ended["state"], ended["retry"], ended["step"]) == ("diverged", False, 7)
    assert "the training loss was NaN or Inf" in output
    assert "nan" in metrics_of(nan), "it is seen in the curve"
    assert not trainer_checkpoints.listed(nan), "nothing of it is saved"

    # A signal before the loss was looked at: the checkpoint that it asks for would be of ruined weights.
    unseen = tmp_path / "unseen"
    rarely = ["--logging_steps", "100000", "--save_steps", "100000", "--eval_steps", "100000"]
    run = start(unseen, *flags, *rarely, steps=100_000)
    wait_for((unseen / "metrics.csv").exists, run)
    run.send_signal(signal.SIGUSR1)
    assert "the training loss was NaN or Inf" in end(run, 3)
    assert not trainer_checkpoints.listed(unseen)

    # Gradients that overflow at every step: none is taken, and the loss would stay as it is for ever.
    stuck = tmp_path / "stuck"
    output = run_to_end(stuck, "--learning_rate", "1e30", "--max_grad_norm", "0", steps=100, expect=3)
    assert "the gradients were NaN or Inf for" in output

    # A loss that rises and stays: a learning rate that grows far too high.
    risen = tmp_path / "risen"
    high = ["--learning_rate", "1.0", "--warmup_steps", "60", "--max_grad_norm", "0", "--logging_steps", "2"]
    output = run_to_end(risen, *high, "--max_loss_rise", "0.2", steps=100, expect=3)
    assert "more than 0.2 above" in output
    assert 40 < step_of(risen) < 100
