"""What the evaluate stage computes from the scores of its runs, with scorers that know the answer."""

from __future__ import annotations

import types

import numpy as np
import pytest

from polar_jax.config import ConfigError, DataConfig, EvaluateConfig, TemplateConfig
from polar_jax.data.examples import NoSplitError
from polar_jax.data.template import Template
from polar_jax.data.tokenizer import ByteTokenizer
from polar_jax.stages import evaluate as stage
from polar_jax.stages.arms import FINETUNE, FINETUNE_EQUAL_COMPUTE, FINETUNE_NO_REFERENCE, FINETUNE_ONLY, PRETRAIN
from polar_jax.types import Triplet

RIGHT = {FINETUNE: 'easy medium', FINETUNE_ONLY: 'easy', FINETUNE_NO_REFERENCE: '', PRETRAIN: 'easy medium hard'}


class KnownScorer:
  """Prefers the chosen response in some categories, and the rejected one in the others."""

  template = Template(TemplateConfig(), ByteTokenizer())

  def __init__(self, run: str):
    self.right = RIGHT[run]

  def score_pairs(self, examples):
    return np.array([[1.0, 0.0] if e.category in self.right else [0.0, 1.0] for e in examples], np.float32)


@pytest.fixture
def context(monkeypatch):
  monkeypatch.setattr(stage, '_scorer', lambda context, run: KnownScorer(run))
  monkeypatch.setattr(stage.arms_lib, 'trained', lambda context, run: run != FINETUNE_EQUAL_COMPUTE)
  config = types.SimpleNamespace(evaluate=EvaluateConfig(bootstrap=100), data=DataConfig(), seeds=1)
  return types.SimpleNamespace(config=config, log=lambda line: None)


def test_accuracy_by_category_is_that_of_its_own_examples(context):
  categories = ['easy'] * 5 + ['medium'] * 3 + ['hard'] * 2
  examples = [Triplet(f'p{i}', 'r', f'chosen {i}', f'rejected {i}', category=c) for i, c in enumerate(categories)]
  result = stage.evaluate_preferences(context, examples)
  assert {name: (v['accuracy'], v['n']) for name, v in result['by_category'].items()} == {
    'easy': (1.0, 5),
    'hard': (0.0, 2),
    'medium': (1.0, 3),
  }
  assert list(result['by_category']) == ['easy', 'hard', 'medium']
  arms = {'pretrained_finetuned': 0.8, 'finetuned_only': 0.5, 'finetuned_without_reference': 0.0, 'pretrained_only': 1.0}
  assert {arm: v['accuracy'] for arm, v in result['arms'].items()} == pytest.approx(arms)
  # Paired with the main arm: it alone is right for the three of `medium`, and wrong for the two of `hard`.
  margins = {'finetuned_only': 0.3, 'finetuned_without_reference': 0.8, 'pretrained_only': -0.2}
  assert {arm: v['difference'] for arm, v in result['margin_over_arms'].items()} == pytest.approx(margins)
  assert all(v['low'] <= v['difference'] <= v['high'] for v in result['margin_over_arms'].values())
  # `rejected` is longer than `chosen`, and all of them are longer than the reference.
  assert result['baselines']['length']['accuracy'] == 1.0
  assert result['margin_over_best_baseline']['baseline'] == 'length'
  assert result['margin_over_best_baseline']['difference'] == pytest.approx(-0.2)
  assert result['examples'].keys() == arms.keys() and all(found['examples'] == 10 for found in result['examples'].values())


def test_an_arm_that_was_not_trained_is_left_out(context, monkeypatch):
  monkeypatch.setattr(stage.arms_lib, 'trained', lambda context, run: run == FINETUNE)
  result = stage.evaluate_preferences(context, [Triplet('p', 'r', 'a', 'b', category='easy'), Triplet('q', 'r', 'a', 'b')])
  assert set(result['arms']) == set(result['examples']) == {'pretrained_finetuned'} and result['margin_over_arms'] == {}
  assert {name: v['n'] for name, v in result['by_category'].items()} == {'easy': 1, 'none': 1}


def test_each_split_has_its_own_accuracy_baselines_and_margin(context):
  examples = lambda right, wrong: [
    Triplet(f'p{i}', 'r' * 4, 'c' * (4 + (i % 3 > 0)), 'x' * 4, category='hard' if i < right else 'other') for i in range(right + wrong)
  ]
  splits = {'validation': examples(6, 3), 'test': examples(3, 9)}
  truth = {'validation': 0.5, 'test': 1.0}
  lines = []
  context.log = lines.append
  result = stage.evaluate_triplets(context, splits, lambda given, split: {'bayes': np.full(len(given), truth[split])})
  assert {split: (v['accuracy'], v['n']) for split, v in result['by_split'].items()} == {'validation': (6 / 9, 9), 'test': (3 / 12, 12)}
  assert {split: v['accuracy'] for split, v in result['baselines']['bayes'].items()} == truth
  # One candidate of three is as long as the reference, as `rejected` always is: half right there, and wrong elsewhere.
  assert {split: v['accuracy'] for split, v in result['baselines']['length'].items()} == pytest.approx(dict.fromkeys(splits, 1 / 6))
  for split, margin in result['margin_over_best_baseline'].items():  # words of one letter each share nothing: all ties
    assert margin['baseline'].startswith(('overlap', 'words')) and margin['difference'] == pytest.approx(
      result['by_split'][split]['accuracy'] - 0.5
    )
    assert result['examples'][split]['examples'] == len(splits[split])
  assert sum(line.startswith('test: 0.250 [') and '; best baseline ' in line for line in lines) == 1
  assert 'bayes' not in stage.evaluate_triplets(context, splits)['baselines']


def test_held_out_splits_are_those_that_exist_and_a_single_file_counts_once():
  data = {'validation': [1], 'test': [2]}

  def read(split):
    if split not in data:
      raise NoSplitError(split)
    return data[split]

  assert stage.held_out(None, read, 'data.triplets') == data
  data['test'] = data['validation']
  assert stage.held_out(None, read, 'data.triplets') == {'validation': [1]}
  del data['validation']
  assert stage.held_out(None, read, 'data.triplets') == {'test': [1]}
  data.clear()
  with pytest.raises(ConfigError, match=r'data\.triplets has none of the splits validation, test, unseen_prompts, unseen_policies; name'):
    stage.held_out(None, read, 'data.triplets')


@pytest.mark.parametrize('runs', [set(), {PRETRAIN}, {FINETUNE}, {PRETRAIN, FINETUNE}])
def test_the_stage_evaluates_the_runs_of_the_workdir(context, monkeypatch, runs):
  triplets = {'validation': 'tv', 'test': 'tt', 'unseen_prompts': 'tp', 'unseen_policies': 'to'}
  lines, read = [], {'triplets': triplets, 'preferences': {'validation': 'pv', 'test': 'pt'}}

  def reader(splits):
    def read(split):
      if split not in splits:
        raise NoSplitError(split)
      return splits[split]

    return read

  context.log = lines.append
  context.triplets, context.preferences = reader(read['triplets']), reader(read['preferences'])
  monkeypatch.setattr(stage.evaluate_sets, 'is_requested', lambda config: False)
  monkeypatch.setattr(stage, 'trained', lambda context, run: run in runs)
  monkeypatch.setattr(stage, 'evaluate_triplets', lambda context, splits: splits)
  monkeypatch.setattr(stage, 'evaluate_preferences', lambda context, examples: examples)
  expected = ({'evaluate': read['triplets']} if PRETRAIN in runs else {}) | ({'finetune': 'pt'} if FINETUNE in runs else {})
  assert stage.evaluate(context) == expected and bool(lines) == (not runs)

  context.preferences = reader({'validation': 'pv'})
  assert stage.evaluate(context).get('finetune') == ('pv' if FINETUNE in runs else None)
  monkeypatch.setattr(stage.evaluate_sets, 'is_requested', lambda config: True)
  monkeypatch.setattr(stage.evaluate_sets, 'run', lambda context: 'sets')
  assert stage.evaluate(context) == 'sets'


def test_a_run_is_scored_with_its_own_template_and_the_settings_of_the_stage(monkeypatch):
  calls = []
  model = types.SimpleNamespace(params='params', config='config', template='template')
  monkeypatch.setattr(stage.api, 'load', lambda home, **settings: calls.append((home, settings)) or model)
  monkeypatch.setattr(stage, 'Scorer', lambda *arguments, **settings: (arguments, settings))
  config = types.SimpleNamespace(model='compute', template='asked', evaluate=types.SimpleNamespace(rows_per_batch=7))
  context = types.SimpleNamespace(config=config, mesh='mesh', home=lambda run: f'home of {run}')
  assert stage._scorer(context, 'run') == (('params', 'config', 'template', 'mesh'), {'rows': 7})
  assert calls == [('home of run', {'mesh': 'mesh', 'compute': 'compute', 'template': 'asked'})]
