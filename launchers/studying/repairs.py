"""Repairs of the paper's failing rows at the same number of bits, as sections of the JSON.

A row stays here when it does not help: its figures are part of the answer.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sweeping.paper import FOLDER

Values = dict[str, Any]


@dataclass(frozen=True)
class Repair:
    """One attempt."""

    component: str
    of: str
    """The row that it repairs; empty for a combination that the paper did not run."""
    what: str
    section: Values
    families: tuple[str, ...] = ()
    """Those whose models have what it acts on; empty: all."""


def filled_in(config: str, *, layers: int, steps: int) -> str:
    """A row's JSON with what depends on the run: the number of the last block, and of the step after four fifths."""
    return config.replace(_LAST_BLOCK, str(layers - 1)).replace(f'"{_FOUR_FIFTHS}"', str(steps * 4 // 5))


def _linear(*, backward: str = "original", exclude: list[str] | None = None, **operands: Values) -> Values:
    """As the paper's rows, all layers and original operands in the backward pass, unless it says otherwise."""
    linear: Values = {**operands, "backend": "simulated", "backward_operands": backward, "exclude": exclude or []}
    return {"linear": linear}


def _gradient(bits: int, granularity: str, *used_for: str, rounding: str = "stochastic") -> Values:
    return {"bits": bits, "granularity": granularity, "rounding": rounding, "used_for": list(used_for)}


def _block(bits: int, size: int, **more: Any) -> Values:
    return {"bits": bits, "granularity": "block", "block_size": size, **more}


def _rotated(section: Values, size: int, *used_for: str, **more: Any) -> Values:
    rotation: Values = {"block_size": size, **({"used_for": list(used_for)} if used_for else {}), **more}
    return {"linear": {**section["linear"], "rotation": rotation}}


def _hadamard(component: str, granularity: str, section: Callable[[Values], Values]) -> dict[str, Repair]:
    """One operand of the forward in 4 bits, with both rotated before; `section` of its values."""
    letter = component.lower()
    of = f"{letter}4_{granularity}"
    whole, blocks = section({"bits": 4, "granularity": granularity}), section(_block(4, 32))
    return {
        f"{of}_hadamard": Repair(
            component, of, f"per {granularity}, Y rotated by matrices of 128", _rotated(whole, 128, "output")
        ),
        f"{letter}4_block32_hadamard": Repair(
            component, of, "blocks of 32, Y rotated by matrices of 32", _rotated(blocks, 32, "output")
        ),
    }


def _full_at_end(of: Values) -> Values:
    return {"linear": {**of["linear"], "forward_full_precision_from": _FOUR_FIFTHS}}


def _quantized_backward(component: str, granularity: str, operand: str) -> Repair:
    """One operand of the forward in 4 bits, and the same codes in the backward product that reads it."""
    operands: Values = {operand: {"bits": 4, "granularity": granularity}}
    of = f"{component.lower()}4_{granularity}"
    what = f"per {granularity}, the same codes in the backward pass"
    return Repair(component, of, what, _linear(backward="quantized", **operands))


_HEADS = ["lm_head"]
_LAST_BLOCK = "@LAST@"
_FOUR_FIFTHS = "@FOUR_FIFTHS@"
# Of both families: model.layers.N and transformer.h.N.
_LAST = ["lm_head", f"*.{_LAST_BLOCK}.*"]
_BOTH = ("weight", "input")
_FOUR_SIX: Values = {"format": "nvfp4", "scale_rule": "four_six"}
_MX: Values = {"format": "mxfp4", "scale_rule": "up"}
_RESET = {"every": 32, "watched_steps": 16, "ratio": 8, "first_step": 104}
"""The first step is as late as the authors' in 162 steps."""
_BLOCK_GRADIENT_WEIGHT = _block(4, 32, rounding="stochastic", used_for=["weight"])

WEIGHT = {
    "w4_block32": Repair("W", "w4_channel", "blocks of 32", _linear(weight=_block(4, 32))),
    "w4_block16": Repair("W", "w4_channel", "blocks of 16", _linear(weight=_block(4, 16))),
    "w4_block32_asymmetric": Repair(
        "W", "w4_channel", "blocks of 32, asymmetric", _linear(weight=_block(4, 32, symmetric=False))
    ),
    "w4_channel_no_head": Repair(
        "W",
        "w4_channel",
        "per channel, output layer in full precision",
        _linear(weight={"bits": 4, "granularity": "channel"}, exclude=_HEADS),
    ),
    "w4_block32_no_head": Repair(
        "W", "w4_channel", "blocks of 32, output layer in full precision", _linear(weight=_block(4, 32), exclude=_HEADS)
    ),
    "w4_nvfp4": Repair("W", "w4_channel", "NVFP4", _linear(weight={"format": "nvfp4"})),
    "w4_nvfp4_four_six": Repair("W", "w4_channel", "NVFP4, 4/6 scales", _linear(weight=_FOUR_SIX)),
    "w4_nvint4": Repair("W", "w4_channel", "NVINT4", _linear(weight={"format": "nvint4"})),
    "w4_channel_trust": Repair(
        "W",
        "w4_channel",
        "per channel, no gradient farther than 0.4 steps from the code",
        _linear(weight={"bits": 4, "granularity": "channel", "trust_distance": 0.4}),
    ),
    "w4_channel_dampened": Repair(
        "W",
        "w4_channel",
        "per channel, dampened by 0.01",
        _linear(weight={"bits": 4, "granularity": "channel", "dampening": 0.01}),
    ),
    "w4_channel_reset": Repair(
        "W",
        "w4_channel",
        "per channel, weights that swing 8 times as far in 16 steps reset every 32 steps from step 104 on",
        _linear(weight={"bits": 4, "granularity": "channel", "oscillation_reset": _RESET}),
    ),
    **_hadamard("W", "channel", lambda values: _linear(weight=values)),
    "w4_channel_quantized_backward": _quantized_backward("W", "channel", "weight"),
    "w4_mxfp4": Repair("W", "w4_channel", "MXFP4, scales rounded up", _linear(weight=dict(_MX))),
}

ACTIVATION = {
    "a4_block32": Repair("A", "a4_token", "blocks of 32", _linear(activation=_block(4, 32))),
    "a4_block16": Repair("A", "a4_token", "blocks of 16", _linear(activation=_block(4, 16))),
    "a4_block32_asymmetric": Repair(
        "A", "a4_token", "blocks of 32, asymmetric", _linear(activation=_block(4, 32, symmetric=False))
    ),
    "a4_token_no_head": Repair(
        "A",
        "a4_token",
        "per token, output layer in full precision",
        _linear(activation={"bits": 4, "granularity": "token"}, exclude=_HEADS),
    ),
    "a4_block32_no_last": Repair(
        "A",
        "a4_token",
        "blocks of 32, output layer and last block in full precision",
        _linear(activation=_block(4, 32), exclude=_LAST),
    ),
    "a4_token_outliers": Repair(
        "A",
        "a4_token",
        "per token, a tenth of the channels in 8 bits",
        _linear(activation={"bits": 4, "granularity": "token", "outlier_share": 0.1}),
    ),
    "a4_token_split_mean": Repair(
        "A",
        "a4_token",
        "per token, without the mean of the tokens",
        _linear(activation={"bits": 4, "granularity": "token", "split_mean": True}),
    ),
    **_hadamard("A", "token", lambda values: _linear(activation=values)),
    "a4_token_quantized_backward": _quantized_backward("A", "token", "activation"),
    "a4_token_full_at_end": Repair(
        "A",
        "a4_token",
        "per token, in full precision in the last fifth of the steps",
        _full_at_end(_linear(activation={"bits": 4, "granularity": "token"})),
    ),
    "a4_nvfp4": Repair("A", "a4_token", "NVFP4", _linear(activation={"format": "nvfp4"})),
    "a4_nvfp4_four_six": Repair("A", "a4_token", "NVFP4, 4/6 scales", _linear(activation=_FOUR_SIX)),
    "a4_nvint4": Repair("A", "a4_token", "NVINT4", _linear(activation={"format": "nvint4"})),
    "a4_mxfp4": Repair("A", "a4_token", "MXFP4, scales rounded up", _linear(activation=dict(_MX))),
}

GRADIENT = {
    f"g{bits}_{name}": Repair("G", f"g{bits}_token", what, _linear(gradient=values))
    for bits in (8, 4)
    for name, what, values in (
        ("token_stochastic", "per token, stochastic", _gradient(bits, "token", "weight")),
        ("outer_nearest", "outer, nearest", _gradient(bits, "outer", "weight", rounding="nearest")),
        ("outer", "outer, stochastic", _gradient(bits, "outer", "weight")),
        ("outer_both", "outer, stochastic, for dX and dW", _gradient(bits, "outer", *_BOTH)),
        ("outer_input", "outer, stochastic, for dX only", _gradient(bits, "outer", "input")),
    )
} | {
    # The gradient of a token's logits has one element near -1 and small ones beside it, which one scale a token loses.
    "g8_token_no_head": Repair(
        "G",
        "g8_token",
        "per token, nearest, output layer in full precision",
        _linear(gradient=_gradient(8, "token", "weight", rounding="nearest"), exclude=_HEADS),
    ),
    "g4_token_no_head": Repair(
        "G",
        "g4_token",
        "per token, nearest, output layer in full precision",
        _linear(gradient=_gradient(4, "token", "weight", rounding="nearest"), exclude=_HEADS),
    ),
    "g4_outer_no_head": Repair(
        "G",
        "g4_token",
        "outer, stochastic, output layer in full precision",
        _linear(gradient=_gradient(4, "outer", "weight"), exclude=_HEADS),
    ),
    "g4_block32": Repair("G", "g4_token", "blocks of 32, stochastic", _linear(gradient=_BLOCK_GRADIENT_WEIGHT)),
    "g4_block32_hadamard": Repair(
        "G",
        "g4_token",
        "blocks of 32, stochastic, dW rotated by matrices of 128 with drawn signs",
        _rotated(_linear(gradient=_BLOCK_GRADIENT_WEIGHT), 128, "weight", signs="drawn"),
    ),
    "g4_block32_ms_eden": Repair(
        "G",
        "g4_token",
        "blocks of 32, MS-EDEN, dW rotated as above",
        _rotated(_linear(gradient={**_BLOCK_GRADIENT_WEIGHT, "rounding": "ms_eden"}), 128, "weight", signs="drawn"),
    ),
    "g4_block32_both": Repair(
        "G",
        "g4_token",
        "blocks of 32, stochastic, for dX and dW",
        _linear(gradient=_block(4, 32, rounding="stochastic", used_for=list(_BOTH))),
    ),
    "g4_token_both": Repair(
        "G",
        "g4_token",
        "per token, nearest, for dX and dW: not a repair, the naive row of both products",
        _linear(gradient=_gradient(4, "token", *_BOTH, rounding="nearest")),
    ),
    "g4_nvfp4_both": Repair(
        "G",
        "g4_token",
        "NVFP4, stochastic, for dX and dW",
        _linear(gradient={"format": "nvfp4", "rounding": "stochastic", "used_for": list(_BOTH)}),
    ),
    "g4_mxfp4_both": Repair(
        "G",
        "g4_token",
        "MXFP4, scales rounded up, stochastic, for dX and dW",
        _linear(gradient={**_MX, "rounding": "stochastic", "used_for": list(_BOTH)}),
    ),
}

# Of the paper's own way with GPT-2, in some of its runs.
GRADIENT |= {
    f"g{bits}_token_qkv": Repair(
        "G",
        f"g{bits}_token",
        "per token, nearest, queries, keys and values apart",
        _linear(gradient={**_gradient(bits, "token", "weight", rounding="nearest"), "split_qkv": ["*.c_attn"]}),
        families=("gpt2",),
    )
    for bits in (8, 4)
}

_LOG: Values = {"bits": 4, "map": "log"}
MOMENTS = {
    "m4_block": Repair("m", "m4_tensor", "signed squares in blocks of 128", {"optimizer": {"exp_avg": {"bits": 4}}}),
    "m8_block": Repair("m", "m8_tensor", "float codes in blocks of 256", {"optimizer": {"exp_avg": {"bits": 8}}}),
    "v8_block": Repair("v", "v8_tensor", "float codes in blocks of 256", {"optimizer": {"exp_avg_sq": {"bits": 8}}}),
    "v4_block": Repair(
        "v", "v8_tensor", "eighth powers in blocks of 128, at 4 bits", {"optimizer": {"exp_avg_sq": {"bits": 4}}}
    ),
    "m4v4_block": Repair(
        "v",
        "v8_tensor",
        "both moments at 4 bits, as above",
        {"optimizer": {"exp_avg": {"bits": 4}, "exp_avg_sq": {"bits": 4}}},
    ),
    "v4_log": Repair(
        "v",
        "v8_tensor",
        "logarithms in blocks of 128, two scales, at 4 bits",
        {"optimizer": {"exp_avg_sq": dict(_LOG)}},
    ),
    "m4v4_log": Repair(
        "v",
        "v8_tensor",
        "both moments at 4 bits, v as above",
        {"optimizer": {"exp_avg": {"bits": 4}, "exp_avg_sq": dict(_LOG)}},
    ),
}


def _all4(weight: Values, activation: Values, gradient: Values | None = None) -> Values:
    if gradient is None:
        return _linear(backward="quantized", weight=weight, activation=activation)
    return _linear(backward="quantized", weight=weight, activation=activation, gradient=gradient)


def _in_one_format(fmt: str) -> tuple[Values, Values, Values]:
    """Weights, activations and gradients in one format, G stochastic."""
    return {"format": fmt}, {"format": fmt}, {"format": fmt, "rounding": "stochastic", "used_for": list(_BOTH)}


_CHANNEL: Values = {"bits": 4, "granularity": "channel"}
_TOKEN: Values = {"bits": 4, "granularity": "token"}
_OUTER = _gradient(4, "outer", *_BOTH)
# `outer` folds no scales of blocks.
_STOCHASTIC = _gradient(4, "token", *_BOTH)
_BLOCKS = (_block(4, 32), _block(4, 32))
_BLOCK_GRADIENT = _block(4, 32, rounding="stochastic", used_for=list(_BOTH))

_EDEN = {**_BLOCK_GRADIENT, "rounding": "ms_eden"}
_NVFP4, _NVINT4 = _in_one_format("nvfp4"), _in_one_format("nvint4")

COMBINED = {
    "w8a8g8_stochastic": Repair(
        "combined",
        "w8a8g8",
        "G per token, stochastic",
        _linear(
            weight={"bits": 8, "granularity": "channel"},
            activation={"bits": 8, "granularity": "token"},
            gradient=_gradient(8, "token", "weight"),
        ),
    ),
    "w4a4g4_naive": Repair(
        "combined",
        "",
        "W4A4G4: per channel, token, token, nearest, all products: what the repairs below are held against",
        _all4(_CHANNEL, _TOKEN, _gradient(4, "token", *_BOTH, rounding="nearest")),
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
        {**_all4(*_BLOCKS, dict(_STOCHASTIC)), "optimizer": {"exp_avg": {"bits": 4}, "exp_avg_sq": dict(_LOG)}},
    ),
    "w4a4g4_block32_no_head_m4v8": Repair(
        "combined",
        "w4a4g4_naive",
        "W, A in blocks of 32, m in 4, v in 8 bits, output layer in full precision: recommended until 2026-11-30",
        {
            "linear": {
                "weight": _block(4, 32),
                "activation": _block(4, 32),
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
        _rotated(_all4(*_BLOCKS, dict(_BLOCK_GRADIENT)), 32),
    ),
    "w4a4g4_block32_hadamard_weight": Repair(
        "combined",
        "w4a4g4_naive",
        "the same, dW alone rotated",
        _rotated(_all4(*_BLOCKS, dict(_BLOCK_GRADIENT)), 32, "weight"),
    ),
    "w4a4g4_block32_hadamard_backward": Repair(
        "combined",
        "w4a4g4_naive",
        "the same, dX and dW rotated by matrices of 128 with drawn signs",
        _rotated(_all4(*_BLOCKS, dict(_BLOCK_GRADIENT)), 128, "input", "weight", signs="drawn"),
    ),
    "w4a4g4_block32_ms_eden": Repair(
        "combined",
        "w4a4g4_naive",
        "the same, G by MS-EDEN in place of stochastic rounding",
        _rotated(_all4(*_BLOCKS, dict(_EDEN)), 128, "input", "weight", signs="drawn"),
    ),
    "w4a4g4_block32_split_mean": Repair(
        "combined",
        "w4a4g4_naive",
        "blocks of 32 as above, A and G without the mean of the tokens",
        _all4(
            _block(4, 32),
            {**_block(4, 32), "split_mean": True},
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
        _rotated(_all4(*_NVINT4[:2], {**_NVINT4[2], "rounding": "ms_eden"}), 128, signs="drawn"),
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
        _full_at_end(_all4(*_NVFP4)),
    ),
    "w4a4g4_nvfp4_tiles": Repair(
        "combined",
        "w4a4g4_naive",
        "NVFP4, G stochastic, W in tiles of 16 x 16, dW rotated by matrices of 16 with drawn signs (arXiv 2509.25149)",
        _rotated(_all4({"format": "nvfp4", "block_rows": 16}, *_NVFP4[1:]), 16, "weight", signs="drawn"),
    ),
    "w4a4g4_nvfp4_hadamard": Repair(
        "combined",
        "w4a4g4_naive",
        "NVFP4, G stochastic, all products rotated by matrices of 16",
        _rotated(_all4(*_NVFP4), 16),
    ),
    "w4a4g4_nvfp4_four_six": Repair(
        "combined",
        "w4a4g4_naive",
        "NVFP4, W and A with 4/6 scales, G stochastic",
        _all4(_FOUR_SIX, _FOUR_SIX, _NVFP4[2]),
    ),
    "w4a4g4_mxfp4": Repair(
        "combined",
        "w4a4g4_naive",
        "MXFP4, scales rounded up, G stochastic",
        _all4(dict(_MX), dict(_MX), {**_MX, "rounding": "stochastic", "used_for": list(_BOTH)}),
    ),
}


def _shipped(name: str) -> Values:
    section = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))["ds_quant"]
    return {part: section[part] for part in ("linear", "optimizer")}


_AS_SHIPPED = "as it is shipped, without communication"
RECIPES = {
    name: Repair("recipe", of, _AS_SHIPPED, _shipped(name))
    for name, of in (
        ("recommended_8bit", "w8a8g8"),
        ("recommended_4bit_states", "w8a8g8"),
        ("recommended_4bit", "w4a4g4_naive"),
    )
}
"""The configs that docs/recipes.md recommends, as a whole."""

ALL: dict[str, Repair] = {**WEIGHT, **ACTIVATION, **GRADIENT, **MOMENTS, **COMBINED, **RECIPES}
