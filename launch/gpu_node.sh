#!/usr/bin/env bash
# One node, all of its GPUs, one process.
#
#   launch/gpu_node.sh --config=configs/finetune_7b.py --workdir=runs/7b
set -euo pipefail

[ $# -ge 1 ] || { sed -n '2,4s/^# \{0,1\}//p' "$0" >&2; exit 2; }
# Allocate nearly all memory at once to avoid fragmentation; the rest is for NCCL and CUDA.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
# Overlap collectives with matrix multiplications.
export XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_enable_latency_hiding_scheduler=true"
exec python -m polar_jax.main "$@"
