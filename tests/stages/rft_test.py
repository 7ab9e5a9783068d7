"""The runs of the rft stage: arms and seeds."""

from __future__ import annotations

import dataclasses

from polar_jax.config import Config, RewardConfig, RftConfig, StudyConfig
from polar_jax.stages.rft import runs_of

RULE = RewardConfig(rule='last_number', model_weight=0.5, rule_weight=0.25)


def config(*, ablations=False, seeds=1, **options):
  return Config(rft=RftConfig(**options), ablations=ablations, study=StudyConfig(seeds=seeds))


def test_a_single_run_has_the_options_of_the_config():
  made = config(reward=RULE)
  assert runs_of(made) == {'rft': (made.rft, 0)}


def test_seeds_are_runs_of_their_own():
  made = config(seeds=3)
  assert runs_of(made) == {f'rft/seed_{seed}': (made.rft, seed) for seed in range(3)}


def test_ablations_are_the_rule_alone_and_the_references():
  made = config(ablations=True, seeds=2, reward=RULE, num_generations=4, mini_batch_size=6)
  found = runs_of(made)
  assert list(found) == ['rft/supervised', 'rft/model', 'rft/rule', 'rft/supervised_seed_1', 'rft/model_seed_1', 'rft/rule_seed_1']
  assert [seed for _, seed in found.values()] == [0, 0, 0, 1, 1, 1]
  supervised, model, rule = (options for options, _ in list(found.values())[3:])
  assert model == made.rft and rule == dataclasses.replace(made.rft, reward=dataclasses.replace(RULE, model_weight=0.0, rule_weight=1.0))
  assert supervised == dataclasses.replace(made.rft, method='sft', num_generations=1, mini_batch_size=1)


def test_what_does_not_apply_is_left_out():
  assert list(runs_of(config(ablations=True))) == ['rft/supervised', 'rft/model']  # no rule
  assert list(runs_of(config(ablations=True, reward=RULE, method='sft'))) == ['rft']
