"""The section of the JSON: which settings of linear layers go together."""

import json

import pytest
from config_files import LINEAR, check_parts, errors, load


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
