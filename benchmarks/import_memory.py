"""Host memory that importing a checkpoint takes in addition to its parameters, for a generated checkpoint of real shapes.

    python benchmarks/import_memory.py
    python benchmarks/import_memory.py --preset=qwen2_5_7b --folder=/big/disk

Writes the checkpoint (random weights, bfloat16, safetensors files of at most 2 GB; also as pytorch_model.bin if torch is installed) and
imports it in fresh processes: onto one device as stored, cast to float32, and onto eight simulated devices. Measures the peak resident
memory, including pages of mapped files, minus that before the import and minus the parameters. The limit is 1.3 times the largest stored
tensor plus 1 GiB. The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

import ml_dtypes
import numpy as np
import timing
from memory import resident

from polar_jax.checkpoints import config_json, families
from polar_jax.checkpoints.formats import storage
from polar_jax.config import ModelConfig
from polar_jax.model import presets

_GIB = 2**30


def generate(model: ModelConfig, folder: pathlib.Path) -> int:
  """Write a reward model as a Hugging Face folder, and return the bytes of the largest tensor."""
  folder.mkdir(parents=True)
  (folder / 'config.json').write_text(json.dumps(config_json.to_json(model, 'reward', dtype='bfloat16', reward_token_id=92_527)))
  stored = families.stored_tensors(model, 'reward')
  sizes = {s.name: 2 * int(np.prod(s.shape)) for s in stored}
  writer, rng = storage.SafetensorsWriter(folder, sizes, 2 * 10**9), np.random.default_rng(0)
  for s in stored:
    writer.add(s.name, (rng.standard_normal(s.shape, np.float32) * 0.02).astype(ml_dtypes.bfloat16))
  writer.close()
  return max(sizes.values())


def as_torch_files(folder: pathlib.Path, target: pathlib.Path) -> bool:
  """Write the same model as pytorch_model-*.bin, and return whether torch is installed to do so."""
  try:
    import torch
    from safetensors.torch import load_file
  except ImportError:
    return False
  target.mkdir()
  (target / 'config.json').write_bytes((folder / 'config.json').read_bytes())
  files = sorted(folder.glob('*.safetensors'))
  for i, file in enumerate(files, 1):
    torch.save(load_file(file), target / f'pytorch_model-{i:05}-of-{len(files):05}.bin')
  return True


def measure(folder: str, dtype: str | None) -> None:
  """Import `folder` in this process, and print memory and time. Runs in a process of its own."""
  import jax

  from polar_jax import sharding
  from polar_jax.checkpoints import pretrained
  from polar_jax.config import MeshConfig
  from polar_jax.runtime import malloc

  malloc.keep_freed_memory()  # as the command line does
  opened = pretrained.open_pretrained(folder)
  mesh = sharding.make_mesh(MeshConfig())
  jax.block_until_ready(jax.jit(lambda: jax.numpy.ones(3))())
  before, started = resident()['VmRSS'], time.perf_counter()
  params = jax.block_until_ready(opened.params(mesh, dtype))
  seconds = time.perf_counter() - started
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
  print(json.dumps({'beyond': resident()['VmHWM'] - before - size, 'parameters': size, 'seconds': seconds}))


def run(folder: pathlib.Path, dtype: str | None, devices: int) -> dict[str, Any]:
  """Run `measure` in a fresh process with `devices` simulated devices, and return what it printed."""
  environment = os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}'}
  command = [sys.executable, __file__, '--measure', str(folder), '--dtype', dtype or '']
  process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
  if process.returncode:
    sys.exit(process.stderr)
  return json.loads(process.stdout.splitlines()[-1])


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument('--preset', default='polar_1_8b', choices=sorted(presets.PRESETS))
  parser.add_argument('--folder', help='where to write the checkpoint (default: a temporary folder)')
  parser.add_argument('--measure', help=argparse.SUPPRESS)
  parser.add_argument('--dtype', default='', help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.measure:
    return measure(args.measure, args.dtype or None)
  with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
    stored, pickled = pathlib.Path(temporary, 'safetensors'), pathlib.Path(temporary, 'bin')
    largest = generate(ModelConfig(**presets.PRESETS[args.preset]), stored)
    limit = int(1.3 * largest) + _GIB
    cases: list[tuple[str, pathlib.Path, str | None, int]] = [
      ('safetensors, as stored', stored, None, 1),
      ('safetensors, to float32', stored, 'float32', 1),
      ('safetensors, as stored, 8 devices', stored, None, 8),
    ]
    if as_torch_files(stored, pickled):
      cases.append(('torch .bin, as stored', pickled, None, 1))
    results = {name: run(folder, dtype, devices) for name, folder, dtype, devices in cases}
  gib = lambda size: f'{size / _GIB:.2f}'
  rows = [(name, gib(r['parameters']), gib(r['beyond']), f'{r["seconds"]:.1f}') for name, r in results.items()]
  print(timing.table(('import', 'parameters, GiB', 'additional, GiB', 'seconds'), rows))
  print(f'largest tensor {gib(largest)} GiB; limit {gib(limit)} GiB')
  timing.report(
    preset=args.preset,
    limit_gib=limit / _GIB,
    within=all(r['beyond'] < limit for r in results.values()),
    **{name.replace(', ', '_').replace(' ', '_').replace('.', ''): r['beyond'] / _GIB for name, r in results.items()},
  )


if __name__ == '__main__':
  main()
