"""Tests of naming the tokens that a model has no embedding for, wherever a model and a tokenizer meet."""

from __future__ import annotations

import dataclasses
import json
import re
import types

import pytest

import polar_jax
from polar_jax.checkpoints import tokenizer_files
from polar_jax.checkpoints.pretrained import open_pretrained
from polar_jax.config import ModelConfig, TemplateConfig
from polar_jax.data.template import Template
from polar_jax.data.tokenizer import ByteTokenizer, open_tokenizer
from polar_jax.data.vocabulary import VocabularyError, check_template, check_tokenizer

SHAPE = {'num_layers': 1, 'd_model': 8, 'd_ff': 8, 'num_heads': 1, 'num_kv_heads': 1, 'head_dim': 8, 'family': 'llama'}


def test_tokens_beyond_the_embedding_are_named():
  check_tokenizer(ByteTokenizer(), 261, 'the model')
  with pytest.raises(
    VocabularyError,
    match=r"^a/model: its embedding has 257 rows, but the byte tokenizer has ids up to 260, such as '<s>' \(257\), '</s>' \(258\), "
    r"'<\|reward\|>' \(259\); use the tokenizer that belongs",
  ):
    check_tokenizer(ByteTokenizer(), 257, 'a/model')


@pytest.mark.parametrize(('only', 'named'), [(10_009, "'x' (10009)"), (10_010, '10019')])
def test_of_the_tokens_beyond_the_embedding_ten_thousand_are_looked_at(only, named):
  tokenizer = types.SimpleNamespace(path='a.json', vocab_size=10_020, decode=lambda ids, skip_special: 'x' if ids == [only] else '')
  with pytest.raises(VocabularyError, match=rf'a\.json has ids up to 10019, such as {re.escape(named)}; use'):
    check_tokenizer(tokenizer, 10, 'm')


@pytest.mark.parametrize('name', ['reward_token_id', 'separator_id'])
def test_ids_of_the_template_must_have_an_embedding(name):
  check_template(Template(TemplateConfig(**{name: 300}), ByteTokenizer()), 301, 'm')
  with pytest.raises(VocabularyError, match=rf'^m: its embedding has 300 rows, but template.{name} is 300; set it to an id'):
    check_template(Template(TemplateConfig(**{name: 300}), ByteTokenizer()), 300, 'm')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A reward model whose tokenizer has one token more than its embedding rows."""
  folder = tmp_path_factory.mktemp('model')
  polar_jax.RewardModel.init(ModelConfig(vocab_size=261, **SHAPE), 'byte').save_pretrained(folder)
  path = folder / 'tokenizer.json'
  spec = json.loads(path.read_text())
  spec['added_tokens'].append(dict(spec['added_tokens'][-1], id=261, content='[PAD]'))
  path.write_text(json.dumps(spec))
  return folder


BEYOND = r"model\S*: its embedding has 261 rows, but \S+tokenizer.json has ids up to 261, such as '\[PAD\]' \(261\); use"
ROW = {'prompt': 'a', 'reference': 'b', 'chosen': 'c', 'rejected': 'd'}


def test_every_use_of_a_checkpoint_names_them(folder, tmp_path):
  with pytest.raises(VocabularyError, match=BEYOND):
    open_pretrained(folder).tokenizer()
  with pytest.raises(VocabularyError, match=BEYOND):
    polar_jax.load(folder)
  with pytest.raises(VocabularyError, match=BEYOND):
    polar_jax.train_reward_model([ROW], init=folder, output_dir=tmp_path)
  with pytest.raises(VocabularyError, match=BEYOND.replace(r'model\S*', 'scratch')):
    config = ModelConfig(vocab_size=261, **SHAPE)
    polar_jax.train_reward_model([ROW], init='scratch', model=config, tokenizer=folder, output_dir=tmp_path)
  with pytest.raises(VocabularyError, match=BEYOND):
    polar_jax.train_policy(dataclasses.replace(open_pretrained(folder), head='lm'), [{'prompt': 'a'}], len, output_dir=tmp_path)


def test_the_advice_helps(folder, tmp_path):
  """Another tokenizer is taken, and so is the same one without the token."""
  assert polar_jax.load(folder, tokenizer='byte').tokenizer.vocab_size == 261
  tokenizer_files.copy_small_files(folder, tmp_path)
  spec = json.loads((tmp_path / 'tokenizer.json').read_text())
  spec['added_tokens'] = [token for token in spec['added_tokens'] if token['content'] != '[PAD]']
  (tmp_path / 'tokenizer.json').write_text(json.dumps(spec))
  polar_jax.load(folder, tokenizer=open_tokenizer(tmp_path))


@pytest.mark.long
@pytest.mark.data
def test_layers_of_two_dtypes_score_as_in_transformers(data_folder):
  cases = data_folder / 'cases'
  row = json.loads((cases / 'rows/base_rows.jsonl').read_text().splitlines()[0])
  score = polar_jax.load(cases / 'weights/one_layer_f32').score_batch([row])
  assert score == pytest.approx([-1.547166], abs=2e-6)


@pytest.mark.data
def test_a_vocabulary_larger_than_the_embedding_is_named(data_folder):
  with pytest.raises(VocabularyError, match=r"vocab_small: its embedding has 250 rows, but \S+ has ids up to 260, such as '\S+' \(250\)"):
    polar_jax.load(data_folder / 'cases/weights/vocab_small')
