"""Weights gathered as codes: training is bit for bit what it is without, and what leaves the job is whole."""

import json

import pytest
from launching import PROGRAMS, run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

TIMEOUT = 400
CASES = {
    1: ["odd:simulated:8:1:bf16"],
    2: [
        "llama:int8:8:1:bf16",
        "gpt2:simulated:4:2:bf16",
        "odd:int8:8:1:fp32",
        "odd:simulated:5:2:autocast",
        "gpt2:int8:8:1:bf16:round_robin_gradients=true",
    ],
    3: ["odd:int8:4:1:bf16", "gpt2:int8:8:2:fp32", "llama:simulated:8:2:bf16:offload_optimizer=true"],
}
ALL = [(ranks, case) for ranks, cases in CASES.items() for case in cases]
CROSSING = [(ranks, case) for ranks, case in ALL if ranks > 1]


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Of each number of ranks, those of its ranks."""
    found = {}
    for ranks, cases in CASES.items():
        output = tmp_path_factory.mktemp("weights") / "report.json"
        run_ranks(PROGRAMS / "weights.py", output, *cases, ranks=ranks, timeout=TIMEOUT)
        found[ranks] = json.loads(output.read_text())
    return found


@pytest.mark.parametrize(("ranks", "case"), ALL)
def test_training_is_the_same(reports, ranks, case):
    """Losses, masters, moments and norms of every step, evaluations, and going on from a checkpoint."""
    for report in reports[ranks]:
        none, codes = (report[case][how] for how in ("none", "codes"))
        for part in ("early", "middle", "late", "resumed", "evaluated", "full"):
            assert codes[part] == none[part], part
        assert codes["resumed"] == codes["late"]
        masters = [step[1] for part in ("early", "middle", "late") for step in codes[part]]
        assert len(set(masters)) == len(masters), "nothing was trained"


@pytest.mark.parametrize(("ranks", "case"), ALL)
def test_what_leaves_is_whole(reports, ranks, case):
    for report in reports[ranks]:
        none, codes = (report[case][how] for how in ("none", "codes"))
        for part in ("whole", "saved", "state_dict", "saved again"):
            assert codes[part] == none[part], part


@pytest.mark.parametrize(("ranks", "case"), CROSSING)
def test_what_one_rank_reads_is_refused(reports, ranks, case):
    """After a step weights are coarse, and nobody is handed them who might take them for whole."""
    for report in reports[ranks]:
        codes = report[case]["codes"]
        assert codes["coarse"] != codes["whole"]
        assert len(codes["refusals"]) == 4
        for error in codes["refusals"]:
            assert "engine.gather_weights() on all ranks" in error


def test_one_rank_has_whole_weights(reports):
    codes = reports[1][0][CASES[1][0]]["codes"]
    assert codes["coarse"] == codes["whole"]
    assert codes["refusals"] == [None] * 3
    assert codes["counted"] == 0
    assert codes["wire"] == [0, 0]


@pytest.mark.parametrize(("ranks", "case"), CROSSING)
def test_bytes(reports, ranks, case):
    """Those at the collectives are those of the layout, and of the statistics."""
    early = 2
    for report in reports[ranks]:
        codes = report[case]["codes"]
        assert sum(codes["wire"]) == codes["counted"] == early * sum(codes["layout"]) > 0
        assert report[case]["none"]["wire"] == [0, 0]
