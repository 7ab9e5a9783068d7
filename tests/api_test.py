"""The Python API, as a notebook uses it: load, score, generate, train."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import subprocess
import sys

import numpy as np
import pytest

import polar_jax
from polar_jax import sharding
from polar_jax.config import CheckpointingConfig, MeshConfig, ModelConfig, OptimizerConfig, RolloutConfig, TemplateConfig
from polar_jax.data.template import Template
from polar_jax.data.tokenizer import ByteTokenizer
from polar_jax.scoring.exact import ExactScorer
from polar_jax.types import Group

SHAPE = ModelConfig(num_layers=2, d_model=32, d_ff=64, num_heads=2, num_kv_heads=1, head_dim=16, init_std=0.1)
ARGS = polar_jax.TrainConfig(steps=30, batch_size=8, learning_rate=3e-3, log_every=10)
QUIET = polar_jax.RunSettings(log=lambda line: None)


def example(i: int) -> dict:
  """Return an example whose chosen text repeats the letter of the reference, and whose rejected text repeats another."""
  mine, other = 'ab' if i % 2 else 'ba'
  return {'prompt': f'p{i}', 'reference': mine * (3 + i % 4), 'chosen': mine * (2 + i % 3), 'rejected': other * (2 + i % 5)}


@pytest.fixture(scope='module')
def mesh():
  import jax

  return sharding.make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture(scope='module')
def trained(tmp_path_factory, mesh):
  """A reward model trained from a list of dicts."""
  train, held_out = [example(i) for i in range(40)], [example(i) for i in range(40, 56)]
  return polar_jax.train_reward_model(
    train,
    held_out,
    init='scratch',
    output_dir=tmp_path_factory.mktemp('run') / 'reward',
    args=ARGS,
    model=SHAPE,
    tokenizer='byte',
    mesh=mesh,
    settings=QUIET,
  )


@pytest.fixture(scope='module')
def language_model(tmp_path_factory, mesh):
  """A language model with random parameters, loaded from a folder."""
  import jax
  from flax import nnx

  from polar_jax.model.language_model import LanguageModel

  config = dataclasses.replace(SHAPE, vocab_size=ByteTokenizer.vocab_size, init_std=0.3)
  params = nnx.to_pure_dict(nnx.state(LanguageModel(config, rngs=nnx.Rngs(params=3)), nnx.Param))
  folder = tmp_path_factory.mktemp('lm') / 'model'
  with jax.set_mesh(mesh):
    polar_jax.LanguageModel(params, config, ByteTokenizer(), mesh).save(folder)
  return polar_jax.load(folder, mesh=mesh)


def test_names_of_the_package():
  names = (
    'load RewardModel LanguageModel ValueModel train_reward_model train_policy TrainResult read_examples Triplet Prompt TrainConfig '
    'RftConfig RunSettings UserError'
  )
  assert set(names.split()) <= set(polar_jax.__all__) <= set(dir(polar_jax))
  with pytest.raises(AttributeError, match='nonsense'):
    polar_jax.nonsense  # noqa: B018


@pytest.mark.long
def test_training_returns_a_model_that_learned(trained):
  assert trained.summary['steps'] == ARGS.steps and trained.summary['validation_accuracy'] > 0.9
  losses = [record['loss'] for record in trained.metrics if 'loss' in record]
  assert len(losses) == ARGS.steps and losses[0] == pytest.approx(math.log(2), abs=1e-6) and losses[-1] < 0.5
  held_out = [example(i) for i in range(60, 80)]
  interval = trained.model.accuracy(held_out)
  assert interval.n == 20 and interval.low <= interval.accuracy <= interval.high and interval.accuracy > 0.9


def test_pairs_that_are_the_same_to_the_model_are_marked(trained, recwarn):
  same, cut = example(1) | {'rejected': example(1)['chosen']}, {'chosen': 'a' * 5_000, 'rejected': 'a' * 5_001}
  interval = trained.model.accuracy([same, example(2) | cut])
  assert interval.accuracy == 0.5 and interval.low < 0.1 and interval.high > 0.9
  lines = [str(warning.message) for warning in recwarn if warning.category is UserWarning]
  assert any('1 of 2 examples have the same text as chosen and rejected (number 0)' in line for line in lines)
  assert any('that the model reads as the same tokens (number 1)' in line for line in lines)


@pytest.mark.long
def test_a_run_continues_when_it_is_called_again(trained, tmp_path, mesh):
  arguments = {'init': 'scratch', 'model': SHAPE, 'tokenizer': 'byte', 'mesh': mesh, 'args': ARGS}
  train = [polar_jax.Triplet(**example(i)) for i in range(40)]
  lines: list[str] = []
  arguments['settings'] = polar_jax.RunSettings(log=lines.append, checkpointing=CheckpointingConfig(every_steps=10))
  short = dataclasses.replace(ARGS, evaluate_every=None)
  again = polar_jax.train_reward_model(train, output_dir=trained.folder, **(arguments | {'args': short}))
  assert 'resumed from step 30 of 30' in lines[0]
  a, b = (m.score('p', 'aaaa', ['aa', 'bb', '']) for m in (trained.model, again.model))
  np.testing.assert_array_equal(a, b)
  with pytest.raises(polar_jax.UserError, match=r'learning_rate was 0\.003, is 0\.001'):
    other = dataclasses.replace(ARGS, learning_rate=1e-3)
    polar_jax.train_reward_model(train, output_dir=trained.folder, **(arguments | {'args': other}))


def test_score_ranks_and_shares_the_prefix(trained):
  rewards = trained.model.score('p7', 'aaaa', ['aaa', 'bbb', 'aaa'])
  assert rewards.dtype == np.float32 and rewards.shape == (3,) and rewards[0] == rewards[2] > rewards[1]
  assert trained.model.score('p7', 'aaaa', []).shape == (0,)
  messages = trained.model.score([{'role': 'user', 'content': 'p7'}], [{'role': 'assistant', 'content': 'aaaa'}], [[{'content': 'aaa'}]])
  np.testing.assert_allclose(messages, rewards[:1], atol=1e-6)
  assert abs(trained.model.score('p7', 'aaaa', ['aaa'], wrapper='pretrain')[0] - rewards[0]) > 1e-6


def test_score_batch_exact_gives_the_bits_of_the_exact_scorer(trained, mesh):
  batch = [{'prompt': f'p{i % 3}', 'reference': 'aa', 'output': 'ab' * (i % 4)} for i in range(8)]
  dense, exact = trained.model.score_batch(batch), trained.model.score_batch(batch, exact=True)
  scorer = ExactScorer(trained.model.params, trained.model.config, Template(TemplateConfig(), ByteTokenizer()), mesh)
  np.testing.assert_array_equal(exact, scorer.score([Group(e['prompt'], e['reference'], [e['output']]) for e in batch]))
  np.testing.assert_array_equal(exact[2:3], trained.model.score_batch(batch[2:3], exact=True))
  np.testing.assert_allclose(dense, exact, atol=1e-5)


@pytest.mark.parametrize(
  ('call', 'message'),
  [
    (lambda m: m.score('p', 'r', 'a string'), 'candidates must be a sequence of texts'),
    (lambda m: m.score('p', 'r', [3]), 'candidate'),
    (
      lambda m: m.score_batch([{'prompt': 'p', 'reference': 'r', 'output': 'o'}, {'prompt': 'p', 'output': 'o'}]),
      "example 1 has no 'reference'",
    ),
    (lambda m: m.accuracy([{'prompt': 'p', 'reference': 'r', 'chosen': 'c'}]), "field 'rejected' is missing"),
    (lambda m: m.accuracy([]), 'no'),
    (lambda m: m.as_reward_func('gold')(['p'], ['c'], reference=['r']), "no column 'gold'.*reference"),
  ],
)
def test_bad_input_is_explained(trained, call, message):
  with pytest.raises(polar_jax.UserError, match=message):
    call(trained.model)


def test_reward_function_in_trls_signature(trained):
  reward = trained.model.as_reward_func()
  plain = reward(
    prompts=['p1', 'p1'], completions=['aaa', 'bbb'], reference=['aaaa', 'aaaa'], completion_ids=[[1], [2]], trainer_state=None
  )
  assert plain == trained.model.score('p1', 'aaaa', ['aaa', 'bbb']).tolist() and all(type(r) is float for r in plain)
  chat = reward([[{'role': 'user', 'content': 'p1'}]], [[{'role': 'assistant', 'content': 'aaa'}]], reference=['aaaa'])
  assert chat == pytest.approx(plain[:1], abs=1e-6)
  assert trained.model.as_reward_func('gold')(['p1'], ['aaa'], gold=['aaaa']) == pytest.approx(plain[:1], abs=1e-6)


def test_saved_model_reads_back_bit_for_bit(trained, tmp_path, mesh):
  trained.model.save(tmp_path / 'saved')
  again, run = polar_jax.load(tmp_path / 'saved', mesh=mesh), polar_jax.load(trained.folder, mesh=mesh)
  batch = [{'prompt': 'p', 'reference': 'aa', 'output': o} for o in ('', 'a', 'bbbb')]
  expected = trained.model.score_batch(batch, exact=True)
  for model in (again, run):
    assert isinstance(model, polar_jax.RewardModel)
    np.testing.assert_array_equal(model.score_batch(batch, exact=True), expected)
  with pytest.raises(polar_jax.UserError, match='already holds a checkpoint'):
    again.save(tmp_path / 'saved')


@pytest.mark.long
def test_hugging_face_folder_gives_the_same_scores(trained, tmp_path, mesh):
  trained.model.save_pretrained(tmp_path / 'hf')
  names = {path.name for path in (tmp_path / 'hf').iterdir()}
  assert {'config.json', 'model.safetensors', 'tokenizer.json'} <= names
  again = polar_jax.load(tmp_path / 'hf', mesh=mesh)
  batch = [{'prompt': 'p', 'reference': 'aa', 'output': o} for o in ('a', 'bbbb')]
  np.testing.assert_array_equal(again.score_batch(batch, exact=True), trained.model.score_batch(batch, exact=True))
  with pytest.raises(polar_jax.UserError, match='not empty'):
    again.save_pretrained(tmp_path / 'hf')
  trained.model.save_pretrained(tmp_path / 'half', dtype='bfloat16')
  half = polar_jax.load(tmp_path / 'half', mesh=mesh, dtype='bfloat16')
  assert half.config.compute_dtype == 'bfloat16'
  np.testing.assert_allclose(half.score_batch(batch), trained.model.score_batch(batch), atol=0.1)


def test_heads_convert_where_they_can(trained, language_model, tmp_path, mesh):
  reward = polar_jax.load(language_model.source, head='reward', mesh=mesh)
  assert isinstance(reward, polar_jax.RewardModel) and reward.score('p', 'r', ['a', 'b']).tolist() == [0.0, 0.0]
  assert isinstance(polar_jax.load(trained.folder, head='value', mesh=mesh), polar_jax.ValueModel)
  with pytest.raises(polar_jax.UserError, match='no vocabulary projection'):
    polar_jax.load(trained.folder, head='lm', mesh=mesh)
  with pytest.raises(polar_jax.UserError, match="head is 'x'; it must be one of: reward, lm, value"):
    polar_jax.load(trained.folder, head='x')
  with pytest.raises(polar_jax.UserError, match='no such file or folder'):
    polar_jax.load(tmp_path / 'nothing')


@pytest.mark.long
def test_starts_from_a_loaded_language_model(language_model, tmp_path, mesh):
  arguments = {'args': dataclasses.replace(ARGS, steps=1, learning_rate=1e-9, warmup_ratio=0.0), 'mesh': mesh, 'settings': QUIET}
  train = [example(i) for i in range(8)]
  loaded = polar_jax.train_reward_model(train, init=language_model, output_dir=tmp_path / 'a', **arguments)
  by_path = polar_jax.train_reward_model(train, init=language_model.source.path, output_dir=tmp_path / 'b', **arguments)
  for result in (loaded, by_path):
    np.testing.assert_allclose(
      np.asarray(result.model.params['decoder']['embedding']), np.asarray(language_model.params['decoder']['embedding']), atol=1e-7
    )


@pytest.mark.long
def test_generate_is_a_function_of_its_seed(language_model):
  prompts = ['hello', 'a longer prompt']
  first = language_model.generate(prompts, max_new=8, seed=1)
  assert [type(text) for text in first] == [str, str]
  assert language_model.generate(prompts, max_new=8, seed=1) == first != language_model.generate(prompts, max_new=8, seed=2)
  greedy = language_model.generate(prompts, max_new=8, temperature=0.0)
  assert greedy == language_model.generate(prompts, max_new=8, temperature=0.0, seed=5)
  assert language_model.generate([]) == []
  with pytest.raises(polar_jax.UserError, match='prompts must be a sequence'):
    language_model.generate('hello')
  with pytest.raises(polar_jax.UserError, match='prompt 0 is a list of messages, but the model has no chat template'):
    language_model.generate([[{'role': 'user', 'content': 'hi'}]])


@pytest.mark.long
def test_logprobs_equal_those_of_the_whole_sequence(language_model):
  import jax
  import jax.numpy as jnp
  from flax import nnx

  from polar_jax.model.heads import abstract_model

  prompts, responses = ['hello', 'x'], ['world!', 'yz']
  found = language_model.logprobs(prompts, responses)
  graphdef, _ = nnx.split(abstract_model(language_model.config, 'lm'))
  model = nnx.merge(graphdef, language_model.params)
  for prompt, response, logprobs in zip(prompts, responses, found, strict=True):
    tokenizer = language_model.tokenizer
    before, after = tokenizer.encode(prompt, add_bos=True), tokenizer.encode(response)
    ids = jnp.asarray([[*before, *after]], jnp.int32)
    n = ids.shape[1]
    logits = model(ids, jnp.arange(n)[None], [(jnp.zeros((1, n), jnp.int32), jnp.arange(1, n + 1)[None])])
    expected = jax.nn.log_softmax(logits[0].astype(jnp.float32))[np.arange(len(before) - 1, n - 1), np.asarray(after)]
    assert logprobs.dtype == np.float32
    np.testing.assert_allclose(logprobs, expected, atol=1e-4)
  with pytest.raises(polar_jax.UserError, match='response 1 has no token'):
    language_model.logprobs(prompts, ['a', ''])
  with pytest.raises(polar_jax.UserError, match='one response for each prompt'):
    language_model.logprobs(prompts, ['a'])


FAST = OptimizerConfig(learning_rate=2e-2, warmup_ratio=0.0, final_lr_ratio=1.0)
RFT = polar_jax.RftConfig(
  steps=12,
  prompts_per_step=8,
  num_generations=4,
  advantage='rloo',
  micro_batch_rows=4,
  track_kl=False,
  shuffled_every=100,
  rollout=RolloutConfig(max_prompt=16, max_new=6, max_concurrent=32),
  actor=FAST,
)


def share_of_letters(prompts, completions, **columns):
  """Return the share of printable ASCII in responses; a third at first for a policy of random bytes."""
  return [sum(' ' <= character <= '~' for character in text) / 6 for text in completions]


@pytest.mark.long
def test_policy_learns_a_python_reward(language_model, tmp_path, mesh):
  result = polar_jax.train_policy(
    language_model,
    [{'prompt': f'p{i}'} for i in range(16)],
    share_of_letters,
    output_dir=tmp_path / 'rft',
    args=RFT,
    mesh=mesh,
    settings=QUIET,
  )
  rewards = [record['raw'] for record in result.metrics if 'raw' in record]
  assert len(rewards) == RFT.steps and np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.1, rewards
  assert isinstance(result.model, polar_jax.LanguageModel) and len(result.model.generate(['p1'], max_new=4)) == 1
  with pytest.raises(polar_jax.UserError, match='reward'):  # another reward is another run
    polar_jax.train_policy(
      language_model, [{'prompt': f'p{i}'} for i in range(16)], [(2.0, share_of_letters)], output_dir=tmp_path / 'rft', args=RFT, mesh=mesh
    )


@pytest.mark.slow  # sums of rewards have tests of their own
def test_policy_takes_a_reward_model_and_a_weighted_sum(language_model, trained, tmp_path, mesh):
  args = dataclasses.replace(RFT, steps=1)
  prompts = [{'prompt': f'p{i}', 'reference': 'aaaa'} for i in range(8)]
  alone = polar_jax.train_policy(language_model, prompts, trained.model, output_dir=tmp_path / 'a', args=args, mesh=mesh, settings=QUIET)
  both = [(0.5, trained.model), (2.0, share_of_letters)]
  mixed = polar_jax.train_policy(language_model, prompts, both, output_dir=tmp_path / 'b', args=args, mesh=mesh, settings=QUIET)
  (a,), (b,) = ([r for r in run.metrics if 'raw' in r] for run in (alone, mixed))
  assert a['raw'] == pytest.approx(a['model']) and b['raw'] == pytest.approx(
    0.5 * b['model'] + 2.0 * b['reward_share_of_letters'], abs=1e-5
  )
  with pytest.raises(polar_jax.UserError, match='reference'):
    polar_jax.train_policy(language_model, [{'prompt': 'p'}], trained.model, output_dir=tmp_path / 'c', args=args, mesh=mesh)
  with pytest.raises(polar_jax.UserError, match='must be a RewardModel, a function, or a list'):
    polar_jax.train_policy(language_model, prompts, [3], output_dir=tmp_path / 'd', args=args, mesh=mesh)


def test_read_examples(tmp_path):
  (tmp_path / 'train.jsonl').write_text('\n'.join(json.dumps(example(i)) for i in range(3)))
  assert [t.prompt for t in polar_jax.read_examples(tmp_path)] == ['p0', 'p1', 'p2']
  with pytest.raises(polar_jax.UserError, match="no split 'test'"):
    polar_jax.read_examples(tmp_path, 'test')


@pytest.mark.long
def test_no_library_warning_reaches_the_user(trained, tmp_path):
  script = (
    'import sys, polar_jax\n'
    f'model = polar_jax.load({str(trained.folder)!r})\n'
    "print(model.score('p', 'aa', ['a', 'b']).shape)\n"
    f'model.save({str(tmp_path / "copy")!r})\n'
  )
  root = pathlib.Path(__file__).parents[1]
  done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, cwd=root)
  assert done.returncode == 0, done.stderr
  assert done.stdout.strip() == '(2,)' and done.stderr.strip() == ''
