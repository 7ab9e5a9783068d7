from __future__ import annotations

import jax
import pytest
from flax import nnx

from polar_jax.config import ModelConfig
from polar_jax.model import heads

CONFIG = ModelConfig(vocab_size=13, num_layers=1, d_model=8, d_ff=8, num_heads=2, num_kv_heads=1, head_dim=4)


def test_every_head_has_its_objective():
  assert {head: heads.HEADS[head].objective for head in heads.HEADS} == {'lm': 'next_token', 'reward': 'ranking', 'value': 'value'}
  assert all(heads.head_of(heads.HEADS[head].objective) == head for head in heads.HEADS)
  with pytest.raises(KeyError, match='classify'):
    heads.head_of('classify')


@pytest.mark.long
@pytest.mark.parametrize(('head', 'shape'), [('lm', (2, 5, 13)), ('reward', (2, 5)), ('value', (2, 5))])
def test_heads_are_called_alike(head, shape):
  """A call of (tokens, positions, intervals) gives an output per token; with an index, one per picked token."""
  tokens = jax.numpy.ones((2, 5), jax.numpy.int32)
  positions = jax.numpy.broadcast_to(jax.numpy.arange(5), (2, 5))
  inputs = (tokens, positions, [(jax.numpy.zeros_like(positions), positions + 1)])
  graphdef, state = nnx.split(heads.make_model(CONFIG, head, nnx.Rngs(params=0)))
  abstract = nnx.state(heads.abstract_model(CONFIG, head))
  assert jax.tree.map(lambda p: p.shape, nnx.to_pure_dict(abstract)) == jax.tree.map(lambda p: p.shape, nnx.to_pure_dict(state))
  call = jax.jit(lambda state, *inputs: nnx.merge(graphdef, state)(*inputs))
  every = call(state, *inputs)
  assert every.shape == shape and every.dtype == jax.numpy.float32
  index = jax.numpy.array([[3], [1]])
  picked = call(state, *inputs, index)
  for b, t in enumerate(index[:, 0].tolist()):
    assert jax.numpy.allclose(picked[b, 0], every[b, t], atol=1e-5)
