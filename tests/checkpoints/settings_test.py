from __future__ import annotations

import pytest

from polar_jax.checkpoints import settings

# Excerpts of what earlier versions stored, and what the same settings are called now.
TRAINING = (
  {'objective': 'ranking', 'seed': 1, 'accumulation': 2, 'evaluate_rows': 9, 'start_from': 'lm', 'rows': '5:ab', 'model.d_model': 8},
  {'objective': 'ranking', 'seed': 1, 'gradient_accumulation_steps': 2, 'evaluate_examples': 9, 'start_from': 'pretrain_lm', 'rows': '5:ab',
   'model.d_model': 8},
)  # fmt: skip
RFT = (
  {'rft.prompts': 4, 'rft.samples': 2, 'rft.minibatch': None, 'rft.lam': 0.9, 'rft.rows': 3, 'rft.policy': 'lm', 'rft.method': 'ppo',
   'rft.rollout.slots': 5, 'rft.reward.rows': 6, 'rft.actor.b1': 0.9, 'rft.seeds': 4, 'rft.start_steps': 100},
  {'rft.prompts_per_step': 4, 'rft.num_generations': 2, 'rft.mini_batch_size': None, 'rft.gae_lambda': 0.9, 'rft.micro_batch_rows': 3,
   'rft.policy': 'pretrain_lm', 'rft.method': 'ppo', 'rft.rollout.max_concurrent': 5, 'rft.reward.rows_per_batch': 6, 'rft.actor.b1': 0.9},
)  # fmt: skip
SWEEP = (
  {'seed': 0, 'lm.steps': 3, 'lm.start_from': 'scratch', 'train.start_from': 'lm', 'train.evaluate_rows': 9, 'rows.train': '5:ab'},
  {'seed': 0, 'pretrain_lm.steps': 3, 'pretrain_lm.start_from': 'scratch', 'pretrain.start_from': 'pretrain_lm',
   'pretrain.evaluate_examples': 9, 'rows.train': '5:ab'},
)  # fmt: skip


@pytest.mark.parametrize(('earlier', 'current'), [TRAINING, RFT, SWEEP])
def test_translate_earlier_names_and_values(earlier, current):
  assert settings.translate(earlier) == current == settings.translate(current)
  assert settings.differences(earlier, current) == []


def test_translate_keeps_paths_and_other_values():
  kept = {'start_from': '/runs/lm', 'rft.reward.checkpoint': 'pretrain', 'objective': 'lm', 'model.family': 'lm'}
  assert settings.translate(kept) == kept


@pytest.mark.parametrize('of_template', [True, False])
@pytest.mark.parametrize('own', [True, False])
def test_translate_use_reference_stored_twice(of_template, own):
  assert settings.translate({'use_reference': own, 'template.use_reference': of_template}) == {
    'template.use_reference': own and of_template
  }


def test_differences_are_sorted_and_named_by_their_current_names():
  stored = {'start_from': 'lm', 'accumulation': 2, 'sizes': [1, 2], 'old': 1}
  current = {'start_from': 'pretrain', 'gradient_accumulation_steps': 4, 'sizes': (1, 2), 'new': 0}
  assert settings.differences(stored, current) == [
    'gradient_accumulation_steps was 2, is 4',
    'new was None, is 0',
    'old was 1, is None',
    "start_from was 'pretrain_lm', is 'pretrain'",
  ]


def test_options_that_earlier_versions_did_not_have_count_as_their_defaults():
  stored = {'learning_rate': 1.0, 'rft.actor.b1': 0.9}
  now = stored | {'optimizer': 'adamw', 'moments': 'float32', 'loss.name': 'bradley_terry', 'loss.margin': False}
  now |= {'rft.actor.optimizer': 'adamw', 'pretrain.loss.mean': 'example'}
  assert settings.differences(stored, now) == []
  changed = settings.differences(stored, now | {'loss.name': 'focal', 'rft.actor.moments': 'int8'})
  assert changed == ["loss.name was 'bradley_terry', is 'focal'", "rft.actor.moments was 'float32', is 'int8'"]
