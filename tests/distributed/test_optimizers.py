"""Lion, SGD and AdEMAMix with few-bit states under DeepSpeed: every stage, two ranks, processes that start again."""

import json

import pytest
from helpers.launching import PROGRAMS, run_ranks
from moment_jobs import ACCUMULATION, TRAINED, plain_step, tiny
from optimizer_jobs import CASES, CONVERTED
from test_moments import ELEMENTS, EXCLUDED, num_bytes

from ds_quant import QuantAdEMAMix, QuantLion, QuantSGD

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]

TIMEOUT = 280
CLASSES = {"Lion": QuantLion, "SGD": QuantSGD, "AdEMAMix": QuantAdEMAMix}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("optimizers")


def run(folder, verb):
    output = folder / f"{verb}.json"
    run_ranks(PROGRAMS / "optimizer_jobs.py", output, folder, verb, ranks=2, timeout=TIMEOUT)
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def saved(folder):
    return run(folder, "save")


@pytest.fixture(scope="module")
def resumed(folder, saved):
    return run(folder, "resume")


def exact_losses(job, rates=(0.0, 0.0, 1.0, 1.0)):
    """With exact states in one process. DeepSpeed's WarmupLR begins with two steps at 0."""
    model, params = tiny(), job.optimizer["params"]
    optimizer = CLASSES[job.optimizer["type"]](model.parameters(), **params, **dict.fromkeys(job.states))
    losses = []
    for step in range(TRAINED):
        optimizer.param_groups[0]["lr"] = params["lr"] * rates[step]
        losses += plain_step(model, optimizer, step)
    return losses


@pytest.mark.parametrize("case", CASES)
def test_state_is_what_was_promised(saved, case):
    got, job = saved[case], CASES[case]
    assert got["optimizer"] == CLASSES[job.optimizer["type"]].__name__
    assert got["ranks"] == ([1, 2] if job.stage else [0, 0])
    assert got["steps"] == [[TRAINED]] * 2
    bits = [state["bits"] for state in job.states.values()]
    full = quantized = 0
    for rows in got["stored"]:
        for numel, *moments in rows:
            if moments == [["Tensor", 4 * numel]] * len(bits):
                full += numel
            else:
                assert moments == [["QuantizedState", num_bytes(numel, count)] for count in bits]
                quantized += numel
    copies, padding = (1, 16) if job.stage else (2, 0)
    excluded = EXCLUDED if job.exclude else 0
    assert excluded * copies <= full <= (excluded + padding if excluded else 0) * copies
    assert 0 <= quantized - (ELEMENTS - excluded) * copies <= padding


@pytest.mark.parametrize("case", CASES)
def test_losses_follow_exact_states(saved, case):
    got, job = saved[case]["losses"], CASES[case]
    want = exact_losses(job)
    exact = 1e-5 if job.dtype == "fp32" else 5e-3
    assert got[: 3 * ACCUMULATION] == pytest.approx(want[: 3 * ACCUMULATION], abs=exact)
    assert got == pytest.approx(want, abs=0.03)
    untrained = exact_losses(job, [0.0] * TRAINED)
    assert want[-1] < untrained[-1] - 0.1, "nothing was learned that the losses could tell"


@pytest.mark.parametrize("case", CASES)
def test_resuming_is_bit_identical(saved, resumed, case):
    before, after = saved[case], resumed[case]
    for what in ("stored", "steps", "ranks", "digest", "more", "digest_after"):
        assert after[what] == before[what], what
    assert before["digest_after"] != before["digest"]
    if CASES[case].stage == 0:
        assert len(set(before["digest_after"])) == 1


@pytest.mark.parametrize("case", [case for case, job in CASES.items() if job.stage])
def test_deepspeeds_tools_see_the_states(saved, resumed, case):
    assert saved[case]["safe_get"] == resumed[case]["safe_get"] == {"wrong": [], "unchanged": True}
    assert resumed[case]["zero_to_fp32"] == sorted(name for name, _ in tiny().named_parameters())


def test_offloading_states_that_deepspeed_does_not_know_is_refused(resumed):
    assert resumed["1 Lion bf16 exclude"]["offloading"] is None
    for case in ("1 SGD", "2 SGD bf16 exclude"):
        assert 'got "optim_states with momentum_buffer of QuantSGD"' in resumed[case]["offloading"]
    assert "exp_avg_fast of QuantAdEMAMix" in resumed["1 AdEMAMix bf16"]["offloading"]


@pytest.mark.parametrize("case", CONVERTED)
def test_checkpoints_go_on_with_other_bits(saved, resumed, case):
    got = resumed[f"{case} converted"]
    assert got["steps"] == saved[case]["steps"]
    assert got["more"][:ACCUMULATION] == pytest.approx(saved[case]["more"][:ACCUMULATION], abs=1e-6)
    assert got["more"] == pytest.approx(saved[case]["more"], abs=0.05)


def test_universal_checkpoints_are_refused(saved, resumed):
    """By DeepSpeed's converter, which wants Adam's moments; and by name where a config asks to load one."""
    assert "checkpoint.load_universal: got true; allowed: false with Lion" in resumed["universal"]
    for case in ("1 Lion bf16 exclude", "1 SGD", "1 AdEMAMix bf16"):
        assert saved[case]["converter"] in ("'exp_avg'", "'exp_avg_sq'")


def test_stock_deepspeed_refuses_ademamix(resumed):
    """So that a script that forgets to enable ds_quant does not train with another optimizer."""
    assert resumed["stock"] == "AdEMAMix is not a supported DeepSpeed Optimizer"
