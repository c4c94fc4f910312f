"""Losses of the default job with all operands of linear layers in one number format beside full precision: the tables
of docs/results/2026-11-29-formats.md.

    python tests/convergence/format_losses.py [--runs runs/formats] [--seeds 42 7 1234] [--recipes mxfp8 ...]
        [--only-table]

Weights, activations and gradients (of both backward products) in backend `simulated`; fp8 has a scale for each output
channel and each token. Trains every recipe with every seed that is not in the folder yet, two to three minutes each on
a core. Runs of one seed share initialisation and data.
"""

import sys
from pathlib import Path
from typing import Any

from loss_runs import changed_config, study

BASELINE = "baseline"
SEEDS = (42, 7, 1234)


def all_in(name: str, *, gradient: str = "", rounding: str = "nearest", weight: dict[str, Any] | None = None) -> dict:
    """The operands of a section `linear`. gradient: another format of G. weight: options of W beside its format."""
    in_groups = name.startswith("fp")
    channel, token = ({"granularity": each} if in_groups else {} for each in ("channel", "token"))
    return {
        "weight": {"format": name, **channel, **(weight or {})},
        "activation": {"format": name, **token},
        "gradient": {"format": gradient or name, **token, "rounding": rounding, "used_for": ["weight", "input"]},
        "backend": "simulated",
    }


RECIPES = {
    "fp8_e4m3": ("fp8 e4m3", all_in("fp8_e4m3")),
    "fp8_e5m2": ("fp8 e4m3, G in e5m2", all_in("fp8_e4m3", gradient="fp8_e5m2")),
    "mxfp8": ("MXFP8", all_in("mxfp8")),
    "mxint8": ("MXINT8", all_in("mxint8")),
    "mxfp6": ("MXFP6", all_in("mxfp6")),
    "mxfp4": ("MXFP4", all_in("mxfp4")),
    "mxfp4_stochastic": ("MXFP4, G stochastic", all_in("mxfp4", rounding="stochastic")),
    "nvfp4": ("NVFP4", all_in("nvfp4")),
    "nvfp4_stochastic": ("NVFP4, G stochastic", all_in("nvfp4", rounding="stochastic")),
    "nvfp4_four_six": (
        "NVFP4, G stochastic, W with 4/6 scales",
        all_in("nvfp4", rounding="stochastic", weight={"scale_rule": "four_six"}),
    ),
    "nvint4_stochastic": ("NVINT4, G stochastic", all_in("nvint4", rounding="stochastic")),
}


def config_of(runs: Path, recipe: str) -> Path:
    """The shipped int8 config with other operands."""
    if recipe == BASELINE:
        return changed_config(runs, recipe, BASELINE, (), {})
    return changed_config(runs, recipe, "w8a8g8_int8", ("linear",), RECIPES[recipe][1])


def main() -> int:
    names = {recipe: name for recipe, (name, _) in RECIPES.items()}
    return study(__doc__, "runs/formats", names, SEEDS, BASELINE, "full precision", config_of)


if __name__ == "__main__":
    sys.exit(main())
