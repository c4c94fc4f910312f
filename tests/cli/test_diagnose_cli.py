"""`ds_quant diagnose` by its door in launchers/, and the diagnostics of a job of launchers/pretrain.py."""

from __future__ import annotations

import importlib
import json
import re
import sys
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from helpers.headless import browser, open_page
from helpers.launching import launch, run_ranks
from helpers.samples import write_corpus

from ds_quant.cli import diagnose
from ds_quant.diagnostics import folder

SCRIPT = ROOT / "launchers" / "diagnose.py"
ENV = {"PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE"}
KINDS = ["outliers", "gradient_error", "gradient_norms", "moments", "quantization_error", "oscillation"]
STEPS, EVERY = 4, 2
IMAGES = "Array.from(document.images).map(i => Math.min(i.naturalWidth, i.naturalHeight))"
SECTIONS = "Array.from(document.querySelectorAll('section')).map(s => [s.id, s.querySelectorAll('img').length])"


def command(*arguments: Any, code: int = 0) -> str:
    status, output = run_ranks(SCRIPT, *arguments, ranks=0, timeout=280, env=ENV, check=False)
    assert status == code, output
    assert "Traceback" not in output
    return output


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a job of two ranks with the shipped recipe, looked at more often."""
    place = tmp_path_factory.mktemp("job")
    corpus = write_corpus(place / "documents.jsonl")
    config = json.loads((ROOT / "ds_configs" / "w8a8_diagnostics.json").read_text())
    config["ds_quant"]["diagnostics"]["every"] = EVERY
    (place / "config.json").write_text(json.dumps(config))
    arguments = [
        *("--config_overrides", "num_hidden_layers=2,hidden_size=32,intermediate_size=64", "--vocab_size", "320"),
        *("--context_length", "32", "--global_batch_size", "4", "--max_eval_sequences", "8", "--disable_tqdm", "true"),
        *("--max_steps", STEPS, "--warmup_steps", 1, "--eval_steps", 2, "--save_steps", 2, "--logging_steps", 1),
        *("--save_total_limit", 2),
        *("--train_file", corpus, "--validation_fraction", "0.2", "--output_dir", place / "run"),
    ]
    script = ROOT / "launchers" / "pretrain.py"
    _, output = run_ranks(script, "--deepspeed", place / "config.json", *arguments, timeout=280, env=ENV, cwd=place)
    (place / "output.txt").write_text(output)
    return place


def check_page(path: Path, kinds: list[str]) -> None:
    if browser() is None:
        pytest.skip("no chromium is installed (chromium-headless-shell)")
    page = open_page(path, SECTIONS, IMAGES)
    sections, images = page.values
    assert [name for name, _ in sections] == kinds
    assert all(count >= 1 for _, count in sections), sections
    assert all(size > 50 for size in images)
    assert page.console == []
    assert {url.partition(":")[0] for url in page.requests[1:]} == {"data"}


@pytest.mark.distributed
@pytest.mark.timeout(300)
def test_a_job_leaves_its_looks_in_its_folder(job: Path) -> None:
    place = job / "run" / "diagnostics"
    assert list(folder.looks(place)) == [2, 4]
    for path in folder.looks(place).values():
        assert list(dict.fromkeys(one.kind for one in folder.read_file(path))) == KINDS
    assert sorted(path.name for path in place.iterdir()) == [
        *("report.html", "scalars.csv", "step-00000002.json", "step-00000004.json")
    ]
    output = (job / "output.txt").read_text()
    assert re.search(r"Diagnostics took \d+\.\d s of this run; they lie in .*run/diagnostics\.", output)
    assert "could not" not in output
    # The recipe that was given is what the summary and the model name; the folder is of this run alone.
    assert json.loads((job / "run" / "summary.json").read_text())["config"]["ds_quant"]["diagnostics"] == {
        "every": EVERY
    }
    assert list(json.loads((job / "run" / "model" / "config.json").read_text())["ds_quant"]) == ["linear"]
    assert not (job / "diagnostics").exists()


@pytest.mark.distributed
@pytest.mark.timeout(300)
def test_the_report_of_a_job_opens_with_every_plot(job: Path) -> None:
    check_page(job / "run" / "diagnostics" / "report.html", sorted(KINDS, key=html_order))


def html_order(kind: str) -> int:
    from ds_quant.diagnostics.measurement import KINDS as ORDER

    return ORDER.index(kind)


@pytest.mark.distributed
@pytest.mark.timeout(300)
def test_report_makes_the_file_again(job: Path, tmp_path: Path) -> None:
    output = command("report", job / "run", "--output", tmp_path / "x.html", "--title", "Again & more")
    assert re.search(r"written: .*x\.html, 14 measurements of 6 kinds", output)
    assert "<title>Again &amp; more</title>" in (tmp_path / "x.html").read_text()


@pytest.mark.distributed
@pytest.mark.timeout(300)
def test_all_measures_what_a_checkpoint_allows(job: Path, tmp_path: Path) -> None:
    checkpoints = [job / "run" / f"checkpoint-{step}" for step in (2, 4)]
    text = ["--text_file", job / "documents.jsonl", "--context_length", "32", "--batch_size", "2", "--batches", "1"]
    output = command("all", *checkpoints, *text, "--output", tmp_path / "all")
    assert "left out" not in output
    kinds = [kind for kind in [*KINDS, "sharpness", "landscape"] if (tmp_path / "all" / f"{kind}.json").exists()]
    assert len(kinds) == 8
    check_page(tmp_path / "all" / "report.html", sorted(kinds, key=html_order))


@pytest.mark.distributed
@pytest.mark.timeout(300)
def test_all_of_a_model_leaves_out_what_it_has_not(job: Path, tmp_path: Path) -> None:
    text = ["--text_file", job / "documents.jsonl", "--context_length", "32", "--batch_size", "2", "--batches", "1"]
    output = command("all", job / "run" / "model", *text, "--output", tmp_path / "all", "--quantizers", "off")
    left_out = re.findall(r"---- (\w+)\nleft out: ", output)
    assert {"moments", "oscillation", "quantization_error"} <= set(left_out)
    assert (tmp_path / "all" / "report.html").exists()
    assert (tmp_path / "all" / "outliers.json").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["report", "nothing-here"], 'diagnose.py report: nothing-here: got "nothing there"; allowed: a folder'),
        (["report", "launchers"], 'got "no measurement"; allowed: folders with the JSON files of diagnostics'),
        (["report", "launchers", "--output", "no/such/report.html"], "--output: got no/such/report.html; allowed: "),
        (["all", "nothing-here"], "nothing-here"),
        (["outlier"], "invalid choice: 'outlier'"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_bad_input_is_one_clear_error(arguments: list[str], said: str) -> None:
    assert said in command(*arguments, code=2)


def test_help_is_quick() -> None:
    code = (
        "import sys\nsys.argv = ['ds_quant', '--help']\nfrom ds_quant.cli import diagnose\n"
        "try:\n    diagnose.main()\nexcept SystemExit:\n    print('torch' in sys.modules)\n"
    )
    _, output = launch([sys.executable, "-c", code], timeout=60, env={"PYTHONPATH": str(SCRIPT.parent)})
    assert output.splitlines()[-1] == "False"
    assert all(f"    {name} " in output or f"    {name}\n" in output for name in diagnose.COMMANDS)


@pytest.mark.parametrize("name", diagnose.COMMANDS)
def test_every_command_is_there_and_says_what_it_does(name: str) -> None:
    module: Any = importlib.import_module(f"ds_quant.cli.diagnosing.{name.replace('-', '_')}")
    assert diagnose.COMMANDS[name] == module.HELP
    parser = ArgumentParser()
    module.add_arguments(parser)
    assert callable(module.run)
    assert parser.format_help()
