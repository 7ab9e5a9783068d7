"""A whole step of PPO on given rollouts against an oracle: every number of its record, and every parameter after it.

The oracle computes rewards, advantages, weights and the optimizer in numpy with loops, and gradients by `jax.grad` of a loss over single
sequences. It shares nothing with the step but the models.
"""

from __future__ import annotations

import itertools
import types
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from polar_jax import sharding
from polar_jax.config import MeshConfig, ModelConfig, OptimizerConfig, RewardConfig, RftConfig, RolloutConfig
from polar_jax.model.language_model import LanguageModel
from polar_jax.model.value_model import ValueModel
from polar_jax.ppo import learner
from polar_jax.ppo.rewards.shaping import Normalizer
from polar_jax.ppo.rewards.sources import RewardSum
from polar_jax.ppo.trainer import Trainer
from polar_jax.train.optimizer import learning_rate_schedule
from polar_jax.types import Prompt, Rollouts

_SIZES = {'num_layers': 1, 'd_model': 8, 'd_ff': 12, 'num_heads': 2, 'num_kv_heads': 1, 'head_dim': 4}
MODEL = ModelConfig(vocab_size=13, init_std=0.4, v_head_init='normal', compute_dtype='float32', attention='reference', **_SIZES)
STOP, MAX_NEW, UPDATES, SEED, TOKENS = 12, 5, 10, 5, 100
KL_COEF = 0.2
FIRST_SHUFFLED = 0.25
ACTOR = OptimizerConfig(learning_rate=0.03, warmup_ratio=0.2, final_lr_ratio=0.1, b2=0.9, eps=1e-2, weight_decay=0.1, clip_norm=0.5)
CRITIC = OptimizerConfig(learning_rate=0.05, warmup_ratio=0.1, final_lr_ratio=1.0, b1=0.8, eps=1e-2, weight_decay=0.2, clip_norm=None)
COMMON = {
  'prompts_per_step': 2,
  'num_generations': 3,
  'micro_batch_rows': 1,
  'row_length': 16,
  'gamma': 0.9,
  'gae_lambda': 0.6,
  'actor': ACTOR,
  'critic': CRITIC,
  'rollout': RolloutConfig(max_new=MAX_NEW, temperature=0.7),
}
SHAPED = RewardConfig(clip=1.0, missing_eos_penalty=0.3, length_buffer=3, length_penalty=0.5)
CONFIGS = {
  'gae': RftConfig(
    **COMMON,
    reward=SHAPED,
    mini_batch_size=4,
    update_epochs=2,
    kl_in='reward',
    kl_estimator='k2',
    kl_target=0.05,
    kl_horizon=50.0,
    clip=0.1,
    clip_high=0.2,
    dual_clip=1.05,
    value_clip=0.05,
    entropy_coef=0.05,
  ),
  'critic alone': RftConfig(
    **COMMON | {'prompts_per_step': 6, 'num_generations': 1}, whiten=False, value_clip=None, critic_warmup=2, shuffled_every=2
  ),
  'grpo': RftConfig(
    **COMMON,
    advantage='grpo',
    recompute_logprobs=False,
    loss_mean='sequence',
    update_epochs=2,
    kl_in='loss',
    kl_estimator='k3',
    dual_clip=None,
    shuffled_every=2,
  ),
  'rloo': RftConfig(**COMMON, reward=SHAPED, advantage='rloo', mini_batch_size=3, kl_in='reward', entropy_coef=0.01),
}
STEP = 1  # two were taken before, so that neither seeds nor controls are those of a first step


class Letters:
  """A tokenizer whose tokens are words of one letter."""

  def decode(self, ids, skip_special):
    return ' '.join('abcdefghijklm'[i] for i in ids)


class Checksum:
  """A reward between -2 and 2 that depends on every letter of reference and response."""

  def score(self, prompts, responses):
    texts = [f'{p.reference}|{r}' for p, r in zip(prompts, responses, strict=True)]
    return np.array([zlib.crc32(text.encode()) / 2**30 - 2 for text in texts], np.float32)


class Models:
  """Both models on single sequences: everything of the oracle that is not numpy."""

  def __init__(self, rollouts: Rollouts, temperature: float):
    self.rows, self.temperature = len(rollouts.length_R), temperature
    self.sequences = np.zeros((self.rows, 16), np.int32)
    self.index = np.zeros((self.rows, MAX_NEW), np.int32)
    self.tokens = rollouts.tokens_RT
    for r, prompt in enumerate(rollouts.prompts):
      whole = [*prompt, *rollouts.tokens_RT[r]]
      self.sequences[r, : len(whole)] = whole
      self.index[r] = len(prompt) - 1 + np.arange(MAX_NEW)
    self.grad_actor, self.grad_critic = (jax.jit(jax.grad(loss), static_argnums=2) for loss in (self.actor_loss, self.critic_loss))
    self.policy, self.values = jax.jit(self._policy), jax.jit(self._values)

  def _run(self, kind, params):
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: kind(MODEL, rngs=nnx.Rngs(0))))
    position = jnp.broadcast_to(jnp.arange(16, dtype=jnp.int32), self.sequences.shape)
    return nnx.merge(graphdef, params)(self.sequences, position, [(jnp.zeros_like(position), position + 1)])

  def _policy(self, params):
    """Return (log-probabilities of the tokens, entropies)."""
    log_p = jax.nn.log_softmax(self._run(LanguageModel, params) / self.temperature)
    at = log_p[np.arange(self.rows)[:, None], self.index]
    return jnp.take_along_axis(at, self.tokens[..., None], axis=-1)[..., 0], -(jnp.exp(at) * at).sum(-1)

  def _values(self, params):
    return self._run(ValueModel, params)[np.arange(self.rows)[:, None], self.index]

  def actor_loss(self, params, given, config):
    """Return the mean of -min(ratio A, clipped ratio A), with its additions, over the tokens by their weights."""
    new, entropy = self._policy(params)
    ratio, a = jnp.exp(new - given['old']), given['advantage']
    gain = jnp.minimum(ratio * a, jnp.clip(ratio, 1 - config.clip, 1 + (config.clip_high or config.clip)) * a)
    if config.dual_clip:
      gain = jnp.where(a < 0, jnp.maximum(gain, config.dual_clip * a), gain)
    loss = -gain - config.entropy_coef * entropy
    if config.kl_in == 'loss':
      d = given['reference'] - new
      loss += KL_COEF * (jnp.exp(d) - d - 1)
    return (given['weight'] * loss).sum()

  def critic_loss(self, params, given, config):
    """Return half the mean of the larger of two squared errors."""
    value, old = self._values(params), given['value']
    errors = [(value - given['return']) ** 2]
    if config.value_clip:
      errors.append((old + jnp.clip(value - old, -config.value_clip, config.value_clip) - given['return']) ** 2)
    return (given['weight'] * jnp.stack(errors).max(0)).sum() / 2


class AdamW:
  """The optimizer by hand, on float64."""

  def __init__(self, config: OptimizerConfig, params):
    self.config, self.count = config, 0
    flat, self.tree = jax.tree_util.tree_flatten_with_path(params)
    self.names = [jax.tree_util.keystr(path) for path, _ in flat]
    self.params = [np.asarray(leaf, np.float64) for _, leaf in flat]
    self.m, self.v = [np.zeros_like(p) for p in self.params], [np.zeros_like(p) for p in self.params]

  def rate(self) -> float:
    c = self.config
    warmup = round(c.warmup_ratio * UPDATES)
    if self.count < warmup:
      return c.learning_rate * self.count / warmup
    done = min((self.count - warmup) / (UPDATES - warmup), 1)
    return c.learning_rate * (c.final_lr_ratio + (1 - c.final_lr_ratio) * (1 + np.cos(np.pi * done)) / 2)

  def take(self, grads) -> tuple[float, float]:
    """Take one step and return (norm of the gradients, learning rate)."""
    c, rate = self.config, self.rate()
    grads = [np.asarray(g, np.float64) for g in jax.tree.leaves(grads)]
    norm = np.sqrt(sum((g**2).sum() for g in grads))
    self.count += 1
    for i, (name, g) in enumerate(zip(self.names, grads, strict=True)):
      g = g * (min(1, c.clip_norm / norm) if c.clip_norm else 1)
      self.m[i] = c.b1 * self.m[i] + (1 - c.b1) * g
      self.v[i] = c.b2 * self.v[i] + (1 - c.b2) * g**2
      step = self.m[i] / (1 - c.b1**self.count) / (np.sqrt(self.v[i] / (1 - c.b2**self.count)) + c.eps)
      decay = 0 if 'norm' in name or 'v_head' in name else c.weight_decay
      self.params[i] = self.params[i] - rate * (step + decay * self.params[i])
    return norm, rate

  def state(self):
    return jax.tree.unflatten(self.tree, [p.astype(np.float32) for p in self.params])


def make_rollouts(config: RftConfig) -> tuple[list[Prompt], Rollouts]:
  """Return six responses; one is empty, two are cut at the limit."""
  rng = np.random.default_rng(0)
  distinct = [rng.integers(0, 12, n).tolist() for n in (3, 5, 2, 4, 1, 6)][: config.prompts_per_step]
  ids = [prompt for prompt in distinct for _ in range(config.num_generations)]
  prompts = [Prompt(str(i), 'c a b a' if len(i) < 4 else 'd e') for i in ids]
  length = np.array([4, 1, 5, 3, 5, 2], np.int32)
  stopped = np.array([True, True, False, True, False, True])
  tokens = rng.integers(0, 4, (6, MAX_NEW)).astype(np.int32) * (np.arange(MAX_NEW) < length[:, None])
  tokens[np.flatnonzero(stopped), length[stopped] - 1] = STOP
  return prompts, Rollouts(ids, tokens, length, np.zeros(tokens.shape, np.float32), stopped)


def loops_over(length):
  return [(r, t) for r, n in enumerate(length) for t in range(n)]


def expected_rewards(config: RftConfig, prompts, rollouts, record):
  """Return (shaped rewards, raw ones), and write their metrics and those of the texts into the record."""
  texts = []
  for r, n in enumerate(rollouts.length_R):
    texts.append(' '.join('abcdefghijklm'[i] for i in rollouts.tokens_RT[r, : n - bool(rollouts.stopped_R[r])]))
  part = Checksum().score(prompts, texts).astype(np.float64)
  raw, c = 1.5 * part, config.reward
  clipped = np.clip(raw, -c.clip, c.clip) if c.clip else raw
  missing = np.where(rollouts.stopped_R, 0, c.missing_eos_penalty)
  overlong = np.zeros(6)
  if c.length_buffer:
    over = (rollouts.length_R - (MAX_NEW - c.length_buffer)) / c.length_buffer
    overlong = c.length_penalty * np.minimum(np.maximum(over, 0), 1)
  shaped = clipped - missing - overlong
  record |= {'reward': shaped.mean(), 'reward_std': shaped.std(), 'raw': raw.mean(), 'raw_std': raw.std(), 'model': part.mean()}
  record |= {'reward_clipped': np.mean(clipped != raw), 'missing_eos_penalty': missing.mean(), 'length_penalty': overlong.mean()}
  if STEP % config.shuffled_every == 0:  # there are two prompts, which exchange their references
    other = Checksum().score([prompts[(r + 3) % 6] for r in range(6)], texts) * 1.5
    record |= {'shuffled': other.mean(), 'shuffled_gap': raw.mean() - other.mean(), 'shuffled_rise': other.mean() - FIRST_SHUFFLED}
  words = [text.split() for text in texts]
  shares = [
    sum(min(w.count(x), p.reference.split().count(x)) for x in set(w)) / max(len(w), 1) for w, p in zip(words, prompts, strict=True)
  ]
  pairs = [pair for w in words for pair in itertools.pairwise(w)]
  single = [word for w in words for word in w]
  record |= {'length': rollouts.length_R.mean(), 'truncated': 2 / 6, 'empty': 1 / 6, 'overlap': np.mean(shares)}
  record |= {'distinct_1': len(set(single)) / len(single), 'distinct_2': len(set(pairs)) / len(pairs)}
  length = rollouts.length_R.astype(np.float64)
  record |= {'length_slope': np.polyfit(length, raw, 1)[0], 'length_free': raw.mean()}  # the first step's lengths are those to refer to
  return shaped, raw


def expected_advantages(config: RftConfig, shaped, kl, value, length):
  """Return (advantages, returns) by loops over tokens."""
  reward = np.zeros((6, MAX_NEW))
  for r, t in loops_over(length):
    penalty = {'k1': kl[r, t], 'k2': kl[r, t] ** 2 / 2}.get(config.kl_estimator, 0) if config.kl_in == 'reward' else 0
    reward[r, t] = (shaped[r] if t == length[r] - 1 else 0) - KL_COEF * penalty
  advantage, returns = np.zeros((6, MAX_NEW)), np.zeros((6, MAX_NEW))
  if config.advantage != 'gae':
    total, n = reward.sum(axis=1), config.num_generations
    for r, t in loops_over(length):
      group = [s for s in range(6) if s // n == r // n]
      if config.advantage == 'grpo':
        advantage[r, t] = (total[r] - total[group].mean()) / (total[group].std(ddof=1) + 1e-6)
      else:
        advantage[r, t] = total[r] - np.mean([total[s] for s in group if s != r])
    return advantage, returns
  for r, t in loops_over(length):
    delta = [reward[r, s] + config.gamma * (value[r, s + 1] if s + 1 < length[r] else 0) - value[r, s] for s in range(length[r])]
    advantage[r, t] = sum((config.gamma * config.gae_lambda) ** (s - t) * delta[s] for s in range(t, length[r]))
    returns[r, t] = advantage[r, t] + value[r, t]
  if config.whiten:
    inside = np.array([advantage[r, t] for r, t in loops_over(length)])
    for r, t in loops_over(length):
      advantage[r, t] = (advantage[r, t] - inside.mean()) / np.sqrt(inside.var(ddof=1) + 1e-8)
  return advantage, returns


def mini_batch_weights(config: RftConfig, which, length):
  weight = np.zeros((6, MAX_NEW))
  for r, t in loops_over(length):
    if r in which:
      mean = 1 / length[r] / len(which) if config.loss_mean == 'sequence' else 1 / sum(length[s] for s in which)
      weight[r, t] = mean
  return weight


def update_metrics(config: RftConfig, models: Models, actor: AdamW, critic: AdamW | None, given) -> dict[str, float]:
  """Take one update of both models, and return its metrics: means by weight over the tokens, before the update."""
  out, weight = {}, given['weight']
  if not critic or config.critic_warmup <= STEP:
    new, entropy = (np.asarray(x, np.float64) for x in models.policy(actor.state()))
    ratio, a = np.exp(new - given['old']), given['advantage']
    plain, clipped = -a * ratio, -a * np.clip(ratio, 1 - config.clip, 1 + (config.clip_high or config.clip))
    loss = np.maximum(plain, clipped)
    if config.dual_clip:
      loss = np.where(a < 0, np.minimum(loss, -a * config.dual_clip), loss)
    out |= {'policy_loss': (weight * loss).sum(), 'entropy': (weight * entropy).sum(), 'clip_fraction': (weight * (clipped > plain)).sum()}
    out['approx_kl'] = (weight * (given['old'] - new)).sum()
    out['grad_norm'], out['learning_rate'] = actor.take(models.grad_actor(actor.state(), given, config))
  if critic:
    value, clip = np.asarray(models.values(critic.state()), np.float64), config.value_clip or np.inf
    plain = (value - given['return']) ** 2
    clipped = (np.clip(value, given['value'] - clip, given['value'] + clip) - given['return']) ** 2
    out |= {'value_loss': (weight * np.maximum(plain, clipped)).sum() / 2, 'value_clip_fraction': (weight * (clipped > plain)).sum()}
    out['critic_grad_norm'], out['critic_learning_rate'] = critic.take(models.grad_critic(critic.state(), given, config))
  return out


def oracle(config: RftConfig, prompts, rollouts, actor_params, critic_params, reference_params):
  """Return (record, parameters of the actor, those of the critic, the next KL coefficient)."""
  models = Models(rollouts, config.rollout.temperature)
  length, tokens = rollouts.length_R, loops_over(rollouts.length_R)
  record = {'stage': 'rft', 'step': STEP + 1, 'kl_coef': KL_COEF, 'prompts': sum(map(len, rollouts.prompts))}
  record |= {'tokens': sum(length), 'total_tokens': TOKENS + sum(length)}
  shaped, _ = expected_rewards(config, prompts, rollouts, record)
  old, reference = (np.asarray(models.policy(params)[0], np.float64) for params in (actor_params, reference_params))
  if config.recompute_logprobs:
    record['rollout_mismatch'] = np.mean([abs(old[i] - rollouts.logprob_RT[i]) for i in tokens])
  else:
    old = rollouts.logprob_RT.astype(np.float64)
  kl = old - reference
  record['kl'] = np.mean([kl[i] for i in tokens])
  record['kl_answer'] = np.mean([sum(kl[r, t] for t in range(n)) for r, n in enumerate(length)])
  value = np.asarray(models.values(critic_params), np.float64) if critic_params else np.zeros(old.shape)
  advantage, returns = expected_advantages(config, shaped, kl, value, length)
  record['advantage_std'] = np.std([advantage[i] for i in tokens])
  actor, critic = AdamW(config.actor, actor_params), AdamW(config.critic, critic_params) if critic_params else None
  if critic:
    record['explained_variance'] = 1 - np.var([returns[i] - value[i] for i in tokens]) / np.var([returns[i] for i in tokens])
  given = {'old': old, 'reference': reference, 'advantage': advantage, 'value': value, 'return': returns}
  updates = []
  for epoch in range(config.update_epochs):
    order = np.random.default_rng([SEED, STEP, epoch]).permutation(6).tolist()
    size = config.mini_batch_size or 6
    for which in (order[low : low + size] for low in range(0, 6, size)):
      numbers = {**given, 'weight': mini_batch_weights(config, which, length)}
      numbers = {name: array.astype(np.float32) for name, array in numbers.items()}
      updates.append(update_metrics(config, models, actor, critic, numbers))
  record |= {name: np.mean([update[name] for update in updates]) for name in updates[0]}
  steered = KL_COEF
  if config.kl_target:
    steered *= 1 + np.clip(record['kl'] / config.kl_target - 1, -0.2, 0.2) * 6 / config.kl_horizon
  return record, actor.state(), critic and critic.state(), steered


def make_trainer(config: RftConfig, prompts, rollouts, mesh) -> Trainer:
  """Return a trainer with real models and given rollouts, without checkpoints and logs."""
  trainer = object.__new__(Trainer)
  trainer.session = types.SimpleNamespace(step=STEP)
  reward = RewardSum({'model': (1.5, Checksum())}, strip_thinking=False)
  tokenizer = Letters()
  trainer.run = types.SimpleNamespace(
    config=config, seed=SEED, mesh=mesh, name='rft', tokenizer=tokenizer, stop_ids=(STOP,), reward=reward, base={}
  )
  trainer.history = [{'step': 1}, {'step': 2, 'shuffled': FIRST_SHUFFLED}, {'step': 3, 'shuffled': 9.0}]
  trainer.rollouts_per_step, trainer.row_length, trainer.tokens = 6, config.row_length, TOKENS
  trainer.kl_coef, trainer.base_length, trainer.normalizer = KL_COEF, None, Normalizer('none')
  trainer.rates = [np.asarray(learning_rate_schedule(o, UPDATES)(jnp.arange(UPDATES))) for o in (config.actor, config.critic)]
  trainer.actor = learner.build_actor(MODEL, config, UPDATES, mesh)
  trainer.critic = learner.build_critic(MODEL, config, UPDATES, mesh) if config.advantage == 'gae' else None
  trainer.actor_state = trainer.actor.init(jax.random.key(0), None)
  trainer.critic_state = trainer.critic.init(jax.random.key(1), None) if trainer.critic else None
  noise = jax.random.split(jax.random.key(2), 64)
  leaves, tree = jax.tree.flatten(trainer.actor_state.params)
  moved = [leaf + 0.05 * jax.random.normal(key, leaf.shape) for leaf, key in zip(leaves, noise, strict=False)]
  trainer.reference_policy = jax.tree.unflatten(tree, moved)
  trainer._generate = lambda: (prompts, rollouts)
  return trainer


@pytest.mark.long
@pytest.mark.parametrize('name', CONFIGS)
def test_a_step_equals_the_oracle(name):
  config = CONFIGS[name]
  prompts, rollouts = make_rollouts(config)
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  with jax.set_mesh(mesh):
    trainer = make_trainer(config, prompts, rollouts, mesh)
    start = jax.device_get((trainer.actor_state.params, trainer.critic_state.params if trainer.critic else None, trainer.reference_policy))
    # Noted while sampling, by an engine of another rounding; where they are not recomputed, the clips are active from the first update on.
    sampled = np.asarray(Models(rollouts, 0.7).policy(start[0])[0]) + np.random.default_rng(1).normal(0, 0.2, rollouts.tokens_RT.shape)
    inside = np.arange(MAX_NEW) < rollouts.length_R[:, None]
    rollouts = rollouts._replace(logprob_RT=(sampled * inside).astype(np.float32))
    trainer._generate = lambda: (prompts, rollouts)
    record, samples = trainer.one_step()
  expected, actor, critic, steered = oracle(config, prompts, rollouts, *start)
  timed = {key for key in record if key.startswith('seconds_')} | {'step_seconds', 'tokens_per_second'}
  assert record.keys() - timed == expected.keys()
  for key, value in expected.items():
    assert record[key] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-3, abs=2e-5)), key
  assert trainer.kl_coef == pytest.approx(steered, rel=1e-4) and trainer.tokens == expected['total_tokens']
  compare = lambda found, wanted: np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=3e-5)
  jax.tree.map(compare, jax.device_get(trainer.actor_state.params), actor)
  if critic:
    jax.tree.map(compare, jax.device_get(trainer.critic_state.params), critic)
  assert len(samples) == 4
  if name in ('gae', 'grpo'):  # otherwise the clips, and what they do to gradients, would not be compared
    assert 0 < record['clip_fraction'] < 1
  if name == 'gae':
    assert 0 < record['value_clip_fraction'] < 1 and trainer.kl_coef != KL_COEF
