from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from optional import torch

from polar_jax.checkpoints import config_json
from polar_jax.config import ModelConfig
from polar_jax.model.language_model import LanguageModel
from polar_jax.model.reward_model import RewardModel

pytestmark = [pytest.mark.needs('torch', 'transformers'), pytest.mark.usefixtures('torch_on_one_thread')]

CONFIG = ModelConfig(
  vocab_size=59,
  num_layers=2,
  d_model=48,
  d_ff=80,
  num_heads=6,
  num_kv_heads=2,
  head_dim=8,
  rope_theta=100.0,
  norm_eps=0.01,
  attention='reference',  # compiles faster
)
DYNAMIC = dataclasses.replace(CONFIG, rope_scaling='dynamic', rope_factor=2.0, max_position=16)
LINEAR = dataclasses.replace(CONFIG, rope_scaling='linear', rope_factor=3.0)
LENGTHS = (40, 1, 12, 29)
TOTAL = max(LENGTHS)


def _config_json(c: ModelConfig, architecture: str) -> dict:
  return {
    'architectures': [architecture],
    'model_type': 'internlm2',
    'dtype': 'float32',
    'vocab_size': c.vocab_size,
    'hidden_size': c.d_model,
    'intermediate_size': c.d_ff,
    'num_hidden_layers': c.num_layers,
    'num_attention_heads': c.num_heads,
    'num_key_value_heads': c.num_kv_heads,
    'max_position_embeddings': c.max_position,
    'rms_norm_eps': c.norm_eps,
    'rope_theta': c.rope_theta,
    'rope_scaling': None if c.rope_scaling == 'none' else {'type': c.rope_scaling, 'factor': c.rope_factor},
    'tie_word_embeddings': c.tie_embeddings,
    'reward_token_id': 58,
    'bias': False,
    'hidden_act': 'silu',
  }


@pytest.fixture(scope='module')
def load(tmp_path_factory, remote_code, random_params, as_stored):
  """Write a random model to a folder and load it with transformers: (our parameters, torch model, folder)."""

  def load(config, ours, architecture):
    folder, params = tmp_path_factory.mktemp('exported'), random_params(ours, config)
    (folder / 'config.json').write_text(json.dumps(_config_json(config, architecture)))
    safetensors.numpy.save_file(as_stored(config, params), folder / 'model.safetensors', metadata={'format': 'pt'})
    model, info = getattr(remote_code, architecture).from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ('missing_keys', 'unexpected_keys', 'mismatched_keys'))
    return params, model.eval(), folder

  return load


@pytest.mark.parametrize('config', [CONFIG, LINEAR, DYNAMIC], ids=['plain', 'linear', 'dynamic'])
@pytest.mark.parametrize(('head', 'architecture'), [('lm', 'InternLM2ForCausalLM'), ('reward', 'InternLM2ForRewardModel')])
def test_to_json_equals_saved_config(remote_code, config, head, architecture):
  written = config_json.to_json(config, head, dtype='float32', reward_token_id=58)
  assert written['architectures'] == [architecture]
  expected = _config_json(config, architecture)
  if 'torch_dtype' in written:
    expected['torch_dtype'] = expected.pop('dtype')
  assert {key: written.get(key, 'missing') for key in expected} == expected
  assert written['auto_map']['AutoConfig'] == 'configuration_internlm2.InternLM2Config'
  assert written['auto_map']['AutoModel'] == f'modeling_internlm2.{architecture}'
  assert hasattr(remote_code, architecture)


def _sequences():
  rng = np.random.default_rng(3)
  return [rng.integers(3, CONFIG.vocab_size, n).astype(np.int32) for n in LENGTHS]


def _padded(sequences, left):
  tokens, mask = np.zeros((2, len(sequences), TOTAL), np.int64)
  for b, ids in enumerate(sequences):
    at = slice(TOTAL - len(ids), None) if left else slice(None, len(ids))
    tokens[b, at], mask[b, at] = ids, 1
  return {'input_ids': torch.from_numpy(tokens), 'attention_mask': torch.from_numpy(mask)}


@torch.no_grad()
def _logits(model, **inputs):
  return model(**inputs).logits.float().numpy()


def _intervals():
  """Return (tokens, positions, intervals) of our rows, padded on the right."""
  shape = (len(LENGTHS), TOTAL)
  tokens, end = np.zeros((2, *shape), np.int32)
  positions = np.minimum(np.arange(TOTAL, dtype=np.int32)[None], np.array(LENGTHS, np.int32)[:, None] - 1)
  for b, ids in enumerate(_sequences()):
    tokens[b, : len(ids)], end[b, : len(ids)] = ids, np.arange(1, len(ids) + 1)
  return tokens, positions, [(np.zeros(shape, np.int32), end)]


def _run_ours(model, config, params, *inputs):
  graphdef, _ = nnx.split(nnx.eval_shape(lambda: model(config, rngs=nnx.Rngs(0))))
  return np.asarray(jax.jit(lambda params: nnx.merge(graphdef, params)(*inputs))(params))


@pytest.fixture(scope='module', params=[CONFIG, LINEAR, DYNAMIC], ids=['plain', 'linear', 'dynamic'])
def reward_models(request, load):
  """(rewards of our model, the torch model)."""
  config = request.param
  params, model, _ = load(config, RewardModel, 'InternLM2ForRewardModel')
  index = np.array(LENGTHS, np.int32)[:, None] - 1
  return _run_ours(RewardModel, config, params, *_intervals(), index)[:, 0], model


def test_rewards_equal_ours_with_padding_on_either_side(reward_models):
  ours, model = reward_models
  assert np.ptp(ours) > 0.5
  for left in (False, True):
    logits = _logits(model, **_padded(_sequences(), left))
    assert logits.shape == (len(LENGTHS), 1)
    np.testing.assert_allclose(logits[:, 0], ours, atol=2e-5)
  alone = [_logits(model, input_ids=torch.from_numpy(ids[None]), attention_mask=torch.ones(1, len(ids)))[0, 0] for ids in _sequences()]
  np.testing.assert_allclose(alone, ours, atol=2e-5)


def test_reward_is_the_first_output(reward_models):
  _, model = reward_models
  outputs = model(**_padded(_sequences(), left=True), use_cache=False)
  assert outputs[0] is outputs.logits


def test_reward_model_requires_attention_mask(reward_models):
  _, model = reward_models
  with pytest.raises(ValueError, match='attention_mask'):
    model(torch.ones(1, 3, dtype=torch.long))


def test_refuses_arguments_it_would_ignore(reward_models):
  _, model = reward_models
  with pytest.raises(TypeError, match='labels, position_ids'):
    model(**_padded(_sequences(), left=True), labels=torch.zeros(4), position_ids=torch.zeros(4, TOTAL), past_key_values=None)


def test_bfloat16_rewards_are_close(load):
  params, model, _ = load(CONFIG, RewardModel, 'InternLM2ForRewardModel')
  del params
  inputs = _padded(_sequences(), left=False)
  exact, rounded = _logits(model, **inputs), _logits(model.to(torch.bfloat16), **inputs)
  assert 0 < np.abs(exact - rounded).max() < 0.1


def test_every_query_sees_a_key(remote_code):
  """Padding as well: without keys, some versions and devices of torch give NaN, which spreads to every token of the next layer."""
  seen = remote_code._seen(_padded(_sequences(), left=True)['attention_mask'].bool())
  assert seen.shape == (len(LENGTHS), 1, TOTAL, TOTAL)
  assert seen.any(-1).all()


def test_norm_casts_back_before_scaling(remote_code):
  """InternLM2's order, which makes a difference only in bfloat16."""
  config = remote_code.InternLM2Config(hidden_size=64, num_attention_heads=2, rms_norm_eps=1e-5)
  norm = remote_code.InternLM2RMSNorm(config).to(torch.bfloat16)
  torch.manual_seed(0)
  norm.weight.data.uniform_(0.5, 1.5)
  x = torch.randn(20, 64, dtype=torch.bfloat16)
  wide = x.double()
  normed = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
  assert torch.equal(norm(x), (normed.bfloat16().double() * norm.weight.double()).bfloat16())
  assert not torch.equal(norm(x), (normed * norm.weight.double()).bfloat16())


@pytest.fixture(scope='module', params=[False, True], ids=['untied', 'tied'])
def language_models(request, load):
  config = dataclasses.replace(CONFIG, tie_embeddings=request.param)
  return config, *load(config, LanguageModel, 'InternLM2ForCausalLM')


def test_language_model_logits(language_models):
  config, params, model, _ = language_models
  inputs = _padded(_sequences(), left=False)
  ours, theirs = _run_ours(LanguageModel, config, params, *_intervals()), _logits(model, **inputs)
  attended = inputs['attention_mask'].numpy() == 1
  assert ours[attended].std() > 0.5
  np.testing.assert_allclose(theirs[attended], ours[attended], atol=1e-4)


@pytest.mark.parametrize('use_cache', [False, True])
def test_generate_equals_greedy_decoding(language_models, use_cache):
  """With padding on the left, and with or without `use_cache`."""
  _, _, model, _ = language_models
  prompts = [ids[:12] for ids in _sequences()]
  inputs = {name: array[:, TOTAL - 12 :] for name, array in _padded(prompts, left=True).items()}
  out = model.generate(**inputs, max_new_tokens=4, do_sample=False, use_cache=use_cache, eos_token_id=None)
  for prompt, row in zip(prompts, out.numpy(), strict=True):
    ids = list(prompt)
    for _ in range(4):
      ids.append(_logits(model, input_ids=torch.tensor([ids]))[0, -1].argmax())
    np.testing.assert_array_equal(row[12 - len(prompt) :], ids)


def test_model_saved_by_transformers_is_the_same(load, remote_code, tmp_path):
  """Newer versions of transformers write the rotary settings in another form than they were read."""
  _, model, _ = load(DYNAMIC, RewardModel, 'InternLM2ForRewardModel')
  model.save_pretrained(tmp_path)
  again = remote_code.InternLM2ForRewardModel.from_pretrained(tmp_path)
  inputs = _padded(_sequences(), left=False)
  np.testing.assert_array_equal(_logits(again, **inputs), _logits(model, **inputs))
  assert again.config.reward_token_id == 58
  assert again.config.rope_theta == 100.0


def test_backbone_loads_from_reward_model(load, remote_code):
  _, model, folder = load(CONFIG, RewardModel, 'InternLM2ForRewardModel')
  ids = torch.from_numpy(_sequences()[0][None])
  with torch.no_grad():
    alone, inside = (m(ids).last_hidden_state for m in (remote_code.InternLM2Model.from_pretrained(folder), model.model))
  torch.testing.assert_close(alone, inside, rtol=0, atol=0)


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'bias': True}, 'bias True'),
    ({'hidden_act': 'gelu'}, "hidden_act 'gelu'"),
    ({'rope_scaling': {'type': 'yarn', 'factor': 2.0}}, "'yarn' is not supported"),
  ],
)
def test_refuses_settings_not_implemented(remote_code, settings, message):
  with pytest.raises(ValueError, match=message):
    remote_code.InternLM2Config(**settings)


@pytest.mark.parametrize(
  'settings',
  [
    {'rope_scaling': {'type': 'dynamic', 'factor': 2}, 'rope_theta': 7e5},
    {'rope_scaling': {'rope_type': 'dynamic', 'factor': 2.0}, 'rope_theta': 7e5},
    {'rope_parameters': {'rope_type': 'dynamic', 'factor': 2.0, 'rope_theta': 7e5}},
  ],
)
def test_rotary_settings_in_every_form(remote_code, settings):
  config = remote_code.InternLM2Config(**settings)
  assert config.rope_theta == 7e5
  found = {key: config.rope_parameters[key] for key in ('rope_type', 'factor', 'rope_theta')}
  assert found == {'rope_type': 'dynamic', 'factor': 2.0, 'rope_theta': 7e5}
