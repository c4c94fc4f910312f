"""The launcher as users start it: in processes of its own, on one rank and on two."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, free_port
from helpers.launching import WITHOUT_COMPILER, Ranks, deepspeed, launch, run_ranks
from PIL import Image
from survival.errors import refuse
from survival.signals import SIGNALS, StopRequest
from transformers import AutoModelForCausalLM, AutoTokenizer

from ds_quant.base import trainer_checkpoints
from ds_quant.cli.shared.run_folder import read_metrics
from ds_quant.kernels.bf16_units import multiplies_bf16_fast

SCRIPT = ROOT / "launchers" / "pretrain.py"
ENV = {"PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"}
FAST = ENV | WITHOUT_COMPILER
DTYPE = "bfloat16" if multiplies_bf16_fast(torch.device("cpu")) else "float32"
SMALL = [
    *("--config_overrides", "num_hidden_layers=2,hidden_size=32,intermediate_size=64"),
    *("--vocab_size", "320", "--context_length", "32", "--global_batch_size", "4", "--max_eval_sequences", "8"),
    *("--logging_steps", "1", "--disable_tqdm", "true", "--overwrite_output_dir", "false"),
]


def arguments(config: Path, corpus: Path, output_dir: Path, *, steps: int, every: int) -> list[Any]:
    counts = ["--max_steps", steps, "--warmup_steps", 1, "--eval_steps", every, "--save_steps", every]
    files = ["--train_file", corpus, "--validation_fraction", "0.2", "--output_dir", output_dir]
    return [SCRIPT, "--deepspeed", config, *SMALL, *counts, *files]


def quantized(name: str, path: Path, stage: int) -> Path:
    """A shipped recipe at another ZeRO stage."""
    config = json.loads((ROOT / "ds_configs" / name).read_text())
    config["zero_optimization"]["stage"] = stage
    path.write_text(json.dumps(config))
    return path


def test_plain_python_leaves_everything_behind(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = arguments(ROOT / "ds_configs/w8a8.json", corpus, out, steps=6, every=3)
    # Without WORLD_SIZE and its like, from another folder, as a user would.
    _, printed = launch([sys.executable, *command], timeout=200, env=ENV, cwd=tmp_path)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["tokens"] == 6 * 4 * 32
    assert (summary["steps"], summary["world_size"], summary["zero_stage"]) == (6, 1, 1)
    assert (summary["dtype"], summary["seed"], summary["preset"]) == (DTYPE, 42, "tiny")
    assert printed.count(f"Training in {'bf16' if DTYPE == 'bfloat16' else 'fp32'}") == 1
    assert summary["vocab_size"] == 320
    assert summary["final_eval_loss"] < summary["first_eval_loss"] < 6.5
    assert summary["seconds"] > summary["seconds_evaluating"] > 0
    assert summary["tokens_per_second"] > 0
    assert len(summary["converted_modules"]) == 14
    assert 0 < summary["share"] < 1
    assert list(summary["left_out"]) == ["lm_head.weight"]
    assert summary["config"] == json.loads((ROOT / "ds_configs/w8a8.json").read_text())
    assert summary["versions"]["torch"] == torch.__version__.split("+")[0] or summary["versions"]["torch"]
    assert {"commit", "versions", "model", "device"} <= summary.keys()

    rows = read_metrics(out / "metrics.csv")
    assert (out / "metrics.csv").read_text().startswith("step,tokens,train_loss,eval_loss,grad_norm,lr\n")
    assert [row["step"] for row in rows] == list(range(7))
    assert [row["step"] for row in rows if row["eval_loss"] is not None] == [0, 3, 6]
    assert rows[-1]["eval_loss"] == summary["final_eval_loss"]
    assert all(row["tokens"] == row["step"] * 4 * 32 and row["train_loss"] for row in rows[1:])
    assert all(row["grad_norm"] and row["lr"] is not None for row in rows[1:])
    with Image.open(out / "curves.png") as picture:
        assert min(picture.size) > 300
    # Nothing unfinished; the folder was given back to whoever comes next.
    assert [path.name for path in out.glob(".*")] == [".lease-1"]
    assert json.loads((out / ".lease-1").read_text())["released"]
    assert json.loads((out / "status.json").read_text())["state"] == "done"
    assert summary["peak_memory_bytes"] > 100 << 20

    model = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    text = json.loads(corpus.read_text().splitlines()[0])["text"]
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert model.config.eos_token_id == tokenizer.eos_token_id
    ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :32]
    assert model(input_ids=ids, labels=ids).loss.item() == pytest.approx(summary["final_eval_loss"], abs=1.0)
    assert model(input_ids=ids, labels=ids).loss.item() < summary["first_eval_loss"]

    assert "validation loss" in printed
    assert "14 x" in printed or "2 x model.layers.*.mlp.up_proj" in printed
    assert "[INFO]" not in printed

    # The same command again would mix two runs.
    status, printed = run_ranks(*command, ranks=0, timeout=100, env=ENV, check=False)
    assert status == 2
    assert "--resume_from_checkpoint last" in printed


def test_a_killed_run_resumes_to_the_same_losses(corpus: Path, tmp_path: Path) -> None:
    # All that must go on bit for bit: bits of stochastic rounding, moments, and residuals of error feedback.
    config = quantized("w8a8g8.json", tmp_path / "everything.json", stage=1)
    content = json.loads(config.read_text())
    others = json.loads((ROOT / "ds_configs" / "all4.json").read_text())["ds_quant"]
    content["ds_quant"] |= {"optimizer": others["optimizer"], "communication": others["communication"]}
    config.write_text(json.dumps(content))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    _, printed = run_ranks(*arguments(config, corpus, whole, steps=20, every=10), timeout=200, env=ENV)

    (tmp_path / "ranks").mkdir()
    command = arguments(config, corpus, killed, steps=20, every=10)
    with Ranks(tmp_path / "ranks", *command, ranks=2, timeout=150, env=ENV) as ranks:  # which are killed at its end
        while trainer_checkpoints.newest_whole(killed) is None:
            assert ranks.poll() is None, f"it ended before it could be killed:\n{ranks.printed()}"
            time.sleep(0.02)
    assert not (killed / "summary.json").exists(), "killed in the middle"
    resume = ["--resume_from_checkpoint", "last"]
    run_ranks(*command, *resume, timeout=200, env=ENV)

    assert (killed / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()
    first, second = (json.loads((run / "summary.json").read_text()) for run in (whole, killed))
    assert first["final_eval_loss"] == second["final_eval_loss"]
    assert (first["first_eval_loss"], first["tokens"]) == (second["first_eval_loss"], second["tokens"])
    assert (first["resumed_from_step"], second["resumed_from_step"]) == (None, 10)
    assert first["world_size"] == 2
    wire = first["communication"]
    assert wire["gradient"] == "4 bits in blocks of 128, error feedback"
    # Each rank sends the half that the other one owns, once a step: half a byte an element and 4 bytes a block of 128
    # or what is left of one (some 20 parameters), padded; in bf16 it would be 2 bytes an element.
    half = first["model"]["num_parameters"] / 2
    assert half * 0.53 < wire["wire_bytes_per_step"] < half * 0.53 + 20 * 4 + half * 0.1
    # Of gradients in 16 or 32 bits, less what is padded.
    whole_bytes = 2 if DTYPE == "bfloat16" else 4
    assert 0.8 * whole_bytes / 0.53 < wire["compression_ratio"] < whole_bytes / 0.53
    assert 0.05 < wire["quantization_error"] < 0.2, "about 0.1 for normal gradients in 4 bits"
    assert wire["residual_bytes"] > 0
    assert "4 bits in blocks of 128, error feedback" in printed
    assert "MiB a step from rank 0" in printed


def test_torchrun_at_stage_3(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    config = quantized("w8a8.json", tmp_path / "stage3.json", stage=3)
    torchrun = ["torchrun", "--nproc_per_node", 2, "--master_port", free_port()]
    command = arguments(config, corpus, out, steps=3, every=3)
    launch(
        [*torchrun, *command, "--preset", "tiny-gpt2", "--config_overrides", "n_layer=2,n_embd=32"],
        timeout=200,
        env=FAST,
    )
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["world_size"], summary["zero_stage"], summary["preset"]) == (2, 3, "tiny-gpt2")
    assert summary["first_eval_loss"] == pytest.approx(5.77, abs=0.4), "ln(320): initialised rightly in parts"
    assert len(summary["converted_modules"]) == 8
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    assert model.transformer.h[0].attn.c_attn.weight.shape == (32, 96), "gathered"
    assert sum(p.numel() for p in model.parameters()) == summary["model"]["num_parameters"]


def test_a_mistake_ends_all_ranks_with_one_line(tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("too short\n")
    command = arguments(ROOT / "ds_configs/baseline.json", short, tmp_path / "run", steps=2, every=2)
    status, printed = launch(deepspeed(*command), timeout=150, env=FAST, check=False)
    assert status != 0
    assert printed.count("error: ") == 1
    assert "--vocab_size" in printed or "at least one sequence" in printed
    assert "Traceback" not in printed
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.parametrize("killed", [False, True], ids=["met alone", "told by rank 0"])
def test_a_mistake_is_told_by_rank_0_or_else_by_the_rank_that_met_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], killed: bool
) -> None:
    monkeypatch.setenv("RANK", "1")
    before = [signal.getsignal(number) for number in SIGNALS]
    StopRequest().install()
    launcher = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGTERM)) if killed else None
    try:
        if launcher is not None:
            launcher.start()
        refuse("wrong", patience=60 if killed else 0.3)
    finally:
        for number, handler in zip(SIGNALS, before, strict=True):
            signal.signal(number, handler)
    assert capsys.readouterr().err == ("" if killed else "error: rank 1: wrong\n")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--deepspeed", "nowhere.json"], "nowhere.json: got no such file"),
        (["--train_file", "nowhere.txt"], "got nowhere.txt, but there is no such file"),
        (["--resume_from_checkpoint", "last"], "holds no whole checkpoint"),
        (
            ["--resume_from_checkpoint", "nowhere/checkpoint-7"],
            "--resume_from_checkpoint: got nowhere/checkpoint-7: there is no such folder",
        ),
        (["--deepspeed", "SECTION"], "bitz"),
    ],
)
def test_mistakes_before_anything_is_started(
    change: list[str],
    words: str,
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import pretrain

    import ds_quant

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    section = tmp_path / "section.json"
    section.write_text('{"ds_quant": {"linear": {"weight": {"bitz": 8}}}}')
    command = arguments(ROOT / "ds_configs/w8a8.json", corpus, tmp_path / "run", steps=2, every=2)
    if change[0] == "--deepspeed":
        command = [x for x in command if x not in ("--deepspeed", ROOT / "ds_configs/w8a8.json")]
    change = [str(section) if word == "SECTION" else word for word in change]
    try:
        assert pretrain.main([str(x) for x in [*command[1:], *change]]) == 2
    finally:
        ds_quant.disable()
    printed = capsys.readouterr()
    assert printed.err.count("error: ") == 1
    assert words in printed.err
    assert not (tmp_path / "run").exists()


def test_a_stale_lock_is_one_error(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the check, the first collective would wait for the dead build for ever."""
    import pretrain

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    lock.touch()
    for path in (lock, lock.parent):
        os.utime(path, (0, 0))
    command = arguments(ROOT / "ds_configs/w8a8.json", corpus, tmp_path / "run", steps=2, every=2)
    assert pretrain.main([str(x) for x in command[1:]]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("error: ") == 1
    assert f"fix: rm {lock}" in printed.err
