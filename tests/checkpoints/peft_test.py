"""Folders of PEFT: what they hold, what is read of foreign ones, and the library itself on the same weights."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from optional import peft as peft_library
from optional import torch, transformers

from polar_jax import sharding
from polar_jax.checkpoints import exporter, families, peft, run_folder
from polar_jax.checkpoints.checkpointer import save_params
from polar_jax.checkpoints.pretrained import open_pretrained
from polar_jax.config import Config, ConfigError, ConvertConfig, LoraConfig, MeshConfig, ModelConfig, TemplateConfig
from polar_jax.model import heads, lora
from polar_jax.stages import convert
from polar_jax.stages.context import Context
from polar_jax.types import UserError

MODEL = ModelConfig(
  family='llama', vocab_size=97, num_layers=2, d_model=24, d_ff=40, num_heads=6, num_kv_heads=2, head_dim=4, norm_eps=0.01, init_std=0.3
)
CASES = {
  'llama reward': ('reward', MODEL, LoraConfig(rank=3, alpha=6.0)),
  'qwen2 lm': ('lm', dataclasses.replace(MODEL, family='qwen2', qkv_bias=True), LoraConfig(rank=4, alpha=2.0, rank_stabilized=True)),
  'internlm2 reward': ('reward', dataclasses.replace(MODEL, family='internlm2'), LoraConfig(rank=2, alpha=3.0)),
  'internlm2 lm': (
    'lm',
    dataclasses.replace(MODEL, family='internlm2'),
    LoraConfig(rank=2, alpha=3.0, rank_stabilized=True, targets=('wq', 'wv', 'w_up')),
  ),
}
IDS = np.random.default_rng(7).integers(0, 96, (2, 12)).astype(np.int32)


@pytest.fixture(scope='module')
def mesh():
  return sharding.make_mesh(MeshConfig(), jax.devices()[:1])


def _random(model, head, config, seed=0):
  """Return (trained, frozen) random parameters."""
  shapes = nnx.to_pure_dict(nnx.state(heads.abstract_model(model, head, config), nnx.Param))
  rng = np.random.default_rng(seed)
  fill = lambda path, x: (rng.normal(0, 0.3, x.shape) + ('norm' in str(path[-1]))).astype(np.float32)
  return lora.split(jax.tree_util.tree_map_with_path(fill, shapes), config)


def _write_base(folder, model, head, frozen):
  """Write a base in the form of Hugging Face."""
  params = frozen if head == 'lm' else frozen | {'v_head': np.zeros(model.d_model, np.float32)}
  exporter.write_folder(folder, params, model, head)
  return folder


@pytest.fixture(params=CASES)
def case(request, tmp_path):
  """(head, model, config, trained, frozen, folder of PEFT)."""
  head, model, config = CASES[request.param]
  trained, frozen = _random(model, head, config)
  base = _write_base(tmp_path / 'base', model, head, frozen)
  arrays = peft.tensors(trained, model, head, config, None)
  folder = tmp_path / 'adapter'
  peft.write(folder, arrays, model, head, config, base=str(base), base_digest=None, reward_token_id=None)
  return head, model, config, trained, frozen, folder


def _outputs(params, model, head, config=LoraConfig()):
  """Return logits (2, 12, V), or rewards (2, 12)."""
  graphdef, _ = nnx.split(heads.abstract_model(model, head, config))
  positions = np.broadcast_to(np.arange(12, dtype=np.int32), (2, 12))
  return np.asarray(jax.jit(lambda p: nnx.merge(graphdef, p)(IDS, positions, [(0 * positions, positions + 1)]))(params))


def test_tensors_are_the_updates_of_the_linear_layers(case):
  """B A, scaled as PEFT scales it, is the difference of the stored weights with and without the adapters."""
  head, model, config, trained, frozen, folder = case
  data, found = json.loads((folder / 'adapter_config.json').read_text()), safetensors.numpy.load_file(folder / 'adapter_model.safetensors')
  params = lora.join(trained, frozen)
  before = frozen | {name: value for name, value in trained.items() if name == 'v_head'}
  stored = families.stored_tensors(model, head)
  old, new = (dict(exporter.stored_arrays(p, stored)) for p in (before, lora.merge(params, config)))
  modules = set()
  for name in old:
    a, b = (found.pop(f'base_model.model.{name.removesuffix("weight")}lora_{f}.weight', None) for f in 'AB')
    if a is None:
      np.testing.assert_array_equal(old[name], new[name], err_msg=name)
      continue
    module = name.split('.')[-2]
    modules.add(module)
    rank, alpha = data['rank_pattern'].get(module, data['r']), data['alpha_pattern'].get(module, data['lora_alpha'])
    assert a.shape == (rank, old[name].shape[1]) and b.shape == (old[name].shape[0], rank)
    scale = alpha / (rank**0.5 if data['use_rslora'] else rank)
    np.testing.assert_allclose(new[name] - old[name], scale * b.astype(np.float64) @ a, atol=1e-5, err_msg=name)
  assert modules == set(data['target_modules'])
  head_name = {'internlm2': 'v_head', 'llama': 'score'}.get(model.family)
  assert list(found) == ([] if head == 'lm' else [f'base_model.model.{head_name}.weight'])
  assert data['modules_to_save'] == (None if head == 'lm' else [head_name])


@pytest.mark.long
def test_a_folder_opens_as_the_merged_model(case, mesh):
  head, model, config, trained, frozen, folder = case
  opened = open_pretrained(folder)
  assert (opened.kind, opened.head, opened.model.d_ff) == ('peft', head, 40)
  assert model.family == 'internlm2' or opened.lora == config
  expected = _outputs(lora.join(trained, frozen), model, head, config)
  assert np.abs(expected).max() > 0.5
  np.testing.assert_allclose(_outputs(opened.params(mesh), opened.model, head), expected, atol=2e-5)
  if model.family != 'internlm2':
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(opened.trained(mesh)), trained)


def test_ranks_and_scales_of_single_modules(tmp_path, mesh):
  """A foreign folder: in half precision, another rank and alpha for some modules, none in the first layer, and no head."""
  _, frozen = _random(MODEL, 'reward', LoraConfig(rank=1))
  base, folder, rng = _write_base(tmp_path / 'base', MODEL, 'reward', frozen), tmp_path / 'adapter', np.random.default_rng(3)
  folder.mkdir()
  (folder / 'adapter_config.json').write_text(
    json.dumps({
      'peft_type': 'LORA', 'base_model_name_or_path': str(base), 'r': 2, 'lora_alpha': 8, 'task_type': 'SEQ_CLS',
      'rank_pattern': {'down_proj': 5}, 'alpha_pattern': {r'layers\.1\.mlp\.down_proj': 3}, 'target_modules': ['q_proj', 'down_proj'],
    })
  )  # fmt: skip
  prefix, shapes = 'base_model.model.model.layers.1', {'self_attn.q_proj': (24, 2, 24), 'mlp.down_proj': (40, 5, 24)}
  found = {}
  for name, (n_in, rank, n_out) in shapes.items():
    found[f'{prefix}.{name}.lora_A.weight'] = rng.normal(size=(rank, n_in)).astype(np.float16)
    found[f'{prefix}.{name}.lora_B.weight'] = rng.normal(size=(n_out, rank)).astype(np.float16)
  safetensors.numpy.save_file(found, folder / 'adapter_model.safetensors')
  opened = open_pretrained(folder)
  assert (opened.lora.rank, opened.lora.targets) == (5, ('wq', 'w_down'))
  params = jax.device_get(opened.params(mesh))
  product = lambda name: (
    found[f'{prefix}.{name}.lora_B.weight'].astype(np.float64) @ found[f'{prefix}.{name}.lora_A.weight'].astype(np.float64)
  )
  layers, old = params['decoder']['layers'], frozen['decoder']['layers']
  for target, update in (('wq', 4.0 * product('self_attn.q_proj')), ('w_down', 3 / 5 * product('mlp.down_proj'))):
    changed = (layers[target] - old[target]).reshape(2, update.shape[1], -1)
    np.testing.assert_allclose(changed[1], update.T, atol=1e-4)
    assert not changed[0].any()
  np.testing.assert_array_equal(params['v_head'], np.zeros(24))


def _edit_config(folder, **changes):
  file = folder / 'adapter_config.json'
  data = json.loads(file.read_text()) | changes
  file.write_text(json.dumps({k: v for k, v in data.items() if v != 'absent'}))


def _edit_tensors(folder, change):
  file = folder / 'adapter_model.safetensors'
  arrays = safetensors.numpy.load_file(file)
  change(arrays)
  safetensors.numpy.save_file(arrays, file)


Q = 'base_model.model.model.layers.0.self_attn.q_proj'
MISTAKES = {
  'kind': (lambda f: _edit_config(f, peft_type='IA3'), r"adapter_config\.json: peft_type is 'IA3'; only LORA can be read"),
  'dora': (lambda f: _edit_config(f, use_dora=True), r'adapter_config\.json: use_dora is True, which is not supported'),
  'alpha': (lambda f: _edit_config(f, lora_alpha='absent'), r'lora_alpha is None; it must be a positive number'),
  'pattern': (lambda f: _edit_config(f, alpha_pattern={'(': 1}), r'alpha_pattern must map names of modules to positive numbers'),
  'no base': (
    lambda f: _edit_config(f, base_model_name_or_path=None),
    r'base_model_name_or_path is None; set it to the folder of the base',
  ),
  'base elsewhere': (
    lambda f: _edit_config(f, base_model_name_or_path='meta/llama'),
    r'adapter: holds adapters, and there is no base at meta/llama: put it back there',
  ),
  'no file': (lambda f: (f / 'adapter_model.safetensors').unlink(), r'adapter: has no adapter_model\.safetensors'),
  'unknown module': (
    lambda f: _edit_tensors(f, lambda t: t.update({f'{Q[:-6]}qkv.lora_A.weight': t[f'{Q}.lora_A.weight']})),
    r"self_attn\.qkv\.lora_A\.weight' does not belong to adapters of the base; its layers have: down_proj, gate_proj, k_proj",
  ),
  'half': (
    lambda f: _edit_tensors(f, lambda t: t.pop(f'{Q}.lora_B.weight')),
    r"lora_A and lora_B of 'model\.layers\.0\.self_attn\.q_proj' are \(3, 24\) and missing; its base implies \(r, 24\) and \(24, r\)",
  ),
  'another shape': (
    lambda f: _edit_tensors(f, lambda t: t.update({f'{Q}.lora_A.weight': np.zeros((3, 25), np.float32)})),
    r'are \(3, 25\) and \(24, 3\); its base implies \(r, 24\) and \(24, r\)',
  ),
  'head': (
    lambda f: _edit_tensors(f, lambda t: t.update({'base_model.model.score.weight': np.zeros((2, 24), np.float32)})),
    r"score\.weight' has shape \(2, 24\), but its base implies \(1, 24\)",
  ),
}


@pytest.mark.parametrize('mistake', MISTAKES)
@pytest.mark.parametrize('case', ['llama reward'], indirect=True)
def test_mistakes_are_named(case, mistake):
  damage, message = MISTAKES[mistake]
  damage(case[-1])
  with pytest.raises(UserError, match=message) as error:
    open_pretrained(case[-1])
  assert '\n' not in str(error.value)


def _convert(mesh, source, output, log=None, **options):
  config = Config(checkpoint=str(source), output=str(output), convert=ConvertConfig(**options))
  convert.convert(Context(config, output.parent, mesh, (lambda line: None) if log is None else log.append))
  return output


@pytest.mark.long
@pytest.mark.parametrize('case', ['llama reward', 'internlm2 reward'], indirect=True)
def test_convert_writes_an_adapter_and_merges_it(case, mesh, tmp_path):
  """Run -> folder of PEFT -> whole weights. The folder of PEFT knows its base by more than its path."""
  head, model, config, trained, frozen, _ = case
  base, run, log = tmp_path / 'base', tmp_path / 'run', []
  opened = open_pretrained(base)
  digest = opened.digest(jax.tree.map(lambda x: jax.device_put(x, mesh.devices.flat[0]), frozen))
  settings = run_folder.model_settings(head, model, TemplateConfig(), None)
  settings |= {f'lora.{name}': value for name, value in dataclasses.asdict(config).items()}
  save_params(run, jax.tree.map(jnp.asarray, trained), settings | {'base.path': str(base), 'base.digest': digest})
  folder = _convert(mesh, run, tmp_path / 'peft', log, adapter=True)
  assert any('tensors read back bit-identical' in line for line in log)
  assert {file.name for file in folder.iterdir()} == {'adapter_config.json', 'adapter_model.safetensors', 'certificate.json'}
  expected = _outputs(lora.join(trained, frozen), model, head, config)
  merged = _convert(mesh, folder, tmp_path / 'merged', dtype='float32')
  assert open_pretrained(merged).kind == 'hugging_face'
  for path in (run, folder, merged):
    np.testing.assert_allclose(_outputs(open_pretrained(path).params(mesh), model, head), expected, atol=2e-5)
  with pytest.raises(ConfigError, match=r'convert\.adapter is set, but .*merged holds no adapters'):
    _convert(mesh, merged, tmp_path / 'again', adapter=True)
  other = dict(frozen, decoder=dict(frozen['decoder'], norm=frozen['decoder']['norm'] + 1e-3))
  for file in base.iterdir():
    file.unlink()
  _write_base(base, model, head, other)
  with pytest.raises(ConfigError, match='peft: its adapters were trained on other parameters than those in'):
    open_pretrained(folder).params(mesh)


def _torch_base(model, head, folder):
  auto = transformers.AutoModelForCausalLM if head == 'lm' else transformers.AutoModelForSequenceClassification
  return auto.from_pretrained(folder, dtype=torch.float32, pad_token_id=96).eval()


def _theirs(model, head):
  """Return logits (2, 12, V), or the rewards (2,) of whole sequences."""
  with torch.no_grad():
    out = model(torch.from_numpy(IDS.astype(np.int64))).logits.numpy()
  return out if head == 'lm' else out[:, 0]


@pytest.mark.needs('peft', 'torch', 'transformers')
@pytest.mark.usefixtures('torch_on_one_thread')
@pytest.mark.parametrize('case', ['llama reward', 'qwen2 lm'], indirect=True)
def test_the_library_reads_our_folder(case):
  head, model, config, trained, frozen, folder = case
  theirs = peft_library.PeftModel.from_pretrained(_torch_base(model, head, folder.parent / 'base'), folder).eval()
  ours = _outputs(lora.join(trained, frozen), model, head, config)
  np.testing.assert_allclose(ours if head == 'lm' else ours[:, -1], _theirs(theirs, head), atol=1e-4)


@pytest.mark.needs('peft', 'torch', 'transformers')
@pytest.mark.usefixtures('torch_on_one_thread')
def test_the_library_reads_a_fused_layer(remote_code, tmp_path):
  """In InternLM2 the adapters of queries, keys and values become one."""
  head, model, config = CASES['internlm2 reward']
  trained, frozen = _random(model, head, config)
  base, folder = _write_base(tmp_path / 'base', model, head, frozen), tmp_path / 'adapter'
  arrays = peft.tensors(trained, model, head, config, None)
  peft.write(folder, arrays, model, head, config, base=str(base), base_digest=None, reward_token_id=None)
  settings = remote_code.InternLM2Config(**json.loads((base / 'config.json').read_text()))
  torch_model = remote_code.InternLM2ForRewardModel(settings).eval()
  stored = safetensors.numpy.load_file(base / 'model.safetensors')
  torch_model.load_state_dict({name: torch.from_numpy(array) for name, array in stored.items()})
  theirs = peft_library.PeftModel.from_pretrained(torch_model, folder).eval()
  with torch.no_grad():
    rewards = theirs(torch.from_numpy(IDS.astype(np.int64)), attention_mask=torch.ones(2, 12, dtype=torch.int64)).logits.numpy()
  np.testing.assert_allclose(_outputs(lora.join(trained, frozen), model, head, config)[:, -1], rewards.reshape(2, -1)[:, -1], atol=1e-4)


@pytest.mark.needs('peft', 'torch', 'transformers')
@pytest.mark.usefixtures('torch_on_one_thread')
@pytest.mark.parametrize('head', ['reward', 'lm'])
def test_we_read_the_folder_of_the_library(head, mesh, tmp_path):
  _, frozen = _random(MODEL, head, LoraConfig(rank=1))
  base = _write_base(tmp_path / 'base', MODEL, head, frozen)
  settings = peft_library.LoraConfig(
    r=4,
    lora_alpha=6,
    use_rslora=True,
    target_modules=['q_proj', 'v_proj', 'o_proj', 'up_proj'],
    rank_pattern={'v_proj': 2},
    alpha_pattern={'up_proj': 1},
    init_lora_weights=False,
    task_type={'lm': 'CAUSAL_LM', 'reward': 'SEQ_CLS'}[head],
  )
  torch.manual_seed(0)
  model = peft_library.get_peft_model(_torch_base(MODEL, head, base), settings).eval()
  if head == 'reward':
    torch.nn.init.normal_(model.base_model.model.score.modules_to_save['default'].weight)
  model.save_pretrained(tmp_path / 'adapter')
  opened = open_pretrained(tmp_path / 'adapter')
  assert (opened.head, opened.lora.rank, opened.lora.targets) == (head, 4, ('wq', 'wv', 'wo', 'w_up'))
  ours = _outputs(opened.params(mesh), opened.model, head)
  np.testing.assert_allclose(ours if head == 'lm' else ours[:, -1], _theirs(model, head), atol=1e-4)
