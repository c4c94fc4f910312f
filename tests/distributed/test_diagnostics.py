"""Diagnostics inside training, with two real ranks at every ZeRO stage: the training is bit for bit that without them,
the ranks' figures are joined, a resumed run writes the looks of an undisturbed one, and no failure ends a run."""

import csv
import json

import pytest
from common import LENGTH
from diagnosed import ACCUMULATION, EVERY, ROWS, SAVED_AT, STEPS
from helpers.launching import PROGRAMS, run_ranks

from ds_quant.diagnostics import folder

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(400)]

CASES = ("0:fp32", "1:bf16", "2:bf16", "3:fp32")
KINDS = {"outliers", "gradient_error", "gradient_norms", "moments", "quantization_error", "oscillation"}
LOOKS = list(range(EVERY, STEPS + 1, EVERY))
VALUES_A_STEP = 2 * ACCUMULATION
"""Losses of training, the evaluation and the generator."""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(reports of all cases by rank, folder, output)."""
    place = tmp_path_factory.mktemp("diagnosed")
    job = (PROGRAMS / "diagnosed.py", place / "report.json", place, *CASES, "wrong")
    _, output = run_ranks(*job, timeout=300)
    return json.loads((place / "report.json").read_text()), place, output


def measured(path, *, with_seconds=False):
    """Measurements by step and kind, those of the norms a step under a name of their own."""
    found = {}
    for step, file in folder.looks(path).items():
        for one in folder.read_file(file):
            if not with_seconds:
                one.settings.pop("seconds", None)
            found[step, "norms" if one.rows and "spike" in one.rows[0] else one.kind] = one
    return found


@pytest.mark.parametrize("case", CASES)
def test_training_is_bit_for_bit_that_without(run, case):
    for own in run[0][case]:
        assert own["with"] == own["without"]
        losses, weights = own["with"]
        assert len(losses) == STEPS * VALUES_A_STEP
        assert len(set(weights)) == STEPS, "nothing was trained"
        assert own["off"] == [False, own["hooks"][0]], "something was attached without the section"
        assert own["hooks"][0] == own["hooks"][1], "hooks were left behind"


@pytest.mark.parametrize("case", CASES)
def test_every_look_has_every_kind_and_is_counted(run, case):
    reports, place, _ = run
    found = measured(place / case.replace(":", "-") / "looks", with_seconds=True)
    assert sorted({step for step, _ in found}) == LOOKS
    kinds = KINDS | ({"norms"} if case != "0:fp32" else set())  # DeepSpeed computes no norm there
    assert {kind for _, kind in found} == kinds
    for (step, kind), one in found.items():
        assert one.rows, (step, kind)
        if kind != "norms":
            assert one.settings["ranks"] == 2
            assert one.settings["zero_stage"] == int(case[0])
            assert one.settings["seconds"] > 0
    for own in reports[case]:
        assert 0 < own["seconds"] < 30


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_writes_the_looks_of_an_undisturbed_one(run, case):
    reports, place, _ = run
    here = place / case.replace(":", "-")
    for own in reports[case]:
        at = SAVED_AT * VALUES_A_STEP
        assert own["resumed"][0] == own["with"][0][at:]
        assert own["resumed"][1] == own["with"][1][SAVED_AT:]
    assert measured(here / "resumed") == measured(here / "looks")
    times = [(here / name / f"step-{STEPS:08d}.json").stat().st_mtime_ns for name in ("looks", "resumed")]
    assert times[0] < times[1], "the resumed run left a look as it was"
    tables = [(here / name / folder.SCALARS).read_text() for name in ("looks", "resumed")]
    assert tables[0] == tables[1]
    rows = list(csv.DictReader(tables[0].splitlines()))
    assert len({(row["step"], row["kind"], row["name"]) for row in rows}) == len(rows), "a row stands there twice"
    last = {row["name"]: float(row["value"]) for row in rows if (row["step"], row["kind"]) == ("6", "oscillation")}
    assert {"changed", "reversed", "returned"} <= last.keys(), "the looks before were forgotten"


def test_partitions_and_whole_moments_come_to_the_same(run):
    """Stage 3 holds what stage 0 holds, in parts; in fp32 the runs differ by the order of sums alone."""
    whole, parts = (measured(run[1] / name / "looks") for name in ("0-fp32", "3-fp32"))
    for kind in KINDS - {"moments"}:
        first, second = whole[EVERY, kind], parts[EVERY, kind]
        assert [next(iter(row.values())) for row in first.rows] == [next(iter(row.values())) for row in second.rows]
        for name, value in first.scalars.items():
            # Stochastic rounding of one element more or less moves shares of 10^4 elements by 10^-4.
            assert second.scalars[name] == pytest.approx(value, rel=2e-2, abs=1e-3), (kind, name)
    elements = [found[EVERY, "moments"].settings["elements"] for found in (whole, parts)]
    assert elements[0] == elements[1], "a moment was counted twice, or not at all"


def test_the_first_micro_batch_of_each_rank_is_seen(run):
    """Both ranks' sequences of the first micro-batch, and none of the evaluation or of the second."""
    tokens = LENGTH * ROWS * 2
    for case in CASES:
        found = measured(run[1] / case.replace(":", "-") / "looks")
        assert {found[step, "outliers"].settings["tokens"] for step in LOOKS} == {tokens}


def test_monitor_gets_the_scalars_of_every_look(run):
    path = run[1] / "1-bf16" / "monitor" / "run" / "Train_ds_quant_outliers_largest_over_mean.csv"
    rows = list(csv.reader(path.read_text().splitlines()))[1:]
    assert len(rows) == len(LOOKS)
    found = measured(run[1] / "1-bf16" / "looks")
    expected = [found[step, "outliers"].scalars["largest_over_mean"] for step in LOOKS]
    assert [float(row[1]) for row in rows] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("compile", 'ds_quant.diagnostics: got "engine.compile()"; allowed: a model in eager mode'),
        ("folder", "ds_quant.diagnostics.output_dir: got "),
        ("optimizer", 'ds_quant.diagnostics.kinds: got "moments"; allowed: the other kinds: SGD has no exp_avg_sq'),
        ("granularity", 'ds_quant.diagnostics.exp_avg_sq.granularity: got "channel"; allowed: "block"'),
        ("ranks", "ds_quant.diagnostics: got "),
    ],
)
def test_what_cannot_work_is_refused_on_all_ranks(run, case, said):
    for rank, own in enumerate(run[0]["wrong"]):
        assert own[case], f"accepted on rank {rank}"
        assert said in own[case]


def test_a_failure_on_one_rank_costs_that_kind_and_nothing_else(run):
    reports, place, output = run
    assert output.count("diagnostics: outliers failed on rank 1 and is left out at step 2: ") == 1
    for own, plain in zip(reports["wrong"], reports["1:bf16"], strict=True):
        assert own["losses"] == plain["without"][0][EVERY * VALUES_A_STEP : 2 * EVERY * VALUES_A_STEP]
        assert own["weights"] == plain["without"][1][EVERY : 2 * EVERY]
    assert output.count("diagnostics: the look at step 4 could not be written: ") == 1
    assert (place / "wrong" / "failing").read_text() == "a file where the folder was"


def test_a_section_of_diagnostics_alone_looks_and_reports_when_the_program_ends(tmp_path):
    """Nothing is called at the end of a native loop."""
    program = PROGRAMS / "report_at_exit.py"
    _, output = run_ranks(program, tmp_path / "looks", ranks=1, timeout=120, cwd=tmp_path)
    names = sorted(path.name for path in (tmp_path / "looks").iterdir())
    assert names == ["report.html", "scalars.csv", "step-00000002.json", "step-00000004.json"]
    assert (tmp_path / "looks" / "report.html").read_text().count("<img ") == 3
    assert "diagnostics leave out oscillation: the section has no quantizer of weights" in output
