"""Quantities derived from the settings of a run: steps, updates, which models it needs, the length of its rows."""

from __future__ import annotations

import dataclasses
import types

import pytest

from polar_jax.config import ConfigError, RftConfig, RolloutConfig
from polar_jax.ppo.run import Run


def make_run(prompts: int = 0, **settings) -> Run:
  values = {field.name: None for field in dataclasses.fields(Run)}
  return Run(**{**values, 'config': RftConfig(**settings), 'prompts': range(prompts)})


@pytest.mark.parametrize(
  ('prompts', 'settings', 'steps'),
  [
    (100, {'prompts_per_step': 10, 'epochs': 3}, 30),
    (25, {'prompts_per_step': 10, 'epochs': 3}, 7),  # a step may reach into the next epoch
    (3, {'prompts_per_step': 10}, 1),
    (100, {'prompts_per_step': 10, 'steps': 4}, 4),
  ],
)
def test_steps(prompts, settings, steps):
  assert make_run(prompts, **settings).steps == steps


def test_updates_count_epochs_and_mini_batches():
  c = {'steps': 5, 'prompts_per_step': 6, 'num_generations': 2}
  assert make_run(**c).updates == 5
  assert make_run(**c, update_epochs=3).updates == 15
  assert make_run(**c, mini_batch_size=5).updates == 5 * 3  # the last mini-batch of 12 responses is a small one
  assert make_run(**c, mini_batch_size=6, update_epochs=4).updates == 5 * 4 * 2


def test_needs_reference_and_critic():
  needs = lambda **settings: (make_run(**settings).needs_reference, make_run(**settings).has_critic)
  assert needs() == (True, True) and needs(track_kl=False) == (False, True)
  assert needs(track_kl=False, kl_in='reward', advantage='rloo') == (True, False)
  assert needs(track_kl=False, kl_in='reward', method='sft') == (False, False)
  assert needs(method='sft') == (True, False)


def test_row_length_is_a_multiple_that_holds_prompt_and_response():
  rollout = RolloutConfig(max_prompt=100, max_new=29)
  length = make_run(rollout=rollout).row_length
  assert 129 <= length < 129 + 128 and length % 128 == 0
  assert make_run(rollout=rollout, row_length=150).row_length == 150


def test_rows_that_do_not_hold_the_longest_prompt_with_a_response_are_refused_before_the_first_step():
  class Prompts(list):
    longest = 20

  reward = types.SimpleNamespace(check=lambda *_: None)
  made = lambda **settings: dataclasses.replace(make_run(**settings), prompts=Prompts(), reward=reward)
  rollout = RolloutConfig(max_prompt=20, max_new=10)
  with pytest.raises(ConfigError, match=r'rft\.row_length is 28, .* takes 29: set rft\.row_length to 29 or more'):
    made(rollout=rollout, row_length=28).check()
  made(rollout=rollout, row_length=29).check()
  made(rollout=rollout).check()


def test_all_prompts_and_the_held_out_ones_that_are_evaluated_are_checked_before_the_first_step():
  class Prompts(list):
    longest = 3

  def checked(held_out, **settings):
    calls = []
    reward = types.SimpleNamespace(check=lambda *arguments: calls.append(arguments))
    prompts = Prompts([('a', [1]), ('b', [1, 2])])
    dataclasses.replace(make_run(**settings), prompts=prompts, held_out=held_out, reward=reward).check()
    return calls

  held_out = [('c', [1]), ('d', [2]), ('e', [3])]
  assert checked(held_out, evaluate_prompts=2) == [(['a', 'b'],), (['c', 'd'], 'held-out prompt')]
  assert checked(held_out, evaluate_prompts=5) == [(['a', 'b'],), (['c', 'd', 'e'], 'held-out prompt')]
  assert checked(None) == [(['a', 'b'],)]
  assert checked(held_out, evaluate_prompts=1, method='sft') == [(['c'], 'held-out prompt')]
