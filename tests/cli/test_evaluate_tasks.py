"""Few-shot tasks: as lm-eval's own command gives them."""

from __future__ import annotations

import json
import statistics
import sys

import pytest
from evaluate_files import refused, write_model, write_tasks
from launching import launch

from ds_quant.cli import evaluate
from ds_quant.cli.evaluating import tasks


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A W8A8 run and local tasks."""
    folder = tmp_path_factory.mktemp("tasks")
    write_model(folder / "run", {"weight": {"bits": 4}, "activation": {"bits": 4}})
    write_tasks(folder / "yaml")
    return folder


@pytest.fixture(scope="module")
def found(files):
    """What our command gives with two seeds, with and without quantizers."""
    output = files / "ours.json"
    argv = [files / "run", "--quantizers", "off", "trained", "--tasks", "local_words", "local_last"]
    argv += ["--include_path", files / "yaml", "--num_fewshot", 2, "--seeds", 3, 4, "--output", output]
    assert evaluate.main(list(map(str, argv))) == 0
    return {row["quantizers"]: row["tasks"] for row in json.loads(output.read_text())["rows"]}


def test_it_is_what_lm_evals_own_command_gives(files, found):
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--tasks", "local_words", "local_last"]
    command += ["--model_args", f"pretrained={files / 'run' / 'model'}", "--include_path", files / "yaml"]
    command += ["--num_fewshot", 2, "--seed", 3, "--batch_size", 8, "--device", "cpu"]
    command += ["--output_path", files / "theirs"]
    # As ours does: the pool that it would bootstrap with forks a process in which torch's threads run.
    launch(command, timeout=280, env={"DISABLE_MULTIPROC": "1", "HF_HUB_OFFLINE": "1"})
    (path,) = (files / "theirs").rglob("results_*.json")
    theirs = json.loads(path.read_text())["results"]
    compared = 0
    for task, metrics in found["off"].items():
        for metric, figures in metrics.items():
            assert figures["values"]["3"] == theirs[task][f"{metric},none"]
            if metric != "perplexity":  # of which the number of bootstraps decides the error
                assert figures["standard_errors"]["3"] == theirs[task][f"{metric}_stderr,none"]
            compared += 1
    assert compared == 4
    # Each seed has examples of its own, or there would be nothing to average.
    perplexities = found["off"]["local_last"]["perplexity"]["values"]
    assert perplexities["3"] != perplexities["4"]


def test_means_and_deviations_are_over_the_seeds(found):
    for metrics in found["off"].values():
        for figures in metrics.values():
            values = [figures["values"]["3"], figures["values"]["4"]]
            assert figures["mean"] == pytest.approx(statistics.fmean(values))
            assert figures["deviation"] == pytest.approx(statistics.stdev(values))


def test_quantizers_are_seen_by_tasks(found):
    own, other = (found[quantizers]["local_last"]["perplexity"]["mean"] for quantizers in ("trained", "off"))
    assert own != other


def test_without_lm_eval_the_error_names_the_extra(files, monkeypatch, capsys):
    tasks.manager.cache_clear()
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    said = refused([files / "run", "--tasks", "local_words", "--include_path", files / "yaml"], capsys)
    assert "pip install 'ds_quant[eval]'" in said


def test_a_task_that_is_not_there_is_refused(files, capsys):
    said = refused([files / "run", "--tasks", "helaswag", "--include_path", files / "yaml"], capsys)
    assert "got 'helaswag'" in said
    assert "did you mean 'hellaswag'?" in said
    for name in tasks.PAPER:  # the names are lm-eval's: else the preset would be refused like this one
        assert name in tasks.manager(str(files / "yaml"), include_defaults=True).all_tasks


def test_a_task_without_its_data_is_refused(files, capsys, tmp_path):
    task = (files / "yaml" / "last.yaml").read_text().replace("questions.jsonl", "gone.jsonl")
    (tmp_path / "last.yaml").write_text(task.replace("local_last", "local_gone"))
    said = refused([files / "run", "--tasks", "local_gone", "--include_path", tmp_path], capsys)
    assert said.startswith("error: --tasks local_gone: got ")
    assert said.count("\n") == 1
