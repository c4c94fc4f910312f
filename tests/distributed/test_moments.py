"""Quantized moments under real DeepSpeed: every mode and stage, two real ranks, processes that really start again."""

import json
import math

import pytest
import torch
from deepspeed.checkpoint import ds_to_universal
from helpers.launching import PROGRAMS, run_ranks
from moment_clients import schedule
from moment_jobs import ACCUMULATION, HIDDEN, LR, TRAINED, VOCABULARY, WIDTH, plain_step, tiny
from moment_moves import SCALED, SWITCHED, TAG, UNIVERSAL
from moments import CASES, OFFLOADED

from ds_quant.optim.state import QuantizedState

# Each launch has a time-out of its own; a test that starts several must outlive them.
pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1200)]

TIMEOUT = 280
MOMENT_NAMES = ("exp_avg", "exp_avg_sq")
BITS = {"adam8": (8, 8), "m4v8": (4, 8), "adam4": (4, 4)}
SCALES = {"adam8": (1, 1), "m4v8": (1, 1), "adam4": (1, 2)}
"""To a block: 4-bit exp_avg_sq has the map log."""
ELEMENTS = VOCABULARY * WIDTH + (WIDTH + 1) * HIDDEN + 2 * HIDDEN + (HIDDEN + 1) * VOCABULARY
EXCLUDED = VOCABULARY * WIDTH + 2 * HIDDEN


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("moments")


def run(folder, program, *arguments, ranks=2):
    output = folder / f"{program}-{'-'.join(arguments)}-{ranks}.json"
    run_ranks(PROGRAMS / f"{program}.py", output, folder, *arguments, ranks=ranks, timeout=TIMEOUT)
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def saved(folder):
    return run(folder, "moments", "save")


@pytest.fixture(scope="module")
def resumed(folder, saved):
    return run(folder, "moments", "resume")


@pytest.fixture(scope="module")
def universal(folder, saved):
    """The checkpoint that the command converts, beside those that the program has converted."""
    source = folder / "2 fp32"
    folders = ["--input_folder", source / TAG, "--output_folder", source / "universal"]
    run_ranks(ds_to_universal.__file__, "--inject_missing_state", *folders, ranks=0, timeout=60)


@pytest.fixture(scope="module")
def moved(folder, universal):
    return run(folder, "moment_moves", "universal", "switched", "broken")


@pytest.fixture(scope="module")
def clients(folder):
    return run(folder, "moment_clients")


def num_bytes(numel, bits, scales=1):
    """Of codes and scales; 8 bits in blocks of 256, 4 bits in blocks of 128, each of which starts at a byte."""
    block = {8: 256, 4: 128}[bits]
    codes = numel if bits == 8 else numel // block * (block // 2) + (numel % block + 1) // 2
    return codes + 4 * scales * math.ceil(numel / block)


def check_stored(ranks, recipe):
    """Every tensor's moments take 32 bits or the bytes promised; the elements of either kind, over all ranks."""
    full = quantized = 0
    for rows in ranks:
        for numel, *moments in rows:
            if moments == [["Tensor", 4 * numel]] * 2:
                full += numel
            else:
                stored = zip(BITS[recipe], SCALES[recipe], strict=True)
                assert moments == [["QuantizedState", num_bytes(numel, *one)] for one in stored]
                quantized += numel
    return full, quantized


def reference_losses():
    """Of torch's AdamW on the batches of all ranks, with the learning rates of DeepSpeed's WarmupCosineLR."""
    model = tiny()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    losses = []
    for step in range(TRAINED):
        cosine = 0.5 * (1 + math.cos(math.pi * (step - 2) / 98))
        optimizer.param_groups[0]["lr"] = (0.0, 0.0, LR / 2, LR)[step] if step < 4 else LR * cosine
        losses += plain_step(model, optimizer, step)
    return losses


@pytest.mark.parametrize("case", CASES)
def test_state_is_what_was_promised(saved, case):
    got, job = saved[case], CASES[case]
    assert got["optimizer"] == "QuantAdamW"
    wrappers = {0: ("QuantAdamW", "FP16_UnfusedOptimizer"), 3: ("DeepSpeedZeroOptimizer_Stage3",)}
    assert got["wrapper"] in wrappers.get(job.stage, ("DeepSpeedZeroOptimizer", "BF16_Optimizer"))
    assert (got["wrapper"] == "BF16_Optimizer") == job.fp32_accumulation
    assert got["ranks"] == ([1, 2] if job.stage else [0, 0])
    assert got["steps"] == [[TRAINED]] * 2
    full, quantized = check_stored(got["stored"], job.recipe)
    copies = 1 if job.stage else 2
    padding = 16 if job.stage else 0
    excluded = EXCLUDED if job.exclude else 0
    assert excluded * copies <= full <= (excluded + padding) * copies if excluded else full == 0
    assert 0 <= quantized - (ELEMENTS - excluded) * copies <= padding
    for rows, total in zip(got["stored"], got["state_bytes"], strict=True):
        assert total == sum(moment[1] for _, *moments in rows for moment in moments)


@pytest.mark.parametrize("case", CASES)
def test_losses_follow_adamw(saved, case):
    got, job, want = saved[case]["losses"], CASES[case], reference_losses()
    # Until the first step at a learning rate above 0, only the weights count.
    exact = 1e-5 if job.dtype == "fp32" else 5e-3
    assert got[: 3 * ACCUMULATION] == pytest.approx(want[: 3 * ACCUMULATION], abs=exact)
    assert got == pytest.approx(want, abs=0.03)
    assert want[-1] < want[0] - 0.3, "nothing was learned that the losses could tell"


def test_quantizing_is_felt(saved):
    """Other bits, other weights: the comparisons above would not see moments that were left in 32 bits."""
    assert len({saved[case]["digest"][0] for case in ("1 fp32", "1 fp32 adam4 exclude", "1 fp32 offload")}) == 3
    for stage in (0, 1, 3):
        assert saved[f"{stage} fp32"]["more"] != saved[f"{stage} plain"]["more"]


@pytest.mark.parametrize("case", [case for case, job in CASES.items() if job.stage == 0])
def test_replicas_are_bit_identical(saved, case):
    for when in ("digest", "digest_after"):
        assert len(set(saved[case][when])) == 1


@pytest.mark.parametrize("case", CASES)
def test_resuming_is_bit_identical(saved, resumed, case):
    before, after = saved[case], resumed[case]
    assert after["stored"] == before["stored"]
    assert after["steps"] == before["steps"]
    assert after["ranks"] == before["ranks"]
    assert after["digest"] == before["digest"]
    assert after["more"] == before["more"]
    assert after["digest_after"] == before["digest_after"]
    assert before["digest_after"] != before["digest"]


@pytest.mark.parametrize("case", [case for case, job in CASES.items() if job.stage])
def test_safe_get_and_set(saved, resumed, case):
    fine = {"wrong": [], "unchanged": True}
    assert saved[case]["safe_get"] == resumed[case]["safe_get"] == fine
    if case in OFFLOADED:
        assert resumed[case]["safe_get after reload"] == fine
    job = CASES[case]
    set_ = saved[case]["safe_set"]
    assert set(set_) == {f"{name} {moment}" for name in ("inner.weight", "embedding.weight") for moment in MOMENT_NAMES}
    for key, (error, elsewhere) in set_.items():
        bits = BITS[job.recipe][MOMENT_NAMES.index(key.split()[1])]
        if job.exclude and key.startswith("embedding"):
            assert error == elsewhere == 0
        else:
            # Half the largest gap between codes of values up to 1.1; a neighbour shares a block at most. With two
            # scales a block that has zeros as well reaches down to 2^-30: its largest two values are 1.1 and 0.39.
            one_scale = {8: 0.04, 4: 0.25}[bits]
            scales = SCALES[job.recipe][MOMENT_NAMES.index(key.split()[1])]
            assert 0 < error < (one_scale if scales == 1 else 0.36)
            assert elsewhere < 0.15


@pytest.mark.parametrize("case", [case for case, job in CASES.items() if job.stage and not job.fp32_accumulation])
def test_zero_to_fp32(resumed, case):
    assert set(resumed[case]["zero_to_fp32"]) == {name for name, _ in tiny().named_parameters()}


@pytest.mark.parametrize("case", [case for case, job in CASES.items() if job.stage == 3 and not job.offload])
def test_offloading_states_at_stage_3_is_refused(resumed, case):
    assert "offload_states(include): got" in resumed[case]["refusal"]
    assert "stages 1 and 2" in resumed[case]["refusal"]


@pytest.mark.parametrize("case", ["0 fp32", "1 fp32", "1 bf16 with fp32 accumulation", "2 bf16", "3 fp32 exclude"])
def test_state_loads_without_trusting_the_file(folder, saved, case):
    """torch.load(weights_only=True), given DeepSpeed's own classes: none of ours is unsafe."""
    (path, *_) = sorted((folder / case / TAG).glob("*optim_states.pt" if CASES[case].stage else "*model_states.pt"))
    unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    assert not [name for name in unsafe if name.startswith("ds_quant")]
    allowed = []
    for name in unsafe:
        module, _, attribute = name.rpartition(".")
        assert module.partition(".")[0] in ("deepspeed", "torch", "collections", "builtins", "numpy", "argparse"), name
        allowed.append((getattr(__import__(module, fromlist=[attribute]), attribute), name))
    with torch.serialization.safe_globals(allowed):
        state = torch.load(path, weights_only=True, map_location="cpu")
    state = state["optimizer_state_dict" if CASES[case].stage else "optimizer"]
    state = state.get("base_optimizer_state") or state.get("optimizer_state_dict") or state
    assert type(state["state"][0]["exp_avg"]) is QuantizedState


# ---- other ranks, stages, optimizers


def check_loaded(got, source, job, saved, ranks=2):
    """After loading what `source` saved: the state's form, its memory, and the losses that follow."""
    assert "error" not in got, got["error"]
    assert got["steps"] == [[TRAINED]] * ranks
    assert got["steps after"] == [[TRAINED + 2]] * ranks or is_stock_bug(job)
    held = max(sum(moment[1] for _, *moments in rows for moment in moments) for rows in got["stored"])
    # Beside the codes there may be tables of two maps, 256 values each, that the first conversion of a process makes.
    assert got["grown"] < held + 2 * 1024 + 512, "something holds the full moments"
    assert len(set(got["lr"])) == 1
    assert got["lr"][0] > 0
    want = saved[source]["more"]
    # Plain AdamW: 0 at two ranks; 2e-7 at others, which take other means.
    assert got["more"][:ACCUMULATION] == pytest.approx(want[:ACCUMULATION], abs=1e-6)
    assert got["more"] == pytest.approx(want, abs=0.03)
    if job.recipe == "plain":
        assert all(moment[0] == "Tensor" for rows in got["stored"] for _, *moments in rows for moment in moments)
    else:
        full, _ = check_stored(got["stored"], job.recipe)
        assert (full > 0) == bool(job.exclude)
    if "safe_get" in got:
        assert got["safe_get"] == {"wrong": [], "unchanged": True}


def is_stock_bug(job):
    """DeepSpeed loads one step counter for all sub-groups of stage 3, and each counts on it."""
    return job.stage == 3 and job.recipe == "plain" and job.universal


CROSSING = [
    name for name, (source, job) in UNIVERSAL.items() if (source[0] == "3") != (job.stage == 3) or job.stage == 0
]


@pytest.mark.parametrize("move", [move for move in UNIVERSAL if move not in CROSSING])
def test_universal_checkpoints(saved, moved, move):
    source, job = UNIVERSAL[move]
    check_loaded(moved["universal"][move], source, job, saved)


@pytest.mark.parametrize("move", CROSSING)
def test_universal_checkpoints_that_deepspeed_cannot_load(moved, move):
    """From stage 3 to others or back, and at stage 0; with quantized moments, the message says so."""
    error = moved["universal"][move]["error"]
    if "plain" in move:
        assert error.startswith(("AssertionError", "KeyError"))
    else:
        assert "universal/zero/optimizer_state.pt: got " in error


@pytest.mark.parametrize("ranks", [1, 4])
def test_universal_checkpoints_at_other_numbers_of_ranks(folder, saved, universal, ranks):
    got = run(folder, "moment_moves", "scaled", ranks=ranks)["scaled"]
    assert set(got) == set(SCALED)
    for move, (source, job) in SCALED.items():
        check_loaded(got[move], source, job, saved, ranks)


@pytest.mark.parametrize("move", SWITCHED)
def test_other_optimizers_and_stages_without_conversion(saved, moved, move):
    source, job = SWITCHED[move]
    check_loaded(moved["switched"][move], source, job, saved)


def test_broken_checkpoints(moved):
    """Every rank ends with an error, and every message names the file."""
    for name, got in moved["broken"].items():
        for error in got["errors"]:
            assert error is not None, name
            assert f"/{got['file']}" in error, (name, error)
            assert "fix: " in error
    for name in ("of another step", "of another step at 3"):
        assert 'got "moments of the steps 4, 6"' in moved["broken"][name]["errors"][0]


# ---- optimizers that are not the JSON's, mixtures of experts


def test_optimizers_that_are_passed_in(clients):
    for case, got in clients["clients"].items():
        assert got["optimizer"] == "QuantAdamW", case
        assert got["ranks"] == ([0, 0] if case[0] == "0" else [1, 2])
        assert got["steps"] == [[TRAINED]] * 2
        assert got["losses"][-1] < got["losses"][0]
        full, _ = check_stored(got["stored"], "adam8")
        assert (full > 0) == ("exclude" in case)
        want = [LR if "callable" in case else LR * schedule(step) for step in range(TRAINED + 2)]
        calls = len(got["rates"]) // len(want)  # DeepSpeed steps each group or sub-group on its own
        for step, rate in enumerate(want):
            assert all(set(rates) == {rate} for rates in got["rates"][step * calls : (step + 1) * calls]), case
    first = clients["clients"]["0 object"]["losses"][0]
    assert all(got["losses"][0] == pytest.approx(first, abs=5e-3) for got in clients["clients"].values())


def test_a_raw_accelerate_loop_with_a_torch_scheduler(clients):
    for case, got in clients["accelerated"].items():
        assert got["same"], "the scheduler is bound to another object"
        assert got["optimizer"] == "QuantAdamW"
        check_stored(got["stored"], "adam8")
        calls = len(got["rates"]) // 6
        # accelerate steps the scheduler once for each process.
        want = [[LR * schedule(2 * (call // calls))] for call in range(len(got["rates"]))]
        assert got["rates"] == want, case
        assert got["losses"] == pytest.approx(clients["accelerated"]["0 fp32"]["losses"], abs=0.02)


def test_the_trainer_with_its_own_optimizer(clients):
    for case, got in clients["trainer"].items():
        assert got["optimizer"] == "QuantAdamW"
        full, _ = check_stored(got["stored"], "adam8")
        assert full == 0
        calls = len(got["rates"]) // 4
        want = [0.0, LR, LR * 2 / 3, LR / 3]
        assert [rates[0] for rates in got["rates"][::calls]] == pytest.approx(want), case
        assert got["losses"][-1] < got["losses"][0]


def test_mixtures_of_experts(clients):
    mixtures = clients["mixtures"]
    for case, got in mixtures.items():
        assert got["more"] == got["resumed"], case
        assert got["digest"] == got["digest_loaded"], case
        assert got["digest_after"] == got["digest_resumed"], case
        size = case.split(" ep ")[1][0]
        assert [group[0] for group in got["groups"] if group[1]] in ([f"ep_size_{size}"], [f"ep_size_{size}"] * 2)
        if "plain" in case:
            continue
        full, _ = check_stored(got["stored"], case.split()[4])
        assert (full > 0) == ("exclude" in case)
        assert [group[2] for group in got["groups"]] == [True, False] * 2 if "exclude" in case else [True, True]
        plain = mixtures[f"1 bf16 ep {size} plain"]["losses"]
        assert got["losses"] == pytest.approx(plain, abs=0.05), case
