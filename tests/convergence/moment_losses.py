"""Losses of the default job with quantized moments beside torch AdamW: the table and curves of
docs/results/2026-11-22-moments.md.

    python tests/convergence/moment_losses.py [--runs runs/moments] [--only-table]

Trains every recipe with every beta2 and seed that is not in the folder yet, each in two minutes or so on a core, then
prints the table and draws the gaps. Runs of one seed share initialisation and data.
"""

import argparse
import statistics
import sys
from pathlib import Path

from loss_runs import cell, final, gaps, shipped_config
from loss_runs import train as train_run

BASELINE = "baseline"
RECIPES = {
    "adam8": "8 bits",
    "m4v8": "m 4, v 8 bits",
    "adam4": "4 bits, v with map log",
    "paper_m8_tensor": "m 8 bits, linear per tensor",
    "paper_m4_tensor": "m 4 bits, linear per tensor",
    "paper_v8_tensor": "v 8 bits, linear per tensor",
    "paper_v8_channel": "v 8 bits, linear per channel",
}
SEVERAL_SEEDS = (BASELINE, "adam8", "m4v8", "adam4")
BETA2 = ("0.95", "0.999")
SEEDS = (42, 7, 1234)


def folder(runs: Path, config: str, beta2: str, seed: int) -> Path:
    return runs / f"{config}-b{beta2}-s{seed}"


def train(runs: Path) -> None:
    for seed in SEEDS:
        for beta2 in BETA2:
            for config in (BASELINE, *RECIPES):
                if seed == SEEDS[0] or config in SEVERAL_SEEDS:
                    flags = ("--adam_beta2", beta2, "--seed", str(seed))
                    train_run(folder(runs, config, beta2, seed), shipped_config(config), *flags)


def table(runs: Path) -> str:
    lines = []
    for beta2 in BETA2:
        seeds = [seed for seed in SEEDS if final(folder(runs, BASELINE, beta2, seed)) is not None]
        names = " | ".join(f"seed {seed}" for seed in seeds)
        lines += [f"| beta2 {beta2} | {names} | mean gap |", f"|---|{'---|' * len(seeds)}---|"]
        base = {seed: final(folder(runs, BASELINE, beta2, seed)) for seed in seeds}
        lines.append(f"| torch AdamW | {' | '.join(f'{base[seed]:.4f}' for seed in seeds)} | |")
        for config, name in RECIPES.items():
            losses = {seed: final(folder(runs, config, beta2, seed)) for seed in seeds}
            differences = [losses[seed] - base[seed] for seed in seeds if losses[seed] is not None]
            if differences:
                cells = [cell(losses[seed], base[seed]) for seed in seeds]
                mean = f"{statistics.mean(differences):+.4f}" if len(differences) > 1 else ""
                lines.append(f"| {name} (`{config}`) | {' | '.join(cells)} | {mean} |")
        lines.append("")
    return "\n".join(lines)


def draw(runs: Path, path: Path) -> None:
    """Gap to the baseline of the same seed over the steps: thin a seed, thick their mean."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(BETA2), figsize=(11, 4), sharey=True, layout="constrained")
    for panel, beta2 in zip(panels, BETA2, strict=True):
        for number, config in enumerate(SEVERAL_SEEDS[1:]):
            curves = []
            for seed in SEEDS:
                paths = folder(runs, config, beta2, seed), folder(runs, BASELINE, beta2, seed)
                if all(final(path) is not None for path in paths):
                    curves.append(gaps(*paths))
                    panel.plot(curves[-1].keys(), curves[-1].values(), color=f"C{number}", linewidth=0.7, alpha=0.6)
            if curves:
                steps = sorted(set.intersection(*map(set, curves)))
                means = [statistics.mean(curve[step] for curve in curves) for step in steps]
                label = f"{RECIPES[config]} ({len(curves)} seeds)"
                panel.plot(steps, means, color=f"C{number}", linewidth=2.2, label=label)
        panel.axhline(0, color="black", linewidth=0.8)
        panel.set(title=f"beta2 {beta2}", xlabel="step")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    panels[0].set_ylabel("validation loss less the baseline's, nats")
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/moments"), help="default: %(default)s")
    parser.add_argument("--only-table", action="store_true", help="train nothing")
    arguments = parser.parse_args()
    if not arguments.only_table:
        train(arguments.runs)
    print(table(arguments.runs))
    draw(arguments.runs, arguments.runs / "gaps.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
