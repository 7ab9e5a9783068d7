"""Tests of reading and writing config.json, compared with transformers."""

from __future__ import annotations

import dataclasses
import json

import pytest
from optional import transformers

from polar_jax.checkpoints import families
from polar_jax.checkpoints.config_json import from_json, to_json
from polar_jax.config import ModelConfig
from polar_jax.model.layer_inputs import layer_kinds
from polar_jax.model.presets import PRESETS
from polar_jax.types import UserError

# Fields that are not part of a config.json.
OURS_ALONE = ('init_std', 'scan_unroll')
OF_WINDOWS = ('sliding_window', 'global_every', 'rope_local_theta')
FULL = {name: ModelConfig(**({'vocab_size': 512} | fields)) for name, fields in PRESETS.items()}

POLAR_7B = {
  'architectures': ['InternLM2ForRewardModel'],
  'attn_implementation': 'flash_attention_2',
  'bias': False,
  'bos_token_id': 1,
  'eos_token_id': 2,
  'hidden_act': 'silu',
  'hidden_size': 4096,
  'initializer_range': 0.02,
  'intermediate_size': 14336,
  'max_position_embeddings': 262144,
  'model_type': 'internlm2',
  'num_attention_heads': 32,
  'num_hidden_layers': 32,
  'num_key_value_heads': 8,
  'pad_token_id': 2,
  'reward_token_id': 92527,
  'rms_norm_eps': 1e-05,
  'rope_scaling': {'factor': 2.0, 'type': 'dynamic'},
  'rope_theta': 50000000,
  'tie_word_embeddings': False,
  'torch_dtype': 'float16',
  'vocab_size': 92544,
}
LLAMA = {
  'architectures': ['LlamaForCausalLM'],
  'attention_bias': False,
  'hidden_act': 'silu',
  'hidden_size': 4096,
  'intermediate_size': 14336,
  'max_position_embeddings': 131072,
  'mlp_bias': False,
  'model_type': 'llama',
  'num_attention_heads': 32,
  'num_hidden_layers': 32,
  'num_key_value_heads': 8,
  'rms_norm_eps': 1e-05,
  'rope_scaling': {
    'factor': 8.0,
    'low_freq_factor': 1.0,
    'high_freq_factor': 4.0,
    'original_max_position_embeddings': 8192,
    'rope_type': 'llama3',
  },
  'rope_theta': 500000.0,
  'tie_word_embeddings': False,
  'torch_dtype': 'bfloat16',
  'vocab_size': 128256,
}
QWEN2 = {
  'architectures': ['Qwen2ForCausalLM'],
  'hidden_act': 'silu',
  'hidden_size': 3584,
  'intermediate_size': 18944,
  'max_position_embeddings': 131072,
  'max_window_layers': 28,
  'model_type': 'qwen2',
  'num_attention_heads': 28,
  'num_hidden_layers': 28,
  'num_key_value_heads': 4,
  'rms_norm_eps': 1e-06,
  'rope_theta': 1000000.0,
  'sliding_window': 131072,
  'use_mrope': False,
  'use_sliding_window': False,
  'vocab_size': 152064,
}
INTERNLM3 = {
  'architectures': ['InternLM3ForCausalLM'],
  'bias': False,
  'head_dim': 128,
  'hidden_act': 'silu',
  'hidden_size': 4096,
  'intermediate_size': 10240,
  'max_position_embeddings': 32768,
  'model_type': 'internlm3',
  'num_attention_heads': 32,
  'num_hidden_layers': 48,
  'num_key_value_heads': 2,
  'qkv_bias': False,
  'rms_norm_eps': 1e-05,
  'rope_scaling': {'factor': 6.0, 'rope_type': 'dynamic'},
  'rope_theta': 50000000,
  'vocab_size': 128512,
}
QWEN3 = {
  'architectures': ['Qwen3ForCausalLM'],
  'attention_bias': False,
  'attention_dropout': 0.0,
  'bos_token_id': 151643,
  'eos_token_id': 151645,
  'head_dim': 128,
  'hidden_act': 'silu',
  'hidden_size': 4096,
  'initializer_range': 0.02,
  'intermediate_size': 12288,
  'max_position_embeddings': 40960,
  'max_window_layers': 36,
  'model_type': 'qwen3',
  'num_attention_heads': 32,
  'num_hidden_layers': 36,
  'num_key_value_heads': 8,
  'rms_norm_eps': 1e-06,
  'rope_scaling': None,
  'rope_theta': 1000000,
  'sliding_window': None,
  'tie_word_embeddings': False,
  'torch_dtype': 'bfloat16',
  'use_cache': True,
  'use_sliding_window': False,
  'vocab_size': 151936,
}
MISTRAL = {
  'architectures': ['MistralForCausalLM'],
  'bos_token_id': 1,
  'eos_token_id': 2,
  'hidden_act': 'silu',
  'hidden_size': 4096,
  'initializer_range': 0.02,
  'intermediate_size': 14336,
  'max_position_embeddings': 32768,
  'model_type': 'mistral',
  'num_attention_heads': 32,
  'num_hidden_layers': 32,
  'num_key_value_heads': 8,
  'rms_norm_eps': 1e-05,
  'rope_theta': 10000.0,
  'sliding_window': 4096,
  'tie_word_embeddings': False,
  'vocab_size': 32000,
}
GEMMA3 = {
  'architectures': ['Gemma3ForCausalLM'],
  'attention_bias': False,
  'attn_logit_softcapping': None,
  'cache_implementation': 'hybrid',
  'final_logit_softcapping': None,
  'head_dim': 256,
  'hidden_activation': 'gelu_pytorch_tanh',
  'hidden_size': 1152,
  'intermediate_size': 6912,
  'max_position_embeddings': 32768,
  'model_type': 'gemma3_text',
  'num_attention_heads': 4,
  'num_hidden_layers': 26,
  'num_key_value_heads': 1,
  'query_pre_attn_scalar': 256,
  'rms_norm_eps': 1e-06,
  'rope_local_base_freq': 10000,
  'rope_scaling': None,
  'rope_theta': 1000000,
  'sliding_window': 512,
  'sliding_window_pattern': 6,
  'vocab_size': 262144,
}
SMOLLM3 = {
  'architectures': ['SmolLM3ForCausalLM'],
  'attention_bias': False,
  'hidden_act': 'silu',
  'hidden_size': 2048,
  'intermediate_size': 11008,
  'layer_types': ['full_attention'] * 36,
  'max_position_embeddings': 65536,
  'max_window_layers': 28,
  'mlp_bias': False,
  'model_type': 'smollm3',
  'no_rope_layer_interval': 4,
  'no_rope_layers': [1, 1, 1, 0] * 9,
  'num_attention_heads': 16,
  'num_hidden_layers': 36,
  'num_key_value_heads': 4,
  'pretraining_tp': 2,
  'rms_norm_eps': 1e-06,
  'rope_scaling': None,
  'rope_theta': 5000000.0,
  'sliding_window': None,
  'use_sliding_window': False,
  'vocab_size': 128256,
}


def _without(config, *keys):
  return {k: v for k, v in config.items() if k not in keys}


@pytest.mark.parametrize(
  ('config', 'preset', 'head', 'token'),
  [
    (POLAR_7B, 'polar_7b', 'reward', 92_527),
    (LLAMA, 'llama_3_1_8b', 'lm', None),
    (QWEN2, 'qwen2_5_7b', 'lm', None),
    (INTERNLM3, 'internlm3_8b', 'lm', None),
    (QWEN3, 'qwen3_8b', 'lm', None),
    (MISTRAL, 'mistral_7b_v0_1', 'lm', None),
    (GEMMA3, 'gemma3_1b', 'lm', None),
    (SMOLLM3, 'smollm3_3b', 'lm', None),
    (MISTRAL | {'vocab_size': 32768, 'rope_theta': 1e6, 'sliding_window': None}, 'mistral_7b_v0_3', 'lm', None),
  ],
)
def test_from_json_published_files(config, preset, head, token):
  read = from_json(config, 'config.json')
  assert read.model == FULL[preset]
  assert (read.head, read.architecture, read.reward_token_id) == (head, config['architectures'][0], token)


@pytest.mark.parametrize('head', ['lm', 'reward', 'value'])
@pytest.mark.parametrize('preset', PRESETS)
def test_to_json_round_trip(preset, head):
  model = FULL[preset]
  written = json.loads(json.dumps(to_json(model, head, dtype='bfloat16', reward_token_id=7)))
  read = from_json(written, 'config.json')
  default = ModelConfig()
  assert read.model == dataclasses.replace(model, **{f: getattr(default, f) for f in OURS_ALONE})
  one_class = model.family in ('internlm2', 'gemma3_text')  # for reward and value models
  assert read.head == ('reward' if one_class and head == 'value' else head)
  assert read.reward_token_id == 7
  assert to_json(read.model, read.head, dtype='bfloat16', architecture=read.architecture)['architectures'] == [read.architecture]


def _with_rope(**rope):
  return ModelConfig(
    family='llama', vocab_size=99, num_layers=3, d_model=48, d_ff=80, num_heads=6, num_kv_heads=3, head_dim=10, norm_eps=3e-5, **rope
  )


ROPES = {
  'none': _with_rope(rope_theta=12_345.0),
  'linear': _with_rope(rope_theta=2e4, rope_scaling='linear', rope_factor=3.0, max_position=77),
  'dynamic': _with_rope(rope_scaling='dynamic', rope_factor=2.5, max_position=4_096),
  'llama3': _with_rope(
    rope_scaling='llama3', rope_factor=4.0, rope_low_freq_factor=1.5, rope_high_freq_factor=3.0, rope_original_length=64
  ),
  'yarn': _with_rope(rope_scaling='yarn', rope_factor=4.0, rope_original_length=64, rope_beta_fast=8.0, max_position=256),
}


@pytest.mark.needs('torch', 'transformers')
@pytest.mark.parametrize('head', ['lm', 'reward', 'value'])
@pytest.mark.parametrize('rope', ROPES)
@pytest.mark.parametrize('family', ['llama', 'qwen2', 'internlm3', 'qwen3', 'mistral'])
def test_to_json_is_read_by_transformers(family, rope, head, tmp_path):
  m = dataclasses.replace(ROPES[rope], family=family, tie_embeddings=rope == 'linear', **families.FAMILIES[family].fixed)
  if family == 'mistral':
    m = dataclasses.replace(m, sliding_window=None if rope == 'none' else 33)
  ids = {'pad_token_id': 3, 'bos_token_id': None, 'eos_token_id': 5}
  written = to_json(m, head, dtype='float16', special_ids=ids, reward_token_id=17)
  (tmp_path / 'config.json').write_text(json.dumps(written))
  theirs = transformers.AutoConfig.from_pretrained(tmp_path)
  expected = {
    'model_type': family,
    'vocab_size': 99,
    'num_hidden_layers': 3,
    'hidden_size': 48,
    'intermediate_size': 80,
    'num_attention_heads': 6,
    'num_key_value_heads': 3,
    'head_dim': 10,
    'rms_norm_eps': 3e-5,
    'hidden_act': 'silu',
    'initializer_range': 0.02,
    'max_position_embeddings': m.max_position,
    'tie_word_embeddings': rope == 'linear',
    'reward_token_id': 17,
    **ids,
  }
  assert {key: getattr(theirs, key) for key in expected} == expected
  assert str(theirs.dtype) == 'torch.float16'
  expected_rope = {
    'none': {'rope_type': 'default', 'rope_theta': 12_345.0},
    'linear': {'rope_type': 'linear', 'rope_theta': 2e4, 'factor': 3.0},
    'dynamic': {'rope_type': 'dynamic', 'rope_theta': 1e4, 'factor': 2.5},
    'llama3': {
      'rope_type': 'llama3',
      'rope_theta': 1e4,
      'factor': 4.0,
      'low_freq_factor': 1.5,
      'high_freq_factor': 3.0,
      'original_max_position_embeddings': 64,
    },
    'yarn': {
      'rope_type': 'yarn',
      'rope_theta': 1e4,
      'factor': 4.0,
      'original_max_position_embeddings': 64,
      'beta_fast': 8.0,
      'beta_slow': 1.0,
    },
  }
  assert theirs.rope_parameters == expected_rope[rope]
  if head != 'lm':
    assert theirs.num_labels == 1 and theirs.problem_type == 'regression'
  if family in ('qwen2', 'qwen3'):
    assert theirs.sliding_window is None and set(theirs.layer_types) == {'full_attention'}
  elif family == 'mistral':
    assert theirs.sliding_window == m.sliding_window
  else:
    assert theirs.attention_bias is False and theirs.mlp_bias is False
  # And back through the keys of transformers 5, which has no rope_scaling and no rope_theta.
  theirs.architectures = written['architectures']
  theirs.save_pretrained(tmp_path)
  saved = json.loads((tmp_path / 'config.json').read_text())
  assert 'rope_parameters' in saved and 'rope_scaling' not in saved and 'rope_theta' not in saved
  assert from_json(saved, 'config.json') == (m, head, written['architectures'][0], 17)


@pytest.mark.needs('torch', 'transformers')
@pytest.mark.parametrize('head', ['lm', 'reward'])
@pytest.mark.parametrize('preset', ['gemma3_270m', 'gemma3_27b', 'smollm3_3b', 'without a global layer', 'without a window'])
def test_to_json_of_layers_that_differ_is_read_by_transformers(preset, head, tmp_path):
  other = {'without a global layer': {'global_every': None}, 'without a window': dict.fromkeys(OF_WINDOWS)}.get(preset)
  m = FULL[preset] if other is None else dataclasses.replace(FULL['gemma3_270m'], **other)
  written = to_json(m, head, dtype='bfloat16')
  (tmp_path / 'config.json').write_text(json.dumps(written))
  theirs = transformers.AutoConfig.from_pretrained(tmp_path)
  kinds = layer_kinds(m)
  assert [kind == 'sliding_attention' for kind in theirs.layer_types] == [kind.has_window for kind in kinds]
  rope = {'rope_type': 'linear', 'factor': 8.0} if m.rope_scaling == 'linear' else {'rope_type': 'default'}
  if m.family == 'smollm3':
    assert theirs.no_rope_layers == [int(kind.has_rope) for kind in kinds] and theirs.rope_parameters == rope | {'rope_theta': 5e6}
  else:
    assert theirs.sliding_window == m.sliding_window and theirs.query_pre_attn_scalar == (m.query_pre_attn_scalar or m.head_dim)
    local = {'rope_type': 'default', 'rope_theta': 1e4}
    assert theirs.rope_parameters == {'full_attention': rope | {'rope_theta': 1e6}, 'sliding_attention': local}
    assert theirs.hidden_activation == 'gelu_pytorch_tanh' and theirs.tie_word_embeddings
  # And back through the keys of transformers 5.
  theirs.architectures = written['architectures']
  theirs.save_pretrained(tmp_path)
  assert from_json(json.loads((tmp_path / 'config.json').read_text()), 'config.json')[:2] == (m, head)


@pytest.mark.needs('torch', 'transformers')
def test_to_json_builds_a_transformers_model():
  m = dataclasses.replace(ROPES['llama3'], family='qwen2', qkv_bias=True)
  written = _without(to_json(m, 'reward', dtype='float32'), 'architectures', 'model_type')
  model = transformers.Qwen2ForSequenceClassification(transformers.Qwen2Config(**written))
  assert tuple(model.score.weight.shape) == (1, 48)
  assert model.model.layers[0].self_attn.q_proj.bias.shape == (60,)


def test_to_json_internlm2_names_its_own_code():
  written = to_json(FULL['polar_7b'], 'reward', dtype='float16', reward_token_id=92_527, special_ids=dict.fromkeys(['pad_token_id'], 2))
  assert written['auto_map'] == {
    'AutoConfig': 'configuration_internlm2.InternLM2Config',
    'AutoModel': 'modeling_internlm2.InternLM2ForRewardModel',
  }
  same = _without(POLAR_7B, 'attn_implementation', 'bos_token_id', 'eos_token_id')
  assert {key: written[key] for key in same} == same
  assert written['problem_type'] == 'regression'  # which vLLM needs in order to return the score itself
  assert to_json(FULL['polar_7b'], 'lm', dtype='float16')['auto_map'] == {
    'AutoConfig': 'configuration_internlm2.InternLM2Config',
    'AutoModel': 'modeling_internlm2.InternLM2ForCausalLM',
    'AutoModelForCausalLM': 'modeling_internlm2.InternLM2ForCausalLM',
  }


@pytest.mark.needs('torch', 'transformers')
def test_from_json_defaults_of_absent_keys():
  bare = _without(LLAMA, 'tie_word_embeddings', 'rms_norm_eps', 'num_key_value_heads', 'rope_theta', 'rope_scaling', 'hidden_act')
  model = from_json(bare, 'f').model
  expected = {'num_kv_heads': 32, 'head_dim': 128, 'rope_theta': 1e4, 'rope_scaling': 'none', 'norm_eps': 1e-6, 'tie_embeddings': False}
  assert {key: getattr(model, key) for key in expected} == expected
  theirs = transformers.LlamaConfig(**_without(bare, 'architectures', 'model_type'))
  assert (theirs.num_key_value_heads, theirs.head_dim, theirs.rms_norm_eps, theirs.tie_word_embeddings) == (32, 128, 1e-6, False)
  assert theirs.rope_parameters == {'rope_type': 'default', 'rope_theta': 1e4}


@pytest.mark.parametrize(
  'key',
  [
    'architectures',
    'vocab_size',
    'hidden_size',
    'intermediate_size',
    'num_hidden_layers',
    'num_attention_heads',
    'max_position_embeddings',
  ],
)
def test_from_json_missing_keys(key):
  with pytest.raises(UserError, match=rf'^x/config\.json: {key} is missing; '):
    from_json(_without(LLAMA, key), 'x/config.json')


@pytest.mark.parametrize('key', ['num_key_value_heads', 'rms_norm_eps'])
@pytest.mark.parametrize('config', [INTERNLM3, QWEN3, MISTRAL, GEMMA3, SMOLLM3])
def test_from_json_keys_without_a_default(config, key):
  with pytest.raises(UserError, match=f'^f: {key} is missing; '):
    from_json(_without(config, key), 'f')


# Of Qwen2.5's documentation, for texts of more than 32,768 tokens.
YARN = {'factor': 4.0, 'original_max_position_embeddings': 32768, 'type': 'yarn'}
LLAMA3_ROPE = LLAMA['rope_scaling']
REFUSED = [
  (LLAMA, {'hidden_act': 'gelu'}, "hidden_act is 'gelu'; supported: silu"),
  (LLAMA, {'attention_bias': True}, 'attention_bias is True; supported: false'),
  (LLAMA, {'mlp_bias': True}, 'mlp_bias is True; supported: false'),
  (POLAR_7B, {'bias': True}, 'bias is True; supported: false'),
  (INTERNLM3, {'bias': True}, 'bias is True; supported: false'),
  (INTERNLM3, {'attention_bias': True}, 'attention_bias is True; supported: false'),
  (INTERNLM3, {'qkv_bias': 'yes'}, "qkv_bias is 'yes'; supported: true or false"),
  (QWEN2, {'use_sliding_window': True}, 'use_sliding_window is True; supported: false'),
  (
    QWEN2,
    {'layer_types': ['full_attention', 'sliding_attention']},
    "layer_types is ['full_attention', 'sliding_attention']; supported: full",
  ),
  (QWEN3, {'attention_bias': True}, 'attention_bias is True; supported: false'),
  (QWEN3, {'use_sliding_window': True}, 'use_sliding_window is True; supported: false'),
  (
    QWEN3,
    {'model_type': 'qwen3_moe', 'architectures': ['Qwen3MoeForCausalLM']},
    "model_type is 'qwen3_moe'; supported: gemma3_text, internlm2, ",
  ),
  (GEMMA3, {'hidden_activation': 'gelu'}, "hidden_activation is 'gelu'; supported: gelu_pytorch_tanh"),
  (GEMMA3, {'attn_logit_softcapping': 50.0}, 'attn_logit_softcapping is 50.0; supported: null'),
  (GEMMA3, {'final_logit_softcapping': 30.0}, 'final_logit_softcapping is 30.0; supported: null'),
  (GEMMA3, {'use_bidirectional_attention': True}, 'use_bidirectional_attention is True; supported: false'),
  (GEMMA3, {'layer_types': ['full_attention', *['sliding_attention'] * 25]}, "layer_types is ['full_attention', 'sliding_attention', "),
  (GEMMA3, {'layer_types': ['chunked_attention'] * 26}, "layer_types is ['chunked_attention', 'chunked_attention', 'chunked_attention"),
  (GEMMA3, {'layer_types': ['sliding_attention'] * 25}, "layer_types is ['sliding_attention', 'sliding_attention', 'sliding_attention"),
  (GEMMA3, {'rope_scaling': {'rope_type': 'yarn', 'factor': 8.0}}, "rope_scaling.rope_type is 'yarn'; supported: default, linear"),
  (GEMMA3, {'rope_parameters': {'rope_type': 'default'}}, "rope_parameters.rope_type is 'default'; supported: full_attention and sliding"),
  (
    GEMMA3,
    {'rope_parameters': {'full_attention': {}, 'sliding_attention': {'rope_type': 'linear', 'factor': 8.0}}},
    "rope_parameters.sliding_attention.rope_type is 'linear'; supported: default",
  ),
  (
    GEMMA3,
    {'model_type': 'gemma3', 'architectures': ['Gemma3ForConditionalGeneration'], 'vision_config': {'model_type': 'siglip'}},
    "vision_config is {'model_type': 'siglip'}; supported: no such key: models of text alone",
  ),
  (GEMMA3, {'model_type': 'gemma2', 'architectures': ['Gemma2ForCausalLM']}, "model_type is 'gemma2'; supported: gemma3_text, internlm2, "),
  (SMOLLM3, {'no_rope_layers': [1, 0, 0, 0] * 9}, 'no_rope_layers is [1, 0, 0, 0, 1, 0, 0, 0, '),
  (SMOLLM3, {'no_rope_layers': 4}, 'no_rope_layers is 4; supported: 0 for every n-th layer and 1 for all others'),
  (SMOLLM3, {'use_sliding_window': True}, 'use_sliding_window is True; supported: false'),
  (LLAMA, {'quantization_config': {'quant_method': 'fp8'}}, "quantization_config is {'quant_method': 'fp8'}; supported: null"),
  (LLAMA, {'partial_rotary_factor': 0.5}, 'partial_rotary_factor is 0.5; supported: 1'),
  (
    LLAMA,
    {'rope_scaling': {'rope_type': 'proportional', 'factor': 4.0}},
    "rope_scaling.rope_type is 'proportional'; supported: default, linear, dynamic, llama3, yarn",
  ),
  (LLAMA, {'rope_scaling': {'type': 'longrope', 'factor': 4.0}}, "rope_scaling.type is 'longrope'; supported: default, linear, dyn"),
  (LLAMA, {'rope_scaling': None, 'rope_parameters': {'rope_type': 'su'}}, "rope_parameters.rope_type is 'su'; supported: default"),
  (QWEN2, {'rope_scaling': {'type': 'yarn'}}, 'rope_scaling.factor is missing'),
  (QWEN2, {'rope_scaling': {'type': 'yarn', 'factor': 0.5}}, 'rope_scaling.factor is 0.5; supported: at least 1'),
  (QWEN2, {'rope_scaling': YARN | {'beta_fast': 1}}, 'rope_scaling.beta_slow is 1.0; supported: less than beta_fast (1.0)'),
  (QWEN2, {'rope_scaling': YARN, 'rope_theta': 1.0}, 'rope_scaling.rope_theta is 1.0; supported: more than 1'),
  (QWEN2, {'rope_scaling': YARN | {'truncate': False}}, 'rope_scaling.truncate is False; supported: true'),
  (QWEN2, {'rope_scaling': YARN | {'mscale': 1.0}}, 'rope_scaling.mscale is 1.0; supported: factor, original_max_position_embeddings, att'),
  (POLAR_7B, {'rope_scaling': YARN}, "rope_scaling.type is 'yarn'; supported: default, linear, dynamic"),
  (POLAR_7B, {'rope_scaling': LLAMA3_ROPE}, "rope_scaling.rope_type is 'llama3'; supported: default, linear, dynamic"),
  (LLAMA, {'rope_scaling': {'type': 'linear'}}, 'rope_scaling.factor is missing'),
  (LLAMA, {'rope_scaling': {'type': 'linear', 'factor': -1}}, 'rope_scaling.factor is -1; supported: a positive number'),
  (
    LLAMA,
    {'rope_scaling': {'type': 'dynamic', 'factor': 2, 'alpha': 9}},
    "rope_scaling.alpha is 9; supported: factor for rope type 'dynamic'",
  ),
  (LLAMA, {'rope_scaling': LLAMA3_ROPE | {'low_freq_factor': 4.0}}, 'rope_scaling.low_freq_factor is 4.0; supported: less than high_freq'),
  (LLAMA, {'rope_scaling': 'dynamic'}, "rope_scaling is 'dynamic'; supported: an object or null"),
  (MISTRAL, {'sliding_window': 0}, 'sliding_window is 0; supported: a positive integer'),
  (MISTRAL, {'layer_types': ['full_attention']}, "layer_types is ['full_attention']; supported: sliding_attention in every layer"),
  (LLAMA, {'model_type': 'mixtral'}, "model_type is 'mixtral'; supported: gemma3_text, internlm2, internlm3, llama, mistral, qwen2"),
  (QWEN2, {'model_type': 'llama'}, "architectures is ['Qwen2ForCausalLM']; supported: LlamaForCausalLM, LlamaForSequenceClassification, "),
  (LLAMA, {'architectures': ['LlamaModel']}, "architectures is ['LlamaModel']; supported: LlamaForCausalLM"),
  (LLAMA, {'architectures': ['MixtralForCausalLM'], 'model_type': None}, 'model_type is None; supported: gemma3_text'),
  (LLAMA, {'architectures': []}, 'architectures is []; supported: a list of one architecture'),
  (LLAMA, {'architectures': ['LlamaForSequenceClassification']}, 'num_labels is 2; supported: 1'),
  (
    LLAMA,
    {'architectures': ['LlamaForTokenClassification'], 'id2label': {'0': 'a', '1': 'b'}},
    "id2label is {'0': 'a', '1': 'b'}; supported: one",
  ),
  (LLAMA, {'hidden_size': '4096'}, "hidden_size is '4096'; supported: a positive integer"),
  (LLAMA, {'hidden_size': 4100}, 'hidden_size is 4100; supported: a multiple of num_attention_heads (32), unless head_dim is given'),
  (LLAMA, {'head_dim': 63}, 'head_dim is 63; supported: an even number'),
  (LLAMA, {'num_key_value_heads': 5}, 'num_key_value_heads is 5; supported: a divisor of num_attention_heads (32)'),
  (LLAMA, {'rms_norm_eps': True}, 'rms_norm_eps is True; supported: a positive number'),
  (POLAR_7B, {'reward_token_id': 'x'}, "reward_token_id is 'x'; supported: a token id or null"),
]


@pytest.mark.parametrize(('config', 'changes', 'message'), REFUSED, ids=[f'{i}-{next(reversed(c))}' for i, (_, c, _) in enumerate(REFUSED)])
def test_from_json_refuses(config, changes, message):
  with pytest.raises(UserError) as caught:
    from_json(config | changes, 'x/config.json')
  assert str(caught.value).startswith(f'x/config.json: {message}')
  assert '\n' not in str(caught.value)


def test_from_json_yarn():
  fields = lambda config: {name: getattr(config, f'rope_{name}') for name in ('scaling', 'factor', 'original_length', 'attention_factor')}
  expected = {'scaling': 'yarn', 'factor': 4.0, 'original_length': 32768, 'attention_factor': None}
  assert fields(from_json(QWEN2 | {'rope_scaling': YARN}, 'f').model) == expected
  # Of transformers 5, with values that it also takes from defaults.
  new = {
    'rope_type': 'yarn',
    'factor': 4.0,
    'attention_factor': 1.1,
    'beta_fast': None,
    'beta_slow': 2,
    'truncate': True,
    'rope_theta': 5.0,
  }
  model = from_json(QWEN2 | {'rope_parameters': new}, 'f').model
  assert fields(model) == expected | {'original_length': 131072, 'attention_factor': 1.1}  # max_position_embeddings
  assert (model.rope_theta, model.rope_beta_fast, model.rope_beta_slow) == (5.0, 32.0, 2.0)


def test_from_json_accepts_unusual_files():
  labels = {'architectures': ['LlamaForSequenceClassification'], 'num_labels': 1}
  assert from_json(LLAMA | labels, 'f').head == 'reward'
  assert from_json(LLAMA | {'architectures': ['LlamaForTokenClassification'], 'id2label': {'0': 'x'}}, 'f').head == 'value'
  assert from_json(_without(QWEN2, 'model_type'), 'f').model == FULL['qwen2_5_7b']
  assert from_json(POLAR_7B | {'model_type': 'internlm'}, 'f').model == FULL['polar_7b']
  assert from_json(INTERNLM3 | {'architectures': ['LlamaForCausalLM']}, 'f') == (FULL['internlm3_8b'], 'lm', 'LlamaForCausalLM', None)
  assert from_json(INTERNLM3 | {'qkv_bias': True}, 'f').model.qkv_bias
  assert from_json(LLAMA | {'head_dim': 64}, 'f').model.head_dim == 64
  bare = _without(GEMMA3, 'head_dim', 'hidden_activation', 'query_pre_attn_scalar', 'rope_local_base_freq', 'rope_theta')
  assert from_json(_without(bare, 'sliding_window_pattern'), 'f').model == FULL['gemma3_1b']  # transformers' defaults
  nested = {'full_attention': {'rope_type': 'default', 'rope_theta': 7.0}, 'sliding_attention': {'rope_type': 'default', 'rope_theta': 6.0}}
  model = from_json(GEMMA3 | {'rope_parameters': nested}, 'f').model
  assert (model.rope_theta, model.rope_local_theta) == (7.0, 6.0)
  assert from_json(_without(SMOLLM3, 'no_rope_layers', 'no_rope_layer_interval'), 'f').model == FULL['smollm3_3b']
  assert from_json(SMOLLM3 | {'no_rope_layers': [1] * 36}, 'f').model.nope_every is None
  assert from_json(_without(MISTRAL, 'sliding_window'), 'f').model.sliding_window == 4096  # transformers' default, but null is no window
  assert from_json(_without(QWEN3, 'head_dim') | {'hidden_size': 1024}, 'f').model.head_dim == 128  # transformers' default
  # A theta inside the section takes precedence over one at the top level, as in transformers.
  both = LLAMA | {'rope_scaling': None, 'rope_parameters': {'rope_type': 'default', 'rope_theta': 7.0}}
  assert from_json(both, 'f').model.rope_theta == 7.0


GEMMA3_FIELDS = {'family': 'gemma3_text', **families.FAMILIES['gemma3_text'].fixed}


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'family': 'llama', 'qkv_bias': True}, r'family llama cannot have model\.qkv_bias True, only False; change it or choose another'),
    ({'family': 'qwen2'}, r'family qwen2 cannot have model\.qkv_bias False'),
    ({'family': 'llama', 'sliding_window': 5}, r'family llama cannot have model\.sliding_window 5, only None; change it'),
    ({'family': 'mistral', 'global_every': 5}, r'family mistral cannot have model\.global_every 5, only None; change it'),
    (GEMMA3_FIELDS | {'sliding_window': 5}, r'gemma3_text with model\.sliding_window also have model\.rope_local_theta; set it'),
    (GEMMA3_FIELDS | {'rope_scaling': 'yarn'}, r"cannot have model\.rope_scaling 'yarn', only: none, linear"),
    ({'family': 'qwen3'}, r'family qwen3 cannot have model\.qk_norm False, only True; change it or choose another'),
    ({'family': 'internlm2', 'head_dim': 64}, r'have a head_dim of d_model / num_heads \(128 / 4\), not 64'),
    ({'family': 'internlm2', 'rope_scaling': 'llama3'}, r"model\.rope_scaling 'llama3', only: none, linear, dynamic$"),
    ({'vocab_size': None}, r'model\.vocab_size must be set'),
  ],
)
def test_to_json_refuses_inexpressible_models(fields, message):
  with pytest.raises(UserError, match=message):
    to_json(ModelConfig(**({'vocab_size': 9} | fields)), 'lm', dtype='float32')


def test_to_json_refuses_dtypes_and_architectures():
  with pytest.raises(UserError, match=r"cannot be stored as 'int8', only as: float32, bfloat16, float16"):
    to_json(FULL['polar_7b'], 'lm', dtype='int8')
  with pytest.raises(UserError, match=r"cannot be stored as 'InternLM2ForRewardModel'"):
    to_json(FULL['polar_7b'], 'lm', dtype='float32', architecture='InternLM2ForRewardModel')
