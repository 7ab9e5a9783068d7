"""AdamW against a NumPy oracle, and the learning-rate schedule."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from polar_jax.config import TrainConfig
from polar_jax.train import optimizer


def _expected_rate(config, steps, step):
  warmup = round(config.warmup_ratio * steps)
  if step < warmup:
    return config.learning_rate * step / warmup
  cosine = (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
  return config.learning_rate * (config.final_lr_ratio + (1 - config.final_lr_ratio) * cosine)


@pytest.mark.parametrize(('warmup_ratio', 'final'), [(0.03, 0.1), (0.0, 0.1), (0.5, 0.0), (0.1, 1.0)])
@pytest.mark.parametrize('steps', [1, 2, 10, 100, 469])
def test_schedule(warmup_ratio, final, steps):
  config = TrainConfig(learning_rate=2e-3, warmup_ratio=warmup_ratio, final_lr_ratio=final)
  schedule = optimizer.learning_rate_schedule(config, steps)
  warmup = round(warmup_ratio * steps)
  if warmup < steps:
    np.testing.assert_allclose(
      [schedule(s) for s in range(steps)], [_expected_rate(config, steps, s) for s in range(steps)], rtol=2e-5, atol=1e-9
    )
    np.testing.assert_allclose(schedule(warmup), 2e-3, rtol=1e-6)
    np.testing.assert_allclose([schedule(steps), schedule(1.5 * steps)], final * 2e-3, rtol=1e-5, atol=1e-9)
  if warmup:
    assert schedule(0) == 0


def test_schedule_that_only_warms_up():
  schedule = optimizer.learning_rate_schedule(TrainConfig(learning_rate=1.0, warmup_ratio=1.0), 4)
  np.testing.assert_allclose([schedule(s) for s in range(5)], [0, 0.25, 0.5, 0.75, 1])


def _tree(seed, scale=1.0):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: (scale * rng.normal(size=shape)).astype(np.float32)
  layers = {'wq': draw(2, 3), 'attention_norm': draw(2), 'mlp_norm': draw(2)}
  return {'decoder': {'embedding': draw(4, 3), 'norm': draw(3), 'layers': layers}, 'v_head': draw(3)}


def _flat(tree):
  return {
    jax.tree_util.keystr(path, simple=True, separator='.'): np.asarray(x, np.float64)
    for path, x in jax.tree_util.tree_leaves_with_path(tree)
  }


@pytest.mark.parametrize('clip_norm', [None, 0.5, 1e6])
@pytest.mark.parametrize('weight_decay', [0.0, 0.1])
def test_adamw_against_a_numpy_oracle(clip_norm, weight_decay):
  config = TrainConfig(learning_rate=0.01, warmup_ratio=0.3, b1=0.8, b2=0.95, eps=1e-6, weight_decay=weight_decay, clip_norm=clip_norm)
  steps = 7
  tx = optimizer.make_optimizer(config, steps)
  params = jax.tree.map(jnp.asarray, _tree(0))
  state = tx.init(params)
  update = jax.jit(tx.update)
  expected = _flat(params)
  m, v = ({name: np.zeros_like(x) for name, x in expected.items()} for _ in range(2))
  for step in range(5):
    gradients = _tree(step + 1, scale=0.3 * (step + 1))
    updates, state = update(jax.tree.map(jnp.asarray, gradients), state, params)
    params = optax.apply_updates(params, updates)
    flat = _flat(gradients)
    norm = math.sqrt(sum((g**2).sum() for g in flat.values()))
    factor = min(1.0, clip_norm / norm) if clip_norm else 1.0
    for name, p in expected.items():
      g = flat[name] * factor
      m[name] = 0.8 * m[name] + 0.2 * g
      v[name] = 0.95 * v[name] + 0.05 * g * g
      direction = (m[name] / (1 - 0.8 ** (step + 1))) / (np.sqrt(v[name] / (1 - 0.95 ** (step + 1))) + 1e-6)
      if name in ('decoder.embedding', 'decoder.layers.wq'):  # all but norm scales and the reward head
        direction = direction + weight_decay * p
      expected[name] = p - _expected_rate(config, steps, step) * direction
  for name, p in _flat(params).items():
    np.testing.assert_allclose(p, expected[name], atol=3e-6, err_msg=name)


def test_eps_bounds_the_step_of_a_small_gradient():
  config = TrainConfig(learning_rate=1.0, warmup_ratio=0.0, final_lr_ratio=1.0, eps=0.5, weight_decay=0.0, clip_norm=None)
  tx = optimizer.make_optimizer(config, 10)
  params = {'w': jnp.zeros(3)}
  updates, _ = tx.update({'w': jnp.array([1.0, -0.5, 0.0])}, tx.init(params), params)
  np.testing.assert_allclose(updates['w'], [-1 / 1.5, 0.5 / 1.0, 0.0], rtol=1e-6)


def test_weight_decay_skips_norm_scales_and_the_reward_head():
  params = jax.tree.map(jnp.asarray, _tree(0))
  tx = optimizer.make_optimizer(TrainConfig(weight_decay=0.5, learning_rate=0.1, warmup_ratio=0.0), 10)
  updates, _ = jax.jit(tx.update)(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
  moved = {name for name, u in _flat(updates).items() if np.any(u)}
  assert moved == {'decoder.embedding', 'decoder.layers.wq'}


@pytest.mark.long
def test_one_compiled_update_serves_every_schedule():
  """A schedule set in the state of a shared optimizer gives the updates of an optimizer made for that schedule."""
  configs = [TrainConfig(learning_rate=rate, warmup_ratio=0.3, final_lr_ratio=0.2, b1=0.8) for rate in (0.01, 0.3)]
  assert optimizer.without_schedule(configs[0]) == optimizer.without_schedule(configs[1]) != optimizer.without_schedule(TrainConfig())
  shared = optimizer.make_optimizer(optimizer.without_schedule(configs[0]), 1)
  update = jax.jit(shared.update)
  params, compiled = jax.tree.map(jnp.asarray, _tree(0)), 0
  for config, steps in zip(configs, (7, 20), strict=True):
    own = optimizer.make_optimizer(config, steps)
    state, expected_state = optimizer.with_schedule(shared.init(params), config, steps), own.init(params)
    for step in range(4):
      gradients = jax.tree.map(jnp.asarray, _tree(step + 1))
      updates, state = update(gradients, state, params)
      expected, expected_state = own.update(gradients, expected_state, params)
      for name, u in _flat(updates).items():
        np.testing.assert_allclose(u, _flat(expected)[name], rtol=1e-5, atol=1e-9)
        assert step == 0 or np.any(u)
    compiled = update._cache_size() if config is configs[0] else compiled
  assert update._cache_size() == compiled
