"""What of DeepSpeed's JSON is refused: every row, for the parts it concerns and for no others."""

import json
import os
import subprocess
import sys

import pytest

from ds_quant.config import ConfigError, QuantConfig
from ds_quant.config.refusals import REFUSALS, check_refusals

PARTS = {
    "linear": {"linear": {"activation": {"bits": 8}}},
    "linear.weight": {"linear": {"weight": {"bits": 8}}},
    "optimizer": {"optimizer": {"exp_avg": {"bits": 8}}},
    "communication": {"communication": {"gradient": {"bits": 8}}},
}
ALL = set(PARTS)
OTHER_PARTS = (
    ("communication.weight",),
    ("communication.weight.bits",),
    ("communication.weight.hierarchical",),
    ("optimizer.master",),
    ("optimizer.release_gradients",),
    ("linear.weight.dampening",),
    ("linear.weight.oscillation_reset",),
)
"""Of rows that have tests of their own, since another part stands for the same path."""

# path, a value that is refused, values that pass, the parts of the section it is refused with
CASES = [
    ("zero_optimization.stage", 4, [0, 1, 2, 3, None], ALL),
    ("zero_optimization.stage", -1, [0], ALL),
    ("zero_optimization.stage", "auto", [0], ALL),
    ("zero_optimization.stage", "3", [0], ALL),
    ("zero_optimization.stage", True, [0], ALL),
    ("tensor_parallel.autotp_size", 2, [0, 1, "auto", None], ALL),
    ("expert_parallel", {"enabled": True, "autoep_size": 2}, [{}, {"enabled": False}, None], ALL),
    ("hybrid_engine", {"enabled": True}, [{}, {"enabled": False}, None], ALL),
    ("compile.deepcompile", True, [False, "auto", None], ALL),
    ("weight_quantization", {"quantized_initialization": {"num_bits": 8}}, [None], ALL),
    ("zero_optimization.zenflow", {}, [None], ALL),
    ("zero_optimization.zenflow", {"topk_ratio": 0.1}, [None], ALL),
    ("zero_optimization.offload_optimizer.super_offload", True, [False, None], ALL),
    ("zero_optimization.offload_optimizer.device", "nvme", ["cpu", "none", None], ALL),
    ("zero_optimization.offload_param.device", "nvme", ["cpu", "none", None], ALL),
    ("zero_optimization.zero_quantized_weights", True, [False, None], {"linear.weight"}),
    ("zero_optimization.zero_quantized_nontrainable_weights", True, [False, None], {"linear.weight"}),
    ("zero_optimization.zero_quantized_gradients", True, [False, None], ALL),
    ("sparse_gradients", True, [False, None], {"communication"}),
    ("zero_optimization.elastic_checkpoint", True, [False, None], {"optimizer"}),
    ("bf16.bf16_optimizer_states", True, [False, None], {"optimizer"}),
    ("bfloat16.bf16_optimizer_states", True, [False, None], {"optimizer"}),
]

# path, values that are refused with optimizer.master, values that pass
MASTER_CASES = [
    ("zero_optimization.stage", [0, None], [1, 2, 3]),
    ("bf16.enabled", [False, None], [True, "auto"]),
    ("data_types.grad_accum_dtype", ["fp32", "fp16"], ["bf16", None]),
    ("zero_optimization.offload_optimizer.device", ["cpu"], ["none", None]),
    ("zero_optimization.offload_param.device", ["cpu"], ["none", None]),
]

# path, values that are refused with optimizer.release_gradients, values that pass
RELEASE_CASES = [
    ("zero_optimization.stage", [0, 1, 3, None], [2]),
    ("gradient_clipping", [1.0, 0.5, "auto", None], [0, 0.0]),
    ("gradient_accumulation_steps", [2], [1, None]),
    ("managed_gradient_accumulation", [False], [True, None]),
    ("bf16.check_grad_overflow", [True, None], [False]),
    ("zero_optimization.contiguous_gradients", [False], [True, None]),
    ("optimizer.type", ["Muon", "muon"], ["AdamW", "Lion"]),
]

# path, a value that is refused with communication.weight, values that pass
WEIGHT_CASES = [("zero_optimization.zero_hpz_partition_size", 2, [1, None])]

# path, a value that is refused with linear.weight.dampening, values that pass
DAMPENING_CASES = [("fp16", {"enabled": True}, [{"enabled": False}, {"enabled": "auto"}, None])]


def config(path, value, section):
    node = value
    for key in reversed(path.split(".")):
        node = {key: node}
    return {"train_batch_size": 1, **node, "ds_quant": section}


def check(path, value, section):
    raw = config(path, value, section)
    check_refusals(raw, QuantConfig.load(raw))


def test_every_row_has_a_case():
    cases = CASES + MASTER_CASES + RELEASE_CASES + WEIGHT_CASES + DAMPENING_CASES
    assert {row.path for row in REFUSALS} == {path for path, *_ in cases}
    assert len({(row.path, row.parts) for row in REFUSALS}) == len(REFUSALS)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(("path", "value", "passing", "refused_with"), CASES)
def test_rows(path, value, passing, refused_with, part):
    for harmless in passing:
        check(path, harmless, PARTS[part])
    if part not in refused_with:
        check(path, value, PARTS[part])
        return
    with pytest.raises(ConfigError) as caught:
        check(path, value, PARTS[part])
    (line,) = str(caught.value).splitlines()
    (row,) = [row for row in REFUSALS if row.path == path and row.parts not in OTHER_PARTS]
    assert line.startswith(f"{path}: got ")
    named = part if part in row.parts else part.split(".")[0]
    assert f"; allowed: {row.allowed} with ds_quant.{named} ({row.reason}); fix: {row.fix}" in line


@pytest.mark.parametrize(("path", "value", "passing"), DAMPENING_CASES)
def test_rows_of_dampening(path, value, passing):
    section = {"linear": {"weight": {"bits": 8, "dampening": 1.0}}}
    for harmless in passing:
        check(path, harmless, section)
    check(path, value, PARTS["linear.weight"])
    with pytest.raises(ConfigError, match=r"fp16: got .*with ds_quant.linear.weight.dampening .*; fix: train in bf16"):
        check(path, value, section)


def test_rows_of_oscillation_reset():
    section = {"linear": {"weight": {"bits": 4, "oscillation_reset": {}}}}
    for stage in (0, 1, 2):
        check("zero_optimization.stage", stage, section)
    check("zero_optimization.stage", 3, PARTS["linear.weight"])
    said = r"stage: got 3; allowed: 0, 1 or 2 with ds_quant.linear.weight.oscillation_reset .*; fix: use stage 1 or 2"
    with pytest.raises(ConfigError, match=said):
        check("zero_optimization.stage", 3, section)


CODES = PARTS["linear.weight"] | {"communication": {"weight": {"mode": "codes"}}}
DIFFERENCE = {"communication": {"weight": {"mode": "difference", "bits": 8}}}


@pytest.mark.parametrize("section", [CODES, DIFFERENCE])
@pytest.mark.parametrize("stage", [None, 0])
def test_weights_are_not_gathered_at_stage_0(stage, section):
    for passing in (1, 2):
        check("zero_optimization.stage", passing, section)
    with pytest.raises(ConfigError, match="nothing is gathered") as caught:
        check("zero_optimization.stage", stage, section)
    assert str(caught.value).startswith("zero_optimization.stage: got ")
    assert "; allowed: 1, 2 or 3 with ds_quant.communication.weight (" in str(caught.value)
    assert 'fix: use stage 1, or remove "weight"' in str(caught.value)


def test_weights_are_gathered_as_codes_alone_at_stage_3():
    check("zero_optimization.stage", 3, CODES)
    with pytest.raises(ConfigError, match="nothing that a difference could be added") as caught:
        check("zero_optimization.stage", 3, DIFFERENCE)
    assert "; allowed: 1 or 2 with ds_quant.communication.weight.bits (" in str(caught.value)


def test_weights_travel_between_ranks_at_stage_3():
    def of(setting):
        return PARTS["linear.weight"] | {"communication": {"weight": {"mode": "codes", "hierarchical": setting}}}

    for setting in (True, 2):
        check("zero_optimization.stage", 2, of(setting))
        with pytest.raises(ConfigError, match="fetches weights in one level") as caught:
            check("zero_optimization.stage", 3, of(setting))
        assert "; allowed: 1 or 2 with ds_quant.communication.weight.hierarchical (" in str(caught.value)
    check("zero_optimization.stage", 3, of(False))


@pytest.mark.parametrize(("path", "refused", "passing"), WEIGHT_CASES)
def test_weights_are_gathered_over_all_ranks(path, refused, passing):
    def raw(value):
        zero, _, key = path.partition(".")
        return {zero: {"stage": 3, key: value}, "ds_quant": CODES}

    for value in passing:
        check_refusals(raw(value), QuantConfig.load(raw(value)))
    with pytest.raises(ConfigError, match=f"^{path}: got {refused}; allowed"):
        check_refusals(raw(refused), QuantConfig.load(raw(refused)))


@pytest.mark.parametrize(("path", "refused", "passing"), RELEASE_CASES)
def test_gradients_are_released_only_where_each_can_be_stepped_at_once(path, refused, passing):
    def raw(value, released=True):
        optimizer = {"master": {"bits": 24}, "release_gradients": released}
        made = {
            "gradient_clipping": 0,
            "zero_optimization": {"stage": 2},
            "bf16": {"enabled": True, "check_grad_overflow": False},
            "optimizer": {"type": "AdamW"},
            "ds_quant": {"optimizer": optimizer},
        }
        *outer, last = path.split(".")
        node = made
        for key in outer:
            node = node[key]
        node[last] = value
        return made

    for value in passing:
        check_refusals(raw(value), QuantConfig.load(raw(value)))
    for value in refused:
        with pytest.raises(ConfigError, match="release_gradients") as caught:
            check_refusals(raw(value), QuantConfig.load(raw(value)))
        assert f"{path}: got {json.dumps(value)}" in str(caught.value)
        if path != "zero_optimization.stage":
            check_refusals(raw(value, False), QuantConfig.load(raw(value, False)))


def test_gradients_are_released_to_masters_of_few_bits():
    section = {"optimizer": {"exp_avg": {"bits": 8}, "release_gradients": True}}
    with pytest.raises(ConfigError, match="release_gradients: got true; allowed: true beside master"):
        QuantConfig.load({"ds_quant": section})


@pytest.mark.parametrize(("path", "refused", "passing"), MASTER_CASES)
def test_masters_are_refused_where_deepspeed_would_keep_others(path, refused, passing):
    section = {"optimizer": {"master": {"bits": 24}}}

    def raw(value):
        made = {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}, "data_types": {}, "ds_quant": section}
        *outer, last = path.split(".")
        node = made
        for key in outer:
            node = node.setdefault(key, {})
        node[last] = value
        return made

    for value in passing:
        check_refusals(raw(value), QuantConfig.load(raw(value)))
    (row,) = [row for row in REFUSALS if row.path == path and row.parts == ("optimizer.master",)]
    for value in refused:
        with pytest.raises(ConfigError) as caught:
            check_refusals(raw(value), QuantConfig.load(raw(value)))
        (line,) = str(caught.value).splitlines()
        assert line.startswith(f"{path}: got ")
        assert f"; allowed: {row.allowed} with ds_quant.optimizer.master ({row.reason}); fix: {row.fix}" in line


def test_masters_find_bf16_by_its_old_name():
    raw = {"zero_optimization": {"stage": 1}, "bfloat16": {"enabled": True}}
    raw["ds_quant"] = {"optimizer": {"master": {"bits": 24}}}
    check_refusals(raw, QuantConfig.load(raw))
    raw["bfloat16"]["enabled"] = False
    with pytest.raises(ConfigError, match=r"bf16\.enabled: got false"):
        check_refusals(raw, QuantConfig.load(raw))


def test_all_hits_are_listed():
    raw = {
        "hybrid_engine": {"enabled": True},
        "zero_optimization": {"stage": 7, "zenflow": {}, "zero_quantized_weights": True},
        "ds_quant": PARTS["linear.weight"] | PARTS["optimizer"],
    }
    with pytest.raises(ConfigError) as caught:
        check_refusals(raw, QuantConfig.load(raw))
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "zero_optimization.stage",
        "hybrid_engine",
        "zero_optimization.zenflow",
        "zero_optimization.zero_quantized_weights",
    ]
    assert "with ds_quant.linear, ds_quant.optimizer (" in lines[0]
    assert "with ds_quant.linear.weight (" in lines[3]


def test_a_disabled_section_refuses_nothing():
    raw = {"hybrid_engine": {"enabled": True}, "ds_quant": {"enabled": False, **PARTS["linear"]}}
    check_refusals(raw, QuantConfig.load(raw))
    check_refusals(raw, QuantConfig.parse(raw["ds_quant"]))
    check_refusals({"hybrid_engine": {"enabled": True}}, QuantConfig(enabled=False))


def test_odd_shapes_do_not_crash():
    raw = {"zero_optimization": True, "tensor_parallel": [1], "compile": None, "ds_quant": PARTS["linear"]}
    check_refusals(raw, QuantConfig.load(raw))


KNOWN_PATHS = """
import sys
from deepspeed.compile.config import CompileConfig
from deepspeed.module_inject.auto_ep_config import AutoEPConfig
from deepspeed.runtime.config import HybridEngineConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config
from deepspeed.runtime.tensor_parallel.config import TPTrainingConfig
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import (
    DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig
)
owners = {
    "zero_optimization": DeepSpeedZeroConfig,
    "zero_optimization.offload_optimizer": DeepSpeedZeroOffloadOptimizerConfig,
    "zero_optimization.offload_param": DeepSpeedZeroOffloadParamConfig,
    "tensor_parallel": TPTrainingConfig,
    "compile": CompileConfig,
    "bf16": DeepSpeedBF16Config,
    "bfloat16": DeepSpeedBF16Config,
}
from deepspeed.runtime.config import get_data_types_params, get_optimizer_name
from deepspeed.runtime.constants import GRAD_ACCUM_DTYPE
assert get_data_types_params({"data_types": GRAD_ACCUM_DTYPE}) == "grad_accum_dtype"  # they have no model
assert get_optimizer_name({"optimizer": {"type": "Muon"}}) == "Muon"
for path in sys.argv[1:]:
    owner, _, key = path.rpartition(".")
    if owner not in ("", "data_types", "optimizer"):
        assert key in owners[owner].model_fields, path
assert "enabled" in HybridEngineConfig.model_fields
assert hasattr(AutoEPConfig(), "enabled")
"""


@pytest.mark.thorough
def test_every_path_is_one_that_deepspeed_has():
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KNOWN_PATHS, *(row.path for row in REFUSALS)]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)
    assert run.returncode == 0, run.stderr
