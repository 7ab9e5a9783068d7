"""Updates equal those of single sequences, and do not depend on packing, micro-batches or devices."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from polar_jax import sharding
from polar_jax.config import MeshConfig, ModelConfig, OptimizerConfig, RftConfig, RolloutConfig
from polar_jax.data import layout
from polar_jax.model.language_model import LanguageModel
from polar_jax.model.value_model import ValueModel
from polar_jax.ppo import experience, learner
from polar_jax.ppo.learner import ActorTargets, CriticTargets
from polar_jax.types import Rollouts

MODEL = ModelConfig(
  vocab_size=23, num_layers=2, d_model=16, d_ff=24, num_heads=2, num_kv_heads=1, head_dim=8, init_std=0.3, v_head_init='normal'
)
OPTIMIZER = OptimizerConfig(learning_rate=0.01, warmup_ratio=0.0, eps=1e-3)
CONFIG = RftConfig(
  actor=OPTIMIZER,
  critic=OPTIMIZER,
  rollout=RolloutConfig(temperature=0.7),
  kl_in='loss',
  kl_estimator='k3',
  entropy_coef=0.03,
  dual_clip=1.5,
  value_clip=0.1,
  num_generations=2,
)
KL_COEF = 0.2


@pytest.fixture(scope='module')
def rollouts() -> Rollouts:
  rng = np.random.default_rng(3)
  length = np.array([5, 1, 7, 3, 4, 6, 2], np.int32)
  tokens = rng.integers(1, 23, (7, 7)).astype(np.int32) * (np.arange(7)[None] < length[:, None])
  prompts = [rng.integers(1, 23, n).tolist() for n in (3, 6, 1, 4, 2, 5)]
  prompts.insert(4, prompts[1])  # two responses to one prompt
  prompts[6] = prompts[1]
  return Rollouts(prompts, tokens, length, np.zeros((7, 7), np.float32), np.ones(7, bool))


@pytest.fixture(scope='module')
def values(rollouts):
  """Return targets of both losses; the old log-probabilities are far enough from the model's for every kind of clip."""
  rng, mask = np.random.default_rng(4), layout.response_mask(rollouts)
  draw = lambda mean, std: (rng.normal(mean, std, mask.shape) * mask).astype(np.float32)
  weight = mask / mask.sum()
  return {
    'old': draw(-3, 0.7),
    'reference': draw(-3, 0.5),
    'advantage': draw(0, 1),
    'weight': weight,
    'value': draw(0, 1),
    'return': draw(0, 1),
  }


@pytest.mark.long
def test_actor_forward_equals_single_sequences(rollouts, one):
  mesh, actor, _ = one
  params = actor.init(jax.random.key(0), None).params
  logprob, entropy = experience.run_forward(actor.forward, params, layout.policy_batches(rollouts, range(7), 24, 2), mesh, rollouts, 2)
  for r in range(7):
    logits = full_logits(params, rollouts, r) / CONFIG.rollout.temperature
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    n = rollouts.length_R[r]
    np.testing.assert_allclose(logprob[r, :n], np.log(p)[np.arange(n), rollouts.tokens_RT[r, :n]], atol=2e-5)
    np.testing.assert_allclose(entropy[r, :n], -(p * np.log(p)).sum(-1), atol=2e-5)
    assert not logprob[r, n:].any()


def full_logits(params, rollouts, r) -> np.ndarray:
  """Return the logits (response tokens, V) of one unpacked sequence as float64."""
  sequence = np.zeros((1, 16), np.int32)
  whole = [*rollouts.prompts[r], *rollouts.tokens_RT[r, : rollouts.length_R[r]].tolist()]
  sequence[0, : len(whole)] = whole
  first = len(rollouts.prompts[r]) - 1
  return np.asarray(_forward(params, sequence)[0, first : first + rollouts.length_R[r]], np.float64)


@jax.jit
def _forward(params, sequence):
  graphdef, _ = nnx.split(nnx.eval_shape(lambda: LanguageModel(MODEL, rngs=nnx.Rngs(0))))
  position = jnp.arange(sequence.shape[1], dtype=jnp.int32)[None]
  return nnx.merge(graphdef, params)(sequence, position, [(jnp.zeros_like(position), position + 1)])


@jax.jit
def _value(params, sequence):
  graphdef, _ = nnx.split(nnx.eval_shape(lambda: ValueModel(MODEL, rngs=nnx.Rngs(0))))
  position = jnp.arange(sequence.shape[1], dtype=jnp.int32)[None]
  return nnx.merge(graphdef, params)(sequence, position, [(jnp.zeros_like(position), position + 1)])


def mesh_of(devices: int, **axes: int):
  return sharding.make_mesh(MeshConfig(**axes), jax.devices()[:devices])


@pytest.fixture(scope='module')
def one():
  mesh = mesh_of(1)
  return mesh, learner.build_actor(MODEL, CONFIG, 10, mesh), learner.build_critic(MODEL, CONFIG, 10, mesh)


def update(model, kind, names, mesh, rollouts, values, row_length, height):
  """Take one step from the same initial parameters. Returns (parameters, sums, norm)."""
  with jax.set_mesh(mesh):
    state = model.init(jax.random.key(0), None)
    grads, sums = model.zeros(state.params)
    for batch in layout.policy_batches(rollouts, range(7), row_length, height):
      targets = kind(*(layout.scatter_values(values[name], batch) for name in names))
      batch, targets = sharding.put_global((batch, targets), mesh)
      grads, sums = model.accumulate(grads, sums, state.params, batch, targets, np.float32(KL_COEF))
    state, norm = model.apply(state, grads)
    return jax.device_get((state.params, sums, norm))


ACTOR = (ActorTargets, ('old', 'reference', 'advantage', 'weight'))
CRITIC = (CriticTargets, ('value', 'return', 'weight'))


def oracle_sums(params, rollouts, values, which):
  """Return the metrics of an update by loops over tokens in float64, one sequence at a time."""
  total = dict.fromkeys(('policy_loss', 'entropy', 'clip_fraction', 'approx_kl', 'value_loss', 'value_clip_fraction'), 0.0)
  for r in range(7):
    logits = full_logits(params, rollouts, r) / 0.7 if which == 'actor' else None
    for t in range(rollouts.length_R[r]):
      w = values['weight'][r, t]
      if which == 'actor':
        p = np.exp(logits[t] - logits[t].max())
        p /= p.sum()
        lp, old, a = np.log(p[rollouts.tokens_RT[r, t]]), values['old'][r, t], values['advantage'][r, t]
        ratio = np.exp(lp - old)
        plain, clipped = -a * ratio, -a * min(max(ratio, 0.8), 1.2)
        loss = max(plain, clipped)
        if a < 0:
          loss = min(loss, -a * 1.5)
        total['policy_loss'] += w * loss
        total['entropy'] += w * -(p * np.log(p)).sum()
        total['clip_fraction'] += w * (clipped > plain)
        total['approx_kl'] += w * (old - lp)
      else:
        sequence = np.zeros((1, 16), np.int32)
        whole = [*rollouts.prompts[r], *rollouts.tokens_RT[r, : rollouts.length_R[r]].tolist()]
        sequence[0, : len(whole)] = whole
        v = float(_value(params, sequence)[0, len(rollouts.prompts[r]) - 1 + t])
        old, ret = values['value'][r, t], values['return'][r, t]
        clipped = min(max(v, old - 0.1), old + 0.1)
        total['value_loss'] += w * 0.5 * max((v - ret) ** 2, (clipped - ret) ** 2)
        total['value_clip_fraction'] += w * ((clipped - ret) ** 2 > (v - ret) ** 2)
  return total


@pytest.mark.long
@pytest.mark.parametrize('which', ['actor', 'critic'])
def test_update_equals_loops_over_single_sequences(which, rollouts, values, one):
  mesh, actor, critic = one
  model, (kind, names) = (actor, ACTOR) if which == 'actor' else (critic, CRITIC)
  _, sums, norm = update(model, kind, names, mesh, rollouts, values, 24, 2)
  expected = oracle_sums(jax.device_get(model.init(jax.random.key(0), None).params), rollouts, values, which)
  assert norm > 0 and 0 < float(sums.get('clip_fraction', sums.get('value_clip_fraction'))) < 1
  for name, value in sums.items():
    np.testing.assert_allclose(value, expected[name], rtol=2e-4, atol=2e-5, err_msg=name)


@pytest.mark.long
@pytest.mark.parametrize('which', ['actor', pytest.param('critic', marks=pytest.mark.slow)])
def test_update_does_not_depend_on_packing_or_devices(which, rollouts, values, one):
  build, (kind, names) = (learner.build_actor, ACTOR) if which == 'actor' else (learner.build_critic, CRITIC)
  wanted = update(one[1] if which == 'actor' else one[2], kind, names, one[0], rollouts, values, 24, 2)
  padded = mesh_of(1)
  many = mesh_of(8, data=2, fsdp=2, tensor=2)
  for mesh, row_length, height in ((padded, 13, 7), (many, 16, 4)):  # rows of 13 do not hold a prompt with two responses
    got = update(build(MODEL, CONFIG, 10, mesh), kind, names, mesh, rollouts, values, row_length, height)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5), got, wanted)


def test_accumulate_compiles_once(rollouts, values, one):
  mesh, actor, _ = one
  before = actor.accumulate._cache_size()
  update(actor, *ACTOR, mesh, rollouts, values, 24, 2)
  few = rollouts._replace(length_R=np.minimum(rollouts.length_R, 2))
  update(actor, *ACTOR, mesh, few, values, 24, 2)
  assert actor.accumulate._cache_size() == max(before, 1)


def test_logits_in_pieces_give_the_same_update(rollouts, values, one, monkeypatch):
  wanted = update(one[1], *ACTOR, one[0], rollouts, values, 24, 2)
  monkeypatch.setattr(learner, '_LOGITS', 2 * 6 * 23)
  config = dataclasses.replace(CONFIG, log_every=2)  # another key of the cache of functions
  got = update(learner.build_actor(MODEL, config, 10, one[0]), *ACTOR, one[0], rollouts, values, 24, 2)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5), got, wanted)


def model_of(params):
  graphdef, _ = nnx.split(nnx.eval_shape(lambda: LanguageModel(MODEL, rngs=nnx.Rngs(0))))
  return nnx.merge(graphdef, params)


@pytest.mark.parametrize('clip_high', [None, 0.05])
def test_actor_loss_is_policy_loss_minus_entropy_plus_kl_to_the_reference_policy(rollouts, values, one, clip_high):
  """With weights that differ between tokens."""
  _, actor, _ = one
  config = dataclasses.replace(CONFIG, clip_high=clip_high, dual_clip=None)
  params = actor.init(jax.random.key(0), None).params
  (batch,) = layout.policy_batches(rollouts, range(7), 32, 4)
  weight = values['weight'] * np.arange(1, 8, dtype=np.float32)[:, None]
  given = {**values, 'weight': weight / weight.sum()}
  targets = ActorTargets(*(layout.scatter_values(given[name], batch) for name in ACTOR[1]))
  loss, sums = jax.jit(lambda p: learner.actor_loss(config, model_of(p), batch, targets, np.float32(KL_COEF)))(params)
  policy = entropy = kl = 0.0
  for r in range(7):
    logits = full_logits(params, rollouts, r) / 0.7
    for t in range(rollouts.length_R[r]):
      w, old, a, reference = (float(given[name][r, t]) for name in ('weight', 'old', 'advantage', 'reference'))
      log_p = logits[t] - logits[t].max() - np.log(np.exp(logits[t] - logits[t].max()).sum())
      new = log_p[rollouts.tokens_RT[r, t]]
      policy += w * max(-a * np.exp(new - old), -a * np.clip(np.exp(new - old), 0.8, 1 + (0.2 if clip_high is None else clip_high)))
      entropy -= w * (np.exp(log_p) * log_p).sum()
      kl += w * min(np.exp(reference - new) - 1 - (reference - new), 10.0)
  np.testing.assert_allclose([sums['policy_loss'], sums['entropy']], [policy, entropy], rtol=1e-4)
  np.testing.assert_allclose(loss, policy - 0.03 * entropy + KL_COEF * kl, rtol=1e-4)


def test_accumulate_adds_gradients_and_sums(rollouts, values, one):
  mesh, actor, _ = one
  with jax.set_mesh(mesh):
    params = actor.init(jax.random.key(0), None).params
    batches = layout.policy_batches(rollouts, range(7), 16, 2)
    placed = [ActorTargets(*(layout.scatter_values(values[name], batch) for name in ACTOR[1])) for batch in batches]
    pairs = [sharding.put_global(pair, mesh) for pair in zip(batches, placed, strict=True)]
    alone = [jax.device_get(actor.accumulate(*actor.zeros(params), params, *pair, np.float32(KL_COEF))) for pair in pairs]
    total = actor.zeros(params)
    for pair in pairs:
      total = actor.accumulate(*total, params, *pair, np.float32(KL_COEF))
  assert len(pairs) > 1 and all(any(g.any() for g in jax.tree.leaves(grads)) for grads, _ in alone)
  expected = jax.tree.map(lambda *parts: sum(parts), *alone)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), jax.device_get(total), expected)


def test_logits_in_pieces_are_recomputed_in_the_backward_pass(rollouts, one, monkeypatch):
  _, actor, _ = one
  monkeypatch.setattr(learner, '_LOGITS', 2 * 6 * 23)
  (batch,) = layout.policy_batches(rollouts, range(7), 32, 4)
  params = actor.init(jax.random.key(0), None).params
  assert 'remat' in str(jax.make_jaxpr(lambda p: learner.actor_forward(model_of(p), batch, 1.0, True))(params))


def test_sums_and_state_are_replaced_in_place_and_parameters_and_batches_stay(rollouts, values, one):
  """A second copy of the gradients or of the moments would not fit where the first one hardly does."""
  mesh, actor, _ = one
  deleted = lambda tree: {leaf.is_deleted() for leaf in jax.tree.leaves(tree)}
  with jax.set_mesh(mesh):
    state = actor.init(jax.random.key(0), None)
    (batch,) = layout.policy_batches(rollouts, range(7), 32, 4)
    targets = ActorTargets(*(layout.scatter_values(values[name], batch) for name in ACTOR[1]))
    inputs = sharding.put_global((batch, targets), mesh)
    grads, sums = actor.zeros(state.params)
    new_grads, new_sums = actor.accumulate(grads, sums, state.params, *inputs, np.float32(KL_COEF))
    assert deleted((grads, sums)) == {True} and deleted((new_grads, new_sums, state, inputs)) == {False}
    new_state, _ = actor.apply(state, new_grads)
  assert deleted((state.params, state.opt_state)) == {True} and deleted((new_state, new_grads)) == {False}
