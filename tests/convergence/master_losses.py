"""Losses of the default job with masters of 24 and 16 bits beside fp32 ones: the table of
docs/results/2026-11-29-masters.md.

    python tests/convergence/master_losses.py [--runs runs/masters] [--seeds 42 7 1234] [--only-table]

All runs are in bf16, with 8-bit moments. Trains every recipe with every seed that is not in the folder yet, some two
minutes each on a core with bf16. Runs of one seed share initialisation and data.
"""

import argparse
import sys
from pathlib import Path

from loss_runs import changed_config, gap_table, train

BASELINE = "fp32"
RECIPES = {
    "master24": ("24 bits", {"master": {"bits": 24}}),
    "master16": ("16 bits, stochastic", {"master": {"bits": 16}}),
    "master16_nearest": ("16 bits, nearest", {"master": {"bits": 16, "rounding": "nearest"}}),
}
SEEDS = (42, 7, 1234)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/masters"), help="default: %(default)s")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="default: %(default)s")
    parser.add_argument("--only-table", action="store_true", help="train nothing")
    arguments = parser.parse_args()
    arguments.runs.mkdir(parents=True, exist_ok=True)
    if not arguments.only_table:
        for seed in arguments.seeds:
            for recipe in (BASELINE, *RECIPES):
                _, changes = RECIPES.get(recipe, ("", {}))
                config = changed_config(arguments.runs, recipe, "adam8", ("optimizer",), changes)
                flags = ("--seed", str(seed), "--bf16", "true", "--save_strategy", "no")
                train(arguments.runs / f"{recipe}-s{seed}", config, *flags)
    names = {recipe: name for recipe, (name, _) in RECIPES.items()}
    print(gap_table(arguments.runs, names, arguments.seeds, BASELINE, first="fp32 masters"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
