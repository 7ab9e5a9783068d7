#!/usr/bin/env bash
# One process on every node of a SLURM job, each with all GPUs of its node.
#
#   sbatch --nodes=4 --gpus-per-node=8 --time=24:00:00 launch/slurm.sh --config=configs/7b.py --workdir=/shared/runs/7b
#
# The processes find each other by SLURM's variables. SLURM sends SIGTERM two minutes before the time limit; the run saves, and the
# same command resumes it.
#SBATCH --ntasks-per-node=1
#SBATCH --signal=TERM@120
set -euo pipefail

[ $# -ge 1 ] || { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; }
exec srun --kill-on-bad-exit=1 python -m polar_jax.main "$@"
