"""Folders, numbers and paths that the convert stage refuses."""

from __future__ import annotations

import numpy as np
import pytest
from convert_folders import (
  CASES,
  F32,
  certificate_of,
  context_of,
  cut_short,
  edit_config,
  edit_tensors,
  only,
  refused,
  stored_in,
  with_value,
  write_weights,
)

from polar_jax import runner
from polar_jax.config import Config, ConfigError
from polar_jax.data.vocabulary import VocabularyError
from polar_jax.stages import convert
from polar_jax.stages.context import Context

pytestmark = pytest.mark.usefixtures('torch_on_one_thread', 'compile_once')


BAD_FOLDERS = {
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
  'other_config': (edit_config(num_hidden_layers=3), r"tensor 'model.layers.2.self_attn.q_proj.weight' is missing \(and 8 more\)"),
  'other_family': (
    edit_config(model_type='internlm2', architectures=['InternLM2ForRewardModel'], id2label=None, label2id=None),
    r"'model.tok_embeddings.weight' is missing .* it has 'model.embed_tokens.weight'.*another family",
  ),
  'unknown_family': (
    edit_config(model_type='gpt2', architectures=['GPT2LMHeadModel']),
    r"config.json: model_type is 'gpt2'; supported: gemma3_text, internlm2",
  ),
  'two_labels': (edit_config(id2label={'0': 'a', '1': 'b'}), r'config.json: id2label is .*one label'),
  'no_config': (
    lambda source: (source.path / 'config.json').unlink(),
    r'source: neither a run .* nor a folder of Hugging Face \(config.json\) or PEFT \(adapter_config.json\); it contains: chat',
  ),
  'no_json': (lambda source: (source.path / 'config.json').write_text('{"a": '), r'config.json: not JSON'),
  'no_object': (lambda source: (source.path / 'config.json').write_text('[1]'), r'config.json: must contain a JSON object'),
  'not_utf8': (lambda source: (source.path / 'config.json').write_bytes(b'\xff{}'), r'config.json: not UTF-8'),
  'no_weights': (lambda source: (source.path / 'pytorch_model.bin').unlink(), r'source: contains no weights'),
}


@pytest.mark.needs('torch')
@pytest.mark.parametrize('case', BAD_FOLDERS)
def test_bad_folders_are_refused_and_leave_no_output(make_folder, tmp_path, case):
  source = make_folder(CASES['llama_reward'], tmp_path / 'source')
  damage, message = BAD_FOLDERS[case]
  damage(source)
  refused(context_of(source.path, tmp_path / 'out'), message)


def test_a_tied_head_must_be_the_embedding(make_folder, tmp_path):
  source = make_folder(CASES['qwen2_tied']._replace(layout='one'), tmp_path / 'source')
  head = source.tensors['model.embed_tokens.weight'].copy()
  head[200, 35] *= 1.01
  write_weights(source.path, 'one', source.tensors | {'lm_head.weight': head})
  refused(context_of(source.path, tmp_path / 'out'), r"safetensors: tensor 'lm_head.weight' differs from the embedding")


@pytest.mark.long
def test_a_bias_of_the_head_must_be_zero(make_folder, tmp_path):
  source = make_folder(CASES['llama_value'], tmp_path / 'source')
  with_value('score.bias', 0.5)(source)
  refused(context_of(source.path, tmp_path / 'out'), r"safetensors: tensor 'score.bias' is \[0.5\]; our heads have no bias")
  edit_tensors(lambda t: t.pop('score.bias'))(source)
  convert.convert(context_of(source.path, tmp_path / 'out'))
  assert 'score.bias' not in certificate_of(tmp_path / 'out')['tensors']
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


def test_a_tokenizer_with_ids_beyond_the_embedding_is_refused(make_folder, tmp_path):
  source = make_folder(CASES['llama_reward']._replace(layout='one'), tmp_path / 'source')
  table = source.tensors['model.embed_tokens.weight']
  write_weights(source.path, 'one', source.tensors | {'model.embed_tokens.weight': table[:260]})
  edit_config(vocab_size=260, reward_token_id=None)(source)
  message = r"source: its embedding has 260 rows, but \S+tokenizer.json has ids up to 260, such as '\[UNUSED_TOKEN_130\]' \(260\)"
  refused(context_of(source.path, tmp_path / 'out'), message, VocabularyError)
