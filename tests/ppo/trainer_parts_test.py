"""The methods of the trainer one by one, with models and engine replaced by functions that record their arguments."""

from __future__ import annotations

import json
import types

import jax
import numpy as np
import pytest

from polar_jax import sharding
from polar_jax.config import AlarmConfig, CheckpointingConfig, ConfigError, MeshConfig, RewardConfig, RftConfig, RolloutConfig
from polar_jax.ppo.experience import Experience
from polar_jax.ppo.learner import ActorTargets, CriticTargets
from polar_jax.ppo.metrics import Scores
from polar_jax.ppo.rewards.shaping import Normalizer
from polar_jax.ppo.run import PpoState
from polar_jax.ppo.trainer import Trainer, _reference_rollouts
from polar_jax.runtime.compiled import Memory
from polar_jax.train import memory
from polar_jax.train.step import TrainState
from polar_jax.types import Prompt, Rollouts, UserError

LENGTH = np.array([3, 1, 2, 4], np.int32)
MASK = (np.arange(4)[None] < LENGTH[:, None]).astype(np.float32)


def make_trainer(step: int = 0, config: RftConfig | None = None, **attributes) -> Trainer:
  """Return a trainer without models, checkpoints or logs: two prompts per step, two responses to each."""
  trainer = object.__new__(Trainer)
  trainer.session = types.SimpleNamespace(step=step, resumed=False)
  trainer.kl_coef, trainer.rollouts_per_step, trainer.row_length = 0.1, 4, 16
  trainer.reference_policy = trainer.critic = trainer.critic_state = None
  config = config or RftConfig(prompts_per_step=2, num_generations=2, advantage='rloo', recompute_logprobs=False)
  prompts = [(Prompt(f'p{i}', f'r{i}'), [i]) for i in range(7)]
  trainer.run = types.SimpleNamespace(config=config, seed=5, mesh=None, prompts=prompts, name='rft', base={})
  vars(trainer).update(attributes)
  return trainer


def make_rollouts() -> Rollouts:
  rng = np.random.default_rng(0)
  tokens = rng.integers(1, 9, (4, 4)).astype(np.int32) * MASK.astype(np.int32)
  return Rollouts([[1], [1], [2], [2]], tokens, LENGTH, -rng.random((4, 4)).astype(np.float32) * MASK, np.ones(4, bool))


def make_experience() -> Experience:
  rng = np.random.default_rng(1)
  return Experience(MASK, *(rng.normal(size=(4, 4)).astype(np.float32) * MASK for _ in range(6)))


def test_generate_reads_the_prompts_of_its_step_in_order():
  calls = []

  class Engine:
    def generate(self, params, ids, seed):
      calls.append((params, ids, seed))
      return 'rollouts'

  order = lambda i: ((3 * i + 1) % 7, 0)
  state = types.SimpleNamespace(params='params')
  for step, numbers in ((0, (1, 4)), (2, (6, 2))):
    trainer = make_trainer(step, order=order, engine=Engine(), actor_state=state)
    prompts, rollouts = trainer._generate()
    assert [p.prompt for p in prompts] == [f'p{i}' for i in numbers for _ in range(2)] and rollouts == 'rollouts'
    assert calls[-1] == ('params', [[i] for i in numbers for _ in range(2)], (5, step))


@pytest.mark.parametrize('concurrent', [1, 8])
def test_decoding_that_does_not_fit_is_refused_with_a_remedy(monkeypatch, concurrent):
  lines = []
  sizes = {1: 3 << 20, 8: 24 << 20}
  make = lambda slots: types.SimpleNamespace(concurrent=slots, memory=lambda params: Memory(output=sizes[slots]))
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  trainer = make_trainer(engine=make(concurrent), critic=None)
  no_gradients = Memory()
  accumulate = types.SimpleNamespace(prepare=lambda *args: no_gradients)
  shapes = {'w': np.zeros(2, np.float32)}
  abstract = types.SimpleNamespace(params=shapes)
  zeros = lambda params: (None, np.zeros(1))
  trainer.actor = types.SimpleNamespace(accumulate=accumulate, abstract=abstract, abstract_params=shapes, zeros=zeros)
  trainer.run = types.SimpleNamespace(
    **vars(trainer.run) | {'mesh': mesh, 'log': lines.append, 'checkpointing': CheckpointingConfig(asynchronous=True)}
  )
  trainer.actor_state, trainer.critic_state = TrainState({'w': np.zeros(1 << 20, np.float32)}, {}, np.int32(0)), None
  monkeypatch.setattr(memory.memory_lib, 'available_on_host', lambda: 12 << 20)
  monkeypatch.setattr(memory.memory_lib, 'available', lambda device: 20 << 20)
  if concurrent == 1:
    trainer._check_memory()
    assert any('rft: decoding 1 responses of' in line and 'needs 3' in line for line in lines)
    assert any('rft: an asynchronous save next to a step needs 11' in line for line in lines)  # twice 4 MiB, and 3 MiB of decoding
    monkeypatch.setattr(memory.memory_lib, 'available_on_host', lambda: 10 << 20)
    with pytest.raises(ConfigError, match=r'set checkpointing\.asynchronous=False'):
      trainer._check_memory()
    monkeypatch.setattr(memory.memory_lib, 'available', lambda device: 1 << 20)
    wanted = r'free: set rft.rollout.max_prompt \(\d+\) or max_new \(\d+\) to less; or a smaller policy'
  else:
    wanted = r'rft: decoding 8 responses of \d+ \+ \d+ tokens at a time needs .* free: set rft.rollout.max_concurrent to less than 8'
  with pytest.raises(ConfigError, match=wanted):
    trainer._check_memory()
  trainer.run.config = RftConfig(method='sft')
  trainer._check_memory()  # nothing is decoded


def test_experience_compares_responses_to_the_same_prompt():
  score = np.array([1, 3, 10, 20], np.float32)
  experience = make_trainer()._collect_experience(make_rollouts(), [], score)
  np.testing.assert_allclose(experience.advantage_RT, np.array([-2, 2, -10, 10])[:, None] * MASK)
  np.testing.assert_array_equal(experience.old_logprob_RT, make_rollouts().logprob_RT)


def test_init_gives_the_critic_the_policy_and_a_key_of_its_own():
  calls = {}
  initial = {'decoder': {'w': np.ones(2, np.float32)}, 'lm_head': np.zeros(2, np.float32)}

  def recorder(name):
    return types.SimpleNamespace(init=lambda key, params: calls.update({name: (jax.random.key_data(key).tolist(), params)}))

  trainer = make_trainer(actor=recorder('actor'), critic=recorder('critic'))
  trainer.run.initial_params, trainer.run.needs_reference = lambda: initial, True
  trainer.run.model = types.SimpleNamespace(compute_dtype='bfloat16')
  trainer._restore_or_init()
  keys = jax.random.key_data(jax.random.split(jax.random.key(5))).tolist()
  assert calls == {'actor': (keys[0], initial), 'critic': (keys[1], {'decoder': initial['decoder']})}
  assert {str(a.dtype) for a in jax.tree.leaves(trainer.reference_policy)} == {'bfloat16'}


def test_update_shuffles_by_seed_step_and_epoch(monkeypatch):
  config = RftConfig(prompts_per_step=2, num_generations=2, mini_batch_size=3, update_epochs=2)
  found = {}
  for step in (0, 1):
    calls = []
    trainer = make_trainer(step, config)
    monkeypatch.setattr(trainer, '_one_update', lambda which, *_, calls=calls: calls.append(which) or {'loss': float(len(which))})
    batches = [types.SimpleNamespace(tokens_BT=np.zeros((2, 16)))]
    assert trainer._update(make_rollouts(), batches, None) == {'loss': 2.0}  # the mean of 3, 1, 3 and 1
    orders = [np.random.default_rng([5, step, epoch]).permutation(4).tolist() for epoch in range(2)]
    assert calls == [sorted(part) for order in orders for part in (order[:3], order[3:])]
    found[step] = calls
  assert found[0] != found[1]


def test_one_update_weights_only_its_own_rollouts_and_logs_both_rates(monkeypatch):
  steps = []

  def take_step(model, state, base, batches, arrays, targets):
    steps.append((model, arrays, targets))
    return state, {f'{model}_loss': 1.0}, 2.0

  state = types.SimpleNamespace(step=1)
  rates = [np.array([0.1, 0.2]), np.array([0.3, 0.4])]
  trainer = make_trainer(actor='actor', critic='critic', actor_state=state, critic_state=state, rates=rates)
  monkeypatch.setattr(trainer, '_take_step', take_step)
  experience = make_experience()
  out = trainer._one_update([1, 3], [], experience)
  assert out == {
    'actor_loss': 1.0,
    'grad_norm': 2.0,
    'learning_rate': 0.2,
    'critic_loss': 1.0,
    'critic_grad_norm': 2.0,
    'critic_learning_rate': 0.4,
  }
  (actor, known, actor_targets), (critic, expected, critic_targets) = steps
  assert (actor, actor_targets, critic, critic_targets) == ('actor', ActorTargets, 'critic', CriticTargets)
  weight = MASK * np.array([0, 1, 0, 1])[:, None] / 5
  np.testing.assert_allclose(known[-1], weight, rtol=1e-6)
  np.testing.assert_array_equal(expected[-1], known[-1])
  names = ('old_logprob_RT', 'reference_logprob_RT', 'advantage_RT')
  assert all(a is getattr(experience, name) for a, name in zip(known[:-1], names, strict=True))
  assert expected[0] is experience.value_RT and expected[1] is experience.return_RT


@pytest.mark.parametrize(('step', 'learns'), [(0, False), (1, False), (2, True)])
def test_one_update_leaves_the_actor_alone_while_the_critic_warms_up(monkeypatch, step, learns):
  state = types.SimpleNamespace(step=0)
  config = RftConfig(prompts_per_step=2, num_generations=2, critic_warmup=2)
  trainer = make_trainer(step, config, actor='actor', critic='critic', actor_state=state, critic_state=state, rates=[np.ones(1)] * 2)
  monkeypatch.setattr(trainer, '_take_step', lambda model, state, *_: (state, {}, 0.0))
  assert ('grad_norm' in trainer._one_update([0], [], make_experience())) == learns


def test_experience_metrics_by_hand():
  config = RftConfig(prompts_per_step=2, num_generations=2, rollout=RolloutConfig())
  experience, rollouts = make_experience(), make_rollouts()
  trainer = make_trainer(config=config, reference_policy='params', critic='critic', base_length=None)
  scores = Scores(np.array([1, 2, 3, 4], np.float32), np.zeros(4, np.float32), None, {})
  out = trainer._experience_metrics(rollouts, experience, scores)
  difference = (experience.old_logprob_RT - experience.reference_logprob_RT).astype(np.float64)
  per_response = [difference[r, :n].sum() for r, n in enumerate(LENGTH)]
  assert out['kl'] == pytest.approx(sum(per_response) / 10, rel=1e-5)
  assert out['kl_answer'] == pytest.approx(np.mean(per_response), rel=1e-5)
  valid = MASK > 0
  assert out['rollout_mismatch'] == pytest.approx(np.abs(experience.old_logprob_RT - rollouts.logprob_RT)[valid].mean(), rel=1e-5)
  assert out['advantage_std'] == pytest.approx(experience.advantage_RT[valid].std(), rel=1e-6)
  errors = (experience.return_RT - experience.value_RT)[valid]
  assert out['explained_variance'] == pytest.approx(1 - errors.var() / experience.return_RT[valid].var(), rel=1e-5)
  assert trainer.base_length == 2.5 and out['length_free'] == pytest.approx(2.5)  # at the lengths of the first step itself
  sft = make_trainer(config=RftConfig(method='sft'), reference_policy='params')._experience_metrics(rollouts, experience, scores)
  assert set(sft) == {'kl', 'kl_answer', 'nll'}
  assert sft['nll'] == pytest.approx(-experience.old_logprob_RT[valid].mean(), rel=1e-5)


@pytest.mark.parametrize(('resumed', 'reference', 'loads'), [(False, False, 1), (False, True, 1), (True, False, 0), (True, True, 1)])
def test_initial_params_are_loaded_only_where_they_are_needed(resumed, reference, loads):
  loaded, started = [], []
  initial = {'decoder': {'w': np.ones(2, np.float32)}}
  saved = {'tokens': 7, 'kl_coef': 0.3, 'base_length': 2.5, 'evaluated': {'evaluation_raw': 1.0}}
  saved |= {'normalizer': {'kind': 'running', 'count': 3, 'mean': 0.5, 'squares': 2.0}, 'alarmed': True}
  actor = TrainState('params', 'opt_state', 'step')
  functions = types.SimpleNamespace(init=lambda key, params: started.append(params) or actor, abstract=actor)
  trainer = make_trainer(actor=functions, critic=None, critic_state='old')
  trainer.session = types.SimpleNamespace(step=0, resumed=resumed, restore=lambda abstract: (PpoState.join(actor, None), saved))
  trainer.run.initial_params, trainer.run.needs_reference = lambda: loaded.append(1) or initial, reference
  trainer.run.model = types.SimpleNamespace(compute_dtype='float32')
  trainer._restore_or_init()
  assert len(loaded) == loads and started == ([] if resumed else [initial])
  assert (trainer.reference_policy is not None) == reference
  assert trainer.actor_state == actor and trainer.critic_state is None
  if resumed:
    assert (trainer.tokens, trainer.kl_coef, trainer.base_length, trainer.evaluated) == (7, 0.3, 2.5, {'evaluation_raw': 1.0})
    assert trainer.normalizer.to_json() == saved['normalizer'] and trainer.alarmed and not trainer.evaluation_due
  else:
    assert (trainer.tokens, trainer.kl_coef, trainer.base_length, trainer.evaluated) == (0, trainer.run.config.kl_coef, None, {})
    assert not trainer.alarmed and not trainer.evaluation_due


@pytest.mark.parametrize(('evaluation_due', 'alarmed', 'saved_alarm'), [(True, True, True), (False, True, False), (True, False, False)])
def test_what_is_saved_is_what_a_resumed_run_reads(evaluation_due, alarmed, saved_alarm):
  calls = []
  actor, critic = TrainState('params', 'opt_state', 'step'), TrainState('critic params', 'critic opt_state', 'critic step')
  own = {'tokens': 9, 'kl_coef': 0.2, 'base_length': 3.5, 'evaluated': {'evaluation_raw': 0.5}, 'evaluation_due': evaluation_due}
  trainer = make_trainer(**own, alarmed=alarmed, normalizer=Normalizer('running'), actor_state=actor, critic_state=critic)
  trainer.session.save = lambda *arguments, again: calls.append((*arguments, again))
  trainer._save(again=True)
  state, data, evaluated, again = calls[0]
  assert state.split() == (actor, critic) and evaluated == own['evaluated'] and again
  assert data == {**own, 'alarmed': saved_alarm, 'normalizer': Normalizer('running').to_json()}


def test_summary_is_the_mean_of_the_last_twentieth_of_the_steps(tmp_path):
  steps = [{'step': i, 'reward': float(i), 'kl': i / 10, 'tokens_per_second': 1.0} for i in range(1, 61)]
  steps[-1] |= {'nll': 1.0}  # not of all of the last three steps
  rows = [{'step': 0, 'evaluation_raw': 0.25}, *steps, {'step': 30, 'evaluation_raw': 0.5}, {'step': 60, 'evaluation_raw': 0.75}]
  rows += [{'step': 60, 'alarms': ['too long', 'collapsed']}]
  (tmp_path / 'metrics.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  trainer = make_trainer(60, tokens=123)
  trainer.run.folder, trainer.run.facts = tmp_path, {'chat': 'llama'}
  assert trainer._summarize({'goodput': 0.9}) == {
    'steps': 60,
    'responses': 240,
    'tokens': 123,
    'goodput': 0.9,
    'reward': 59.0,
    'kl': pytest.approx(5.9),
    'alarms': ['too long', 'collapsed'],
    'chat': 'llama',
    'evaluation_before': {'raw': 0.25},
    'evaluation_after': {'raw': 0.75},
  }
  (tmp_path / 'metrics.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in steps[:3]))
  short = trainer._summarize({})
  assert short['reward'] == 3.0 and 'evaluation_before' not in short and short['alarms'] == []


@pytest.mark.parametrize(('action', 'stops'), [('stop', True), ('warn', False)])
def test_alarms_are_written_and_stop_a_run_only_if_they_are_to(action, stops):
  lines, written = [], []
  config = RftConfig(alarms=AlarmConfig(action=action, max_kl=0.5, window=1))
  trainer = make_trainer(3, config, history=[{'step': 3, 'kl': 0.1}])
  trainer.run.log, trainer.metrics = lines.append, types.SimpleNamespace(write=written.append)
  assert not trainer._check_alarms() and not lines and not written
  trainer.history = [{'step': 3, 'kl': 0.9}]
  assert trainer._check_alarms() == stops
  assert len(lines) == 1 and written == [{'stage': 'rft', 'step': 3, 'alarms': [lines[0].removeprefix('rft: ')]}]


def test_references_become_rollouts_that_end_with_a_stop_token_where_it_fits():
  tokenizer = types.SimpleNamespace(encode_batch=lambda texts: [[ord(c) for c in text] for text in texts])
  run = types.SimpleNamespace(config=RftConfig(rollout=RolloutConfig(max_new=4)), stop_ids=(7, 9), tokenizer=tokenizer)
  prompts = [Prompt('p', 'ab'), Prompt('q', 'abc'), Prompt('r', 'abcd'), Prompt('s', 'abcdef')]
  a, b, c, d = map(ord, 'abcd')
  out = _reference_rollouts(prompts, [[1], [2], [3], [4]], run)
  assert out.tokens_RT.tolist() == [[a, b, 7, 0], [a, b, c, 7], [a, b, c, d], [a, b, c, d]] and out.tokens_RT.dtype == np.int32
  assert out.length_R.tolist() == [3, 4, 4, 4] and out.stopped_R.tolist() == [True, True, False, False]
  assert out.prompts == [[1], [2], [3], [4]] and not out.logprob_RT.any() and out.logprob_RT.shape == (4, 4)
  with pytest.raises(UserError, match='no token ends a response'):
    _reference_rollouts(prompts, [[1]] * 4, types.SimpleNamespace(config=run.config, stop_ids=(), tokenizer=tokenizer))


def test_imitated_references_have_no_reward_and_no_samples(monkeypatch):
  scored = []
  config = RftConfig(prompts_per_step=2, num_generations=2, method='sft', reward=RewardConfig())
  scores = make_trainer(config=config)._score([], ['a', 'b', 'c'], make_rollouts())
  assert scores.raw_R.tolist() == scores.shaped_R.tolist() == [0, 0, 0] and scores.shuffled_R is None and scores.metrics == {}
  monkeypatch.setattr('polar_jax.ppo.metrics.score', lambda *arguments: scored.append(arguments[-1]))
  for step in range(5):
    trainer = make_trainer(step, RftConfig(shuffled_every=2), normalizer=None)
    trainer.run.reward = None
    trainer._score([], [], make_rollouts())
  assert scored == [(5, 0), None, (5, 2), None, (5, 4)]
