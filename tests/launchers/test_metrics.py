from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from pretraining import compare, environment, metrics, outputs, plots
from transformers import TrainerControl, TrainerState

from ds_quant.cli.shared import terminal
from ds_quant.cli.shared.run_folder import read_metrics

HISTORY: list[dict[str, Any]] = [
    {"step": 0, "eval_loss": 6.0, "eval_runtime": 1.0},
    {"step": 10, "loss": 5.1, "grad_norm": 1.5, "learning_rate": 0.1 + 0.2},
    {"step": 20, "loss": 4.0, "grad_norm": 1.25, "learning_rate": 0.25},
    {"step": 20, "eval_loss": 4.5},
    {"step": 20, "train_runtime": 3.0, "train_loss": 4.6},
]
CSV = """step,tokens,train_loss,eval_loss,grad_norm,lr
0,0,,6.0,,
10,1000,5.1,,1.5,0.30000000000000004
20,2000,4.0,4.5,1.25,0.25
"""


def play(callback: metrics.MetricsCallback, state: TrainerState, history: list[dict[str, Any]]) -> None:
    """What the Trainer calls for these logs."""
    for entry in history:
        if state.global_step != entry["step"]:
            state.global_step = entry["step"]
            callback.on_step_begin(None, state, TrainerControl())  # type: ignore[arg-type]
        callback.on_log(None, state, TrainerControl(), logs=entry)  # type: ignore[arg-type]


def test_lines_are_written_while_training_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    state = TrainerState(is_world_process_zero=True)
    callback = metrics.MetricsCallback(path, 100)
    callback.on_train_begin(None, state, TrainerControl())  # type: ignore[arg-type]
    assert path.read_text() == "step,tokens,train_loss,eval_loss,grad_norm,lr\n"
    play(callback, state, HISTORY[:3])
    assert path.read_text() == "".join(CSV.splitlines(keepends=True)[:3])
    play(callback, state, HISTORY[3:])
    callback.on_train_end(None, state, TrainerControl())  # type: ignore[arg-type]
    assert path.read_text() == CSV
    assert metrics.to_csv(metrics.rows_of(HISTORY, 100), header=True) == CSV


def test_a_resumed_run_continues_without_duplicates(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    # The killed run had come to step 20; the checkpoint is of step 10.
    path.write_text(CSV)
    state = TrainerState(is_world_process_zero=True, global_step=10, log_history=HISTORY[:2])
    callback = metrics.MetricsCallback(path, 100)
    callback.on_train_begin(None, state, TrainerControl())  # type: ignore[arg-type]
    assert path.read_text() == "".join(CSV.splitlines(keepends=True)[:3])
    play(callback, state, HISTORY[2:])
    callback.flush()
    assert path.read_text() == CSV


def test_only_the_first_rank_writes(tmp_path: Path) -> None:
    callback = metrics.MetricsCallback(tmp_path / "metrics.csv", 100)
    state = TrainerState(is_world_process_zero=False)
    callback.on_train_begin(None, state, TrainerControl())  # type: ignore[arg-type]
    play(callback, state, HISTORY)
    callback.flush()
    assert list(tmp_path.iterdir()) == []


def a_run(folder: Path, shift: float, steps: int = 5) -> Path:
    folder.mkdir()
    history = [{"step": s * 10, "eval_loss": 6 - 0.5 * s + shift * s, "loss": 6 - 0.4 * s} for s in range(steps)]
    (folder / "metrics.csv").write_text(metrics.to_csv(metrics.rows_of(history, 100), header=True))
    summary = {"final_eval_loss": history[-1]["eval_loss"], "seed": 1, "tokens": 100, "vocab_size": 300}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_compare_prints_the_gap_and_draws_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = a_run(tmp_path / "a", 0.0), a_run(tmp_path / "b", 0.005)
    picture = tmp_path / "new" / "c.png"
    assert compare.main([str(one), str(two), "--output", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert "loss 4.0000" in printed
    assert "+0.0200 nats (largest on the way: +0.0200)" in printed
    with Image.open(picture) as image:
        assert min(image.size) > 400
        assert len(set(image.convert("RGB").resize((60, 60)).getdata())) > 20, "not blank"
    steps, gaps = compare.gap(read_metrics(one / "metrics.csv"), read_metrics(two / "metrics.csv"))
    assert steps == [0, 10, 20, 30, 40]
    assert gaps == pytest.approx([0, 0.005, 0.01, 0.015, 0.02])


def test_compare_refuses_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main([str(a_run(tmp_path / "a", 0)), str(tmp_path / "none")]) == 2
    assert "not the folder of a finished run" in capsys.readouterr().err


def test_without_matplotlib_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = a_run(tmp_path / "a", 0)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    outputs.write_curves(run, "title")
    assert capsys.readouterr().out.count("matplotlib is missing") == 1
    assert not (run / "curves.png").exists()
    monkeypatch.undo()
    outputs.write_curves(run, "title")
    assert (run / "curves.png").stat().st_size > 5000


def test_the_table_groups_layers(capsys: pytest.CaptureFixture[str]) -> None:
    converted = {f"model.layers.{n}.mlp.up_proj": "W8 A8" for n in range(3)} | {"lm_head": "W8"}
    assert outputs._grouped(converted) == ["W8 A8", "  3 x model.layers.*.mlp.up_proj", "W8", "  1 x lm_head"]


def test_only_one_rank_speaks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        terminal.say("hello")
        terminal.complain("wrong")
    assert capsys.readouterr() == ("hello\n", "error: wrong\n")


def test_a_plain_process_is_a_job_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    environment.ensure_process_group_variables()
    assert (terminal.rank(), environment.world_size()) == (0, 1)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    environment.ensure_process_group_variables()
    assert (terminal.rank(), environment.world_size()) == (1, 2)


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_passes_over_imports(enabled: bool) -> None:
    (gc.enable if enabled else gc.disable)()
    before = gc.get_freeze_count()
    try:
        with environment.imports_left_alone():
            assert not gc.isenabled()
            imported = [[] for _ in range(100)]
        assert gc.isenabled() == enabled
        assert gc.get_freeze_count() >= before + len(imported)
    finally:
        gc.enable()


def test_series_leave_out_what_was_not_measured(tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text(CSV)
    assert plots.series(read_metrics(tmp_path / "m.csv"), "eval_loss") == ([0.0, 20.0], [6.0, 4.5])
