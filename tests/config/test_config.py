"""The section of the JSON: every rule, every default, and messages that name the fix."""

import base64
import copy
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ds_quant import config as config_module
from ds_quant.base.number_formats import FORMATS
from ds_quant.config import (
    ConfigError,
    LinearConfig,
    MomentConfig,
    QuantConfig,
    WeightConfig,
    json_schema,
    near_miss_keys,
    read_deepspeed_config,
    resolve_auto,
    strip_tripwire,
    unresolved_auto,
)
from ds_quant.config.deepspeed_json import OTHER_TOP_LEVEL_KEYS, TOP_LEVEL_KEYS
from ds_quant.config.section import Section

W8 = {"weight": {"bits": 8}}


def load(section):
    return QuantConfig.load({"train_batch_size": 1, "ds_quant": section})


def errors(section) -> str:
    with pytest.raises(ConfigError) as caught:
        load(section)
    return str(caught.value)


def check_parts(line: str, where: str, got: str, allowed: str, fix: str) -> None:
    assert line.startswith(f"{where}: got {got}; allowed: "), line
    rest = line.split("; allowed: ", 1)[1]
    assert allowed in rest.split("; fix: ")[0], line
    assert fix in rest.split("; fix: ")[1], line


# ---- defaults


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


NODE = "false, true for the ranks that the launcher has put on a node, or their number, 2 or more"


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
    assert vars(quant.linear.weight) == {"bits": 8, "granularity": "channel", "block_rows": 1, **block, **operand}
    assert vars(quant.linear.activation) == {
        "bits": 7,
        "granularity": "token",
        "range": "narrow",
        "split_mean": False,
        **block,
        **operand,
    }
    assert vars(quant.linear.gradient) == {
        "bits": 2,
        "granularity": "outer",
        "used_for": ("weight", "input"),
        "split_mean": False,
        **block,
        **operand,
    }
    linear = quant.linear
    assert (linear.backend, linear.backward_operands) == ("simulated", "quantized")
    assert (linear.include, linear.exclude) == (("*",), None)
    moment = {"granularity": "block", "rounding": None}
    assert vars(quant.optimizer.exp_avg) == {"bits": 8, "map": "float", "block_size": 256, **moment}
    assert vars(quant.optimizer.exp_avg_sq) == {"bits": 4, "map": "power", "block_size": 128, **moment}
    assert quant.optimizer.exclude == ()
    assert vars(quant.communication.gradient) == {
        "bits": 4,
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


# ---- one wrong value: (section, where, got, allowed, fix)

LINEAR = "ds_quant.linear"
ON_WIRE = "ds_quant.communication.weight"
W8_LINEAR = {"linear": {"weight": {"bits": 8}, "activation": {"bits": 8}}}
W8A8G8 = {"weight": {"bits": 8}, "activation": {"bits": 8}, "gradient": {"bits": 8}}
CODES = {"weight": {"mode": "codes"}}
WRONG_VALUES = [
    *(
        (
            {"linear": {"weight": {"bits": bits}}},
            f"{LINEAR}.weight.bits",
            json.dumps(bits),
            "an integer from 2 to 8",
            "write what is allowed",
        )
        for bits in (1, 9, 8.0, "8", True, None)
    ),
    (
        {"linear": {"weight": {}}},
        f"{LINEAR}.weight.bits",
        "nothing",
        "an integer from 2 to 8",
        "add it",
    ),
    (
        {"linear": {"weight": {"bits": 8, "granularity": "chanel"}}},
        f"{LINEAR}.weight.granularity",
        '"chanel"',
        '"tensor", "channel", "block"',
        'did you mean "channel"?',
    ),
    (
        {"linear": {"weight": {"bits": 8, "granularity": "token"}}},
        f"{LINEAR}.weight.granularity",
        '"token"',
        '"tensor", "channel", "block"',
        "write",
    ),
    (
        {"linear": {"activation": {"bits": 8, "granularity": "outer"}}},
        f"{LINEAR}.activation.granularity",
        '"outer"',
        '"tensor", "token", "channel", "block"',
        "write",
    ),
    (
        {"linear": {"gradient": {"bits": 8, "block_size": 128}}},
        f"{LINEAR}.gradient.block_size",
        "128",
        'only with granularity "block"',
        "remove it",
    ),
    *(
        ({"linear": {**W8A8G8, **linear}}, f"{LINEAR}.{part}.split_mean", "true", allowed, fix)
        for linear, part, allowed, fix in (
            ({"gradient": {"bits": 8, "split_mean": True}}, "gradient", "with activation.split_mean", "add that"),
            (
                {"gradient": {"bits": 8, "split_mean": True}, "backward_operands": "original"},
                "gradient",
                'false with backward_operands "original"',
                "remove one",
            ),
            (
                {"activation": {"bits": 8, "split_mean": True}, "backend": "int8"},
                "activation",
                'false with backend "int8"',
                'backend "simulated"',
            ),
        )
    ),
    *(
        ({"linear": {**W8A8G8, "exclude_blocks": ends}}, f"{LINEAR}.exclude_blocks{key}", got, allowed, "")
        for ends, key, got, allowed in (
            ({}, "", '{"first": 0.0, "last": 0.0}', "more than 0 and less than 1 together"),
            ({"first": 0.5, "last": 0.5}, "", '{"first": 0.5, "last": 0.5}', "more than 0 and less than 1 together"),
            ({"last": 1}, ".last", "1", "a number from 0 on and below 1"),
        )
    ),
    *(
        ({"linear": {**W8A8G8, "rotation": {}, **linear}}, f"{LINEAR}.{key}", got, allowed, fix)
        for linear, key, got, allowed, fix in (
            ({"rotation": {"block_size": 8}}, "rotation.block_size", "8", "16, 32, 64 or 128", "write"),
            ({"rotation": {"used_for": []}}, "rotation.used_for", "[]", "each once", "remove the key"),
            (
                {"rotation": {"used_for": ["dW"]}},
                "rotation.used_for[0]",
                '"dW"',
                '"output", "input", "weight"',
                "write",
            ),
            ({"backend": "int8"}, "rotation", "{}", 'absent with backend "int8"', "remove it"),
            (
                {"rotation": {"used_for": ["input"]}, "backward_operands": "original"},
                "rotation.used_for",
                '["input"]',
                "whose two operands are quantized (output)",
                "take out the others",
            ),
            (
                {"activation": {"bits": 8, "granularity": "channel"}},
                "activation.granularity",
                '"channel"',
                '"tensor", "token" or "block" with a rotated output',
                "leave the output out",
            ),
            ({"gradient": {"bits": 8, "granularity": "token"}}, "gradient.granularity", '"token"', "weight", "leave"),
            (
                {"gradient": {"bits": 8, "granularity": "channel"}},
                "gradient.granularity",
                '"channel"',
                "input",
                "leave",
            ),
        )
    ),
    (
        {"linear": {"weight": {"bits": 8, "symmetric": 1}}},
        f"{LINEAR}.weight.symmetric",
        "1",
        "true or false",
        "write",
    ),
    (
        {"linear": {"weight": {"bits": 8, "rounding": "stocastic"}}},
        f"{LINEAR}.weight.rounding",
        '"stocastic"',
        '"nearest", "stochastic"',
        'did you mean "stochastic"?',
    ),
    *(
        (
            {"linear": {"weight": {"bits": 8, "granularity": "block", "block_size": size}}},
            f"{LINEAR}.weight.block_size",
            json.dumps(size),
            "a power of two from 16 to 4096",
            "write",
        )
        for size in (8, 24, 8192, 128.0, "128", None)
    ),
    *(
        (
            {"linear": {operand: {"bits": 8, "granularity": "tensor", "block_size": 128}}},
            f"{LINEAR}.{operand}.block_size",
            "128",
            'only with granularity "block"',
            "remove it",
        )
        for operand in ("weight", "activation")
    ),
    (
        {"linear": {"gradient": {"bits": 8, "used_for": []}}},
        f"{LINEAR}.gradient.used_for",
        "[]",
        '"weight", "input" or both',
        'leave "gradient" out',
    ),
    (
        {"linear": {"gradient": {"bits": 8, "used_for": ["input", "input"]}}},
        f"{LINEAR}.gradient.used_for",
        '["input", "input"]',
        "each once",
        "list each product once",
    ),
    (
        {"linear": {"gradient": {"bits": 8, "used_for": ["wieght"]}}},
        f"{LINEAR}.gradient.used_for[0]",
        '"wieght"',
        '"weight", "input"',
        'did you mean "weight"?',
    ),
    (
        {"linear": {"gradient": {"bits": 8, "used_for": "weight"}}},
        f"{LINEAR}.gradient.used_for",
        '"weight"',
        "a list of",
        "write",
    ),
    ({"linear": {**W8, "backend": "int9"}}, f"{LINEAR}.backend", '"int9"', '"simulated", "int8", "fp8"', "int8"),
    (
        {"linear": {**W8, "backward_operands": "orignal"}},
        f"{LINEAR}.backward_operands",
        '"orignal"',
        '"quantized", "original"',
        'did you mean "original"?',
    ),
    ({"linear": {**W8, "include": []}}, f"{LINEAR}.include", "[]", "at least one", 'remove it for ["*"]'),
    ({"linear": {**W8, "include": [""]}}, f"{LINEAR}.include[0]", '""', "none of them empty", "write"),
    ({"linear": {**W8, "exclude": ["a", " "]}}, f"{LINEAR}.exclude[1]", '" "', "none of them empty", "write"),
    ({"linear": {**W8, "exclude": "lm_head"}}, f"{LINEAR}.exclude", '"lm_head"', "a list of shell patterns", "write"),
    ({"linear": {**W8, "exclude": [3]}}, f"{LINEAR}.exclude[0]", "3", "a list of shell patterns", "write"),
    ({"linear": {**W8, "weigth": {"bits": 4}}}, f"{LINEAR}.weigth", '{"bits": 4}', "the keys weight", '"weight"?'),
    ({"linear": {**W8, "zzz": 1}}, f"{LINEAR}.zzz", "1", "the keys weight", "remove it"),
    ({"linear": W8, "optimiser": {}}, "ds_quant.optimiser", "{}", "the keys enabled", 'did you mean "optimizer"?'),
    ({"linear": W8, "enabled": "true"}, "ds_quant.enabled", '"true"', "true or false", "write"),
    ({"linear": 3}, LINEAR, "3", "an object with the keys weight, activation", "write"),
    ({"linear": {"weight": [8]}}, f"{LINEAR}.weight", "[8]", "an object with the keys bits", "write"),
    ([], "ds_quant", "[]", "an object with the keys enabled", "write"),
    (None, "ds_quant", "null", "an object with the keys enabled", "write"),
    (True, "ds_quant", "true", "an object with the keys enabled", "write"),
    *(
        ({"optimizer": {"exp_avg": {"bits": bits}}}, "ds_quant.optimizer.exp_avg.bits", json.dumps(bits), "4 or 8", "w")
        for bits in (2, 16, 8.0, "8", True)
    ),
    (
        {"optimizer": {"exp_avg": {"bits": 8, "map": "lineer"}}},
        "ds_quant.optimizer.exp_avg.map",
        '"lineer"',
        '"float", "power", "linear", "dynamic"',
        'did you mean "linear"?',
    ),
    (
        {"optimizer": {"exp_avg_sq": {"bits": 4, "map": "float"}}},
        "ds_quant.optimizer.exp_avg_sq.map",
        '"float"',
        '"power", "linear", "dynamic" with 4 bits',
        "remove it",
    ),
    *(
        (
            {"optimizer": {"exp_avg_sq": {"bits": 8, "block_size": size}}},
            "ds_quant.optimizer.exp_avg_sq.block_size",
            json.dumps(size),
            "a power of two from 32 to 4096",
            "write",
        )
        for size in (16, 100, 8192)
    ),
    (
        {"optimizer": {"exp_avg": {"bits": 8, "map": "linear", "granularity": "tensor", "block_size": 256}}},
        "ds_quant.optimizer.exp_avg.block_size",
        "256",
        'only with granularity "block"',
        "remove it",
    ),
    *(
        (
            {"optimizer": {"exp_avg": {"bits": 8, "granularity": granularity}}},
            "ds_quant.optimizer.exp_avg.map",
            '"float"',
            f'"linear" with granularity "{granularity}"',
            'granularity "block"',
        )
        for granularity in ("tensor", "channel")
    ),
    (
        {"optimizer": {"exp_avg": {"bits": 8, "rounding": "nearest"}}},
        "ds_quant.optimizer.exp_avg.rounding",
        '"nearest"',
        '"stochastic"',
        "remove it",
    ),
    *(
        ({"optimizer": {"master": {"bits": bits}}}, "ds_quant.optimizer.master.bits", json.dumps(bits), "24 or 16", "w")
        for bits in (8, 32, 24.0, "24")
    ),
    ({"optimizer": {"master": {}}}, "ds_quant.optimizer.master.bits", "nothing", "24 or 16", "add it"),
    (
        {"optimizer": {"exp_avg": {"bits": 8, "rounding": "up"}}},
        "ds_quant.optimizer.exp_avg.rounding",
        '"up"',
        '"nearest", "stochastic"',
        "write",
    ),
    (
        {"optimizer": {"exp_avg": {"bits": 8}, "exclude": [""]}},
        "ds_quant.optimizer.exclude[0]",
        '""',
        "none of them empty",
        "write",
    ),
    *(
        (
            {"communication": {"gradient": {"bits": 8, key: value}}},
            f"ds_quant.communication.gradient.{key}",
            json.dumps(value),
            allowed,
            "w",
        )
        for key, value, allowed in [
            ("bits", 5, "4 or 8"),
            ("block_size", 100, "a power of two from 32 to 4096"),
            ("rounding", "down", '"nearest", "stochastic"'),
            ("error_feedback", 1, "true or false"),
            ("rotation", "fourier", '"none", "hadamard"'),
            ("hierarchical", 0, NODE),
            ("hierarchical", 1, NODE),
            ("hierarchical", 2.0, NODE),
        ]
    ),
    # weights on the wire
    ({**W8_LINEAR, "communication": {"weight": {}}}, f"{ON_WIRE}.mode", "nothing", '"codes", ', "add it"),
    (
        {**W8_LINEAR, "communication": {"weight": {"mode": "code"}}},
        f"{ON_WIRE}.mode",
        '"code"',
        '"codes"',
        "did you mean",
    ),
    (
        {**W8_LINEAR, "communication": {"weight": {"mode": "codes", "error_feedback": True}}},
        f"{ON_WIRE}.error_feedback",
        "true",
        "the keys mode",
        "remove it",
    ),
    (
        {
            "optimizer": {"master": {"bits": 24}},
            "communication": {"weight": {"mode": "difference", "bits": 8}},
        },
        f"{ON_WIRE}.mode",
        '"difference"',
        '"codes" with optimizer.master',
        "remove optimizer.master",
    ),
    ({"communication": {"weight": {"mode": "difference"}}}, f"{ON_WIRE}.bits", "null", "4 or 8", "add it"),
    *(
        (
            {**W8_LINEAR, "communication": {"weight": {"mode": "codes", key: value}}},
            f"{ON_WIRE}.{key}",
            json.dumps(value),
            'only with mode "difference"',
            "remove it",
        )
        for key, value in [
            ("bits", 8),
            ("block_size", 256),
            ("rounding", "nearest"),
            ("rotation", "hadamard"),
            ("whole_every", 10),
        ]
    ),
    *(
        (
            {"communication": {"weight": {"mode": "difference", "bits": 8, key: value}}},
            f"{ON_WIRE}.{key}",
            json.dumps(value),
            allowed,
            "",
        )
        for key, value, allowed in [
            ("bits", 5, "4 or 8"),
            ("block_size", 100, "a power of two from 32 to 4096"),
            ("rounding", "down", '"nearest", "stochastic"'),
            ("rotation", "fourier", '"none", "hadamard"'),
            ("whole_every", 0, "an integer, 1 or more"),
        ]
    ),
    ({"communication": CODES}, f"{ON_WIRE}.mode", '"codes"', "only with linear.weight:", "or remove"),
    *(
        (
            {"linear": {"weight": {"bits": 8}, "activation": {"bits": 8}, **change}, "communication": CODES},
            f"{ON_WIRE}.mode",
            '"codes"',
            f"only with linear.{needed}: layers must compute with the codes alone",
            "change that",
        )
        for change, needed in [
            ({"weight": {"bits": 8, "granularity": "tensor"}}, 'weight.granularity "channel"'),
            ({"weight": {"bits": 8, "granularity": "block"}}, 'weight.granularity "channel"'),
            ({"weight": {"bits": 8, "symmetric": False}}, "weight.symmetric true"),
            ({"weight": {"bits": 8, "rounding": "stochastic"}}, 'weight.rounding "nearest"'),
            ({"backward_operands": "original"}, 'backward_operands "quantized"'),
            ({"weight": {"format": "fp8_e4m3"}}, "weight.bits"),
        ]
    ),
    # formats
    *(
        ({"linear": {part: {"format": "mxfp8", **keys}}}, f"{LINEAR}.{part}.{where}", got, allowed, fix)
        for part, keys, where, got, allowed, fix in (
            ("weight", {"bits": 8}, "format", '"mxfp8"', 'absent beside "bits"', "remove one of the two"),
            ("weight", {"format": "mxfp9"}, "format", '"mxfp9"', '"nvint4"', 'did you mean "mxfp8"?'),
            ("weight", {"format": None}, "format", "null", '"fp8_e4m3"', "write what is allowed"),
            ("weight", {"granularity": "channel"}, "granularity", '"channel"', '"block" with format', "remove it"),
            ("activation", {"block_size": 16}, "block_size", "16", '32 with format "mxfp8"', "remove it"),
            ("gradient", {"granularity": "outer"}, "granularity", '"outer"', '"block" with format', "remove it"),
            ("gradient", {"symmetric": False}, "symmetric", "false", 'true with format "mxfp8"', "remove it"),
            ("activation", {"range": "full"}, "range", '"full"', '"narrow" with format', "remove it, or use bits"),
            ("weight", {"scale_rule": "ceil"}, "scale_rule", '"ceil"', '"floor" or "up"', "write what is allowed"),
            ("weight", {"format": "nvfp4", "scale_rule": "up"}, "scale_rule", '"up"', "powers of two", "remove it"),
            ("weight", {"format": "mxfp4", "scale_rule": "four_six"}, "scale_rule", '"four_six"', "nvfp4", "remove it"),
            ("weight", {"block_rows": 16}, "block_rows", "16", '16 with format "nvfp4"', "remove it"),
            ("weight", {"format": "nvfp4", "block_rows": 8}, "block_rows", "8", "1 or 16", "write what is allowed"),
        )
    ),
    *(
        (
            {"linear": {"weight": {"format": name}, "backend": "int8"}},
            f"{LINEAR}.weight.format",
            f'"{name}"',
            'bits with backend "int8"',
            'backend "simulated"',
        )
        for name in FORMATS
    ),
    (
        {"linear": {"weight": {"format": "mxfp8"}, "gradient": {"format": "fp8_e4m3"}}},
        f"{LINEAR}.weight.granularity",
        '"block"',
        'a gradient of granularity "outer" cannot fold a scale per block',
        "set gradient.granularity",
    ),
    # what quantizes nothing
    ({}, "ds_quant", "{}", "at least one of linear, optimizer, communication or diagnostics", "quantizes nothing"),
    ({"enabled": True}, "ds_quant", '{"enabled": true}', "at least one of linear", "quantizes nothing"),
    ({"linear": {}}, LINEAR, "{}", "at least one of weight, activation or gradient", "quantizes nothing"),
    ({"linear": {"backend": "int8"}}, LINEAR, '{"backend": "int8"}', "at least one of weight", "quantizes nothing"),
    (
        {"optimizer": {}},
        "ds_quant.optimizer",
        "{}",
        "exp_avg_fast, exp_avg_slow or master",
        "quantizes nothing",
    ),
    ({"communication": {}}, "ds_quant.communication", "{}", "at least one of gradient", "quantizes nothing"),
    ({"enabled": False, "linear": {}}, LINEAR, "{}", "at least one of weight", "quantizes nothing"),
    # "auto"
    ({"linear": {"weight": {"bits": "auto"}}}, f"{LINEAR}.weight.bits", '"auto"', "a value", "write it out"),
    ({"linear": {**W8, "exclude": ["auto"]}}, f"{LINEAR}.exclude[0]", '"auto"', "a value", "write it out"),
    ("auto", "ds_quant", '"auto"', "a value", "write it out"),
]


@pytest.mark.parametrize(("section", "where", "got", "allowed", "fix"), WRONG_VALUES)
def test_a_wrong_value_is_refused(section, where, got, allowed, fix):
    message = errors(section)
    assert len(message.splitlines()) == 1
    check_parts(message, where, got, allowed, fix)


def test_all_errors_are_listed_one_a_line():
    message = errors(
        {
            "linear": {"weight": {"bits": 9, "granularity": "chanel"}, "backend": "auto", "bogus": 1},
            "optimizer": {"exp_avg": {"bits": 8, "granularity": "tensor"}},
            "communication": {},
        }
    )
    assert {line.split(": ")[0] for line in message.splitlines()} == {
        "ds_quant.linear.weight.bits",
        "ds_quant.linear.weight.granularity",
        "ds_quant.linear.backend",
        "ds_quant.linear.bogus",
        "ds_quant.optimizer.exp_avg.map",
        "ds_quant.communication",
    }
    assert len(message.splitlines()) == 6


def test_parts_are_parsed_by_their_own_class():
    assert LinearConfig.parse(W8).weight == WeightConfig(bits=8)
    instance = LinearConfig.parse(W8)
    assert LinearConfig.parse(instance) is instance
    with pytest.raises(ConfigError, match=r"^ds_quant\.linear\.weight\.bits: got 9;"):
        LinearConfig.parse({"weight": {"bits": 9}})


def test_what_is_built_directly_is_validated_too():
    with pytest.raises(ValueError, match=r"block_size: got 64; allowed: only with granularity"):
        WeightConfig(bits=8, block_size=64)


# ---- rules between fields


def gradient(granularity="outer", used_for=("weight", "input"), **rest):
    return {"bits": 8, "granularity": granularity, "used_for": list(used_for), **rest}


@pytest.mark.parametrize(
    ("weight", "activation", "used_for", "refused"),
    [
        ("block", None, ["input"], ["weight"]),
        ("block", None, ["weight"], []),
        ("channel", None, ["weight", "input"], []),
        ("tensor", "tensor", ["weight", "input"], []),
        (None, "block", ["weight"], ["activation"]),
        (None, "channel", ["weight"], ["activation"]),
        (None, "channel", ["input"], []),
        (None, "block", ["input"], []),
        (None, "token", ["weight", "input"], []),
        ("block", "channel", ["weight", "input"], ["weight", "activation"]),
        (None, None, ["weight", "input"], []),
    ],
)
def test_outer_needs_scales_that_fold(weight, activation, used_for, refused):
    linear = {"gradient": gradient(used_for=used_for)}
    if weight:
        linear["weight"] = {"bits": 8, "granularity": weight}
    if activation:
        linear["activation"] = {"bits": 8, "granularity": activation}
    load({"linear": {**linear, "backward_operands": "original"}})
    load({"linear": {**linear, "gradient": gradient("token", used_for)}})
    if not refused:
        load({"linear": linear})
        return
    lines = errors({"linear": linear}).splitlines()
    assert len(lines) == len(refused)
    for line, operand in zip(lines, refused, strict=True):
        got = json.dumps(linear[operand]["granularity"])
        check_parts(line, f"{LINEAR}.{operand}.granularity", got, "cannot fold a scale per", "gradient.granularity")


@pytest.mark.parametrize(
    ("operand", "value", "key", "allowed"),
    [
        ("weight", {"symmetric": False}, "symmetric", "a zero point has no place"),
        ("activation", {"symmetric": False}, "symmetric", "a zero point has no place"),
        ("gradient", {"symmetric": False}, "symmetric", "a zero point has no place"),
        ("weight", {"granularity": "block"}, "granularity", '"channel" or "tensor"'),
        ("activation", {"granularity": "channel"}, "granularity", '"token" or "tensor"'),
        ("activation", {"granularity": "block"}, "granularity", '"token" or "tensor"'),
        ("gradient", {"granularity": "token"}, "granularity", '"outer" or "tensor"'),
        ("gradient", {"granularity": "channel"}, "granularity", '"outer" or "tensor"'),
        ("weight", {"rounding": "stochastic"}, "rounding", '"nearest"'),
    ],
)
def test_int8_refuses_what_integer_units_cannot_do(operand, value, key, allowed):
    linear = {operand: {"bits": 8, **value}}
    load({"linear": linear})
    message = errors({"linear": {**linear, "backend": "int8"}})
    check_parts(message, f"{LINEAR}.{operand}.{key}", json.dumps(value[key]), allowed, 'backend "simulated"')


def test_int8_takes_the_scales_off_the_contraction_axis():
    for weight in ("channel", "tensor"):
        for activation in ("token", "tensor"):
            for granularity in ("outer", "tensor"):
                linear = {
                    "weight": {"bits": 8, "granularity": weight},
                    "activation": {"bits": 4, "granularity": activation, "rounding": "stochastic"},
                    "gradient": gradient(granularity, rounding="stochastic"),
                    "backend": "int8",
                }
                if granularity == "outer" or (weight, activation) == ("tensor", "tensor"):
                    assert load({"linear": linear}).linear.backend == "int8"
                    continue
                # Nothing is folded: the other operand's scale would stay on the contraction axis.
                for other, theirs in (("weight", weight), ("activation", activation)):
                    message = errors({"linear": linear})
                    named = f'{other}.granularity "{theirs}"'
                    assert (named in message) == (theirs != "tensor"), message
                check_parts(message, f"{LINEAR}.gradient.granularity", '"tensor"', '"outer"', 'backend "simulated"')
                original = {**linear, "backward_operands": "original"}
                assert load({"linear": original}).linear.backend == "int8"


@pytest.mark.parametrize(
    ("operand", "value", "key", "allowed"),
    [
        ("weight", {"bits": 8}, "format", '"fp8_e4m3" with backend "fp8"'),
        ("weight", {"format": "fp8_e5m2"}, "format", '"fp8_e4m3" with backend "fp8"'),
        ("activation", {"format": "mxfp8"}, "format", '"fp8_e4m3" with backend "fp8"'),
        ("gradient", {"format": "fp6_e3m2"}, "format", '"fp8_e4m3" or "fp8_e5m2" with backend "fp8"'),
        ("weight", {"format": "fp8_e4m3", "granularity": "block"}, "granularity", '"channel" or "tensor"'),
        ("activation", {"format": "fp8_e4m3", "granularity": "channel"}, "granularity", '"token" or "tensor"'),
        ("gradient", {"format": "fp8_e5m2", "granularity": "token"}, "granularity", '"outer" or "tensor"'),
    ],
)
def test_fp8_refuses_what_fp8_units_cannot_do(operand, value, key, allowed):
    load({"linear": {operand: value}})
    message = errors({"linear": {operand: value, "backend": "fp8"}})
    got = json.dumps(value[key]) if key in value else "nothing"
    check_parts(message, f"{LINEAR}.{operand}.{key}", got, allowed, 'backend "simulated"')


def test_fp8_takes_one_scale_for_gradients_beside_operands_with_one():
    fp8 = {"format": "fp8_e4m3"}
    linear = {"weight": fp8, "gradient": {**fp8, "granularity": "tensor"}, "backend": "fp8"}
    allowed = '"outer" with backend "fp8" and weight.granularity "channel"'
    check_parts(errors({"linear": linear}), f"{LINEAR}.gradient.granularity", '"tensor"', allowed, "simulated")
    assert load({"linear": {**linear, "weight": {**fp8, "granularity": "tensor"}}})
    assert load({"linear": {**linear, "backward_operands": "original"}})


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


# ---- reading


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_sources(tmp_path):
    config = {"train_batch_size": 4, "ds_quant": {"linear": W8}}
    path = write(tmp_path / "ds.json", json.dumps(config))
    encoded = base64.urlsafe_b64encode(json.dumps(config).encode()).decode()
    for source in (config, path, str(path), encoded):
        assert read_deepspeed_config(source) == config
        assert QuantConfig.load(source).linear.weight.bits == 8


def test_base64_is_url_safe():
    config = {"x": "??>>~~ÿÿ", "y": "~~~???"}
    encoded = base64.urlsafe_b64encode(json.dumps(config, ensure_ascii=False).encode()).decode()
    assert {"-", "_"} & set(encoded)
    assert read_deepspeed_config(encoded) == config


def test_a_dict_is_copied():
    config = {"zero_optimization": {"stage": 1}}
    read_deepspeed_config(config)["zero_optimization"]["stage"] = 2
    assert config == {"zero_optimization": {"stage": 1}}


def test_comments_as_in_deepspeed(tmp_path):
    text = '{\n  # a comment\n  "train_batch_size": 4, // another\n  /* and one more */ "steps_per_print": 10,\n}\n'
    assert read_deepspeed_config(write(tmp_path / "ds.json", text)) == {"train_batch_size": 4, "steps_per_print": 10}


def failure(source) -> str:
    with pytest.raises(ConfigError) as caught:
        read_deepspeed_config(source)
    assert "fix: " in str(caught.value)
    return str(caught.value)


def test_broken_files_are_named_with_the_fix(tmp_path):
    broken = write(tmp_path / "broken.json", '{\n  "train_batch_size": 4,\n  "optimizer": {"type": "AdamW"\n')
    message = failure(broken)
    assert f"{broken}: broken JSON at line " in message
    assert ", column " in message
    no_colon = write(tmp_path / "colon.json", '{\n  "a": 1,\n  "b" 2\n}\n')
    assert "broken JSON at line 3, column 7 (" in failure(no_colon)
    unclosed = write(tmp_path / "unclosed.json", '{\n  "a: 1\n}\n')
    assert "%r" not in failure(unclosed)
    for text in ("", " \n"):
        assert "got an empty file" in failure(write(tmp_path / "empty.json", text))
    assert 'list.json: got ["ds_quant"]; allowed: a JSON object' in failure(
        write(tmp_path / "list.json", '["ds_quant"]')
    )
    assert "cannot be read" in failure(tmp_path)
    binary = tmp_path / "binary.json"
    binary.write_bytes(b"\xff\xfe\x00\x80")
    assert "cannot be read as text" in failure(binary)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file(tmp_path):
    path = write(tmp_path / "secret.json", "{}")
    path.chmod(0)
    assert "cannot be read" in failure(path)


@pytest.mark.parametrize(
    "name", ["nothere.json", "configs/w8a8.json", "abcd", "ds_quant", "dsconfig", "e30", "aGVsbG8g"]
)
def test_a_missing_file_is_called_missing(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = failure(name)
    assert message.startswith(f"{name}: got no such file")
    assert str(tmp_path) in message
    assert failure(tmp_path / name).startswith(f"{tmp_path / name}: got no such file")


def test_broken_base64_text_says_where():
    encoded = base64.urlsafe_b64encode(b'{"a": [1, 2}').decode()
    assert "base64 config: broken JSON at line 1, column " in failure(encoded)


@pytest.mark.parametrize("source", [None, 3, ["a"]])
def test_other_sources_are_refused(source):
    assert "allowed: a path, a dict or base64" in failure(source)


def test_a_key_twice_is_an_error_at_any_depth(tmp_path):
    text = '{"ds_quant": {"linear": {"weight": {"bits": 8}, "weight": {"bits": 4}}}}'
    message = failure(write(tmp_path / "twice.json", text))
    assert "got weight twice" in message
    assert "twice.json" in message
    assert "got weight twice" in failure(base64.urlsafe_b64encode(text.encode()).decode())


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


def test_the_known_keys_are_those_that_deepspeed_reads():
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", READ_KEYS]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=True)
    (line,) = [line for line in run.stdout.splitlines() if line.startswith("KEYS ")]
    assert set(json.loads(line.removeprefix("KEYS "))) == TOP_LEVEL_KEYS


# ---- "auto"

AUTO = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"},
    },
    "zero_optimization": {"stage": 1, "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto"},
    "ds_quant": {"linear": W8},
}
VALUES = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 3,
    "gradient_clipping": 1.0,
    "bf16": True,
    "fp16": False,
    "lr": 1e-3,
    "betas": (0.9, 0.95),
    "weight_decay": 0.1,
    "warmup_num_steps": 10,
}


def test_resolve_auto_fills_derives_and_drops():
    before = copy.deepcopy(AUTO)
    resolved = resolve_auto(AUTO, world_size=2, **VALUES)
    assert resolved == {
        "train_batch_size": 24,
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 3,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": [0.9, 0.95], "weight_decay": 0.1}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-3, "warmup_num_steps": 10}},
        "zero_optimization": {"stage": 1},
        "ds_quant": {"linear": W8},
    }
    assert unresolved_auto(resolved) == []
    assert before == AUTO


def test_a_given_value_wins_over_derivation_and_default():
    given = {"eps": 1e-6, "warmup_max_lr": 2e-3, "warmup_min_lr": 1e-5, "reduce_bucket_size": 1000}
    resolved = resolve_auto(AUTO, **VALUES, **given)
    assert resolved["optimizer"]["params"]["eps"] == 1e-6
    assert resolved["scheduler"]["params"]["warmup_max_lr"] == 2e-3
    assert resolved["scheduler"]["params"]["warmup_min_lr"] == 1e-5
    assert resolved["zero_optimization"]["reduce_bucket_size"] == 1000
    assert resolved["train_batch_size"] == 12


def test_unresolved_auto_names_the_paths():
    resolved = resolve_auto(AUTO, lr=1e-3)
    assert unresolved_auto(resolved) == [
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "bf16.enabled",
        "optimizer.params.betas",
        "optimizer.params.weight_decay",
        "scheduler.params.warmup_num_steps",
    ]


def test_deepspeeds_own_auto_is_resolved():
    config = {
        "data_types": {"keep_in_fp32_modules": "auto"},
        "pipeline": {"stages": "auto"},
        "expert_parallel": {"top_k": "auto"},
        "zero_optimization": {"zenflow": {"select_strategy": "auto"}, "stage": "auto"},
        "ds_quant": {"linear": "auto"},
    }
    assert unresolved_auto(config) == ["zero_optimization.stage"]


def test_full_paths_and_ambiguous_names():
    config = {"fp16": {"enabled": "auto"}, "wandb": {"enabled": "auto"}, "train_batch_size": "auto"}
    resolved = resolve_auto(config, fp16__enabled=False, wandb__enabled=True, train_batch_size=3)
    assert resolved == {"fp16": {"enabled": False}, "wandb": {"enabled": True}, "train_batch_size": 3}
    with pytest.raises(ConfigError, match=r"name it in full: fp16__enabled or wandb__enabled"):
        resolve_auto(config, enabled=True)


def test_equal_values_pass_and_contradictions_do_not():
    config = {"gradient_clipping": 1.0, "optimizer": {"params": {"betas": [0.9, 0.95], "lr": 0.1}}}
    assert resolve_auto(config, gradient_clipping=1.0, betas=(0.9, 0.95)) == config
    with pytest.raises(ConfigError) as caught:
        resolve_auto(config, gradient_clipping=2.0, lr=0.2)
    first, second = str(caught.value).splitlines()
    check_parts(first, "gradient_clipping", "2.0", "1.0, as the config says", 'write "auto" there')
    check_parts(second, "optimizer.params.lr", "0.2", "0.1, as the config says", 'write "auto" there')


def test_a_value_without_a_key_is_an_error():
    with pytest.raises(ConfigError) as caught:
        resolve_auto(AUTO, weigth_decay=0.1)
    check_parts(str(caught.value), "weigth_decay", "0.1", "a key in the config", 'did you mean "weight_decay"?')
    with pytest.raises(ConfigError, match=r"^bf16: got true"):
        resolve_auto({"train_batch_size": 1}, bf16=True)
    assert resolve_auto({"train_batch_size": 1}, bf16=False) == {"train_batch_size": 1}
    # The section is not filled: "auto" means nothing there.
    with pytest.raises(ConfigError, match=r"^bits: got 8"):
        resolve_auto(AUTO, bits=8)


def test_batch_sizes_must_agree():
    with pytest.raises(ConfigError) as caught:
        resolve_auto(AUTO, world_size=2, train_batch_size=8, **VALUES)
    check_parts(str(caught.value), "train_batch_size", "8", "24 = 4 (micro batch) * 3", "world_size")
    assert resolve_auto(AUTO, world_size=2, train_batch_size=24, **VALUES)["train_batch_size"] == 24


def test_resolve_auto_reads_any_source(tmp_path):
    path = write(tmp_path / "ds.json", json.dumps(AUTO))
    assert resolve_auto(path, **VALUES) == resolve_auto(AUTO, **VALUES)


# ---- schema, round trip, imports


def test_the_schema_lists_every_key_with_its_meaning():
    schema = json_schema()
    models = {
        name: model
        for name, model in vars(config_module).items()
        if isinstance(model, type) and issubclass(model, Section) and "Config" in name
    }
    assert schema["$defs"].keys() | {"QuantConfig"} == models.keys()
    for name, model in models.items():
        node = schema if name == "QuantConfig" else schema["$defs"][name]
        assert node["additionalProperties"] is False
        assert node["properties"].keys() == model.model_fields.keys()
        for key, field in node["properties"].items():
            assert field.get("description"), f"{name}.{key}"
    assert (
        schema["$defs"]["WeightConfig"]["properties"]["bits"] | {"minimum": 2, "maximum": 8}
        == (schema["$defs"]["WeightConfig"]["properties"]["bits"])
    )


def optional(required, **keys):
    return st.fixed_dictionaries(required, optional=keys)


def operand(*granularities, **keys):
    return integers(*granularities, **keys) | optional({"format": st.sampled_from(list(FORMATS))}, **keys)


def integers(*granularities, **keys):
    plain = optional(
        {"bits": st.integers(2, 8)},
        granularity=st.sampled_from([g for g in granularities if g != "block"]),
        symmetric=st.booleans(),
        rounding=st.sampled_from(["nearest", "stochastic"]),
        **keys,
    )
    if "block" not in granularities:
        return plain
    sizes = st.sampled_from([16, 128, 4096])
    blocked = optional({"bits": st.integers(2, 8), "granularity": st.just("block")}, block_size=sizes)
    return plain | blocked


patterns = st.lists(st.sampled_from(["*", "lm_head", "model.layers.*"]), min_size=1)


def moments(*roundings):
    blocked = optional(
        {"bits": st.sampled_from([4, 8])},
        map=st.sampled_from(["power", "linear", "dynamic"]),
        block_size=st.sampled_from([32, 64, 4096]),
        rounding=st.sampled_from(roundings),
    )
    blocked |= optional({"bits": st.just(8)}, map=st.just("float"), block_size=st.sampled_from([32, 64, 4096]))
    return blocked | optional(
        {
            "bits": st.sampled_from([4, 8]),
            "map": st.just("linear"),
            "granularity": st.sampled_from(["tensor", "channel"]),
        },
        rounding=st.sampled_from(["nearest", "stochastic", None]),
    )


sections = optional(
    {
        "linear": optional(
            {"weight": operand("tensor", "channel", "block")},
            activation=operand("tensor", "token", "channel", "block"),
            gradient=operand(
                "tensor",
                "token",
                "channel",
                "outer",
                used_for=st.sampled_from([["weight"], ["input"], ["weight", "input"]]),
            ),
            backward_operands=st.sampled_from(["quantized", "original"]),
            include=patterns,
            exclude=patterns | st.just([]) | st.none(),
        )
    },
    enabled=st.just(True),
    optimizer=optional(
        {"exp_avg": moments("stochastic", None)},
        exp_avg_sq=moments("nearest", "stochastic", None),
        exclude=patterns | st.just([]),
    ),
    communication=st.fixed_dictionaries(
        {
            "gradient": optional(
                {"bits": st.sampled_from([4, 8])},
                block_size=st.sampled_from([32, 256]),
                error_feedback=st.booleans(),
                rotation=st.sampled_from(["none", "hadamard"]),
                hierarchical=st.booleans() | st.integers(2, 16),
            )
        }
    ),
)


@given(sections)
def test_what_is_dumped_loads_to_the_same(section):
    try:
        quant = load(section)
    except ConfigError as error:
        assume("cannot fold" not in str(error))  # the one rule that the strategy does not know
        raise
    for options in ({}, {"mode": "json"}, {"mode": "json", "exclude_unset": True}, {"exclude_defaults": True}):
        dumped = quant.model_dump(**options)
        assert load(dumped) == quant
        if options.get("mode") == "json":
            assert load(json.loads(json.dumps(dumped))) == quant


any_json = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 300) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["linear", "weight", "bits", "gradient", "exp_avg", "used_for"]), inner)
    ),
    max_leaves=12,
)


@given(any_json)
def test_any_json_is_accepted_or_refused_in_our_words(section):
    try:
        quant = load(section)
    except ConfigError as error:
        for line in str(error).splitlines():
            assert line.startswith("ds_quant")
            assert "; allowed: " in line
            assert "; fix: " in line
    else:
        assert isinstance(quant, QuantConfig)


def test_the_default_block_size_follows_the_bits():
    assert MomentConfig(bits=8).block_size == 256
    assert MomentConfig(bits=4).block_size == 128


def test_importing_the_config_imports_no_framework():
    code = (
        "import sys, ds_quant.config, ds_quant.config.refusals; "
        "print({'torch', 'deepspeed', 'transformers', 'accelerate'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout.strip() == "set()"


def test_the_documentation_has_every_key(root):
    """config-reference.md is what its script writes."""
    script = root / "docs" / "config_reference.py"
    names = runpy.run_path(str(script))
    page = (root / "docs" / "config-reference.md").read_text()
    assert page == names["page"](), "run python docs/config_reference.py"
    for definition in (json_schema(), *json_schema()["$defs"].values()):
        for key in definition["properties"]:
            assert f"| `{key}` |" in page, key
