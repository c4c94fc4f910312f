"""Losses of the default job with gradients in few bits beside full precision: the table of
docs/results/2026-11-22-communication.md.

    python tests/convergence/communication_losses.py [--runs runs/communication] [--ranks 4] [--only-table]

Trains every recipe with every seed that is not in the folder yet, some three minutes each on two cores. Runs of one
seed share initialisation and data; the global batch is that of `make pretrain`, whatever the number of ranks.
"""

import argparse
import sys
from pathlib import Path

from loss_runs import changed_config, gap_table, summary, train

BASELINE = "baseline"
GLOBAL_BATCH = 32
RECIPES = {
    "comm8": ("8 bits", "comm8", {}),
    "comm4": ("4 bits, error feedback", "comm4", {}),
    "comm4_no_feedback": ("4 bits, without", "comm4", {"error_feedback": False}),
    "comm4_hadamard": (
        "4 bits, error feedback, hadamard, blocks of 256",
        "comm4",
        {"rotation": "hadamard", "block_size": 256},
    ),
}
SEEDS = (42, 7, 1234)


def config_of(runs: Path, recipe: str) -> Path:
    """A shipped config, or one that differs from it in the section's communication.gradient."""
    _, shipped, changes = RECIPES.get(recipe, ("", BASELINE, {}))
    return changed_config(runs, recipe, shipped, ("communication", "gradient"), changes)


def relative_error(run: Path) -> float:
    return summary(run)["communication"]["quantization_error"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/communication"), help="default: %(default)s")
    parser.add_argument("--ranks", type=int, choices=(2, 4, 8), default=4, help="default: %(default)s")
    parser.add_argument("--only-table", action="store_true", help="train nothing")
    arguments = parser.parse_args()
    arguments.runs.mkdir(parents=True, exist_ok=True)
    if not arguments.only_table:
        batch = str(GLOBAL_BATCH // arguments.ranks)
        for seed in SEEDS:
            for recipe in (BASELINE, *RECIPES):
                flags = ("--seed", str(seed), "--per_device_train_batch_size", batch, "--save_strategy", "no")
                output = arguments.runs / f"{recipe}-s{seed}"
                train(output, config_of(arguments.runs, recipe), *flags, ranks=arguments.ranks)
    names = {recipe: name for recipe, (name, _, _) in RECIPES.items()}
    print(gap_table(arguments.runs, names, SEEDS, BASELINE, {"relative error": relative_error}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
