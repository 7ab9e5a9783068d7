"""The configs of reinforcement fine-tuning: they have the paper's settings, and their models fit the machines that they name."""

from __future__ import annotations

import importlib.util
import math
import pathlib
import re

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

from polar_jax import sharding
from polar_jax.config import ModelConfig, parse
from polar_jax.model.heads import abstract_model
from polar_jax.model.presets import PRESETS

ROOT = pathlib.Path(__file__).parents[2]
REWARD_MODEL = 7_358_652_416
# Devices, parameters of the policy as its publisher counts them, its vocabulary and width.
CONFIGS = {
  'rft_internlm3_8b': (8, 8_804_241_408, 128_512, 4_096),
  'rft_llama_3_1_8b': (8, 8_030_261_248, 128_256, 4_096),
  'rft_qwen2_5_7b': (8, 7_615_616_512, 152_064, 3_584),
  'rft_qwen3_8b': (32, 8_190_735_360, 151_936, 4_096),
  'rft_qwen2_5_32b': (64, 32_763_876_352, 152_064, 5_120),
}
HBM = 80e9
# Parameters by name -> the axes that divide them; all others are vectors of a model's width, which every device holds.
SPLIT = {
  'embedding': ('tensor', 'fsdp'),
  'lm_head': ('tensor', 'fsdp'),
  'wq': (None, 'fsdp', 'tensor', None),
  'wk': (None, 'fsdp', 'tensor', None),
  'wv': (None, 'fsdp', 'tensor', None),
  'wo': (None, 'tensor', None, 'fsdp'),
  'bq': (None, 'tensor', None),
  'bk': (None, 'tensor', None),
  'bv': (None, 'tensor', None),
  'w_gate': (None, 'fsdp', 'tensor'),
  'w_up': (None, 'fsdp', 'tensor'),
  'w_down': (None, 'tensor', 'fsdp'),
}


def load(name: str):
  spec = importlib.util.spec_from_file_location(f'config_{name}', ROOT / 'configs' / f'{name}.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return parse(module.get_config()), module.__doc__


def mesh_of(config, devices: int) -> AbstractMesh:
  sizes = [getattr(config.mesh, axis) for axis in sharding.MESH_AXES]
  sizes[sizes.index(-1)] = devices // -math.prod(sizes)
  assert math.prod(sizes) == devices
  return AbstractMesh(tuple(sizes), sharding.MESH_AXES, axis_types=(AxisType.Auto,) * len(sizes))


def models(config) -> dict[str, tuple[ModelConfig, str]]:
  policy = config.model
  return {'actor': (policy, 'lm'), 'critic': (policy, 'value'), 'reward': (ModelConfig(**PRESETS['polar_7b']), 'reward')}


@pytest.mark.parametrize('name', CONFIGS)
def test_settings_of_the_paper_and_of_the_official_scripts(name):
  config, _ = load(name)
  r = config.rft
  assert (config.stage, config.model.compute_dtype, config.model.remat) == ('rft', 'bfloat16', 'full')
  # Paper, section E.3.
  assert (r.actor.learning_rate, r.critic.learning_rate, r.prompts_per_step, r.num_generations, r.mini_batch_size, r.epochs, r.steps) == (
    (1e-6, 1e-5, 1024, 1, None, 1, None)
  )
  # The official scripts, and the defaults of verl for settings that they omit.
  assert (r.advantage, r.gamma, r.gae_lambda, r.whiten, r.update_epochs, r.loss_mean) == ('gae', 1, 1, True, 1, 'token')
  assert (r.kl_in, r.clip, r.clip_high, r.dual_clip, r.value_clip, r.entropy_coef, r.critic_warmup) == ('none', 0.2, None, 3, 0.5, 0, 0)
  assert (r.actor.warmup_ratio, r.actor.final_lr_ratio, r.critic.warmup_ratio, r.critic.final_lr_ratio) == (0.03, 1, 0, 0.1)
  for optimizer in (r.actor, r.critic):
    assert (optimizer.b1, optimizer.b2, optimizer.eps, optimizer.weight_decay, optimizer.clip_norm) == (0.9, 0.999, 1e-8, 0.01, 1.0)
  o, reward = r.rollout, r.reward
  longest = 15_000 if name == 'rft_qwen3_8b' else 1024  # it thinks
  assert (o.max_prompt, o.max_new, o.temperature, o.top_p, o.top_k, o.chat) == (1024, longest, 1, 1, None, 'auto')
  assert (reward.source, reward.wrapper, reward.strip_thinking, reward.normalize, reward.clip) == ('model', 'sft', True, 'none', None)
  assert (reward.model_weight, reward.rule_weight, reward.missing_eos_penalty, reward.length_buffer) == (1, 0, 0, None)
  assert (config.template.max_length, config.template.max_response_length, config.template.reward_token_id) == (16384, 4096, 92527)
  assert r.row_length % 128 == 0 and r.row_length >= o.max_prompt + o.max_new


def test_parameters_and_layout_on_the_machines_named():
  """Abstract: nothing is allocated. Every dimension that the rules divide is divided, and the memory in a docstring is right."""
  for name, (devices, actor, vocabulary, width) in CONFIGS.items():
    config, text = load(name)
    mesh = mesh_of(config, devices)
    expected = {'actor': actor, 'critic': actor - vocabulary * width + width, 'reward': REWARD_MODEL}
    held = {}
    for role, (model, head) in models(config).items():
      params = sharding.abstract_params(abstract_model(model, head), mesh)
      leaves = jax.tree_util.tree_leaves_with_path(params)
      assert sum(leaf.size for _, leaf in leaves) == expected[role], (name, role)
      for path, leaf in leaves:
        split = tuple(leaf.sharding.spec) + (None,) * (leaf.ndim - len(leaf.sharding.spec))
        assert split == SPLIT.get(path[-1].key, (None,) * leaf.ndim), (name, role, jax.tree_util.keystr(path))
        if path[-1].key not in SPLIT:
          assert leaf.size <= model.num_layers * model.d_model
      held[role] = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for _, leaf in leaves)
    assert config.rft.micro_batch_rows % mesh.shape['fsdp'] == 0
    # Float32 parameters and two moments of Adam; frozen copies in bfloat16; float32 gradients of the larger one.
    o, m = config.rft.rollout, config.model
    cache = 4 * o.max_concurrent * (o.max_prompt + o.max_new) * m.num_layers * m.num_kv_heads * m.head_dim / devices
    frozen = 2 * (held['actor'] + held['reward'])
    figures = [12 * held['actor'], 12 * held['critic'], frozen, 4 * held['actor'], cache]
    assert f'{o.max_concurrent} responses' in text
    stated = [float(gb) for gb in re.findall(r'([\d.]+) GB', text[text.index('Memory') :])]
    assert stated == pytest.approx([figure / 1e9 for figure in figures], abs=0.07), name
    # Kept layer inputs of a micro-batch, the only large activations with remat full.
    inputs = 2 * m.num_layers * config.rft.micro_batch_rows // mesh.shape['fsdp'] * config.rft.row_length * m.d_model
    assert sum(figures) + inputs < 0.75 * HBM, name


def test_an_axis_that_does_not_divide_is_detected():
  """The check above would fail on a mesh with more tensor devices than key/value heads."""
  config, _ = load('rft_internlm3_8b')
  mesh = AbstractMesh((1, 2, 4, 1), sharding.MESH_AXES, axis_types=(AxisType.Auto,) * 4)
  params = sharding.abstract_params(abstract_model(config.model, 'lm'), mesh)
  assert tuple(params['decoder']['layers']['wk'].sharding.spec) == (None, 'fsdp', None, None)


def test_docs_have_the_parameter_counts_of_the_configs():
  lines = (ROOT / 'docs' / 'rft.md').read_text().splitlines()
  for name, (_, actor, vocabulary, width) in CONFIGS.items():
    row = next(line for line in lines if line.startswith(f'| `{name}`'))
    assert f'{actor:,}' in row and f'{actor - vocabulary * width + width:,}' in row
