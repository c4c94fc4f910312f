"""The study's tables: what the CSV has, and nothing else."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from conftest import ROOT
from helpers.study_results import a_result
from studying import adapting, commands, isolation, memory, post_training, results, rows, tables
from studying.results import Result

from ds_quant.cli.shared.errors import CommandError


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


def test_rows_at_other_rates_are_held_against_the_baseline_there() -> None:
    found = some_results()
    found += [a_result("baseline", 1, 5.32, rate=0.001)]
    found += [a_result("w8a8", 0, 5.25, rate=0.001), a_result("w8a8", 1, 5.33, rate=0.001)]
    found += [a_result("w8a8", 0, 5.4, rate=0.004), a_result("w4_channel", 0, math.nan, rate=0.004, state="diverged")]
    lines = text_of(found).splitlines()
    first = lines.index("| row | 0.001 | 0.002, tuned | 0.004 | the paper |") + 2
    told = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[first:]]
    assert told == [
        [
            "baseline, above its loss at the tuned rate",
            "+0.2100 (+0.0829 to +0.3371, 2 seeds)",
            "",
            "+0.3000 (one seed)",
            "",
        ],
        ["w4_channel", "", "+0.2010 (+0.1985 to +0.2035), degraded", "1 of 1 diverged", "unstable, degraded"],
        [
            *("w8a8", "+0.0300 (-0.2241 to +0.2841, 2 seeds), undecided"),
            *("+0.0020 (-0.0005 to +0.0045), equal", "+0.1000 (one seed), undecided"),
            "about baseline: recommended",
        ],
    ]
    # The other tables are those of the tuned rate.
    assert sum(line.startswith("| w8a8 |") for line in lines) == 2
    assert "At other learning rates" not in text_of(some_results())


def text_of(found: list[Result]) -> str:
    return tables.text(found, list(rows.all_rows().values()), {}, {}, [], {})


def test_the_committed_page_is_that_of_the_committed_csv(tmp_path: Path) -> None:
    page = tmp_path / "docs" / "study.md"
    page.parent.mkdir()
    committed = (ROOT / "docs" / "study.md").read_text()
    page.write_text(committed)
    copy = page.parent / "results" / "study" / "runs.csv"
    results.write(copy, results.read(results.PATH).values())
    assert copy.read_text() == results.PATH.read_text(), "sorted and in full, as the script writes it"
    for path in (post_training.path, isolation.path, memory.path, adapting.path):
        path(copy).write_text(path(results.PATH).read_text())
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


def test_the_first_table_has_what_failed_and_its_best_repair() -> None:
    found = [*some_results(), a_result("a4_token", 0, 5.0), *(a_result("g8_tensor", seed, 6.0) for seed in range(3))]
    # One seed comes behind three, whatever its loss is.
    found += [a_result("w4_nvfp4", 0, 4.0), a_result("g8_outer", 0, 5.9)]
    # What spares layers is not in the same bits, and stands apart where it is lower.
    found += [a_result("w4_block32_no_head", seed, 5.02 + seed / 10) for seed in range(3)]
    found += [a_result("w4_channel_no_head", seed, 5.01 + seed / 10) for seed in range(2)]
    found += [a_result("v8_channel", seed, 6.0) for seed in range(3)]
    made = text_of(found)
    lines = made.partition("### At a glance")[2].partition("### llama")[0].strip().splitlines()[2:]
    told = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert told == [
        [
            *("w4_channel", "llama, 0.7m, D/N 1", "+0.2010", "w4_block32", "+0.0310", "+0.0285 to +0.0335", "3", "yes"),
            "some layers: w4_block32_no_head +0.0200 (+0.0200 to +0.0200)",
        ],
        ["g8_tensor", "llama, 0.7m, D/N 1", "+0.9000", "g8_outer", "+0.9000", "", "1", "too few seeds", ""],
        ["v8_tensor", "llama, 0.7m, D/N 1", "diverged", "none", "", "", "", "", ""],
        ["v8_channel", "llama, 0.7m, D/N 1", "+0.9000", "none", "", "", "", "", ""],
    ]
    assert "| +0.2010 | yes, but for some layers |" in made
    assert "### At a glance" not in text_of(found[:5])
