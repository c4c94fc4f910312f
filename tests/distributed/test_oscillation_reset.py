"""`linear.weight.oscillation_reset` under real DeepSpeed: two ranks, stages 0 to 2, both kinds of masters."""

import json

import pytest
from helpers.launching import PROGRAMS, run_ranks
from oscillation_reset import CASES

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

RESUMED = ("0", "2 bf16")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resets")
    output = folder / "report.json"
    _, printed = run_ranks(PROGRAMS / "oscillation_reset.py", output, folder, ranks=2, timeout=300)
    return json.loads(output.read_text()) | {"printed": printed}


@pytest.mark.parametrize("case", CASES)
def test_a_reset_does_what_its_definition_says(report, case):
    found = report[case]
    assert (found["wrapper"] == "BF16_Optimizer") == (case == "BF16_Optimizer")
    want, told = found["share"]
    assert told == pytest.approx(want, abs=1e-12)
    assert 0.002 < want < 0.9, "some weights swing, and some do not"
    for rank in range(2):
        assert found["before"][rank], "it changes something before the reset"
        assert all(found["masters"][rank].values()), found["masters"][rank]
        assert all(found["weights"][rank].values()), found["weights"][rank]
        assert not found["later"][rank], "training goes on from other weights"


@pytest.mark.parametrize("case", RESUMED)
def test_resuming_is_bit_identical(report, case):
    found = report[case]["resumed"]
    for moment in ("between", "watching", "again"):
        assert found[moment] == [[True] * 3] * 2, moment


@pytest.mark.parametrize("case", RESUMED)
def test_without_what_was_watched_the_reset_is_left_out(report, case):
    found = report[case]["resumed"]
    # The same up to the reset, which the other run has and this one has not.
    assert found["without"] == [[True, False, False]] * 2
    assert found["without share"] is None
    assert "holds no distances that oscillation_reset has watched" in report["printed"]


@pytest.mark.parametrize("case", RESUMED)
def test_what_other_layers_have_watched_is_left_out(report, case):
    assert report[case]["resumed"]["other layers share"] is None
    assert "is of other weights, or of other parts of them on this rank: a watch" in report["printed"]


@pytest.mark.parametrize("case", RESUMED)
def test_no_reset_before_the_first_step(report, case):
    found = report[case]["resumed"]
    assert found["too early"] is None
    assert found["late"] > 0


def test_a_line_says_how_many(report):
    assert "% of the quantized weights swung and were reset" in report["printed"]
