"""Losses of the default job with Muon's states in 8 and 4 bits beside DeepSpeed's Muon: the table of docs/moments.md.

    python tests/convergence/muon_losses.py [--runs runs/muon] [--seeds 42 7 1234] [--only-table]

Trains every recipe with every seed that is not in the folder yet, some three minutes each on a core. Runs of one seed
share initialisation and data. Nothing is clipped: DeepSpeed takes the norm of Muon's updates for that of gradients.
"""

import json
import sys
from pathlib import Path

from loss_runs import shipped_config, study

BASELINE = "muon"
MUON = {"type": "Muon", "params": {"lr": "auto", "muon_lr": 0.02, "momentum": 0.95, "weight_decay": "auto"}}
"""`lr` is AdamW's part: the job's own."""
RECIPES = {
    "muon8": (
        "8 bits, momentum linear",
        {"momentum_buffer": {"bits": 8, "map": "linear"}, "exp_avg": {"bits": 8}, "exp_avg_sq": {"bits": 8}},
    ),
    "muon8_float": (
        "8 bits, momentum float",
        {"momentum_buffer": {"bits": 8}, "exp_avg": {"bits": 8}, "exp_avg_sq": {"bits": 8}},
    ),
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
    names = {recipe: name for recipe, (name, _) in RECIPES.items()}
    return study(__doc__, "runs/muon", names, SEEDS, BASELINE, "DeepSpeed's Muon", config_of, "--max_grad_norm", "0")


if __name__ == "__main__":
    sys.exit(main())
