"""The choice of a backend, backends on a mesh, and several intervals."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from polar_jax import sharding
from polar_jax.config import ATTENTION_BACKENDS, MeshConfig
from polar_jax.model import attention
from polar_jax.model.attention import chunked, reference, tpu


def test_every_configured_backend_exists():
  assert set(ATTENTION_BACKENDS) == {'auto', *attention.BACKENDS}


def test_auto_follows_the_platform():
  assert (attention.platform(), attention.choose('auto')) == ('cpu', 'chunked')
  with attention.for_platform('tpu'):
    assert (attention.platform(), attention.choose('auto'), attention.choose('reference')) == ('tpu', 'tpu', 'reference')
    with attention.for_platform('gpu'):
      assert attention.choose('auto') == 'chunked'  # without an NVIDIA GPU
  with pytest.raises(KeyError), attention.for_platform('tpu'):
    raise KeyError
  assert (attention.platform(), attention.choose('auto')) == ('cpu', 'chunked')


def test_a_function_is_lowered_for_the_platform_of_its_tracing(make_case):
  q, k, v, start, end, *_ = make_case(1, queries=128, keys=128)
  lower = lambda: jax.jit(lambda *a: attention.attend('auto', *a[:3], [a[3:]])).trace(q, k, v, start, end).jaxpr
  assert 'pallas_call' not in str(lower())
  with attention.for_platform('tpu'):
    assert 'pallas_call' in str(lower())


def test_few_queries_do_not_start_a_kernel(make_case):
  q, k, v, start, end, *_ = make_case(1)
  expected, _ = reference.attend(q, k, v, start, end)
  np.testing.assert_array_equal(attention.attend('tpu', q, k, v, [(start, end)]), expected)


HEADS = MeshConfig(data=1, fsdp=2, tensor=4)


@pytest.mark.long
@pytest.mark.parametrize(
  ('heads', 'kv_heads', 'queries', 'mesh'),
  [
    *((heads, kv_heads, 12, HEADS) for heads, kv_heads in [(8, 2), (5, 1)]),
    *(pytest.param(*heads, 12, HEADS, marks=pytest.mark.slow) for heads in [(8, 4), (6, 3), (8, 1)]),
    (8, 2, 12, MeshConfig(fsdp=2, tensor=2, context=2)),
    (5, 1, 12, MeshConfig(fsdp=2, context=4)),
    (4, 4, 10, MeshConfig(fsdp=2, context=4)),  # which does not divide the queries
  ],
)
@pytest.mark.parametrize('backend', ['reference', 'chunked', 'tpu'])
def test_on_a_mesh(backend, heads, kv_heads, queries, mesh, make_case, monkeypatch):
  """Rows are divided over two axes, heads over a third, queries over a fourth, including heads that the devices do not divide."""
  small = {
    'chunked': functools.partial(chunked.attend, block=8),
    'tpu': functools.partial(tpu.attend, blocks=tpu.Blocks(8, 8), interpret=True),
  }
  monkeypatch.setattr(attention, 'BACKENDS', {**attention.BACKENDS, **small})
  monkeypatch.setattr(attention, '_FEW_QUERIES', 1)
  q, k, v, start, end, out_gradient, _ = make_case(
    heads, batch=4, queries=queries, keys=queries, heads=heads, kv_heads=kv_heads, packed=True
  )

  def run(backend):
    def weighted(q, k, v):
      return jnp.sum(attention.attend(backend, q, k, v, [(start, end)]) * out_gradient)

    return jax.jit(jax.value_and_grad(weighted, argnums=(0, 1, 2)))(q, k, v)

  expected, expected_gradients = run('reference')
  with jax.set_mesh(sharding.make_mesh(mesh)):
    value, gradients = run(backend)
  np.testing.assert_allclose(value, expected, rtol=1e-5)
  for gradient, wanted in zip(gradients, expected_gradients, strict=True):
    np.testing.assert_allclose(gradient, wanted, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize('backend', ['reference', 'chunked', 'merged'])
def test_two_intervals_are_one_softmax(backend, make_case, monkeypatch):
  """Two adjacent intervals give the values and gradients of the whole one, also where one part, or both, are empty."""
  monkeypatch.setattr(attention, 'BACKENDS', {**attention.BACKENDS, 'merged': reference.attend})
  monkeypatch.setattr(attention, '_ONE_INTERVAL', ('merged',))  # like kernels that take one interval at a time
  monkeypatch.setattr(attention, '_FEW_QUERIES', 1)
  q, k, v, start, end, out_gradient, _ = make_case(4, queries=9, keys=9)
  middle = (start + np.random.default_rng(0).integers(0, end - start + 1)).astype(np.int32)
  assert (middle == start).any() and (middle == end).any() and ((middle > start) & (middle < end)).any()

  @jax.jit
  def run(intervals):
    out, pull = jax.vjp(lambda q, k, v: attention.attend(backend, q, k, v, intervals), q, k, v)
    return out, *pull(out_gradient)

  for part, whole in zip(run([(start, middle), (middle, end)]), run([(start, end)]), strict=True):
    np.testing.assert_allclose(part, whole, atol=5e-6)


def test_chunked_holds_no_array_of_queries_by_keys():
  """The largest array of the forward and backward program grows with the length of a row, not with its square."""

  def largest(length):
    shapes = [jax.ShapeDtypeStruct((1, length, n, 16), jnp.float32) for n in (2, 1, 1)]
    rows = [jax.ShapeDtypeStruct((1, length), jnp.int32)] * 2
    loss = lambda q, k, v, start, end: jnp.sum(chunked.attend(q, k, v, start, end, block=64)[0])
    return jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*shapes, *rows).compile().memory_analysis().temp_size_in_bytes

  assert largest(8192) < 2.5 * largest(4096)
  assert largest(8192) < 8192 * 8192  # bytes: a quarter of one head's logits


def test_chunked_visits_only_unmasked_tiles():
  length, block = 64, 8
  start = np.zeros((1, length), np.int32)
  end = np.zeros((1, length), np.int32)
  start[0, 20:28], end[0, 20:28] = 40, 41  # two query blocks see one key block
  start[0, 60], end[0, 60] = 7, 9  # one query sees the last key of a block and the first of the next
  tiles = chunked._list_tiles(tuple(a.reshape(1, -1, block) for a in (start, end)), length // block, block)
  visited = {tuple(int(a[i]) for a in tiles[:3]) for i in range(int(tiles.total))}
  assert visited == {(0, 2, 5), (0, 3, 5), (0, 7, 0), (0, 7, 1)}
