"""The section of the JSON: one wrong value, and a message that names the fix."""

import pytest
from config_files import LINEAR, W8, check_parts, errors
from wrong_linear_values import WRONG_LINEAR_VALUES
from wrong_state_and_wire_values import WRONG_STATE_AND_WIRE_VALUES

from ds_quant.base.number_formats import FORMATS

WRONG_VALUES = [
    *WRONG_LINEAR_VALUES,
    *WRONG_STATE_AND_WIRE_VALUES,
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
