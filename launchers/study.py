"""The study of the paper's matrix: train what is missing, and build its tables from the committed figures.

    python launchers/study.py run                 the first budget at the smallest size: tuning, then all rows, 3 seeds
    python launchers/study.py run --rows w4_channel w4_block32 --sizes 0.7m 2m --families llama gpt2 --seeds 0-7
    sbatch slurm/sweep.sh study                   the same, or any of these options, as jobs of Slurm
    python launchers/study.py plan                what `run` with the same options would train
    python launchers/study.py tables              docs/study.md and its pictures, from docs/results/study/runs.csv
    python launchers/study.py repeat              one row of each table trained again and compared; or --rows, --seeds
    python launchers/study.py post-training       models with quantizers put in after training, or taken out
    python launchers/study.py adapt               models trained on with quantizers, or quantized afterwards
    python launchers/study.py isolate             quantized models whose outliers or sharpness were changed
    python launchers/study.py memory              peaks of memory with quantized gradients
    python launchers/study.py smoke               some short runs, against limits that were measured

Runs are those of launchers/pretrain.py, two at a time with one thread each. What is in the CSV is not trained again; a
run that was stopped or killed goes on from its last checkpoint. docs/study.md has the protocol.

Exit code: 0; 1 if a run failed or was stopped, or a figure is not the expected one; 2 for wrong arguments.
"""

from __future__ import annotations

import sys

from ds_quant.cli.shared.errors import CommandError


def main(argv: list[str] | None = None) -> int:
    """One command; returns the exit code."""
    from studying import commands

    try:
        return commands.run(sys.argv[1:] if argv is None else argv, description=str(__doc__))
    except CommandError as error:
        print(f"error: {error}", file=sys.stderr)
        return CommandError.exit_status


if __name__ == "__main__":
    sys.exit(main())
