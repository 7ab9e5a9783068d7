"""The trainers' own code against the server, in an environment that has them: see Tests with real trainers in docs/serving.md."""

from __future__ import annotations

import asyncio
import json
import pathlib
import runpy
import types

import numpy as np
import pytest

from polar_jax.serve import RewardClient
from polar_jax.serve.adapters import shared

pytestmark = pytest.mark.slow

EXAMPLES = pathlib.Path(__file__).parents[2] / 'examples'
ARGUMENTS = ' '.join(
  [
    '--max_steps 3 --num_generations 4 --per_device_train_batch_size 8 --max_completion_length 8 --logging_steps 1',
    '--report_to none --use_cpu true --bf16 false --save_strategy steps --save_steps 3',
  ]
).split()
CHAT = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"  # noqa: E501


@pytest.fixture
def server(serve, model, policy, monkeypatch):
  """A real server, and what it must answer."""
  shared._client.cache_clear()
  with serve(policy=str(policy)) as running:
    monkeypatch.setenv('POLAR_REWARD_ADDRESS', running.server.address)
    rewards = lambda rows: model.score_batch([{'prompt': p, 'reference': r, 'output': o} for p, r, o in rows], exact=True).tolist()
    yield types.SimpleNamespace(url=running.server.address, rewards=rewards)
    shared.shared_client(running.server.address).close()


@pytest.fixture
def policy(tmp_path):
  """Return a folder with a tiny random language model whose tokens are bytes."""
  import tokenizers
  import transformers

  special = ['<pad>', '<|im_start|>', '<|im_end|>']
  vocabulary = {token: i for i, token in enumerate([*special, *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())])}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  tokenizer.add_special_tokens(special)
  fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token='<pad>', eos_token='<|im_end|>', chat_template=CHAT)
  fast.save_pretrained(tmp_path / 'policy')
  transformers.set_seed(0)
  shape = {'hidden_size': 32, 'intermediate_size': 64, 'num_hidden_layers': 2, 'num_attention_heads': 2, 'num_key_value_heads': 2}
  config = transformers.LlamaConfig(vocab_size=len(vocabulary), max_position_embeddings=256, eos_token_id=2, pad_token_id=0, **shape)
  transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / 'policy')
  return tmp_path / 'policy'


@pytest.mark.needs('trl')
@pytest.mark.parametrize('conversational', [False, True])
def test_grpo_of_trl(server, policy, tmp_path, conversational, monkeypatch):
  """Three steps of the example, whose logged rewards are those of the server."""
  prompt = lambda i: f'name the number after {i}'
  rows = [
    {'prompt': [{'role': 'user', 'content': prompt(i)}] if conversational else prompt(i), 'reference': 'the answer is one'}
    for i in range(6)
  ]
  (tmp_path / 'data.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  scored = []
  original = RewardClient.score_rows

  def score_rows(client, *columns):
    scored.append(original(client, *columns))
    assert scored[-1] == server.rewards(zip(*columns, strict=True))
    return scored[-1]

  monkeypatch.setattr(RewardClient, 'score_rows', score_rows)
  main = runpy.run_path(str(EXAMPLES / 'trl_grpo.py'))['main']
  main(
    str(policy),
    str(tmp_path / 'data.jsonl'),
    str(tmp_path / 'out'),
    *ARGUMENTS,
  )
  state = json.loads((tmp_path / 'out' / 'checkpoint-3' / 'trainer_state.json').read_text())
  logged = [entry['rewards/polar_reward/mean'] for entry in state['log_history'] if 'rewards/polar_reward/mean' in entry]
  assert len(logged) == len(scored) == 3 and all(len(rewards) == 8 and np.std(rewards) > 0 for rewards in scored)
  np.testing.assert_allclose(logged, np.mean(scored, 1), rtol=1e-5, atol=1e-6)


def ids_of(tokenizer, text, length):
  """Return ids of a text, padded on the right, and which of them count."""
  ids = tokenizer(text, add_special_tokens=False)['input_ids']
  return ids + [tokenizer.pad_token_id] * (length - len(ids)), [1] * len(ids) + [0] * (length - len(ids))


@pytest.mark.needs('verl')
@pytest.mark.parametrize('path', ['pkg://polar_jax.serve.adapters.verl', str(EXAMPLES / 'verl_reward.py')], ids=['package', 'file'])
def test_the_reward_loop_of_verl(server, policy, path, monkeypatch):
  """A worker loads the function as the configuration says, decodes responses and assembles the scores."""
  import omegaconf
  import tensordict
  import torch
  import transformers
  import verl
  from verl.experimental.reward_loop import RewardLoopWorker

  monkeypatch.delenv('POLAR_REWARD_ADDRESS')
  reward = {
    'custom_reward_function': {'path': path, 'name': 'compute_score', 'reward_kwargs': {'address': server.url}},
    'reward_manager': {'source': 'register', 'name': 'naive'},
    'reward_model': {'enable': False},
  }
  config = omegaconf.OmegaConf.create({'actor_rollout_ref': {'model': {'path': str(policy), 'tokenizer_path': None}}, 'reward': reward})
  worker = RewardLoopWorker(config)
  tokenizer = transformers.AutoTokenizer.from_pretrained(policy)
  answers = [f'the answer is {word}' for word in ('one', 'two', 'three', 'red', 'green', 'blue')]
  responses, masks = zip(*(ids_of(tokenizer, f'{answer}<|im_end|>', 32) for answer in answers), strict=True)
  batch = {'responses': torch.tensor(responses), 'prompts': torch.zeros(6, 4, dtype=torch.long)}
  batch['attention_mask'] = torch.cat([torch.ones(6, 4, dtype=torch.long), torch.tensor(masks)], 1)
  message = lambda role, text: [{'role': role, 'content': text}]
  rows = {
    'data_source': ['polar'] * 6,
    'reward_model': [{'style': 'polar', 'ground_truth': message('assistant', f'r{i}')} for i in range(6)],
    'extra_info': [{'index': i, 'split': 'train', 'prompt': message('user', f'p{i}')} for i in range(6)],
  }
  data = verl.DataProto(
    batch=tensordict.TensorDict(batch, batch_size=6), non_tensor_batch={key: np.array(value, object) for key, value in rows.items()}
  )
  outputs = worker.loop.run_until_complete(worker.compute_score_batch(data))
  expected = server.rewards([(f'p{i}', f'r{i}', answer) for i, answer in enumerate(answers)])
  assert [output['reward_score'] for output in outputs] == expected
  assembled = worker.reward_manager.assemble_rm_scores(data, expected)
  np.testing.assert_allclose(assembled.sum(1).numpy(), expected, rtol=1e-6)


class Engine:
  """What OpenRLHF generates with: it gives a fixed answer."""

  def __init__(self, ids):
    self.ids = ids

  async def generate(self, prompt_ids, sampling_params, **_):
    return types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=self.ids, finish_reason='stop', logprobs=None)])


@pytest.mark.needs('openrlhf')
@pytest.mark.parametrize('way', ['http', 'file'])
def test_the_agent_of_openrlhf(server, policy, way):
  """Its own code posts the query, or calls the function of a file, and reads the reply."""
  import transformers
  from openrlhf.utils.agent import SingleTurnAgentExecutor

  tokenizer = transformers.AutoTokenizer.from_pretrained(policy)
  executor = SingleTurnAgentExecutor(f'{server.url}/get_reward' if way == 'http' else str(EXAMPLES / 'openrlhf_reward.py'))
  question, answer, reference = 'name a prime number', 'the answer is one', 'the answer is two'
  prompt = tokenizer.apply_chat_template([{'role': 'user', 'content': question}], tokenize=False, add_generation_prompt=True)
  engine = Engine(tokenizer(f'{answer}<|im_end|>', add_special_tokens=False)['input_ids'])
  sampling = types.SimpleNamespace(max_tokens=16, logprobs=None)
  output = asyncio.run(executor.execute(prompt, reference, sampling, 256, tokenizer, engine))
  assert output['reward'] == server.rewards([(question, reference, answer)]) == output['scores']
