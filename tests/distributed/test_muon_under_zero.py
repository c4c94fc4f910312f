"""Muon with momentum in few bits under ZeRO: beside DeepSpeed's own, on one and two ranks, and from checkpoints."""

import json

import pytest
import torch
from launching import PROGRAMS, run_ranks
from moment_jobs import ACCUMULATION, tiny
from muon_jobs import MATRICES, RESUMED, SAME

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

TIMEOUT = 280
SIZES = {name: param.numel() for name, param in tiny().named_parameters()}
IN_BOTH = [(2, name) for name in SAME] + [(1, "1"), (1, "3 bf16")]
SAVED = [(2, name) for name in RESUMED] + [(1, "1"), (1, "3 bf16")]


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    found = {}
    for ranks in (2, 1):
        folder = tmp_path_factory.mktemp(f"muon{ranks}")
        output = folder / "report.json"
        program = PROGRAMS / "muon_jobs.py"
        run_ranks(program, output, folder, ranks=ranks, timeout=TIMEOUT)
        found[ranks] = json.loads(output.read_text())
    return found


@pytest.mark.parametrize(("ranks", "case"), IN_BOTH)
def test_a_run_is_deepspeeds_with_its_momentum_put_through_codes(reports, ranks, case):
    """Bit for bit: weights, momentums and losses, where the codes are those of numerics.blockwise."""
    got = reports[ranks]["same"][case]
    assert got["same"] == [[True, True]] * ranks
    assert got["losses"] == got["stock"]
    assert got["moved"] > 0.5, "nothing was trained"
    if case == "1 bf16, momentum not quantized":
        assert set(got["kept"]) == {"Tensor"}
        assert got["error"] == 0
    else:
        assert set(got["kept"]) == {"QuantizedState"}
        # Codes are within one gap: an eighth of a float value, 13/49 of a block's largest in 4 bits.
        assert 0.005 < got["error"] < (0.125 if "4 bits" not in case else 13 / 49)
        assert got["pending"] == 0, "a copy of full size stays between steps"


@pytest.mark.parametrize(("ranks", "case"), SAVED)
def test_resuming_is_bit_identical(reports, ranks, case):
    before = reports[ranks]["resumed"][case]
    after = before["resumed"]
    for what in ("stored", "digest", "more", "after"):
        assert after[what] == before[what], what
    assert before["after"] != before["digest"]
    assert before["zero_to_fp32"] == sorted(SIZES)
    losses = torch.tensor([*before["losses"], *before["more"]])
    assert losses[-ACCUMULATION:].mean() < losses[:ACCUMULATION].mean() - 0.5


@pytest.mark.parametrize("case", RESUMED)
def test_states_are_what_was_promised(reports, case):
    found = {"QuantizedState": 0, "Tensor": 0}
    for rows in reports[2]["resumed"][case]["stored"]:
        for states in rows:
            assert set(states) in ({"momentum_buffer"}, {"exp_avg", "exp_avg_sq"})
            (kind,) = {kind for kind, _ in states.values()}
            found[kind] += max(numel for _, numel in states.values())
    excluded = {"norm.weight", "norm.bias", "inner.weight"} if RESUMED[case].exclude else set()
    full = sum(SIZES[name] for name in excluded)
    # At stages 1 and 2 both ranks keep the momentum of a matrix that is cut between them.
    split = sum(SIZES[name] for name in MATRICES)
    assert full <= found["Tensor"] <= 2 * full
    quantized = sum(SIZES.values()) - full
    assert quantized <= found["QuantizedState"] <= quantized + split + 16


def test_checkpoints_go_on_with_other_momentums(reports):
    resumed = reports[2]["resumed"]
    for other, kind in (("other bits", "QuantizedState"), ("unquantized", "Tensor")):
        got = resumed[other]
        assert {rows[0]["momentum_buffer"][0] for rows in got["stored"]} == {kind}
        assert got["more"][:ACCUMULATION] == resumed["1"]["more"][:ACCUMULATION]
        assert got["more"] == pytest.approx(resumed["1"]["more"], abs=0.05)


def test_checkpoints_of_deepspeeds_muon_go_on(reports):
    got, want = reports[2]["resumed"]["stock"], reports[2]["same"]["1"]["more"]
    assert {rows[0]["momentum_buffer"][0] for rows in got["stored"]} == {"QuantizedState"}
    assert got["more"][:ACCUMULATION] == want[:ACCUMULATION]
    assert got["more"] == pytest.approx(want, abs=0.05)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("stage 0", "zero_optimization.stage: got 0; allowed: 1, 2 or 3 with Muon"),
        ("universal", "checkpoint.load_universal: got true; allowed: false with Muon"),
        ("nesterov", "optimizer.params.nesterov: got false; allowed: lr, muon_lr, adam_lr, momentum"),
        ("momentum", "ZeroMuon(momentum): got 1.0; allowed: a number from 0 to below 1"),
        ("ns_method", 'ZeroMuon(ns_method): got "qr"; allowed: gram or standard'),
        ("state", "exp_avg_slow: got"),
    ],
)
def test_what_cannot_be_done_is_refused(reports, case, message):
    assert message in reports[1]["refused"][case]
