"""One wrong value of `optimizer` or `communication` a row: (section, where, got, allowed, fix)."""

import json

ON_WIRE = "ds_quant.communication.weight"
NODE = "false, true for the ranks that the launcher has put on a node, or their number, 2 or more"
W8_LINEAR = {"linear": {"weight": {"bits": 8}, "activation": {"bits": 8}}}
CODES = {"weight": {"mode": "codes"}}
WRONG_STATE_AND_WIRE_VALUES = [
    *(
        ({"optimizer": {"exp_avg": {"bits": bits}}}, "ds_quant.optimizer.exp_avg.bits", json.dumps(bits), "4 or 8", "w")
        for bits in (2, 16, 8.0, "8", True)
    ),
    (
        {"optimizer": {"exp_avg": {"bits": 8, "map": "lineer"}}},
        "ds_quant.optimizer.exp_avg.map",
        '"lineer"',
        '"float", "power", "linear", "dynamic", "log"',
        'did you mean "linear"?',
    ),
    (
        {"optimizer": {"exp_avg_sq": {"bits": 4, "map": "float"}}},
        "ds_quant.optimizer.exp_avg_sq.map",
        '"float"',
        '"power", "linear", "dynamic", "log" with 4 bits',
        "remove it",
    ),
    (
        {"optimizer": {"exp_avg": {"bits": 4, "map": "log"}}},
        "ds_quant.optimizer.exp_avg.map",
        '"log"',
        "its codes have no sign",
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
    *(
        ({"communication": {"gradient": gradient}}, f"ds_quant.communication.gradient.{key}", got, allowed, fix)
        for gradient, key, got, allowed, fix in [
            ({}, "bits", "nothing", '4 or 8, or "format"', "add it"),
            ({"bits": 4, "format": "nvfp4"}, "format", '"nvfp4"', 'absent beside "bits"', "remove one"),
            ({"bits": None, "format": "nvfp4"}, "bits", "null", "4 or 8", "write"),
            ({"bits": 4, "format": None}, "format", "null", '"fp4_e2m1", "mxfp4"', "write"),
            ({"format": "mxfp8"}, "format", '"mxfp8"', '"nvint4": those of 8 bits lose more', '"mxfp4"'),
            ({"format": "fp6_e2m3"}, "format", '"fp6_e2m3"', "no codes of 6 bits", "fp4_e2m1"),
            ({"format": "nvfp4", "block_size": 32}, "block_size", "32", 'absent with format "nvfp4"', "remove it"),
            ({"format": "nvint4", "scale_rule": "four_six"}, "scale_rule", '"four_six"', 'with "nvfp4"', "remove it"),
            (
                {"format": "nvfp4", "scale_rule": "floor"},
                "scale_rule",
                '"floor"',
                '"four_six" with "nvfp4"',
                "remove it",
            ),
            ({"format": "nvfp4", "scale_rule": "up"}, "scale_rule", '"up"', '"floor" or "up" with', "remove it"),
            ({"bits": 4, "scale_rule": "up"}, "scale_rule", '"up"', 'with format "mxfp4"', "remove it"),
        ]
    ),
    (
        {"optimizer": {"exp_avg": {"bits": 8, "format": "mxfp8"}}},
        "ds_quant.optimizer.exp_avg.format",
        '"mxfp8"',
        "second moments explode",
        '"float" loses what',
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
    (
        {"communication": {"weight": {"mode": "difference", "format": "nvfp4"}}},
        f"{ON_WIRE}.format",
        '"nvfp4"',
        "cross the wire as integers",
        "use bits",
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
]
