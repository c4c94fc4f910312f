"""The study: verdicts from figures, tables from the CSV, and runs that go on where they were killed."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import random
import signal
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import tokenize_corpus
import torch
from conftest import ROOT
from helpers.samples import write_corpus
from scipy import stats
from studying import commands, plan, protocol, repairs, results, rows, smoke, tables, texts, verdicts, wiki_markup
from studying.plan import Key, Settings
from studying.results import Result
from studying.training import Training
from sweeping import paper
from transformers import AutoConfig, AutoModelForCausalLM

from ds_quant.base import trainer_checkpoints
from ds_quant.cli.shared.errors import CommandError
from ds_quant.cli.shared.spreads import Gap
from ds_quant.config import QuantConfig
from ds_quant.linear.convert import convert

ROWS = rows.all_rows()
GROUP = ("0.7m", "llama", 1.0, 0.002)


def a_result(row: str, seed: int, loss: float, **changes: Any) -> Result:
    result = Result(
        key=Key("0.7m", "llama", 1.0, changes.pop("rate", 0.002), row, seed),
        fingerprint=plan.fingerprint(ROWS[row]),
        text="a text",
        parameters=664192,
        steps=162,
        tokens=663552,
        state="done",
        loss=loss,
        lowest=loss,
        other_loss=loss + 0.1,
        dtype="float32",
        processor="a processor",
        torch="2.13.0",
        deepspeed="0.19.8",
        commit="abc",
        date="2026-11-29",
    )
    return dataclasses.replace(result, **changes)


def judged(row: str, found: list[Result]) -> verdicts.Judged:
    return next(entry for entry in verdicts.judge(list(ROWS.values()), found, GROUP) if entry.row.name == row)


# ---- verdicts


def test_an_interval_is_that_of_students_t_over_paired_seeds() -> None:
    for count in (2, 3, 8):
        base = [5 + random.random() for _ in range(count)]
        own = [loss + random.gauss(0.1, 0.02) for loss in base]
        found = [a_result("baseline", seed, loss) for seed, loss in enumerate(base)]
        found += [a_result("w4_channel", seed, loss) for seed, loss in enumerate(own)]
        random.shuffle(found)
        gap = judged("w4_channel", found).gap
        gaps = [one - other for one, other in zip(own, base, strict=True)]
        low, high = stats.t.interval(0.95, count - 1, statistics.fmean(gaps), stats.sem(gaps))
        assert gap is not None
        assert gap.half_width is not None
        assert (gap.mean - gap.half_width, gap.mean + gap.half_width) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize(
    ("mean", "half", "pairs", "diverged", "expected"),
    [
        (0.0, 0.02, 3, 0, "equal"),
        (0.01, 0.009, 3, 0, "equal"),  # above zero, and within 0.02
        (0.0, 0.0201, 3, 0, "undecided"),
        (0.03, 0.02, 3, 0, "degraded"),
        (0.03, 0.03, 3, 0, "undecided"),
        (-0.03, 0.02, 3, 0, "better"),
        (0.5, 0.01, 2, 0, "undecided"),
        (0.0, None, 1, 0, "undecided"),
        (0.0, 0.001, 3, 1, "diverged"),
    ],
)
def test_verdicts(mean: float, half: float | None, pairs: int, diverged: int, expected: str) -> None:
    assert verdicts.verdict(Gap(pairs, mean, half), diverged) == expected


def test_only_like_runs_are_paired() -> None:
    base = [a_result("baseline", seed, 5.0) for seed in range(3)]
    good = [a_result("w8_tensor", seed, 5.1) for seed in range(2)]
    others = [
        a_result("w8_tensor", 2, 9.0, fingerprint="of other settings"),
        a_result("w8_tensor", 3, 9.0),  # no baseline of that seed
        a_result("w8_tensor", 2, 9.0, text="another"),
        a_result("w8_tensor", 2, 9.0, dtype="bfloat16"),
        a_result("w8_tensor", 2, 9.0, steps=100),
        a_result("w8_tensor", 2, 9.0, rate=0.004),
    ]
    for other in others:
        gap = judged("w8_tensor", [*base, *good, other]).gap
        assert gap is not None
        assert (gap.num_pairs, gap.mean) == (2, pytest.approx(0.1)), other
    # A run that ended itself took fewer steps, and decides.
    entry = judged("w8_tensor", [*base, *good, a_result("w8_tensor", 2, math.nan, state="diverged", steps=30)])
    assert (entry.verdict, entry.num_diverged, entry.seeds) == ("diverged", 1, 3)
    assert not verdicts.needs_more_seeds(entry)


def test_small_effects_take_more_seeds() -> None:
    base = [a_result("baseline", seed, 5.0) for seed in range(3)]
    for gap, count, expected in ((0.009, 3, True), (-0.009, 3, True), (0.011, 3, False), (0.009, 2, False)):
        found = [*base, *(a_result("w8a8", seed, 5.0 + gap) for seed in range(count))]
        assert verdicts.needs_more_seeds(judged("w8a8", found)) is expected, (gap, count)


def test_a_run_diverges_by_its_end_not_by_its_way() -> None:
    assert not protocol.has_diverged(5.0, 4.6)
    assert protocol.has_diverged(5.2, 4.6)
    assert protocol.has_diverged(math.nan, 4.6)
    assert protocol.has_diverged(math.inf, math.nan)


# ---- tables


def some_results() -> list[Result]:
    found = [a_result("baseline", 0, 5.2, rate=0.001), a_result("baseline", 0, 5.3, rate=0.004)]
    for seed in range(3):
        found += [a_result("baseline", seed, 5 + seed / 10), a_result("w8a8", seed, 5.001 + seed / 10 + seed / 1000)]
        found += [a_result("w4_channel", seed, 5.2 + seed / 10 + seed / 1000)]
        found += [a_result("w4_block32", seed, 5.03 + seed / 10 + seed / 1000)]
    return [*found, a_result("v8_tensor", 0, 400.0, state="diverged")]


def test_tables_say_what_the_csv_has(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    results.write(path, some_results())
    page = tmp_path / "study.md"
    page.write_text(f"# Before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n")
    arguments = ["tables", "--csv", str(path), "--page", str(page)]
    assert commands.run(arguments, description="") == 0
    made = page.read_text()
    assert made.startswith("# Before\n")
    assert made.endswith(f"{tables.END}\nafter\n")
    lines = {line.split("|")[1].strip(): line for line in made.splitlines() if line.startswith("| ")}
    assert "| 3 | +0.0020 | -0.0005 to +0.0045 | equal | +0.0020 | about baseline: recommended | yes |" in lines["w8a8"]
    assert "| 3 | +0.2010 | +0.1985 to +0.2035 | degraded |" in lines["w4_channel"]
    assert "| +0.2010 | yes |" in lines["w4_block32"]
    assert "1 (1 diverged)" in lines["v8_tensor"]
    assert "| fails | yes |" in lines["v8_tensor"]
    assert "Tuned learning rate: 0.002" in made
    assert (tmp_path / "llama-0.7m-1.png").read_bytes().startswith(b"\x89PNG")
    assert "Not run yet: w8_tensor" in made
    # Nothing but the CSV is in them.
    assert commands.run(arguments, description="") == 0
    assert page.read_text() == made
    text = path.read_text().replace("5.203", "5.213", 1)
    assert text != path.read_text()
    path.write_text(text)
    assert commands.run(arguments, description="") == 0
    assert page.read_text() != made


def test_the_committed_page_is_that_of_the_committed_csv(tmp_path: Path) -> None:
    page = tmp_path / "docs" / "study.md"
    page.parent.mkdir()
    committed = (ROOT / "docs" / "study.md").read_text()
    page.write_text(committed)
    copy = page.parent / "results" / "study" / "runs.csv"
    results.write(copy, results.read(results.PATH).values())
    assert copy.read_text() == results.PATH.read_text(), "sorted and in full, as the script writes it"
    commands.run(["tables", "--csv", str(copy), "--page", str(page)], description="")
    assert page.read_text() == committed, "run `python launchers/study.py tables`"


def test_a_csv_comes_back_to_the_last_digit(tmp_path: Path) -> None:
    found = [
        a_result("baseline", 0, 0.1 + 0.2),
        a_result("v8_tensor", 1, math.nan, state="diverged", other_loss=math.nan),
    ]
    results.write(tmp_path / "a.csv", found)
    read = results.read(tmp_path / "a.csv")
    assert read[found[0].key] == found[0]
    assert math.isnan(read[found[1].key].loss)
    (tmp_path / "b.csv").write_text("size,family\n")
    with pytest.raises(CommandError, match="columns size, family"):
        results.read(tmp_path / "b.csv")


def test_a_rate_is_tuned_when_half_and_double_are_worse() -> None:
    def tuned(losses: dict[float, float]) -> float | None:
        found = [a_result("baseline", 0, loss, rate=rate) for rate, loss in losses.items()]
        found += [a_result("baseline", 1, 1.0, rate=0.004), a_result("w8a8", 0, 1.0, rate=0.004)]
        return results.tuned_rate(found, "0.7m", "llama", 1.0)

    assert tuned({}) is None
    assert tuned({0.002: 5.0, 0.004: 5.1, 0.008: 5.2}) is None
    assert tuned({0.001: 5.05, 0.002: 5.0, 0.004: 5.1, 0.008: 5.2}) == 0.002
    assert tuned({0.001: 4.9, 0.002: 5.0, 0.004: 5.1, 0.008: 5.2}) is None


def test_a_repeated_run_is_the_same_to_the_last_digit() -> None:
    one = a_result("v8_tensor", 0, 0.1 + 0.2)
    assert results.is_same(one, dataclasses.replace(one, date="2026-12-01", other_loss=1.0))
    assert not results.is_same(one, dataclasses.replace(one, loss=0.3))
    nan = dataclasses.replace(one, loss=math.nan, state="diverged")
    assert results.is_same(nan, dataclasses.replace(nan))
    assert not results.is_same(nan, one)


# ---- rows and sizes


def test_every_row_of_the_paper_is_there_as_its_file_has_it() -> None:
    names = [*paper.COMPONENTS, *paper.COMBINATIONS, *paper.MOMENTS]
    matrix = {name: row for name, row in ROWS.items() if row.kind == rows.MATRIX}
    assert list(matrix) == names
    assert set(paper.OUTCOMES) == set(names)
    for name, row in matrix.items():
        assert row.config == (ROOT / "ds_configs" / "paper" / f"paper_{name}.json").read_text()


@pytest.mark.parametrize("name", ROWS)
def test_every_row_is_one_that_ds_quant_takes(name: str) -> None:
    section = json.loads(ROWS[name].config.replace(repairs.LAST, "1")).get("ds_quant")
    quant = None if section is None else QuantConfig.model_validate(section)
    if quant is not None and quant.linear is not None:
        for family in protocol.FAMILIES:
            overrides = protocol.Size(32, 64, 2, 2, 16, 2, 2).overrides(family)
            values = {key: value == "True" if "tie" in key else int(value) for key, value in overrides.items()}
            config = AutoConfig.for_model(family, **values, vocab_size=64, bos_token_id=1, eos_token_id=1)
            model = AutoModelForCausalLM.from_config(config)
            convert(model, quant.linear)
            ids = torch.randint(64, (2, 16))
            model(input_ids=ids, labels=ids).loss.backward()
            assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    others = {plan.fingerprint(row) for row in ROWS.values() if row.name != name}
    assert plan.fingerprint(ROWS[name]) not in others


def test_repairs_have_the_bits_of_what_they_repair() -> None:
    bits = {"nvfp4": 4, "nvint4": 4, "mxfp4": 4}
    for name, repair in repairs.ALL.items():
        told = [
            v for part in repair.section.values() for k, v in part.items() if isinstance(v, dict) and k != "rotation"
        ]
        most = max(values.get("bits") or bits[values["format"]] for values in told)
        named = {int(digit) for digit in "48" if digit in name.partition("_")[0]}
        assert most == max(named) or name.endswith("m4v8"), name


@pytest.mark.parametrize("family", protocol.FAMILIES)
def test_parameters_are_those_of_the_models(family: str) -> None:
    from pretraining import arguments, model

    for size in protocol.SIZES.values():
        overrides = ",".join(f"{key}={value}" for key, value in size.overrides(family).items())
        asked = arguments.ModelArguments(
            preset="tiny" if family == "llama" else "tiny-gpt2", config_overrides=overrides
        )
        config = model.resolve_config(asked, vocab_size=2048, context_length=size.context_length)
        with torch.device("meta"):
            built = AutoModelForCausalLM.from_config(config)
        assert model.describe(built)["num_parameters"] == size.parameters(family, 2048)
    assert protocol.SIZES["0.7m"].steps("llama", 2048, 1) == 162


def test_limits_hold_a_further_run_of_the_same_kind() -> None:
    # Of normal gaps, one in a thousand is outside, TOLERANCE aside.
    generator = random.Random(5)
    outside = 0
    for _ in range(4000):
        values = [generator.gauss(0.3, 1.0) for _ in range(6)]
        outside += not smoke.limits(values[:5]).hold(values[5])
    assert 0 < outside < 15
    assert not smoke.limits([0.0, 0.1, 0.2, 0.3, 0.4]).hold(math.nan)
    with pytest.raises(CommandError, match="5 to 11"):
        smoke.limits([1.0, 2.0])


def test_the_smoke_runs_tell_rows_apart() -> None:
    made = smoke.measured(list(results.read(smoke.PATH).values()))
    assert made["w8a8"].hold(0.0)
    for name in smoke.ROWS[1:]:
        assert not made[name].hold(0.0), "a run in which the quantizer does nothing must be seen"


def test_a_figure_outside_its_limits_fails(capsys: pytest.CaptureFixture[str]) -> None:
    def short(row: str, seed: int, loss: float, **changes: Any) -> Result:
        return dataclasses.replace(
            a_result(row, seed, loss, **changes),
            key=Key(smoke.SIZE, smoke.FAMILY, smoke.RATIO, smoke.RATE, row, seed),
        )

    gaps = {"baseline": 0.0, "w8a8": 0.0, "g4_tensor": 0.2}
    before = [short(row, seed, 6.5 + gap + seed / 1000) for row, gap in gaps.items() for seed in range(5)]
    now = {row: short(row, smoke.SEED, 6.501 + gap) for row, gap in gaps.items()}
    assert smoke.compare(list(now.values()), before) == 0
    for row, loss in (("w8a8", 6.6), ("g4_tensor", 6.501), ("baseline", 6.0), ("w8a8", math.nan)):
        changed = {**now, row: short(row, smoke.SEED, loss, state="diverged" if math.isnan(loss) else "done")}
        capsys.readouterr()
        assert smoke.compare(list(changed.values()), before) == 1, (row, loss)
        assert f"OUTSIDE: {row}" in capsys.readouterr().out


# ---- text


def test_prose_of_an_article() -> None:
    markup = """{{Infobox|a={{b|[[c]]}}}}
'''Anarchism''' is a [[political philosophy|philosophy of politics]] of [[self-governance]].<ref name="x">{{cite}}</ref>
[[File:A.jpg|thumb|A [[link]] in a caption that ends with a full stop.]]
{| class="wikitable"
| a cell that is long enough to be a sentence of its own here.
|}
== History ==
In 1920 &amp; later it was <b>much</b> discussed<!-- by whom? --> in the press of [http://a.org many countries].
* a list whose item is long enough to be a sentence, and is none.
A last sentence with a formula <math>x^2.</math> and a note<ref>Not this one.</ref> in it.
==References==
This line is long enough to be a sentence, but it lists only sources.
"""
    assert wiki_markup.prose(markup).split("\n") == [
        "Anarchism is a philosophy of politics of self-governance.",
        "In 1920 & later it was much discussed in the press of many countries.",
        "A last sentence with a formula and a note in it.",
    ]


def test_browns_words_become_text() -> None:
    tagged = "\n\n\tThe/at jury/nn said/vbd ,/, ``/`` no/at evidence/nn ''/'' ./.\n\n\n\tWhy/wrb ?/. ?/.\n"
    assert texts.untagged(tagged) == 'The jury said, "no evidence".\nWhy?'


# ---- runs


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    text = write_corpus(folder / "documents.jsonl")
    flags = ["--train_file", str(text), "--vocab_size", "320", "--validation_fraction", "0.2"]
    assert tokenize_corpus.main([*flags, "--output_dir", str(folder / "tokens")]) == 0
    return folder / "tokens"


@pytest.mark.distributed
def test_a_killed_run_goes_on_and_a_finished_one_is_left(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = protocol.Size(32, 64, 2, 2, context_length=32, batch=4, micro_batch=4)
    monkeypatch.setitem(protocol.SIZES, "tiny", tiny)
    key = Key("tiny", "gpt2", 0.2, 1e-3, "w8a8", 7)
    where = {"processor": "p", "torch": "t", "deepspeed": "d", "commit": "c", "date": "2026-11-29"}
    said: list[str] = []
    training = Training(Settings(tmp_path / "runs", corpus), ROWS, tmp_path / "runs.csv", where, say=said.append)
    out = plan.folder(key, ROWS["w8a8"], training.settings)

    def kill() -> None:
        while trainer_checkpoints.newest_whole(out) is None:
            time.sleep(0.05)
        os.kill(json.loads((out / "status.json").read_text())["pid"], signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    assert training.run([key]) == [key]
    killer.join(timeout=1)
    assert not (out / "summary.json").exists(), "killed in the middle"
    assert said[-1].startswith("failed (-9)")
    assert not training.csv.exists()

    assert training.missing([key]) == [key]
    assert training.run([key]) == [], training._log(key).read_text()
    summary = json.loads((out / "summary.json").read_text())
    assert summary["resumed_from_step"], "from its checkpoint"
    (result,) = results.read(training.csv).values()
    assert result.loss == summary["final_eval_loss"]
    assert result.steps == tiny.steps("gpt2", 320, 0.2) == summary["steps"]
    assert (result.state, result.parameters) == ("done", tiny.parameters("gpt2", 320))

    # A finished run is never run again: neither what the CSV has, nor what only its folder has.
    told = len(said)
    assert training.run([key]) == []
    training.csv.unlink()
    assert training.run([key]) == []
    assert said[told:] == []
    assert repr(results.read(training.csv)[key]) == repr(result), "nan included"
    # Other settings of the row are another run.
    changed = dataclasses.replace(ROWS["w8a8"], config=ROWS["w8_channel"].config)
    assert dataclasses.replace(training, rows={"w8a8": changed}).missing([key]) == [key]


def test_mistakes_are_said(tmp_path: Path, corpus: Path) -> None:
    flags = ["plan", "--runs", str(tmp_path), "--corpus", str(corpus), "--csv", str(tmp_path / "runs.csv")]
    for wrong, message in (
        (["--rows", "w5"], "--rows: got 'w5'; allowed: baseline"),
        (["--sizes", "1m"], "--sizes: got '1m'"),
        (["--families", "bert"], "--families: got 'bert'"),
        (["--ratio", "-1"], "--ratio: got '-1'"),
        (["--at-once", "0"], "--at-once: got 0"),
        (["--seeds", "x"], "SEEDS: got 'x'"),
    ):
        with pytest.raises(CommandError, match=message):
            commands.run([*flags, *wrong], description="")


def test_a_plan_names_what_is_missing(tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "runs.csv"
    flags = ["plan", "--runs", str(tmp_path), "--corpus", str(corpus), "--csv", str(path)]
    assert commands.run([*flags, "--rows", "w8a8", "--seeds", "0-2"], description="") == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("to tune") for line in lines) == len(protocol.RATES)
    assert sum(line.startswith("to train") for line in lines) == 6
    text = Settings(tmp_path, corpus).text
    found = [a_result("baseline", seed, 5.0, text=text) for seed in range(2)]
    results.write(path, [*found, *(a_result("baseline", 0, 6.0, text=text, rate=rate) for rate in (0.001, 0.004))])
    assert commands.run([*flags, "--rows", "w8a8", "--seeds", "0-2"], description="") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "baseline" in line] == [
        'to train ["0.7m", "llama", "D/N 1", "rate 0.002", "baseline", "seed 2"]'
    ]
    with path.open() as file:
        assert next(csv.reader(file)) == list(results.COLUMNS)
