"""Properties of the TPU kernels alone: skipped blocks, and compilation without a TPU."""

from __future__ import annotations

import functools
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from polar_jax.model.attention import reference, tpu

BLOCK = 8
attend = functools.partial(tpu.attend, blocks=tpu.Blocks(BLOCK, BLOCK), interpret=True)


@functools.partial(jax.jit, static_argnums=0)
def _values_and_gradients(attend, case):
  q, k, v, start, end, out_gradient, lse_gradient = case
  primals, pull = jax.vjp(lambda q, k, v: attend(q, k, v, start, end), q, k, v)
  return *primals, *pull((out_gradient, lse_gradient))


def _blocks_seen(case, query_block, keys):
  """Return intervals that give all queries of a block the same keys."""
  for b in range(case[3].shape[0]):
    case[3][b, query_block * BLOCK : (query_block + 1) * BLOCK], case[4][b, query_block * BLOCK : (query_block + 1) * BLOCK] = keys


def _with_nan(case, arrays, tokens):
  at = tokens[None, :, None]
  return tuple(np.where(at if a.ndim == 3 else at[..., None], np.nan, a) if i in arrays else a for i, a in enumerate(case))


@pytest.mark.long
@pytest.mark.parametrize('blocks', [tpu.Blocks(16, 8), tpu.Blocks(8, 32), tpu.Blocks(128, 128)])
def test_windows_over_several_blocks(blocks, make_case, assert_matches_oracle):
  case = make_case(11, queries=35, keys=60, heads=4, kv_heads=2, dim=64)
  case[3][:] = np.arange(35) + np.arange(2)[:, None] * 5
  case[4][:] = np.minimum(case[3] + 21, 60)
  assert_matches_oracle(functools.partial(tpu.attend, blocks=blocks, interpret=True), case)


@pytest.mark.parametrize('keys', [1, 20])
def test_one_query_a_row(keys, make_case, assert_matches_oracle):
  case = make_case(12, queries=3, keys=keys, dim=64)
  assert_matches_oracle(attend, tuple(a[:, :1] if i in (0, 3, 4, 5, 6) else a for i, a in enumerate(case)))


@pytest.mark.long
@pytest.mark.parametrize('dim', [32, 80, 160])
def test_head_dimensions_are_padded(dim, make_case, assert_matches_oracle):
  assert_matches_oracle(attend, make_case(13, dim=dim))


def test_intervals_end_with_the_keys(make_case):
  q, k, v, start, end, *_ = make_case(14, dim=64)
  beyond = end == k.shape[1]
  assert beyond.any()
  got, wanted = attend(q, k, v, np.where(start == 0, -5, start), end + 50 * beyond), attend(q, k, v, start, end)
  jax.tree.map(np.testing.assert_array_equal, got, wanted)


def test_blocks_of_keys_without_a_query_are_not_read(make_case):
  case = make_case(15, queries=3 * BLOCK, keys=6 * BLOCK - 3, dim=64)
  _blocks_seen(case, 0, (BLOCK, 2 * BLOCK))
  _blocks_seen(case, 1, (3 * BLOCK + 1, 5 * BLOCK - 1))
  _blocks_seen(case, 2, (0, 0))
  wanted = _values_and_gradients(attend, case)
  unseen = np.isin(np.arange(6 * BLOCK - 3) // BLOCK, (0, 2, 5))
  got = _values_and_gradients(attend, _with_nan(case, (1, 2), unseen))
  jax.tree.map(np.testing.assert_array_equal, got, wanted)
  for gradient in got[3:]:
    np.testing.assert_array_equal(gradient[:, unseen], 0)
    assert np.isfinite(gradient).all() and np.any(gradient[:, ~unseen])


def test_blocks_of_queries_without_a_key_are_not_read(make_case):
  """This includes blocks between others that do see keys, such as padding inside a row of packed triplets."""
  case = make_case(16, queries=4 * BLOCK, keys=2 * BLOCK, dim=64)
  for i, keys in enumerate([(2, 9), (0, 0), (5, 12), (0, 0)]):
    _blocks_seen(case, i, keys)
  wanted = _values_and_gradients(attend, case)
  empty = np.isin(np.arange(4 * BLOCK) // BLOCK, (1, 3))
  jax.tree.map(np.testing.assert_array_equal, _values_and_gradients(attend, _with_nan(case, (0, 5, 6), empty)), wanted)


def test_ranges_of_blocks():
  rng = np.random.default_rng(0)
  a, b = np.sort(rng.integers(0, 41, (2, 3, 24)), axis=0).astype(np.int32)
  b[:, 8:16] = np.minimum(b, a + 3)[:, 8:16]
  a[1, 16:], b[1, 16:] = 7, 7
  low, high = tpu.key_ranges(jnp.stack([a, b], 1), 8, 4)
  first, after = tpu.query_ranges(low, high, 10)
  for row in range(3):
    needed = np.zeros((3, 10), bool)
    for y in range(3):
      keys = [s // 4 for t in range(8 * y, 8 * y + 8) for s in range(a[row, t], b[row, t])]
      assert (low[row, y], high[row, y]) == ((min(keys), max(keys) + 1) if keys else (0, 0))
      needed[y, low[row, y] : high[row, y]] = True
    for x in range(10):
      queries = np.flatnonzero(needed[:, x])
      assert (first[row, x], after[row, x]) == ((queries[0], queries[-1] + 1) if queries.size else (0, 0))


def test_steps_past_a_range_copy_nothing():
  """A copy happens when the block of a step differs from that of the step before."""
  assert [int(tpu.block_at(jnp.int32(step), jnp.int32(3), jnp.int32(6))) for step in range(6)] == [3, 4, 5, 5, 5, 5]
  assert [int(tpu.block_at(jnp.int32(step), jnp.int32(0), jnp.int32(0))) for step in range(3)] == [0, 0, 0]


def test_time_follows_the_intervals(make_case):
  """The simulated chip: blocks in any order, memory that starts as NaN, and as many steps as blocks that see each other."""
  steps = []

  def count(token, grid_point, core):
    steps.append(grid_point)
    return token

  case = make_case(17, batch=1, queries=4 * BLOCK, keys=4 * BLOCK, heads=2, kv_heads=1, dim=64)
  for i in range(4):
    _blocks_seen(case, i, (i * BLOCK, (i + 1) * BLOCK - i))
  chip = pltpu.InterpretParams(random_seed=0, uninitialized_memory='nan', out_of_bounds_reads='raise', grid_point_recorder=count)
  got = _values_and_gradients(functools.partial(attend, interpret=chip), case)
  jax.block_until_ready(got)
  assert len(steps) == 3 * 2 * 4  # forward, dq and dkv; heads; blocks, where all pairs of blocks would be 4 * 4
  for a, b in zip(got, _values_and_gradients(reference.attend, case), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_unsupported_shapes_and_dtypes_are_refused(make_case):
  q, k, v, start, end, *_ = make_case(18, dim=64)
  with pytest.raises(ValueError, match=r'float16.*takes all float32 or all bfloat16'):
    attend(q.astype(np.float16), k, v, start, end)
  with pytest.raises(ValueError, match='320 is above 256'):
    attend(*(np.tile(a, 5) for a in (q, k, v)), start, end)
  with pytest.raises(ValueError, match='multiples of 128'):
    attend(q, k, v, start, end, interpret=False)


@pytest.mark.long
@pytest.mark.needs('libtpu')
@pytest.mark.parametrize(
  'others',
  [
    pytest.param(['1000,1300,4,2,128,float32'], id='ragged'),
    pytest.param(['4096,4096,4,2,64,float32', '4096,4096,4,2,128,bfloat16'], id='aligned', marks=pytest.mark.slow),
  ],
)
def test_compiles_for_a_tpu_in_memory_linear_in_length(others):
  long = '16384,16384,4,2,64,bfloat16'
  cases = [*others, long]
  script = pathlib.Path(__file__).with_name('compile_for_tpu.py')
  environment = os.environ | {'PYTHONPATH': str(script.parents[3])}
  done = subprocess.run([sys.executable, script, 'v5p:2x2x1', *cases], env=environment, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0, done.stderr[-3000:]
  results = {line['case']: line for line in map(json.loads, done.stdout.splitlines())}
  assert list(results) == cases
  # Forward, dq and dkv: rematerialization did not repeat the forward pass.
  assert all(result['kernels'] == 3 for result in results.values())
  # The arguments are linear in length; the logits of a single head would take 40 times as much.
  assert results[long]['temporary_bytes'] < 4 * results[long]['argument_bytes']
