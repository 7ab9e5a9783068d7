"""Random models, and a slow mapping of their parameters to Hugging Face tensors that shares no code with the package."""

from __future__ import annotations

import importlib
import json
import os
import pathlib
import sys
import types

os.environ.setdefault('HF_HUB_OFFLINE', '1')  # no test may access the network
os.environ.setdefault('TRANSFORMERS_VERBOSITY', 'error')

import jax
import numpy as np
import optional
import pytest
from convert_folders import BOMB, CASES, HEADS, Case, Folder, config_of, write_weights
from flax import nnx

from polar_jax.checkpoints import tokenizer_files
from polar_jax.config import ModelConfig
from polar_jax.data.tokenizer import ByteTokenizer

REMOTE_CODE = pathlib.Path(__file__).parents[2] / 'polar_jax/checkpoints/remote_code'


@pytest.fixture(scope='session')
def torch_on_one_thread():
  """Keep torch to one thread: its threads wait for one another, which takes long when the cores are busy."""
  if not optional.is_installed('torch'):  # files with this fixture have tests that do not need torch
    yield
    return
  import torch

  before = torch.get_num_threads()
  torch.set_num_threads(1)
  yield
  torch.set_num_threads(before)


@pytest.fixture(scope='session')
def remote_code():
  """Import `modeling_internlm2` as the package that transformers creates from an exported folder."""
  package = types.ModuleType('exported_internlm2')
  package.__path__ = [str(REMOTE_CODE)]
  sys.modules[package.__name__] = package
  yield importlib.import_module('exported_internlm2.modeling_internlm2')
  for name in [n for n in sys.modules if n.split('.')[0] == package.__name__]:
    del sys.modules[name]


def _random_params(model: type[nnx.Module], config: ModelConfig, seed: int = 0) -> dict:
  """Return parameters that give logits of order one and non-uniform attention, and make every norm and bias matter."""
  rng = np.random.default_rng(seed)
  fan_in = {'wo': config.num_heads * config.head_dim, 'w_down': config.d_ff}
  fan_in['embedding'] = config.d_model if config.tie_embeddings or config.embedding_scale else 1

  def fill(path, p):
    name = path[-1].key
    if 'norm' in name:
      return rng.uniform(0.5, 1.5, p.shape).astype(np.float32) - config.zero_centered_norms
    if name in ('bq', 'bk', 'bv'):
      return rng.normal(0, 0.7, p.shape).astype(np.float32)
    gain = 1.5 if name in ('wq', 'wk') else 1.0
    return rng.normal(0, gain * fan_in.get(name, config.d_model) ** -0.5, p.shape).astype(np.float32)

  shapes = nnx.to_pure_dict(nnx.state(nnx.eval_shape(lambda: model(config, rngs=nnx.Rngs(0))), nnx.Param))
  return jax.tree_util.tree_map_with_path(fill, shapes)


@pytest.fixture(scope='session')
def random_params():
  return _random_params


def _heads_as_rows(weight_DNH: np.ndarray) -> dict[int, np.ndarray]:
  """Return {head: matrix (H, D)} of a stored projection."""
  _, heads, dim = weight_DNH.shape
  return {n: np.stack([weight_DNH[:, n, h] for h in range(dim)]) for n in range(heads)}


def _as_stored(config: ModelConfig, params: dict) -> dict[str, np.ndarray]:
  """Return tensors by Hugging Face name, built one matrix row at a time (section 4.1 of the paper's code, and transformers' Llama)."""
  fused = config.family == 'internlm2'
  p, layers, out = params['decoder'], params['decoder']['layers'], {}
  out['model.tok_embeddings.weight' if fused else 'model.embed_tokens.weight'] = p['embedding']
  out['model.norm.weight'] = p['norm']
  if 'lm_head' in params:
    out['output.weight' if fused else 'lm_head.weight'] = params['lm_head']
  if 'v_head' in params:
    out['v_head.weight' if fused else 'score.weight'] = params['v_head'][None]
  for i in range(config.num_layers):
    at = f'model.layers.{i}.'
    q, k, v = (_heads_as_rows(layers[name][i]) for name in ('wq', 'wk', 'wv'))
    if fused:
      rows, group = [], config.num_heads // config.num_kv_heads
      for g in range(config.num_kv_heads):
        rows += [q[g * group + j] for j in range(group)] + [k[g], v[g]]
      out[at + 'attention.wqkv.weight'] = np.concatenate(rows)
    else:
      for name, heads in (('q', q), ('k', k), ('v', v)):
        out[f'{at}self_attn.{name}_proj.weight'] = np.concatenate([heads[n] for n in range(len(heads))])
        if config.qkv_bias:
          out[f'{at}self_attn.{name}_proj.bias'] = np.concatenate(list(layers[f'b{name}'][i]))
    for name in ('q_norm', 'k_norm') if config.qk_norm else ():
      out[f'{at}self_attn.{name}.weight'] = layers[name][i]
    columns = [layers['wo'][i][n, h] for n in range(config.num_heads) for h in range(config.head_dim)]
    out[at + ('attention.wo.weight' if fused else 'self_attn.o_proj.weight')] = np.stack(columns, axis=1)
    names = ('feed_forward.w1', 'feed_forward.w3', 'feed_forward.w2') if fused else ('mlp.gate_proj', 'mlp.up_proj', 'mlp.down_proj')
    for name, ours in zip(names, ('w_gate', 'w_up', 'w_down'), strict=True):
      out[f'{at}{name}.weight'] = np.stack(list(layers[ours][i].T))
    norms = {'attention_norm': 'attention_norm', 'ffn_norm': 'mlp_norm'}
    if config.post_norms:
      norms = {'input_layernorm': 'attention_norm', 'post_attention_layernorm': 'post_attention_norm'}
      norms |= {'pre_feedforward_layernorm': 'mlp_norm', 'post_feedforward_layernorm': 'post_mlp_norm'}
    elif not fused:
      norms = {'input_layernorm': 'attention_norm', 'post_attention_layernorm': 'mlp_norm'}
    for name, ours in norms.items():
      out[f'{at}{name}.weight'] = layers[ours][i]
  return {name: np.ascontiguousarray(array) for name, array in out.items()}


@pytest.fixture(scope='session')
def as_stored():
  return _as_stored


@pytest.fixture(scope='session')
def make_folder(random_params, as_stored, tmp_path_factory):
  """Return a function that writes a Hugging Face folder as its publisher would."""

  def make(case: Case, path: pathlib.Path | None = None) -> Folder:
    path = path or tmp_path_factory.mktemp(case.family)
    path.mkdir(exist_ok=True)
    model, config = config_of(case)
    head = next(suffix for suffix in HEADS if case.architecture.endswith(suffix))
    params = random_params(HEADS[head][1], model)
    tensors = as_stored(model, params)
    if head == 'ForTokenClassification':
      tensors['score.bias'] = np.zeros(1, np.float32)

    def dtype_of(name: str) -> np.dtype:
      if name.startswith(('v_head', 'score', 'output.', 'lm_head')):
        return case.head_dtype or case.dtype
      return (case.norm_dtype if 'norm' in name else None) or case.dtype

    tensors = {name: a.astype(dtype_of(name)) for name, a in tensors.items()}
    twice = {'lm_head.weight': tensors['model.embed_tokens.weight'].copy()} if case.head_twice else {}
    write_weights(path, case.layout, tensors | twice)
    (path / 'config.json').write_text(json.dumps(config, ensure_ascii=False))
    (path / 'modeling_own.py').write_text(BOMB)
    tokenizer_files.write_for_transformers(ByteTokenizer(), path, 'llama')
    (path / 'generation_config.json').write_text('{"eos_token_id": [258],  "top_p": 0.9}')
    (path / 'chat_template.jinja').write_text('{{ messages[0].content }}\n')
    return Folder(path, config, tensors, params)

  return make


@pytest.fixture(scope='module')
def compile_once(tmp_path_factory):
  names = ('jax_compilation_cache_dir', 'jax_persistent_cache_min_compile_time_secs')
  old = [getattr(jax.config, name) for name in names]
  for name, value in zip(names, (str(tmp_path_factory.mktemp('compiled')), 0), strict=True):
    jax.config.update(name, value)
  yield
  for name, value in zip(names, old, strict=True):
    jax.config.update(name, value)


@pytest.fixture
def small(make_folder, tmp_path) -> Folder:
  """A Hugging Face folder of a small reward model."""
  return make_folder(CASES['llama_reward'], tmp_path / 'source')
