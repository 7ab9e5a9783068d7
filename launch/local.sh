#!/usr/bin/env bash
# Several processes of one run on this machine, as on a pod, to try out what a pod will do.
#
#   launch/local.sh 2 --config=configs/tiny.py --config.stage=pretrain --workdir=runs/x
#
# The first argument is the number of processes, the rest are arguments of polar_jax.main. The output of process p goes to
# $LOGS/process_p.log (default: the current folder), that of process 0 also to this terminal. When one fails, all are stopped.
set -euo pipefail

[ $# -ge 2 ] || { sed -n '2,8s/^# \{0,1\}//p' "$0" >&2; exit 2; }
count=$1
shift
logs=${LOGS:-.}
port=${PORT:-$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')}
pids=()
stop() { kill "${pids[@]}" 2>/dev/null || true; }
trap stop EXIT INT TERM

for ((process = 0; process < count; process++)); do
  arguments=("$@" "--config.distributed.coordinator=127.0.0.1:$port" "--config.distributed.processes=$count" "--config.distributed.process=$process")
  if [ "$process" -eq 0 ]; then
    python -m polar_jax.main "${arguments[@]}" > >(tee "$logs/process_0.log") 2>&1 &
  else
    python -m polar_jax.main "${arguments[@]}" > "$logs/process_$process.log" 2>&1 &
  fi
  pids+=($!)
done

# When one fails, stop the others instead of letting them wait for it.
for ((ended = 0; ended < count; ended++)); do
  wait -n || { status=$?; echo "launch/local.sh: a process ended with status $status; see $logs/process_*.log" >&2; exit "$status"; }
done
