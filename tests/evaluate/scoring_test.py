from __future__ import annotations

import jax
import numpy as np
import optax
import pytest

from polar_jax import sharding
from polar_jax.config import CheckpointingConfig, MeshConfig, ModelConfig, TemplateConfig, TokenizerConfig
from polar_jax.data.template import Template
from polar_jax.data.tokenizer import load_tokenizer
from polar_jax.evaluate.scoring import Scorer
from polar_jax.train import step as step_lib
from polar_jax.train.checkpoint import Checkpointer
from polar_jax.train.objectives import RANKING
from polar_jax.types import Triplet


@pytest.fixture(scope='module')
def make_scorer(tmp_path_factory):
  """A scorer of random parameters, on a number of devices with a batch size."""
  folder = tmp_path_factory.mktemp('scored')
  template = Template(TemplateConfig(), load_tokenizer(TokenizerConfig(kind='byte'), folder / 'none'))
  sizes = {'num_layers': 2, 'd_model': 16, 'd_ff': 32, 'num_heads': 2, 'num_kv_heads': 1, 'head_dim': 8}
  model = ModelConfig(vocab_size=template.tokenizer.vocab_size, init_std=0.3, v_head_init='normal', **sizes)

  def mesh(devices):
    return sharding.make_mesh(MeshConfig(), jax.devices()[:devices])

  with jax.set_mesh(mesh(1)):
    state = step_lib.build(RANKING, model, optax.identity(), mesh(1)).init(jax.random.key(0), None)
  checkpointer = Checkpointer(folder, CheckpointingConfig(), 'none', False)
  checkpointer.save(1, state, {}, {'objective': RANKING.name}, {})
  checkpointer.close()
  return lambda devices, batch_size: Scorer(folder, model, template, mesh(devices), batch_size)


@pytest.mark.parametrize(('devices', 'batch_size'), [(1, 16), (8, 16), (1, 7)])
def test_packed_rewards_are_those_of_each_row_alone_in_order(make_scorer, devices, batch_size):
  rng = np.random.default_rng(0)
  word = lambda: 'abcdefgh'[: rng.integers(0, 9)] * int(rng.integers(1, 4))
  rows = [Triplet(*(word() for _ in range(4))) for _ in range(37)]
  rewards = make_scorer(devices, batch_size)(rows)
  assert rewards.shape == (37, 2) and rewards.dtype == np.float32
  alone = make_scorer(1, 1)
  np.testing.assert_allclose(rewards, np.concatenate([alone([row]) for row in rows]), atol=1e-5)
  assert len(np.unique(rewards.round(4))) > 37  # an exchange would be seen
