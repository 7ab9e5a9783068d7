"""Scaling of cost: time with packing, memory with row length, compilation with depth.

    python benchmarks/costs.py

Three tables: seconds of a training step per token, for rows of 1 to 16 triplets; temporary memory of the compiled gradient per token, for
rows of 1,024 to 16,384 tokens; seconds to compile the training step, for 2 to 32 layers. Each column should be flat: the JSON object in
the last line holds its largest value over its smallest.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import time
from typing import Any

from polar_jax.runtime.malloc import keep_freed_memory, runs_on_cpu

if runs_on_cpu():
  keep_freed_memory()

import jax
import jax.numpy as jnp
import numpy as np
import optax
import timing
from attention import draw_rows
from flax import nnx

from polar_jax import sharding
from polar_jax.config import MeshConfig, ModelConfig
from polar_jax.model import attention
from polar_jax.model.heads import abstract_model
from polar_jax.train import step
from polar_jax.train.objectives import RANKING
from polar_jax.types import PairBatch

MODEL = ModelConfig(
  vocab_size=1_024, num_layers=4, d_model=256, d_ff=768, num_heads=4, num_kv_heads=2, head_dim=64, v_head_init='normal', scan_unroll=1
)
TRIPLET, TOKENS = 128, 2_048  # tokens of a triplet, tokens of a step
PACKING = (1, 2, 4, 8, 16)
LENGTHS, LONGEST_REFERENCE = (1_024, 2_048, 4_096, 8_192, 16_384), 4_096
DEPTHS = (2, 4, 8, 16, 32)


def spread(values: Any) -> float:
  """Return the largest over the smallest value; 1 means flat."""
  return max(values) / min(values)


def build(config: ModelConfig, mesh: Any) -> step.StepFunctions:
  return step.build(RANKING, config, optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-5)), mesh)


class Step:
  """A training step that is repeated on one batch."""

  def __init__(self, batch: PairBatch, mesh: Any):
    functions = build(MODEL, mesh)
    self._state, self._batch, self._train = functions.init(jax.random.key(0), None), sharding.put_local(batch, mesh), functions.train
    self.losses: list[float] = []

  def __call__(self) -> None:
    self._state, out = self._train(self._state, self._batch)
    jax.block_until_ready(self._state)
    self.losses.append(float(out['scalars']['loss']))


def time_per_token(mesh: Any, rounds: int) -> float:
  """Time the same triplets from one per row to all in one row, and return the spread of the medians."""
  steps = {n: Step(draw_rows(TOKENS // (n * TRIPLET), n * TRIPLET, n), mesh) for n in PACKING}
  seconds = timing.alternate(steps, rounds)
  losses = [s.losses[0] for s in steps.values()]
  assert spread(losses) < 1 + 1e-4, f'packing changed the loss: {losses}'
  rows = [
    (n, n * TRIPLET, TOKENS // (n * TRIPLET), timing.milliseconds(v), f'{statistics.median(v) / TOKENS * 1e6:.1f}')
    for n, v in seconds.items()
  ]
  header = ('triplets in a row', 'tokens of a row', 'rows', 'ms per step: median [range]', 'us per token')
  print(timing.table(header, rows), end='\n\n', flush=True)
  return spread([statistics.median(v) for v in seconds.values()])


def abstract_batch(row_length: int, mesh: Any, rows: int = 1) -> PairBatch:
  """Return the shapes of `rows` rows with one triplet each."""
  array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.batch_sharding(mesh))
  row = array(jnp.int32, rows, row_length)
  return PairBatch(row, row, row, row, array(jnp.int32, rows, 1, 2), array(jnp.float32, rows, 1), array(jnp.int32, rows, 1))


def gradient_memory(config: ModelConfig, row_length: int, mesh: Any) -> int:
  """Return the bytes that the compiled gradient of one row needs in addition to parameters, batch and gradients."""
  graphdef, _ = nnx.split(abstract_model(config, 'reward'))
  loss = lambda params, batch: RANKING.loss_sums(nnx.merge(graphdef, params), batch)[0]
  rows = sharding.batch_shards(mesh)
  lowered = jax.jit(jax.grad(loss)).lower(build(config, mesh).abstract.params, abstract_batch(row_length, mesh, rows))
  return lowered.compile().memory_analysis().temp_size_in_bytes


def memory_per_token(mesh: Any) -> tuple[float, float, dict[str, float]]:
  """Return (spread for the backend that 'auto' chooses, spread for the reference over its lengths, bytes per token of the former)."""
  auto = attention.choose('auto')
  by_backend: dict[str, dict[int, float]] = {auto: {}, 'reference': {}}
  rows = []
  for name, per_token in by_backend.items():
    config = dataclasses.replace(MODEL, attention=name, remat='full')
    for length in LENGTHS:
      if name == 'reference' and length > LONGEST_REFERENCE:
        continue
      size = gradient_memory(config, length, mesh)
      per_token[length] = size / length
      rows.append((name, f'{length:,}', f'{size / 2**20:,.1f}', f'{per_token[length] / 1024:,.1f}'))
  print(timing.table(('attention', 'tokens of the row', 'temporary MiB', 'KiB per token'), rows), end='\n\n', flush=True)
  return (
    spread(by_backend[auto].values()),
    spread(by_backend['reference'].values()),
    {str(n): round(v) for n, v in by_backend[auto].items()},
  )


def compile_once(layers: int, mesh: Any) -> tuple[float, float, tuple[int, int, int]]:
  """Return (seconds to trace and lower, seconds to compile, lines of the jaxpr, the lowered and the compiled program)."""
  jax.clear_caches()
  functions = build(dataclasses.replace(MODEL, num_layers=layers), mesh)
  batch = abstract_batch(512, mesh, sharding.batch_shards(mesh))
  began = time.perf_counter()
  traced = functions.train.trace(functions.abstract, batch)
  lowered = traced.lower()
  lowered_at = time.perf_counter()
  compiled = lowered.compile()
  compiled_at = time.perf_counter()
  lines = tuple(str(text).count('\n') for text in (traced.jaxpr, lowered.as_text(), compiled.as_text()))
  return lowered_at - began, compiled_at - lowered_at, lines


def compile_seconds(mesh: Any, rounds: int) -> tuple[float, float, float]:
  """Return the spread over depths of (seconds, lines of the compiled program, lines of the lowered program)."""
  by_depth = {layers: [] for layers in DEPTHS}
  for _ in range(rounds):
    for layers, results in by_depth.items():
      results.append(compile_once(layers, mesh))
  rows, totals = [], {}
  for layers, results in by_depth.items():
    lowering, compiling = ([r[i] for r in results] for i in range(2))
    totals[layers] = statistics.median(np.add(lowering, compiling).tolist())
    sizes = [f'{n:,}' for n in results[0][2]]
    rows.append((layers, f'{statistics.median(lowering):.2f}', f'{statistics.median(compiling):.2f}', f'{totals[layers]:.2f}', *sizes))
  print(timing.table(('layers', 's lowering', 's compiling', 's both', 'jaxpr lines', 'StableHLO lines', 'HLO lines'), rows))
  lowered_lines, compiled_lines = ([results[0][2][i] for results in by_depth.values()] for i in (1, 2))
  return spread(totals.values()), spread(compiled_lines), spread(lowered_lines)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--rounds', type=int, default=7, help='rounds of training steps')
  parser.add_argument('--compilations', type=int, default=3, help='compilations per depth')
  args = parser.parse_args()
  jax.config.update('jax_enable_compilation_cache', False)
  device = jax.devices()[0].device_kind
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  print(f'{device}, {len(os.sched_getaffinity(0))} CPU cores, {MODEL.compute_dtype}, {MODEL.num_layers} layers of width {MODEL.d_model}\n')
  with jax.set_mesh(mesh):
    time_spread = time_per_token(mesh, args.rounds)
    memory_spread, reference_spread, bytes_per_token = memory_per_token(mesh)
    seconds_spread, compiled_spread, lowered_spread = compile_seconds(mesh, args.compilations)
  timing.report(
    time_per_token_spread=time_spread,
    memory_per_token_spread=memory_spread,
    reference_memory_per_token_spread=reference_spread,
    compile_seconds_spread=seconds_spread,
    compiled_size_spread=compiled_spread,
    lowered_size_spread=lowered_spread,
    bytes_per_token=bytes_per_token,
    backend=attention.choose('auto'),
    device=device,
  )


if __name__ == '__main__':
  main()
