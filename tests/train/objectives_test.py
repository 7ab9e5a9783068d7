from __future__ import annotations

import types

import jax.numpy as jnp
import numpy as np
import pytest

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
  batch = types.SimpleNamespace(pair_mask_BP=jnp.array([[1, 1], [1, 0]]), index_BP='index')
  monkeypatch.setattr(objectives, 'pair_rewards', lambda *arguments: arguments == ('model', batch) and rewards)
  loss, sums, rows = objectives.RANKING.loss_sums('model', batch)
  assert float(loss) == pytest.approx(sum(np.log1p(np.exp(-margin)) for margin in (1.5, 0.0, -3.0)))
  assert {name: float(value) for name, value in sums.items()} == {
    'accuracy': 1.5, 'margin': -1.5, 'chosen_reward': 3.0, 'rejected_reward': 4.5,
  }  # fmt: skip
  assert rows['rewards_BPC'] is rewards and rows['index'] == 'index'
  assert int(objectives.RANKING.count(batch)) == 3
