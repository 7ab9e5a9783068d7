"""Model FLOP utilization of one training step of the reward model, on all devices of this process.

    python benchmarks/mfu.py                       # POLAR-1.8B in bfloat16; on a CPU, a miniature in float32
    python benchmarks/mfu.py --preset=polar_7b --rows=2 --remat=full --profile=profile

Rows are packed full of triplets. FLOPs are counted twice: by the rule of `polar_jax.model.flops`, and as two full causal sequences per
pair, which is the work that a trainer without shared prefixes would have done in the same time. A rematerialization policy that does not
fit into memory is reported in the table. The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
from typing import Any

from polar_jax.runtime.malloc import keep_freed_memory, runs_on_cpu

if runs_on_cpu():
  keep_freed_memory()

import jax
import numpy as np
import optax
import timing
from attention import draw_rows

from polar_jax import sharding
from polar_jax.config import REMAT_POLICIES, LoraConfig, MeshConfig, ModelConfig
from polar_jax.model import attention, flops
from polar_jax.model.presets import PRESETS
from polar_jax.train import step
from polar_jax.train.objectives import RANKING
from polar_jax.types import PairBatch

PROFILED_STEPS = 3


def measure(config: ModelConfig, batch: PairBatch, mesh: Any, rounds: int, profile: str | None) -> dict[str, Any]:
  """Return the seconds of every round, the GiB per device that the compiled step requests, and the peak GiB that a device had in use."""
  functions = step.build(RANKING, config, optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-5)), mesh)
  on_device = sharding.put_local(batch, mesh)
  compiled = functions.train.lower(functions.abstract, on_device).compile()
  memory = compiled.memory_analysis()
  state = functions.init(jax.random.key(0), None)
  losses = []

  def run() -> None:
    nonlocal state
    state, out = compiled(state, on_device)
    jax.block_until_ready(state)
    losses.append(float(out['scalars']['loss']))

  (seconds,) = timing.alternate({'step': run}, rounds).values()
  assert np.isfinite(losses).all(), f'the loss is {losses}'
  if profile:
    with jax.profiler.trace(os.path.join(profile, config.remat)):
      for _ in range(PROFILED_STEPS):
        run()
  in_use = (jax.local_devices()[0].memory_stats() or {}).get('peak_bytes_in_use')
  requested = memory.argument_size_in_bytes + memory.temp_size_in_bytes
  return {'seconds': seconds, 'compiled_gib': requested / 2**30, 'peak_gib': in_use and in_use / 2**30}


def parse_arguments() -> argparse.Namespace:
  on_cpu, devices = jax.default_backend() == 'cpu', jax.device_count()
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--preset', choices=PRESETS, default='mini_small' if on_cpu else 'polar_1_8b')
  parser.add_argument('--row_length', type=int, default=512 if on_cpu else 4_096)
  parser.add_argument('--rows', type=int, default=devices, help='rows per step, over all devices')
  parser.add_argument('--triplets', type=int, help='triplets per row (default: one for every 1,024 tokens)')
  # In order of memory use, because the peak of a device is that of the whole process.
  default = ['none'] if on_cpu else ['full', 'dots_no_batch', 'dots']
  parser.add_argument('--remat', nargs='+', choices=REMAT_POLICIES, default=default)
  parser.add_argument('--rounds', type=int, default=7)
  parser.add_argument('--profile', metavar='DIR', help=f'write a trace of {PROFILED_STEPS} steps to DIR')
  parser.add_argument('--peak', type=float, help='dense bfloat16 FLOP/s of one device (default: of its data sheet; a CPU is measured)')
  args = parser.parse_args()
  args.triplets = args.triplets or max(args.row_length // 1_024, 1)
  args.dtype = 'float32' if on_cpu else 'bfloat16'
  return args


def main() -> None:
  args = parse_arguments()
  shape = {'vocab_size': 1_024} | PRESETS[args.preset]
  config = ModelConfig(**shape, v_head_init='normal', compute_dtype=args.dtype)
  batch = draw_rows(args.rows, args.row_length, args.triplets)
  device, devices = jax.devices()[0], jax.device_count()
  peak, source = (args.peak, '--peak') if args.peak else flops.peak_flops(device)
  peak *= devices
  by_rule, as_two = (3 * count(config, batch) for count in (flops.reward_model_flops, flops.two_sequences_flops))
  tokens = int((batch.end_BT > batch.start_BT).sum())
  print(f'{devices} x {device.device_kind}; {args.preset}, {args.dtype}, attention {attention.choose("auto")}')
  print(f'{args.rows} rows of {args.row_length:,} tokens with {args.triplets} triplets each: {tokens:,} tokens per step')
  print(f'peak {peak / 1e12:,.3g} TFLOP/s: {source}\nrule: {flops.mfu_rule(LoraConfig())}')
  rows, by_policy = [], {}
  mesh = sharding.make_mesh(MeshConfig())
  with jax.set_mesh(mesh):
    for remat in args.remat:
      try:
        measured = measure(dataclasses.replace(config, remat=remat), batch, mesh, args.rounds, args.profile)
      except jax.errors.JaxRuntimeError as error:
        if 'RESOURCE_EXHAUSTED' not in str(error):
          raise
        rows.append((remat, 'out of memory', *[''] * 6))
        by_policy[remat] = None
        continue
      seconds = statistics.median(measured['seconds'])
      results = {'mfu': by_rule / seconds / peak, 'mfu_as_two_sequences': as_two / seconds / peak, 'tokens_per_second': tokens / seconds}
      results |= {'seconds': seconds, 'compiled_gib': measured['compiled_gib'], 'peak_gib': measured['peak_gib']}
      by_policy[remat] = {k: v and float(f'{v:.4g}') for k, v in results.items()}
      mfus = [f'{100 * results[k]:.1f}' for k in ('mfu', 'mfu_as_two_sequences')]
      used = '' if measured['peak_gib'] is None else f'{measured["peak_gib"]:.2f}'
      speed = (f'{tokens / seconds:,.0f}', f'{by_rule / seconds / 1e12:.3g}')
      rows.append((remat, timing.milliseconds(measured['seconds']), *mfus, *speed, f'{measured["compiled_gib"]:.2f}', used))
  header = ('remat', 'ms per step: median [range]', 'MFU, %', 'as two sequences, %', 'tokens/s', 'TFLOP/s', 'GiB compiled', 'GiB peak')
  print(timing.table(header, rows))
  timing.report(
    remat=by_policy,
    flops_saved=1 - by_rule / as_two,
    preset=args.preset,
    row_length=args.row_length,
    rows=args.rows,
    triplets_per_row=args.triplets,
    backend=attention.choose('auto'),
    dtype=args.dtype,
    device=device.device_kind,
    devices=devices,
    peak_flops=peak,
  )


if __name__ == '__main__':
  main()
