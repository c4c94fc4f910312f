"""The int8 backend inside DeepSpeed's engine, with two real ranks: codes of weights are never stale, nor ever kept
where ZeRO-3 partitions the weights."""

import json

import pytest
from conftest import ROOT
from helpers.launching import PROGRAMS, run_ranks
from int8_edits import EDITS
from int8_jobs import CASES, CHECKPOINTED, MEMORY
from int8_training import ACCUMULATION, EARLY, STAGE3, STEPS

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]

CONFIG = ROOT / "ds_configs" / "w8a8g8.json"
TIMEOUT = 400
NUM_LINEARS = 14
NUM_INPUTS = 8
"""Inputs of the 14 linears: of each of two layers, one for q, k and v, one for gate and up, and two more."""
RANKS = (0, 1)
NUM_MICRO_BATCHES = STEPS * ACCUMULATION
WRITTEN_AT_ONCE = ("load_checkpoint", "load_module_state_dict", "GatheredParameters", "in place")
EVALUATIONS = ("evaluation of copies", "evaluation of others")


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Of each rank."""
    output = tmp_path_factory.mktemp("int8") / "report.json"
    run_ranks(PROGRAMS / "int8_jobs.py", output, CONFIG, timeout=TIMEOUT)
    return json.loads(output.read_text())


def seen(run):
    """What training showed, without how often it quantized."""
    return {key: value for key, value in run.items() if not key.startswith("counts")}


@pytest.mark.parametrize("case", CASES)
def test_kept_codes_are_never_stale(reports, case):
    """Bit for bit the training without kept codes, at a quantization of each weight for each step."""
    for rank in RANKS:
        kept, none = (reports[rank]["cases"][f"{case} {how}"] for how in ("kept", "none"))
        assert kept["losses"] == none["losses"]
        assert kept["weights"] == none["weights"]
        assert len(set(kept["losses"])) == len(kept["losses"]) == NUM_MICRO_BATCHES
        assert len(set(kept["weights"])) == len(kept["weights"]) == STEPS
        assert kept["layers"] == NUM_LINEARS
        assert kept["counts"] == {
            "weights": NUM_LINEARS * STEPS,
            "weights in the backward": 0,
            "inputs": NUM_INPUTS * NUM_MICRO_BATCHES,
            "looked up": NUM_LINEARS * NUM_MICRO_BATCHES,
        }
        assert none["counts"] == {
            "weights": NUM_LINEARS * NUM_MICRO_BATCHES,
            "weights in the backward": NUM_LINEARS * NUM_MICRO_BATCHES,
            "inputs": NUM_INPUTS * NUM_MICRO_BATCHES,
            "looked up": 0,
        }


@pytest.mark.parametrize("case", CASES)
def test_untold_codes_are_stale(reports, case):
    """Without word of changed weights the comparison above fails: DeepSpeed's steps move no version."""
    for rank in RANKS:
        untold, none = (reports[rank]["cases"][f"{case} {how}"] for how in ("untold", "none"))
        assert untold["version_moved"] == [False] * NUM_LINEARS
        assert untold["counts"]["weights"] == NUM_LINEARS, "codes were made anew for another reason"
        assert untold["losses"][:ACCUMULATION] == none["losses"][:ACCUMULATION]
        for stale, fresh in zip(untold["losses"][ACCUMULATION:], none["losses"][ACCUMULATION:], strict=True):
            assert stale != fresh
        assert untold["weights"][1:] != none["weights"][1:]


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("case", CASES)
def test_edits_are_seen(reports, case, name):
    """An edit after codes were made: what follows is bit for bit what it is without kept codes."""
    for rank in RANKS:
        kept, none = (reports[rank]["cases"][f"{case} {how}"]["edits"][name] for how in ("kept", "none"))
        assert seen(kept) == seen(none)
        assert (kept["before"] != kept["after"]) == (name in WRITTEN_AT_ONCE)
        if name == "load_checkpoint":
            run = reports[rank]["cases"][f"{case} kept"]
            assert kept["losses"] == run["losses"][EARLY * ACCUMULATION :], "the same steps gave something else"
            assert kept["weights"] == run["weights"][EARLY:]
        if name == "safe_set_full_fp32_param":
            before, after = kept["norms"]
            assert kept["result"] == (not case.startswith("0:"))
            assert kept["result"] == (after > 2 * before), "the step did not hand on what was set"


@pytest.mark.parametrize("name", EVALUATIONS)
@pytest.mark.parametrize("case", CASES)
def test_evaluation_of_other_weights(reports, case, name):
    """It sees them, and leaves the codes of the trained ones alone."""
    for rank in RANKS:
        edit = reports[rank]["cases"][f"{case} kept"]["edits"][name]
        first, other, last = edit["result"]
        assert first == last == edit["before"] == edit["after"]
        assert other != first
        assert edit["counts"]["weights"] == NUM_LINEARS * len(edit["result"])
        assert edit["counts"]["looked up"] == 0
        assert edit["counts after"]["weights"] == 0
        assert edit["counts after"]["looked up"] == NUM_LINEARS


@pytest.mark.parametrize("case", [case for case in CASES if "bf16" in case])
def test_skipped_step(reports, case):
    for rank in RANKS:
        kept, none = (reports[rank]["cases"][f"{case} {how}"]["edits"]["skipped step"] for how in ("kept", "none"))
        assert kept == none
        assert kept["skipped"] == 1
        before, after, *trained = kept["weights"]
        assert before == after
        assert len({before, *trained}) == 1 + len(trained)


@pytest.mark.parametrize("case", CASES)
def test_ranks_hold_the_same_weights(reports, case):
    first, second = (report["cases"][f"{case} kept"] for report in reports)
    assert first["weights"] == second["weights"]
    assert first["losses"] != second["losses"], "the ranks saw the same batches"
    for name, edit in first["edits"].items():
        assert edit["weights"] == second["edits"][name]["weights"]


@pytest.mark.parametrize("case", STAGE3)
def test_stage_3_keeps_no_codes(reports, case):
    for rank in RANKS:
        run = reports[rank]["resumed"][case]
        assert run["kept"] == 0
        assert run["counts"]["looked up"] == 0
        assert run["counts"]["weights"] == NUM_LINEARS * NUM_MICRO_BATCHES
        assert run["counts"]["weights in the backward"] == NUM_LINEARS * NUM_MICRO_BATCHES
        assert run["counts"]["inputs"] == NUM_INPUTS * NUM_MICRO_BATCHES, "shared, though each layer gets an alias"


@pytest.mark.parametrize("case", STAGE3)
def test_stage_3_holds_the_weights_of_one_layer(reports, case):
    """Neither weights nor codes outlive their layer's forward or backward, nor does the graph hold any."""
    for rank in RANKS:
        memory = reports[rank]["memory"][case]
        assert memory["layers"] == [{"alive": [], "weight": 0, "gathered": 0}] * NUM_LINEARS
        after = memory["after"]
        assert after["alive"] == []
        assert set(after["gathered"]) == {0}
        assert after["held"] == []
        assert after["kept"] == 0
        assert len(memory["packed"]) > NUM_LINEARS
        assert all(memory["packed"]), "of a weight's size is saved what is no gathered Parameter"
        most = {"codes": memory["largest quantized"], "others": memory["largest"], "gathered": memory["largest"]}
        for step in memory["steps"]:
            assert step["forward"] == most
            del step["backward"]["others"]  # gradients
            assert step["backward"] == {name: most[name] for name in step["backward"]}


def test_below_stage_3_the_same_look_finds_all(reports):
    """What the test above looks for is found where it is."""
    for rank in RANKS:
        memory = reports[rank]["memory"]["1:fp32"]
        quantized = [dtype for _, dtype in memory["after"]["alive"]]
        assert quantized.count("torch.int8") == NUM_LINEARS
        assert [len(layer["alive"]) for layer in memory["layers"]] == list(range(1, NUM_LINEARS + 1))
        held = memory["after"]["held"]
        assert held.count(["Int8LinearBackward.w_codes", "torch.int8"]) == NUM_LINEARS
        assert held.count(["Int8LinearBackward.saved_tensors", "torch.float32"]) == NUM_LINEARS
        assert memory["after"]["kept"] == NUM_LINEARS
        assert memory["steps"][0]["forward"]["codes"] > 4 * memory["largest quantized"]


def test_stages_agree(reports):
    """Stage 3 trains as 1 and 2 do, as far as the order of sums lets it."""
    # In fp32 the difference of an ulp takes some steps to reach a code, in bf16 one step to reach many.
    for dtype, early, late in (("fp32", 1e-5, 1e-4), ("bf16", 1e-2, 1e-2)):
        for rank in RANKS:
            third = reports[rank]["resumed"][f"3:{dtype}"]
            got = third["early"]["losses"] + third["late"]["losses"]
            for stage in (1, 2):
                want = reports[rank]["cases"][f"{stage}:{dtype} kept"]["losses"]
                for index, (a, b) in enumerate(zip(got, want, strict=True)):
                    assert abs(a - b) < (early if index < EARLY * ACCUMULATION else late)


@pytest.mark.parametrize("case", MEMORY)
def test_a_fresh_engine_goes_on(reports, case):
    for rank in RANKS:
        run = reports[rank]["resumed"][case]
        assert run["resumed"] == run["late"]
        assert len(set(run["late"]["losses"])) == (STEPS - EARLY) * ACCUMULATION


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("case", CHECKPOINTED)
def test_gradient_checkpointing_changes_nothing(reports, case, reentrant):
    for rank in RANKS:
        plain, checkpointed = (reports[rank]["checkpointed"][f"{case} {how}"] for how in (None, reentrant))
        assert seen(checkpointed) == seen(plain)
        assert len(set(plain["gradients"])) == len(plain["gradients"]) == 2
        assert checkpointed["counts"]["inputs"] == 2 * plain["counts"]["inputs"], "nothing was computed again"
        if case not in STAGE3:
            assert checkpointed["counts"]["weights"] == plain["counts"]["weights"] == 2 * NUM_LINEARS
