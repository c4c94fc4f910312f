"""Error feedback under real DeepSpeed: checkpoints, skipped steps, memory; and communication beside other sections."""

import csv
import json
import math
import re

import pytest
import residuals_by_0_1 as by_0_1
from helpers.launching import PROGRAMS, run_ranks
from residuals import CASES, HIDDEN, LARGE, MORE, TRAINED, WIDTH

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

TIMEOUT = 200
ELEMENTS = 2 * WIDTH * HIDDEN + HIDDEN + WIDTH


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("residuals")


def run(folder, verb, ranks=2):
    output = folder / f"{verb} {ranks}.json"
    _, printed = run_ranks(PROGRAMS / "residuals.py", output, folder, verb, ranks=ranks, timeout=TIMEOUT)
    return json.loads(output.read_text()) | {"printed": printed}


@pytest.fixture(scope="module")
def saved(folder):
    return run(folder, "save")


@pytest.fixture(scope="module")
def resumed(folder, saved):
    return run(folder, "resume")


@pytest.fixture(scope="module")
def broken(folder, saved):
    return run(folder, "broken")


@pytest.fixture(scope="module")
def rest(folder):
    return run(folder, "rest")


@pytest.mark.parametrize("case", CASES)
def test_resuming_is_bit_identical(saved, resumed, case):
    before, after = saved[case], resumed[case]
    assert (before["wrapper"] == "BF16_Optimizer") == (case == "BF16_Optimizer")
    assert after["residuals"] == before["residuals"]
    assert after["more"] == before["more"]
    assert after["weights"] == before["weights"]
    assert before["weights"][0] == before["weights"][1], "the ranks have drifted apart"
    # Without residuals, the losses are others from the second step on.
    assert before["losses"] + before["more"] != before["without"]


@pytest.mark.parametrize("case", CASES)
def test_every_rank_owes_what_it_quantizes(saved, case):
    """All elements of an all-reduce: shares it sends and the result it owns. Of a reduce-scatter, what others own."""
    owed = [numel for numel, _ in saved[case]["residuals"]]
    if case in ("0", "0 bf16", "BF16_Optimizer"):
        assert owed == [ELEMENTS] * 2
    else:
        assert sum(owed) == ELEMENTS
    assert all(largest > 0 for _, largest in saved[case]["residuals"])


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("what", ["missing", "truncated", "of another step"])
def test_broken_files_are_refused_on_all_ranks_by_name(broken, what, rank):
    got = broken[f"{what} on rank {1 if what == 'of another step' else rank}"]
    assert len(got["errors"]) == 2
    for error in got["errors"]:
        assert f"ds_quant_residuals_rank_{rank:05d}.safetensors" in error
        assert "fix: copy the checkpoint again, or delete its files ds_quant_residuals_*" in error
    assert got["step"] == [0, 0], "something was loaded before the error"


def test_where_there_are_none_it_begins_anew(broken):
    assert broken["absent"] == {"errors": [None], "numel": [0, 0], "step": [TRAINED + MORE] * 2}
    assert (
        "/absent/global_step6 holds no residuals of error feedback: error feedback starts from zero"
        in broken["printed"]
    )
    assert broken["no checkpoint"] == {"errors": [None], "numel": [0, 0], "step": [0, 0]}
    # Files that are not wanted are not looked at.
    assert broken["weights only"]["numel"] == [0, 0]


def test_another_number_of_ranks_begins_anew(folder, saved):
    """With a third rank, for which there is no file."""
    got = run(folder, "others", 3)
    assert got["stage 0"] == {"errors": [None], "numel": [0] * 3, "step": [TRAINED] * 3}
    assert "global_step3 is of 2 ranks: error feedback starts from zero" in got["printed"]


def test_a_skipped_step_leaves_no_trace(rest):
    for case, got in rest["skipped"].items():
        assert got["skipped"] == 1, case
        assert got["kept"] == [True, True], case
        assert got["with"] == got["without"], case
        assert all(math.isfinite(loss) for loss in got["with"])


def test_memory_is_what_was_announced(rest):
    announced = re.findall(
        r"MEMORY ([^\n]*)\n(?:.*\n)*?.*error feedback takes (\S+) MiB on every rank", rest["printed"]
    )
    announced = {case: float(size) for case, size in announced}
    numel = 2 * LARGE * LARGE + 2 * LARGE
    want = {"0": 2 * numel, "1": 2 * numel, "2": 4 * numel, "3": 2 * numel, "1 bf16": 2 * numel}
    assert set(rest["memory"]) == set(want)
    for case, size in want.items():
        assert rest["memory"][case] == [size] * 2, case
        assert announced[case] == pytest.approx(size / 2**20, abs=0.05), case


def test_the_monitor_is_told_each_step(folder, rest):
    seen = rest["monitored"]["seen"]
    assert len(seen) == 3
    for column, name in enumerate(("wire_bytes", "compression_ratio", "quantization_error")):
        with open(folder / "monitor" / "job" / f"Train_ds_quant_{name}.csv") as file:
            rows = list(csv.reader(file))[1:]
        assert [int(step) for step, _ in rows] == [8, 16, 24]  # samples
        assert [float(value) for _, value in rows] == pytest.approx([counts[column] for counts in seen])
    # 32-bit gradients in 4 bits and a scale of 32 bits for 32 elements, and some padding.
    assert seen[0][1] == pytest.approx(32 / (4 + 1), rel=0.01)
    assert "all_to_all_single" in rest["monitored"]["logged"]


@pytest.mark.parametrize("stage", range(4))
def test_all_sections_together(rest, stage):
    got = rest["combined"][str(stage)]
    assert got["optimizer"] == "QuantAdamW"
    assert got["linears"] == ["QuantLinear"] * 2
    assert got["bytes"] > 0
    assert got["resumed"] == got["more"]
    assert got["more"][-1] < got["losses"][0] - 0.2


def test_ranks_that_disagree_all_say_so(rest):
    found = rest["disagreeing"]
    for name in ("bits", "block_size", "model"):
        for error in found[name]:
            assert "ds_quant.communication: got ..." in error
            assert "; allowed: the same on all ranks; fix: give every rank the same config" in error
    assert all("hierarchical: got 3; allowed: a divisor of the 2 ranks" in error for error in found["hierarchical"])
    where = "ds_quant.communication.weight.hierarchical: got 3; allowed: a divisor of the 2 ranks"
    assert all(error.startswith(where) for error in found["weights"])


def test_residuals_of_version_0_1_are_owed_on(tmp_path):
    output = tmp_path / "resumed.json"
    run_ranks(PROGRAMS / "residuals_by_0_1.py", output, "resume", timeout=TIMEOUT)
    told = json.loads((by_0_1.FOLDER / "losses.json").read_text())
    for rank, before in zip(json.loads(output.read_text()), told, strict=True):
        assert rank["same"], "other residuals than in the file"
        assert rank["owed"] > 0
        # Later ones depend on codes, which flip by the last bits of sums: those differ between processors.
        assert rank["losses"][0] == pytest.approx(before["losses"][0], rel=1e-5)
        assert all(math.isfinite(loss) for loss in rank["losses"])
