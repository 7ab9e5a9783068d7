"""The adapters, called with the arguments that each trainer uses."""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import pathlib
import pickle
import runpy
import sys
import types

import numpy as np
import pytest
from optional import httpx  # noqa: F401
from serve.reward_stand_in import reward_of, reward_server
from synthesis.server_stand_in import error, send

from polar_jax.serve import RewardClient, RewardRequestError
from polar_jax.serve.adapters import openrlhf, polar, shared, slime, swift, trl, tunix, verl
from polar_jax.types import UserError

pytestmark = pytest.mark.needs('httpx')

EXAMPLES = pathlib.Path(__file__).parents[2] / 'examples'


@pytest.fixture
def server(monkeypatch):
  with reward_server() as server:
    monkeypatch.setenv('POLAR_REWARD_ADDRESS', server.url)
    yield server
    for client in _made:
      client.close()
    _made.clear()
    shared._client.cache_clear()


_made: list[RewardClient] = []


@pytest.fixture(autouse=True)
def remember_clients(monkeypatch):
  def make(address):
    _made.append(RewardClient(address))
    return _made[-1]

  monkeypatch.setattr(shared, 'RewardClient', make)


def user(text):
  return [{'role': 'user', 'content': text}]


def assistant(text):
  return [{'role': 'assistant', 'content': text}]


def test_other_keys_of_messages_are_not_sent():
  """The server refuses them, because they would change nothing."""
  message = {'role': 'assistant', 'content': 'a', 'tool_calls': None}
  assert shared.plain((message,)) == shared.plain(np.array([message], object)) == [{'role': 'assistant', 'content': 'a'}]
  assert shared.plain([1]) == [1] and shared.plain('a') == 'a' and shared.plain(None) is None


def trl_arguments(prompts, completions):
  """Return what GRPOTrainer passes, with a column `reference` and another one."""
  n = len(prompts)
  state = {'trainer_state': object(), 'log_extra': print, 'log_metric': print}
  return {
    'prompts': prompts,
    'completions': completions,
    'completion_ids': [[1, 2]] * n,
    'reference': [f'r{i}' for i in range(n)],
    'task': ['x'] * n,
    **state,
  }


@pytest.mark.parametrize('name', ['polar_reward', 'async_polar_reward'])
def test_trl_plain_and_conversational(server, name):
  function = getattr(trl, name)
  assert function.__name__ == name and inspect.iscoroutinefunction(function) == (name == 'async_polar_reward')
  call = lambda **arguments: asyncio.run(function(**arguments)) if name == 'async_polar_reward' else function(**arguments)
  expected = [reward_of('p0', 'r0', 'a'), reward_of('p1', 'r1', 'b')]
  assert call(**trl_arguments(['p0', 'p1'], ['a', '<think>x</think> b '])) == expected
  assert call(**trl_arguments([user('p0'), user('p1')], [assistant('a'), assistant('b')])) == expected
  # With tools, what counts is the last message.
  tools = [*assistant('I look it up.'), {'role': 'tool', 'content': '3'}, *assistant('b')]
  assert call(**trl_arguments([user('p0'), user('p1')], [assistant('a'), tools])) == expected


def test_trl_settings(server):
  with RewardClient(server.url, wrapper='pretrain') as client:
    function = trl.reward_function(client, name='mine', reference='gold', strip_thinking=False)
    assert function.__name__ == 'mine'
    assert function(prompts=['p'], completions=['</think>a'], gold=['r']) == [reward_of('p', 'r', '</think>a', 'pretrain')]
  with pytest.raises(UserError, match="no column 'gold'"):
    function(prompts=['p'], completions=['a'], reference=['r'])
  with pytest.raises(UserError, match="'gold' has 2 values for 1 completions"):
    function(prompts=['p'], completions=['a'], gold=['r', 'r'])
  with pytest.raises(UserError, match=r'references\[1\] must be a string'):
    trl.polar_reward(prompts=['p', 'p'], completions=['a', 'b'], reference=['r', None])


def test_without_an_address_the_variable_is_named(monkeypatch):
  monkeypatch.delenv('POLAR_REWARD_ADDRESS', raising=False)
  with pytest.raises(UserError, match='POLAR_REWARD_ADDRESS'):
    trl.polar_reward(prompts=['p'], completions=['a'], reference=['r'])


def test_a_failure_is_raised_and_never_a_number(server):
  server.act = error(400, 'no')
  for call in (
    lambda: trl.polar_reward(prompts=['p'], completions=['a'], reference=['r']),
    lambda: asyncio.run(verl.compute_score('x', 'a', 'r', {'prompt': 'p'})),
    lambda: verl.compute_score_batch(['x'], ['a'], ['r'], [{'prompt': 'p'}]),
    lambda: openrlhf.reward_func(['pa'], ['p'], ['r']),
    lambda: asyncio.run(slime.reward(None, types.SimpleNamespace(prompt='p', response='a', label='r'))),
    lambda: swift.PolarReward()(['a'], [user('p') + assistant('a')], reference=['r']),
    lambda: polar.RewardModelClient('m', server_address=server.url)([{'prompt': 'p', 'reference': 'r', 'output': 'a'}]),
  ):
    with pytest.raises(RewardRequestError, match='status 400: no'):
      call()


def test_verl_scores_samples_in_shared_requests(server):
  rows = [
    # As pandas reads messages of Parquet.
    {'ground_truth': np.array(assistant(f'r{i}'), object), 'extra_info': {'index': i, 'prompt': np.array(user(f'p{i}'), object)}}
    for i in range(6)
  ]

  async def worker():
    return await asyncio.gather(
      *(verl.compute_score(data_source='x', solution_str=f'<think>t</think>o{i}', **row) for i, row in enumerate(rows))
    )

  assert asyncio.run(worker()) == [reward_of(f'p{i}', f'r{i}', f'o{i}') for i in range(6)]
  assert len(server.requests) == 1
  # With a reward model of verl's own there are two more arguments; reward_kwargs are arguments too.
  more = {'reward_router_address': 'x', 'reward_model_tokenizer': None, 'prompt_key': 'question', 'strip_thinking': False}
  score = verl.compute_score(
    data_source='x', solution_str='</think>o', ground_truth='r', extra_info={'question': 'p'}, address=server.url, **more
  )
  assert asyncio.run(score) == reward_of('p', 'r', '</think>o')
  with pytest.raises(UserError, match="extra_info has no 'prompt'"):
    asyncio.run(verl.compute_score(data_source='x', solution_str='o', ground_truth='r', extra_info={'index': 1}))


def test_verl_batches(server):
  infos = [{'ability': 'math', 'split': 'train', 'prompt': user(f'p{i}')} for i in range(3)]
  call = {'data_sources': ['x'] * 3, 'solution_strs': ['a', 'b', 'c'], 'ground_truths': [assistant('r')] * 3, 'extra_infos': infos}
  assert verl.compute_score_batch(**call) == [reward_of(f'p{i}', 'r', o) for i, o in enumerate('abc')]
  with pytest.raises(UserError, match=r"extra_infos\[1\] has no 'prompt'"):
    verl.compute_score_batch(**call | {'extra_infos': [infos[0], {}, infos[2]]})


def test_openrlhf(server):
  expected = [reward_of('<u>p', 'r', '<u>p a</s>')]
  assert openrlhf.reward_func(['<u>p a</s>'], ['<u>p'], ['r']) == {
    'rewards': expected,
    'scores': expected,
    'extra_logs': {'polar': expected},
  }
  path, _, body = server.requests[0]
  assert (path, body) == ('/get_reward', {'query': ['<u>p a</s>'], 'prompts': ['<u>p'], 'labels': ['r']})
  openrlhf.reward_func(['<u>p<think>t</think> a</s>', 'x</think>y'], ['<u>p', 'z'], ['r', [{'role': 'assistant', 'content': 'r'}]])
  assert server.requests[1][2]['query'] == ['<u>pa</s>', 'x</think>y']
  server.act = send({'rewards': []})
  with pytest.raises(RewardRequestError, match='does not have 1 rewards'):
    openrlhf.reward_func(['a'], ['p'], ['r'])


def test_slime(server):
  samples = [types.SimpleNamespace(prompt=user('p'), response=f'<think>t</think>o{i}', label='r') for i in range(2)]
  expected = [reward_of('p', 'r', f'o{i}') for i in range(2)]
  assert asyncio.run(slime.reward(None, samples[0])) == expected[0]
  assert asyncio.run(slime.reward(None, samples, evaluation=False)) == expected


def test_swift(server):
  conversations = [[*user('p'), *assistant('</think>a')], [*user('q'), *assistant('b')]]
  call = {'reference': ['r', 's'], 'prompt_id': ['1', '2'], 'trainer_state': None}
  assert swift.PolarReward(args=None)(['</think>a', 'b'], messages=conversations, **call) == [
    reward_of('p', 'r', 'a'),
    reward_of('q', 's', 'b'),
  ]


def test_tunix_takes_one_function_from_the_module(server):
  taken = [f for name, f in inspect.getmembers(tunix, inspect.isfunction) if not name.startswith('_') and f.__module__ == tunix.__name__]
  assert taken == [tunix.polar_reward]
  call = {'prompts': ['<t>p'], 'completions': ['a'], 'reference': np.array(['r']), 'mode': 'train'}
  assert tunix.polar_reward(**call) == [reward_of('<t>p', 'r', 'a')]
  assert tunix.polar_reward(**call, raw_prompt=np.array(['p'])) == [reward_of('p', 'r', 'a')]


def example(output, **more):
  return {'prompt': user('p'), 'reference': assistant('r'), 'output': output, **more}


def test_the_official_class(server):
  client = polar.RewardModelClient(
    'internlm/POLAR-7B',
    max_length=16384,
    max_response_length=4096,
    response_cut_side='right',
    server_type='vllm',
    server_address=server.url,
  )
  text = client.encode(example('a'))
  assert isinstance(text, str) and text == 'p\nr<|reward|>p\na[UNUSED_TOKEN_130]'
  texts = client.encode([example('a'), example('b', wrapper='pretrain'), 'a finished text'])
  assert texts[1:] == ['pr<|reward|>pb[UNUSED_TOKEN_130]', 'a finished text']
  expected = [reward_of('p', 'r', 'a'), reward_of('p', 'r', 'b', 'pretrain'), reward_of('', '', 'a finished text')]
  assert client(texts) == expected and client(pickle.loads(pickle.dumps(texts))) == expected
  assert client([]) == [] and client(text) == expected[:1]
  assert next(body for path, _, body in server.requests if path == '/classify') == {'model': 'POLAR-7B', 'text': ['a finished text']}


@pytest.mark.parametrize(
  ('data', 'expected'),
  [
    ({'prompt': 'p', 'reference': 'r', 'output': 'o', 'extra': 1}, "unknown key 'extra'"),
    ({'prompt': 'p', 'reference': 'r'}, "no 'output'"),
    ({'prompt': 'p', 'reference': 'r', 'output': 'o', 'wrapper': 'x'}, "wrapper 'x'"),
    ({'prompt': 'p', 'reference': None, 'output': 'o'}, 'reference must be'),
    ([1], 'an example must be a dict'),
  ],
)
def test_the_official_class_refuses_examples_as_type_errors(server, data, expected):
  with pytest.raises(TypeError, match=expected):
    polar.RewardModelClient('m', server_address=server.url).encode(data)


@pytest.mark.parametrize(
  ('setting', 'expected'),
  [
    ({'max_length': 4096}, 'max_length is 4096, .*--config.template.max_length=4096'),
    ({'max_response_length': 1}, '--config.template.max_response_length=1'),
    ({'response_cut_side': 'left'}, 'always cuts the end of a response'),
    ({'server_type': 'tgi'}, 'server_type'),
  ],
)
def test_the_official_class_refuses_what_it_cannot_do(setting, expected):
  with pytest.raises(UserError, match=expected):
    polar.RewardModelClient('m', **setting)


def load(path):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def test_the_examples_hand_on_the_adapters(server, monkeypatch, capsys):
  assert load(EXAMPLES / 'openrlhf_reward.py').reward_func is openrlhf.reward_func
  assert load(EXAMPLES / 'verl_reward.py').compute_score is verl.compute_score
  rewards = types.SimpleNamespace(orms={})
  monkeypatch.setitem(sys.modules, 'swift', types.SimpleNamespace(rewards=rewards))
  monkeypatch.setitem(sys.modules, 'swift.rewards', rewards)
  load(EXAMPLES / 'swift_plugin.py')
  assert rewards.orms == {'polar': swift.PolarReward}
  monkeypatch.setattr(sys, 'argv', ['polar_client.py', server.url])
  runpy.run_path(str(EXAMPLES / 'polar_client.py'), run_name='__main__')
  assert f'{reward_of("Name a prime number between 20 and 30.", "23", "27"):8.4f}  27\n' in capsys.readouterr().out


def test_the_trl_example_passes_its_arguments(server, monkeypatch):
  made = {}

  class GRPOTrainer:
    def __init__(self, **arguments):
      made.update(arguments)

    def train(self):
      made['trained'] = made['reward_funcs'](**trl_arguments(['p'], ['a']))

  parser = lambda kind: types.SimpleNamespace(parse_args_and_config=lambda arguments: (arguments,))
  monkeypatch.setitem(sys.modules, 'trl', types.SimpleNamespace(TrlParser=parser, GRPOConfig=None, GRPOTrainer=GRPOTrainer))
  monkeypatch.setitem(
    sys.modules, 'datasets', types.SimpleNamespace(load_dataset=lambda kind, data_files, split: (kind, data_files, split))
  )
  monkeypatch.setattr(sys, 'argv', ['trl_grpo.py', 'model', 'data.jsonl', 'out', '--max_steps', '3'])
  runpy.run_path(str(EXAMPLES / 'trl_grpo.py'), run_name='__main__')
  assert made['args'] == ['--output_dir', 'out', '--max_steps', '3'] and made['train_dataset'] == ('json', 'data.jsonl', 'train')
  assert made['model'] == 'model' and made['trained'] == [reward_of('p', 'r0', 'a')]
