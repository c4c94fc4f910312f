"""Losses of the default job with gradients in few bits beside full precision: the table of docs/communication.md.

    python tests/convergence/communication_losses.py [--runs runs/communication] [--ranks 4] [--only-table]

Trains every recipe with every seed that is not in the folder yet, some three minutes each on two cores. Runs of one
seed share initialisation and data; the global batch is that of `make pretrain`, whatever the number of ranks.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

from loss_runs import ROOT, cell, final, summary, train

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
    if recipe == BASELINE or not RECIPES[recipe][2]:
        return ROOT / "ds_configs" / f"{recipe}.json"
    _, shipped, changes = RECIPES[recipe]
    config = json.loads((ROOT / "ds_configs" / f"{shipped}.json").read_text())
    config["ds_quant"]["communication"]["gradient"] |= changes
    path = runs / f"{recipe}.json"
    path.write_text(json.dumps(config, indent=2) + "\n")
    return path


def table(runs: Path) -> str:
    seeds = [seed for seed in SEEDS if final(runs / f"{BASELINE}-s{seed}") is not None]
    base = {seed: final(runs / f"{BASELINE}-s{seed}") for seed in seeds}
    lines = [f"| | {' | '.join(f'seed {seed}' for seed in seeds)} | mean gap | relative error |"]
    lines += [f"|---|{'---|' * len(seeds)}---|---|"]
    lines.append(f"| full precision | {' | '.join(f'{base[seed]:.4f}' for seed in seeds)} | | |")
    for recipe, (name, _, _) in RECIPES.items():
        losses = {seed: final(runs / f"{recipe}-s{seed}") for seed in seeds}
        found = [seed for seed in seeds if losses[seed] is not None]
        if found:
            mean = statistics.mean(losses[seed] - base[seed] for seed in found)
            of_runs = [summary(runs / f"{recipe}-s{seed}")["communication"]["quantization_error"] for seed in found]
            cells = " | ".join(cell(losses[seed], base[seed]) for seed in seeds)
            lines.append(f"| {name} | {cells} | {mean:+.4f} | {statistics.mean(of_runs):.4f} |")
    return "\n".join(lines)


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
    print(table(arguments.runs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
