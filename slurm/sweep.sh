#!/usr/bin/env bash
# Run the whole experiment matrix on a cluster, unattended, into one table:
#
#     sbatch slurm/sweep.sh                                      every config in ds_configs/ and its paper/, seeds 0 to 2
#     CONFIGS="paper_*" sbatch slurm/sweep.sh                    the matrix of the paper alone
#     CONFIGS="baseline w8a8*" SEEDS=0-4 sbatch --nodes=2 --gpus-per-node=8 --time=24:00:00 slurm/sweep.sh
#     bash slurm/sweep.sh --dry-run --tokens-per-second 400000   the plan, without a cluster
#
# from the root of the repository. This job itself takes seconds: it submits a job array with its own options of sbatch
# and a job that collects when the array has ended. CONFIGS, SEEDS, PRETRAIN_ARGS (flags of launchers/pretrain.py),
# SWEEP_DIR (default: runs/sweep) and MAX_PARALLEL (runs at a time, default: 8) choose; --help tells more. Submitting it
# again starts only what is missing, stopped or failed.
#
#SBATCH --job-name=sweep-plan
set -euo pipefail

root=${SLURM_SUBMIT_DIR:-}
if [[ -z ${SLURM_JOB_ID:-} ]]; then
  root=$(dirname "${BASH_SOURCE[0]}")/..
fi
# Slurm runs a copy of this file elsewhere: only where it was submitted tells where the repository is.
if [[ ! -f $root/launchers/sweep.py ]]; then
  echo "sweep.sh: error: submitted from $root, which has no launchers/sweep.py; run sbatch in the root of the repository" >&2
  exit 2
fi
cd "$root"
if [[ -x .venv/bin/python ]]; then
  PATH=$PWD/.venv/bin:$PATH
fi
exec python launchers/sweep.py "$@"
