"""Rewards of an exported reward model that vLLM serves: the same as here, and no sigmoid.

POLAR_VLLM=.venv-vllm/bin/vllm python -m pytest -m slow tests/ppo/rewards/vllm_test.py
"""

from __future__ import annotations

import json
import urllib.request

import numpy as np
import pytest
from vllm_server import internlm2_reward_model, needs_vllm, vllm_server

from polar_jax.config import RewardConfig
from polar_jax.ppo.rewards.http import HttpReward, RewardServerError
from polar_jax.types import Prompt

PROMPTS = [Prompt('What is two and two?', 'Four.'), Prompt('Name a color.', 'Red.'), Prompt('Count to three.', 'One, two, three.')]
RESPONSES = ['4', 'Blue is a color that I like.', 'One. Two.\nThree!']


@pytest.fixture(scope='module', params=['exported', 'without problem_type'])
def served(request, data_folder, tmp_path_factory):
  """Return (model, its rewards, address of vLLM with its export, whether vLLM squashes by default)."""
  folder = tmp_path_factory.mktemp('vllm')
  model = internlm2_reward_model(data_folder)
  model.save_pretrained(folder / 'exported')
  squashes = request.param != 'exported'
  if squashes:  # as other exporters write it
    path = folder / 'exported/config.json'
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != 'problem_type'}))
  expected = np.array([model.score(p.prompt, p.reference, [r])[0] for p, r in zip(PROMPTS, RESPONSES, strict=True)])
  assert np.ptp(expected) > 0.5 and np.abs(expected).max() > 1.5  # a sigmoid would show
  arguments = ('--runner', 'pooling', '--trust-remote-code', '--served-model-name', 'reward')  # the code is that of the export
  with vllm_server(folder / 'exported', folder / 'vllm.log', *arguments) as address:
    yield model, expected, address, squashes


def http_reward(model, address):
  return HttpReward(model.template, RewardConfig(source='http', server='vllm', address=address, server_model='reward'))


@needs_vllm
@pytest.mark.slow
@pytest.mark.data
def test_vllm_gives_the_rewards_of_the_exported_model(served):
  model, expected, address, _ = served
  np.testing.assert_allclose(http_reward(model, address).score(PROMPTS, RESPONSES), expected, atol=1e-4)


@needs_vllm
@pytest.mark.slow
@pytest.mark.data
def test_a_request_for_the_activation_is_refused_where_vllm_squashes(served, monkeypatch):
  """It is what a request without our field gets. `problem_type`, which our export has, makes the activation the identity."""
  model, expected, address, squashes = served
  build = HttpReward._request

  def with_activation(self, texts):
    request = build(self, texts)
    body = json.loads(request.data) | {'use_activation': True}
    return urllib.request.Request(request.full_url, json.dumps(body).encode(), dict(request.header_items()), method='POST')

  monkeypatch.setattr(HttpReward, '_request', with_activation)
  if not squashes:
    np.testing.assert_allclose(http_reward(model, address).score(PROMPTS, RESPONSES), expected, atol=1e-4)
    return
  with pytest.raises(RewardServerError, match=r'all 3 rewards lie between 0 and 1 .* as after a sigmoid'):
    http_reward(model, address).score(PROMPTS, RESPONSES)
