"""Our model of lm-eval against its own backend of transformers, on the same weights in float32."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import jax
import pytest
from fast_compilation import environment
from optional import lm_eval, torch

import polar_jax
from polar_jax import sharding
from polar_jax.config import ConfigError, MeshConfig

pytestmark = [pytest.mark.needs('lm_eval', 'torch', 'transformers', 'accelerate'), pytest.mark.data]

TASKS = ['own_choice', 'own_perplexity', 'own_response']
TEMPLATE = (
  '{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}'
)


@pytest.fixture(scope='module')
def manager(task_folder):
  from lm_eval.tasks import TaskManager

  return TaskManager(include_path=str(task_folder), include_defaults=False)


@pytest.fixture(scope='module')
def chatty(stories, tmp_path_factory):
  """The same folder with a chat template, as the tokenizer of transformers reads it too."""
  folder = shutil.copytree(stories, tmp_path_factory.mktemp('chatty') / 'hf')
  (folder / 'chat_template.jinja').write_text(TEMPLATE)
  return folder


def ours(folder, **options):
  from polar_jax.policies.lm_eval_model import Policy

  return Policy(polar_jax.load(folder, mesh=sharding.make_mesh(MeshConfig(), jax.devices()[:1])), **options)


def theirs(folder, **options):
  from lm_eval.models.huggingface import HFLM

  torch.set_num_threads(1)
  return HFLM(pretrained=str(folder), device='cpu', dtype='float32', batch_size=4, **options)


def answers(model, manager, tasks, **options):
  """Return the answers to all requests by task, and the results."""
  found = lm_eval.simple_evaluate(model=model, tasks=tasks, task_manager=manager, bootstrap_iters=0, **options)
  return {task: [r[0] for line in found['samples'][task] for r in line['resps']] for task in tasks}, found['results']


def compare(first, second):
  (a, results_a), (b, results_b) = first, second
  for task, found in a.items():
    assert len(found) == len(b[task])
    if task == 'own_response':
      assert found == b[task]
      assert len(set(found)) > 3
      continue
    if task == 'own_choice':
      assert [p[1] for p in found] == [q[1] for q in b[task]]
      found, expected = [p[0] for p in found], [q[0] for q in b[task]]
    else:
      expected = b[task]
    assert found == pytest.approx(expected, abs=1e-4, rel=1e-6)  # the longest text has a likelihood of -2,000
    for name, value in results_a[task].items():
      if isinstance(value, float):
        assert value == pytest.approx(results_b[task][name], abs=1e-4, rel=1e-4), name


def test_likelihoods_are_those_of_the_backend_of_transformers(stories, manager):
  mine, other = (answers(make(stories), manager, ['own_choice'], limit=6) for make in (ours, theirs))
  compare(mine, other)
  assert {greedy for _, greedy in mine[0]['own_choice']} == {True, False}


@pytest.mark.slow
def test_answers_and_metrics_are_those_of_the_backend_of_transformers(stories, manager):
  policy = ours(stories)
  compare(answers(policy, manager, TASKS), answers(theirs(stories), manager, TASKS))
  assert policy.requests == {'own_choice': 48, 'own_perplexity': 12, 'own_response': 12}
  assert policy.truncated == {'own_choice': 4, 'own_response': 1}


@pytest.mark.slow
def test_a_shorter_length_cuts_and_rolls_as_there(stories, manager):
  policy = ours(stories, max_length=64, add_bos_token=False)
  compare(answers(policy, manager, TASKS), answers(theirs(stories, max_length=64, add_bos_token=False), manager, TASKS))
  assert policy.truncated == {'own_choice': 16, 'own_response': 5}


@pytest.mark.slow
def test_chat_templates_are_applied_as_there(chatty, manager):
  options = {
    'apply_chat_template': True,
    'system_instruction': 'be brief',
    'limit': 8,
    'gen_kwargs': {'until': ['never'], 'max_gen_toks': 12},
  }
  mine, other = ours(chatty), theirs(chatty)
  compare(
    answers(mine, manager, ['own_choice', 'own_response'], **options), answers(other, manager, ['own_choice', 'own_response'], **options)
  )
  talk = [{'role': 'user', 'content': 'a dog'}, {'role': 'assistant', 'content': 'saw '}]
  for generation_prompt in (True, False):
    assert mine.apply_chat_template(talk, generation_prompt) == other.apply_chat_template(talk, generation_prompt)
  assert mine.chat_template(True) == other.chat_template(True) == TEMPLATE
  assert mine.chat_template(False) is None
  text = mine.apply_chat_template(talk)
  assert mine.tok_encode(text) == other.tok_encode(text)
  assert mine.tok_encode(text).count(mine.prefix_token_id) == 1


def test_tokens_are_those_of_transformers(stories):
  mine, other = ours(stories), theirs(stories)
  for name in ('eot_token_id', 'prefix_token_id', 'max_length', 'max_gen_toks'):
    assert getattr(mine, name) == getattr(other, name), name
  for text in ('', 'Lily', ' Lily saw', '<s>Lily'):
    assert mine.tok_encode(text) == other.tok_encode(text)
    assert mine.tok_encode(text, add_special_tokens=False) == other.tok_encode(text, add_special_tokens=False)
  assert mine.tok_decode(mine.tok_encode('Lily saw')) == other.tok_decode(other.tok_encode('Lily saw'))


def test_settings_that_do_not_fit_are_named(stories):
  for options, named in (
    ({'path': 'x'}, 'name one language model'),
    ({'dtype': 'float32'}, 'dtype and tokenizer are those of the given model'),
    ({'batch_size': 'many'}, "batch_size is 'many'"),
  ):
    with pytest.raises(ConfigError, match=named):
      ours(stories, **options)
  policy = ours(stories, batch_size='auto:2', max_batch_size=3)
  assert policy.policy._rows == 3
  with pytest.raises(ConfigError, match='no chat template'):
    policy.chat_template(True)
  with pytest.raises(ConfigError, match='templates have no names'):
    policy.chat_template('default')


@pytest.mark.slow
def test_the_command_runs_the_model_by_name(stories, task_folder, tmp_path):
  command = [sys.executable, '-m', 'polar_jax.policies', 'run', '--model', 'polar_jax', '--model_args', f'path={stories}']
  command += ['--tasks', 'own_choice', '--include_path', str(task_folder), '--limit', '2', '--output_path', str(tmp_path / 'out')]
  done = subprocess.run(command, env=environment(HF_HUB_OFFLINE='1'), capture_output=True, text=True, timeout=600)
  assert done.returncode == 0, done.stderr
  (file,) = (tmp_path / 'out').rglob('results_*.json')
  results = json.loads(file.read_text())
  assert results['config']['batch_size'] == 'auto' and 0 <= results['results']['own_choice']['acc,none'] <= 1
