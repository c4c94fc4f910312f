"""Everything in few bits at once: what is lost together, its repairs, and what is sent between ranks.

A row stays here when it does not help: its figures are part of the answer.
"""

from __future__ import annotations

import json

from sweeping.paper import FOLDER

from studying.sections import BOTH, FOUR_SIX, LOG, MXFP4, Repair, Values, block, full_at_end, gradient, linear, rotated


def _all4(weight: Values, activation: Values, gradient: Values | None = None) -> Values:
    if gradient is None:
        return linear(backward="quantized", weight=weight, activation=activation)
    return linear(backward="quantized", weight=weight, activation=activation, gradient=gradient)


def _in_one_format(fmt: str) -> tuple[Values, Values, Values]:
    """Weights, activations and gradients in one format, G stochastic."""
    return {"format": fmt}, {"format": fmt}, {"format": fmt, "rounding": "stochastic", "used_for": list(BOTH)}


_CHANNEL: Values = {"bits": 4, "granularity": "channel"}
_TOKEN: Values = {"bits": 4, "granularity": "token"}
_OUTER = gradient(4, "outer", *BOTH)
# `outer` folds no scales of blocks.
_STOCHASTIC = gradient(4, "token", *BOTH)
_BLOCKS = (block(4, 32), block(4, 32))
_BLOCK_GRADIENT = block(4, 32, rounding="stochastic", used_for=list(BOTH))

_EDEN = {**_BLOCK_GRADIENT, "rounding": "ms_eden"}
_NVFP4, _NVINT4 = _in_one_format("nvfp4"), _in_one_format("nvint4")

COMBINED = {
    "w8a8g8_stochastic": Repair(
        "combined",
        "w8a8g8",
        "G per token, stochastic",
        linear(
            weight={"bits": 8, "granularity": "channel"},
            activation={"bits": 8, "granularity": "token"},
            gradient=gradient(8, "token", "weight"),
        ),
    ),
    "w4a4g4_naive": Repair(
        "combined",
        "",
        "W4A4G4: per channel, token, token, nearest, all products: what the repairs below are held against",
        _all4(_CHANNEL, _TOKEN, gradient(4, "token", *BOTH, rounding="nearest")),
    ),
    "w4a4_block32": Repair("combined", "w4a4g4_naive", "forward only: W4A4 in blocks of 32", _all4(*_BLOCKS)),
    "w4a4g4_outer": Repair("combined", "w4a4g4_naive", "G outer, stochastic", _all4(_CHANNEL, _TOKEN, dict(_OUTER))),
    "w4a4g4_block32": Repair(
        "combined",
        "w4a4g4_naive",
        "W, A in blocks of 32, G per token, stochastic",
        _all4(*_BLOCKS, dict(_STOCHASTIC)),
    ),
    "w4a4g4_block32_m4v8": Repair(
        "combined",
        "w4a4g4_naive",
        "the same with m in 4 and v in 8 bits",
        {**_all4(*_BLOCKS, dict(_STOCHASTIC)), "optimizer": {"exp_avg": {"bits": 4}, "exp_avg_sq": {"bits": 8}}},
    ),
    "w4a4g4_block32_m4v4": Repair(
        "combined",
        "w4a4g4_naive",
        "the same with m and v in 4 bits, v in logarithms",
        {**_all4(*_BLOCKS, dict(_STOCHASTIC)), "optimizer": {"exp_avg": {"bits": 4}, "exp_avg_sq": dict(LOG)}},
    ),
    "w4a4g4_block32_no_head_m4v8": Repair(
        "combined",
        "w4a4g4_naive",
        "W, A in blocks of 32, m in 4, v in 8 bits, output layer in full precision: recommended until 2026-11-30",
        {
            "linear": {
                "weight": block(4, 32),
                "activation": block(4, 32),
                "gradient": dict(_STOCHASTIC),
                "backend": "simulated",
                "backward_operands": "quantized",
            },
            "optimizer": {
                "exp_avg": {"bits": 4, "map": "power", "block_size": 128},
                "exp_avg_sq": {"bits": 8, "map": "float", "block_size": 256},
            },
        },
    ),
    "w4a4g4_block32_g": Repair(
        "combined", "w4a4g4_naive", "W, A, G in blocks of 32, G stochastic", _all4(*_BLOCKS, dict(_BLOCK_GRADIENT))
    ),
    "w4a4g4_block32_hadamard": Repair(
        "combined",
        "w4a4g4_naive",
        "the same, all products rotated by Hadamard matrices of 32",
        rotated(_all4(*_BLOCKS, dict(_BLOCK_GRADIENT)), 32),
    ),
    "w4a4g4_block32_hadamard_weight": Repair(
        "combined",
        "w4a4g4_naive",
        "the same, dW alone rotated",
        rotated(_all4(*_BLOCKS, dict(_BLOCK_GRADIENT)), 32, "weight"),
    ),
    "w4a4g4_block32_hadamard_backward": Repair(
        "combined",
        "w4a4g4_naive",
        "the same, dX and dW rotated by matrices of 128 with drawn signs",
        rotated(_all4(*_BLOCKS, dict(_BLOCK_GRADIENT)), 128, "input", "weight", signs="drawn"),
    ),
    "w4a4g4_block32_ms_eden": Repair(
        "combined",
        "w4a4g4_naive",
        "the same, G by MS-EDEN in place of stochastic rounding",
        rotated(_all4(*_BLOCKS, dict(_EDEN)), 128, "input", "weight", signs="drawn"),
    ),
    "w4a4g4_block32_split_mean": Repair(
        "combined",
        "w4a4g4_naive",
        "blocks of 32 as above, A and G without the mean of the tokens",
        _all4(
            block(4, 32),
            {**block(4, 32), "split_mean": True},
            {**_BLOCK_GRADIENT, "split_mean": True},
        ),
    ),
    "w4a4g4_nvint4": Repair(
        "combined",
        "w4a4g4_naive",
        "NVINT4, G stochastic",
        _all4(*_NVINT4),
    ),
    "w4a4g4_nvint4_ms_eden": Repair(
        "combined",
        "w4a4g4_naive",
        "NVINT4, G by MS-EDEN, all products rotated by matrices of 128 with drawn signs",
        rotated(_all4(*_NVINT4[:2], {**_NVINT4[2], "rounding": "ms_eden"}), 128, signs="drawn"),
    ),
    "w4a4g4_nvfp4": Repair(
        "combined",
        "w4a4g4_naive",
        "NVFP4, G stochastic",
        _all4(*_NVFP4),
    ),
    "w4a4g4_nvfp4_full_at_end": Repair(
        "combined",
        "w4a4g4_naive",
        "NVFP4, G stochastic, W and A in full precision in the last fifth of the steps",
        full_at_end(_all4(*_NVFP4)),
    ),
    "w4a4g4_nvfp4_tiles": Repair(
        "combined",
        "w4a4g4_naive",
        "NVFP4, G stochastic, W in tiles of 16 x 16, dW rotated by matrices of 16 with drawn signs (arXiv 2509.25149)",
        rotated(_all4({"format": "nvfp4", "block_rows": 16}, *_NVFP4[1:]), 16, "weight", signs="drawn"),
    ),
    "w4a4g4_nvfp4_hadamard": Repair(
        "combined",
        "w4a4g4_naive",
        "NVFP4, G stochastic, all products rotated by matrices of 16",
        rotated(_all4(*_NVFP4), 16),
    ),
    "w4a4g4_nvfp4_four_six": Repair(
        "combined",
        "w4a4g4_naive",
        "NVFP4, W and A with 4/6 scales, G stochastic",
        _all4(FOUR_SIX, FOUR_SIX, _NVFP4[2]),
    ),
    "w4a4g4_mxfp4": Repair(
        "combined",
        "w4a4g4_naive",
        "MXFP4, scales rounded up, G stochastic",
        _all4(dict(MXFP4), dict(MXFP4), {**MXFP4, "rounding": "stochastic", "used_for": list(BOTH)}),
    ),
}


# As the recommended 4 bits have it; codes of weights would be exact, but a tied output layer has none.
_WIRE4: Values = {
    "gradient": {"bits": 4, "block_size": 128, "error_feedback": True},
    "weight": {"mode": "difference", "bits": 4},
}
_WIRE8: Values = {"gradient": {"bits": 8}, "weight": {"mode": "difference", "bits": 8}}
_MOMENTS4: Values = {"exp_avg": {"bits": 4}, "exp_avg_sq": dict(LOG)}

WIRE = {
    "wire8": Repair(
        "wire", "", "gradients and weights sent in 8 bits, nothing else", {"communication": _WIRE8}, ranks=2
    ),
    "wire4": Repair(
        "wire", "", "gradients and weights sent in 4 bits, nothing else", {"communication": _WIRE4}, ranks=2
    ),
}


def _with_states_and_wire(name: str, what: str) -> dict[str, Repair]:
    """Two rows of an attempt at W4A4G4: with m and v in 4 bits, and with everything that is sent in 4 bits, too."""
    section = {**COMBINED[name].section, "optimizer": _MOMENTS4}
    states = f"{what}, m and v in 4 bits, v in logarithms"
    wired = {**section, "communication": _WIRE4}
    return {
        f"{name}_m4v4": Repair("combined", "w4a4g4_naive", states, section),
        f"{name}_m4v4_wire4": Repair(
            "combined", "w4a4g4_naive", f"{states}, gradients and weights sent in 4 bits", wired, ranks=2
        ),
    }


EVERYTHING = {
    **_with_states_and_wire(
        "w4a4g4_block32_hadamard_backward",
        "W, A, G in blocks of 32, dX and dW rotated by matrices of 128 with drawn signs",
    ),
    **_with_states_and_wire("w4a4g4_nvfp4", "NVFP4, G stochastic"),
    **_with_states_and_wire("w4a4g4_mxfp4", "MXFP4, scales rounded up, G stochastic"),
}
"""W4A4G4 with 4-bit moments and a 4-bit wire in both directions."""


def _shipped(name: str) -> Values:
    return dict(json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))["ds_quant"])


def _without_communication(section: Values) -> Values:
    return {part: values for part, values in section.items() if part != "communication"}


_RECOMMENDED = {"recommended_8bit": "w8a8g8", "recommended_4bit_states": "w8a8g8", "recommended_4bit": "w4a4g4_naive"}
RECIPES = {
    name: Repair("recipe", of, "as it is shipped, without communication", _without_communication(_shipped(name)))
    for name, of in _RECOMMENDED.items()
} | {
    f"{name}_two_ranks": Repair("recipe", of, "as it is shipped, on two ranks", _shipped(name), ranks=2)
    for name, of in _RECOMMENDED.items()
}
"""The configs that docs/recipes.md recommends, as a whole."""

ALL: dict[str, Repair] = {
    **WIRE,
    **COMBINED,
    **EVERYTHING,
    **RECIPES,
}
