"""One attention layer, forward and with its gradient, for every backend that runs on this device.

    python benchmarks/attention.py

Measures causal rows, and rows packed with triplets with shared prefixes, where a backend saves time by skipping masked tiles. Every call
processes the same number of tokens, so longer rows are fewer. Backends take turns in one process. The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import functools
import os
import statistics
from collections.abc import Callable
from typing import Any

from polar_jax.runtime.malloc import keep_freed_memory, runs_on_cpu

if runs_on_cpu():
  keep_freed_memory()

import jax
import jax.numpy as jnp
import numpy as np
import timing

from polar_jax.data.layout import Segment, pair_batch, pair_segment
from polar_jax.model import attention
from polar_jax.types import PairBatch

HEADS, KV_HEADS, PER_ROW = 8, 4, 4
KINDS, CALLS = ('causal', 'packed'), ('forward', 'gradient')


def draw_triplet(rng: np.random.Generator, length: int, vocabulary: int) -> Segment:
  """Return a triplet of `length` tokens (at least 5): three fifths are the prefix (prompt, reference, prompt), one fifth each candidate."""
  tail = length // 5
  prefix, chosen, rejected = (rng.integers(10, vocabulary, n) for n in (length - 2 * tail, tail, tail))
  chosen[0], rejected[0] = 1, 2  # candidates differ from their first token on, the worst case for sharing
  chosen[-1] = rejected[-1] = 3 if tail > 1 else chosen[-1]
  return pair_segment(np.concatenate([prefix, chosen]), np.concatenate([prefix, rejected]))


def draw_rows(rows: int, row_length: int, per_row: int, *, vocabulary: int = 1_000, vary: bool = False) -> PairBatch:
  """Return rows of `per_row` triplets that fill the row, or with `vary` are up to a fifth shorter, so that the row ends in padding."""
  rng = np.random.default_rng(0)
  longest = row_length // per_row
  lengths = rng.integers(longest - longest // 5, longest + 1, rows * per_row) if vary else [longest] * (rows * per_row)
  triplets = [draw_triplet(rng, int(n), vocabulary) for n in lengths]
  packed = np.arange(len(triplets)).reshape(rows, per_row).tolist()
  return pair_batch(triplets, range(len(triplets)), packed, row_length, per_row)


def intervals(kind: str, rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
  """Return (start_BT, end_BT), the interval of keys that each query attends to."""
  if kind == 'packed':
    batch = draw_rows(rows, length, PER_ROW, vary=True)
    return batch.start_BT, batch.end_BT
  end_BT = np.broadcast_to(np.arange(1, length + 1, dtype=np.int32), (rows, length))
  return np.zeros_like(end_BT), end_BT


def functions(backend: str) -> dict[str, Callable[..., Any]]:
  """Return the jitted functions by call. The gradient call also returns the output, and drops the log-sum-exp, as the model does."""
  run = lambda q, k, v, start, end: attention.BACKENDS[backend](q, k, v, start, end)[0]

  def gradient(q, k, v, start, end, d_out):
    out, pull = jax.vjp(lambda q, k, v: run(q, k, v, start, end), q, k, v)
    return out, *pull(d_out)

  return {'forward': jax.jit(lambda *arrays: run(*arrays[:5])), 'gradient': jax.jit(gradient)}


def check(backends: dict[str, dict[str, Callable[..., Any]]], arrays: tuple[jax.Array, ...]) -> None:
  """Assert that the output and gradients of every backend agree with the reference, if that runs."""
  if 'reference' not in backends:
    return
  tolerance = 1e-4 if arrays[0].dtype == jnp.float32 else 5e-2
  expected = backends['reference']['gradient'](*arrays)
  for name, calls in backends.items():
    for got, want in zip(calls['gradient'](*arrays), expected, strict=True):
      difference = float(jnp.max(jnp.abs(got.astype(jnp.float32) - want.astype(jnp.float32))))
      scale = float(jnp.max(jnp.abs(want)))
      assert difference <= tolerance * max(scale, 1.0), f'{name} differs from the reference by {difference:.1e}, at a scale of {scale:.1e}'


def draw_arrays(kind: str, length: int, args: argparse.Namespace) -> tuple[tuple[jax.Array, ...], float]:
  """Return ((q, k, v, start, end, gradient of the output), number of query-key pairs that are attended to)."""
  rows = max(args.tokens // length, 1)
  start, end = intervals(kind, rows, length)
  keys = jax.random.split(jax.random.key(0), 4)
  heads = (HEADS, KV_HEADS, KV_HEADS, HEADS)
  q, k, v, d_out = (jax.random.normal(key, (rows, length, n, args.head_dim), args.dtype) for key, n in zip(keys, heads, strict=True))
  return (q, k, v, *jax.device_put((start, end)), d_out), float((end - start).sum())


def measure(length: int, names: list[str], args: argparse.Namespace) -> dict[tuple[str, str, str], dict[str, Any]]:
  """Return, by (kind of rows, backend, call): seconds per round, speed-up over the reference, and GFLOP/s of the pairs attended to."""
  backends = {name: functions(name) for name in names}
  drawn = {kind: draw_arrays(kind, length, args) for kind in KINDS}
  for arrays, _ in drawn.values():
    check(backends, arrays)
  results = {}
  for call in CALLS:
    steps = {(kind, name): functools.partial(_wait, backends[name][call], drawn[kind][0]) for kind in KINDS for name in names}
    seconds = timing.alternate(steps, args.rounds)
    for (kind, name), values in seconds.items():
      flops = (4 if call == 'forward' else 12) * HEADS * args.head_dim * drawn[kind][1]
      speedup = timing.ratio(seconds[kind, 'reference'], values) if 'reference' in names else None
      results[kind, name, call] = {'seconds': values, 'speedup': speedup, 'gflops': flops / statistics.median(values) / 1e9}
  return results


def _wait(run: Callable[..., Any], arrays: tuple[jax.Array, ...]) -> None:
  jax.block_until_ready(run(*arrays))


def parse_arguments() -> argparse.Namespace:
  on_cpu = jax.default_backend() == 'cpu'
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--head_dim', type=int, choices=(64, 128), default=64)
  parser.add_argument('--tokens', type=int, default=4_096 if on_cpu else 16_384, help='tokens per call')
  parser.add_argument('--rounds', type=int, default=5)
  args = parser.parse_args()
  args.dtype = jnp.dtype('float32' if on_cpu else 'bfloat16')
  args.lengths = [256, 512, 1_024, 2_048, 4_096] + ([] if on_cpu else [8_192, 16_384])
  args.longest_reference = 2_048 if on_cpu else 4_096
  return args


def main() -> None:
  args = parse_arguments()
  auto = attention.choose('auto')
  names = ['reference', 'chunked', *({auto} - {'chunked'})]
  device = jax.devices()[0].device_kind
  heads = f'{HEADS} heads, {KV_HEADS} key/value heads of dimension {args.head_dim}'
  print(f'{device}, {len(os.sched_getaffinity(0))} CPU cores, {args.dtype}, {heads}')
  rows, results = [], {}
  for length in args.lengths:
    runnable = [name for name in names if name != 'reference' or length <= args.longest_reference]
    for (kind, name, call), result in measure(length, runnable, args).items():
      results[length, kind, name, call] = result
      speedup = '' if result['speedup'] is None else f'{result["speedup"]:.2f}'
      rows.append((length, kind, name, call, timing.milliseconds(result['seconds']), speedup, f'{result["gflops"]:,.1f}'))
  print(timing.table(('tokens of a row', 'rows', 'backend', 'call', 'ms: median [range]', 'speed-up', 'GFLOP/s'), rows))

  def by_length(metric: Callable[[int, str, str], float | None]) -> dict[str, dict[str, float]]:
    by_call = {n: {f'{kind} {call}': metric(n, kind, call) for kind in KINDS for call in CALLS} for n in args.lengths}
    return {str(n): {k: round(v, 2) for k, v in values.items()} for n, values in by_call.items() if None not in values.values()}

  skipping = lambda n, call: timing.ratio(*(results[n, kind, auto, call]['seconds'] for kind in KINDS))
  timing.report(
    speedup_vs_reference=by_length(lambda n, kind, call: results[n, kind, auto, call]['speedup']),
    gflops=by_length(lambda n, kind, call: results[n, kind, auto, call]['gflops']),
    packed_speedup_vs_causal={str(n): {call: round(skipping(n, call), 2) for call in CALLS} for n in args.lengths},
    backend=auto,
    device=device,
    dtype=str(args.dtype),
    head_dim=args.head_dim,
    tokens=args.tokens,
    rounds=args.rounds,
  )


if __name__ == '__main__':
  main()
