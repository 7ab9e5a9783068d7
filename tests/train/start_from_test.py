"""Runs that start from Hugging Face checkpoints and converted ones, and the tokenizer files that a run keeps."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from polar_jax import api, sharding
from polar_jax.checkpoints import exporter, families, tokenizer_files
from polar_jax.checkpoints.pretrained import open_pretrained, start_params
from polar_jax.config import Config, ConfigError, ConvertConfig, ModelConfig, TemplateConfig, TokenizerConfig
from polar_jax.data.template import Template
from polar_jax.data.tokenizer import ByteTokenizer
from polar_jax.model.heads import abstract_model
from polar_jax.model.language_model import LanguageModel
from polar_jax.model.reward_model import RewardModel
from polar_jax.scoring.scorer import Scorer
from polar_jax.stages import convert, plan
from polar_jax.stages.context import Context
from polar_jax.stages.finetune import finetune

SHAPE = ModelConfig(num_layers=2, d_model=16, d_ff=32, num_heads=2, num_kv_heads=1, head_dim=8)  # that of make_context
MODEL = dataclasses.replace(SHAPE, vocab_size=261, v_head_init='normal')
KINDS = {'reward': RewardModel, 'lm': LanguageModel}


@pytest.fixture(scope='module')
def make_folder(tmp_path_factory):
  """Return a function that makes a Hugging Face folder in bfloat16 with a byte tokenizer, and its parameters in float32."""

  def make(head='reward', **changes):
    model, folder = dataclasses.replace(MODEL, **changes), tmp_path_factory.mktemp(head)
    make_params = lambda: nnx.to_pure_dict(nnx.state(KINDS[head](model, rngs=nnx.Rngs(params=1)), nnx.Param))
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), jax.jit(make_params)())
    exporter.write_weights(params, families.stored_tensors(model, head), folder, None, 10**9)
    exporter.write_config(folder, model, head, dtype='bfloat16', reward_token_id=None, special_ids={})
    tokenizer_files.write_for_transformers(ByteTokenizer(), folder, 'llama')
    return folder, jax.tree.map(lambda x: np.asarray(x, np.float32), params)

  return make


@pytest.fixture(scope='module')
def reward_folder(make_folder):
  return make_folder()


def at_rest(make_context, workdir, start, **changes):
  """A context whose run takes one step at a learning rate of zero, so that it saves the parameters that it started from."""
  return make_context(workdir, steps=1, warmup_ratio=1.0, evaluate_every=None, start_from=str(start), **changes)


def start_of(workdir, context):
  return jax.device_get(open_pretrained(workdir / 'finetune').params(context.mesh))


def assert_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)
  assert {x.dtype for x in jax.tree.leaves(a)} == {np.dtype(np.float32)}


@pytest.mark.long
@pytest.mark.parametrize('kind', ['hugging_face', pytest.param('converted', marks=pytest.mark.slow)])
def test_starts_from_all_parameters_of_a_reward_model(reward_folder, tmp_path, make_context, kind):
  folder, params = reward_folder
  context = make_context(tmp_path)
  if kind == 'converted':
    convert.convert(dataclasses.replace(context, config=Config(checkpoint=str(folder), output=str(tmp_path / 'ours'))))
    folder = tmp_path / 'ours'
  finetune(at_rest(make_context, tmp_path, folder))
  assert_equal(start_of(tmp_path, context), params)
  mesh = make_context(tmp_path, devices=8).mesh
  sharded, abstract = start_params(folder, MODEL, 'reward', mesh), sharding.abstract_params(abstract_model(MODEL, 'reward'), mesh)
  assert_equal(sharded, params)
  jax.tree.map(lambda x, a: x.sharding == a.sharding or pytest.fail(f'{x.sharding}, not {a.sharding}'), sharded, abstract)


@pytest.mark.long
def test_starts_from_the_decoder_of_a_language_model(make_folder, tmp_path, make_context):
  """The model is of another family with the same shapes, and has tied embeddings; neither affects a reward."""
  folder, params = make_folder('lm', family='llama', tie_embeddings=True, max_position=77)
  context = at_rest(make_context, tmp_path, folder, model=dataclasses.replace(SHAPE, v_head_init='normal'))
  finetune(context)
  start = start_of(tmp_path, context)
  assert_equal(start['decoder'], params['decoder'])
  assert 0.01 < start['v_head'].std() < 0.04  # a new head, of init_std


@pytest.mark.long
def test_starts_from_the_first_layers(make_folder, tmp_path, make_context):
  """In a run, whose shape comes from the checkpoint, and on a mesh, where each parameter keeps its sharding."""
  folder, params = make_folder('lm', num_layers=3)
  first = jax.tree.map(lambda a: a[:2], params['decoder']['layers'])
  expected = {**params['decoder'], 'layers': first}
  context = at_rest(make_context, tmp_path, folder, start_layers=2, model=ModelConfig(v_head_init='normal'))
  finetune(context)
  assert_equal(start_of(tmp_path, context)['decoder'], expected)
  mesh, two = make_context(tmp_path, devices=8).mesh, dataclasses.replace(MODEL, num_layers=2)
  sharded, abstract = start_params(folder, two, 'reward', mesh, layers=2), sharding.abstract_params(abstract_model(two, 'lm'), mesh)
  assert_equal(sharded['decoder'], expected)
  jax.tree.map(
    lambda x, a: x.sharding.is_equivalent_to(a.sharding, x.ndim) or pytest.fail(f'{x.sharding}, not {a.sharding}'),
    sharded['decoder'],
    abstract['decoder'],
  )
  with pytest.raises(ConfigError, match=r'has 3 layers; start_layers is 4, set it to at most that$'):
    finetune(at_rest(make_context, tmp_path / 'more', folder, start_layers=4))


def test_a_config_without_a_shape_has_that_of_the_checkpoint(make_folder, tmp_path, make_context):
  """For every stage that trains, and its plan; not for one that starts from scratch."""
  folder, _ = make_folder('lm', num_layers=3)
  context = at_rest(make_context, tmp_path, folder, start_layers=2, model=ModelConfig(compute_dtype='bfloat16'))
  found = context.model_config(ByteTokenizer(), context.config.pretrain_lm)
  assert found == dataclasses.replace(open_pretrained(folder).model, num_layers=2, compute_dtype='bfloat16')
  for step in ('pretrain_lm', 'pretrain', 'finetune'):
    config = dataclasses.replace(context.config, plan=dataclasses.replace(context.config.plan, step=step))
    assert plan._shape(dataclasses.replace(context, config=config)) == found
  own = dataclasses.replace(SHAPE, num_layers=5)
  for train, model in (({}, own), ({'start_from': 'scratch'}, ModelConfig()), ({'start_from': str(tmp_path / 'none')}, ModelConfig())):
    other = make_context(tmp_path, **{'start_from': str(folder), **train}, model=model)
    expected = dataclasses.replace(model, vocab_size=ByteTokenizer.vocab_size)
    assert other.model_config(ByteTokenizer(), other.config.pretrain) == expected


def test_first_layers_of_a_model_in_memory(make_folder, tmp_path, make_context):
  folder, params = make_folder('lm')
  opened, mesh = api.load(folder).as_pretrained(), make_context(tmp_path).mesh
  assert opened.first_layers(None) is opened
  one = opened.first_layers(1)
  assert one.model.num_layers == 1 and one.tokenizer() is opened.tokenizer() and one.assets == opened.assets
  assert one.has_tokenizer and one.template(TemplateConfig()) == opened.template(TemplateConfig())
  assert_equal(one.params(mesh, 'float32')['decoder']['layers'], jax.tree.map(lambda a: a[:1], params['decoder']['layers']))


def test_a_tied_reward_model_starts_an_untied_run(make_folder, tmp_path, make_context):
  folder, params = make_folder('reward', family='qwen2', qkv_bias=True, tie_embeddings=True)
  model = dataclasses.replace(MODEL, qkv_bias=True)
  assert_equal(start_params(folder, model, 'reward', make_context(tmp_path).mesh), params)


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'rope_theta': 500.0}, 'model.rope_theta is 500.0, the checkpoint has 10000.0'),
    ({'rope_scaling': 'linear', 'rope_factor': 2.0}, "model.rope_scaling is 'linear', the checkpoint has 'none'"),
    ({'rope_scaling': 'dynamic', 'rope_factor': 2.0, 'max_position': 9}, "model.rope_scaling is 'dynamic', the checkpoint has 'none'"),
    ({'norm_eps': 1e-6}, 'model.norm_eps is 1e-06, the checkpoint has 1e-05'),
    ({'num_layers': 3, 'd_ff': 64}, 'model.num_layers is 3, the checkpoint has 2; model.d_ff is 64, the checkpoint has 32'),
    ({'num_kv_heads': 2}, 'model.num_kv_heads is 2, the checkpoint has 1'),
    ({'qkv_bias': True}, 'model.qkv_bias is True, the checkpoint has False'),
    ({'vocab_size': 300}, 'model.vocab_size is 300, the checkpoint has 261'),
  ],
)
def test_a_model_with_other_results_is_refused_with_the_names_of_its_options(reward_folder, tmp_path, make_context, settings, message):
  folder, _ = reward_folder
  with pytest.raises(ConfigError) as error:
    finetune(at_rest(make_context, tmp_path, folder, model=dataclasses.replace(SHAPE, **settings)))
  assert str(error.value) == f'{folder} cannot be started from: {message}'


def test_dynamic_scaling_must_have_the_same_max_position(make_folder, tmp_path, make_context):
  dynamic = dataclasses.replace(MODEL, rope_scaling='dynamic', rope_factor=2.0, max_position=77)
  folder, _ = make_folder('lm', **dataclasses.asdict(dynamic))
  with pytest.raises(ConfigError, match=r'from: model.max_position is 78, the checkpoint has 77$'):
    start_params(folder, dataclasses.replace(dynamic, max_position=78), 'lm', make_context(tmp_path).mesh)


def test_a_language_model_must_be_tied_like_its_checkpoint(make_folder, tmp_path, make_context):
  (folder, params), mesh = make_folder('lm', tie_embeddings=True), make_context(tmp_path).mesh
  with pytest.raises(ConfigError, match=r'from: model.tie_embeddings is False, the checkpoint has True$'):
    start_params(folder, MODEL, 'lm', mesh)
  assert_equal(start_params(folder, dataclasses.replace(MODEL, tie_embeddings=True), 'lm', mesh), params)


# ---- tokenizers ----


@pytest.fixture(scope='module')
def trained(reward_folder, tmp_path_factory, make_context):
  """A run of four steps with the tokenizer of the checkpoint that it starts from."""
  workdir, (folder, _) = tmp_path_factory.mktemp('trained'), reward_folder
  context = make_context(
    workdir,
    steps=4,
    evaluate_every=None,
    start_from=str(folder),
    stage='finetune',
    tokenizer=TokenizerConfig(kind='checkpoint'),
    template=TemplateConfig(max_length=64),
  )
  finetune(context)
  return context, workdir / 'finetune', folder


def test_a_run_keeps_the_tokenizer_of_its_checkpoint(trained):
  _, run, folder = trained
  opened, own = open_pretrained(run), folder / 'tokenizer.json'
  assert opened.settings['tokenizer'].startswith(hashlib.sha256(own.read_bytes()).hexdigest()[:16])
  for name in ('tokenizer.json', 'tokenizer_config.json'):
    assert (run / 'assets' / name).read_bytes() == (folder / name).read_bytes()
  assert not (run / 'assets/config.json').exists()
  assert opened.tokenizer().encode('é<|reward|>', add_bos=True) == [257, 195, 169, 259]


def test_a_run_resumes_only_with_its_own_tokenizer(trained, tmp_path):
  context, run, folder = trained
  kept = (run / 'assets/tokenizer.json').read_bytes()
  spec = json.loads((folder / 'tokenizer.json').read_text())
  spec['added_tokens'][0]['content'] = '<other pad>'
  (tmp_path / 'tokenizer.json').write_text(json.dumps(spec))
  other = TokenizerConfig(kind='file', path=str(tmp_path / 'tokenizer.json'))
  with pytest.raises(ConfigError, match=r"made with other settings \(tokenizer was '[0-9a-f:]{33}', is '[0-9a-f:]{33}'\)"):
    finetune(dataclasses.replace(context, config=dataclasses.replace(context.config, tokenizer=other)))
  assert (run / 'assets/tokenizer.json').read_bytes() == kept


def test_the_checkpoint_of_the_tokenizer_must_be_named(tmp_path, make_context):
  with pytest.raises(ConfigError, match=r"tokenizer.kind is 'checkpoint', but no checkpoint is named"):
    finetune(make_context(tmp_path, stage='finetune', tokenizer=TokenizerConfig(kind='checkpoint')))


def scores(folder: pathlib.Path, context: Context) -> np.ndarray:
  opened = open_pretrained(folder)
  template = Template(opened.template(TemplateConfig()), opened.tokenizer())
  return Scorer(opened.params(context.mesh), opened.model, template, context.mesh).score_pairs(context.triplets('validation'))


@pytest.mark.slow  # the tests of conventions convert and export as well
def test_scores_survive_conversion_to_hugging_face_and_back(trained, tmp_path):
  context, run, _ = trained
  convert_to = lambda source, target: convert.convert(
    dataclasses.replace(context, config=Config(checkpoint=str(source), output=str(target), convert=ConvertConfig()))
  )
  convert_to(run, tmp_path / 'exported')
  convert_to(tmp_path / 'exported', tmp_path / 'again')
  expected = scores(run, context)
  assert np.ptp(expected) > 1e-3
  np.testing.assert_array_equal(scores(tmp_path / 'exported', context), expected)
  np.testing.assert_array_equal(scores(tmp_path / 'again', context), expected)
  assert json.loads((tmp_path / 'exported/config.json').read_text())['reward_token_id'] == 260


@pytest.mark.long
def test_scores_of_a_run_with_a_byte_tokenizer_survive_conversion(tmp_path, make_context):
  context = make_context(tmp_path, steps=4, evaluate_every=None, start_from='scratch')
  finetune(context)
  run = tmp_path / 'finetune'
  assert not (run / 'assets').exists() and isinstance(open_pretrained(run).tokenizer(), ByteTokenizer)
  convert.convert(dataclasses.replace(context, config=Config(checkpoint=str(run), output=str(tmp_path / 'exported'))))
  np.testing.assert_array_equal(scores(tmp_path / 'exported', context), scores(run, context))
