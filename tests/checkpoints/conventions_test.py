"""Reward models as their makers score them: with or without BOS, with POLAR's template or their own chat template.

Rows and scores of the data folder were computed with transformers in float32.
"""

from __future__ import annotations

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from optional import torch, transformers

import polar_jax
from polar_jax import sharding
from polar_jax.checkpoints.pretrained import open_pretrained
from polar_jax.config import Config, ConfigError, ConvertConfig, MeshConfig, TemplateConfig
from polar_jax.data import template as template_lib
from polar_jax.data.template import TemplateError
from polar_jax.data.tokenizer import open_tokenizer
from polar_jax.stages import convert
from polar_jax.stages.context import Context
from polar_jax.types import Triplet, UserError

pytestmark = [pytest.mark.data, pytest.mark.usefixtures('torch_on_one_thread')]
SCORES = {'base': [-1.535222, 1.656916], 'nobos': [-1.238487, 2.611804], 'chatrm': [0.586502, 0.193352]}


def rows_of(data_folder, case):
  name = 'chatrm_rows' if case == 'chatrm' else 'base_rows'
  return [json.loads(line) for line in (data_folder / f'cases/rows/{name}.jsonl').read_text().splitlines()]


def mesh():
  return sharding.make_mesh(MeshConfig(data=1, fsdp=1), jax.devices()[:1])


def converted(source, output, log=None):
  config = Config(checkpoint=str(source), output=str(output), convert=ConvertConfig())
  convert.convert(Context(config, pathlib.Path('unused'), mesh(), (lambda line: None) if log is None else log.append))
  return output


def scores(path, rows, **settings):
  return polar_jax.load(path, mesh=mesh(), **settings).score_batch(rows)


@pytest.mark.long
@pytest.mark.parametrize('case', SCORES)
def test_scores_are_those_of_transformers_also_after_conversion_and_export(data_folder, tmp_path, case):
  source, rows = data_folder / 'cases' / case, rows_of(data_folder, case)
  ours, exported = converted(source, tmp_path / 'ours'), converted(tmp_path / 'ours', tmp_path / 'exported')
  for path in (source, ours, exported):
    np.testing.assert_allclose(scores(path, rows), SCORES[case], atol=2e-5)
  for folder in (ours, exported):
    certificate = json.loads((folder / 'certificate.json').read_text())
    before, after = certificate['text_ids']
    assert before == after and all(before) and len(before) == len(certificate['text_scores'][0]) == 4
    assert certificate['text_scores'][0] == certificate['text_scores'][1] and not certificate['texts_skipped']


@pytest.mark.needs('torch', 'transformers')
@pytest.mark.parametrize('case', SCORES)
def test_an_export_gives_the_same_ids_and_scores_in_transformers(data_folder, tmp_path, case):
  converted(data_folder / 'cases' / case, tmp_path / 'ours')
  exported, rows = converted(tmp_path / 'ours', tmp_path / 'exported'), rows_of(data_folder, case)
  tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
  model = transformers.AutoModelForSequenceClassification.from_pretrained(exported, dtype=torch.float32).eval()
  template = polar_jax.load(exported, mesh=mesh()).template
  for row, expected in zip(rows, SCORES[case], strict=True):
    (ours,) = template.encode_candidates(row['prompt'], row.get('reference', ''), [row['output']])
    if case == 'chatrm':
      prompt = row['prompt'] if isinstance(row['prompt'], list) else [{'role': 'user', 'content': row['prompt']}]
      output = row['output'] if isinstance(row['output'], list) else [{'role': 'assistant', 'content': row['output']}]
      ids = tokenizer.apply_chat_template(prompt + output, return_dict=False)
    else:
      text = f'{row["prompt"]}\n{row["reference"]}<|reward|>{row["prompt"]}\n{row["output"]}[UNUSED_TOKEN_130]'
      ids = tokenizer(text)['input_ids']
    assert ids == ours
    with torch.no_grad():
      assert abs(float(model(torch.tensor([ids])).logits[0, 0]) - expected) < 2e-5


def with_files(source, folder, config=None, settings=None, spec=None):
  """Copy a model with some keys of its small files changed."""
  shutil.copytree(source, folder)
  for name, changes in (('config.json', config), ('tokenizer_config.json', settings), ('tokenizer.json', spec)):
    if changes:
      (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changes))
  return folder


BOS_FIRST = {
  'type': 'TemplateProcessing',
  'single': [{'SpecialToken': {'id': '<s>', 'type_id': 0}}, {'Sequence': {'id': 'A', 'type_id': 0}}],
  'pair': [{'Sequence': {'id': 'A', 'type_id': 0}}, {'Sequence': {'id': 'B', 'type_id': 0}}],
  'special_tokens': {'<s>': {'id': '<s>', 'ids': [256], 'tokens': ['<s>']}},
}
ROBERTA = {'type': 'RobertaProcessing', 'sep': ['</s>', 257], 'cls': ['<s>', 256], 'trim_offsets': True, 'add_prefix_space': False}
BYTE_LEVEL: dict = {'type': 'ByteLevel', 'add_prefix_space': True, 'trim_offsets': False, 'use_regex': True}

SEQUENCE = {'type': 'Sequence', 'processors': [BYTE_LEVEL, BOS_FIRST]}


@pytest.mark.needs('transformers')
@pytest.mark.parametrize('post_processor', [None, BYTE_LEVEL, BOS_FIRST, ROBERTA, SEQUENCE])
@pytest.mark.parametrize('settings', [{}, {'add_bos_token': True}, {'add_bos_token': False}, {'bos_token': None, 'add_bos_token': None}])
def test_bos_is_added_where_transformers_adds_it(data_folder, tmp_path, post_processor, settings):
  folder = with_files(data_folder / 'cases/nobos', tmp_path / 'model', settings=settings, spec={'post_processor': post_processor})
  ours, theirs = open_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
  expected = theirs('ab')['input_ids']
  assert ours.encode('ab', add_bos=True) == (expected[:-1] if post_processor == ROBERTA else expected)  # we never add an EOS
  assert bool(ours.prefix_ids) == (expected[0] == 256)


@pytest.mark.needs('transformers')
@pytest.mark.parametrize('adds', [True, False])
def test_an_export_with_a_new_token_keeps_or_lacks_the_bos(data_folder, tmp_path, adds):
  from polar_jax.checkpoints import tokenizer_files

  ours = open_tokenizer(data_folder / 'cases' / ('base' if adds else 'nobos'))
  tokenizer_files.write_for_transformers(ours, tmp_path, 'llama', {'<|new|>': 261})
  (tmp_path / 'config.json').write_text(json.dumps({'model_type': 'llama'}))
  theirs, again = transformers.AutoTokenizer.from_pretrained(tmp_path), open_tokenizer(tmp_path)
  assert theirs('a<|new|>b')['input_ids'] == again.encode('a<|new|>b', add_bos=True) == [*[256] * adds, 64, 261, 65]


# ---- chat templates of reward models ----


def test_a_chat_template_is_used_unless_the_model_says_otherwise(data_folder, tmp_path):
  case = data_folder / 'cases/chatrm'
  default = open_pretrained(case).template(TemplateConfig())
  assert (default.chat, default.use_reference) == ('always', False)
  with pytest.raises(TemplateError, match='not a token of this tokenizer'):
    _ = polar_jax.load(case, mesh=mesh(), template=TemplateConfig(chat='never')).template
  for settings in ({'reward_token_id': 257}, {'separator': '</s>'}):
    with pytest.raises(ConfigError, match=r'has a chat template .* template\.chat=always .* or template\.chat=never') as error:
      polar_jax.load(case, mesh=mesh(), template=TemplateConfig(**settings))
    assert len(str(error.value)) <= 500
  # The remedies that the message names.
  row = rows_of(data_folder, 'chatrm')[0] | {'reference': 'Four.'}
  chat, polar = (TemplateConfig(chat=chat, reward_token_id=257) for chat in ('always', 'never'))
  with_token = polar_jax.load(case, mesh=mesh(), template=chat)
  assert with_token.template.encode_candidates(row['prompt'], '', [row['output']])[0][-2:] == [open_tokenizer(case).encode('\n')[0], 257]
  template_lib._warn_of_textual_separator.cache_clear()  # it warns once
  with pytest.warns(UserWarning, match='tokenized as ordinary text'):
    assert np.isfinite(scores(case, [row], template=polar)).all()
  # A model of ours may have a chat template from the language model that it started from.
  marked = with_files(case, tmp_path / 'marked', config={'reward_token_id': 258})
  assert open_pretrained(marked).template(TemplateConfig()).chat == 'auto'
  assert open_pretrained(data_folder / 'cases/base').template(TemplateConfig()).chat == 'auto'


def test_conversations_are_checked(data_folder):
  model = polar_jax.load(data_folder / 'cases/chatrm', mesh=mesh(), template=TemplateConfig(max_length=40))
  with pytest.raises(UserError, match=r'prompt\[1\] has no role'):
    model.template.encode_candidates([{'role': 'user', 'content': 'a'}, {'content': 'b'}], '', ['c'])
  with pytest.raises(UserError, match=r'candidates.0.: the conversation has \d+ tokens, more than template.max_length \(40\)'):
    model.template.encode_candidates('a', '', ['b' * 50])
  with pytest.raises(UserError, match='chosen must be a string'):
    model.template.encode(Triplet('a', '', None, 'b'))
  chosen, rejected = model.template.encode(Triplet('a', 'ignored', 'b', 'c'))
  assert [chosen, rejected] == model.template.encode_candidates('a', '', ['b', 'c'])


def test_a_server_gets_the_rendered_conversation_without_a_second_bos(data_folder, tmp_path):
  source = "{{ '<s>' if messages[0].content != 'none' }}{% for m in messages %}{{ m.content }}</s>{% endfor %}"
  settings = {'bos_token': '<s>', 'chat_template': source}
  folder = with_files(data_folder / 'cases/chatrm', tmp_path / 'model', settings=settings, spec={'post_processor': BOS_FIRST})
  template = polar_jax.load(folder, mesh=mesh()).template
  assert template.candidate_texts('a', '', ['b']) == ['a</s>b</s>']
  tokenizer = open_tokenizer(folder)
  assert tokenizer.encode_batch(['a</s>b</s>'], add_bos=True) == template.encode_candidates('a', '', ['b'])
  with pytest.raises(TemplateError, match="would put '<s>' before each text, which the chat template does not write"):
    template.candidate_texts('none', '', ['b'])


@pytest.mark.long
def test_scores_of_ppo_keep_the_roles_of_messages(data_folder):
  from polar_jax.config import RewardConfig, RftConfig
  from polar_jax.ppo.rewards.sources import ModelReward
  from polar_jax.types import Prompt

  model, rows = polar_jax.load(data_folder / 'cases/chatrm', mesh=mesh()), rows_of(data_folder, 'chatrm')
  prompts = [Prompt(row['prompt'], '') for row in rows]
  rewards = ModelReward(model.policy_scorer(RftConfig(), prompts), RewardConfig()).score(prompts, ['It is 4.', 'Bye'])
  np.testing.assert_allclose(rewards, SCORES['chatrm'], atol=2e-5)
