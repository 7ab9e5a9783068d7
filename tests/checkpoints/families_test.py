"""Tests of the tensors of each family, against transformers' own models and against loops over matrix rows."""

from __future__ import annotations

import collections
import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from optional import transformers

from polar_jax.checkpoints import families
from polar_jax.checkpoints.families import stored_tensors
from polar_jax.config import ModelConfig
from polar_jax.model.language_model import LanguageModel
from polar_jax.model.reward_model import RewardModel
from polar_jax.model.value_model import ValueModel
from polar_jax.types import UserError

# All sizes differ, and heads * head_dim is not the width, so that a swapped axis is noticed.
SHAPE = {'vocab_size': 37, 'num_layers': 2, 'd_model': 24, 'd_ff': 44, 'num_heads': 6, 'num_kv_heads': 2, 'head_dim': 10}
MODELS = {'lm': LanguageModel, 'reward': RewardModel, 'value': ValueModel}
# Flags of every family; internlm3 comes with biases and without.
FAMILY_FLAGS = [
  ('internlm2', {}),
  ('internlm3', {}),
  ('internlm3', {'qkv_bias': True}),
  ('llama', {}),
  ('mistral', {'sliding_window': 5}),
  ('qwen2', {'qkv_bias': True}),
  ('qwen3', {'qk_norm': True}),
  ('gemma3_text', {**families.FAMILIES['gemma3_text'].fixed, 'sliding_window': 5, 'rope_local_theta': 9.0}),
  ('smollm3', {'nope_every': 2}),
]


def _model(family, **changes):
  return ModelConfig(**(SHAPE | {'family': family} | changes))


def _random(shape, dtype, seed=0):
  """Return random bit patterns except NaN and infinity, so that a cast through another dtype is noticed."""
  bits = np.random.default_rng(seed).integers(0, 256, (*shape, np.dtype(dtype).itemsize), np.uint8)
  values = bits.view(dtype)[..., 0]
  with np.errstate(invalid='ignore'):
    return np.where(np.isfinite(values.astype(np.float64)), values, np.ones_like(values))


@pytest.mark.needs('torch', 'transformers')
@pytest.mark.parametrize('tied', [False, True])
@pytest.mark.parametrize('head', ['lm', 'reward', 'value'])
@pytest.mark.parametrize(('family', 'flags'), FAMILY_FLAGS[3:])
def test_stored_tensors_against_transformers(family, flags, head, tied):
  model = _model(family, tie_embeddings=tied, **flags)
  kind = {'lm': 'ForCausalLM', 'reward': 'ForSequenceClassification', 'value': 'ForTokenClassification'}[head]
  name = {'llama': 'Llama', 'mistral': 'Mistral', 'qwen2': 'Qwen2', 'qwen3': 'Qwen3', 'gemma3_text': 'Gemma3', 'smollm3': 'SmolLM3'}[family]
  text = 'Text' if family == 'gemma3_text' else ''
  if text and head != 'lm':  # which has no token classifier
    kind = 'TextForSequenceClassification'
  config = getattr(transformers, f'{name}{text}Config')(
    vocab_size=37,
    num_hidden_layers=2,
    hidden_size=24,
    intermediate_size=44,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=10,
    tie_word_embeddings=tied,
    num_labels=1,
    pad_token_id=0,
  )
  theirs = {n: tuple(t.shape) for n, t in getattr(transformers, name + kind)(config).state_dict().items()}
  if tied:
    theirs.pop('lm_head.weight', None)  # listed but never saved, because it is the embedding
  assert [(s.name, s.shape) for s in stored_tensors(model, head)] == list(theirs.items())


def test_stored_tensors_internlm2_names():
  layer = {
    'attention.wqkv.weight': (100, 24),
    'attention.wo.weight': (24, 60),
    'feed_forward.w1.weight': (44, 24),
    'feed_forward.w3.weight': (44, 24),
    'feed_forward.w2.weight': (24, 44),
    'attention_norm.weight': (24,),
    'ffn_norm.weight': (24,),
  }
  decoder = {'model.tok_embeddings.weight': (37, 24), 'model.norm.weight': (24,)}
  decoder |= {f'model.layers.{i}.{name}': shape for i in range(2) for name, shape in layer.items()}
  for head, last in (('lm', {'output.weight': (37, 24)}), ('reward', {'v_head.weight': (1, 24)}), ('value', {'v_head.weight': (1, 24)})):
    assert {s.name: s.shape for s in stored_tensors(_model('internlm2'), head)} == decoder | last


def test_stored_tensors_wqkv_row_by_row():
  """For key/value head g: its three query heads, its key, its value; query head g * 3 + j of ours."""
  model = _model('internlm2')
  fused = next(s for s in stored_tensors(model, 'lm') if 'layers.1.attention.wqkv' in s.name)
  assert [p.path[-1] for p in fused.parts] == ['wq', 'wk', 'wv'] and all(p.layer == 1 for p in fused.parts)
  rng = np.random.default_rng(0)
  wq, wk, wv = (rng.normal(size=(24, heads, 10)) for heads in (6, 2, 2))
  rows = []
  for g in range(2):
    for heads, n in [(wq, g * 3), (wq, g * 3 + 1), (wq, g * 3 + 2), (wk, g), (wv, g)]:
      for h in range(10):
        rows.append([heads[d, n, h] for d in range(24)])
  np.testing.assert_array_equal(fused.join(wq, wk, wv), np.array(rows))
  for ours, expected in zip(fused.split(np.array(rows)), (wq, wk, wv), strict=True):
    np.testing.assert_array_equal(ours, expected)


def test_stored_tensors_linear_layers_element_by_element():
  tensors = {s.name: s for s in stored_tensors(_model('qwen2', qkv_bias=True), 'reward')}
  q = _random((60, 24), np.float32)
  (ours,) = tensors['model.layers.0.self_attn.q_proj.weight'].split(q)
  assert all(ours[d, n, h] == q[n * 10 + h, d] for d, n, h in itertools.product(range(24), range(6), range(10)))
  o = _random((24, 60), np.float32)
  (ours,) = tensors['model.layers.0.self_attn.o_proj.weight'].split(o)
  assert all(ours[n, h, d] == o[d, n * 10 + h] for d, n, h in itertools.product(range(24), range(6), range(10)))
  bias = _random((20,), np.float32)
  (ours,) = tensors['model.layers.0.self_attn.k_proj.bias'].split(bias)
  assert all(ours[k, h] == bias[k * 10 + h] for k, h in itertools.product(range(2), range(10)))
  gate = _random((44, 24), np.float32)
  np.testing.assert_array_equal(tensors['model.layers.0.mlp.gate_proj.weight'].split(gate)[0], gate.T)
  down = _random((24, 44), np.float32)
  np.testing.assert_array_equal(tensors['model.layers.0.mlp.down_proj.weight'].split(down)[0], down.T)
  embedding = _random((37, 24), np.float32)
  np.testing.assert_array_equal(tensors['model.embed_tokens.weight'].split(embedding)[0], embedding)


@pytest.mark.parametrize('head', MODELS)
@pytest.mark.parametrize(('family', 'flags'), FAMILY_FLAGS)
@pytest.mark.parametrize('tied', [False, True])
def test_stored_tensors_parts_cover_the_tree_once(family, flags, head, tied):
  model = _model(family, tie_embeddings=tied, **flags)
  tree = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: MODELS[head](model, rngs=nnx.Rngs(0))), nnx.Param))
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  expected = collections.Counter()
  for path, leaf in leaves:
    names = tuple(key.key for key in path)
    stacked = 'layers' in names
    for layer in range(2) if stacked else (None,):
      expected[names, layer, leaf.shape[1:] if stacked else leaf.shape] += 1
  found = collections.Counter()
  for stored in stored_tensors(model, head):
    for part, array in zip(stored.parts, stored.split(np.zeros(stored.shape)), strict=True):
      found[part.path, part.layer, array.shape] += 1
  assert found == expected


@pytest.mark.parametrize('head', MODELS)
@pytest.mark.parametrize(('family', 'flags'), FAMILY_FLAGS)
@pytest.mark.parametrize('dtype', [np.float32, np.float16, ml_dtypes.bfloat16])
def test_join_is_the_exact_inverse_of_split(family, flags, head, dtype):
  for stored in stored_tensors(_model(family, **flags), head):
    if not stored.parts:
      continue
    value = _random(stored.shape, dtype)
    split = stored.split(value)
    assert all(a.dtype == dtype for a in split) and sum(a.size for a in split) == value.size
    back = stored.join(*split)
    assert isinstance(back, np.ndarray) and back.dtype == dtype
    assert back.shape == value.shape and np.ascontiguousarray(back).tobytes() == value.tobytes()
    on_device = stored.join(*stored.split(jnp.asarray(value)))
    assert isinstance(on_device, jax.Array) and on_device.dtype == dtype
    assert np.asarray(on_device).tobytes() == value.tobytes()


def test_stored_tensors_token_classifier_bias_must_be_zero():
  bias = stored_tensors(_model('llama'), 'value')[-1]
  assert bias.name == 'score.bias' and bias.shape == (1,) and bias.parts == ()
  assert bias.split(np.zeros(1, np.float16)) == ()
  np.testing.assert_array_equal(bias.join(), [0.0])
  with pytest.raises(UserError, match=r"'score\.bias' is \[0\.5\]"):
    bias.split(np.full(1, 0.5, np.float32))


def test_architecture_of_given_architecture():
  names = [s.name for s in stored_tensors(_model('llama'), 'reward', 'LlamaForTokenClassification')]
  assert names[-2:] == ['score.weight', 'score.bias']
  # transformers 5 runs internlm3 as a Llama and names it so.
  assert families.architecture_of('internlm3', 'lm', 'LlamaForCausalLM') == 'LlamaForCausalLM'
  assert families.architecture_of('internlm3', 'lm') == 'InternLM3ForCausalLM'
  assert families.architectures('internlm2') == {'InternLM2ForCausalLM': 'lm', 'InternLM2ForRewardModel': 'reward'}
  with pytest.raises(UserError, match=r"family llama cannot be stored as 'LlamaForCausalLM', only as: LlamaForSequ.*, LlamaForToken"):
    stored_tensors(_model('llama'), 'reward', 'LlamaForCausalLM')
  with pytest.raises(UserError, match=r"family llama cannot be stored as 'Qwen2ForCausalLM', only as: LlamaForCausalLM$"):
    stored_tensors(_model('llama'), 'lm', 'Qwen2ForCausalLM')


def test_stored_tensors_refuses_unsupported_settings_of_a_family():
  with pytest.raises(UserError, match=r'family internlm2 cannot have model\.qkv_bias True, only False; change it or'):
    stored_tensors(_model('internlm2', qkv_bias=True), 'lm')
  with pytest.raises(UserError, match=r'family llama cannot have model\.qk_norm True'):
    stored_tensors(_model('llama', qk_norm=True), 'lm')
  with pytest.raises(UserError, match=r'family qwen3 cannot have model\.qk_norm False'):
    stored_tensors(_model('qwen3'), 'lm')
  with pytest.raises(UserError, match=r'family gemma3_text cannot have model\.qk_norm False'):
    stored_tensors(_model('gemma3_text'), 'lm')
  with pytest.raises(UserError, match=r'family qwen3 cannot have model\.nope_every 4, only None'):
    stored_tensors(_model('qwen3', qk_norm=True, nope_every=4), 'lm')
  with pytest.raises(UserError, match=r'model\.vocab_size must be set'):
    stored_tensors(_model('llama', vocab_size=None), 'lm')
