"""Our decoder against the implementations of transformers, on random weights in float32."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import numpy as np
import pytest
from flax import nnx
from optional import torch, transformers

from polar_jax.checkpoints import config_json, families
from polar_jax.config import ModelConfig
from polar_jax.data import layout
from polar_jax.model.language_model import LanguageModel
from polar_jax.model.reward_model import RewardModel
from polar_jax.model.transformer import Decoder
from polar_jax.model.value_model import ValueModel

pytestmark = [pytest.mark.needs('torch', 'transformers'), pytest.mark.usefixtures('torch_on_one_thread')]

# A large eps, few channels and a small rotary base, so that a mistake in any of them is noticed.
LLAMA = ModelConfig(
  family='llama',
  vocab_size=97,
  num_layers=2,
  d_model=48,
  d_ff=80,
  num_heads=6,
  num_kv_heads=2,
  head_dim=16,
  rope_theta=500.0,
  norm_eps=0.01,
  max_position=128,
)
LLAMA3 = {'rope_scaling': 'llama3', 'rope_factor': 8.0, 'rope_low_freq_factor': 1.0, 'rope_high_freq_factor': 4.0}
# Two local layers, a global one with scaled rotary embeddings, and a local one.
GEMMA3 = dataclasses.replace(
  LLAMA,
  family='gemma3_text',
  num_layers=4,
  qk_norm=True,
  post_norms=True,
  zero_centered_norms=True,
  embedding_scale=True,
  activation='gelu_tanh',
  query_pre_attn_scalar=10.0,
  sliding_window=40,
  global_every=3,
  rope_local_theta=50.0,
  rope_scaling='linear',
  rope_factor=3.0,
  tie_embeddings=True,
)
CASES = {
  'llama': LLAMA,
  'llama_linear': dataclasses.replace(LLAMA, rope_scaling='linear', rope_factor=3.0, num_kv_heads=6),
  'llama_llama3': dataclasses.replace(LLAMA, **LLAMA3, rope_original_length=64, num_kv_heads=1),
  'llama_dynamic': dataclasses.replace(LLAMA, rope_scaling='dynamic', rope_factor=2.0),
  'qwen2': dataclasses.replace(LLAMA, family='qwen2', head_dim=8, qkv_bias=True),
  'qwen2_yarn': dataclasses.replace(
    LLAMA, family='qwen2', head_dim=16, qkv_bias=True, rope_scaling='yarn', rope_factor=4.0, rope_original_length=64
  ),
  'qwen2_tied': dataclasses.replace(LLAMA, family='qwen2', head_dim=8, qkv_bias=True, tie_embeddings=True),
  'mistral': dataclasses.replace(LLAMA, family='mistral', sliding_window=40),
  'qwen3': dataclasses.replace(LLAMA, family='qwen3', qk_norm=True),
  'gemma3': GEMMA3,
  'smollm3': dataclasses.replace(LLAMA, family='smollm3', num_layers=3, head_dim=8, nope_every=2),
  'internlm2': dataclasses.replace(LLAMA, family='internlm2', head_dim=8),
  'internlm3': dataclasses.replace(LLAMA, family='internlm3', head_dim=24),
}
LENGTHS = (300, 64, 7, 1)
TOTAL = 384
PAD = 96  # a token that no sequence contains: transformers' classifiers search for it
TOLERANCE = 1e-4


class Models(NamedTuple):
  """The same weights in both implementations."""

  config: ModelConfig
  params: dict
  torch_model: transformers.PreTrainedModel


NAMES = {'mistral': 'Mistral', 'qwen2': 'Qwen2', 'qwen3': 'Qwen3', 'gemma3_text': 'Gemma3', 'smollm3': 'SmolLM3'}


def _name(config: ModelConfig, head: str = 'ForCausalLM') -> str:
  """Return the name of transformers' class that computes a family, or of its config."""
  text = 'Text' if config.family == 'gemma3_text' and head != 'ForCausalLM' else ''
  return NAMES.get(config.family, 'Llama') + text + head


def _torch_config(c: ModelConfig, **settings) -> transformers.PretrainedConfig:
  kind = getattr(transformers, _name(c, 'Config'))
  rope = {'rope_type': 'default' if c.rope_scaling == 'none' else c.rope_scaling, 'rope_theta': c.rope_theta}
  if c.rope_scaling != 'none':
    rope['factor'] = c.rope_factor
  if c.rope_scaling == 'yarn':
    rope['original_max_position_embeddings'] = c.rope_original_length
  if c.rope_scaling == 'llama3':
    rope |= {'low_freq_factor': c.rope_low_freq_factor, 'high_freq_factor': c.rope_high_freq_factor}
    rope['original_max_position_embeddings'] = c.rope_original_length
  if c.family in ('mistral', 'gemma3_text'):
    settings['sliding_window'] = c.sliding_window
  if c.family == 'gemma3_text':
    settings['query_pre_attn_scalar'] = int(c.query_pre_attn_scalar)
    settings['layer_types'] = ['sliding_attention', 'sliding_attention', 'full_attention', 'sliding_attention']
    rope = {'full_attention': rope, 'sliding_attention': {'rope_type': 'default', 'rope_theta': c.rope_local_theta}}
  if c.family == 'smollm3':
    settings['no_rope_layers'] = [1, 0, 1]
  return kind(
    vocab_size=c.vocab_size,
    hidden_size=c.d_model,
    intermediate_size=c.d_ff,
    num_hidden_layers=c.num_layers,
    num_attention_heads=c.num_heads,
    num_key_value_heads=c.num_kv_heads,
    head_dim=c.head_dim,
    max_position_embeddings=c.max_position,
    rms_norm_eps=c.norm_eps,
    rope_parameters=rope,
    tie_word_embeddings=c.tie_embeddings,
    pad_token_id=PAD,
    dtype='float32',
    **settings,
  )


def _as_llama(config: ModelConfig, stored: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Rewrite InternLM2 as the Llama that computes the same: split the fused matrix, rename everything else."""
  group, dim = config.num_heads // config.num_kv_heads, config.head_dim
  names = {
    'tok_embeddings': 'embed_tokens',
    'attention.wo': 'self_attn.o_proj',
    'feed_forward.w1': 'mlp.gate_proj',
    'feed_forward.w2': 'mlp.down_proj',
    'feed_forward.w3': 'mlp.up_proj',
    'attention_norm': 'input_layernorm',
    'ffn_norm': 'post_attention_layernorm',
    'output.': 'lm_head.',
  }
  out = {}
  for name, array in stored.items():
    if 'wqkv' in name:
      heads = [array[start : start + dim] for start in range(0, len(array), dim)]
      kind_of = lambda i: 'q' if i % (group + 2) < group else 'k' if i % (group + 2) == group else 'v'
      for kind in 'qkv':
        chosen = [head for i, head in enumerate(heads) if kind_of(i) == kind]
        out[name.replace('attention.wqkv', f'self_attn.{kind}_proj')] = np.concatenate(chosen)
    else:
      for theirs, llamas in names.items():
        name = name.replace(theirs, llamas)
      out[name] = array
  return out


def _torch_model(kind: type, config: ModelConfig, stored: dict[str, np.ndarray], **settings) -> transformers.PreTrainedModel:
  model = kind(_torch_config(config, **settings)).eval()
  missing, unexpected = model.load_state_dict({name: torch.from_numpy(a) for name, a in stored.items()}, strict=False)
  assert not unexpected
  tied = config.tie_embeddings and 'lm_head.weight' in model.state_dict()
  assert missing == (['lm_head.weight'] if tied else [])  # it is the embedding
  return model


@pytest.fixture(scope='module', params=CASES)
def models(request, random_params, as_stored):
  config = CASES[request.param]
  params = random_params(LanguageModel, config)
  stored = as_stored(config, params)
  if config.family == 'internlm2':
    stored = _as_llama(config, stored)
  kind = getattr(transformers, _name(config))
  attention = 'eager' if config.family == 'llama' else 'sdpa'
  return Models(config, params, _torch_model(kind, config, stored, attn_implementation=attention))


def _sequences(lengths: tuple[int, ...] = LENGTHS) -> list[np.ndarray]:
  rng = np.random.default_rng(5)
  return [rng.integers(0, PAD, n).astype(np.int32) for n in lengths]


def _rows(placed: list[list[tuple[int, np.ndarray]]], total: int) -> tuple[np.ndarray, ...]:
  """Return (tokens, positions, intervals) of rows with sequences at the given offsets."""
  tokens, positions, start, end = np.zeros((4, len(placed), total), np.int32)
  for b, members in enumerate(placed):
    for at, ids in members:
      for t, token in enumerate(ids):
        tokens[b, at + t], positions[b, at + t], start[b, at + t], end[b, at + t] = token, t, at, at + t + 1
  return tokens, positions, [(start, end)]


def _apply(kind: type, config: ModelConfig, params: dict, *inputs) -> np.ndarray:
  graphdef, _ = nnx.split(nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0))))
  return np.asarray(jax.jit(lambda p, inputs: nnx.merge(graphdef, p)(*inputs))(params, inputs))


# (row, offset) of each sequence: padded on the right, padded on the left, and packed into one row.
PLACES = {
  'right': [(b, 0) for b in range(4)],
  'left': [(4 + b, TOTAL - n) for b, n in enumerate(LENGTHS)],
  'packed': [(8, 8), (8, 308), (8, 1), (8, 0)],
}


@pytest.fixture(scope='module')
def ours(models):
  """Return our logits of every sequence, for each arrangement."""
  placed: list[list[tuple[int, np.ndarray]]] = [[] for _ in range(9)]
  for places in PLACES.values():
    for (row, at), ids in zip(places, _sequences(), strict=True):
      placed[row].append((at, ids))
  logits = _apply(LanguageModel, models.config, models.params, *_rows(placed, TOTAL))
  return {name: [logits[row, at : at + n] for (row, at), n in zip(places, LENGTHS, strict=True)] for name, places in PLACES.items()}


@torch.no_grad()
def _logits(model, ids: np.ndarray, **inputs) -> np.ndarray:
  return model(torch.from_numpy(ids.astype(np.int64)), **inputs).logits.numpy()


@pytest.fixture(scope='module')
def alone(models):
  """Return their logits of every sequence, one at a time."""
  return [_logits(models.torch_model, ids[None])[0] for ids in _sequences()]


def _keeps_its_frequencies(config: ModelConfig, length: int) -> bool:
  """Return whether dynamic scaling leaves the frequencies unchanged.

  It gives all sequences of a row (in transformers, of a batch) the frequencies of the longest.
  """
  return config.rope_scaling != 'dynamic' or length == max(LENGTHS)


@pytest.mark.parametrize('place', PLACES)
def test_logits_equal_transformers_one_sequence_at_a_time(models, ours, alone, place):
  assert 0.5 < np.std(alone[0]) < 5
  for got, expected in zip(ours[place], alone, strict=True):
    if place != 'packed' or _keeps_its_frequencies(models.config, len(expected)):
      np.testing.assert_allclose(got, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize('side', ['left', 'right'])
def test_logits_equal_transformers_padded_batch(models, ours, side):
  ids, mask = np.full((len(LENGTHS), max(LENGTHS)), PAD), np.zeros((len(LENGTHS), max(LENGTHS)), np.int64)
  for b, sequence in enumerate(_sequences()):
    at = slice(None, len(sequence)) if side == 'right' else slice(max(LENGTHS) - len(sequence), None)
    ids[b, at], mask[b, at] = sequence, 1
  theirs = _logits(models.torch_model, ids, attention_mask=torch.from_numpy(mask))
  for b, got in enumerate(ours[side]):
    if _keeps_its_frequencies(models.config, len(got)):
      np.testing.assert_allclose(got, theirs[b][mask[b] == 1], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize('models', [case for case in CASES if case != 'internlm2'], indirect=True)  # internlm2: see remote_code_test.py
def test_to_json_gives_the_same_transformers_model(models, alone):
  """Bit-identical, because torch computes both."""
  written = config_json.to_json(models.config, 'lm', dtype='float32')
  model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**written)).eval()
  model.load_state_dict(models.torch_model.state_dict())
  model.set_attn_implementation(models.torch_model.config._attn_implementation)
  for ids, expected in zip(_sequences(), alone, strict=True):
    np.testing.assert_array_equal(_logits(model, ids[None])[0], expected)


@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize(('head', 'model'), [('lm', LanguageModel), ('reward', RewardModel), ('value', ValueModel)])
def test_stored_tensors_against_independent_mapping(random_params, as_stored, case, head, model):
  config = CASES[case]
  params = random_params(model, config)
  expected = as_stored(config, params)
  if head == 'value' and config.family not in ('internlm2', 'gemma3_text'):
    expected['score.bias'] = np.zeros(1, np.float32)
  stored = families.stored_tensors(config, head)
  assert sorted(s.name for s in stored) == sorted(expected)
  seen = jax.tree.map(np.zeros_like, params)
  for s in stored:
    parts = [(_at(params, part), _at(seen, part)) for part in s.parts]
    joined = s.join(*(value for value, _ in parts))
    assert joined.shape == s.shape
    np.testing.assert_array_equal(joined, expected[s.name])
    for (_, slot), value in zip(parts, s.split(expected[s.name]), strict=True):
      slot[...] = value
  jax.tree.map(np.testing.assert_array_equal, seen, params)


def _at(params: dict, part: families.Part) -> np.ndarray:
  for key in part.path:
    params = params[key]
  return params if part.layer is None else params[part.layer]


@pytest.mark.parametrize('length', [1, 7, 64])
def test_hidden_states_without_padding(random_params, as_stored, length):
  config = dataclasses.replace(CASES['llama'], num_layers=1)
  params = random_params(LanguageModel, config)
  model = _torch_model(transformers.LlamaForCausalLM, config, as_stored(config, params), attn_implementation='eager')
  ids = np.stack(_sequences((length, length)))
  inputs = _rows([[(0, row)] for row in ids], length)
  got = _apply(Decoder, config, params['decoder'], *inputs)
  with torch.no_grad():
    out = model.model(torch.from_numpy(ids.astype(np.int64)), output_attentions=True)
  np.testing.assert_allclose(got, out.last_hidden_state, atol=TOLERANCE, rtol=0)
  # Nearly uniform attention would hide mistakes.
  assert length < 64 or (out.attentions[0][..., -1, :].max(-1).values > 4 / length).all()


# Lengths of (shared prefix, rest of the chosen sequence, rest of the rejected one).
TRIPLETS = [(20, 9, 14), (0, 30, 5), (33, 0, 6), (11, 8, 8)]


def _triplets() -> list[tuple[np.ndarray, np.ndarray]]:
  out = []
  for i, lengths in enumerate(TRIPLETS):
    shared, chosen, rejected = (np.random.default_rng([i, part]).integers(0, PAD, n) for part, n in enumerate(lengths))
    out.append((np.concatenate([shared, chosen]), np.concatenate([shared, rejected])))
  return out


def _torch_rewards(model, sequences: list[np.ndarray]) -> np.ndarray:
  """Return the rewards of sequences one at a time, after checking that one padded batch gives the same."""
  lengths = np.array([len(ids) for ids in sequences])
  ids = np.stack([np.pad(ids, (0, lengths.max() - len(ids)), constant_values=PAD) for ids in sequences])
  mask = torch.from_numpy((np.arange(lengths.max()) < lengths[:, None]).astype(np.int64))
  batch = _logits(model, ids, attention_mask=mask)[:, 0]
  single = np.array([_logits(model, ids[None], attention_mask=torch.ones(1, len(ids)))[0, 0] for ids in sequences])
  np.testing.assert_allclose(batch, single, atol=TOLERANCE, rtol=0)
  return single


@pytest.mark.parametrize('case', ['llama', 'qwen2', 'qwen3', 'mistral', 'gemma3', 'smollm3', 'internlm2'])
def test_rewards_of_triplets_equal_those_of_two_sequences_each(random_params, as_stored, remote_code, case):
  config = dataclasses.replace(CASES[case], attention='reference')  # compiles faster
  if config.sliding_window:
    config = dataclasses.replace(config, sliding_window=12)  # ends in the tails and in the prefix
  params = random_params(RewardModel, config)
  stored = as_stored(config, params)
  if case == 'internlm2':
    settings = _torch_config(config).to_dict()
    settings.pop('model_type')
    model = remote_code.InternLM2ForRewardModel(remote_code.InternLM2Config(**settings)).eval()
    model.load_state_dict({name: torch.from_numpy(a) for name, a in stored.items()})
  else:
    model = _torch_model(getattr(transformers, _name(config, 'ForSequenceClassification')), config, stored, num_labels=1)
  triplets = _triplets()
  batch = layout.pair_batch([layout.pair_segment(*t) for t in triplets], range(4), [[0, 2], [1, 3]], 128, 2)
  index = batch.reward_index_BPC.reshape(2, -1)
  got = _apply(RewardModel, config, params, batch.tokens_BT, batch.positions_BT, batch.intervals, index)
  expected = np.stack([_torch_rewards(model, [t[c] for t in triplets]) for c in range(2)], axis=1)
  assert np.ptp(expected) > 1
  np.testing.assert_allclose(got.reshape(4, 2), expected[[0, 2, 1, 3]], atol=TOLERANCE, rtol=0)


def test_values_equal_token_classifier(random_params, as_stored):
  config = CASES['internlm3']
  params = random_params(ValueModel, config)
  stored = as_stored(config, params) | {'score.bias': np.zeros(1, np.float32)}
  model = _torch_model(transformers.LlamaForTokenClassification, config, stored, num_labels=1)
  ids = _sequences((64,))[0]
  got = _apply(ValueModel, config, params, *_rows([[(0, ids)]], 64))
  np.testing.assert_allclose(got, _logits(model, ids[None])[..., 0], atol=TOLERANCE, rtol=0)
