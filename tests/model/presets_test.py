"""Parameter counts of the published shapes."""

from __future__ import annotations

import math

import pytest
from flax import nnx

from polar_jax.checkpoints.families import stored_tensors
from polar_jax.config import ModelConfig
from polar_jax.model.language_model import LanguageModel
from polar_jax.model.presets import PRESETS
from polar_jax.model.reward_model import RewardModel
from polar_jax.model.transformer import num_parameters
from polar_jax.model.value_model import ValueModel

# Parameters of the language models, as counted by their publishers.
PUBLISHED = {
  'polar_1_8b': 1_889_110_016,  # internlm2_5-1_8b
  'polar_7b': 7_737_708_544,  # internlm2_5-7b
  'internlm2_5_7b': 7_737_708_544,
  'internlm3_8b': 8_804_241_408,
  'llama_3_1_8b': 8_030_261_248,
  'smollm2_135m': 134_515_008,
  'qwen2_5_7b': 7_615_616_512,
  'qwen2_5_32b': 32_763_876_352,
  'qwen2_5_7b_instruct': 7_615_616_512,
  'qwen2_5_32b_instruct': 32_763_876_352,
  'qwen3_0_6b': 596_049_920,
  'qwen3_1_7b': 1_720_574_976,
  'qwen3_4b': 4_022_468_096,
  'qwen3_8b': 8_190_735_360,
  'qwen3_14b': 14_768_307_200,
  'qwen3_32b': 32_762_123_264,
  'mistral_7b_v0_1': 7_241_732_096,
  'mistral_7b_v0_3': 7_248_023_552,
  'gemma3_270m': 268_098_176,
  'gemma3_1b': 999_885_952,
  # With 262,144 tokens; the checkpoints of the larger ones have 64 more.
  'gemma3_4b': 3_880_099_328 + 64 * 2_560,
  'gemma3_12b': 11_765_788_416 + 64 * 3_840,
  'gemma3_27b': 27_009_002_240 + 64 * 5_376,
  'smollm3_3b': 3_075_098_624,
}


@pytest.mark.parametrize('name', PUBLISHED)
def test_parameters_of_the_published_shapes(name):
  config = ModelConfig(**PRESETS[name])
  vocabulary = 0 if config.tie_embeddings else config.vocab_size * config.d_model
  scalar = PUBLISHED[name] - vocabulary + config.d_model
  for head, cls, expected in (('lm', LanguageModel, PUBLISHED[name]), ('reward', RewardModel, scalar), ('value', ValueModel, scalar)):
    stored = sum(math.prod(s.shape) for s in stored_tensors(config, head) if s.parts)
    model = nnx.eval_shape(lambda cls=cls: cls(config, rngs=nnx.Rngs(0)))  # allocates nothing
    assert (stored, num_parameters(model)) == (expected, expected)


def test_every_preset_is_a_shape_that_computes():
  assert {n for n in PRESETS if not n.startswith('mini')} == set(PUBLISHED)
  for fields in PRESETS.values():
    config = ModelConfig(**fields)
    assert config.num_heads % config.num_kv_heads == 0
    # The width of a head is independent of that of the model in the newer families.
    assert config.num_heads * config.head_dim == config.d_model or config.family in ('qwen3', 'gemma3_text')
