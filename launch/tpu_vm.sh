#!/usr/bin/env bash
# A Cloud TPU slice by queued resources: request it, wait, install, run the same command on every host, and delete it.
#
#   PROJECT=my-project ZONE=us-east5-a TYPE=v5p-128 launch/tpu_vm.sh NAME --config=configs/7b.py --workdir=runs/7b \
#     --config.checkpointing.folder=gs://bucket/runs/7b --config.data.triplets=gs://bucket/triplets
#
# VERSION (default v2-alpha-tpuv5) is the runtime, SPOT=1 requests preemptible capacity, KEEP=1 leaves the slice running at the end. The source
# is copied from this checkout. Run it again with the same NAME to continue: an existing slice is used.
set -euo pipefail

[ $# -ge 2 ] || { sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2; }
name=$1
shift
here=(--project="${PROJECT:?set PROJECT}" --zone="${ZONE:?set ZONE}")
source=$(cd "$(dirname "$0")/.." && pwd)

if ! gcloud compute tpus queued-resources describe "$name" "${here[@]}" > /dev/null 2>&1; then
  gcloud compute tpus queued-resources create "$name" --node-id="$name" --accelerator-type="${TYPE:?set TYPE}" \
    --runtime-version="${VERSION:-v2-alpha-tpuv5}" "${here[@]}" ${SPOT:+--spot}
fi
until state=$(gcloud compute tpus queued-resources describe "$name" "${here[@]}" --format='value(state.state)') && [ "$state" = ACTIVE ]; do
  case $state in FAILED | SUSPENDED) echo "$name is $state: delete it and request it again" >&2; exit 1 ;; esac
  echo "$name is $state, waiting" >&2
  sleep "${POLL:-30}"
done

everywhere=(gcloud compute tpus tpu-vm ssh "$name" "${here[@]}" --worker=all)
tar -C "$source" --exclude=.git --exclude='.venv*' --exclude=runs -czf "/tmp/$name.tar.gz" .
gcloud compute tpus tpu-vm scp "/tmp/$name.tar.gz" "$name:/tmp/" "${here[@]}" --worker=all
"${everywhere[@]}" --command="mkdir -p polar_jax && tar -C polar_jax -xzf /tmp/$name.tar.gz && cd polar_jax && pip install --quiet -e '.[tpu,gcs]'"
status=0
"${everywhere[@]}" --command="cd polar_jax && python -m polar_jax.main $(printf '%q ' "$@")" || status=$?
[ -n "${KEEP:-}" ] || gcloud compute tpus queued-resources delete "$name" "${here[@]}" --force --quiet
exit "$status"
