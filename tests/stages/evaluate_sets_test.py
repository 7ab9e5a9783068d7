"""The evaluate stage on a user's files and on benchmarks: by a model, and by recorded rewards."""

from __future__ import annotations

import gzip
import json
import re
import runpy

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from flax import nnx

import polar_jax
from polar_jax import runner, sharding
from polar_jax.config import MeshConfig, ModelConfig, TemplateConfig, parse
from polar_jax.data.tokenizer import ByteTokenizer
from polar_jax.evaluate import hub
from polar_jax.evaluate.sets import Item, pair
from polar_jax.model.language_model import LanguageModel
from polar_jax.model.reward_model import RewardModel
from polar_jax.policies.batched import BatchedPolicy
from polar_jax.stages import evaluate_sets, evaluate_systems

SHAPE = ModelConfig(
  vocab_size=ByteTokenizer.vocab_size, num_layers=1, d_model=16, d_ff=16, num_heads=1, num_kv_heads=1, head_dim=16, init_std=0.3
)
CONFIG = 'configs/evaluate.py'
FILES = {
  'pairs.jsonl': [
    {'prompt': f'p{i % 4}', 'reference': f'r{i}', 'chosen': f'c{i}', 'rejected': 'x' * (1 + i % 3), 'category': 'ab'[i % 2]}
    for i in range(8)
  ],
  'lists.jsonl': [
    {'id': 'first', 'prompt': 'p', 'reference': 'r', 'candidates': ['a', 'b', 'c'], 'ranks': [2, 1, 3]},
    {'prompt': [{'role': 'user', 'content': 'q'}], 'reference': 's', 'candidates': ['a', 'b', 'c'], 'correct': [True, False, True]},
  ],
}


@pytest.fixture(scope='module')
def world(tmp_path_factory):
  """A folder with a reward model, a language model and files of examples."""
  folder, mesh = tmp_path_factory.mktemp('world'), sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  reward, language = (RewardModel, polar_jax.RewardModel), (LanguageModel, polar_jax.LanguageModel)
  for seed, (name, (kind, api)) in enumerate({'reward': reward, 'second': reward, 'lm': language}.items()):
    model = kind(SHAPE, rngs=nnx.Rngs(params=3))
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    if kind is RewardModel:  # a new head is zero
      params['v_head'] = jax.random.normal(jax.random.key(seed), params['v_head'].shape)
    with jax.set_mesh(mesh):
      api(params, SHAPE, ByteTokenizer(), mesh).save(folder / name)
  for name, rows in FILES.items():
    (folder / name).write_text('\n'.join(map(json.dumps, rows)))
  return folder


@pytest.fixture(autouse=True)
def laptop(monkeypatch):
  devices = jax.devices()[:1]
  make = sharding.make_mesh
  monkeypatch.setattr(sharding, 'make_mesh', lambda config: make(config, devices))


def config_of(tmp_path, **settings):
  config = runpy.run_path(CONFIG)['get_config']()
  given = {'output': str(tmp_path / 'out'), 'evaluate.bootstrap': 100, **settings}
  for name, value in given.items():
    section, _, option = name.rpartition('.')
    setattr(getattr(config, section) if section else config, option, value)
  return parse(config)


def run(tmp_path, world, **settings):
  """Run the stage; return its exit status, its results and its lines of scores."""
  status = runner.run(config_of(tmp_path, **settings), tmp_path / 'run')
  if not (tmp_path / 'out/evaluation.json').exists():
    return status, {}, []
  files = sorted((tmp_path / 'out').glob('scores*.jsonl.gz'))
  lines = [line for file in files for line in gzip.decompress(file.read_bytes()).decode().splitlines()]
  result = json.loads((tmp_path / 'out/evaluation.json').read_text())
  tested = [(*found['baselines'].values(), *found.get('compare', {}).values()) for found in result['sets'].values()]
  assert result['paired_tests'] == sum(map(len, tested))
  return status, result['sets'], [json.loads(line) for line in lines]


@pytest.fixture
def root(monkeypatch, request):
  monkeypatch.chdir(request.config.rootpath)


@pytest.mark.long
@pytest.mark.usefixtures('root')
def test_a_model_on_own_files(tmp_path, world):
  files = ','.join(str(world / name) for name in FILES)
  variants = 'true,none,empty,shuffled,twin'
  status, sets, lines = run(tmp_path, world, checkpoint=str(world / 'reward'), input=files, **{'evaluate.references': variants})
  assert status == 0 and list(sets) == ['pairs', 'lists'] and len(lines) == 5 * (8 + 2)
  model = polar_jax.load(world / 'reward')
  blind = polar_jax.load(world / 'reward', template=TemplateConfig(use_reference=False))
  for line in lines:
    rows = FILES[f'{line["set"]}.jsonl']
    row = next(r for i, r in enumerate(rows, start=1) if line['id'] == str(r.get('id', i)))
    candidates = row.get('candidates') or [row['chosen'], row['rejected']]
    best = {'first': 'b', '2': 'a'}[line['id']] if line['set'] == 'lists' else row['chosen']
    reference = {'true': row['reference'], 'none': '', 'empty': '', 'twin': best}.get(line['reference'])
    if reference is not None:
      expected = (blind if line['reference'] == 'none' else model).score(row['prompt'], reference, candidates)
      np.testing.assert_allclose(line['rewards'], expected, atol=1e-5)
  pairs = sets['pairs']
  assert pairs['n'] == 8 and pairs['clusters'] == 4 and pairs['clustered_by'] == 'prompt' and pairs['reference'] == 'true'
  right = [line['rewards'][0] > line['rewards'][1] for line in lines if line['set'] == 'pairs' and line['reference'] == 'true']
  assert pairs['accuracy'] == np.mean(right) and set(pairs['by_category']) == {'a', 'b'}
  assert list(pairs['references']) == variants.split(',') and pairs['references']['true']['accuracy'] == pairs['accuracy']
  assert {'length', 'overlap_1', 'tfidf', 'bm25', 'longest', 'random'} == set(pairs['baselines']) - {'overlap_2', 'overlap_3'}
  assert (
    pairs['duplicates'] == {'items': 0, 'of': {}}
    and pairs['official'] is None
    and pairs['margin_over_best_baseline']['baseline'] != 'random'
  )
  assert sets['lists']['n'] == 3 + 2 and sets['lists']['best_of_n']['n'] == [1, 2, 3]
  report = json.loads((tmp_path / 'run/report.json').read_text())
  assert report['evaluation']['sets'] == sets
  text = (tmp_path / 'run/report.md').read_text()
  assert '## Evaluation' in text and '| pairs |' in text and 'shuffled' in text and str(world) not in text


@pytest.mark.usefixtures('root')
def test_a_part_of_a_set_is_drawn_by_its_name(tmp_path, world, capsys):
  settings = {'checkpoint': str(world / 'reward'), 'input': ','.join(str(world / name) for name in FILES)}
  some, every = [run(tmp_path / str(items), world, **settings, **{'evaluate.max_items': items}) for items in (3, 8)]
  assert 'pairs: 3 items of 8, drawn at random (evaluate.max_items)' in capsys.readouterr().out
  assert [found['items'] for found in some[1].values()] == [3, 2] and [found['items'] for found in every[1].values()] == [8, 2]
  assert [found.get('drawn_from') for found in (*some[1].values(), *every[1].values())] == [8, None, None, None]
  of_all = {(line['set'], line['id']): line['rewards'] for line in every[2]}
  assert len(some[2]) == 5 and all(np.allclose(of_all[line['set'], line['id']], line['rewards'], atol=1e-5) for line in some[2])
  report = (tmp_path / '3' / 'run' / 'report.md').read_text()
  assert 'pairs is a random part of its set: 3 of 8 items' in report and 'lists is a random part' not in report


@pytest.mark.long
@pytest.mark.usefixtures('root')
def test_results_can_be_computed_again_and_compared(tmp_path, world):
  files = ','.join(str(world / name) for name in FILES)
  _, sets, _ = run(tmp_path / 'a', world, checkpoint=str(world / 'reward'), input=files, **{'evaluate.references': 'true,shuffled'})
  own, other = (tmp_path / f'a/out/{name}.jsonl.gz' for name in ('scores', 'scores_shuffled'))
  (tmp_path / 'train.jsonl').write_text(json.dumps({'text': 'P2?'}))
  given = {'evaluate.scores': str(own), 'evaluate.compare': str(other), 'evaluate.training': str(tmp_path / 'train.jsonl')}
  status, again, lines = run(tmp_path / 'b', world, input=files, **given)
  assert status == 0
  text = (tmp_path / 'b/run/report.md').read_text()
  assert '2 of 8 prompts of pairs are in the training files; accuracy without them: ' in text
  rows = [json.loads(line) for line in gzip.decompress(other.read_bytes()).decode().splitlines()]
  pq.write_table(pa.Table.from_pylist([{name: row[name] for name in ('set', 'id', 'rewards')} for row in rows]), tmp_path / 'same.parquet')
  _, of_table, _ = run(tmp_path / 'c', world, input=files, **given | {'evaluate.compare': str(tmp_path / 'same.parquet')})
  for name, found in again.items():
    assert of_table[name]['compare']['same.parquet'] == found['compare']['scores_shuffled.jsonl.gz']
  assert 'points from scores\\_shuffled.jsonl.gz' in text.replace('scores_shuffled', 'scores\\_shuffled')
  assert f'There are {2 * (8 + 1)} paired tests in all' in text
  rewards = {line['id']: line['rewards'] for line in lines if line['set'] == 'pairs'}
  places = again['pairs']['contamination']['places']
  assert places == {'3': 'train.jsonl, row 1', '7': 'train.jsonl, row 1'} and again['lists']['contamination']['items'] == 0
  right = [a > b for name, (a, b) in rewards.items() if name not in places]
  assert again['pairs']['contamination']['without']['accuracy'] == np.mean(right) and len(right) == 6
  of_run = ('reference', 'references', 'contamination', 'truncated', 'best_of_n')
  for name, found in again.items():
    compared = found.pop('compare')['scores_shuffled.jsonl.gz']
    assert compared['difference'] == pytest.approx(found['accuracy'] - sets[name]['references']['shuffled']['accuracy'])
    assert {k: v for k, v in found.items() if k not in of_run} == {k: v for k, v in sets[name].items() if k not in of_run}


@pytest.mark.long
@pytest.mark.usefixtures('root')
def test_right_and_wrong_answers_as_references_and_second_systems(tmp_path, world):
  rows = [
    {'prompt': f'p{i}', 'prompt_id': i, 'reference': f'g{i} three four five', 'response': f'{"yn"[k % 2]} {i} {k}', 'correct': k % 2 == 0}
    for i in range(5)
    for k in range(6 if i else 3)  # too few of the first
  ]
  (tmp_path / 'answers.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  (tmp_path / 'given.jsonl').write_text('\n'.join(json.dumps({'id': i, 'reference': f'other {i}'}) for i in range(5)))
  given = {
    'checkpoint': str(world / 'reward'),
    'input': str(tmp_path / 'answers.jsonl'),
    'evaluate.references': 'true,right,wrong,degraded,empty,file,style',
    'evaluate.reference_file': str(tmp_path / 'given.jsonl'),
    'evaluate.compare': str(world / 'second'),
    'evaluate.language_model': str(world / 'lm'),
  }
  status, sets, lines = run(tmp_path, world, **given)
  found = sets['answers']
  names = ['true', 'right', 'wrong', 'degraded_75', 'degraded_50', 'degraded_25', 'empty', 'file']
  assert status == 0 and list(found['references']) == names and found['skipped'] == 1 and found['items'] == 4
  assert [point['words_kept'] for point in found['reference_curve']] == [100, 75, 50, 25, 0]
  assert list(found['best_of_n']['references']) == names and found['best_of_n']['n'] == [1, 2, 3, 4]
  model, second = (polar_jax.load(world / name) for name in ('reward', 'second'))
  held = []
  for line in lines:
    texts = [row['response'] for row in rows if row['prompt_id'] == int(line['id'])]
    if line['reference'] == 'right':  # a right and a wrong answer are held out, and the right one is the reference
      fits = []
      for a, text in enumerate(texts):
        for b in range(len(texts)):
          left = [t for k, t in enumerate(texts) if k not in (a, b)]
          if a % 2 == 0 and b % 2 == 1 and np.allclose(model.score(f'p{line["id"]}', text, left), line['rewards'], atol=1e-5):
            fits.append(left)
      assert len(fits) == 1
      held += [(line['id'], fits[0])]
  for name, left in held:
    reference = f'g{name} three four five'
    of_true = next(line['rewards'] for line in lines if (line['id'], line['reference']) == (name, 'true'))
    np.testing.assert_allclose(of_true, model.score(f'p{name}', reference, left), atol=1e-5)
  right = []
  for name, left in held:
    scores = second.score(f'p{name}', f'g{name} three four five', left)
    right += [float(scores[a] > scores[b]) for a in range(4) for b in range(4) if left[a][0] == 'y' and left[b][0] == 'n']
  compared = found['compare']['second']
  assert len(right) == found['n'] == 16 and compared['other']['accuracy'] == np.mean(right)
  assert compared['difference'] == pytest.approx(found['accuracy'] - np.mean(right))
  ratio = found['baselines']['likelihood_ratio']
  assert ratio['paired']['difference'] == pytest.approx(found['accuracy'] - ratio['accuracy'])
  assert found['truncated']['responses'] == found['truncated']['prompts'] == 0
  report = (tmp_path / 'run/report.html').read_text()
  assert {path.stem for path in (tmp_path / 'run/figures').iterdir()} == {'evaluation', 'calibration', 'best_of_n', 'reference_curve'}
  assert report.count('<img') == 4


def test_the_likelihood_ratio_is_that_of_single_sequences(world):
  model, lines = polar_jax.load(world / 'lm'), []
  made = lambda i, *candidates: Item(str(i), f'p{i}', candidates, pair(), reference=f'r{i} and more')
  items = [made(0, 'a b', '', 'longer text'), made(1, 'a b', 'c')]
  found = evaluate_systems.likelihood_ratio(items, BatchedPolicy(model), lines.append)
  for i, item in enumerate(items):
    for candidate, ratio in zip(item.candidates, found[i], strict=True):
      contexts = [f'p{i}\nr{i} and more\n\np{i}', f'p{i}']
      logp = [float(model.logprobs([context], [f'\n{candidate}'])[0].sum()) for context in contexts]
      assert ratio == pytest.approx(logp[0] - logp[1], abs=1e-4)
  assert np.ptp(np.concatenate(found)) > 0.01 and not lines
  evaluate_systems.likelihood_ratio(items, BatchedPolicy(model, max_length=16), lines.append)
  assert lines == ['likelihood_ratio: the beginning of 5 of 10 contexts was cut to the 16 tokens of the model']


@pytest.mark.usefixtures('root')
def test_items_without_a_reference_in_the_file_are_left_out_on_request(tmp_path, world):
  (tmp_path / 'given.jsonl').write_text('{"id": "3", "reference": "x"}')
  given = {'input': str(world / 'pairs.jsonl'), 'evaluate.references': 'file', 'evaluate.reference_file': str(tmp_path / 'given.jsonl')}
  (all_items,) = evaluate_sets.read_sets(config_of(tmp_path, **given))
  assert len(all_items.items) == 8 and not all_items.skipped  # the variant is refused later, with the number of those that lack one
  (some,) = evaluate_sets.read_sets(config_of(tmp_path, **given, **{'data.on_bad_example': 'skip'}))
  assert [item.id for item in some.items] == ['3'] and len(some.skipped) == 7


@pytest.mark.usefixtures('root')
def test_texts_that_the_model_reads_only_in_part_are_counted(tmp_path, world):
  rows = [FILES['pairs.jsonl'][0], FILES['pairs.jsonl'][1] | {'rejected': 'long ' * 40}]
  (tmp_path / 'rows.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  settings = {'checkpoint': str(world / 'reward'), 'input': str(tmp_path / 'rows.jsonl'), 'template.max_response_length': 20}
  status, sets, _ = run(tmp_path, world, **settings)
  assert status == 0 and sets['rows']['truncated']['responses'] == 1 and sets['rows']['truncated']['ids'] == {'responses': ['2']}
  assert 'reads only a part of the responses of 1 of 2 items' in (tmp_path / 'run/report.md').read_text()


@pytest.mark.usefixtures('root')
def test_recorded_rewards_of_a_benchmark(tmp_path, world, monkeypatch):
  rows = [{'pair_id': f'id{i}', 'source': 'mmlu-pro-law', 'question': f'q{i}', 'response_A': 'a', 'response_B': 'b'} for i in range(4)]
  (tmp_path / 'published/judgebench/data').mkdir(parents=True)
  lines = [json.dumps(row | {'label': 'A>B', 'response_model': model}) for row, model in zip(rows, 'aaab', strict=True)]
  (tmp_path / 'published/judgebench/data/x.jsonl').write_text('\n'.join(lines))
  scores = [{'id': f'id{i}', 'rewards': [i, 1]} for i in range(3)]
  (tmp_path / 'scores.jsonl').write_text('\n'.join(map(json.dumps, scores)))
  settings = {'evaluate.benchmarks': 'judgebench', 'evaluate.folder': 'hub'}
  monkeypatch.setattr(hub, 'download', lambda _: {'ScalerLab/JudgeBench': tmp_path / 'published/judgebench'})
  status, sets, _ = run(tmp_path, world, **settings, **{'evaluate.scores': str(tmp_path / 'scores.jsonl')})
  assert status == 0 and list(sets) == ['judgebench'] and sets['judgebench']['ties'] == 1
  assert sets['judgebench']['revisions'] == {'ScalerLab/JudgeBench': 'judgebench'}
  assert sets['judgebench']['official'] == pytest.approx({'knowledge': 100 / 3, 'all': 100 / 3})
  assert sets['judgebench']['tie_rules'] == pytest.approx({'wrong': 1 / 3, 'half': 1 / 2, 'right': 2 / 3})
  settings['evaluate.folder'] = str(tmp_path / 'published')
  status, sets, _ = run(tmp_path / 'model', world, **settings, checkpoint=str(world / 'reward'))
  assert status == 0 and [found['reference'] for found in sets.values()] == ['empty', 'empty']  # there are no references


@pytest.mark.usefixtures('root')
def test_the_categories_of_the_paper(tmp_path, world):
  file = tmp_path / 'published/rmb/Pairwise_set/Helpfulness/Chat/A.json'
  file.parent.mkdir(parents=True)
  answers = {name: {'llm_name': name, 'answer': name} for name in 'abc'}
  asked = {'conversation_input': [{'role': 'user', 'content': 'p'}]}
  pairs = [{'pair_uid': better + worse, 'chosen': answers[better], 'reject': answers[worse]} | asked for better, worse in ('ab', 'bc')]
  file.write_text(json.dumps(pairs))
  (tmp_path / 'scores.jsonl').write_text(json.dumps({'id': 'pairwise/bc', 'rewards': [1, 0]}))
  given = {'evaluate.benchmarks': 'polar_rmb', 'evaluate.folder': str(tmp_path / 'published')}
  status, sets, _ = run(tmp_path, world, **given, **{'evaluate.scores': str(tmp_path / 'scores.jsonl')})
  found = {row['category']: row['accuracy'] for row in sets['polar_rmb']['paper']}
  assert status == 0 and found['Chat'] == found['Average'] == 1.0 and found['Coding'] is None
  assert '| Chat | 100.0 [' in (tmp_path / 'run/report.md').read_text()


@pytest.mark.usefixtures('root')
@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'output': None}, 'output is not set'),
    ({'input': None}, 'output is set, but there is no data to evaluate on: name files with input, or benchmarks'),
    ({'input': None, 'output': None, 'evaluate.scores': 'x'}, 'evaluate.scores is set, but there is no data to evaluate on'),
    ({'output': 'IN/pairs.jsonl'}, 'is a file; name a folder'),
    ({'checkpoint': None}, 'checkpoint is not set: name a reward model .* or recorded rewards'),
    ({'checkpoint': 'IN/lm'}, "is not a reward model, but a model with the head 'lm'"),
    ({'checkpoint': 'IN/nothing'}, 'IN/nothing: no such file or folder'),
    ({'input': 'IN/pairs.jsonl,IN/nothing.jsonl'}, 'nothing.jsonl: no such file'),
    ({'input': 'IN/pairs.jsonl,IN/again/pairs.jsonl'}, "two sets are named 'pairs'; rename a file"),
    ({'input': 'IN/bad.jsonl'}, 'bad.jsonl, example 2: field .rejected. is missing'),
    ({'evaluate.references': 'style,true'}, "'style' is several references, and cannot be the first"),
    ({'evaluate.references': 'true,file'}, "'file' needs references; name a file with --config.evaluate.reference_file=FILE"),
    ({'evaluate.reference_file': 'IN/other.jsonl'}, "other.jsonl, row 1: field 'reference' is missing; a row must be"),
    ({'evaluate.reference_file': 'IN/known.jsonl'}, 'known.jsonl: none of its 1 ids is of an item of pairs'),
    ({'evaluate.near_duplicates': 0.5}, 'evaluate.near_duplicates is set, but there is nothing to search'),
    ({'evaluate.compare': 'IN/lm'}, "evaluate.compare .*IN/lm: is not a reward model, but a model with the head 'lm'"),
    ({'evaluate.compare': 'IN/reward,IN/./reward'}, 'evaluate.compare: two systems would be named .*reward'),
    ({'evaluate.language_model': 'IN/reward'}, 'evaluate.language_model .*: is not a language model, but a model with the head .reward.'),
    ({'evaluate.embedding': 'IN'}, "evaluate.embedding needs sentence-transformers; install it with: pip install 'polar_jax.embedding.'"),
    ({'evaluate.max_items': 2, 'evaluate.compare': 'IN/other.jsonl'}, 'evaluate.max_items is set, but .*other.jsonl has recorded rewards'),
    ({'evaluate.max_items': 2, 'evaluate.scores': 'IN/other.jsonl'}, 'evaluate.max_items is set, but .*other.jsonl has recorded rewards'),
    ({'evaluate.arm_sets': 'pairs,other'}, "evaluate.arm_sets: there is no set 'other'; name some of: pairs"),
    ({'evaluate.references': 'true,other'}, "evaluate.references: 'other' is unknown; name some of: true, none"),
    ({'evaluate.references': ' , '}, 'evaluate.references: is empty'),
    ({'evaluate.benchmarks': 'rmb'}, 'evaluate.folder is not set'),
    ({'evaluate.benchmarks': 'rmb', 'evaluate.folder': 'IN'}, 'rmb: no such folder'),
    ({'evaluate.scores': 'IN/nothing.jsonl'}, 'nothing.jsonl: no such file'),
    ({'evaluate.compare': 'IN/other.jsonl', 'checkpoint': 'IN/nothing'}, r'1 of 1 ids are of no item of pairs'),
    ({'input': 'IN/same.jsonl', 'evaluate.references': 'shuffled', 'checkpoint': 'IN/nothing'}, 'all items have the same prompt'),
  ],
)
def test_bad_settings_are_one_line_and_write_nothing(tmp_path, world, settings, message, capsys):
  (world / 'again').mkdir(exist_ok=True)
  (world / 'known.jsonl').write_text('{"id": "other", "reference": "r"}')
  (world / 'other.jsonl').write_text('{"id": "other", "rewards": [1, 2]}')
  (world / 'same.jsonl').write_text(json.dumps(FILES['pairs.jsonl'][0]))
  (world / 'again/pairs.jsonl').write_bytes((world / 'pairs.jsonl').read_bytes())
  (world / 'bad.jsonl').write_text(json.dumps(FILES['pairs.jsonl'][0]) + '\n' + json.dumps({'prompt': 'p', 'chosen': 'c'}))
  given = {'checkpoint': str(world / 'reward'), 'input': str(world / 'pairs.jsonl')} | settings
  given = {name: value.replace('IN', str(world)) if isinstance(value, str) else value for name, value in given.items()}
  status, sets, _ = run(tmp_path, world, **given)
  error = capsys.readouterr().err
  assert status == 1 and not sets and not (tmp_path / 'out').exists()
  assert error.startswith('polar_jax: ') and error.count('\n') == 1
  assert re.search(message.replace('IN', re.escape(str(world))), error), error


ROW = {'prompt': 'p', 'reference': 'r', 'candidates': ['a', 'b']}


@pytest.mark.usefixtures('root')
@pytest.mark.parametrize(
  ('row', 'message'),
  [
    (ROW, 'a row needs chosen and rejected, candidates and ranks, candidates and correct, or response and correct'),
    ({'prompt': 'p'}, 'a row needs chosen and rejected'),
    (ROW | {'candidates': ['a'], 'ranks': [1]}, 'candidates must be a list of at least two texts'),
    (ROW | {'candidates': ['a', 3], 'ranks': [1, 2]}, r'candidates\[1\]'),
    (ROW | {'ranks': [1]}, 'ranks must be a list of numbers, one for each of the 2 candidates'),
    (ROW | {'ranks': [1, '2']}, 'ranks must be a list of numbers'),
    (ROW | {'ranks': [1, 1]}, 'all ranks are equal'),
    (ROW | {'correct': [True, 1]}, 'correct must be a list of true or false'),
    (ROW | {'correct': [False, False]}, 'all candidates are wrong'),
    (ROW | {'correct': [True, False], 'category': 3}, 'category must be a string'),
    (ROW | {'correct': [True, False], 'id': 1.5}, 'id must be a string or an integer'),
    (ROW | {'correct': [True, False], 'reference': 3}, 'reference'),
    (ROW | {'correct': [True, False], 'wrapper': 'x'}, 'wrapper'),
    (ROW | {'correct': [True, False], 'answers': ['3', True]}, 'answers must be a list of strings, numbers or null'),
    (ROW | {'correct': [True, False], 'answers': ['3']}, 'answers must be a list of strings, numbers or null'),
    ({'prompt': 'p', 'response': 'a', 'correct': 1}, 'correct must be true or false'),
    ({'prompt': 'p', 'response': 3, 'correct': True}, 'response'),
    ({'prompt': 'p', 'response': 'a', 'correct': True, 'prompt_id': 0.5}, 'prompt_id must be a string or an integer'),
  ],
)
def test_bad_rows_are_named_or_counted(tmp_path, world, row, message, capsys):
  (tmp_path / 'rows.jsonl').write_text(json.dumps(FILES['pairs.jsonl'][0]) + '\n' + json.dumps(row) + '\n')
  given = {'checkpoint': str(world / 'reward'), 'input': str(tmp_path / 'rows.jsonl')}
  status, sets, _ = run(tmp_path, world, **given)
  error = capsys.readouterr().err
  assert status == 1 and not sets and re.search(rf'rows.jsonl, example 2: {message}', error), error
  (found,) = evaluate_sets.read_sets(config_of(tmp_path, **given, **{'data.on_bad_example': 'skip'}))
  assert len(found.items) == 1 and len(found.skipped) == 1
  assert re.fullmatch('rows.jsonl, row 2', found.skipped[0][0]) and re.search(message, found.skipped[0][1])


@pytest.mark.usefixtures('root')
def test_bad_rows_can_be_left_out_and_are_counted(tmp_path, world, capsys):
  (tmp_path / 'rows.jsonl').write_text(json.dumps(FILES['pairs.jsonl'][0]) + '\n' + json.dumps(ROW) + '\n')
  given = {'checkpoint': str(world / 'reward'), 'input': str(tmp_path / 'rows.jsonl'), 'data.on_bad_example': 'skip'}
  status, sets, lines = run(tmp_path, world, **given)
  assert status == 0 and sets['rows']['skipped'] == 1 and len(lines) == 1
  out = capsys.readouterr().out
  assert 'left out 1 bad rows (rows.jsonl, row 2: a row needs' in out and 'reads only a part' not in out
