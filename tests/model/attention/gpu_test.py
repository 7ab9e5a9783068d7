"""tokamax's kernels behind the one interface.

On a CPU: the construction around them with tokamax's XLA operator, the Triton kernels interpreted, and that every kernel lowers
for CUDA. With a GPU (`JAX_PLATFORMS=cuda python -m pytest tests/model/attention/gpu_test.py`): the kernels themselves.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import re
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from jax import export
from jax.experimental import pallas as pl

from polar_jax.data import layout
from polar_jax.model.attention import gpu, reference
from polar_jax.types import UserError


def _gpus() -> list[jax.Device]:
  try:
    return jax.devices('gpu')
  except RuntimeError:
    return []


needs_tokamax = pytest.mark.needs('tokamax')
needs_gpu = pytest.mark.skipif(not _gpus(), reason='needs an NVIDIA GPU and JAX_PLATFORMS=cuda')
needs_cpu = pytest.mark.skipif(bool(_gpus()), reason='kernels are interpreted on CPU only')


@pytest.fixture(autouse=True)
def exact_products():
  """A GPU would multiply float32 as TF32."""
  with jax.default_matmul_precision('highest'):
    yield


# --- the code around the kernels, on any device ---


@pytest.fixture
def attend_with_xla():
  from tokamax._src.ops.attention import base

  return functools.partial(gpu.attend_with, base.DotProductAttention(vjp=base.DotProductAttentionVjp()))


@needs_tokamax
@pytest.mark.parametrize(('dim', 'heads', 'kv_heads'), [(64, 6, 2), (128, 4, 1)])
def test_matches_the_oracle(attend_with_xla, dim, heads, kv_heads, make_case, assert_matches_oracle):
  assert_matches_oracle(attend_with_xla, make_case(dim, heads=heads, kv_heads=kv_heads, dim=dim))


@needs_tokamax
def test_packed_rows_in_bfloat16(attend_with_xla, make_case, assert_matches_oracle):
  case = make_case(3, queries=45, keys=45, dim=64, packed=True, dtype=jnp.bfloat16)
  assert_matches_oracle(attend_with_xla, case, atol=3e-2)


@needs_tokamax
@pytest.mark.parametrize('used', ['out', 'lse'])
def test_gradient_through_one_output(attend_with_xla, used, make_case, assert_matches_oracle):
  """The other output's gradient is a symbolic zero, which has a path of its own."""
  *case, out_gradient, lse_gradient = make_case(7, dim=64)
  stop = jax.lax.stop_gradient

  def attend(*arrays):
    out, lse = attend_with_xla(*arrays)
    return (out, stop(lse)) if used == 'out' else (stop(out), lse)

  zeroed = (out_gradient, 0 * lse_gradient) if used == 'out' else (0 * out_gradient, lse_gradient)
  assert_matches_oracle(attend, (*case, *zeroed))


@needs_tokamax
def test_empty_intervals_give_zeros_and_no_gradient(attend_with_xla, make_case):
  q, k, v, start, _, out_gradient, lse_gradient = make_case(1, dim=64)
  nowhere = np.full_like(start, 4)
  (out, lse), pull = jax.vjp(lambda q, k, v: attend_with_xla(q, k, v, nowhere, nowhere), q, k, v)
  for array in (out, *pull((out_gradient, lse_gradient))):
    np.testing.assert_array_equal(array, 0)
  np.testing.assert_array_equal(lse, np.float32(reference.EMPTY))


@needs_tokamax
def test_arguments_of_the_program_are_left_alone(attend_with_xla, make_case, monkeypatch):
  q, k, v, start, end, *_ = make_case(1, dim=64)
  monkeypatch.setattr(sys, 'argv', ['program', '--unknown_to_absl'])
  flags.FLAGS.unparse_flags()
  attend_with_xla(q, k, v, start, end)


def test_missing_tokamax_is_named(make_case, monkeypatch):
  q, k, v, start, end, *_ = make_case(1, dim=64)
  monkeypatch.setitem(sys.modules, 'tokamax._src', None)
  with pytest.raises(UserError, match=r"pip install 'polar_jax\[cuda\]'"):
    gpu.attend(q, k, v, start, end)


@needs_tokamax
@needs_cpu
def test_cpu_is_refused(make_case):
  q, k, v, start, end, *_ = make_case(1, dim=64)
  with pytest.raises(UserError, match=r'NVIDIA GPU.*cpu'):
    gpu.attend(q, k, v, start, end)


# --- the Triton kernels, interpreted ---


@contextlib.contextmanager
def _interpreted():
  """Run a `pallas_call` with XLA. The interpreter does not support program ids inside loops, so they are read beforehand."""
  import tokamax

  pallas_call, program_id = pl.pallas_call, pl.program_id

  def interpret(kernel, out_shape, *, grid_spec, compiler_params, **arguments):
    def with_ids(*refs):
      ids = [program_id(axis) for axis in range(len(grid_spec.grid))]

      def known(axis):
        if axis < len(ids):
          return ids[axis]
        raise ValueError(axis)  # tokamax detects the number of axes by this error

      with mock.patch.object(pl, 'program_id', known):
        return kernel(*refs)

    return pallas_call(with_ids, out_shape, grid_spec=grid_spec, interpret=True, **arguments)

  with mock.patch.object(pl, 'pallas_call', interpret), tokamax.config.cross_compile(True):
    yield


@pytest.mark.long
@needs_tokamax
@needs_cpu
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_triton_kernels(dtype, make_case, assert_matches_oracle):
  from tokamax._src.ops.attention import pallas_triton

  case = make_case(4, batch=1, queries=150, keys=150, heads=2, kv_heads=1, dim=64, packed=dtype == jnp.float32, dtype=dtype)
  with _interpreted():
    attend = functools.partial(gpu.attend_with, pallas_triton.PallasTritonFlashAttention())
    assert_matches_oracle(attend, case, atol=2e-6 if dtype == jnp.float32 else 3e-2)


# --- the choice of a kernel, and its lowering ---


@contextlib.contextmanager
def _on(capability: float):
  """A fake default device that calls itself a GPU."""
  import tokamax
  from tokamax._src import gpu_utils

  device = mock.Mock(platform='gpu', device_kind='in name', compute_capability=str(capability), core_count=132)
  with tokamax.config.cross_compile(True), mock.patch.object(gpu_utils.backend, 'get_default_device', lambda: device):
    yield


@pytest.mark.long
@needs_tokamax
@pytest.mark.parametrize(
  ('capability', 'dtype', 'dim', 'kernels'),
  [
    (8.0, jnp.bfloat16, 128, {'__gpu$xla.gpu.triton': 2}),
    (9.0, jnp.float32, 64, {'__gpu$xla.gpu.triton': 2}),
    (9.0, jnp.bfloat16, 64, {'mosaic_gpu_v2': 3}),
    (9.0, jnp.bfloat16, 128, {'mosaic_gpu_v2': 3}),
    (10.0, jnp.bfloat16, 64, {'mosaic_gpu_v2': 2}),
    (10.0, jnp.bfloat16, 128, {'__gpu$xla.gpu.triton': 2}),
    (12.0, jnp.bfloat16, 64, {'__gpu$xla.gpu.triton': 2}),
  ],
)
def test_lowers_for_cuda(capability, dtype, dim, kernels):
  """Forward and backward lower to these kernels, and a gradient without lse runs no kernel for it."""

  def gradients(q, k, v, start, end):
    return jax.grad(lambda q, k, v: gpu.attend(q, k, v, start, end)[0].astype(jnp.float32).sum(), (0, 1, 2))(q, k, v)

  shape = jax.ShapeDtypeStruct
  interval = shape((2, 1000), jnp.int32)
  arrays = (shape((2, 1000, 6, dim), dtype), *[shape((2, 1000, 2, dim), dtype)] * 2, interval, interval)
  unchecked = [export.DisabledSafetyCheck.custom_call(name) for name in ('mosaic_gpu_v2', '__gpu$xla.gpu.triton')]
  with _on(capability):
    module = export.export(jax.jit(gradients), platforms=['cuda'], disabled_checks=unchecked)(*arrays).mlir_module()
  found = collections.Counter(re.findall(r'custom_call @(mosaic_gpu_v2|__gpu\$xla\.gpu\.triton)', module))
  assert found == kernels


# --- the kernels, on a GPU ---


def _rows(length: int) -> tuple[np.ndarray, np.ndarray]:
  """Intervals of a row with one triplet and padding, and of a row packed with several and padding."""
  start, end = np.zeros((2, 2, length), np.int32)
  for row, parts in enumerate([(1,), (3, 5, 11)]):
    at = 0
    for part in parts:
      prefix, chosen, rejected = (np.arange(count * length // (10 * part)) for count in (4, 2, 3))
      triplet = layout.pair_segment(np.concatenate([prefix, -1 - chosen]), np.concatenate([prefix, length + rejected]))
      here = slice(at, at + len(triplet.tokens))
      start[row, here], end[row, here] = triplet.start + at, triplet.end + at
      at = here.stop
  return start, end


def _run(attend, case):
  @jax.jit
  def run(q, k, v, start, end, out_gradient, lse_gradient):
    outputs, pull = jax.vjp(lambda q, k, v: attend(q, k, v, start, end), q, k, v)
    return *outputs, *pull((out_gradient, lse_gradient))

  return [np.array(a, np.float32) for a in run(*case)]


def test_rows_hold_intervals_of_every_kind():
  for length in (1000, 4096):
    start, end = _rows(length)
    assert (start <= end).all() and end.max() <= length
    assert (start == end)[:, -1].all() and (end - start).max() > length // 3


@needs_tokamax
@needs_gpu
@pytest.mark.parametrize('length', [1000, 4096])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(('dim', 'heads', 'kv_heads'), [(64, 4, 4), (64, 6, 2), (128, 4, 1)])
def test_kernels_on_gpu(length, dtype, dim, heads, kv_heads):
  rng = np.random.default_rng(length + dim)
  draw = lambda heads, dim: np.asarray(jnp.asarray(rng.normal(size=(2, length, heads, dim)), dtype))
  q, k, v, out_gradient = draw(heads, dim), draw(kv_heads, dim), draw(kv_heads, dim), draw(heads, dim)
  start, end = _rows(length)
  lse_gradient = rng.normal(size=(2, length, heads)).astype(np.float32)
  got = _run(gpu.attend, (q, k, v, start, end, out_gradient, lse_gradient))
  exact = [a.astype(np.float32) for a in (q, k, v)]
  wanted = _run(reference.attend, (*exact, start, end, out_gradient.astype(np.float32), lse_gradient))
  empty = start == end
  assert (got[1][empty] == np.float32(reference.EMPTY)).all()
  got[1][empty] = wanted[1][empty] = 0
  np.testing.assert_array_equal(got[0][empty], 0)
  np.testing.assert_array_equal(got[2][empty], 0)
  for name, a, b in zip(('out', 'lse', 'dq', 'dk', 'dv'), got, wanted, strict=True):
    tolerance = (3e-2 if dtype == jnp.bfloat16 else 1e-4) * max(1, np.abs(b).max())
    np.testing.assert_allclose(a, b, atol=tolerance, rtol=0, err_msg=name)


@needs_tokamax
@needs_gpu
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('dim', [64, 128])
def test_small_cases_on_gpu(dtype, dim, make_case, assert_matches_oracle):
  atol = 3e-2 if dtype == jnp.bfloat16 else 1e-5
  assert_matches_oracle(gpu.attend, make_case(dim, heads=6, dim=dim, dtype=dtype), atol=atol)
