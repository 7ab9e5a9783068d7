"""The table of the paper's twenty benchmarks: what can be run, and what the tasks of lm-eval and the documentation say of it."""

from __future__ import annotations

import pytest

from polar_jax.policies import benchmarks


def test_the_table_has_twenty_benchmarks_with_their_obstacles():
  assert len(benchmarks.TWENTY) == len(benchmarks.BY_NAME) == 20
  reasons = {name: benchmarks.obstacle(one, run_code=False) for name, one in benchmarks.BY_NAME.items()}
  free = {name for name, reason in reasons.items() if reason is None}
  assert free == {'drop', 'bbh', 'gpqa_diamond', 'hellaswag', 'musr', 'gsm8k', 'math_500', 'cmmlu', 'mmlu_pro', 'mmmlu_lite'}
  assert {name for name, reason in reasons.items() if reason and 'run_code' in reason} == {'humaneval', 'mbpp'}
  assert all(benchmarks.obstacle(benchmarks.BY_NAME[name], run_code=True) is None for name in ('humaneval', 'mbpp'))
  assert all(one.opencompass[0] in (benchmarks.obstacle(one, True) or '') for one in benchmarks.TWENTY if one.task is None)
  assert all(bool(one.metric) == (one.task is not None) for one in benchmarks.TWENTY)


def test_the_documentation_has_the_table(request):
  text = (request.config.rootpath / 'docs/policies_evaluation.md').read_text()
  rows = {row[0]: row for line in text.splitlines() if line.startswith('| `') and len(row := line.strip('| ').split(' | ')) > 4}
  assert list(rows) == [f'`{name}`' for name in benchmarks.BY_NAME]
  for benchmark in benchmarks.TWENTY:
    _, theirs, _, task, shots, metric = rows[f'`{benchmark.name}`']
    assert theirs == f'`{benchmark.opencompass[0]}`'
    if benchmark.task is not None:
      assert (task, shots) == (f'`{benchmark.task}`', str(benchmark.shots)) and metric.startswith(f'`{benchmark.metric}`')


@pytest.mark.slow
@pytest.mark.needs('lm_eval')
def test_the_table_of_twenty_agrees_with_the_tasks_of_lm_eval():
  from lm_eval.tasks import TaskManager

  manager = TaskManager()
  for benchmark in benchmarks.TWENTY:
    if benchmark.task is None:
      continue
    entry = manager._index[benchmark.task].cfg
    metric, _, name = benchmark.metric.partition(',')
    if 'aggregate_metric_list' in entry:
      listed = {(one['metric'], one.get('filter_list', 'none')) for one in entry['aggregate_metric_list']}
      assert (metric, name) in listed, benchmark
      continue
    filters = {one['name'] for one in entry.get('filter_list', [])} or {'none'}
    assert name in filters, benchmark
    assert bool(entry.get('unsafe_code')) == (benchmark.needs != ''), benchmark
    if 'num_fewshot' in entry:
      assert entry['num_fewshot'] == benchmark.shots, benchmark
