"""What the evaluate stage computes from the scores of its runs, with scorers that know the answer."""

from __future__ import annotations

import types

import numpy as np
import pytest

from polar_jax.config import DataConfig, TemplateConfig
from polar_jax.data.template import Template
from polar_jax.data.tokenizer import ByteTokenizer
from polar_jax.stages import evaluate as stage
from polar_jax.stages.finetune import FINETUNE, FINETUNE_NO_REFERENCE, FINETUNE_ONLY
from polar_jax.stages.pretrain import RUN as PRETRAIN
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
  monkeypatch.setattr(stage, 'trained', lambda context, run: True)
  config = types.SimpleNamespace(evaluate=types.SimpleNamespace(bootstrap=50), data=DataConfig())
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
  arms = {'pretrained_finetuned': 0.8, 'finetuned_only': 0.5, 'finetuned_without_reference': 0.0, 'pretrained_only': 1.0}
  assert {arm: v['accuracy'] for arm, v in result['arms'].items()} == pytest.approx(arms)
