from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from polar_jax.config import ModelConfig
from polar_jax.model.reward_model import RewardModel
from polar_jax.model.value_model import ValueModel

CONFIG = ModelConfig(
  vocab_size=13, num_layers=2, d_model=12, d_ff=20, num_heads=6, num_kv_heads=2, head_dim=4, init_std=0.3, v_head_init='normal'
)


@pytest.mark.long
def test_a_value_is_the_reward_read_at_that_token():
  """The two models share parameters, so a critic can start from a reward model."""
  rng = np.random.default_rng(0)
  reward = RewardModel(CONFIG, rngs=nnx.Rngs(0))
  value = ValueModel(CONFIG, rngs=nnx.Rngs(1))
  nnx.update(value, nnx.state(reward))
  tokens, position = rng.integers(0, 13, (2, 9)).astype(np.int32), np.broadcast_to(np.arange(9, dtype=np.int32), (2, 9))
  zeros = np.zeros_like(position)
  intervals = [(zeros, position + 1)]
  read = lambda model: jax.jit(lambda *index: model(tokens, position, intervals, *index))
  read_value, read_reward = read(value), read(reward)
  values = read_value()
  assert values.shape == (2, 9) and values.dtype == jnp.float32
  for t in (0, 4, 8):
    index = np.full((2, 1), t, np.int32)
    np.testing.assert_allclose(values[:, t], read_reward(index)[:, 0], atol=1e-5)
    np.testing.assert_array_equal(read_value(index), read_reward(index))
  assert np.ptp(np.asarray(values)) > 0.1
