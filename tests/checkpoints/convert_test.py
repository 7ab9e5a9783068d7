"""Folders of Hugging Face become ours and come back: every byte of every tensor, the small files, and models that transformers loads."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import re
import struct
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from flax import nnx
from optional import torch

from polar_jax import runner, sharding
from polar_jax.checkpoints import checkpointer as checkpoint
from polar_jax.checkpoints import config_json, exporter, pretrained, tokenizer_files
from polar_jax.checkpoints.formats import storage
from polar_jax.config import Config, ConfigError, ConvertConfig, MeshConfig, ModelConfig
from polar_jax.data.tokenizer import ByteTokenizer
from polar_jax.model import heads
from polar_jax.model.language_model import LanguageModel
from polar_jax.model.reward_model import RewardModel
from polar_jax.model.value_model import ValueModel
from polar_jax.stages import convert
from polar_jax.stages.context import Context
from polar_jax.types import UserError

pytestmark = pytest.mark.usefixtures('torch_on_one_thread')

F32, F16, BF16 = np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
# Of these dimensions a mesh axis of 8 divides only d_ff, one of 4 also d_model; heads and the vocabulary stay whole.
MODEL = ModelConfig(
  vocab_size=263, num_layers=2, d_model=36, d_ff=40, num_heads=6, num_kv_heads=3, head_dim=6, rope_theta=500.0, norm_eps=0.01
)
HEADS = {
  'ForCausalLM': ('lm', LanguageModel),
  'ForRewardModel': ('reward', RewardModel),
  'ForSequenceClassification': ('reward', RewardModel),
  'ForTokenClassification': ('value', ValueModel),
}
MESHES = {'one': (1, 1, 1, 1), 'fsdp8': (1, 8, 1, 1), 'fsdp2_tensor4': (1, 2, 4, 1), 'data2_fsdp4': (2, 4, 1, 1)}
BOMB = 'import pathlib\npathlib.Path(__file__).with_name("ran").touch()\nraise SystemExit("run")\n'


class Case(NamedTuple):
  architecture: str
  layout: str = 'one'  # file(s)
  dtype: Any = F32
  head_dtype: Any = None  # of the head, and `norm_dtype` of norms: `dtype` where it is None
  norm_dtype: Any = None
  mesh: str = 'one'
  family: str = 'llama'
  tied: bool = False
  head_twice: bool = False  # a tied output projection that is stored once more


CASES = {
  'internlm2_reward': Case('InternLM2ForRewardModel', 'index', BF16, head_dtype=F32, family='internlm2'),
  'internlm2_lm': Case('InternLM2ForCausalLM', 'one', F16, mesh='fsdp8', family='internlm2'),
  'internlm3_lm': Case('LlamaForCausalLM', 'index', BF16, norm_dtype=F32, mesh='data2_fsdp4', family='internlm3'),
  'llama_reward': Case('LlamaForSequenceClassification', 'legacy_bin', F32, mesh='fsdp2_tensor4'),
  'llama_value': Case('LlamaForTokenClassification', 'one', BF16, head_dtype=F32),
  'qwen2_tied': Case('Qwen2ForCausalLM', 'bin_index', BF16, family='qwen2', tied=True, head_twice=True),
  'qwen2_reward': Case('Qwen2ForSequenceClassification', 'one', F32, family='qwen2'),
}


@pytest.fixture(scope='module', autouse=True)
def compile_once(tmp_path_factory):
  names = ('jax_compilation_cache_dir', 'jax_persistent_cache_min_compile_time_secs')
  old = [getattr(jax.config, name) for name in names]
  for name, value in zip(names, (str(tmp_path_factory.mktemp('compiled')), 0), strict=True):
    jax.config.update(name, value)
  yield
  for name, value in zip(names, old, strict=True):
    jax.config.update(name, value)


class Folder(NamedTuple):
  path: pathlib.Path
  config: dict[str, Any]
  tensors: dict[str, np.ndarray]  # as they are stored, without what is stored twice
  params: dict[str, Any]  # ours in float32, before they were rounded


def config_of(case: Case) -> tuple[ModelConfig, dict[str, Any]]:
  """Our model, and a config.json with keys that we do not know."""
  m = dataclasses.replace(MODEL, family=case.family, tie_embeddings=case.tied, qkv_bias=case.family == 'qwen2')
  config = {
    'architectures': [case.architecture],
    'model_type': case.family,
    'vocab_size': m.vocab_size,
    'hidden_size': m.d_model,
    'intermediate_size': m.d_ff,
    'num_hidden_layers': m.num_layers,
    'num_attention_heads': m.num_heads,
    'num_key_value_heads': m.num_kv_heads,
    'max_position_embeddings': m.max_position,
    'rms_norm_eps': m.norm_eps,
    'rope_theta': m.rope_theta,
    'tie_word_embeddings': m.tie_embeddings,
    'hidden_act': 'silu',
    'torch_dtype': case.dtype.name,
    'pad_token_id': 256,
    'bos_token_id': 257,
    'eos_token_id': 258,
    '_name_or_path': 'someone/something',
    'of_another_program': {'nested': [1, None, 'é']},
  }
  if 'Classification' in case.architecture:
    config |= {'id2label': {'0': 'LABEL_0'}, 'label2id': {'LABEL_0': 0}}
  if case.architecture.endswith('RewardModel'):
    config['reward_token_id'] = 260
  return m, config


def write_torch(file: pathlib.Path, tensors: dict[str, np.ndarray], legacy: bool = False) -> None:
  as_torch = lambda a: torch.from_numpy(a.view(np.int16)).view(torch.bfloat16) if a.dtype == BF16 else torch.from_numpy(a)
  torch.save({name: as_torch(a) for name, a in tensors.items()}, file, _use_new_zipfile_serialization=not legacy)


def write_weights(folder: pathlib.Path, layout: str, tensors: dict[str, np.ndarray]) -> None:
  if 'bin' in layout:
    stem, suffix, write = 'pytorch_model', 'bin', lambda file, some: write_torch(file, some, 'legacy' in layout)
  else:
    stem, suffix = 'model', 'safetensors'
    write = lambda file, some: safetensors.numpy.save_file(some, file, metadata={'format': 'pt'})
  if 'index' not in layout:
    write(folder / f'{stem}.{suffix}', tensors)
    return
  files: dict[str, dict[str, np.ndarray]] = {f'{stem}-{i + 1:05}-of-00003.{suffix}': {} for i in range(3)}
  for i, (name, array) in enumerate(tensors.items()):
    files[list(files)[i % 3]][name] = array
  for file, some in files.items():
    write(folder / file, some)
  index = {'weight_map': {name: file for file, some in files.items() for name in some}}
  (folder / f'{stem}.{suffix}.index.json').write_text(json.dumps(index))


@pytest.fixture(scope='session')
def make_folder(random_params, as_stored, tmp_path_factory):
  """A Hugging Face folder as its makers would write it."""

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


def context_of(checkpoint_path, output, mesh: str = 'one', log: list[str] | None = None, **settings) -> Context:
  config = Config(stage='convert', checkpoint=str(checkpoint_path), output=str(output), convert=ConvertConfig(**settings))
  sizes = MESHES[mesh]
  made = sharding.make_mesh(MeshConfig(*sizes), jax.devices()[: int(np.prod(sizes))])
  return Context(config, pathlib.Path('unused'), made, (lambda line: None) if log is None else log.append)


def stored_in(folder: pathlib.Path) -> dict[str, np.ndarray]:
  """The tensors of a folder's safetensors files, by the library's own reader."""
  found = {}
  for file in sorted(folder.glob('*.safetensors')):
    found |= safetensors.numpy.load_file(file)
  return found


def facts(folder: pathlib.Path) -> dict[str, Any]:
  return json.loads((folder / 'certificate.json').read_text())


class Converted(NamedTuple):
  case: Case
  source: Folder
  ours: pathlib.Path
  exported: pathlib.Path
  log: list[str]
  results: dict[str, Any]


def case_param(name: str):
  return pytest.param(name, marks=pytest.mark.needs('torch')) if 'bin' in CASES[name].layout else name


@pytest.fixture(scope='module', params=[case_param(name) for name in CASES])
def converted(request, make_folder, tmp_path_factory) -> Converted:
  """A folder read into ours and written again."""
  case, root, log = CASES[request.param], tmp_path_factory.mktemp('converted'), []
  source = make_folder(case)
  convert.convert(context_of(source.path, root / 'ours', case.mesh, log))
  results = convert.convert(context_of(root / 'ours', root / 'exported', case.mesh, log, shard_gib=20_000 / 2**30))
  return Converted(case, source, root / 'ours', root / 'exported', log, results)


def test_every_tensor_comes_back_to_the_byte(converted):
  found = stored_in(converted.exported)
  assert found.keys() == converted.source.tensors.keys()
  for name, array in converted.source.tensors.items():
    assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
    assert found[name].tobytes() == array.tobytes(), name
  index = json.loads((converted.exported / 'model.safetensors.index.json').read_text())
  assert index['weight_map'].keys() == found.keys() and len(set(index['weight_map'].values())) > 1


def test_parameters_lie_as_the_mesh_wants_them(converted):
  case, opened = converted.case, pretrained.open_pretrained(converted.source.path)
  mesh = context_of('', '', case.mesh).mesh
  abstract = sharding.abstract_params(heads.abstract_model(opened.model, opened.head), mesh)
  read, again = opened.params(mesh), pretrained.open_pretrained(converted.ours).params(mesh)
  dtypes = set()
  for a, x, y in zip(*map(jax.tree.leaves, (abstract, read, again)), strict=True):
    assert x.sharding == y.sharding == a.sharding and x.shape == a.shape and x.dtype == y.dtype
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
    dtypes.add(x.dtype)
  assert dtypes == {d for d in (case.dtype, case.head_dtype, case.norm_dtype) if d is not None}
  if case.mesh == 'data2_fsdp4':
    assert any(len({str(s.index) for s in leaf.addressable_shards}) == 4 for leaf in jax.tree.leaves(read))


def test_small_files_come_back(converted):
  source, exported = converted.source.path, converted.exported
  for name in ('modeling_own.py', 'tokenizer.json', 'tokenizer_config.json', 'generation_config.json', 'chat_template.jinja'):
    assert (exported / name).read_bytes() == (source / name).read_bytes(), name
  assert not list(source.parent.rglob('ran')) + list(exported.parent.rglob('ran'))
  config = json.loads((exported / 'config.json').read_text('utf-8'))
  if converted.case.family == 'internlm2':  # whose code did not come along
    assert (exported / f'{config.pop("auto_map")["AutoConfig"].split(".")[0]}.py').is_file()
  if converted.case.architecture.endswith('ForSequenceClassification'):
    assert config.pop('reward_token_id') == 260  # the tokenizer's
  assert config == converted.source.config


def independent_scores(c: Converted, params: dict[str, Any]) -> np.ndarray:
  """The certificate's rows, one by one and without what follows their end, through the models themselves."""
  head, kind = next(HEADS[suffix] for suffix in HEADS if c.case.architecture.endswith(suffix))
  model, _ = config_of(c.case)
  rng = np.random.default_rng(0)
  tokens_BT, last_B = rng.integers(0, 263, (8, 32), np.int32), rng.integers(1, 32, 8, np.int32)
  graphdef, _ = nnx.split(nnx.eval_shape(lambda: kind(model, rngs=nnx.Rngs(0))))
  positions = np.arange(32, dtype=np.int32)[None]
  intervals = [(np.zeros_like(positions), positions + 1)]

  @jax.jit
  def apply(params, tokens_1T, last):
    merged = nnx.merge(graphdef, params)
    index = last[None, None] if kind is RewardModel else None
    return merged(tokens_1T, positions, intervals, index)

  scores = []
  for tokens_T, last in zip(tokens_BT, last_B, strict=True):
    tokens_T = np.where(np.arange(32) <= last, tokens_T, 0)
    out = np.asarray(apply(params, tokens_T[None], last), np.float64)
    if head == 'reward':
      scores.append(out[0, 0])
    elif head == 'value':
      scores.append(out[0, last])
    else:
      logp = out[0] - np.log(np.exp(out[0]).sum(-1, keepdims=True))
      scores.append(np.mean([logp[t, tokens_T[t + 1]] for t in range(last)]))
  return np.array(scores)


def test_the_certificate_states_what_can_be_counted_from_outside(converted):
  tensors = converted.source.tensors
  imported, exported = facts(converted.ours), facts(converted.exported)
  for said, folder, origin in ((imported, converted.ours, converted.source.path), (exported, converted.exported, converted.ours)):
    assert said['source'] == str(origin) and said['output'] == str(folder)
    assert said['parameters'] == sum(a.size for name, a in tensors.items() if name != 'score.bias')
    assert said['tensors'] == {name: [hashlib.sha256(a.tobytes()).hexdigest()] * 2 for name, a in tensors.items()}
    assert said['dtypes'] == sorted({a.dtype.name for a in tensors.values()})
    assert said['family'] == converted.case.family and said['exact'] is True and said['max_difference'] == 0
  assert converted.results['convert']['parameters'] == exported['parameters']
  if converted.case.family == 'qwen2':
    return  # the others have every head and mesh
  rounded = pretrained.open_pretrained(converted.source.path).params(context_of('', '').mesh, 'float32')
  expected = independent_scores(converted, rounded)
  assert np.ptp(expected) > 0.3
  for scores in (*imported['scores'], *exported['scores']):
    np.testing.assert_allclose(scores, expected, atol=2e-4)


def test_the_certificate_is_printed(converted):
  text = '\n'.join(converted.log)
  for name, array in converted.source.tensors.items():
    assert len(re.findall(rf'^  {re.escape(name)} +{hashlib.sha256(array.tobytes()).hexdigest()[:16]}$', text, re.MULTILINE)) == 2
  assert text.count(f'{len(converted.source.tensors)} of {len(converted.source.tensors)} tensors read back bit-identical') == 2
  assert text.count('8 fixed rows scored before and after: max |difference| 0') == 2


# ---- another dtype ----


def as_torch_rounds(array: np.ndarray) -> np.ndarray:
  return torch.from_numpy(np.array(array, np.float32)).to(torch.bfloat16).view(torch.int16).numpy().view(BF16)


@pytest.mark.needs('torch')
def test_bfloat16_is_torchs_bfloat16_whichever_way_it_is_asked_for(make_folder, tmp_path):
  case, mesh = CASES['llama_reward'], 'fsdp2_tensor4'
  source = make_folder(case, tmp_path / 'source')
  ties = np.arange(2**16, dtype=np.uint32)[: 263 * 36] * np.uint32(0x10000) + np.uint32(0x8000)  # halfway, of every second rounding
  source.tensors['model.embed_tokens.weight'].reshape(-1)[:] = ties.view(np.float32)
  (source.path / 'pytorch_model.bin').unlink()
  write_weights(source.path, 'one', source.tensors)
  convert.convert(context_of(source.path, tmp_path / 'cast', mesh, dtype='bfloat16'))
  convert.convert(context_of(tmp_path / 'cast', tmp_path / 'cast_out', mesh))
  convert.convert(context_of(source.path, tmp_path / 'kept', mesh))
  convert.convert(context_of(tmp_path / 'kept', tmp_path / 'kept_out', mesh, dtype='bfloat16'))
  for out in (tmp_path / 'cast_out', tmp_path / 'kept_out'):
    found = stored_in(out)
    for name, array in source.tensors.items():
      assert found[name].tobytes() == as_torch_rounds(array).tobytes(), (out, name)
    assert json.loads((out / 'config.json').read_text())['torch_dtype'] == 'bfloat16'
  assert [facts(tmp_path / name)['exact'] for name in ('cast', 'cast_out', 'kept', 'kept_out')] == [False, True, True, False]
  for said in (facts(tmp_path / 'cast'), facts(tmp_path / 'kept_out')):
    assert 0 < said['max_difference'] < 0.2 and said['dtypes'] == ['bfloat16']


@pytest.mark.needs('torch')
@pytest.mark.parametrize(('dtype', 'large'), [('float16', 7e4), ('bfloat16', 3.4e38)])
def test_numbers_that_a_dtype_cannot_hold_are_refused(make_folder, tmp_path, dtype, large, recwarn):
  source = make_folder(CASES['llama_reward'], tmp_path / 'source')
  for name in ('model.layers.1.mlp.down_proj.weight', 'model.embed_tokens.weight'):
    tensors = {n: a.copy() for n, a in source.tensors.items()}
    tensors[name][3, 5] = -large
    (source.path / 'pytorch_model.bin').unlink(missing_ok=True)
    write_weights(source.path, 'one', tensors)
    message = rf'tensor {name!r} reaches {re.escape(f"{large:.2g}")}, which {dtype} cannot hold'
    refused(context_of(source.path, tmp_path / 'out', dtype=dtype), rf'model\.safetensors: {message}')
    convert.convert(context_of(source.path, tmp_path / name))
    refused(context_of(tmp_path / name, tmp_path / 'out', dtype=dtype), message)
  assert not [w for w in recwarn if 'overflow' in str(w.message)]


# ---- what is refused ----


def refused(context: Context, message: str, kind: type[Exception] = UserError) -> None:
  """One line, and nothing left behind."""
  output = pathlib.Path(context.config.output)
  before = sorted(output.parent.iterdir())
  with pytest.raises(kind, match=message) as error:
    convert.convert(context)
  assert '\n' not in str(error.value)
  assert sorted(output.parent.iterdir()) == before


def edit_config(**changes):
  def edit(source: Folder) -> None:
    (source.path / 'config.json').write_text(json.dumps(source.config | changes))

  return edit


def edit_tensors(change):
  """`change` gets the tensors, which are written anew."""

  def edit(source: Folder) -> None:
    tensors = {name: a.copy() for name, a in source.tensors.items()}
    change(tensors)
    (source.path / 'pytorch_model.bin').unlink(missing_ok=True)
    write_weights(source.path, 'one', tensors)

  return edit


def cut_short(source: Folder) -> None:
  edit_tensors(lambda tensors: None)(source)
  file = source.path / 'model.safetensors'
  file.write_bytes(file.read_bytes()[:-100])


def only(name: str, array: np.ndarray):
  return edit_tensors(lambda tensors: tensors.update({name: array}))


def with_value(name: str, value: float, row: int = -1):
  def change(tensors):
    tensors[name].reshape(-1)[row] = value

  return edit_tensors(change)


ODD = {
  'missing': (
    edit_tensors(lambda t: t.pop('model.layers.1.mlp.up_proj.weight')),
    r"source: tensor 'model.layers.1.mlp.up_proj.weight' is missing; is",
  ),
  'extra': (
    only('model.layers.2.mlp.up_proj.weight', np.zeros((40, 36), F32)),
    r"tensor 'model.layers.2.mlp.up_proj.weight' does not belong to the model",
  ),
  'a_bias': (
    only('model.layers.0.self_attn.q_proj.bias', np.zeros(36, F32)),
    r"tensor 'model.layers.0.self_attn.q_proj.bias' does not belong to the model",
  ),
  'a_head_more': (only('lm_head.weight', np.zeros((263, 36), F32)), r"tensor 'lm_head.weight' does not belong to the model"),
  'shape': (
    only('model.norm.weight', np.ones(35, F32)),
    r"safetensors: tensor 'model.norm.weight' has shape \(35,\), but its config implies \(36,\)",
  ),
  'cut_short': (cut_short, r'model\.safetensors: is damaged, truncated'),
  'nan': (
    with_value('model.layers.1.self_attn.k_proj.weight', np.nan),
    r"safetensors: tensor 'model.layers.1.self_attn.k_proj.weight' contains NaN or inf",
  ),
  'infinity': (with_value('model.embed_tokens.weight', np.inf), r"tensor 'model.embed_tokens.weight' contains NaN or infinity"),
  'nan_in_the_head': (with_value('score.weight', np.nan), r"tensor 'score.weight' contains NaN or infinity"),
  'mixed_layers': (
    edit_tensors(lambda t: t.update({n: a.astype(BF16) for n, a in t.items() if 'layers.1' in n})),
    r"tensor 'model.layers.1.*' is stored as bfloat16, but other layers as float32; set convert.dtype",
  ),
  'other_config': (edit_config(num_hidden_layers=3), r"tensor 'model.layers.2.self_attn.q_proj.weight' is missing \(and 8 more\)"),
  'other_family': (
    edit_config(model_type='internlm2', architectures=['InternLM2ForRewardModel'], id2label=None, label2id=None),
    r"'model.tok_embeddings.weight' is missing .* it has 'model.embed_tokens.weight'.*another family",
  ),
  'unknown_family': (
    edit_config(model_type='gpt2', architectures=['GPT2LMHeadModel']),
    r"config.json: model_type is 'gpt2'; supported: internlm2",
  ),
  'two_labels': (edit_config(id2label={'0': 'a', '1': 'b'}), r'config.json: id2label is .*one label'),
  'no_config': (
    lambda source: (source.path / 'config.json').unlink(),
    r'source: neither a run .* nor a Hugging Face folder \(config.json\); it contains: chat',
  ),
  'no_json': (lambda source: (source.path / 'config.json').write_text('{"a": '), r'config.json: not JSON'),
  'no_object': (lambda source: (source.path / 'config.json').write_text('[1]'), r'config.json: must contain a JSON object'),
  'not_utf8': (lambda source: (source.path / 'config.json').write_bytes(b'\xff{}'), r'config.json: not JSON'),
  'no_weights': (lambda source: (source.path / 'pytorch_model.bin').unlink(), r'source: contains no weights'),
}


@pytest.mark.needs('torch')
@pytest.mark.parametrize('odd', ODD)
def test_odd_folders_are_refused_and_nothing_is_left_behind(make_folder, tmp_path, odd):
  source = make_folder(CASES['llama_reward'], tmp_path / 'source')
  damage, message = ODD[odd]
  damage(source)
  refused(context_of(source.path, tmp_path / 'out'), message)


def test_a_tied_head_must_be_the_embedding(make_folder, tmp_path):
  source = make_folder(CASES['qwen2_tied']._replace(layout='one'), tmp_path / 'source')
  head = source.tensors['model.embed_tokens.weight'].copy()
  head[200, 35] *= 1.01
  write_weights(source.path, 'one', source.tensors | {'lm_head.weight': head})
  refused(context_of(source.path, tmp_path / 'out'), r"safetensors: tensor 'lm_head.weight' differs from the embedding")


def test_a_bias_of_the_head_must_be_zero(make_folder, tmp_path):
  source = make_folder(CASES['llama_value'], tmp_path / 'source')
  with_value('score.bias', 0.5)(source)
  refused(context_of(source.path, tmp_path / 'out'), r"safetensors: tensor 'score.bias' is \[0.5\]; our heads have no bias")
  edit_tensors(lambda t: t.pop('score.bias'))(source)
  convert.convert(context_of(source.path, tmp_path / 'out'))
  assert 'score.bias' not in facts(tmp_path / 'out')['tensors']
  convert.convert(context_of(tmp_path / 'out', tmp_path / 'exported'))
  assert stored_in(tmp_path / 'exported')['score.bias'].tolist() == [0.0]


@pytest.mark.needs('torch')
def test_paths_that_cannot_be_used(tmp_path, make_folder, capsys):
  source = make_folder(CASES['llama_reward'], tmp_path / 'source')
  (tmp_path / 'out').mkdir()
  (tmp_path / 'out/kept').touch()
  refused(context_of(source.path, tmp_path / 'out'), 'out exists; remove it or name another folder', ConfigError)
  assert (tmp_path / 'out/kept').exists()
  refused(context_of(tmp_path / 'absent', tmp_path / 'new'), 'absent: no such file or folder', ConfigError)
  refused(context_of(source.path / 'config.json', tmp_path / 'new'), 'config.json: a file must be a .gguf or a llama2.c .bin', ConfigError)
  with pytest.raises(ConfigError, match=r'--config.checkpoint .* --config.output'):
    convert.convert(Context(Config(), tmp_path, context_of('', '').mesh, print))
  capsys.readouterr()
  assert runner.run(context_of(tmp_path / 'absent', tmp_path / 'new').config, tmp_path / 'workdir') == 1
  assert capsys.readouterr().err == f'polar_jax: checkpoint {tmp_path / "absent"}: no such file or folder\n'


# ---- what goes wrong while writing ----


@pytest.fixture
def small(make_folder, tmp_path) -> Folder:
  return make_folder(CASES['llama_reward'], tmp_path / 'source')


@pytest.mark.needs('torch')
def test_nothing_stays_of_a_conversion_that_stops(small, tmp_path, monkeypatch):
  written = []

  def stop(self, name, array):
    written.append(name)
    if len(written) == 5:
      assert any((tmp_path / 'hf.partial').glob('*.safetensors'))
      raise OSError('no space left on device')
    return add(self, name, array)

  add = storage.SafetensorsWriter.add
  convert.convert(context_of(small.path, tmp_path / 'ours'))
  with monkeypatch.context() as patch:
    patch.setattr(storage.SafetensorsWriter, 'add', stop)
    refused(context_of(tmp_path / 'ours', tmp_path / 'hf'), 'no space left', OSError)
  assert len(written) == 5
  with monkeypatch.context() as patch:
    patch.setattr(tokenizer_files, 'copy_small_files', lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    refused(context_of(small.path, tmp_path / 'ours2'), '^$', KeyboardInterrupt)


@pytest.mark.needs('torch')
def test_what_a_killed_conversion_left_is_removed(small, tmp_path):
  for output in ('ours', 'hf'):
    stale = tmp_path / f'{output}.partial'
    (stale / 'checkpoints' / '0').mkdir(parents=True)
    (stale / 'model-00001-of-00009.safetensors').write_text('half')
    (stale / 'config.json').write_text('{')
    convert.convert(context_of(small.path if output == 'ours' else tmp_path / 'ours', tmp_path / output))
    assert not stale.exists()
  assert stored_in(tmp_path / 'hf').keys() == small.tensors.keys()
  assert not (tmp_path / 'ours/config.json').exists() and (tmp_path / 'ours/assets/config.json').exists()


def flip(params: dict[str, Any], *path: str) -> dict[str, Any]:
  """A copy in which one number of a parameter has another last bit."""
  copied = jax.tree.map(lambda x: x, params)
  *outer, last = path
  at = copied
  for key in outer:
    at = at[key]
  array = np.array(at[last])
  array.reshape(-1).view(np.uint8)[-4] ^= 1
  at[last] = jax.device_put(array, at[last].sharding)
  return copied


@pytest.mark.needs('torch')
@pytest.mark.parametrize('path', [('decoder', 'layers', 'w_up'), ('decoder', 'embedding'), ('v_head',)])
def test_a_bit_that_changes_on_the_way_into_ours_is_found(small, tmp_path, monkeypatch, path):
  save = checkpoint.save_params
  monkeypatch.setattr(checkpoint, 'save_params', lambda folder, params, settings: save(folder, flip(params, *path), settings))
  refused(
    context_of(small.path, tmp_path / 'out'), r"out: tensor '(model|score)\..*' reads back differently from .*source \(1 tensors differ\)"
  )


@pytest.mark.needs('torch')
def test_a_bit_that_changes_on_the_way_to_hugging_face_is_found(small, tmp_path, monkeypatch):
  convert.convert(context_of(small.path, tmp_path / 'ours'))
  write = exporter.write_weights

  def write_wrongly(params, stored, folder, dtype, max_bytes):
    write(params, stored, folder, dtype, max_bytes)
    file = folder / 'model.safetensors'
    data = bytearray(file.read_bytes())
    data[8 + struct.unpack('<Q', data[:8])[0]] ^= 1
    file.write_bytes(data)

  monkeypatch.setattr(exporter, 'write_weights', write_wrongly)
  refused(
    context_of(tmp_path / 'ours', tmp_path / 'out'),
    r"out: tensor 'model.embed_tokens.weight' reads back differently from .*ours \(1 tensors differ\)",
  )


@pytest.mark.needs('torch')
@pytest.mark.parametrize('setting', [{'rope_theta': 501.0}, {'norm_eps': 0.02}])
def test_a_setting_that_does_not_come_across_is_found(small, tmp_path, monkeypatch, setting):
  """Equal weights are not the same model."""
  to_json, saved = config_json.to_json, checkpoint.save_params
  with monkeypatch.context() as patch:
    changed = {f'model.{name}': value for name, value in setting.items()}
    patch.setattr(checkpoint, 'save_params', lambda folder, params, settings: saved(folder, params, settings | changed))
    refused(context_of(small.path, tmp_path / 'out'), r'out: scores differ by .* from those of .*source; output discarded')
  convert.convert(context_of(small.path, tmp_path / 'ours'))
  (tmp_path / 'ours/assets/config.json').unlink()  # which would be kept, were it there
  monkeypatch.setattr(config_json, 'to_json', lambda model, *args, **more: to_json(dataclasses.replace(model, **setting), *args, **more))
  refused(context_of(tmp_path / 'ours', tmp_path / 'out'), r'out: scores differ by .* from those of .*ours; output discarded')


@pytest.mark.needs('torch')
def test_a_folder_without_tokenizer_is_converted_and_says_so(small, tmp_path):
  for name in ('tokenizer.json', 'tokenizer_config.json'):
    (small.path / name).unlink()
  log: list[str] = []
  convert.convert(context_of(small.path, tmp_path / 'ours'))
  convert.convert(context_of(tmp_path / 'ours', tmp_path / 'hf', log=log))
  assert any(re.search('no tokenizer is exported: .* contains neither a tokenizer.json nor', line) for line in log)
  assert stored_in(tmp_path / 'hf').keys() == small.tensors.keys()


@pytest.mark.needs('torch')
def test_the_stage_writes_its_facts_to_the_report(small, tmp_path, capsys):
  config = context_of(small.path, tmp_path / 'ours').config
  assert runner.run(config, tmp_path / 'workdir') == 0
  assert f'convert: wrote {tmp_path / "ours"}' in capsys.readouterr().out
  results = json.loads((tmp_path / 'workdir/report.json').read_text())['convert']
  assert (results['tensors'], results['exact'], results['max_difference']) == (len(small.tensors), True, 0)
