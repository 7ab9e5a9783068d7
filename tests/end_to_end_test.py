"""The main job in one process on a shrunken tiny config: every stage, the report as an interface, and a second run that redoes nothing."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from flax import nnx

from polar_jax import runner, sharding
from polar_jax.checkpoints import checkpointer
from polar_jax.config import ConfigError, MeshConfig, parse
from polar_jax.miniature import pool, study
from polar_jax.model.heads import HEADS
from polar_jax.model.language_model import LanguageModel
from polar_jax.recipes import miniature
from polar_jax.stages.context import Context

SPLITS = ('validation', 'unseen_prompts', 'unseen_policies')


def small_config(**changes):
  config = miniature('mini_tiny', train_examples=300, preference_examples=64)
  config.synthesize.update({'policies': 24, 'unseen_policies': 6, 'evaluation_examples': 40, 'preference_evaluation_examples': 40})
  config.synthesize.update({'documents': 60, 'document_tokens': 64})
  config.model.update({'num_layers': 1, 'd_model': 16, 'd_ff': 16, 'num_heads': 1, 'head_dim': 16})
  config.pretrain_lm.steps = config.pretrain.steps = config.finetune.steps = 3
  config.pretrain_lm.batch_size = config.pretrain.batch_size = config.finetune.batch_size = 8
  config.pretrain.evaluate_examples = config.pretrain_lm.evaluate_examples = config.finetune.evaluate_examples = 8
  config.study.seeds = 2
  config.rft.update({'steps': 2, 'prompts_per_step': 4, 'mini_batch_size': 4, 'micro_batch_rows': 4, 'evaluate_prompts': 12})
  config.rft.rollout.update({'max_concurrent': 8})
  config.sweep.update({'sizes': ('8x1', '16x1', '32x1'), 'tokens': (1_500,), 'batches': (8,), 'backend': 'inline'})
  config.update(changes)
  return parse(config)


@pytest.fixture(scope='module', autouse=True)
def laptop():
  """One device, as the miniature uses; compiling for eight takes twice as long."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sharding, 'make_mesh', functools.partial(sharding.make_mesh, devices=jax.devices()[:1]))
    yield


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  folder = tmp_path_factory.mktemp('tiny')
  assert runner.run(small_config(), folder) == 0
  return folder


def is_interval(value, fewest=2):
  """Check that every interval resamples policies, which are known in the miniature."""
  clustered = value['clustered_by'] == 'policy' and fewest <= value['clusters'] <= min(value['n'], 24)
  keys = {'accuracy', 'low', 'high', 'n', 'clusters', 'clustered_by'}
  return clustered and set(value) == keys and 0 <= value['low'] <= value['accuracy'] <= value['high'] <= 1


def test_report_is_the_interface(workdir):
  report = json.loads((workdir / 'report.json').read_text())
  assert all(is_interval(report['evaluate']['by_split'][s]) and report['evaluate']['by_split'][s]['n'] == 40 for s in SPLITS)
  assert {'length', 'overlap_1', 'random', 'bayes'} <= set(report['evaluate']['baselines'])
  assert all(is_interval(splits[s]) for splits in report['evaluate']['baselines'].values() for s in SPLITS)
  assert all(report['evaluate']['baselines']['bayes'][s]['accuracy'] > 0.75 for s in SPLITS)
  arms = report['finetune']['arms']
  assert set(arms) == {'pretrained_finetuned', 'finetuned_only', 'finetuned_without_reference', 'pretrained_only'}
  assert all(map(is_interval, arms.values()))
  assert all(is_interval(v, fewest=1) for v in report['finetune']['by_category'].values())  # a category may have one example
  assert report['evaluate']['by_split']['unseen_policies']['clusters'] <= 6
  margins = [*report['evaluate']['margin_over_best_baseline'].values(), report['finetune']['margin_over_best_baseline']]
  margins += report['finetune']['margin_over_arms'].values()
  assert len(margins) == 7 and all(m['clustered_by'] == 'policy' and m['low'] <= m['difference'] <= m['high'] for m in margins)
  assert sum(c['n'] for c in report['finetune']['by_category'].values()) == 40
  assert report['pretrain']['steps'] == 3 and report['pretrain']['tokens'] > 0 and 0.6 < report['pretrain']['loss'] < 0.8
  assert {'synthesize', 'pretrain_lm', 'pretrain', 'finetune', 'evaluate', 'rft', 'sweep', 'fit', 'total'} <= set(report['timing'])
  assert {'python', 'jax', 'devices'} <= set(report['environment'])


def test_tuning_towards_a_policy_is_reported(workdir):
  rft = json.loads((workdir / 'report.json').read_text())['rft']
  figures = ('reward', 'target_nll', 'relative_nll')
  lists = [rft[f'{figure}_{when}'] for figure in figures for when in ('before', 'after')] + [rft['kl']]
  assert len({target['name'] for target in rft['targets']}) == 2
  assert rft['seeds'] == 2 and all(len(values) == 2 and np.isfinite(values).all() for values in lists)
  assert set(rft['comparison']) == {'start', 'ppo', 'best_of_n', 'sft', 'target'}
  for seed in range(2):
    of = {name: {f: rft['comparison'][name][f][seed] for f in figures} for name in rft['comparison']}
    # The target's own text is the likeliest under its distribution, and best-of-n is chosen by the reward.
    assert of['target']['target_nll'] < min(of[name]['target_nll'] for name in ('start', 'ppo', 'best_of_n', 'sft'))
    assert of['target']['relative_nll'] < 0 and of['best_of_n']['reward'] >= of['start']['reward']
    assert rft['comparison']['start']['kl'][seed] == pytest.approx(0, abs=1e-5)
    assert all(abs(rft['comparison'][name]['kl'][seed]) > 1e-5 for name in ('ppo', 'sft'))  # an estimate, which may be negative


def test_the_control_of_ppo_has_references_by_other_policies(workdir):
  first, second = study._open(Context(small_config(), workdir, sharding.make_mesh(MeshConfig()), lambda _: None))
  assert first.target.name != second.target.name and first.reward is second.reward
  prompts = [prompt for prompt, _ in study._prompts(first, 'validation', 0)]
  assert len(prompts) > 30 and all(p.reference and p.other_reference for p in prompts)
  prefixes, own, other = (
    [np.asarray(ids, np.int32) for ids in first.tokenizer.encode_batch([str(getattr(p, name)) for p in prompts])]
    for name in ('prompt', 'reference', 'other_reference')
  )
  per_token = [pool.pool_logprobs([first.target], prefixes, texts)[0] / [len(ids) for ids in texts] for texts in (own, other)]
  assert np.mean(per_token[0] > per_token[1]) > 0.9  # the target would not have written the others
  report = json.loads((workdir / 'report.json').read_text())['rft']['comparison']
  assert all(np.isfinite(values['reward_other']).all() and values['reward_other'] != values['reward'] for values in report.values())
  assert any('shuffled' in json.loads(line) for line in (workdir / 'rft/seed_0/metrics.jsonl').read_text().splitlines())


def test_the_study_starts_from_a_language_model_of_the_miniature(workdir, tmp_path):
  def opened(policy):
    config = small_config()
    config = dataclasses.replace(config, rft=dataclasses.replace(config.rft, policy=policy))
    return study._open(Context(config, workdir, sharding.make_mesh(MeshConfig()), lambda _: None))

  assert opened(str(workdir / 'sweep' / '8x1_lm'))[0].model.d_model == 8
  with pytest.raises(ConfigError, match=r'rft\.policy .*/pretrain: has a reward head; only a language model can be a policy'):
    opened('pretrain')
  words = opened('pretrain_lm')[0].model
  other = dataclasses.replace(words, vocab_size=24)
  params = nnx.to_pure_dict(nnx.state(LanguageModel(other, rngs=nnx.Rngs(params=0)), nnx.Param))
  fields = {f'model.{name}': value for name, value in dataclasses.asdict(other).items()}
  checkpointer.save_params(tmp_path / 'other', params, {'objective': HEADS['lm'].objective, **fields})
  with pytest.raises(ConfigError, match=f'has a vocabulary of 24 tokens, and the miniature one of {words.vocab_size}; set rft.policy'):
    opened(str(tmp_path / 'other'))


def test_a_law_of_few_runs_is_reported_with_a_warning(workdir):
  scaling = json.loads((workdir / 'report.json').read_text())['scaling']
  assert all({'alpha', 'beta', 'r2', 'low', 'high'} <= set(scaling[law]) and scaling[law]['n'] == 3 for law in 'NC')
  assert scaling['sizes'] == 3 and '3 sizes prove nothing' in (workdir / 'report.md').read_text()
  # The size of the miniature itself starts from its language model.
  assert sorted(path.name for path in (workdir / 'sweep').glob('*_lm')) == ['32x1_lm', '8x1_lm']


def test_readable_report_and_figures(workdir):
  text = (workdir / 'report.md').read_text()
  for figure in ('accuracy', 'arms', 'loss', 'rft', 'scaling'):
    assert f'figures/{figure}.png' in text and (workdir / 'figures' / f'{figure}.png').stat().st_size > 5_000
  assert str(workdir) not in text and str(workdir) not in (workdir / 'report.json').read_text()


@pytest.mark.long
@pytest.mark.parametrize('stages', ['synthesize,pretrain,sweep,fit', pytest.param('all', marks=pytest.mark.slow)])
def test_a_second_run_repeats_no_work(workdir, stages, capsys):
  before = {p: p.read_bytes() for p in workdir.glob('**/metrics.jsonl')}
  report = json.loads((workdir / 'report.json').read_text())
  assert runner.run(small_config(stage=stages), workdir) == 0
  out = capsys.readouterr().out
  assert 'reusing the complete data' in out and 'pretrain: resumed from step 3 of 3' in out
  assert {p: p.read_bytes() for p in workdir.glob('**/metrics.jsonl')} == before
  again = json.loads((workdir / 'report.json').read_text())
  assert again['evaluate'] == report['evaluate'] and again['pretrain'] == report['pretrain']


def test_a_stage_alone_names_the_stage_it_needs(tmp_path, capsys):
  assert runner.run(small_config(stage='pretrain'), tmp_path) == 1
  error = capsys.readouterr().err
  assert error.startswith('polar_jax: ') and 'synthesize' in error and error.count('\n') == 1


def test_own_files_without_held_out_examples_are_refused(tmp_path, capsys):
  row = {name: name for name in ('prompt', 'reference', 'chosen', 'rejected')}
  (tmp_path / 'examples.jsonl').write_text(json.dumps(row) + '\n')
  config = miniature('mini_tiny', train_examples=300, preference_examples=64)
  config.stage = 'pretrain'
  config.tokenizer.kind = 'byte'
  config.pretrain.start_from = 'scratch'
  config.data.triplets = str(tmp_path / 'examples.jsonl')
  assert runner.run(parse(config), tmp_path / 'run') == 1
  assert 'data.validation must name held-out examples' in capsys.readouterr().err
