"""The section of the JSON: every default, and configs as values."""

import pytest
from config_files import W8, load

from ds_quant.config import ConfigError, LinearConfig, MomentConfig, WeightConfig


def test_the_example_of_the_design_loads():
    section = {
        "enabled": True,
        "linear": {
            "weight": {"bits": 8, "granularity": "channel"},
            "activation": {"bits": 8, "granularity": "token"},
            "gradient": {
                "bits": 8,
                "granularity": "outer",
                "rounding": "stochastic",
                "used_for": ["weight", "input"],
            },
            "backend": "int8",
            "backward_operands": "quantized",
            "include": ["*"],
            "exclude": ["lm_head"],
        },
        "optimizer": {
            "exp_avg": {"bits": 8, "map": "power", "block_size": 256},
            "exp_avg_sq": {"bits": 8, "map": "power", "block_size": 256},
        },
        "communication": {"gradient": {"bits": 8, "block_size": 256, "error_feedback": False}},
    }
    quant = load(section)
    assert quant.linear.exclude == ("lm_head",)
    assert quant.optimizer.exp_avg_sq.map == "power"
    assert quant.communication.gradient.bits == 8


def test_defaults():
    quant = load(
        {
            "linear": {"weight": {"bits": 8}, "activation": {"bits": 7}, "gradient": {"bits": 2}},
            "optimizer": {"exp_avg": {"bits": 8}, "exp_avg_sq": {"bits": 4}},
            "communication": {"gradient": {"bits": 4}},
        }
    )
    assert quant.enabled is True
    operand = {"symmetric": True, "rounding": "nearest", "format": None, "scale_rule": None}
    block = {"block_size": 128}
    pulls = {"trust_distance": None, "dampening": None, "oscillation_reset": None}
    weight = {"bits": 8, "granularity": "channel", "block_rows": 1, **pulls, **block, **operand}
    assert vars(quant.linear.weight) == weight
    assert vars(quant.linear.activation) == {
        "bits": 7,
        "granularity": "token",
        "range": "narrow",
        "split_mean": False,
        "outlier_share": None,
        **block,
        **operand,
    }
    assert vars(quant.linear.gradient) == {
        "bits": 2,
        "granularity": "outer",
        "used_for": ("weight", "input"),
        "split_mean": False,
        "split_qkv": (),
        **block,
        **operand,
    }
    assert (
        load({"linear": {"weight": {"bits": 8}, "activation": {"bits": 8}, "rotation": {}}}).linear.rotation.signs
        == "fixed"
    )
    linear = quant.linear
    assert (linear.backend, linear.backward_operands) == ("simulated", "quantized")
    assert (linear.include, linear.exclude) == (("*",), None)
    moment = {"granularity": "block", "rounding": None}
    assert vars(quant.optimizer.exp_avg) == {"bits": 8, "map": "float", "block_size": 256, **moment}
    assert vars(quant.optimizer.exp_avg_sq) == {"bits": 4, "map": "power", "block_size": 128, **moment}
    assert quant.optimizer.exclude == ()
    assert vars(quant.communication.gradient) == {
        "bits": 4,
        "format": None,
        "scale_rule": None,
        "block_size": 128,
        "rounding": "nearest",
        "error_feedback": False,
        "rotation": "none",
        "hierarchical": False,
    }


def test_absent_parts_are_none():
    quant = load({"linear": W8})
    assert quant.linear.activation is None
    assert quant.linear.gradient is None
    assert quant.optimizer is None
    assert quant.communication is None


def test_configs_are_frozen_and_comparable():
    quant = load({"linear": W8})
    with pytest.raises(ValueError, match="frozen"):
        quant.linear.weight.bits = 4
    assert quant == load({"linear": {"weight": {"bits": 8, "granularity": "channel"}}})
    assert quant != load({"linear": {"weight": {"bits": 4}}})


def test_parts_are_parsed_by_their_own_class():
    assert LinearConfig.parse(W8).weight == WeightConfig(bits=8)
    instance = LinearConfig.parse(W8)
    assert LinearConfig.parse(instance) is instance
    with pytest.raises(ConfigError, match=r"^ds_quant\.linear\.weight\.bits: got 9;"):
        LinearConfig.parse({"weight": {"bits": 9}})


def test_what_is_built_directly_is_validated_too():
    with pytest.raises(ValueError, match=r"block_size: got 64; allowed: only with granularity"):
        WeightConfig(bits=8, block_size=64)


def test_the_default_block_size_follows_the_bits():
    assert MomentConfig(bits=8).block_size == 256
    assert MomentConfig(bits=4).block_size == 128
