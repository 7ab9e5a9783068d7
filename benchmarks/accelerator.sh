#!/usr/bin/env bash
# Benchmarks of one accelerator in at most nine minutes: attention, MFU of the 1.8B step, rollouts, and the reward server.
#
#   benchmarks/accelerator.sh [WHEELS]
#
# Needs Python 3.11 or newer and no network: with WHEELS, a folder of wheels, it makes an environment from them. On a connected machine of the
# same system such a folder is made by
#
#   pip wheel --wheel-dir WHEELS '.[cuda]'      (in the root of the repository; setup.py pins the versions)
#
# Without WHEELS the Python in use must have the project's packages. Writes accelerator.json (tables and results of each
# benchmark, machine, versions) and profile/ (a trace of three steps) to the folder OUT, by default the current one.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=${OUT:-.}
python=${PYTHON:-python3}
if [[ $# -gt 0 ]]; then
  "$python" -m venv "$out/venv"
  python=$out/venv/bin/python
  "$python" -m pip install --quiet --no-index --find-links "$1" "polar_jax[${EXTRA-cuda}]" || {
    echo "accelerator.sh: $1 lacks a wheel that the line above names; make it by: pip wheel --wheel-dir WHEELS '.[cuda]'" >&2
    exit 1
  }
fi
cd "$out"
PYTHONPATH=$here/..${PYTHONPATH:+:$PYTHONPATH} "$python" "$here/run_all.py" --profile="${PROFILE:-accelerator}" --minutes="${MINUTES:-8.5}" \
  --output=accelerator.json --markdown=accelerator.md
