"""One wrong value of `linear` or of the section itself a row: (section, where, got, allowed, fix)."""

import json

from config_files import LINEAR, W8

W8A8G8 = {"weight": {"bits": 8}, "activation": {"bits": 8}, "gradient": {"bits": 8}}
EDEN = {"bits": 4, "granularity": "block", "block_size": 16, "rounding": "ms_eden"}
DRAWN = {"signs": "drawn"}
WRONG_LINEAR_VALUES = [
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
    *(
        (
            {"linear": {"weight": {"bits": 4, "format": "nvfp4"} | {key: None}}},
            f"{LINEAR}.weight.{key}",
            "null",
            allowed,
            "w",
        )
        for key, allowed in (("bits", "an integer from 2 to 8"), ("format", '"fp8_e4m3", '))
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
        (
            {"linear": {**W8A8G8, "activation": {"bits": 4, "outlier_share": share}, **more}},
            f"{LINEAR}.activation.outlier_share",
            json.dumps(share),
            allowed,
            fix,
        )
        for share, more, allowed, fix in (
            (1, {}, "a number above 0 and below 1", "write"),
            (0.1, {"activation": {"bits": 8, "outlier_share": 0.1}}, "absent where all features have 8", "fewer bits"),
            (0.1, {"activation": {"format": "mxint8", "outlier_share": 0.1}}, "have 8 bits", "fewer bits"),
            (0.1, {}, '"outer" cannot fold two scales per token', "gradient.granularity"),
            (0.1, {"backend": "int8"}, 'absent with backend "int8"', 'backend "simulated"'),
            (0.1, {"rotation": {}}, "absent with a rotation for output, weight", 'used_for to ["input"]'),
        )
    ),
    *(
        ({"linear": {**W8A8G8, "weight": {"bits": 4, **weight}, **more}}, f"{LINEAR}.weight.{key}", got, allowed, fix)
        for key, got, weight, more, allowed, fix in (
            ("trust_distance", "0.5", {"trust_distance": 0.5}, {}, "above 0 and below 0.5", "write"),
            ("dampening", "0", {"dampening": 0}, {}, "a number above 0", "write"),
            (
                "dampening",
                "1.5",
                {"dampening": 1.5, "rounding": "stochastic"},
                {},
                "no code of their own",
                "one of the two",
            ),
            (
                "trust_distance",
                "0.3",
                {"trust_distance": 0.3, "rounding": "stochastic"},
                {},
                'absent with rounding "stochastic"',
                "one of the two",
            ),
            ("trust_distance", "0.3", {"trust_distance": 0.3}, {"rotation": {}}, "a rotated output", "leave"),
            ("dampening", "2.5", {"dampening": 2.5}, {"rotation": {}}, "a rotated output", "leave"),
            *(
                (f"oscillation_reset.{key}", got, {"oscillation_reset": reset}, {}, allowed, fix)
                for key, got, reset, allowed, fix in (
                    ("every", "1", {"every": 1}, "an integer, 2 or more", "write"),
                    ("watched_steps", "50", {"every": 50}, "fewer than every, 50", "lower it"),
                    ("ratio", "1", {"ratio": 1}, "a number above 1", "write"),
                    ("first_step", "-1", {"first_step": -1}, "0 or more", "write"),
                )
            ),
            (
                "oscillation_reset",
                '{"every": 90}',
                {"oscillation_reset": {"every": 90}, "rounding": "stochastic"},
                {},
                "no code of their own",
                "one of the two",
            ),
            ("oscillation_reset", "{}", {"oscillation_reset": {}}, {"rotation": {}}, "a rotated output", "leave"),
        )
    ),
    (
        {"linear": {"weight": {"format": "nvfp4", "trust_distance": 0.3}}},
        f"{LINEAR}.weight.trust_distance",
        "0.3",
        'absent with format "nvfp4", whose values are not evenly spaced',
        "mxint8 or nvint4",
    ),
    *(
        (
            {
                "linear": {**W8A8G8, "weight": {"bits": 4, key: 0.25}},
                "communication": {"weight": {"mode": "codes"}},
            },
            "ds_quant.communication.weight.mode",
            '"codes"',
            f"only with no linear.weight.{key}",
            "change that",
        )
        for key in ("trust_distance", "dampening")
    ),
    *(
        (
            {"linear": {"weight": {"bits": 4, "oscillation_reset": {}}}, **more},
            f"{LINEAR}.weight.oscillation_reset",
            "{}",
            f"absent with {problem}",
            f"remove it, or {problem}",
        )
        for more, problem in (
            ({"optimizer": {"exp_avg": {"bits": 8}, "master": {"bits": 16}}}, "optimizer.master"),
            ({"communication": {"weight": {"mode": "difference", "bits": 8}}}, "communication.weight"),
        )
    ),
    *(
        (
            {"linear": {**W8A8G8, "rotation": DRAWN, **linear, "gradient": {**EDEN, **gradient}}},
            f"{LINEAR}.gradient.{key}",
            got,
            allowed,
            fix,
        )
        for linear, gradient, key, got, allowed, fix in (
            ({"rotation": {}}, {}, "rounding", '"ms_eden"', 'with rotation.signs "drawn"', '"stochastic"'),
            ({"rotation": None}, {}, "rounding", '"ms_eden"', "a rotation for weight, input", '"stochastic"'),
            (
                {"rotation": {**DRAWN, "used_for": ["weight"]}},
                {},
                "rounding",
                '"ms_eden"',
                "a rotation for weight, input",
                '"stochastic"',
            ),
            ({}, {"block_size": 64}, "block_size", "64", "at most rotation.block_size, 16", "use that"),
            ({}, {"symmetric": False}, "symmetric", "false", 'true with rounding "ms_eden"', "remove it"),
            (
                {"forward_full_precision_from": 9},
                {},
                "rounding",
                '"ms_eden"',
                "with forward_full_precision_from",
                "one of them",
            ),
        )
    ),
    *(
        ({"linear": {**W8A8G8, "rotation": DRAWN, "gradient": gradient}}, f"{LINEAR}.gradient.{key}", got, allowed, fix)
        for gradient, key, got, allowed, fix in (
            ({"bits": 4, "rounding": "ms_eden"}, "granularity", '"outer"', '"block" with rounding', "use that"),
            (
                {"format": "mxfp4", "rounding": "ms_eden"},
                "format",
                '"mxfp4"',
                "powers of two are too coarse",
                "of them",
            ),
            (
                {"format": "nvfp4", "scale_rule": "four_six", "rounding": "ms_eden"},
                "scale_rule",
                '"four_six"',
                "absent with rounding",
                "one of the two",
            ),
        )
    ),
    (
        {"linear": {"weight": {"bits": 4, "rounding": "ms_eden"}}},
        f"{LINEAR}.weight.rounding",
        '"ms_eden"',
        '"nearest", "stochastic"',
        "write",
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
        ({"linear": {**linear, "forward_full_precision_from": step}}, f"{LINEAR}.{key}", got, allowed, fix)
        for linear, step, key, got, allowed, fix in (
            (W8A8G8, 0.9, "forward_full_precision_from", "0.9", "the share times all steps", "write"),
            (W8A8G8, 0, "forward_full_precision_from", "0", "an integer, 1 or more", "write"),
            (
                {"gradient": {"bits": 8}},
                9,
                "forward_full_precision_from",
                "9",
                "absent without weight and",
                "remove it",
            ),
            (
                {**W8A8G8, **{key: {"bits": 8, "split_mean": True} for key in ("activation", "gradient")}},
                9,
                "gradient.split_mean",
                "true",
                "false with forward_full_precision_from",
                'used_for to ["input"]',
            ),
        )
    ),
    (
        {
            "linear": {**W8A8G8, "forward_full_precision_from": 9},
            "communication": {"weight": {"mode": "codes"}},
        },
        "ds_quant.communication.weight.mode",
        '"codes"',
        "only with no linear.forward_full_precision_from",
        "change that",
    ),
    *(
        (
            {"linear": {**linear, "gradient": {"bits": 4, "split_qkv": ["*.c_attn"], **gradient}}},
            f"{LINEAR}.gradient.split_qkv",
            got,
            allowed,
            fix,
        )
        for linear, gradient, got, allowed, fix in (
            ({}, {}, '["*.c_attn"]', 'absent with granularity "outer"', 'granularity "token" or "tensor"'),
            ({}, {"granularity": "block"}, '["*.c_attn"]', 'absent with granularity "block"', "remove it"),
            (
                {"backend": "int8"},
                {"granularity": "tensor"},
                '["*.c_attn"]',
                'absent with backend "int8"',
                'backend "simulated"',
            ),
            (
                {"rotation": {"used_for": ["input"]}},
                {"granularity": "token"},
                '["*.c_attn"]',
                "absent with a rotation for input",
                "remove one of the two",
            ),
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
                {"rotation": {"used_for": ["input", "weight"]}, "gradient": None, "backward_operands": "original"},
                "rotation.used_for",
                '["input", "weight"]',
                "products with an operand that is quantized (output)",
                "take out the others",
            ),
            (
                {"activation": None, "gradient": None},
                "rotation.used_for",
                "null",
                "that quantize one operand alone, a list of some of them: output, input",
                "write it",
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
]
