"""Losses of the default job with masters of 24 and 16 bits beside fp32 ones: the table of
docs/results/2026-11-29-masters.md.

    python tests/convergence/master_losses.py [--runs runs/masters] [--seeds 42 7 1234] [--only-table]

All runs are in bf16, with 8-bit moments. Trains every recipe with every seed that is not in the folder yet, some two
minutes each on a core with bf16. Runs of one seed share initialisation and data.
"""

import sys
from pathlib import Path

from loss_runs import changed_config, study

BASELINE = "fp32"
RECIPES = {
    "master24": ("24 bits", {"master": {"bits": 24}}),
    "master16": ("16 bits, stochastic", {"master": {"bits": 16}}),
    "master16_nearest": ("16 bits, nearest", {"master": {"bits": 16, "rounding": "nearest"}}),
}
SEEDS = (42, 7, 1234)


def config_of(runs: Path, recipe: str) -> Path:
    """The shipped config with 8-bit moments, and the recipe's masters."""
    _, changes = RECIPES.get(recipe, ("", {}))
    return changed_config(runs, recipe, "adam8", ("optimizer",), changes)


def main() -> int:
    names = {recipe: name for recipe, (name, _) in RECIPES.items()}
    return study(__doc__, "runs/masters", names, SEEDS, BASELINE, "fp32 masters", config_of, "--bf16", "true")


if __name__ == "__main__":
    sys.exit(main())
