"""Quantized gradients at every seam of DeepSpeed, with real ranks, against DeepSpeed's own reduction."""

import itertools
import json

import pytest
from helpers.launching import PROGRAMS, run_ranks

from ds_quant.engine.reduction import CAN_SUM

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

TIMEOUT = 400
ELEMENTS = 13 * 37 + 37 + 37 * 37 + 37 * 5 + 5 + 1 + 3
SWITCHES = (
    "reduce_scatter",
    "contiguous_gradients",
    "overlap_comm",
    "round_robin_gradients",
    "use_multi_rank_bucket_allreduce",
)


def switched(stage):
    """Half of all combinations, in which those of any four switches occur; the two stages have them all."""
    for values in itertools.product((True, False), repeat=len(SWITCHES)):
        if (sum(values) + stage) % 2:
            words = ",".join(f"{name}={str(value).lower()}" for name, value in zip(SWITCHES, values, strict=True))
            # DeepSpeed's safe_get_full_grad, which bf16 needs, mixes up parameters that are dealt out in turn.
            dtype = "bf16" if values[1] == values[2] and not values[3] else "fp32"
            yield f"stage={stage},dtype={dtype},{words}"


BF16_OPTIMIZER = "stage=1,dtype=bf16,grad_accum_dtype=fp32"
OFFLOAD = 'offload_optimizer={"device":"cpu"},zero_force_ds_cpu_optimizer=false'
ROTATED = "gradient.bits=4,gradient.rotation=hadamard"
FEEDBACK = "gradient.bits=4,gradient.error_feedback=true"
MODES = [
    *(f"stage={stage}" for stage in range(4)),
    "stage=0,dtype=bf16",
    "stage=0,prescale_gradients=true",
    "stage=0,gradient_predivide_factor=4.0",
    "stage=0,gradient_allreduce_op=sum",
    "stage=0,communication_data_type=bf16",
    f"stage=0,accumulation=3,{FEEDBACK}",
    f"stage=0,{ROTATED}",
    BF16_OPTIMIZER,
    f"{BF16_OPTIMIZER},accumulation=3,{FEEDBACK}",
    *switched(1),
    *switched(2),
    "stage=1,gradient_allreduce_op=sum",
    "stage=1,prescale_gradients=true,reduce_scatter=false",
    "stage=2,gradient_predivide_factor=4.0,reduce_scatter=false",
    "stage=1,communication_data_type=bf16",
    "stage=2,reduce_bucket_size=500,gradient.rounding=stochastic",
    f"stage=1,accumulation=3,{FEEDBACK}",
    f"stage=2,accumulation=3,{FEEDBACK}",
    f"stage=2,{ROTATED}",
    f"stage=2,{OFFLOAD}",
    "stage=2,dtype=autocast",
    "stage=2,dtype=bf16,grad_accum_dtype=fp32",
    "stage=2,dtype=bf16,grad_accum_dtype=fp32,contiguous_gradients=false",
    "stage=3,dtype=bf16,contiguous_gradients=false",
    "stage=3,dtype=autocast",
    "stage=3,reduce_scatter=false",
    "stage=3,dtype=bf16,reduce_scatter=false,gradient_predivide_factor=4.0",
    "stage=3,reduce_bucket_size=500,gradient.rounding=stochastic",
    f"stage=3,accumulation=3,{FEEDBACK}",
    f"stage=3,{ROTATED}",
    f"stage=3,{OFFLOAD}",
    "stage=1,experts=2",
]
THREE = [
    "stage=0",
    BF16_OPTIMIZER,
    "stage=1",
    "stage=1,dtype=bf16,reduce_scatter=false",
    "stage=2,round_robin_gradients=true",
    f"stage=2,use_multi_rank_bucket_allreduce=false,accumulation=2,{FEEDBACK}",
    "stage=3",
    "stage=3,reduce_scatter=false",
]
EXPERTS = [f"stage={stage},dtype=bf16,experts={size}" for stage in range(3) for size in (1, 2)]
HIERARCHICAL = [f"stage={stage},gradient.hierarchical=2" for stage in range(4)]
FOUR = [
    *EXPERTS,
    *HIERARCHICAL,
    f"stage=0,accumulation=2,gradient.hierarchical=2,{FEEDBACK}",
    "stage=3,zero_hpz_partition_size=2",
    "stage=0,sequence=2",
    "stage=1,sequence=2",
    "stage=2,sequence=2,contiguous_gradients=false",
    "stage=3,sequence=2",
]
EIGHT = ["stage=0", BF16_OPTIMIZER, "stage=1", "stage=2", "stage=3"]
RUNS = [
    (ranks, mode)
    for ranks, modes in ((2, MODES), (3, THREE), (4, FOUR), (8, EIGHT))
    for mode in modes
    if CAN_SUM or "gradient_allreduce_op" not in mode
]
CASES = [pytest.param(*run, marks=pytest.mark.slow) if run[0] in (3, 8) else run for run in RUNS]


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """What each rank reports of each mode, by number of ranks; launched when first asked for."""
    folder, found = tmp_path_factory.mktemp("reductions"), {}

    def of(ranks, mode):
        if ranks not in found:
            modes, output = folder / f"modes {ranks}", folder / f"report {ranks}.json"
            modes.write_text("\n".join(mode for size, mode in RUNS if size == ranks))
            _, printed = run_ranks(PROGRAMS / "reductions.py", output, modes, ranks=ranks, timeout=TIMEOUT)
            found[ranks] = json.loads(output.read_text()), printed
        report, printed = found[ranks]
        return [rank[mode] for rank in report], printed

    return of


@pytest.mark.parametrize(("ranks", "mode"), CASES)
def test_every_seam(reports, ranks, mode):
    got, _ = reports(ranks, mode)
    for report in got:
        assert report["same_weights"]
        # Nothing but norms and flags in full precision, where DeepSpeed's own run had gradients.
        assert report["stock"] >= min(500, ELEMENTS // ranks)
        allowed = {"reduce_scatter_tensor"} if "hierarchical" in mode else set()  # inside the node
        assert {name for name, _ in report["unquantized"]} <= allowed
        assert report["bytes"] == report["counted"] > 0
        # The bound of the program is for the largest of a block; that it is missed by a factor of a hundred at most
        # shows that something was rounded.
        worst = max(report["errors"].values())
        assert 0.01 < worst <= 1.0, report["errors"]
        # Root mean square of a uniform error of a step, whose size is the largest of 32 elements over 127 or 7.
        assert 1e-4 < report["relative_error"] < (0.15 if "bits=4" in mode else 0.02)


def wire_bytes(numel, bits=8, block_size=32):
    """Codes and scales, without the padding of parameters to blocks and messages to 4 bytes."""
    return numel * (bits / 8 + 4 / block_size)


SLACK = 4 * 8 + 8
"""Bytes of a scale more for each parameter's last block, and the padding of two messages."""


@pytest.mark.parametrize("ranks", [2, 3])
def test_stages_1_to_3_send_what_a_reduce_scatter_does(reports, ranks):
    """Half of the all-reduce of stage 0: DeepSpeed's own stages 1 and 2 all-reduce."""
    share = ELEMENTS * (ranks - 1) / ranks
    sent = {
        stage: sum(report["bytes"] for report in reports(ranks, f"stage={stage}")[0]) / ranks for stage in (0, 1, 3)
    }
    slack = SLACK * (ranks - 1)
    assert wire_bytes(2 * share) <= sent[0] + 2 * slack
    assert abs(sent[0] - wire_bytes(2 * share)) < 4 * slack
    for stage in (1, 3):
        assert abs(sent[stage] - wire_bytes(share)) < 2 * slack
        assert abs(2 * sent[stage] - sent[0]) < 6 * slack


def test_4_bits_are_half_of_8(reports):
    four, eight = (sum(r["bytes"] for r in reports(2, mode)[0]) for mode in (f"stage=2,{ROTATED}", "stage=2"))
    assert abs(four / eight - (0.5 + 4 / 32) / (1 + 4 / 32)) < 0.02


@pytest.mark.parametrize("stage", [2, 3])
def test_accumulation_multiplies_bytes_and_is_warned_about(reports, stage):
    mode = f"stage={stage},accumulation=3,{FEEDBACK}"
    got, printed = reports(2, mode)
    once, _ = reports(2, f"stage=1,accumulation=3,{FEEDBACK}")
    assert got[0]["bytes"] == pytest.approx(3 * once[0]["bytes"], rel=0.02)
    assert f"ZeRO stage {stage} reduces gradients in each of the 3 micro steps of a step: 3 times the bytes" in printed
    assert "ZeRO stage 1 reduces gradients in each" not in printed


@pytest.mark.parametrize("mode", EXPERTS)
def test_experts_are_quantized_in_their_own_groups(reports, mode):
    """Those of ep_size 2 differ between the ranks, and are reduced over every other rank."""
    got, _ = reports(4, mode)
    for report in got:
        experts = [error for name, error in report["errors"].items() if "experts" in name]
        assert len(experts) == (8 if mode.endswith("=1") else 4)
        assert max(experts) > 0.01


def test_experts_that_nobody_shares_cross_no_wire(reports):
    """With two ranks and an ep_size of 2, every expert lives on one rank alone."""
    for report in reports(2, "stage=1,experts=2")[0]:
        assert all(error < 0.01 for name, error in report["errors"].items() if "experts" in name)
        assert report["errors"]["first.weight"] > 0.01


@pytest.mark.parametrize("mode", HIERARCHICAL)
def test_nodes_quantize_between_themselves_only(reports, mode):
    """Two ranks a node: of what four ranks send each other, two thirds stay in the node or go to it once."""
    hierarchical, flat = (sum(r["bytes"] for r in reports(*run)[0]) for run in ((4, mode), (2, mode.split(",")[0])))
    # Each of the two ranks of a node sends a half of what a node of one rank would.
    assert hierarchical == pytest.approx(flat, rel=0.05)


def test_the_seed_of_the_run_decides_what_is_drawn(tmp_path):
    run_ranks(PROGRAMS / "wire_seed.py", tmp_path / "report.json", timeout=200)
    for first, other, again in json.loads((tmp_path / "report.json").read_text()):
        assert first == again
        assert first != other
