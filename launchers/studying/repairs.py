"""Repairs of the paper's failing rows at the same number of bits, one component at a time.

A row stays here when it does not help: its figures are part of the answer.
"""

from __future__ import annotations

from collections.abc import Callable

from studying.sections import (
    BOTH,
    FOUR_SIX,
    LAST_BLOCK,
    LOG,
    MXFP4,
    Repair,
    Values,
    block,
    full_at_end,
    gradient,
    linear,
    rotated,
)


def _hadamard(component: str, granularity: str, section: Callable[[Values], Values]) -> dict[str, Repair]:
    """One operand of the forward in 4 bits, with both rotated before; `section` of its values."""
    letter = component.lower()
    of = f"{letter}4_{granularity}"
    whole, blocks = section({"bits": 4, "granularity": granularity}), section(block(4, 32))
    return {
        f"{of}_hadamard": Repair(
            component, of, f"per {granularity}, Y rotated by matrices of 128", rotated(whole, 128, "output")
        ),
        f"{letter}4_block32_hadamard": Repair(
            component, of, "blocks of 32, Y rotated by matrices of 32", rotated(blocks, 32, "output")
        ),
    }


def _quantized_backward(component: str, granularity: str, operand: str) -> Repair:
    """One operand of the forward in 4 bits, and the same codes in the backward product that reads it."""
    operands: Values = {operand: {"bits": 4, "granularity": granularity}}
    of = f"{component.lower()}4_{granularity}"
    what = f"per {granularity}, the same codes in the backward pass"
    return Repair(component, of, what, linear(backward="quantized", **operands))


_HEADS = ["lm_head"]
# Of both families: model.layers.N and transformer.h.N.
_LAST = ["lm_head", f"*.{LAST_BLOCK}.*"]
_RESET = {"every": 32, "watched_steps": 16, "ratio": 8, "first_step": 104}
"""The first step is as late as the authors' in 162 steps."""
_BLOCK_GRADIENT_WEIGHT = block(4, 32, rounding="stochastic", used_for=["weight"])

WEIGHT = {
    "w4_block32": Repair("W", "w4_channel", "blocks of 32", linear(weight=block(4, 32))),
    "w4_block16": Repair("W", "w4_channel", "blocks of 16", linear(weight=block(4, 16))),
    "w4_block32_asymmetric": Repair(
        "W", "w4_channel", "blocks of 32, asymmetric", linear(weight=block(4, 32, symmetric=False))
    ),
    "w4_channel_no_head": Repair(
        "W",
        "w4_channel",
        "per channel, output layer in full precision",
        linear(weight={"bits": 4, "granularity": "channel"}, exclude=_HEADS),
    ),
    "w4_block32_no_head": Repair(
        "W", "w4_channel", "blocks of 32, output layer in full precision", linear(weight=block(4, 32), exclude=_HEADS)
    ),
    "w4_nvfp4": Repair("W", "w4_channel", "NVFP4", linear(weight={"format": "nvfp4"})),
    "w4_nvfp4_four_six": Repair("W", "w4_channel", "NVFP4, 4/6 scales", linear(weight=FOUR_SIX)),
    "w4_nvint4": Repair("W", "w4_channel", "NVINT4", linear(weight={"format": "nvint4"})),
    "w4_channel_trust": Repair(
        "W",
        "w4_channel",
        "per channel, no gradient farther than 0.4 steps from the code",
        linear(weight={"bits": 4, "granularity": "channel", "trust_distance": 0.4}),
    ),
    "w4_channel_dampened": Repair(
        "W",
        "w4_channel",
        "per channel, dampened by 0.01",
        linear(weight={"bits": 4, "granularity": "channel", "dampening": 0.01}),
    ),
    "w4_channel_reset": Repair(
        "W",
        "w4_channel",
        "per channel, weights that swing 8 times as far in 16 steps reset every 32 steps from step 104 on",
        linear(weight={"bits": 4, "granularity": "channel", "oscillation_reset": _RESET}),
    ),
    **_hadamard("W", "channel", lambda values: linear(weight=values)),
    "w4_channel_quantized_backward": _quantized_backward("W", "channel", "weight"),
    "w4_mxfp4": Repair("W", "w4_channel", "MXFP4, scales rounded up", linear(weight=dict(MXFP4))),
}

ACTIVATION = {
    "a4_block32": Repair("A", "a4_token", "blocks of 32", linear(activation=block(4, 32))),
    "a4_block16": Repair("A", "a4_token", "blocks of 16", linear(activation=block(4, 16))),
    "a4_block32_asymmetric": Repair(
        "A", "a4_token", "blocks of 32, asymmetric", linear(activation=block(4, 32, symmetric=False))
    ),
    "a4_token_no_head": Repair(
        "A",
        "a4_token",
        "per token, output layer in full precision",
        linear(activation={"bits": 4, "granularity": "token"}, exclude=_HEADS),
    ),
    "a4_block32_no_last": Repair(
        "A",
        "a4_token",
        "blocks of 32, output layer and last block in full precision",
        linear(activation=block(4, 32), exclude=_LAST),
    ),
    "a4_token_outliers": Repair(
        "A",
        "a4_token",
        "per token, a tenth of the channels in 8 bits",
        linear(activation={"bits": 4, "granularity": "token", "outlier_share": 0.1}),
    ),
    "a4_token_split_mean": Repair(
        "A",
        "a4_token",
        "per token, without the mean of the tokens",
        linear(activation={"bits": 4, "granularity": "token", "split_mean": True}),
    ),
    **_hadamard("A", "token", lambda values: linear(activation=values)),
    "a4_token_quantized_backward": _quantized_backward("A", "token", "activation"),
    "a4_token_full_at_end": Repair(
        "A",
        "a4_token",
        "per token, in full precision in the last fifth of the steps",
        full_at_end(linear(activation={"bits": 4, "granularity": "token"})),
    ),
    "a4_nvfp4": Repair("A", "a4_token", "NVFP4", linear(activation={"format": "nvfp4"})),
    "a4_nvfp4_four_six": Repair("A", "a4_token", "NVFP4, 4/6 scales", linear(activation=FOUR_SIX)),
    "a4_nvint4": Repair("A", "a4_token", "NVINT4", linear(activation={"format": "nvint4"})),
    "a4_mxfp4": Repair("A", "a4_token", "MXFP4, scales rounded up", linear(activation=dict(MXFP4))),
}

GRADIENT = {
    f"g{bits}_{name}": Repair("G", f"g{bits}_token", what, linear(gradient=values))
    for bits in (8, 4)
    for name, what, values in (
        ("token_stochastic", "per token, stochastic", gradient(bits, "token", "weight")),
        ("outer_nearest", "outer, nearest", gradient(bits, "outer", "weight", rounding="nearest")),
        ("outer", "outer, stochastic", gradient(bits, "outer", "weight")),
        ("outer_both", "outer, stochastic, for dX and dW", gradient(bits, "outer", *BOTH)),
        ("outer_input", "outer, stochastic, for dX only", gradient(bits, "outer", "input")),
    )
} | {
    # The gradient of a token's logits has one element near -1 and small ones beside it, which one scale a token loses.
    "g8_token_no_head": Repair(
        "G",
        "g8_token",
        "per token, nearest, output layer in full precision",
        linear(gradient=gradient(8, "token", "weight", rounding="nearest"), exclude=_HEADS),
    ),
    "g4_token_no_head": Repair(
        "G",
        "g4_token",
        "per token, nearest, output layer in full precision",
        linear(gradient=gradient(4, "token", "weight", rounding="nearest"), exclude=_HEADS),
    ),
    "g4_outer_no_head": Repair(
        "G",
        "g4_token",
        "outer, stochastic, output layer in full precision",
        linear(gradient=gradient(4, "outer", "weight"), exclude=_HEADS),
    ),
    "g4_block32": Repair("G", "g4_token", "blocks of 32, stochastic", linear(gradient=_BLOCK_GRADIENT_WEIGHT)),
    "g4_block32_hadamard": Repair(
        "G",
        "g4_token",
        "blocks of 32, stochastic, dW rotated by matrices of 128 with drawn signs",
        rotated(linear(gradient=_BLOCK_GRADIENT_WEIGHT), 128, "weight", signs="drawn"),
    ),
    "g4_block32_ms_eden": Repair(
        "G",
        "g4_token",
        "blocks of 32, MS-EDEN, dW rotated as above",
        rotated(linear(gradient={**_BLOCK_GRADIENT_WEIGHT, "rounding": "ms_eden"}), 128, "weight", signs="drawn"),
    ),
    "g4_block32_both": Repair(
        "G",
        "g4_token",
        "blocks of 32, stochastic, for dX and dW",
        linear(gradient=block(4, 32, rounding="stochastic", used_for=list(BOTH))),
    ),
    "g4_token_both": Repair(
        "G",
        "g4_token",
        "per token, nearest, for dX and dW: not a repair, the naive row of both products",
        linear(gradient=gradient(4, "token", *BOTH, rounding="nearest")),
    ),
    "g4_nvfp4_both": Repair(
        "G",
        "g4_token",
        "NVFP4, stochastic, for dX and dW",
        linear(gradient={"format": "nvfp4", "rounding": "stochastic", "used_for": list(BOTH)}),
    ),
    "g4_mxfp4_both": Repair(
        "G",
        "g4_token",
        "MXFP4, scales rounded up, stochastic, for dX and dW",
        linear(gradient={**MXFP4, "rounding": "stochastic", "used_for": list(BOTH)}),
    ),
}

# Of the paper's own way with GPT-2, in some of its runs.
GRADIENT |= {
    f"g{bits}_token_qkv": Repair(
        "G",
        f"g{bits}_token",
        "per token, nearest, queries, keys and values apart",
        linear(gradient={**gradient(bits, "token", "weight", rounding="nearest"), "split_qkv": ["*.c_attn"]}),
        families=("gpt2",),
    )
    for bits in (8, 4)
}

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
        {"optimizer": {"exp_avg_sq": dict(LOG)}},
    ),
    "m4v4_log": Repair(
        "v",
        "v8_tensor",
        "both moments at 4 bits, v as above",
        {"optimizer": {"exp_avg": {"bits": 4}, "exp_avg_sq": dict(LOG)}},
    ),
}

ALL: dict[str, Repair] = {**WEIGHT, **ACTIVATION, **GRADIENT, **MOMENTS}
