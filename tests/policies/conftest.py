"""A real model of 260 thousand parameters, and task files of lm-eval with data of their own."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest

import polar_jax

WORDS = 'Once upon a time there was a little girl named Lily who liked to play with her red ball in the park and saw dog .'.split()  # noqa: SIM905
_TASK = """\
task: {name}
output_type: {kind}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{text}}}}"
metadata: {{version: 1.0}}
"""
_KINDS = {
  'own_choice': ('multiple_choice', 'doc_to_choice: choices\ndoc_to_target: label\n', 'acc acc_norm'),
  'own_perplexity': ('loglikelihood_rolling', '', 'word_perplexity bits_per_byte'),
  'own_response': (
    'generate_until',
    'doc_to_target: answer\ngeneration_kwargs: {until: [".", "never"], max_gen_toks: 24}\n',
    'exact_match',
  ),
}


@pytest.fixture(scope='session')
def stories(data_folder, tmp_path_factory) -> pathlib.Path:
  """Return a Hugging Face folder of the model. It was trained on stories for children."""
  folder = tmp_path_factory.mktemp('stories') / 'hf'
  polar_jax.load(data_folder / 'models/stories260k/stories260K.bin').save_pretrained(folder)
  return folder


@pytest.fixture(scope='session')
def task_folder(tmp_path_factory) -> pathlib.Path:
  """Return a folder with one task of each kind, on the same twelve documents, two of which are longer than the model allows."""
  folder, rng = tmp_path_factory.mktemp('tasks'), np.random.default_rng(0)
  sentence = lambda count: ' '.join(rng.choice(WORDS, count))
  documents = []
  for i, count in enumerate((0, 1, 3, 5, 8, 13, 21, 34, 55, 89, 300, 400)):
    text = sentence(count) + ' ' * (i % 3 == 1)
    choices = [sentence(int(n)) for n in rng.integers(1, 6, 3)] + ['the']
    if i == 1:  # what follows is certain
      text, choices[0] = 'Once upon a', 'time'
    documents.append({'text': text, 'choices': choices, 'label': i % 4, 'answer': f'{i}', 'id': i})
  data = folder / 'documents.jsonl'
  data.write_text('\n'.join(map(json.dumps, documents)))
  for name, (kind, more, metrics) in _KINDS.items():
    listed = ''.join(f'  - metric: {metric}\n' for metric in metrics.split())
    text = _TASK.format(name=name, kind=kind, data=data)
    if kind == 'loglikelihood_rolling':
      text = text.replace('doc_to_text: "{{text}}"', 'doc_to_text: ""\ndoc_to_target: "{{text}} ."')
    if kind == 'generate_until':  # lm-eval's own backend continues an empty prompt from its padding
      text = text.replace('"{{text}}"', '"One day, {{text}}"')
    (folder / f'{name}.yaml').write_text(f'{text}{more}metric_list:\n{listed}')
  return folder
