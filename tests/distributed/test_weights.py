"""Weights gathered as codes: training is bit for bit what it is without, and what leaves the job is whole."""

import json

import pytest
from conftest import ROOT
from helpers.launching import PROGRAMS, run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

TIMEOUT = 400
PARTED = "stage3_param_persistence_threshold=0"
"""No weight is kept from step to step."""
AT_ONCE = "stage3_max_reuse_distance=0:stage3_prefetch_bucket_size=0"
"""Every weight is fetched for its forward, released, and fetched again for its backward."""
CASES = {
    1: ["odd:simulated:8:1:bf16"],
    2: [
        "llama:int8:8:1:bf16",
        "llama:int8:8:3:bf16",
        "gpt2:simulated:4:2:bf16",
        "odd:int8:8:1:fp32",
        "odd:simulated:5:2:autocast",
        "gpt2:int8:8:1:bf16:round_robin_gradients=true",
    ],
    3: [
        "odd:int8:8:2:masters",
        "odd:int8:4:1:bf16",
        "gpt2:int8:8:2:fp32",
        "llama:simulated:8:2:bf16:offload_optimizer=true",
        f"reader:simulated:4:3:bf16:{PARTED}",
        f"gpt2:int8:8:3:autocast:{PARTED}:{AT_ONCE}",
    ],
    4: ["odd:int8:8:1:bf16:hierarchical=2"],
}
MORE = ["odd:simulated:5:3:masters", f"odd:int8:8:3:fp32:{PARTED}", f"gpt2:simulated:8:3:bf16:{PARTED}:offload_param=1"]
"""Of stage 3."""
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
        check_training_is_the_same(*(report[case][how] for how in ("none", "codes")))


def check_training_is_the_same(none, codes):
    for part in ("early", "middle", "late", "resumed", "evaluated", "full"):
        assert codes[part] == none[part], part
    assert codes["resumed"] == codes["late"]
    masters = [step[1] for part in ("early", "middle", "late") for step in codes[part]]
    assert len(set(masters)) == len(masters), "nothing was trained"


@pytest.mark.parametrize(("ranks", "case"), ALL)
def test_what_leaves_is_whole(reports, ranks, case):
    for report in reports[ranks]:
        check_what_leaves_is_whole(*(report[case][how] for how in ("none", "codes")))


def check_what_leaves_is_whole(none, codes):
    for part in ("whole", "saved", "state_dict", "saved again"):
        assert codes[part] == none[part], part


@pytest.mark.parametrize(("ranks", "case"), CROSSING)
def test_layers_multiply_the_codes_that_came(reports, ranks, case):
    """None of them quantizes a weight once more, in a step of which the first forward is not the first of all."""
    model, backend, _, stage, *_ = case.split(":")
    # A weight that an embedding has as well comes whole, and below stage 3 one that is frozen does not come at all.
    whole = 0 if model != "odd" else 1 if stage == "3" else 2
    for report in reports[ranks]:
        none, codes = (report[case][how] for how in ("none", "codes"))
        each = 2 * 2 if stage == "3" else 1  # forward and backward of two micro steps; or once in a step
        assert none["quantized"] == (each * none["layers"] if backend == "int8" else 0)
        assert codes["quantized"] == (each * whole if backend == "int8" else 0)


@pytest.mark.slow
def test_more_of_stage_3(tmp_path):
    run_ranks(PROGRAMS / "weights.py", tmp_path / "report.json", *MORE, ranks=3, timeout=TIMEOUT)
    for report in json.loads((tmp_path / "report.json").read_text()):
        for case in MORE:
            none, codes = (report[case][how] for how in ("none", "codes"))
            check_training_is_the_same(none, codes)
            check_what_leaves_is_whole(none, codes)
            assert sum(codes["wire"]) == codes["counted"] < sum(none["wire"])
            assert codes["wire"][0] > 0


@pytest.mark.parametrize(("ranks", "case"), CROSSING)
def test_what_one_rank_reads_is_refused(reports, ranks, case):
    """After a step weights are coarse, and nobody is handed them who might take them for whole."""
    for report in reports[ranks]:
        codes = report[case]["codes"]
        assert codes["coarse"] != codes["whole"]
        assert len(codes["refusals"]) == (0 if AT_ONCE in case else 4)
        for error in codes["refusals"]:
            assert "engine.gather_weights() on all ranks" in error


def test_one_rank_has_whole_weights(reports):
    codes = reports[1][0][CASES[1][0]]["codes"]
    assert codes["coarse"] == codes["whole"]
    assert codes["refusals"] == [None] * 3
    assert codes["counted"] == 0
    assert codes["wire"] == [0, 0, 0]


@pytest.mark.parametrize(("ranks", "case"), CROSSING)
def test_bytes(reports, ranks, case):
    """Those at the collectives are those of the statistics, and of the layout."""
    steps, micro_steps = 2, 2
    for report in reports[ranks]:
        codes = report[case]["codes"]
        fetched, shared, whole = codes["wire"]
        assert fetched + shared + whole == codes["counted"]
        assert report[case]["none"]["wire"][:2] == [0, 0]
        if "hierarchical" in case:
            two_levels, one_level = codes["levels"]
            assert sum(codes["layout"]) == two_levels < one_level / 2
        if ":3:" not in case:
            assert fetched + shared == steps * sum(codes["layout"]) > 0
        elif AT_ONCE in case:
            assert fetched == 2 * micro_steps * steps * sum(codes["layout"]) > 0
        else:  # DeepSpeed keeps what it reads again soon
            assert 0 < codes["counted"] < sum(report[case]["none"]["wire"])


@pytest.mark.parametrize("stage", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_the_trainer_saves_whole_weights(tmp_path, stage):
    """Its checkpoints and its model are those of a run without, and it goes on from them as it would have."""
    configs = [tmp_path / f"{name}.json" for name in ("full_int8", "wire8")]
    for path in configs:
        content = json.loads((ROOT / "ds_configs" / path.name).read_text())
        parted = {"stage3_gather_16bit_weights_on_model_save": True, "stage3_param_persistence_threshold": 0}
        content["zero_optimization"] |= {"stage": stage, **(parted if stage == 3 else {})}
        path.write_text(json.dumps(content))
    run_ranks(PROGRAMS / "weights_trainer.py", tmp_path / "report.json", *configs, timeout=TIMEOUT)
    none, codes = json.loads((tmp_path / "report.json").read_text()).values()
    assert codes["losses"] == none["losses"]
    assert codes["resumed"] == none["resumed"] == none["losses"]
    assert codes["saved"] == none["saved"]
    assert len(set(codes["saved"].values())) == 3
    assert none["refused"] is None
    if stage == 1:
        assert "engine.gather_weights() on all ranks" in codes["refused"]
    else:  # what is saved of a model in parts is empty, with or without codes
        assert codes["refused"] is None


DIFFERENCES = {
    2: [
        ("llama:int8:8:1:bf16", {"mode": "difference", "bits": 8, "whole_every": 4}),
        ("odd:simulated:8:2:bf16", {"mode": "difference", "bits": 8, "rotation": "hadamard"}),
    ],
    3: [
        ("odd:int8:8:1:bf16", {"mode": "difference", "bits": 8, "block_size": 32, "rounding": "stochastic"}),
        ("gpt2:simulated:8:1:fp32", {"mode": "difference", "bits": 4, "whole_every": 3}),
    ],
    4: [("odd:int8:8:2:bf16", {"mode": "difference", "bits": 4, "hierarchical": 2})],
}
EACH = [(ranks, number) for ranks, cases in DIFFERENCES.items() for number in range(len(cases))]


@pytest.fixture(scope="module")
def differences(tmp_path_factory):
    """Of each number of ranks, those of its ranks, a report for each case."""
    found = {}
    for ranks, cases in DIFFERENCES.items():
        output = tmp_path_factory.mktemp("differences") / "report.json"
        texts = [json.dumps(case) for case in cases]
        run_ranks(PROGRAMS / "weights_difference.py", output, *texts, ranks=ranks, timeout=TIMEOUT)
        found[ranks] = json.loads(output.read_text())
    return found


@pytest.mark.parametrize(("ranks", "number"), EACH)
def test_replicas(differences, ranks, number):
    """The same on all ranks; what they were once whole weights were saved; and what they were in checkpoints."""
    reports = [report[number] for report in differences[ranks]]
    for report in reports:
        for part in ("replica", "replica after saving", "last replica", "resumed replica", "whole", "saved"):
            assert report[part] == reports[0][part], part
        assert report["replica"] == report["replica after saving"]
        assert report["last replica"] == report["resumed replica"]
        assert report["resumed"] == report["late"]
        assert report["straight"] == report["trained"] + report["late"], "saving moved the training"


@pytest.mark.parametrize(("ranks", "number"), EACH)
def test_what_leaves_of_replicas_is_whole(differences, ranks, number):
    for report in (report[number] for report in differences[ranks]):
        assert report["whole"] == report["masters"]
        assert report["replica"] != report["whole"]
        assert "engine.gather_weights() on all ranks" in report["refused"]
        assert len(set(report["saved"].values())) == 1


@pytest.mark.parametrize(("ranks", "number"), EACH)
def test_replicas_drift_no_further_than_one_gather_lets_them(differences, ranks, number):
    for report in (report[number] for report in differences[ranks]):
        assert len(report["drifts"]) == 24 * len(report["numel"])
        for drift, bound, difference in report["drifts"]:
            assert drift <= bound
            assert difference > 0
        assert any(drift > 0 for drift, _, _ in report["drifts"])


@pytest.mark.parametrize(("ranks", "number"), EACH)
def test_bytes_of_differences(differences, ranks, number):
    case, weight = DIFFERENCES[ranks][number]
    size = 4 if ":fp32" in case else 2
    for report in (report[number] for report in differences[ranks]):
        whole = [step for step in range(3) if step % weight.get("whole_every", 1000) == 0]
        of_a_step = sum(report["layout"])
        assert of_a_step == sum(report["slots"]) * (ranks // weight.get("hierarchical", 1) - 1)
        assert report["wire"] == of_a_step * (3 - len(whole))
        of_whole = sum(report["numel"]) * size * (ranks - 1) // ranks
        assert report["counted"] == report["wire"] + of_whole * len(whole)
        assert 0 < report["error"] < 0.5


EDITED = ["3:parted:false", "1:kept:true"]


@pytest.mark.parametrize("cases", [["3:kept:none"], pytest.param(EDITED, marks=pytest.mark.slow)])
def test_codes_that_came_are_not_used_once_weights_were_edited(tmp_path, cases):
    """Losses, gradients and masters after each kind of edit are those of layers that quantize their weights anew."""
    run_ranks(PROGRAMS / "weight_edits.py", tmp_path / "report.json", *cases, timeout=TIMEOUT)
    reports = json.loads((tmp_path / "report.json").read_text())
    for case, report in ((case, report) for report in reports for case in cases):
        reused, quantized = report[case]["reused"], report[case]["quantized"]
        assert report[case]["handed over"] > 0
        assert reused == quantized | {"held": reused["held"]}
        for name in ("load_checkpoint", "safe_set_full_fp32_param", "GatheredParameters"):
            assert name in reused
        # What DeepSpeed has released, nobody holds.
        assert reused["held"] == (0 if "parted" in case else 14)


def test_a_round_that_fails_on_one_rank_fails_on_all(tmp_path):
    """As soon as the rank has ended, and not at the time-out of the group, 60 s."""
    run_ranks(PROGRAMS / "weight_failure.py", tmp_path / "report", timeout=TIMEOUT)
    kept, failed = (json.loads((tmp_path / f"report.{rank}").read_text()) for rank in range(2))
    assert failed["error"].startswith("MemoryError: no memory")
    assert failed["rounds"] == 4
    assert kept["error"].startswith("RuntimeError: ")
    assert kept["seconds"] < 60
