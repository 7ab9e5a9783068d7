"""Policies that are sampled without a server, and the backends that they are sampled on."""

from __future__ import annotations

import importlib.machinery
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

import polar_jax
from polar_jax.config import ConfigError, ModelConfig, PoolConfig
from polar_jax.synthesis import local, workers
from polar_jax.synthesis.plan import Unit
from polar_jax.synthesis.pool import PolicySpec
from polar_jax.synthesis.samples import Failure, PoolPrompt, QuarantineError, Request, Sample, seed_of
from polar_jax.synthesis.vllm_offline import VllmSampler

MODEL = ModelConfig(num_layers=2, d_model=16, d_ff=32, num_heads=2, num_kv_heads=1, head_dim=8, max_position=64, init_std=0.3)
WORDS = ' '.join(f'the {noun} {verb} a {noun} .' for noun in ('cat', 'dog', 'bird') for verb in ('sees', 'hears', 'likes'))


def requests_of(*texts, samples=2, name='p'):
  prompts = [PoolPrompt(f'{i}', text, 'prefix', 'f', i, 'train') for i, text in enumerate(texts)]
  return [Request(prompt, i, seed_of(0, name, prompt.id, i)) for prompt in prompts for i in range(samples)]


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
  folder = tmp_path_factory.mktemp('lm') / 'checkpoint'
  polar_jax.LanguageModel.init(MODEL, 'byte').save(folder)
  return folder


def spec_of(checkpoint, **settings):
  return PolicySpec('p', 'checkpoint', max_tokens=8, settings={'path': str(checkpoint), **settings})


def test_a_checkpoint_answers_every_request_the_same_way_again(checkpoint):
  sampler = local.CheckpointSampler(spec_of(checkpoint))
  requests = requests_of('ab', 'abc', 'x' * 80)
  answers = sampler.sample(requests)
  assert answers[4:] == [Failure('the prompt is too long for the model')] * 2
  assert all(isinstance(answer, Sample) and answer.ended == (answer.tokens < 8) for answer in answers[:4])
  assert answers[0] != answers[1] and local.CheckpointSampler(spec_of(checkpoint)).sample(requests) == answers
  assert sampler.counts()['requests'] == 6 and sampler.counts()['tokens'] >= sum(answer.tokens for answer in answers[:4])
  other = [request._replace(seed=request.seed + 1) for request in requests]
  assert sampler.sample(other)[:4] != answers[:4]


@pytest.mark.long
def test_variants_of_a_checkpoint(checkpoint):
  requests = requests_of('ab', 'cd', 'ef', samples=1)
  whole, first, rounded = (
    local.CheckpointSampler(spec_of(checkpoint, **settings)).sample(requests) for settings in ({}, {'layers': 1}, {'bits': 2})
  )
  assert whole != first != rounded != whole
  with pytest.raises(ConfigError, match="policy 'p': layers is 3, but the checkpoint has 2"):
    local.CheckpointSampler(spec_of(checkpoint, layers=3))
  with pytest.raises(ConfigError, match='has no chat template; remove chat to continue plain text'):
    local.CheckpointSampler(spec_of(checkpoint, chat=True))


def test_rounded_weights_have_few_values_and_are_near():
  weights = np.random.default_rng(0).normal(size=(2, 3, 40)).astype(np.float32)
  for bits in (2, 4, 8):
    got = np.asarray(local.rounded(jnp.asarray(weights), bits))
    for row, rounded in zip(weights.reshape(-1, 40), got.reshape(-1, 40), strict=True):
      step = np.abs(row).max() / (2 ** (bits - 1) - 1)
      assert len(np.unique(np.round(rounded / step))) <= 2**bits - 1 and np.abs(rounded - row).max() <= step / 2 * 1.0001
  vector = jnp.ones((2, 3)) * 0.3
  assert local.rounded(vector, 2) is vector


def test_ngrams_continue_a_text_they_have_read(tmp_path):
  (tmp_path / 't.txt').write_text('\n\n'.join([WORDS] * 20), encoding='utf-8')
  spec = PolicySpec('p', 'ngram', max_tokens=12, settings={'path': [str(tmp_path / 't.txt')], 'order': 3, 'vocab_size': 300})
  sampler = local.NgramSampler(spec)
  requests = requests_of('the cat', 'the dog', '\u00e9')
  answers = sampler.sample(requests)
  assert local.NgramSampler(spec).sample(requests[::-1]) == answers[::-1]  # each is a function of its request
  known = set(WORDS.split())
  words = [word for answer in answers[:4] for word in answer.text.split()[1:-1]]
  assert len(words) > 4 and sum(word in known for word in words) > 0.7 * len(words)
  assert sampler.counts() == {'requests': 6, 'tokens': sum(answer.tokens for answer in answers)}
  with pytest.raises(ConfigError, match=r'temperature is 0\.05; n-grams need at least 0\.1'):
    local.NgramSampler(PolicySpec('p', 'ngram', temperature=0.05, settings=spec.settings))


class FakeVllm(types.ModuleType):
  """What VllmSampler calls of vLLM: answers with the settings of a request."""

  def __init__(self, error=None):
    super().__init__('vllm')
    self.__spec__ = importlib.machinery.ModuleSpec('vllm', None)
    self.SamplingParams = lambda **settings: settings
    self.made, module = [], self

    class LLM:
      def __init__(self, **settings):
        module.made.append(settings)
        if error:
          raise error

      def generate(self, texts, sampling, use_tqdm):
        finish = lambda text: 'length' if text == 'long' else 'stop'
        output = lambda text, one: types.SimpleNamespace(text=f'{text} {one["seed"]}', token_ids=[1, 2], finish_reason=finish(text))
        return [
          types.SimpleNamespace(outputs=[output(text, one)], prompt_token_ids=[1, 2, 3]) for text, one in zip(texts, sampling, strict=True)
        ]

      def chat(self, conversations, sampling, use_tqdm):
        return self.generate([str([tuple(m.values()) for m in messages]) for messages in conversations], sampling, use_tqdm)

    self.LLM = LLM


def test_vllm_in_this_process(monkeypatch):
  spec = PolicySpec('p', 'vllm', max_tokens=5, settings={'model': 'm', 'engine': {'dtype': 'float32'}})
  with pytest.raises(ConfigError, match='vLLM is not installed; install it where the policy is sampled, or serve the model elsewhere'):
    VllmSampler(spec)
  monkeypatch.setitem(sys.modules, 'vllm', fake := FakeVllm())
  requests = requests_of('short', 'long', samples=1)
  sampler = workers.open_sampler(spec)
  assert sampler.sample(requests) == [Sample(f'short {requests[0].seed}', True, 2), Sample(f'long {requests[1].seed}', False, 2)]
  assert sampler.counts() == {'requests': 2, 'tokens': 4, 'prompt_tokens': 6} and fake.made == [{'model': 'm', 'dtype': 'float32'}]
  chat = VllmSampler(PolicySpec('p', 'vllm', settings={'model': 'm', 'chat': True, 'system': 's'}))
  assert chat.sample(requests)[0].text == f"[('system', 's'), ('user', 'short')] {requests[0].seed}"
  monkeypatch.setitem(sys.modules, 'vllm', FakeVllm(RuntimeError('no\nGPU')))
  with pytest.raises(QuarantineError, match=r'vLLM cannot load m .no GPU.; correct model or engine'):
    VllmSampler(spec)


def ngram_spec(folder, name):
  (folder / 't.txt').write_text('\n\n'.join([WORDS] * 20), encoding='utf-8')
  return PolicySpec(name, 'ngram', max_tokens=6, settings={'path': [str(folder / 't.txt')], 'order': 2, 'vocab_size': 300})


def units_of(*specs):
  return iter([(spec, Unit(spec.name, shard, requests_of('the cat', name=f'{spec.name}{shard}'))) for spec in specs for shard in range(3)])


@pytest.mark.long
def test_processes_give_what_this_process_gives(tmp_path):
  specs = [ngram_spec(tmp_path, 'a'), ngram_spec(tmp_path, 'b'), PolicySpec('c', 'ngram', settings={'path': ['/none.txt']})]
  results = {}
  for backend in ('inline', 'processes'):
    attempts = list(workers.run(PoolConfig(backend=backend, processes=2), units_of(*specs), lambda: None))
    results[backend] = {(a.unit.policy, a.unit.shard): (str(a.results), a.counts) for a in attempts}
  assert results['inline'] == results['processes'] and len(results['inline']) == 9
  assert 'cannot be read' in results['inline']['c', 0][0] and results['inline']['a', 0][1]['requests'] == 2
