"""Losses of the default job with gradients or weights in few bits on the wire: the tables of docs/results/, in
2026-11-22-communication.md and 2026-11-29-weights-on-the-wire.md.

    python tests/convergence/communication_losses.py [--recipes comm8 ...] [--runs runs/communication] [--only-table]

Trains every recipe with every seed that is not in the folder yet, some three minutes each on two cores. Runs of one
seed share initialisation and data; the global batch is that of `make pretrain`, whatever the number of ranks.
"""

import argparse
import sys
from pathlib import Path

from loss_runs import changed_config, gap_table, summary, train

BASELINE = "baseline"
GLOBAL_BATCH = 32
GRADIENTS = {
    "comm8": ("8 bits", "comm8", {}),
    "comm4": ("4 bits, error feedback", "comm4", {}),
    "comm4_no_feedback": ("4 bits, without", "comm4", {"error_feedback": False}),
    "comm4_hadamard": (
        "4 bits, error feedback, hadamard, blocks of 256",
        "comm4",
        {"rotation": "hadamard", "block_size": 256},
    ),
}
WEIGHTS = {
    "difference8": ("differences of weights, 8 bits", "comm8", {"mode": "difference", "bits": 8}),
    "difference4": ("differences of weights, 4 bits", "comm8", {"mode": "difference", "bits": 4}),
}
"""Gradients cross the wire as the baseline's do."""
RECIPES = {**GRADIENTS, **WEIGHTS}
SEEDS = (42, 7, 1234)


def config_of(runs: Path, recipe: str) -> Path:
    """A shipped config, or one that differs from it in the section's communication."""
    _, shipped, changes = RECIPES.get(recipe, ("", BASELINE, {}))
    if recipe in WEIGHTS:
        return changed_config(runs, recipe, shipped, (), {"communication": {"weight": changes}})
    return changed_config(runs, recipe, shipped, ("communication", "gradient"), changes)


def relative_error(run: Path) -> float:
    """Of gradients, or of the differences of weights."""
    found = summary(run)["communication"]
    return found["quantization_error" if "gradient" in found else "weight_quantization_error"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/communication"), help="default: %(default)s")
    parser.add_argument("--ranks", type=int, choices=(2, 4, 8), default=4, help="default: %(default)s")
    parser.add_argument("--recipes", nargs="*", choices=RECIPES, default=list(RECIPES), help="default: all")
    parser.add_argument("--only-table", action="store_true", help="train nothing")
    arguments = parser.parse_args()
    arguments.runs.mkdir(parents=True, exist_ok=True)
    if not arguments.only_table:
        batch = str(GLOBAL_BATCH // arguments.ranks)
        for seed in SEEDS:
            for recipe in (BASELINE, *arguments.recipes):
                flags = ("--seed", str(seed), "--per_device_train_batch_size", batch, "--save_strategy", "no")
                output = arguments.runs / f"{recipe}-s{seed}"
                train(output, config_of(arguments.runs, recipe), *flags, ranks=arguments.ranks)
    names = {recipe: RECIPES[recipe][0] for recipe in arguments.recipes}
    print(gap_table(arguments.runs, names, SEEDS, BASELINE, {"relative error": relative_error}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
