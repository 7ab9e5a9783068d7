"""How prompts and responses become calls of the engine and of the forward pass; their results: tests/api_test.py."""

from __future__ import annotations

import pathlib
import types

import jax
import numpy as np
import pytest

from polar_jax import sharding
from polar_jax.config import ConfigError, MeshConfig, RolloutConfig
from polar_jax.data.tokenizer import ByteTokenizer
from polar_jax.ppo import policy
from polar_jax.types import UserError

BOS = ByteTokenizer().encode('', add_bos=True)


def ids_of(text: str) -> list[int]:
  return [*BOS, *text.encode()]


@pytest.mark.parametrize(
  ('count', 'length', 'devices', 'concurrent', 'longest'),
  [(1, 5, 1, 1, 64), (3, 64 - len(BOS), 1, 4, 64), (3, 65 - len(BOS), 1, 4, 128), (65, 1, 1, 64, 64), (3, 200, 8, 8, 256)],
)
def test_slots_and_prompt_lengths_come_in_few_sizes(monkeypatch, count, length, devices, concurrent, longest):
  calls = []

  class Engine:
    def __init__(self, model, mesh, config, stop_ids):
      calls.append((model, config, stop_ids))

    def generate(self, params, ids, seed):
      calls.append((params, ids, seed))
      return 'rollouts'

  monkeypatch.setattr(policy, 'RolloutEngine', Engine)
  monkeypatch.setattr(policy.metrics, 'response_texts', lambda *arguments: arguments)
  mesh, tokenizer = sharding.make_mesh(MeshConfig(), jax.devices()[:devices]), ByteTokenizer()
  texts = ['x' * length, *['y'] * (count - 1)]
  settings = RolloutConfig(max_prompt=3, max_concurrent=99, max_new=7, temperature=0.5, top_p=0.9)
  given = {'chat': None, 'stop_ids': (4,), 'rollout': settings, 'seed': 5}
  assert policy.generate('params', 'model', tokenizer, mesh, texts, **given) == ('rollouts', tokenizer, (4,))
  config = RolloutConfig(max_prompt=longest, max_new=7, temperature=0.5, top_p=0.9, max_concurrent=concurrent)
  assert calls == [('model', config, (4,)), ('params', [ids_of(text) for text in texts], (5,))]
  assert policy.generate('params', 'model', tokenizer, mesh, [], **given) == []


@pytest.mark.parametrize(('devices', 'rows'), [(1, 1), (8, 8)])
def test_log_probabilities_are_those_of_the_tokens_of_each_response(monkeypatch, devices, rows):
  monkeypatch.setattr(policy.learner, 'build_actor', lambda *arguments: types.SimpleNamespace(forward=arguments))
  calls, mesh = [], sharding.make_mesh(MeshConfig(), jax.devices()[:devices])
  values_RT = np.arange(6, dtype=np.float32).reshape(2, 3)
  monkeypatch.setattr(policy.experience, 'run_forward', lambda *arguments: calls.append(arguments) or (values_RT, None))
  found = policy.logprobs('params', 'model', ByteTokenizer(), mesh, ['p', 'long' * 20], ['abc', 'd'], None)
  assert [row.tolist() for row in found] == [[0, 1, 2], [3]] and not any(np.shares_memory(row, values_RT) for row in found)
  ((forward, params, batches, own_mesh, rollouts, outputs),) = calls
  assert (forward[0], forward[2], forward[3]) == ('model', 1, mesh) and (params, own_mesh, outputs) == ('params', mesh, 2)
  assert {batch.tokens_BT.shape for batch in batches} == {(rows, 128)}  # 80 tokens and more
  assert rollouts.prompts == [ids_of('p'), ids_of('long' * 20)] and rollouts.length_R.tolist() == [3, 1]
  assert rollouts.tokens_RT.tolist() == [[*b'abc'], [*b'd', 0, 0]]


def test_what_cannot_be_continued_is_named():
  tokenizer = ByteTokenizer()
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  with pytest.raises(UserError, match='2 prompts and 1 responses'):
    policy.logprobs('params', 'model', tokenizer, mesh, ['a', 'b'], ['c'], None)
  with pytest.raises(UserError, match='response 1 has no token'):
    policy.logprobs('params', 'model', tokenizer, mesh, ['a', 'b'], ['c', ''], None)
  assert policy.logprobs('params', 'model', tokenizer, mesh, [], [], None) == []
  with pytest.raises(UserError, match='prompt 1 is a list of messages'):
    policy.encode_texts(['a', [{'role': 'user', 'content': 'b'}]], tokenizer, None)


def test_texts_and_messages_keep_their_order():
  class Chat:
    source = 'none'

    def render(self, *_, **__):
      raise AssertionError('a string is not rendered')

  assert policy.encode_texts(['a', 'bc'], ByteTokenizer(), Chat()) == [ids_of('a'), ids_of('bc')]


def test_a_policy_is_a_language_model_with_the_tokenizer_next_to_it(tmp_path):
  opened = lambda head, assets: types.SimpleNamespace(head=head, path=pathlib.Path('run'), assets=assets)
  language_model = opened('lm', tmp_path)
  assert policy.check_policy(language_model, 'rft.policy') is language_model
  with pytest.raises(ConfigError, match=r'rft\.policy run: has a reward head; only a language model can be a policy'):
    policy.check_policy(opened('reward', tmp_path), 'rft.policy')
  assert policy.assets_of(language_model) == tmp_path and policy.assets_of(opened('lm', tmp_path / 'nothing')) is None
