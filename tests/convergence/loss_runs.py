"""What studies of losses share: training a config if that has not been done, and reading what a run left."""

import argparse
import csv
import json
import os
import socket
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def train(output: Path, config: Path, *flags: str, ranks: int = 1) -> None:
    """Train the default job of launchers/pretrain.py with `config`, one thread a rank, unless `output` has a result."""
    if (output / "summary.json").exists():
        return
    with socket.socket() as probe:  # several studies may run at once
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        "deepspeed",
        "--num_gpus",
        ranks,
        "--master_port",
        port,
        ROOT / "launchers" / "pretrain.py",
        "--deepspeed",
        config,
    ]
    # A run that ends with an error is a row of the table too.
    subprocess.run(
        [*map(str, command), *flags, "--output_dir", str(output)], env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def summary(output: Path) -> dict | None:
    path = output / "summary.json"
    return json.loads(path.read_text()) if path.exists() else None


def final(output: Path) -> float | None:
    """The last validation loss."""
    found = summary(output)
    return found and found["final_eval_loss"]


def evaluations(output: Path) -> dict[int, float]:
    """Validation loss by step."""
    with (output / "metrics.csv").open() as file:
        return {int(row["step"]): float(row["eval_loss"]) for row in csv.DictReader(file) if row["eval_loss"]}


def gaps(output: Path, baseline: Path) -> dict[int, float]:
    """Validation loss less the baseline's, by step."""
    own, base = evaluations(output), evaluations(baseline)
    return {step: own[step] - base[step] for step in own if step in base}


def cell(loss: float | None, base: float) -> str:
    return "" if loss is None else f"{loss:.4f} ({loss - base:+.4f})"


def shipped_config(name: str) -> Path:
    folder = ROOT / "ds_configs"
    return (folder / "paper" if name.startswith("paper_") else folder) / f"{name}.json"


def changed_config(runs: Path, name: str, shipped: str, where: Sequence[str], changes: dict) -> Path:
    """A shipped config; with `changes`, one in `runs` that differs from it by them at `where` in the section."""
    source = shipped_config(shipped)
    if not changes:
        return source
    config = json.loads(source.read_text())
    changed = config["ds_quant"]
    for key in where:
        changed = changed[key]
    changed |= changes
    path = runs / f"{name}.json"
    path.write_text(json.dumps(config, indent=2) + "\n")
    return path


def gap_table(
    runs: Path,
    recipes: Mapping[str, str],
    seeds: Sequence[int],
    baseline: str,
    columns: Mapping[str, Callable[[Path], float]] | None = None,
    first: str = "full precision",
) -> str:
    """Losses of runs RECIPE-sSEED, their gaps to the baseline with the same seed, and the means of `columns`.

    `first` is what the baseline is called.
    """
    columns = columns or {}
    base = {seed: loss for seed in seeds if (loss := final(runs / f"{baseline}-s{seed}")) is not None}
    lines = ["| | " + " | ".join([*(f"seed {seed}" for seed in base), "mean gap", *columns]) + " |"]
    lines.append("|---|" + "---|" * (len(base) + 1 + len(columns)))
    lines.append(f"| {first} | " + " | ".join(f"{loss:.4f}" for loss in base.values()) + " |" * (2 + len(columns)))
    for recipe, name in recipes.items():
        losses = {seed: final(runs / f"{recipe}-s{seed}") for seed in base}
        found = [seed for seed in base if losses[seed] is not None]
        if found:
            mean = statistics.mean(losses[seed] - base[seed] for seed in found)
            more = [statistics.mean(of(runs / f"{recipe}-s{seed}") for seed in found) for of in columns.values()]
            cells = [*(cell(losses[seed], base[seed]) for seed in base), f"{mean:+.4f}", *(f"{x:.4f}" for x in more)]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def study(
    doc: str | None,
    runs: str,
    names: Mapping[str, str],
    seeds: Sequence[int],
    baseline: str,
    first: str,
    config_of: Callable[[Path, str], Path],
    *flags: str,
) -> int:
    """The command line of a study of one rank: trains what is missing, seed by seed, and prints `gap_table`.

    runs: the default folder. names: of the recipes beside the baseline. config_of: a recipe's config, given the folder.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path(runs), help="default: %(default)s")
    parser.add_argument("--seeds", type=int, nargs="+", default=seeds, help="default: %(default)s")
    parser.add_argument("--recipes", choices=names, metavar="RECIPE", nargs="+", default=names, help="default: all")
    parser.add_argument("--only-table", action="store_true", help="train nothing")
    parser.add_argument("--beta2", help="of AdamW, in a folder of its own (default: the job's 0.95, in --runs)")
    arguments = parser.parse_args()
    if arguments.beta2:
        arguments.runs /= f"beta2-{arguments.beta2}"
        flags = (*flags, "--adam_beta2", arguments.beta2)
    arguments.runs.mkdir(parents=True, exist_ok=True)
    names = {recipe: name for recipe, name in names.items() if recipe in arguments.recipes}
    if not arguments.only_table:
        for seed in arguments.seeds:
            for recipe in (baseline, *names):
                config = config_of(arguments.runs, recipe)
                train(
                    arguments.runs / f"{recipe}-s{seed}", config, "--seed", str(seed), *flags, "--save_strategy", "no"
                )
    print(gap_table(arguments.runs, names, arguments.seeds, baseline, first=first))
    return 0
