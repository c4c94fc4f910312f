"""Losses of the default job with Muon's states in 8 and 4 bits beside DeepSpeed's Muon: the table of docs/moments.md.

    python tests/convergence/muon_losses.py [--runs runs/muon] [--seeds 42 7 1234] [--only-table]

Trains every recipe with every seed that is not in the folder yet, some three minutes each on a core. Runs of one seed
share initialisation and data. Nothing is clipped: DeepSpeed takes the norm of Muon's updates for that of gradients.
"""

import argparse
import json
import sys
from pathlib import Path

from loss_runs import gap_table, shipped_config, train

BASELINE = "muon"
MUON = {"type": "Muon", "params": {"lr": "auto", "muon_lr": 0.02, "momentum": 0.95, "weight_decay": "auto"}}
"""`lr` is AdamW's part: the job's own."""
RECIPES = {
    "muon8": ("8 bits", {"momentum_buffer": {"bits": 8}, "exp_avg": {"bits": 8}, "exp_avg_sq": {"bits": 8}}),
    "muon4": (
        "4 bits, 8 of exp_avg_sq",
        {"momentum_buffer": {"bits": 4}, "exp_avg": {"bits": 4}, "exp_avg_sq": {"bits": 8}},
    ),
}
SEEDS = (42, 7, 1234)


def config_of(runs: Path, recipe: str) -> Path:
    """The shipped config with Muon; stock DeepSpeed's for the baseline."""
    config = json.loads(shipped_config("adam8" if recipe in RECIPES else "baseline").read_text())
    config["optimizer"] = MUON
    config.setdefault("zero_optimization", {})["stage"] = 1
    if recipe in RECIPES:
        config["ds_quant"] = {"optimizer": RECIPES[recipe][1]}
    path = runs / f"{recipe}.json"
    path.write_text(json.dumps(config, indent=2) + "\n")
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/muon"), help="default: %(default)s")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="default: %(default)s")
    parser.add_argument("--only-table", action="store_true", help="train nothing")
    arguments = parser.parse_args()
    arguments.runs.mkdir(parents=True, exist_ok=True)
    if not arguments.only_table:
        for seed in arguments.seeds:
            for recipe in (BASELINE, *RECIPES):
                config = config_of(arguments.runs, recipe)
                flags = ("--seed", str(seed), "--max_grad_norm", "0", "--save_strategy", "no")
                train(arguments.runs / f"{recipe}-s{seed}", config, *flags)
    names = {recipe: name for recipe, (name, _) in RECIPES.items()}
    print(gap_table(arguments.runs, names, arguments.seeds, BASELINE, first="DeepSpeed's Muon"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
