#!/usr/bin/env bash
# Run the whole experiment matrix on a cluster, unattended, and collect it in one table. In the root of the repository:
#
#     sbatch slurm/sweep.sh                                      every config in ds_configs/ and its paper/, seeds 0 to 2
#     CONFIGS="paper_*" sbatch slurm/sweep.sh                    the matrix of the paper alone
#     CONFIGS="baseline w8a8*" SEEDS=0-4 sbatch --nodes=2 --gpus-per-node=8 --time=24:00:00 slurm/sweep.sh
#     sbatch --time=2:00:00 slurm/sweep.sh study --rows w8a8 w4_channel   runs of docs/study.md, into its CSV
#     bash slurm/sweep.sh --dry-run --tokens-per-second 400000   the plan, without a cluster
#
# This job takes only seconds. It submits a job array, with the same sbatch options, and a job that collects the results
# when the array has ended. Set CONFIGS, SEEDS, PRETRAIN_ARGS (flags of launchers/pretrain.py), SWEEP_DIR (default:
# runs/sweep) and MAX_PARALLEL (concurrent runs, default: 8); --help has details. If you submit it again, it starts only
# runs that are missing, stopped or failed.
#
#SBATCH --job-name=sweep-plan
set -euo pipefail

root=${SLURM_SUBMIT_DIR:-}
if [[ -z ${SLURM_JOB_ID:-} ]]; then
  root=$(dirname "${BASH_SOURCE[0]}")/..
fi
# Slurm runs a copy of this file elsewhere, so the repository is the folder that the job was submitted from.
if [[ ! -f $root/launchers/sweep.py ]]; then
  echo "sweep.sh: error: submitted from $root, which has no launchers/sweep.py; run sbatch in the root of the repository" >&2
  exit 2
fi
cd "$root"
if [[ -x .venv/bin/python ]]; then
  PATH=$PWD/.venv/bin:$PATH
fi
if [[ ${1:-} == study ]]; then
  exec python launchers/study.py submit "${@:2}"
fi
exec python launchers/sweep.py "$@"
