"""Quantized after more steps, or trained on with the quantizers: both from one checkpoint."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.study_models import a_model, in_place_of_files, some_text
from helpers.study_results import ROWS, a_result, tuning
from studying import adapting, arms, commands, isolation, plan, results
from studying.adapting import Adapted
from studying.plan import Key, Settings

from ds_quant.cli.shared.errors import CommandError
from ds_quant.linear.convert import convert

GROUP = ("0.7m", "llama", 1.0, 0.002)
RATE = 0.02


def key_of(row: str, seed: int = 0) -> Key:
    return dataclasses.replace(a_result(row, seed, 5.0).key)


def test_rows_that_can_be_trained_on_with() -> None:
    found = {name for name, row in ROWS.items() if adapting.can_be_adapted(row)}
    assert {"w4_channel", "a4_token", "w8a8", "w4_nvfp4", "w4_channel_dampened"} <= found
    assert not {"baseline", "g8_token", "w4a4g4_block32", "w4_channel_reset", "a4_token_full_at_end"} & found


def test_both_ways_are_those_of_their_definition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, more, held_out = a_model(), some_text(5), some_text(2)
    in_place_of_files(monkeypatch, model, more, held_out)
    keys = [dataclasses.replace(key_of(row), rate=RATE) for row in ("baseline", "g8_token", "w4_channel", "a4_token")]
    settings, csv = Settings(tmp_path, tmp_path), tmp_path / "runs.csv"
    (plan.folder(keys[0], ROWS["baseline"], settings) / "model").mkdir(parents=True)
    assert adapting.measure(keys, ROWS, settings, csv) == 2
    found = {key.row: one for key, one in adapting.read(adapting.path(csv)).items()}
    assert set(found) == {"w4_channel", "a4_token"}

    def loss(one: Any) -> float:
        with torch.no_grad():
            return sum(float(one(**batch).loss) for batch in held_out) / len(held_out)

    def trained_on(one: Any) -> Any:
        optimizer = torch.optim.AdamW(one.parameters(), lr=RATE / arms.RATE_DIVISOR, weight_decay=0)
        for batch in more:
            optimizer.zero_grad()
            one(**batch).loss.backward()
            optimizer.step()
        return one

    continued = trained_on(copy.deepcopy(model))
    for row, one in found.items():
        section = json.loads(ROWS[row].config)["ds_quant"]["linear"]
        after, adapted = copy.deepcopy(continued), copy.deepcopy(model)
        convert(after, section)
        convert(adapted, section)
        trained_on(adapted.train())
        expected = (loss(continued), loss(after), loss(adapted.eval()))
        assert (one.continued, one.after, one.adapted) == pytest.approx(expected, rel=1e-5)
        assert len(set(expected)) == 3, "three models"


def test_what_is_known_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_place_of_files(monkeypatch, a_model(), some_text(1), some_text(1))
    settings, csv, key = Settings(tmp_path, tmp_path), tmp_path / "runs.csv", key_of("a4_token")
    folder = plan.folder(key_of("baseline"), ROWS["baseline"], settings) / "model"
    folder.mkdir(parents=True)
    adapting.measure([key], ROWS, settings, csv)
    folder.rmdir()
    assert adapting.measure([key], ROWS, settings, csv) == 1
    with pytest.raises(CommandError, match=r"got no .*seed-1/model"):
        adapting.measure([key, key_of("a4_token", 1)], ROWS, settings, csv)
    # More steps are another experiment.
    monkeypatch.setattr(arms, "STEPS", arms.STEPS + 1)
    with pytest.raises(CommandError, match=r"got no .*seed-0/model"):
        adapting.measure([key], ROWS, settings, csv)


@pytest.mark.parametrize("command", ["adapt", "isolate"])
def test_the_commands_start_from_models_of_the_tuned_rate(
    command: str, tmp_path: Path, token_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_place_of_files(monkeypatch, a_model(), some_text(1), some_text(1))
    csv = tmp_path / "runs.csv"
    results.write(csv, tuning())
    key = dataclasses.replace(key_of("baseline"), rate=0.004)
    (plan.folder(key, ROWS["baseline"], Settings(tmp_path, token_shards)) / "model").mkdir(parents=True)
    flags = [command, "--runs", str(tmp_path), "--corpus", str(token_shards), "--csv", str(csv), "--seeds", "0"]
    rows = ["--rows", "w4_channel", "g8_token"] if command == "adapt" else []
    assert commands.run([*flags, *rows], description="") == 0
    if command == "adapt":
        assert list(adapting.read(adapting.path(csv))) == [dataclasses.replace(key, row="w4_channel")]
    else:
        assert list(isolation.read(isolation.path(csv))) == [(key, arm) for arm in arms.ARMS]
    with pytest.raises(CommandError, match=f"{command}: got no tuned learning rate"):
        commands.run([*flags, *rows, "--ratio", "4"], description="")
    if command == "adapt":
        with pytest.raises(CommandError, match="--rows: got none to train on with"):
            commands.run([*flags, "--rows", "g8_token"], description="")


def test_a_table_of_gaps_to_the_same_steps_without() -> None:
    told = {"text": "a text", "processor": "p", "commit": "c", "date": "2026-11-30"}
    rows = list(ROWS.values())
    known = {
        key_of("a4_token", seed): Adapted(
            key_of("a4_token", seed),
            adapting.fingerprint(ROWS["a4_token"]),
            continued=5.0,
            after=5.2,
            adapted=5.05,
            **told,
        )
        for seed in range(3)
    }
    other = key_of("w4_channel")
    known[other] = Adapted(other, "of other settings", continued=5.0, after=5.1, adapted=5.1, **told)
    *_, line, end = adapting.table(rows, known, GROUP, "a text")
    assert [cell.strip() for cell in line.split("|")[1:-1]] == [
        *("a4_token", "A 4 bits per token", "3", "+0.2000", "+0.2000 to +0.2000"),
        *("+0.0500", "+0.0500 to +0.0500", "-0.1500", "-0.1500 to -0.1500"),
    ]
    assert end == ""
    assert adapting.table(rows, known, (*GROUP[:3], 0.004), "a text") == []
    diverged = {
        other: dataclasses.replace(known[other], fingerprint=adapting.fingerprint(ROWS["w4_channel"]), adapted=math.nan)
    }
    assert "| w4_channel |" in adapting.table(rows, diverged, GROUP, "a text")[-2]
    # A seed that diverged is told, and is in no mean.
    one = key_of("a4_token")
    more = {**known, one: dataclasses.replace(known[one], adapted=math.nan)}
    assert (
        "| 3 (1 diverged) | +0.2000 | +0.2000 to +0.2000 | +0.0500 |" in adapting.table(rows, more, GROUP, "a text")[-2]
    )
