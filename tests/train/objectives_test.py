from __future__ import annotations

import types

import jax.numpy as jnp
import numpy as np
import pytest

from polar_jax.config import LossConfig
from polar_jax.train import objectives


def test_text_loss_reads_targets_mask_and_the_largest_logit_of_each_row():
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(2, 3, 5)).astype(np.float32)
  logits[0, 1, 2], logits[1, 2, 0] = -9.0, 7.0  # the largest of the first row is negative
  target, mask = rng.integers(5, size=(2, 3)), np.array([[1, 0, 1], [1, 1, 0]])
  calls = []
  batch = types.SimpleNamespace(
    tokens_BT='tokens', positions_BT='positions', intervals='intervals', target_BT=target, target_mask_BT=mask, index_B='index'
  )
  loss, sums, rows = objectives.NEXT_TOKEN.loss_sums(lambda *arguments: calls.append(arguments) or jnp.asarray(logits), batch)
  probability = np.exp(logits.astype(np.float64))
  probability /= probability.sum(axis=-1, keepdims=True)
  picked = [(i, j) for i in range(2) for j in range(3) if mask[i, j]]
  assert float(loss) == pytest.approx(-sum(np.log(probability[i, j, target[i, j]]) for i, j in picked), rel=1e-5)
  assert float(sums['accuracy']) == sum(probability[i, j].argmax() == target[i, j] for i, j in picked)
  assert rows['largest_logit_B'].tolist() == [9.0, 7.0] and rows['index'] == 'index'
  assert calls == [('tokens', 'positions', 'intervals')]
  assert int(objectives.NEXT_TOKEN.count(batch)) == 4 and objectives.NEXT_TOKEN.name


def test_pair_loss_reads_rewards_and_the_mask_of_pairs(monkeypatch):
  rewards = jnp.array([[[2.0, 0.5], [1.0, 1.0]], [[0.0, 3.0], [5.0, -5.0]]])
  batch = types.SimpleNamespace(pair_mask_BP=jnp.array([[1, 1], [1, 0]]), index_BP='index', margin_BP=None, weight_BP=None)
  monkeypatch.setattr(objectives, 'pair_rewards', lambda *arguments: arguments == ('model', batch) and rewards)
  loss, sums, rows = objectives.RANKING.loss_sums('model', batch)
  assert float(loss) == pytest.approx(sum(np.log1p(np.exp(-margin)) for margin in (1.5, 0.0, -3.0)))
  assert {name: float(value) for name, value in sums.items()} == {
    'accuracy': 1.5, 'margin': -1.5, 'chosen_reward': 3.0, 'rejected_reward': 4.5,
  }  # fmt: skip
  assert rows['rewards_BPC'] is rewards and rows['index'] == 'index'
  assert int(objectives.RANKING.count(batch)) == 3


@pytest.mark.parametrize('weight', [None, np.array([[2.0, 1.0, 9.0], [0.5, 9.0, 9.0], [9.0, 9.0, 9.0], [1.0, 0.25, 0.125]], np.float32)])
def test_the_official_mean_is_that_of_devices_with_a_pack_each(weight):
  """Each device sums the loss of its pack, multiplies it by the mean over devices of 1 / pairs, and the devices average."""
  mask = np.array([[1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 1, 1]], np.float32)  # a row of padding is no device
  loss = np.random.default_rng(0).random(mask.shape)
  weights = [(mask if weight is None else mask * weight)[b] for b in (0, 1, 3)]
  inverse = np.mean([1 / w.sum() for w in weights])
  expected = np.mean([(w * loss[b]).sum() * inverse for w, b in zip(weights, (0, 1, 3), strict=True)])
  batch = types.SimpleNamespace(pair_mask_BP=jnp.asarray(mask), weight_BP=weight)
  objective = objectives.ranking(LossConfig(mean='official'))
  total = sum((w * loss[b]).sum() for w, b in zip(weights, (0, 1, 3), strict=True))
  np.testing.assert_allclose(total / objective.loss_count(batch), expected, rtol=1e-6)
  np.testing.assert_allclose(objective.count(batch), sum(w.sum() for w in weights), rtol=1e-6)
  equal = types.SimpleNamespace(pair_mask_BP=jnp.ones((4, 3)), weight_BP=None)  # then both means are the same
  assert float(objective.loss_count(equal)) == float(objective.count(equal)) == 12
  empty = types.SimpleNamespace(pair_mask_BP=jnp.zeros((4, 3)), weight_BP=None)
  assert float(objective.loss_count(empty)) == 0


def test_runs_with_equal_options_share_an_objective():
  assert objectives.ranking(LossConfig()) is objectives.RANKING is not objectives.ranking(LossConfig('focal'))
  assert objectives.ranking(LossConfig('focal')) is objectives.ranking(LossConfig('focal'))
  assert objectives.RANKING.loss_count is None
