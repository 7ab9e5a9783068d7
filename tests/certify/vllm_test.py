"""The certificate with a live vLLM: raw scores agree, and those of a server that squashes do not.

POLAR_VLLM=.venv-vllm/bin/vllm python -m pytest -m slow tests/certify/vllm_test.py
"""

from __future__ import annotations

import json
import re

import pytest
from vllm_server import internlm2_reward_model, needs_vllm, vllm_server

from polar_jax.certify import stage, ways
from polar_jax.config import CertifyConfig, Config, TokenizerConfig
from polar_jax.ppo.rewards.http import HttpReward
from polar_jax.stages.context import Context
from polar_jax.types import UserError


@needs_vllm
@pytest.mark.slow
@pytest.mark.data
def test_a_live_vllm_is_compared(data_folder, tmp_path, monkeypatch):
  model, workdir, lines = internlm2_reward_model(data_folder), tmp_path / 'work', []
  model.save(tmp_path / 'run')
  model.save_pretrained(tmp_path / 'exported')
  config_file = tmp_path / 'exported/config.json'  # as other exporters write it: vLLM squashes unless a request says otherwise
  config_file.write_text(json.dumps({k: v for k, v in json.loads(config_file.read_text()).items() if k != 'problem_type'}))
  workdir.mkdir()
  arguments = ('--runner', 'pooling', '--trust-remote-code', '--served-model-name', 'run')  # the code is that of the export
  with vllm_server(tmp_path / 'exported', tmp_path / 'vllm.log', *arguments) as address:
    settings = CertifyConfig(vllm=address, tolerance=1e-4)
    config = Config(stage='certify', checkpoint=str(tmp_path / 'run'), tokenizer=TokenizerConfig(kind='checkpoint'), certify=settings)
    context = Context(config, workdir, model.mesh, lines.append)
    stage.certify(context)
    found = {way['way']: way for way in json.loads((workdir / stage.FILE).read_text())['ways']}
    assert found[f'vllm at {address}']['max_difference'] < 1e-4 and found['transformers, float32']['max_difference'] < 1e-4
    assert found['our server, exact, /score']['same_bits']
    build = HttpReward._request

    def with_activation(self, texts):
      request = build(self, texts)
      request.data = json.dumps(json.loads(request.data) | {'use_activation': True}).encode()
      return request

    monkeypatch.setattr(HttpReward, '_request', with_activation)
    for name in ('in_this_process', 'by_our_server', 'by_transformers'):
      monkeypatch.setattr(ways, name, lambda *_: ())
    with pytest.raises(UserError, match=rf'vllm at {re.escape(address)} applies a sigmoid \(serve raw scores'):
      stage.certify(context)
