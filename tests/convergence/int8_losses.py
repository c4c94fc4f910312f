"""Losses of the default job with int8 linear layers beside full precision: the table of
docs/results/2026-11-22-int8.md.

    python tests/convergence/int8_losses.py [--runs runs/int8] [--only-table]

Trains every recipe with every seed that is not in the folder yet, some two minutes each on one core. Runs of one seed
share initialisation and data.
"""

import argparse
import sys
from pathlib import Path

from loss_runs import changed_config, gap_table, train

BASELINE = "baseline"
RECIPES = {
    "w8a8_int8": ("W8A8", "w8a8_int8", {}),
    "w8a8g8_int8": ("W8A8G8, G rounded stochastically", "w8a8g8_int8", {}),
    "w8a8g8n_int8": ("W8A8G8, G rounded to nearest", "w8a8g8_int8", {"rounding": "nearest"}),
    "full_int8": ("W8A8G8, moments in 8 bits (one rank: no wire)", "full_int8", {}),
}
SEEDS = (42, 7, 1234)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/int8"), help="default: %(default)s")
    parser.add_argument("--only-table", action="store_true", help="train nothing")
    arguments = parser.parse_args()
    arguments.runs.mkdir(parents=True, exist_ok=True)
    if not arguments.only_table:
        for seed in SEEDS:
            for recipe in (BASELINE, *RECIPES):
                _, shipped, changes = RECIPES.get(recipe, ("", BASELINE, {}))
                config = changed_config(arguments.runs, recipe, shipped, ("linear", "gradient"), changes)
                train(arguments.runs / f"{recipe}-s{seed}", config, "--seed", str(seed), "--save_strategy", "no")
    print(gap_table(arguments.runs, {recipe: name for recipe, (name, _, _) in RECIPES.items()}, SEEDS, BASELINE))
    return 0


if __name__ == "__main__":
    sys.exit(main())
