"""Reward functions: their arguments, the results that they may return, and the messages of those that are refused."""

from __future__ import annotations

import functools
import os
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from polar_jax.config import ConfigError, parse
from polar_jax.ppo.rewards import sources
from polar_jax.ppo.rewards.python import PythonReward, RewardFunctionError, load_function
from polar_jax.ppo.rewards.sources import RewardError, RewardSum, score_on_first_process
from polar_jax.types import Prompt, UserError

CHAT = [{'role': 'system', 'content': 'S'}, {'role': 'user', 'content': 'U'}]
PROMPTS = [
  Prompt('one', 'ref 1', '1', 'maths', {'source': 'a'}),
  Prompt(CHAT, [{'role': 'assistant', 'content': 'ref 2'}]),
  Prompt('one', 'ref 1', '1', 'maths', {'source': 'a'}),
]
RESPONSES = ['x', 'yy', '']


def lengths(completions, **_):
  return [len(c if isinstance(c, str) else c[0]['content']) for c in completions]


def test_score_calls_the_function_as_trl_does():
  calls = []

  def reward(**columns):
    calls.append(columns)
    return [0.5, -1.25, 2]

  rewards = PythonReward(reward).score(PROMPTS, RESPONSES)
  assert rewards.dtype == np.float32 and rewards.tolist() == [0.5, -1.25, 2.0]
  assert calls == [
    {
      'prompts': ['one', CHAT, 'one'],
      'completions': ['x', [{'role': 'assistant', 'content': 'yy'}], ''],
      'reference': ['ref 1', [{'role': 'assistant', 'content': 'ref 2'}], 'ref 1'],
      'answer': ['1', '', '1'],
      'category': ['maths', '', 'maths'],
      'metadata': [{'source': 'a'}, {}, {'source': 'a'}],
    }
  ]


def test_score_passes_only_the_arguments_that_are_named():
  seen = []
  functions = [
    lambda completions: seen.append(completions) or [1, 2, 3],
    lambda prompts, answer: seen.append((prompts, answer)) or [1, 2, 3],
    lambda *, reference, weight=2.0: seen.append(reference) or [1, 2, 3],
    functools.partial(lambda scale, completions: seen.append(completions) or [scale] * 3, 4),
    type('Scorer', (), {'__call__': lambda self, completions, metadata: seen.append(metadata) or [1, 2, 3]})(),
  ]
  for function in functions:
    PythonReward(function).score(PROMPTS, RESPONSES)
  completions = ['x', [{'role': 'assistant', 'content': 'yy'}], '']
  assert seen[:2] == [completions, (['one', CHAT, 'one'], ['1', '', '1'])]
  assert seen[2:] == [['ref 1', PROMPTS[1].reference, 'ref 1'], completions, [{'source': 'a'}, {}, {'source': 'a'}]]


def test_a_function_cannot_change_the_data_set():
  def spoil(prompts, completions, reference, metadata):
    prompts[1][0]['content'] = reference[1][0]['content'] = metadata[0]['source'] = 'spoiled'
    return [0, 0, 0]

  PythonReward(spoil).score(PROMPTS, RESPONSES)
  assert CHAT[0]['content'] == 'S' and PROMPTS[1].reference[0]['content'] == 'ref 2' and PROMPTS[0].metadata['source'] == 'a'


@pytest.mark.parametrize(
  'result',
  [
    (0, 1, 2),
    [False, True, 2],
    [np.float64(0), np.int32(1), np.array(2.0)],
    np.arange(3),
    jnp.arange(3.0),
    range(3),
    iter([0, 1, 2]),
  ],
)
def test_results_of_every_numeric_type(result):
  assert PythonReward(lambda completions: result).score(PROMPTS, RESPONSES).tolist() == [0, 1, 2]


@pytest.mark.parametrize('value', [None, float('nan'), float('inf'), float('-inf'), 1e39, '1.0', b'1', [1.0], np.ones(1), {}, 10**400, 1j])
def test_a_value_that_is_not_a_finite_number_is_refused(value):
  def broken(completions):
    return [1.0, value, 2.0]

  with pytest.raises(RewardFunctionError) as caught:
    PythonReward(broken, 'my_rewards:broken').score(PROMPTS, RESPONSES)
  message = str(caught.value)
  assert message.startswith('reward function my_rewards:broken returned ') and "for completion 1 'yy' (prompt 'S\\nU')" in message
  assert repr(value)[:60].replace("'", '') in message.replace("'", '').replace('\\', '') and '\n' not in message
  assert message.endswith('it must return a finite number for every completion')
  assert isinstance(caught.value, RewardError) and isinstance(caught.value, UserError)


@pytest.mark.parametrize(
  ('result', 'message'),
  [
    ([1.0, 2.0], r'returned 2 rewards for 3 completions \(completion 2 has none\); it must return one number per completion'),
    ([1.0] * 4, r'returned 4 rewards for 3 completions \(the last completion is 2\)'),
    ([], r'returned 0 rewards for 3 completions \(completion 0 has none\)'),
    (None, 'returned None; it must return a list with one number per completion'),
    (1.5, 'returned a float; it must return a list'),
    ('123', 'returned a str; it must return a list'),
    ({0: 1.0, 1: 1.0, 2: 1.0}, 'returned a dict; it must return a list'),
  ],
)
def test_a_result_that_is_not_one_number_per_completion_is_refused(result, message):
  with pytest.raises(RewardFunctionError, match=f'reward function my_rewards:broken {message}'):
    PythonReward(lambda completions: result, 'my_rewards:broken').score(PROMPTS, RESPONSES)


def test_an_exception_names_the_function_the_error_and_its_place():
  def broken(completions):
    raise KeyError('no such\nkey')

  with pytest.raises(
    RewardFunctionError, match=r'reward function f raised KeyError: .*python_test\.py, line \d+.*repeat the command'
  ) as caught:
    PythonReward(broken, 'f').score(PROMPTS, RESPONSES)
  assert isinstance(caught.value.__cause__, KeyError) and '\n' not in str(caught.value)


def test_nothing_to_score_and_unequal_lengths():
  source = PythonReward(lambda completions: 1 / 0)
  assert source.score([], []).shape == (0,) and source.score([], []).dtype == np.float32  # without a call
  with pytest.raises(ValueError, match='2 prompts and 3 completions'):
    source.score(PROMPTS[:2], RESPONSES)


@pytest.mark.parametrize(
  ('function', 'argument'),
  [
    (lambda prompts, completions, solution: [], 'solution'),
    (lambda completions, *, ground_truth: [], 'ground_truth'),
    (eval('lambda completions, /: []'), 'completions'),
  ],
)
def test_a_function_that_requires_an_unknown_argument_is_refused(function, argument):
  with pytest.raises(ConfigError, match=f"reward function f requires the argument '{argument}'; .*prompts, completions, reference, answer"):
    PythonReward(function, 'f')


@pytest.mark.parametrize(('value', 'kind'), [(None, 'None'), ([1], 'a list'), (dict, 'a class')])
def test_a_reward_that_is_not_a_function_is_refused(value, kind):
  with pytest.raises(ConfigError, match=f'is {kind}, not a function; pass a function or another callable object'):
    PythonReward(value)


def test_the_name_is_that_of_the_module_and_the_function():
  assert PythonReward(lengths).name == f'{__name__}:lengths'
  assert PythonReward(functools.partial(lengths)).name == 'functools:partial'


def test_a_function_is_one_source_of_a_sum():
  """Any number of named sources; thinking is stripped before a function sees a completion."""
  sources_ = {f'length_{i}': (weight, PythonReward(lengths)) for i, weight in enumerate((1.0, -0.5, 0.0))}
  reward = RewardSum(sources_, strip_thinking=True)
  components = reward.components(PROMPTS, ['<think>hm</think> abc', 'de', ''])
  assert {name: values.tolist() for name, values in components.items()} == {f'length_{i}': [3, 2, 0] for i in range(3)}
  assert reward.total(components).tolist() == [1.5, 1.0, 0.0]
  kept = RewardSum({'f': (1.0, PythonReward(lengths))}, strip_thinking=False).components(PROMPTS[:1], ['<think>hm</think> abc'])
  assert kept['f'].tolist() == [21]


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """A current directory that is not on the Python path, as for the installed command."""
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, 'path', [p for p in sys.path if p])
  before = set(sys.modules)
  yield tmp_path
  for name in set(sys.modules) - before:
    del sys.modules[name]


def test_load_function_finds_modules_of_the_current_directory(folder):
  (folder / 'my_rewards.py').write_text('def f(completions):\n  return [len(c) for c in completions]\nclass C:\n  g = staticmethod(f)\n')
  (folder / 'package').mkdir()
  (folder / 'package' / 'inner.py').write_text('h = lambda completions: [7] * len(completions)\n')
  prompts = [Prompt('p', 'r')] * 2
  for path, wanted in (('my_rewards:f', [1, 3]), ('my_rewards:C.g', [1, 3]), ('package.inner:h', [7, 7])):
    assert PythonReward(load_function(path), path).score(prompts, ['a', 'abc']).tolist() == wanted
  assert sys.path.count(os.getcwd()) == 1


@pytest.mark.parametrize(
  ('path', 'message'),
  [
    ('my_rewards', r"is 'my_rewards'; set it to 'module:name', for example"),
    ('my_rewards:', "is 'my_rewards:'; set it to 'module:name'"),
    (':f', "is ':f'; set it to 'module:name'"),
    (
      'elsewhere:f',
      r"there is no module 'elsewhere' in .*; start the command in the folder that holds it, or add that folder to PYTHONPATH",
    ),
    ('elsewhere.inner:f', "there is no module 'elsewhere' in"),
    ('my_rewards.inner:f', "there is no module 'my_rewards.inner' in"),
    (
      'needs_another:f',
      r"importing needs_another raised ModuleNotFoundError: No module named 'nowhere' \(.*needs_another.py, line 2\); fix",
    ),
    ('fails:f', r'importing fails raised ZeroDivisionError: division by zero \(.*fails.py, line 1\); fix the module'),
    ('wrong:f', r'importing wrong raised SyntaxError: .*\(.*wrong.py, line 1\)'),
    ('my_rewards:g', r"module my_rewards \(.*my_rewards.py\) has no 'g'; name a function that it defines"),
    ('my_rewards:number', 'it is an int, not a function; name a function or another callable object'),
    ('my_rewards:Class', 'it is a class, not a function'),
  ],
)
def test_load_function_refuses_unusable_names(folder, path, message):
  (folder / 'my_rewards.py').write_text('number = 3\nclass Class:\n  pass\ndef f():\n  pass\n')
  (folder / 'needs_another.py').write_text('\nimport nowhere\n')
  (folder / 'fails.py').write_text('1 / 0\n')
  (folder / 'wrong.py').write_text('def f(:\n')
  with pytest.raises(ConfigError, match=rf'rft\.reward\.function.*{message}') as caught:
    load_function(path)
  assert '\n' not in str(caught.value)


def test_only_the_first_process_scores_and_all_share_its_failure(monkeypatch):
  """Two processes in turn, with the broadcast between them by hand."""
  sent, process = [], {'index': 0}

  def broadcast(value):
    if process['index'] == 0:
      sent.append(value)
    return sent[-1]

  monkeypatch.setattr(sources.jax, 'process_count', lambda: 2)
  monkeypatch.setattr(sources.jax, 'process_index', lambda: process['index'])
  monkeypatch.setattr(sources.multihost_utils, 'broadcast_one_to_all', broadcast)
  calls, rewards = [], []

  def count(completions):
    calls.append(process['index'])
    return [len(calls), 5, 6]

  for process['index'] in range(2):
    rewards.append(PythonReward(count).score(PROMPTS, RESPONSES).tolist())
  assert rewards == [[1, 5, 6]] * 2 and calls == [0]
  broken = PythonReward(lambda completions: 1 / 0, 'f')
  for process['index'], message in ((0, 'f raised ZeroDivisionError'), (1, 'f failed on the first process; see its log')):
    with pytest.raises(RewardFunctionError, match=f'reward function {message}'):
      broken.score(PROMPTS, RESPONSES)
  process['index'] = 0
  with pytest.raises(ZeroDivisionError):  # not an expected error: it is not caught
    score_on_first_process(lambda: 1 / 0, 1, UserError, UserError('elsewhere'))


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'source': 'python'}, r"rft\.reward\.source is 'python', but rft\.reward\.function is not set; set it to 'module:name'"),
    ({'function': 'm:f'}, r"rft\.reward\.function is set, but rft\.reward\.source is 'model'; set rft\.reward\.source to 'python'"),
    ({'source': 'function'}, r"rft\.reward\.source is 'function'; it must be one of: model, http, python"),
  ],
)
def test_settings_that_do_not_fit_together(settings, message):
  with pytest.raises(ConfigError, match=message):
    parse(ConfigDict({'rft': {'reward': settings}}))
  reward = parse(ConfigDict({'rft': {'reward': {'source': 'python', 'function': 'm:f'}}})).rft.reward
  assert (reward.source, reward.function) == ('python', 'm:f')
