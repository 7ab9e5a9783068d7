"""Published files from the hub: a stand-in for its download, with the names of files and folders that the hub has."""

from __future__ import annotations

import json
import re
import sys
import types

import pyarrow
import pytest
from pyarrow import parquet

from polar_jax.config import default_config, parse
from polar_jax.evaluate import benchmarks, hub
from polar_jax.stages import evaluate_sets
from polar_jax.types import UserError

PAIR = {'prompt': 'p', 'chosen': 'c', 'rejected': 'r'}
JUDGED = {'question': 'q', 'source': 'mmlu-pro-law', 'response_A': 'a', 'response_B': 'b', 'label': 'A>B'}
ANSWERS = {f'response_{i + 1}': f'a{i}' for i in range(32)} | {'scores': [True] + [False] * 31, 'sampled_conflict_pairs': [[0, 1]]}
SOLUTION = {'problem': 'p', 'problem_id': 0, 'eval_solution': ['s']}
# Repository -> file -> rows.
FILES = {
  'ScalerLab/JudgeBench': {
    'data/claude-00000-of-00001.parquet': [{**JUDGED, 'pair_id': 'x', 'response_model': 'claude-3-5-sonnet-20240620'}],
    'data/gpt-00000-of-00001.parquet': [{**JUDGED, 'pair_id': 'x', 'response_model': 'gpt-4o-2024-05-13'}],
  },
  'THU-KEG/RM-Bench': {'total_dataset.json': [{'id': 1, 'prompt': 'p', 'chosen': [*'abc'], 'rejected': [*'def'], 'domain': 'math'}]},
  'allenai/reward-bench': {
    'data/filtered-00000-of-00001.parquet': [{**PAIR, 'id': 1, 'subset': 'hep-go'}],
    'data/raw-00000-of-00001.parquet': [{**PAIR, 'id': 1, 'subset': 'hep-go'}],
  },
  'allenai/pref-test-sets': {
    'data/anthropic_hhh-00000-of-00001-ab.parquet': [{**PAIR, 'prompt': [{'role': 'user', 'content': 'p'}]}],
    'data/pku_safer-00000-of-00001-ab.parquet': [PAIR],
  },
  'allenai/reward-bench-2': {
    'data/test-00000-of-00001.parquet': [{'id': '1', 'prompt': 'p', 'chosen': ['c'], 'rejected': [*'abd'], 'subset': 'Math'}]
  },
  **{
    f'lmarena-ai/PPE-{source}-Best-of-K': {'data/train-00000-of-00001.parquet': [{'question_id': 1, 'prompt': source, **ANSWERS}]}
    for source in ('MMLU-Pro', 'MATH', 'GPQA', 'IFEval', 'MBPP-Plus')
  },
  'RewardMATH/RewardMATH': {
    'data/test-00000-of-00001.parquet': [{**SOLUTION, 'solution_type': 'rejected' if i else 'chosen'} for i in range(10)]
  },
}


def write(folder, repository):
  for name, rows in FILES[repository].items():
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    if name.endswith('.json'):
      (folder / name).write_text(json.dumps(rows))
    else:
      parquet.write_table(pyarrow.Table.from_pylist(rows), folder / name)


@pytest.fixture
def cache(tmp_path, monkeypatch):
  """Replace the download by one into a cache in `tmp_path`; return the arguments of its calls."""
  calls = {}

  def snapshot_download(repository, **settings):
    calls[repository] = settings
    folder = tmp_path / f'math/datasets--{repository.replace("/", "--")}/snapshots/0123abc'  # `math` is not the source
    write(folder, repository)
    return str(folder)

  monkeypatch.setitem(sys.modules, 'huggingface_hub', types.SimpleNamespace(snapshot_download=snapshot_download))
  return calls


@pytest.mark.parametrize('name', hub.REPOSITORIES)
def test_the_layout_of_the_hub_is_read(cache, name):
  found = benchmarks.read(name, None)
  assert {*cache} == {*hub.REPOSITORIES[name]} and all(one.revisions == dict.fromkeys(cache, '0123abc') for one in found)
  # Data sets alone: no script of a repository is fetched.
  assert all(s['repo_type'] == 'dataset' and not any('.py' in p for p in s['allow_patterns']) for s in cache.values())
  categories = [item.category for one in found for item in one.items]
  assert found[0].name == name
  assert categories == {
    'judgebench': ['knowledge'] * 2,
    'ppe_correctness': ['MMLU-Pro', 'MATH', 'GPQA', 'IFEval', 'MBPP-Plus'],
    'rewardbench': ['hep-go', 'anthropic_hhh'],
    'rewardbench_2': ['Math'],
    'rewardmath': [''],
    'rm_bench': ['math'],
  }[name]  # fmt: skip
  if name == 'ppe_correctness':
    assert [item.prompt for item in found[0].items] == categories


@pytest.mark.parametrize('name', hub.REPOSITORIES)
def test_where_the_hub_cannot_be_reached_the_advice_helps(cache, tmp_path, monkeypatch, name):
  on_hub = benchmarks.read(name, None)

  def snapshot_download(repository, **_):
    raise ConnectionError('Name or service\nnot known')

  monkeypatch.setattr(sys.modules['huggingface_hub'], 'snapshot_download', snapshot_download)
  with pytest.raises(UserError, match=r'cannot be downloaded \(Name or service not known\); where the hub') as caught:
    benchmarks.read(name, None)
  message = str(caught.value)
  repository, place = re.search(r'hf download (\S+) --repo-type dataset --local-dir DIR/([\w/-]+)', message).groups()
  names = re.search(r'for each NAME of (.*)\)', message).group(1).split(', ') if repository == 'NAME' else [repository]
  for each in names:
    write(tmp_path / 'DIR' / place.replace('NAME', each), each)
  placed = benchmarks.read(name, tmp_path / 'DIR')
  assert [sorted(item.id for item in one.items) for one in placed] == [sorted(item.id for item in one.items) for one in on_hub]
  assert not placed[0].revisions and placed[0].missing == on_hub[0].missing


def test_benchmarks_that_are_elsewhere_are_refused(cache, monkeypatch):
  for name in ('rmb', 'polar_rmb'):
    with pytest.raises(UserError, match=r'rmb is not on the hub, but in the GitHub repository Zhou-Zoey/RMB-Reward-Model-Benchmark: put'):
      benchmarks.read(name, None)
  monkeypatch.setitem(sys.modules, 'huggingface_hub', None)  # as if not installed
  with pytest.raises(UserError, match=r"needs huggingface_hub; run: pip install 'polar_jax\[hub\]'"):
    benchmarks.read('judgebench', None)
  assert {*hub.REPOSITORIES, *hub._ELSEWHERE, 'polar_rmb'} == {*benchmarks.BENCHMARKS} and not cache


def test_the_stage_reads_from_the_hub(cache):
  config = default_config()
  config.stage, config.evaluate.folder, config.evaluate.benchmarks = 'evaluate', 'hub', 'judgebench,rm_bench'
  found = evaluate_sets.read_sets(parse(config))
  assert [one.name for one in found] == ['judgebench', 'judgebench_claude-3-5-sonnet-20240620', 'rm_bench']
  assert found[2].revisions == {'THU-KEG/RM-Bench': '0123abc'}


def test_a_missing_folder_is_told_of_the_hub_if_it_has_the_benchmark(tmp_path):
  with pytest.raises(UserError, match=r'judgebench: no such folder.*, or set evaluate\.folder, which may be hub'):
    benchmarks.read('judgebench', tmp_path)
  with pytest.raises(UserError, match=r'rmb: no such folder.*, or set evaluate\.folder$'):
    benchmarks.read('rmb', tmp_path)
