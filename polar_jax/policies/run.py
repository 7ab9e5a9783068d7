"""Runs benchmarks of lm-eval on a policy, one after another, and collects what they measure."""

from __future__ import annotations

import collections
import dataclasses
import logging
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import lm_eval
import numpy as np
from lm_eval.tasks import TaskManager

from polar_jax.config import ConfigError
from polar_jax.policies import benchmarks
from polar_jax.policies.benchmarks import Benchmark
from polar_jax.policies.lm_eval_model import Policy
from polar_jax.ppo.rewards.rules import RULES, NoAnswerError
from polar_jax.types import UserError, one_line

RULE = 'last_number,rule'  # the metric of the rule of PPO, named as lm-eval names metrics
_SOLUTION = '####'  # precedes the answer in solutions of GSM8K


@dataclasses.dataclass(frozen=True)
class Options:
  """How benchmarks are run.

  Attributes:
    include_path: folder with further task files.
    shots: examples in the prompt; None: those of each benchmark.
    limit: documents of each task; None: all.
    chat: apply the model's chat template, with the examples as earlier turns.
    run_code: run the code of responses on this machine, for benchmarks that need it.
    answer_field: field of a document with the answer, which the rule `last_number` compares responses with; None: that of the benchmark.
    resamples: bootstrap resamples of the standard errors of metrics that have no formula for it.
  """

  include_path: pathlib.Path | None = None
  shots: int | None = None
  limit: int | None = None
  chat: bool = False
  run_code: bool = False
  answer_field: str | None = None
  resamples: int = 2_000


@dataclasses.dataclass
class Results:
  """What was measured.

  Attributes:
    measured: by the name of the benchmark, as `evaluate` describes.
    not_run: why a benchmark was not run, by its name.
    samples: lines with the responses to every document.
  """

  measured: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
  not_run: dict[str, str] = dataclasses.field(default_factory=dict)
  samples: list[dict[str, Any]] = dataclasses.field(default_factory=list)


def evaluate(policy: Policy, names: Sequence[str], options: Options, log: Callable[[str], None]) -> Results:
  """Run benchmarks, leaving out with a reason those that cannot be run.

  Args:
    policy: the model.
    names: of `benchmarks.TWENTY`, or tasks and groups that lm-eval or the task files know.
    options: how to run them.
    log: receives a line for each benchmark.

  Returns:
    For each benchmark `metric`, `value`, `stderr` (None if it is not known), `n` documents, `shots`, `version` of the task, `requests` to
    the model, `truncated` requests, `seconds`, `metrics` with all values, and `tasks` with those of the tasks of a group.

  Raises:
    ConfigError: a name is unknown, or there is no such folder of task files.
    UserError: no benchmark could be run; the message has the reasons.
  """
  if options.include_path is not None and not options.include_path.is_dir():
    raise ConfigError(f'evaluate.include_path {options.include_path}: no such folder; name one with task files of lm-eval (.yaml)')
  chosen = {name: benchmarks.BY_NAME.get(name) for name in names}
  manager = _manager(chosen, options)
  unknown = [name for name, benchmark in chosen.items() if benchmark is None and name not in manager.all_tasks]
  if unknown:
    raise ConfigError(
      f'evaluate.tasks: {unknown[0]!r} is unknown; name benchmarks of configs/benchmarks_20.py ({", ".join(benchmarks.BY_NAME)}), tasks of '
      'lm-eval, or those in evaluate.include_path'
    )
  out = Results()
  for name, benchmark in chosen.items():
    reason = None if benchmark is None else benchmarks.obstacle(benchmark, options.run_code)
    if reason is None:
      reason = _run_one(policy, name, benchmark, manager, options, out)
    if reason is not None:
      out.not_run[name] = reason
      log(f'{name}: not run: {reason}')
      continue
    found = out.measured[name]
    cut = f'; {found["truncated"]:,} of {found["requests"]:,} requests were cut' if found['truncated'] else ''
    log(f'{name}: {found["metric"]} {found["value"]:.4f}, {found["n"]:,} documents, {found["seconds"]:.1f} s{cut}')
  if not out.measured:
    raise UserError(f'no benchmark could be run: {"; ".join(f"{name}: {reason}" for name, reason in out.not_run.items())}')
  return out


def _manager(chosen: Mapping[str, Benchmark | None], options: Options) -> TaskManager:
  """Return what knows the task files: those of the folder alone if they are enough, because reading all of lm-eval's takes a while."""
  if options.include_path is not None:
    manager = TaskManager(include_path=str(options.include_path), include_defaults=False)
    if all(benchmark is None and name in manager.all_tasks for name, benchmark in chosen.items()):
      return manager
  return TaskManager(include_path=str(options.include_path) if options.include_path else None)


def _run_one(policy: Policy, name: str, benchmark: Benchmark | None, manager: TaskManager, options: Options, out: Results) -> str | None:
  """Run a benchmark and add what it measures to `out`; return the reason if it cannot be run."""
  task, shots = (name, options.shots) if benchmark is None else (str(benchmark.task), benchmark.shots)
  before, started = sum(policy.requests.values()), time.perf_counter()
  truncated, requests = policy.truncated.copy(), policy.requests.copy()
  if options.run_code:
    os.environ['HF_ALLOW_CODE_EVAL'] = '1'
  try:
    results = lm_eval.simple_evaluate(
      model=policy,
      tasks=[task],
      task_manager=manager,
      num_fewshot=shots if options.shots is None else options.shots,
      limit=options.limit,
      apply_chat_template=options.chat,
      fewshot_as_multiturn=options.chat,
      confirm_run_unsafe_code=options.run_code,
      bootstrap_iters=options.resamples,
    )
  except UserError as error:
    return str(error)
  except Exception as error:
    # Before the first request lm-eval reads data over the network and imports what a task needs.
    if sum(policy.requests.values()) > before:
      raise
    return one_line(f'its data or code cannot be read ({type(error).__name__}: {error})')
  assert results is not None  # only other ranks of torch get None
  found = _collect(results, task, benchmark)
  counted = {key: (policy.truncated[key] - truncated[key], policy.requests[key] - requests[key]) for key in results['n-samples']}
  found |= {'truncated': sum(cut for cut, _ in counted.values()), 'requests': sum(count for _, count in counted.values())}
  judged = _judge(results['samples'], options.answer_field or (benchmark.answer if benchmark else None))
  found['metrics'] |= judged
  for key, part in found['tasks'].items():
    part |= {'truncated': counted[key][0], 'requests': counted[key][1]}
  out.measured[name] = found | {'seconds': time.perf_counter() - started}
  out.samples += _lines(name, results['samples'])
  return None


def _collect(results: Mapping[str, Any], task: str, benchmark: Benchmark | None) -> dict[str, Any]:
  """Return what lm-eval measured of a task or group."""
  counts = {name: int(count['effective']) for name, count in results['n-samples'].items()}
  own, leaves = results['results'].get(task, {}), {name: results['results'][name] for name in counts}
  metrics = _numbers(own) or _mean(leaves, counts)
  metric = benchmark.metric if benchmark and benchmark.metric in metrics else next(name for name in metrics if not _is_error(name))
  found = {
    'task': task,
    'metric': metric,
    'value': metrics[metric],
    'stderr': metrics.get(_error_of(metric)),
    'n': sum(counts.values()),
    'shots': results['n-shot'].get(task, _one(results['n-shot'].get(name) for name in counts)),
    'version': results['versions'].get(task, _one(results['versions'].get(name) for name in counts)),
    'metrics': metrics,
  }
  parts = {
    name: {'metrics': _numbers(values), 'n': counts[name], 'shots': results['n-shot'].get(name), 'version': results['versions'].get(name)}
    for name, values in leaves.items()
  }
  return found | {'tasks': parts if len(parts) > 1 or task not in parts else {}}


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
  """Return the metrics among the values of a task, without those that are not finite numbers."""
  real = {name: float(value) for name, value in values.items() if ',' in name and isinstance(value, (int, float, np.number))}
  return {name: value for name, value in real.items() if np.isfinite(value)}


def _mean(leaves: Mapping[str, Mapping[str, Any]], counts: Mapping[str, int]) -> dict[str, float]:
  """Return the metrics of a tag, for which lm-eval computes none: the means over documents, without errors."""
  values, weights = collections.defaultdict(list), collections.defaultdict(list)
  for name, leaf in leaves.items():
    for metric, value in _numbers(leaf).items():
      if not _is_error(metric):
        values[metric].append(value)
        weights[metric].append(counts[name])
  return {metric: float(np.average(values[metric], weights=weights[metric])) for metric in values}


def _error_of(metric: str) -> str:
  """Return the name of a metric's standard error."""
  name, _, filtered = metric.partition(',')
  return f'{name}_stderr,{filtered}'


def _is_error(metric: str) -> bool:
  return metric.partition(',')[0].endswith('_stderr')


def _one(values: Iterable[Any]) -> Any:
  """Return the value of all tasks, None if they differ."""
  found = set(values)
  return found.pop() if len(found) == 1 else None


def _judge(samples: Mapping[str, Sequence[Mapping[str, Any]]], field: str | None) -> dict[str, float]:
  """Return the share of responses that the rule `last_number` finds right, with its standard error; {} if there is no such field.

  A response whose document has an answer that the rule cannot read is left out.
  """
  right = []
  for lines in samples.values():
    for line in {line['doc_id']: line for line in lines}.values():  # a document has a line for each filter
      response, answer = line['resps'][0][0], line['doc'].get(field) if field else None
      if answer is None or not isinstance(response, str):
        continue
      try:
        right.append(RULES['last_number'](response, str(answer).rpartition(_SOLUTION)[2].strip()))
      except NoAnswerError:
        continue
  if not right:
    return {}
  mean = float(np.mean(right))
  return {RULE: mean, _error_of(RULE): float(np.std(right, ddof=1) / len(right) ** 0.5)} if len(right) > 1 else {RULE: mean}


def _lines(name: str, samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
  """Return a line for every document and filter of a benchmark, without the document itself."""
  kept = ('doc_id', 'doc_hash', 'target', 'resps', 'filtered_resps', 'filter')
  return [
    {'benchmark': name, 'task': task, **{key: line[key] for key in kept}, **{metric: line[metric] for metric in line['metrics']}}
    for task, lines in samples.items()
    for line in lines
  ]


def quiet() -> None:
  """Leave out what lm-eval logs: its progress, and a line for every default of every task."""
  logging.getLogger('lm_eval').setLevel(logging.ERROR)
