"""Run the benchmarks one after the other, and gather their tables and results in one file.

    python benchmarks/run_all.py                                 # two CPU cores: at most an hour
    python benchmarks/run_all.py --only attention costs
    python benchmarks/run_all.py --profile=accelerator --minutes=9     # what accelerator.sh runs
    python benchmarks/run_all.py --profile=toy --output=toy.json   # the sizes of the tests: whether everything runs

Writes benchmarks/results.json: machine, versions, and for each benchmark its command, date, seconds, table and results, or why there are
none. Benchmarks that were not run keep their entries. Each has a limit of minutes, and all together have `--minutes`; what does not end in
time is stopped and says so. `--markdown=FILE` writes the tables as a page. The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import timing

_HERE = pathlib.Path(__file__).resolve().parent
_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'torch', 'transformers', 'trl', 'tokamax', 'vllm')


@dataclasses.dataclass(frozen=True)
class Benchmark:
  """A benchmark of a profile.

  Attributes:
    script: its file, without the suffix.
    arguments: those of the command line.
    minutes: its limit.
    name: of its entry; '': that of the script.
    needs: packages without which it is left out.
  """

  script: str
  arguments: str = ''
  minutes: float = 5.0
  name: str = ''
  needs: tuple[str, ...] = ()

  @property
  def key(self) -> str:
    """Name of the entry."""
    return self.name or self.script


_TORCH = ('torch', 'transformers')
PROFILES: dict[str, tuple[Benchmark, ...]] = {
  'cpu': (
    Benchmark('attention', minutes=6),
    Benchmark('costs', minutes=6),
    Benchmark('packing', minutes=2),
    Benchmark('mfu', minutes=3),
    Benchmark('pair_step', '--rounds=5', 8, needs=(*_TORCH, 'trl')),
    Benchmark('decode', '--slots 32 128', 4),
    Benchmark('decode', '--preset=smollm2_135m --slots 8 32 --length=64 --rounds=3', 6, 'decode_135m'),
    Benchmark('ppo_step', minutes=4),
    Benchmark('scoring', '--groups=2 --rounds=3', 3),
    Benchmark('serve_load', '--seconds=4', 4),
    Benchmark('checkpointing', minutes=5),
    Benchmark('synthesis', '--memory_rows=0', 4),
    Benchmark('large_inputs', '--examples=200_000', 3),
    Benchmark('intervals', '--trials=100', 3),
  ),
  # In order of importance, because the time may end. Attention says first whether the kernels are right on this device.
  'accelerator': (
    Benchmark('attention', '--head_dim=128 --tokens=8192 --rounds=3', 1.5),
    Benchmark('mfu', '--row_length=4096 --rows=4 --rounds=3 --profile=profile', 2.5, 'mfu_4k'),
    Benchmark('mfu', '--row_length=14464 --rows=1 --rounds=3 --remat full dots_no_batch', 2, 'mfu_14k'),
    Benchmark('decode', '--preset=qwen2_5_7b --slots 128 --rounds=2', 2, 'decode_7b'),
    Benchmark('decode', '--preset=smollm2_135m --slots 128 --rounds=2', 1, 'decode_135m'),
    Benchmark('serve_load', '--seconds=3 --modes=packed', 1.5),
  ),
  'toy': (
    Benchmark('packing', minutes=3),
    Benchmark('mfu', '--preset=mini_tiny --row_length=128 --rounds=1 --peak=1e11', 3),
    Benchmark('scoring', '--preset=mini_tiny --groups=2 --group=3 --rounds=1', 3),
    Benchmark('decode', '--preset=mini_tiny --slots 2 --length=4 --rounds=1 --array=0.01', 3),
  ),
}


def run(benchmark: Benchmark, seconds: float) -> dict[str, Any]:
  """Run a benchmark for at most so many seconds, and return its entry."""
  command = [sys.executable, str(_HERE / f'{benchmark.script}.py'), *benchmark.arguments.split()]
  shown = f'python benchmarks/{benchmark.script}.py {benchmark.arguments}'.strip()
  entry = {'command': shown, 'date': f'{datetime.date.today()}', 'seconds': 0.0, 'table': [], 'result': None, 'missing': ''}
  absent = [name for name in benchmark.needs if _version(name) is None]
  if absent:
    return entry | {'missing': f'needs {", ".join(absent)}'}
  began = time.perf_counter()
  with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
    try:
      out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
      os.killpg(process.pid, signal.SIGKILL)  # and the processes that it started
      process.communicate()
      return entry | {'seconds': time.perf_counter() - began, 'missing': f'did not end within {seconds:.0f} s'}
  entry['seconds'] = time.perf_counter() - began
  lines = out.splitlines()
  if process.returncode or not lines:
    return entry | {'missing': f'ended with status {process.returncode}: {(err.strip().splitlines() or ["no message"])[-1][:300]}'}
  try:
    result = json.loads(lines[-1])
  except json.JSONDecodeError:
    return entry | {'missing': f'its last line is not a JSON object: {lines[-1][:100]!r}'}
  return entry | {'table': [line for line in lines[:-1] if line.startswith('|')], 'result': result}


def _version(package: str) -> str | None:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None


def machine() -> dict[str, Any]:
  """Return what the figures depend on. JAX is asked in a process of its own, which frees the device again."""
  code = 'import jax; d = jax.devices(); print(f"{len(d)} x {d[0].device_kind}")'
  asked = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False)
  cpu = next((line.split(':')[1].strip() for line in _lines('/proc/cpuinfo') if line.startswith('model name')), platform.processor())
  versions = {name: found for name in _PACKAGES if (found := _version(name))}
  cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
  return {
    'devices': asked.stdout.strip() or 'unknown',
    'cpu': f'{cores} cores of {cpu}',
    'python': platform.python_version(),
    'packages': versions,
  }


def _lines(path: str) -> list[str]:
  file = pathlib.Path(path)
  return file.read_text().splitlines() if file.exists() else []


def page(content: Mapping[str, Any]) -> str:
  """Return the tables of results as Markdown."""
  out = ['# Benchmarks', 'Generated by `python benchmarks/run_all.py --markdown=FILE` from its results.']
  for key, entry in content['benchmarks'].items():
    on = content['machines'][entry['machine']]
    where = f'{entry["date"]}, {on["devices"]}, {on["cpu"]}, ' + ', '.join(f'{k} {v}' for k, v in on['packages'].items())
    found = '\n'.join(entry['table']) if not entry['missing'] else f'No result: {entry["missing"]}.'
    out += [f'## {key}', f'`{entry["command"]}` ({entry["seconds"]:.0f} s; {where})', found]
  return '\n\n'.join(out) + '\n'


def main(given: Sequence[str] | None = None) -> None:
  """Run, write and print."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--profile', choices=PROFILES, default='cpu')
  parser.add_argument('--only', nargs='+', help='names of entries')
  parser.add_argument('--minutes', type=float, default=60.0, help='limit of all together')
  parser.add_argument('--output', type=pathlib.Path, default=_HERE / 'results.json')
  parser.add_argument('--markdown', type=pathlib.Path, help='also write the tables there')
  args = parser.parse_args(given)
  chosen = [b for b in PROFILES[args.profile] if args.only is None or b.key in args.only]
  unknown = set(args.only or ()) - {b.key for b in PROFILES[args.profile]}
  if unknown:
    parser.error(
      f'--only: {", ".join(sorted(unknown))} not in the profile {args.profile}: {", ".join(b.key for b in PROFILES[args.profile])}'
    )
  content = json.loads(args.output.read_text()) if args.output.exists() else {'machines': [], 'benchmarks': {}}
  on = machine()
  if on not in content['machines']:
    content['machines'].append(on)
  ends, rows = time.perf_counter() + 60 * args.minutes, []
  for benchmark in chosen:
    left = ends - time.perf_counter()
    entry = run(benchmark, min(60 * benchmark.minutes, max(left, 1.0)))
    content['benchmarks'][benchmark.key] = entry | {'machine': content['machines'].index(on), 'seconds': round(entry['seconds'], 1)}
    args.output.write_text(json.dumps(content, indent=1) + '\n')  # after each, so that nothing is lost if the rest is stopped
    print('\n'.join([f'== {entry["command"]}', *(entry['table'] or [entry['missing']])]), flush=True)
    rows.append((benchmark.key, f'{entry["seconds"]:.0f}', entry['missing'] or 'done'))
  print(timing.table(('benchmark', 'seconds', ''), rows))
  if args.markdown:
    args.markdown.write_text(page(content))
  print(json.dumps({key: content['benchmarks'][key]['result'] for key, *_ in rows}))


if __name__ == '__main__':
  main()
