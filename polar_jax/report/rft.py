"""The section of report.md on reinforcement fine-tuning, from the section `rft` of report.json and the logs of the runs.

  study        `seeds`, the number of runs; METRIC_before, METRIC_after and `kl`: one number per seed;
               comparison[POLICY][METRIC]: one number per seed, policies start, ppo, best_of_n, sft, target;
               `targets`, the policy that wrote the references of each seed; `best_of`, the number of samples of best-of-n
  other runs   runs[RUN]: numbers of the run, `evaluation_before` and `evaluation_after` on held-out prompts, `alarms`

Metrics: reward; target_nll, in nats per token; relative_nll, the same minus the mean over the pool; kl to the initial policy, in nats per
token; length in tokens; distinct_2. Missing parts are left out.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

from polar_jax.report import markdown, plots, rft_plots, rft_runs, rft_study
from polar_jax.report.plots import Records
from polar_jax.train.metrics import FILE, read_metrics

FOLDER = 'rft'
_SAMPLES = 'samples.jsonl'
_SHOWN = 4  # samples per run
_LONGEST = (('prompt', 120), ('reference', 160), ('output', 240))  # characters of a sample's texts


def read_runs(workdir: pathlib.Path) -> dict[str, list[dict[str, Any]]]:
  """Return name -> records of metrics.jsonl of the run in the folder `rft`, or of the runs in its folders.

  Raises:
    UserError: if a line is broken, naming it.
  """
  return {name: records for name, folder in _folders(workdir, FILE).items() if (records := read_metrics(folder))}


def read_samples(workdir: pathlib.Path) -> dict[str, list[dict[str, Any]]]:
  """Return name -> samples of the last step that has any, of the same runs.

  Raises:
    UserError: if a line is broken, naming it.
  """
  out = {}
  for name, folder in _folders(workdir, _SAMPLES).items():
    samples = read_metrics(folder, _SAMPLES)
    last = max((sample['step'] for sample in samples), default=None)
    if last is not None:
      out[name] = [sample for sample in samples if sample['step'] == last][:_SHOWN]
  return out


def draw(workdir: pathlib.Path, results: Mapping[str, Any], runs: Mapping[str, Records]) -> dict[str, str]:
  """Draw the figures that have data; return name of a figure -> link relative to the workdir.

  Args:
    workdir: its figures/ is written.
    results: the section `rft` of report.json.
    runs: name of a run -> records of its metrics.jsonl.
  """
  drawn = {}
  if rft_plots.panels_of(runs):
    drawn['rft'] = rft_plots.dashboard(runs)
  compared = rft_study.compared(results)
  if any(metrics.get(key) for metrics in compared.values() for key in ('reward', 'target_nll', 'relative_nll')):
    drawn['rft_comparison'] = rft_plots.comparison({rft_study.name_of(name, results): metrics for name, metrics in compared.items()})
  return plots.save_all(drawn, workdir)


def section(
  results: Mapping[str, Any],
  figures: Mapping[str, str],
  samples: Mapping[str, Records],
  runs: Mapping[str, Records] | None = None,
) -> list[str]:
  """Return paragraphs of Markdown; none if there are no results.

  Args:
    results: the section `rft` of report.json.
    figures: name -> link, as `draw` returns them.
    samples: name of a run -> records of its samples.jsonl.
    runs: name of a run -> records of its metrics.jsonl.
  """
  parts = [
    *rft_study.before_and_after(results),
    *rft_study.comparison(results, figures),
    *rft_runs.runs(results),
    *rft_runs.signs_of_hacking(runs or {}, figures, of_other='policy' if 'targets' in results else 'prompt'),
    *_samples(samples),
  ]
  return ['## Reinforcement fine-tuning', *parts] if parts else []


def _folders(workdir: pathlib.Path, file: str) -> dict[str, pathlib.Path]:
  """Return name -> folder of the runs that have a file."""
  root = pathlib.Path(workdir) / FOLDER
  folders = [path.parent for path in [root / file, *sorted(root.glob(f'*/{file}'))] if path.exists()]
  return {FOLDER if folder == root else folder.name.replace('_', ' '): folder for folder in folders}


def _samples(samples: Mapping[str, Records]) -> list[str]:
  out = []
  head = ['', 'prompt', 'reference', 'response', 'score', 'score, shuffled reference', 'tokens']
  for name, records in samples.items():
    if records:
      out += [f'{markdown.escape(name)}, step {records[0].get("step", "-")}:', markdown.table(head, list(map(_cells, records)))]
  if out:
    note = 'Responses with the highest and the lowest score, and some in between. Long texts are shortened; samples.jsonl has them in full.'
    out = ['### Samples', note, *out]
  return out


def _cells(sample: Mapping[str, Any]) -> list[str]:
  texts = [markdown.shorten(str(sample.get(key) or ''), longest) for key, longest in _LONGEST]
  numbers = [markdown.number(sample.get(key)) for key in ('score', 'shuffled', 'length')]
  return [markdown.escape(str(sample.get('pick', ''))), *texts, *numbers]
