#!/usr/bin/env bash
# Submits the runs of a sweep to SLURM: an array of jobs for the language models, and one for the runs that start from them.
#
#   python -m polar_jax.main --config=configs/sweep.py --config.stage=sweep --config.sweep.jobs_only=True --workdir=WORKDIR
#   launch/sweep_slurm.sh WORKDIR [options of sbatch, such as --gres=gpu:1 --time=4:00:00]
#
# Every node must see the workdir. When the jobs are done, the first command gathers results.csv and lists lost jobs again, which the
# second command submits.
set -euo pipefail

[ $# -ge 1 ] || { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; }
workdir=$1
shift

# submit FILE OPTIONS...: submit an array with a job per line of FILE; print its id, or nothing if FILE is empty.
submit() {
  local file=$1 count
  shift
  [ -f "$file" ] || { echo "$file: no such file; write it with sweep.jobs_only=True" >&2; exit 1; }
  count=$(wc -l < "$file")
  [ "$count" -gt 0 ] || return 0
  sbatch --parsable --array="1-$count" "$@" --wrap "eval \"\$(sed -n \"\${SLURM_ARRAY_TASK_ID}p\" '$file')\""
}

models=$(submit "$workdir/sweep/jobs_lm.txt" "$@")
runs=$(submit "$workdir/sweep/jobs.txt" ${models:+--dependency="afterok:$models"} "$@")
echo "language models: ${models:-none to train}; runs: ${runs:-none to train}"
