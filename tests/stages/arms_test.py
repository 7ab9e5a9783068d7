"""Arms of a workdir in the world of files: seeds, ablations, equal compute, and one table of all, with a language model of one layer."""

from __future__ import annotations

import functools
import gzip
import json
import pathlib
import re
import types

import jax
import nbformat
import numpy as np
import pytest
from flax import nnx
from nbclient import NotebookClient

import polar_jax
from polar_jax import api, runner, sharding
from polar_jax.config import ConfigError, MeshConfig, ModelConfig, default_config, parse
from polar_jax.data.examples import read_triplets
from polar_jax.data.tokenizer import ByteTokenizer
from polar_jax.evaluate.sets import EvaluationSet, Item, pair
from polar_jax.model.language_model import LanguageModel
from polar_jax.report import sections
from polar_jax.stages import arms, evaluate_arms
from polar_jax.stages.context import Context

SHAPE = ModelConfig(vocab_size=ByteTokenizer.vocab_size, num_layers=2, d_model=16, d_ff=16, num_heads=1, num_kv_heads=1, head_dim=16)
ARMS = [
  'pretrained_finetuned',
  'finetuned_only',
  'finetuned_without_reference',
  'pretrained_only',
  'finetuned_at_equal_compute',
]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A language model, and files of triplets and preferences."""
  folder, mesh = tmp_path_factory.mktemp('real'), sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  params = nnx.to_pure_dict(nnx.state(LanguageModel(SHAPE, rngs=nnx.Rngs(params=0)), nnx.Param))
  with jax.set_mesh(mesh):
    polar_jax.LanguageModel(params, SHAPE, ByteTokenizer(), mesh).save(folder / 'lm')
  rng = np.random.default_rng(0)
  triplets, ranked = [], []
  for i in range(40):
    a, b = rng.choice(['a', 'b', 'c'], 2, replace=False)
    runs = [f'{a}{i}{rng.integers(9)}' * 2 for _ in range(2)]
    triplets.append({'prompt': f'p{i}', 'policy_a': a, 'a1': runs[0], 'a2': runs[1] + '.', 'policy_b': b, 'b1': f'{b}{i}'})
    ranked.append({'prompt': f'p{i}', 'reference': f'{i}', 'chosen': f'{i}!', 'rejected': 'x', 'category': 'ab'[i % 2]})
  for name, rows in (('triplets', triplets), ('ranked', ranked)):
    (folder / f'{name}.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return folder


def config_of(folder, **changes):
  config = default_config()
  config.stage = 'synthesize,pretrain,finetune,evaluate'
  config.synthesize.update(
    {
      'world': 'files',
      'files': f'{folder}/triplets.jsonl,{folder}/ranked.jsonl',
      'unseen_share': 0.4,
      'validation_share': 0.2,
      'held_out_policies': 0.0,
      'evaluation_examples': 12,
    }
  )
  config.tokenizer.kind = 'checkpoint'
  config.pretrain.update({'start_from': str(folder / 'lm'), 'start_layers': 1, 'batch_size': 4, 'steps': 3, 'learning_rate': 1e-2})
  config.finetune.update({'start_from': 'pretrain', 'batch_size': 4, 'steps': 2, 'learning_rate': 1e-2})
  config.ablation_learning_rate = 2e-2
  config.evaluate.bootstrap = 200
  config.ablations, config.equal_compute, config.seeds = True, True, 2
  for name, value in changes.items():
    setattr(config, name, value)
  return parse(config)


@pytest.fixture(scope='module')
def workdir(folder):
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sharding, 'make_mesh', functools.partial(sharding.make_mesh, devices=jax.devices()[:1]))
    assert runner.run(config_of(folder), folder / 'run') == 0
  return folder / 'run'


@pytest.mark.long
def test_every_arm_and_seed_is_a_run_and_all_are_in_one_table(workdir):
  runs = {'pretrain', 'finetune_equal_compute', *(f'{arm}{seed}' for arm in ('finetune', 'finetune_only', 'finetune_no_reference')
          for seed in ('', '_seed_1'))}  # fmt: skip
  summaries = {run: json.loads((workdir / run / 'summary.json').read_text()) for run in runs}
  # Another seed is another order of the examples.
  assert summaries['finetune']['loss'] != summaries['finetune_seed_1']['loss']
  per_step = summaries['finetune_equal_compute']['tokens'] / summaries['finetune_equal_compute']['steps']
  total = summaries['pretrain']['tokens'] + summaries['finetune']['tokens']
  assert abs(summaries['finetune_equal_compute']['tokens'] - total) < 2 * per_step
  results = json.loads((workdir / 'evaluation' / 'evaluation.json').read_text())
  assert set(results['sets']) == {'triplets', 'ranked'}
  of_set = results['sets']['ranked']['arms']
  # Every run's rewards are kept, and are those that the table was made of.
  kept = {path.name for path in (workdir / 'evaluation').glob('scores_*')}
  assert kept == {f'scores_{run}.jsonl.gz' for run in runs}
  assert list(of_set) == ARMS == list(sections.ARMS) and [len(of_set[arm].get('by_seed', [0])) for arm in ARMS] == [2, 2, 2, 1, 1]
  report = (workdir / 'report.md').read_text()
  assert '### Arms' in report and 'finetuned_at_equal_compute' in report and 'Means over up to 2 seeds' in report


@pytest.mark.long
def test_arms_without_pretraining_have_a_rate_of_their_own(workdir):
  def rates(run):
    records = map(json.loads, (workdir / run / 'metrics.jsonl').read_text().splitlines())
    return [record['learning_rate'] for record in records if 'loss' in record]

  main = np.array(rates('finetune'))
  assert len(main) and max(main) > 0 and rates('finetune_seed_1') == main.tolist()
  assert np.allclose(rates('finetune_only'), 2 * main) and np.allclose(rates('finetune_no_reference_seed_1'), 2 * main)
  assert max(rates('finetune_equal_compute')) == pytest.approx(2e-2, rel=0.1) and max(rates('pretrain')) < 1.1e-2


@pytest.mark.long
def test_accuracies_of_the_arms_are_those_of_their_models(workdir):
  with gzip.open(workdir / 'data' / 'held_out' / 'ranked.jsonl.gz') as file:
    (workdir / 'ranked.jsonl').write_bytes(file.read())
  examples = list(read_triplets(workdir / 'ranked.jsonl'))
  found = json.loads((workdir / 'evaluation' / 'evaluation.json').read_text())['sets']['ranked']['arms']
  for arm, runs in {'pretrained_finetuned': ['finetune', 'finetune_seed_1'], 'pretrained_only': ['pretrain']}.items():
    shares = []
    for run in runs:
      model = api.load(workdir / run)
      rewards = np.array([model.score(e.prompt, e.reference, [e.chosen, e.rejected]) for e in examples])
      shares.append(float(np.mean((rewards[:, 0] > rewards[:, 1]) + 0.5 * (rewards[:, 0] == rewards[:, 1]))))
    assert found[arm]['accuracy'] == pytest.approx(np.mean(shares))
    assert found[arm].get('by_seed', shares) == pytest.approx(shares)


def rewards_of(path):
  with gzip.open(path, 'rt') as file:
    return {(line['set'], line['id']): line['rewards'] for line in map(json.loads, file)}


@pytest.mark.long
def test_arms_may_score_fewer_items_than_the_first_one(folder, workdir, tmp_path):
  config = config_of(folder, stage='evaluate', output=str(tmp_path / 'few'))
  config.evaluate.__dict__['arm_items'] = 5
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sharding, 'make_mesh', functools.partial(sharding.make_mesh, devices=jax.devices()[:1]))
    assert runner.run(config, workdir) == 0
  few, whole = (json.loads((at / 'evaluation.json').read_text())['sets'] for at in (tmp_path / 'few', workdir / 'evaluation'))
  for name, one in few.items():
    assert one['accuracy'] == whole[name]['accuracy'] and one['n'] > 5
    assert {arm['n'] for arm in one['arms'].values()} == {5}
  some, every = (rewards_of(at / 'scores_finetune_only.jsonl.gz') for at in (tmp_path / 'few', workdir / 'evaluation'))
  assert 'a random part of each set' in (workdir / 'report.md').read_text()
  assert len(some) == 5 * len(few) and all(np.allclose(every[key], rewards, atol=1e-5) for key, rewards in some.items())


@pytest.mark.long
def test_arms_may_score_some_of_the_sets(folder, workdir, tmp_path):
  config = config_of(folder, stage='evaluate', output=str(tmp_path / 'some'))
  config.evaluate.__dict__['arm_sets'] = 'ranked'
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sharding, 'make_mesh', functools.partial(sharding.make_mesh, devices=jax.devices()[:1]))
    assert runner.run(config, workdir) == 0
  some, whole = (json.loads((at / 'evaluation.json').read_text()) for at in (tmp_path / 'some', workdir / 'evaluation'))
  assert some['sets']['ranked'] == whole['sets']['ranked'] and 'arms' not in some['sets']['triplets']
  assert whole['paired_tests'] - some['paired_tests'] == len(ARMS) - 1
  assert {of for of, _ in rewards_of(tmp_path / 'some' / 'scores_finetune_only.jsonl.gz')} == {'ranked'}
  assert {of for of, _ in rewards_of(tmp_path / 'some' / 'scores.jsonl.gz')} == {'ranked', 'triplets'}
  assert '### Arms' in (workdir / 'report.md').read_text()


@pytest.mark.long
def test_equal_compute_needs_the_end_of_pre_training(folder, tmp_path, capsys):
  assert runner.run(config_of(folder, stage='synthesize,finetune', ablations=False), tmp_path / 'run') == 1
  assert 'equal_compute: needs the tokens of pre-training in' in capsys.readouterr().err


def test_what_evaluation_needs_is_checked_before_the_first_stage(folder, tmp_path, capsys):
  config = config_of(folder)
  config.evaluate.__dict__['benchmarks'] = 'rmb'
  assert runner.run(config, tmp_path / 'run') == 1
  assert 'evaluate.folder is not set' in capsys.readouterr().err and not (tmp_path / 'run' / 'data').exists()
  config = config_of(folder)
  config.evaluate.__dict__['arm_sets'] = 'ranked,other'
  assert runner.run(config, tmp_path / 'run') == 1
  message = "evaluate.arm_sets: there is no set 'other'; name some of: triplets, ranked, triplets_unseen_policies, ranked_unseen_policies"
  assert message in capsys.readouterr().err and not (tmp_path / 'run' / 'data').exists()
  assert runner.run(config_of(folder, stage='evaluate'), tmp_path / 'empty') == 1
  assert 'has no held-out rows; run the stage synthesize in this workdir first' in capsys.readouterr().err


def test_an_arm_reads_no_reference_where_the_main_one_does_not(monkeypatch):
  asked = []

  class Model:
    def __init__(self, *arguments):
      pass

    def rewards(self, items, references, use_reference):
      asked.append((list(references), use_reference))
      return [np.zeros(2) for _ in items]

  monkeypatch.setattr(evaluate_arms.systems, 'RewardSystem', Model)
  one = EvaluationSet('set', [Item('1', 'p', ('a', 'b'), pair(), '', 'r')])
  context = types.SimpleNamespace(log=lambda line: None, home=str)
  for view, use in (('none', False), ('true', True)):
    task = evaluate_arms.Task(one, view, ['x'], [np.ones(2)])
    found = evaluate_arms.score(context, {'main': ['a'], 'other': ['b']}, [task])
    assert asked.pop() == (['x'], use) and not asked
    assert [arm.by_set['set'][0][0].tolist() for arm in found] == [[1.0, 1.0], [0.0, 0.0]]


def test_means_over_seeds_and_paired_differences(monkeypatch):
  items = [Item(str(i), f'p{i}', ('good', 'bad'), pair(), 'ab'[i % 2], 'r') for i in range(6)]
  right = lambda flags: [np.array([1.0, 0.0]) if flag == '1' else np.array([0.0, 1.0]) if flag == '0' else np.zeros(2) for flag in flags]
  one = EvaluationSet('set', items)
  given = {'main': ['111100', '1111=0'], 'other': ['000111']}
  scored = [evaluate_arms.ArmRewards(name, [name], {'set': list(map(right, seeds))}) for name, seeds in given.items()]
  context = Context(parse(default_config()), None, None, print)
  found = evaluate_arms.measure(context, one, scored)
  assert found['main']['by_seed'] == [4 / 6, 4.5 / 6] and found['main']['accuracy'] == pytest.approx(4.25 / 6)
  assert 'by_seed' not in found['other'] and 'main_minus' not in found['main']
  assert found['other']['main_minus']['difference'] == pytest.approx((4.25 - 3) / 6)
  assert {name: entry['accuracy'] for name, entry in found['main']['by_category'].items()} == pytest.approx({'a': 2.25 / 3, 'b': 2 / 3})


def test_names_of_the_runs_of_seeds():
  assert [arms.seed_run('finetune', seed) for seed in range(3)] == ['finetune', 'finetune_seed_1', 'finetune_seed_2']


def test_the_tokenizer_of_a_run_is_that_of_what_it_starts_from(folder, tmp_path):
  config = config_of(folder)
  context = Context(config, tmp_path, None, print)
  assert context.checkpoint('finetune_seed_2') == tmp_path / 'finetune_seed_2' and context.tokenizer('finetune_seed_2')
  assert context.checkpoint('finetune_seed_0').name == 'finetune_seed_0' != context.checkpoint('finetune_seed_0')
  assert context.tokenizer('finetune').vocab_size == context.tokenizer('pretrain').vocab_size == ByteTokenizer.vocab_size
  config.pretrain.__dict__['start_from'] = 'finetune'  # a circle
  with pytest.raises(ConfigError, match='no checkpoint is named'):
    Context(config, tmp_path, None, print).tokenizer('finetune')


@pytest.mark.long
def test_the_notebook_shows_a_workdir_and_no_text_of_its_rows(workdir, monkeypatch):
  monkeypatch.setenv('REAL_WORKDIR', str(workdir))
  monkeypatch.setenv('XLA_FLAGS', '')
  notebooks = pathlib.Path(__file__).parents[2] / 'notebooks'
  notebook = nbformat.read(notebooks / 'real.ipynb', as_version=4)
  for cell in notebook.cells:
    cell.pop('outputs', None)
  NotebookClient(notebook, timeout=120, kernel_name='python3', resources={'metadata': {'path': str(notebooks)}}).execute()
  outputs = [output for cell in notebook.cells for output in cell.get('outputs', [])]
  assert len([output for output in outputs if 'image/png' in output.get('data', {})]) == 2
  printed = ''.join(output['text'] for output in outputs if output['output_type'] == 'stream')
  results = json.loads((workdir / 'evaluation' / 'evaluation.json').read_text())['sets']
  for name, one in results.items():
    assert f'{name:36} {one["accuracy"]:.3f} [{one["low"]:.3f}, {one["high"]:.3f}]' in printed
  assert re.search(r'^ +-?\d+\.\d+  (ranked|triplets)/\d+ ', printed, re.MULTILINE)
  with gzip.open(workdir / 'data' / 'held_out' / 'ranked.jsonl.gz', 'rt') as file:
    assert not any(f'prompt: {json.loads(line)["prompt"]}' in printed for line in file)
