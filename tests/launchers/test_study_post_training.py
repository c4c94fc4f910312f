"""The baseline's models quantized after training, beside training with the same quantizers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers.study_results import ROWS, a_result, tuning
from studying import commands, other_domain, plan, post_training, results
from studying.plan import Key, Settings
from studying.post_training import Evaluated
from studying.results import Result

from ds_quant.cli.shared.errors import CommandError

GROUP = ("0.7m", "llama", 1.0, 0.002)
TEXT = "a text"


def key_of(row: str, seed: int = 0) -> Key:
    return Key(*GROUP[:3], GROUP[3], row, seed)


def a_run(row: str, seed: int, other_loss: float) -> Result:
    return a_result(row, seed, 5.0, text=TEXT, other_loss=other_loss)


def in_place_of_evaluation(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Key, Path, Sequence[str]]]:
    """5.25 nats for whatever is put in. Returns what was asked for: key of the models, text, files of quantizers."""
    asked = []

    def evaluate(folders: Any, key: Key, settings: Settings, text: Path, quantizers: Any) -> list[dict[str, Any]]:
        asked.append((key, text, quantizers))
        return [{"quantizers_from": one, "perplexity": {"text": {"loss": 5.25}}} for one in quantizers]

    monkeypatch.setattr(other_domain, "evaluate", evaluate)
    return asked


def test_rows_that_have_something_to_put_in() -> None:
    found = {name for name, row in ROWS.items() if post_training.can_be_put_in(row)}
    assert {"w4_channel", "a4_token", "w8a8", "w4_nvfp4", "w8a8g8", "w4a4g4_block32_m4v8"} <= found
    assert not {"baseline", "baseline_untied", "g8_token", "m8_tensor", "a4_token_full_at_end"} & found


def test_gaps_are_paired_and_stand_beside_those_of_training() -> None:
    runs = [a_run("baseline", seed, 5.0 + seed) for seed in range(3)]
    runs += [a_run("w4_channel", seed, 5.3 + seed) for seed in range(2)]
    fingerprint = plan.fingerprint(ROWS["w4_channel"])
    evaluated = {}
    for seed in range(3):
        key, without = key_of("w4_channel", seed), 5.2 + seed if seed < 2 else math.nan
        evaluated[key] = Evaluated(key, fingerprint, TEXT, 5.1 + seed, without)
    evaluated[key_of("a4_token")] = Evaluated(key_of("a4_token"), "of other settings", TEXT, 9.0)
    *_, line, end = post_training.table(list(ROWS.values()), runs, evaluated, GROUP)
    assert [cell.strip() for cell in line.split("|")[3:-1]] == [
        *("3", "+0.1000", "+0.1000 to +0.1000"),
        *("2", "+0.3000", "+0.3000 to +0.3000"),
        *("2", "+0.2000", "+0.2000 to +0.2000"),
    ]
    assert end == ""
    assert post_training.table(list(ROWS.values()), runs, {}, GROUP) == []


def test_what_is_missing_is_evaluated_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    csv = tmp_path / "runs.csv"
    monkeypatch.setattr(Settings, "text", TEXT)
    monkeypatch.setattr(plan, "steps", lambda key, settings: 162)
    settings = Settings(runs=tmp_path / "runs", corpus=tmp_path)
    results.write(csv, [a_run("baseline", 0, 5.0), a_run("baseline", 1, 5.0)])
    # That of seed 1 was trained by `repeat`.
    for seed, runs in ((0, settings.runs), (1, settings.runs / plan.AGAIN)):
        where = dataclasses.replace(settings, runs=runs)
        (plan.folder(key_of("baseline", seed), ROWS["baseline"], where) / "model").mkdir(parents=True)

    asked = in_place_of_evaluation(monkeypatch)
    keys = [key_of(row, seed) for row in ("baseline", "w4_channel", "g8_token", "a4_token") for seed in range(3)]
    for _ in range(2):
        post_training.measure(keys, ROWS, settings, csv, tmp_path)
        found = post_training.read(post_training.path(csv))
        assert {(key.row, key.seed, one.loss) for key, one in found.items()} == {
            (row, seed, 5.25)
            for row in ("w4_channel", "a4_token")
            for seed in (0, 1)  # seed 2 was not trained
        }
    assert [model for model, _, _ in asked] == [key_of("baseline", seed) for seed in (0, 1)]
    for _, _, files in asked:
        assert [Path(file).parent.name.split(".")[0] for file in files] == ["w4_channel", "a4_token"]


def test_rows_with_one_forward_pass_share_an_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    csv = tmp_path / "runs.csv"
    monkeypatch.setattr(Settings, "text", TEXT)
    monkeypatch.setattr(plan, "steps", lambda key, settings: 162)
    settings = Settings(runs=tmp_path / "runs", corpus=tmp_path)
    results.write(csv, [a_run("baseline", 0, 5.0)])
    (plan.folder(key_of("baseline"), ROWS["baseline"], settings) / "model").mkdir(parents=True)
    asked = in_place_of_evaluation(monkeypatch)
    one = ("w4a4g4_nvfp4", "w4a4g4_nvfp4_m4v4_wire4")
    other = ("w4a4_block32", "w4a4g4_block32_hadamard_backward", "w4a4g4_block32_m4v8")
    apart = ("w4a4g4_block32_hadamard", "recommended_4bit", "w4a4g4_block32_split_mean")
    for names in ((*one, *other[:2]), (other[2], *apart)):
        post_training.measure([key_of(row) for row in names], ROWS, settings, csv, tmp_path)
    assert {key.row for key in post_training.read(post_training.path(csv))} == {*one, *other, *apart}
    rows = [[Path(file).parent.name.split(".")[0] for file in files] for _, _, files in asked]
    assert rows == [[one[0], other[0]], list(apart)]


def test_the_command_takes_models_of_the_tuned_rate(
    tmp_path: Path, token_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    csv, other = tmp_path / "runs.csv", tmp_path / "other.jsonl"
    other.write_text('{"text": "some text"}\n')
    settings = Settings(tmp_path, token_shards)
    results.write(csv, tuning(text=settings.text))
    key = Key(*GROUP[:3], 0.004, "baseline", 0)
    (plan.folder(key, ROWS["baseline"], settings) / "model").mkdir(parents=True)

    asked = in_place_of_evaluation(monkeypatch)
    flags = ["post-training", "--runs", str(tmp_path), "--corpus", str(token_shards), "--csv", str(csv), "--seeds", "0"]
    flags += ["--other-domain", str(other)]
    assert commands.run([*flags, "--rows", "w4_channel", "g8_token"], description="") == 0
    assert [(model, text) for model, text, _ in asked] == [(key, other)]
    assert list(post_training.read(post_training.path(csv))) == [dataclasses.replace(key, row="w4_channel")]
    for wrong, words in (
        (["--ratio", "4"], "post-training: got no tuned learning rate"),
        (["--rows", "g8_token"], "--rows: got none to put in"),
    ):
        with pytest.raises(CommandError, match=words):
            commands.run([*flags, *wrong], description="")


def test_own_models_are_evaluated_without_their_quantizers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    csv, asked = tmp_path / "runs.csv", []
    monkeypatch.setattr(Settings, "text", TEXT)
    monkeypatch.setattr(plan, "steps", lambda key, settings: 162)
    settings = Settings(runs=tmp_path / "runs", corpus=tmp_path)
    rows_of_runs = [("baseline", 0), ("a4_token", 0), ("w4_channel", 0)]
    results.write(csv, [a_run(row, seed, 5.0) for row, seed in rows_of_runs])

    def model_of(row: str) -> Path:
        return plan.folder(key_of(row), ROWS[row], settings) / "model"

    for row in ("baseline", "a4_token"):  # that of w4_channel is not there any more
        model_of(row).mkdir(parents=True)

    def evaluate(folders: Any, key: Key, settings: Settings, text: Path, quantizers: Any) -> list[dict[str, Any]]:
        asked.append((folders, quantizers))
        told = {
            "folder": str(folders[0] / "model"),
            "perplexity": {"text": {"loss": 5.5 if "off" in quantizers else 5.25}},
        }
        return [{"quantizers_from": one, **told} for one in quantizers]

    monkeypatch.setattr(other_domain, "evaluate", evaluate)
    keys = [key_of(row, seed) for row, seed in rows_of_runs]
    for _ in range(2):
        post_training.measure(keys, ROWS, settings, csv, tmp_path)
        found = {key.row: one for key, one in post_training.read(post_training.path(csv)).items()}
        assert (found["a4_token"].loss, found["a4_token"].without) == (5.25, 5.5)
        assert math.isnan(found["w4_channel"].without)
    assert [folders for folders, quantizers in asked if quantizers == ("off",)] == [[model_of("a4_token").parent]]
    assert len(asked) == 2, "what is known is not evaluated again"


def test_models_that_are_gone_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    csv = tmp_path / "runs.csv"
    monkeypatch.setattr(Settings, "text", TEXT)
    results.write(csv, [a_run("baseline", 1, 5.0)])
    with pytest.raises(CommandError, match=r"got no .*seed-1/model; .* `study.py repeat --rows baseline --seeds 1`"):
        post_training.measure([key_of("a4_token", 1)], ROWS, Settings(tmp_path, tmp_path), csv, tmp_path)
