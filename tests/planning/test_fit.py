"""What fits, and what of it is cheapest: the search beside all ways tried one by one, and one by dry runs."""

import dataclasses
import itertools
import json

import pytest

from ds_quant.base.errors import ConfigError
from ds_quant.cli.report import main
from ds_quant.planning.fit import DEPTHS, Fitter, config_at, section_of, table
from ds_quant.planning.job import Outcome
from ds_quant.planning.models import resolve_model
from ds_quant.planning.plan import Planner, Request, Setting
from ds_quant.planning.predict import Predictor
from ds_quant.planning.traffic import Collective


class Formula:
    """Stands for dry runs: bytes a parameter of a job of 100 parameters, and activations."""

    def __init__(self):
        self.jobs = []

    def predict(self, job, **options):
        self.jobs.append(job)
        config = job.config
        stage = config["zero_optimization"]["stage"]
        quant = config.get("ds_quant", {}).get("optimizer", {})
        bits = sum(quant.get(name, {"bits": 32})["bits"] for name in ("exp_avg", "exp_avg_sq"))
        master = {24: 1, 16: 0}.get(quant.get("master", {}).get("bits"), 4)
        gradients = 0 if quant.get("release_gradients") else 200
        shared = 100 * (bits / 8 + master) + (gradients if stage > 1 else 0) + (200 if stage > 2 else 0)
        rest = 400 - (200 if stage > 1 else 0) - (200 if stage > 2 else 0)
        peak = rest + shared / job.world_size + (50 if job.gradient_checkpointing else 500)
        sent = 300 if stage == 3 else 200
        micro_steps = list(range(config["gradient_accumulation_steps"]))
        wire = [Collective("backward", "x", "y", 0, (0, 1))] * len(micro_steps)
        wire.append(Collective("step", "x", "y", sent, (0, 1)))
        return Outcome(int(peak), {}, "backward", {}, 0, 0, 100, wire, micro_steps)


@pytest.fixture
def raw(root):
    config = json.loads((root / "ds_configs" / "baseline.json").read_text())
    return config | {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}, "bf16": {"enabled": True}}


@pytest.fixture
def asked(raw):
    return Request(raw, {"vocab_size": 8}, 16, 64, 4)


@pytest.mark.parametrize("world_size", [1, 2, 8])
@pytest.mark.parametrize("memory", [300, 480, 600, 800, 1000, 1500, 2200])
def test_the_search_finds_what_trying_all_ways_does(asked, world_size, memory):
    fitter = Fitter(asked, Formula())
    ways = []
    for checkpointing, stage in itertools.product((False, True), (1,) if world_size == 1 else (1, 2, 3)):
        fits = [
            (world_size, checkpointing, 300 if stage == 3 else 200, depth, stage)
            for depth in range(len(DEPTHS))
            if fitter.outcome(world_size, stage, checkpointing, depth).peak_bytes <= memory
        ]
        ways += fits[:1]
    found = Fitter(asked, Formula()).fitting(world_size, memory)
    assert sorted((*one.cost(), one.setting.stage) for one in found) == sorted(ways)
    assert [one.cost() for one in found] == sorted(one.cost() for one in found)
    for one in found:
        assert one.config == config_at(asked.config, one.depth, one.setting.stage)


def test_what_takes_too_much_is_tried_once_for_each_way(asked):
    formula = Formula()
    assert Fitter(asked, formula).fitting(2, 10) == []
    assert len(formula.jobs) == 6


def test_fewest_ranks(asked):
    fitter = Fitter(asked, Formula())
    # The least that one rank takes is 400 of weights and gradients, 150 of states, 50 of activations.
    assert fitter.least_ranks(600) == 1
    # Two take 275 + 50 at stage 3, four half of that and 50.
    assert fitter.least_ranks(325) == 2
    assert fitter.least_ranks(324) == 4
    assert fitter.least_ranks(50) is None
    rows = table([("1 GiB", 2, fitter.fitting(2, 600)[0]), ("2 GiB", None, None)])
    assert rows[2].startswith("| 1 GiB | 2 | ZeRO ")
    assert rows[3] == "| 2 GiB | none | | |"


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("memory", [340, 380, 420, 500, 620, 900])
def test_gradients_are_released_where_the_config_allows_it(asked, world_size, memory):
    asked.config["gradient_clipping"] = 0
    asked.config["bf16"]["check_grad_overflow"] = False
    asked = dataclasses.replace(asked, batch=world_size)
    fitter = Fitter(asked, Formula())
    found = [one for one in fitter.fitting(world_size, memory) if one.released]
    for checkpointing in (False, True):
        depths = [
            depth
            for depth in range(2, len(DEPTHS))
            if fitter.outcome(world_size, 2, checkpointing, depth, True).peak_bytes <= memory
        ]
        here = [one for one in found if one.gradient_checkpointing == checkpointing]
        assert [one.depth for one in here] == depths[:1]
        for one in here:
            assert one.config["ds_quant"]["optimizer"]["release_gradients"] is True
            assert one.describe().endswith(", gradients released")
    # 200 of weights, 150 of states and 50 of activations; without gradients.
    assert fitter.least_ranks(400) == (1 if world_size == 1 else 2)  # one rank of a batch of two accumulates
    for kept in (dataclasses.replace(asked, batch=2 * world_size), asked):
        kept.config["gradient_clipping"] = 0 if kept is not asked else 1.0
        assert not any(one.released for one in Fitter(kept, Formula()).fitting(world_size, 10_000))


def test_depths_are_configs_that_training_takes(asked, raw):
    assert config_at(raw, 0, 2) == raw | {"zero_optimization": {**raw["zero_optimization"], "stage": 2}}
    optimizer = config_at(raw, 4, 1)["ds_quant"]["optimizer"]
    assert optimizer == {"exp_avg": {"bits": 4}, "exp_avg_sq": {"bits": 8}, "master": {"bits": 16}}
    mixed = raw | {"optimizer": {"type": "AdEMAMix", "params": {}}}
    assert config_at(mixed, 3, 1)["ds_quant"]["optimizer"] == {
        "exp_avg_fast": {"bits": 4},
        "exp_avg_slow": {"bits": 8},
        "exp_avg_sq": {"bits": 8},
        "master": {"bits": 24},
    }
    muon = raw | {"optimizer": {"type": "Muon", "params": {}}}
    assert config_at(muon, 1, 1)["ds_quant"]["optimizer"]["momentum_buffer"] == {"bits": 8}
    (found, *_) = Fitter(asked, Formula()).fitting(2, 480)
    assert section_of(found)["zero_optimization"] == {"stage": found.setting.stage}


def test_without_bf16_there_are_no_masters_of_few_bits(asked):
    asked.config["bf16"] = {"enabled": False}
    formula = Formula()
    found = Fitter(asked, formula).fitting(1, 10_000)
    assert {one.depth for one in found} == {0}
    assert not any("master" in job.config.get("ds_quant", {}).get("optimizer", {}) for job in formula.jobs)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "--fit: got .*no --gpu-memory"),
        (["--gpu-memory", "1GiB", "--stage", "1"], "--stage: got 1; allowed: none with --fit"),
        (["--gpu-memory", "3GiB", "--micro-batch", "2"], "--micro-batch: got 2"),
        (["--gpu-memory", "1GiB,3GiB"], "--reserve: got .2GiB.; allowed: less than --gpu-memory 1GiB"),
    ],
)
def test_bad_input_is_one_clear_error(root, given, message, capsys):
    config = str(root / "ds_configs" / "baseline.json")
    fixed = ["plan", "--fit", "--config", config, "--model", "tiny", "--nodes", "1", "--gpus-per-node", "1"]
    assert main([*fixed, "--batch", "4", *given]) == 2
    with pytest.raises(ConfigError, match=message):
        raise ConfigError(capsys.readouterr().err)


@pytest.mark.timeout(280)
def test_its_peaks_are_those_of_plain_plans(raw):
    """By dry runs: the config that it names has the same peak by itself; masters and moments are their bytes."""
    description = "model_type=gpt2,n_embd=64,n_layer=2,n_head=2,vocab_size=512,n_positions=32"
    model, length = resolve_model(description)
    raw["zero_optimization"] |= {"stage": 1, "reduce_bucket_size": 100_000}
    asked = Request(raw, model, length, 1, 1, gradient_checkpointing=True)
    with Predictor() as predictor:
        fitter = Fitter(asked, predictor)
        before = fitter.outcome(1, 1, True, 0)
        numel = before.num_parameters
        # The states take 12 bytes. Of moments in 8 bits and masters of 24 there are 3.03, without masters 6.03.
        (found,) = fitter.fitting(1, before.peak_bytes - 7 * numel)
        alone = Planner(dataclasses.replace(asked, config=found.config), predictor).outcome(found.setting)
    assert DEPTHS[found.depth] == (8, 24)
    assert found.outcome.parts["masters"] == pytest.approx(numel, abs=64)
    assert found.outcome.parts["moments"] == pytest.approx(2 * numel * (1 + 4 / 256), abs=64)
    assert alone == found.outcome


@pytest.mark.slow
@pytest.mark.timeout(280)
@pytest.mark.parametrize("backend", ["simulated", "int8"])
def test_a_forward_that_ends_quantized_takes_the_larger_of_both_peaks(raw, backend):
    """Activations in their dtype weigh more than codes of them, and no codes of the weights less than some."""
    given = {"weight": {"bits": 8}, "activation": {"bits": 8}, "gradient": {"bits": 8}, "backend": backend}
    model, length = resolve_model("model_type=gpt2,n_embd=64,n_layer=2,n_head=2,vocab_size=512,n_positions=32")
    linears = [given, {"gradient": given["gradient"], "backend": backend}, {**given, "forward_full_precision_from": 99}]
    with Predictor() as predictor:
        before, after, found = (
            Planner(Request(raw | {"ds_quant": {"linear": linear}}, model, length, 8, 1), predictor)
            .outcome(Setting(1, 1, 8))
            .peak_bytes
            for linear in linears
        )
    assert before != after
    assert found == max(before, after)
