"""`benchmark.py roofline`: a published reading is reproduced, and the page says what the command computes."""

from __future__ import annotations

import benchmark
import pytest
from conftest import ROOT

from benchmarks import roofline
from benchmarks.roofline import AFTER, BEFORE, GOALS, Rates, Way

PAGE = ROOT / "docs" / "gpu.md"
# (in, out, tokens): microseconds in bf16, in int8 (nearest, stochastic), speed-ups before, and with the reading's own
# terms after: what a reading of the code of 2026-11-28 estimated for an H100.
READING = {
    (768, 3072, 2048): (47, 99, 125, 0.47, 0.38, 1.00),
    (768, 3072, 8192): (187, 365, 468, 0.51, 0.40, 1.05),
    (3072, 768, 8192): (187, 327, 352, 0.57, 0.53, 1.25),
    (4096, 4096, 8192): (1330, 1289, 1427, 1.03, 0.93, 1.54),
    (4096, 14336, 8192): (4655, 3971, 4454, 1.17, 1.05, 1.59),
}
READINGS_AFTER = Way("", x=3, w=3, g=7, results=0, random_instructions=0, launches=None, random_launches=None)
SIMPLE = Rates("simple", bf16=100.0, int8=200.0, bandwidth=10.0, instructions=5.0)


@pytest.mark.parametrize("layer", READING, ids=str)
def test_the_reading_is_reproduced(layer):
    bf16, nearest_us, stochastic_us, nearest, stochastic, after = READING[layer]
    got, random = (roofline.predict(BEFORE, *layer, stochastic=stochastic) for stochastic in (False, True))
    assert got.bf16 * 1e6 == pytest.approx(bf16, abs=0.5)
    assert got.int8 * 1e6 == pytest.approx(nearest_us, abs=2.5)
    assert random.int8 * 1e6 == pytest.approx(stochastic_us, abs=2.5)
    assert f"{got.speed_up:.2f} {random.speed_up:.2f}" == f"{nearest:.2f} {stochastic:.2f}"
    assert f"{roofline.predict(READINGS_AFTER, *layer).speed_up:.2f}" == f"{after:.2f}"


def test_the_goals_are_predicted_to_be_reached():
    for layer, goal in GOALS.items():
        assert roofline.predict(BEFORE, *layer).speed_up < roofline.predict(AFTER, *layer).speed_up
        assert roofline.predict(AFTER, *layer).speed_up >= goal


def test_without_a_cache_large_layers_come_close_to_their_goals():
    """What docs/gpu.md says beside the prediction: within a twentieth, and small layers still reach theirs."""
    large, small = GOALS
    assert 0.95 * GOALS[large] < roofline.predict(roofline.UNCACHED, *large).speed_up < GOALS[large]
    assert roofline.predict(roofline.UNCACHED, *small).speed_up >= GOALS[small]


def test_the_rule_by_hand():
    way = Way("", x=1, w=10, g=100, results=1000, random_instructions=3, launches=1, random_launches=1)
    # X [2, 3], W [5, 3], G [2, 5].
    found = roofline.predict(way, 3, 5, 2, rates=SIMPLE)
    assert found.operations == 3 * 2 * 2 * 3 * 5
    assert found.num_bytes == 6 + 150 + 1000 + 1000 * (6 + 15 + 10)
    assert found.bf16 == pytest.approx(1.8)
    assert found.int8 == pytest.approx(0.9 + found.num_bytes / 10)
    assert found.speed_up == pytest.approx(1.8 / found.int8)
    random = roofline.predict(way, 3, 5, 2, rates=SIMPLE, stochastic=True)
    assert random.int8 - found.int8 == pytest.approx(3 * 10 / 5)


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("way", [BEFORE, AFTER], ids=lambda way: way.name)
def test_from_where_it_pays_is_the_smallest_such_size(way, stochastic):
    def ratio(hidden):
        layers = [(hidden, 3 * hidden), (hidden, hidden), (hidden, 4 * hidden), (4 * hidden, hidden)]
        found = [roofline.predict(way, *layer, 4096, stochastic=stochastic) for layer in layers]
        return sum(each.bf16 for each in found) / sum(each.int8 for each in found)

    size = roofline.pays_from(way, 4096, stochastic=stochastic)
    assert ratio(size) >= 1 > ratio(size - 64)


def test_where_int8_is_no_faster_it_never_pays():
    assert roofline.pays_from(AFTER, 8192, rates=Rates("", 1e12, 1e12, 1e12, 1e12)) is None


def test_the_page_says_what_the_command_computes(tmp_path, capsys):
    page = tmp_path / "gpu.md"
    page.write_text(PAGE.read_text().replace("| 8192 |", "| eight |"))
    assert benchmark.main(["roofline", "--page", str(page)]) == 0
    assert page.read_text() == PAGE.read_text(), "python launchers/benchmark.py roofline --page docs/gpu.md"
    printed = capsys.readouterr().out
    assert "4096 → 4096, 8192" in printed
    assert "1.03 / 0.93" in printed


def test_a_page_without_the_marks_is_refused(tmp_path, capsys):
    page = tmp_path / "other.md"
    page.write_text("nothing here")
    assert benchmark.main(["roofline", "--page", str(page)]) == 2
    assert "--page: got " in capsys.readouterr().err
    assert page.read_text() == "nothing here"
