"""The section within a DeepSpeed JSON: missing, switched off, misspelt, misplaced; the tripwire; near misses."""

import copy
import json
import os
import subprocess
import sys

import pytest
from config_files import W8, check_parts, errors

from ds_quant.config import ConfigError, QuantConfig, near_miss_keys, strip_tripwire
from ds_quant.config.deepspeed_json import OTHER_TOP_LEVEL_KEYS, TOP_LEVEL_KEYS

# ---- the whole config


@pytest.mark.parametrize("config", [{}, {"train_batch_size": 1}, {"ds_quant": {"enabled": False, "linear": W8}}])
def test_without_the_section_nothing_is_quantized(config):
    assert QuantConfig.load(config) == QuantConfig(enabled=False)


def test_a_disabled_section_is_still_validated():
    assert "bits" in errors({"enabled": False, "linear": {"weight": {"bits": 9}}})


@pytest.mark.parametrize(
    "key", ["ds_quants", "dsquant", "ds-quant", "DS_QUANT", "ds_qaunt", "ds_quantization", "_ds_quant", "dsquant_"]
)
def test_a_misspelt_section_is_an_error(key):
    with pytest.raises(ConfigError) as caught:
        QuantConfig.load({"train_batch_size": 1, key: {"linear": W8}})
    check_parts(str(caught.value), key, '{"linear": {"weight": {"bits": 8}}}', '"ds_quant"', 'did you mean "ds_quant"?')


@pytest.mark.parametrize(
    ("config", "where"),
    [
        ({"linear": W8}, "linear"),
        ({"linear": W8, "train_batch_size": 8}, "linear"),
        ({"communication": {"gradient": {"bits": 8}}}, "communication"),
        ({"optimizer": {"exp_avg": {"bits": 8}}}, "optimizer"),
        ({"enabled": True, "optimizer": {"exp_avg_sq": {"bits": 8}}}, "optimizer"),
    ],
)
def test_the_section_alone_is_an_error(config, where):
    with pytest.raises(ConfigError) as caught:
        QuantConfig.load(config)
    check_parts(
        str(caught.value), where, json.dumps(config[where]), "only inside ds_quant", "nest the section in a whole"
    )


def test_deepspeeds_own_optimizer_is_no_section():
    assert not QuantConfig.load({"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}).enabled


# ---- tripwire


@pytest.mark.parametrize("value", [True, "run with python -m ds_quant"])
def test_the_tripwire_is_stripped_from_a_copy(value):
    config = {"zero_optimization": {"ds_quant_required": value, "stage": 2}, "ds_quant": {"linear": W8}}
    before = copy.deepcopy(config)
    stripped = strip_tripwire(config)
    assert stripped == {"zero_optimization": {"stage": 2}, "ds_quant": {"linear": W8}}
    assert config == before


@pytest.mark.parametrize("config", [{}, {"zero_optimization": {"stage": 2}}, {"zero_optimization": True}])
def test_nothing_to_strip(config):
    assert strip_tripwire(config) == config


@pytest.mark.parametrize("value", [False, "true", 1, None])
def test_the_tripwire_is_true_or_absent(value):
    config = {"zero_optimization": {"ds_quant_required": value}, "ds_quant": {"linear": W8}}
    for function in (strip_tripwire, QuantConfig.load):
        with pytest.raises(ConfigError) as caught:
            function(config)
        where = "zero_optimization.ds_quant_required"
        check_parts(str(caught.value), where, json.dumps(value), "or absent", "set it to true")


def test_a_tripwire_without_the_section_is_an_error():
    with pytest.raises(ConfigError) as caught:
        QuantConfig.load({"zero_optimization": {"ds_quant_required": True}})
    check_parts(str(caught.value), "zero_optimization.ds_quant_required", "true", "only with the section", "add the")


def test_a_misplaced_tripwire_is_an_error():
    with pytest.raises(ConfigError) as caught:
        QuantConfig.load({"ds_quant_required": True, "ds_quant": {"linear": W8}})
    check_parts(str(caught.value), "ds_quant_required", "true", "only inside zero_optimization", "move it there")


# ---- misspelt DeepSpeed keys


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("zero_optimizaton", "zero_optimization"),
        ("zero_optimisation", "zero_optimization"),
        ("optimiser", "optimizer"),
        ("gradient_acumulation_steps", "gradient_accumulation_steps"),
        ("train_micro_batch_size", "train_micro_batch_size_per_gpu"),
        ("Gradient_Clipping", "gradient_clipping"),
        ("schedular", "scheduler"),
    ],
)
def test_a_near_miss_is_warned_about(key, meant):
    (warning,) = near_miss_keys({"train_batch_size": 1, key: 1, "ds_quant": {}})
    assert warning.startswith(f"{key}: ")
    assert f'did you mean "{meant}"?' in warning


def test_known_and_foreign_keys_are_no_near_miss():
    foreign = {"wandb_project": 1, "model": 1, "seed": 1, "notes": 1, "amp_level": 1}
    assert near_miss_keys(dict.fromkeys(TOP_LEVEL_KEYS | OTHER_TOP_LEVEL_KEYS | foreign.keys())) == []


READ_KEYS = """
import json
seen = set()
class Recorder(dict):
    def get(self, key, *default): seen.add(key); return super().get(key, *default)
    def __getitem__(self, key): seen.add(key); return super().__getitem__(key)
    def __contains__(self, key): seen.add(key); return super().__contains__(key)
    def __copy__(self): return Recorder(self)
    def keys(self): return self
from deepspeed.runtime import config
config.DeepSpeedConfig(Recorder(train_batch_size=1))
print("KEYS", json.dumps(sorted(seen - set(config._REMOVED_TOP_LEVEL_CONFIG_KEYS))))
"""


@pytest.mark.thorough
def test_the_known_keys_are_those_that_deepspeed_reads():
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", READ_KEYS]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400, check=True)
    (line,) = [line for line in run.stdout.splitlines() if line.startswith("KEYS ")]
    assert set(json.loads(line.removeprefix("KEYS "))) == TOP_LEVEL_KEYS
