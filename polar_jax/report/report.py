"""report.json for programs, and report.md, report.html and figures for people.

report.json has one section per topic; a run may have any of them. `update_results` merges the results of one stage, so that stages
started as separate processes, one after another, add up. Accuracies are {accuracy, low, high, n, clusters, clustered_by}, as fractions
with a 95% interval that resamples `clusters` policies, prompts or single examples (`clustered_by`). Margins are paired differences of
accuracies with {difference, low, high, clusters, clustered_by}; margins over the best baseline also name it (`baseline`).

  evaluate     by_split[SPLIT], baselines[NAME][SPLIT], margin_over_best_baseline[SPLIT]
  finetune     arms[ARM], by_category[CATEGORY], baselines[NAME]; optionally margin_over_best_baseline, margin_over_arms[ARM]
               (`pretrained_finetuned` minus the arm); runs[RUN], numbers of the training
  pretrain_lm, pretrain  loss, steps, tokens, accuracy and other numbers of the training
  rft          see `polar_jax.report.rft`
  evaluation   sets[NAME], as in the evaluation.json of the stage evaluate on given data
  policies     benchmarks[NAME], not_run, options, as in the policies.json of the stage evaluate on benchmarks of policies
  sweep        runs, done, sizes; examples[SPLIT], what the triplets of all runs have that cannot be learned
  scaling      see `polar_jax.scaling.analysis`
  timing       seconds by stage, and `total`
  environment  see `environment`
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import platform
import subprocess
from collections.abc import Mapping
from typing import Any

import numpy as np

from polar_jax.report import evaluation, findings, html, markdown, plots, policies, sections, surveyed
from polar_jax.report import rft as rft_report
from polar_jax.report import scaling as scaling_report
from polar_jax.runtime import json_files, paths
from polar_jax.train.metrics import FILE, read_metrics
from polar_jax.types import UserError

JSON_NAME = 'report.json'
MARKDOWN_NAME = 'report.md'
HTML_NAME = 'report.html'
_REMEDY = 'delete it and run the stages again'


class ReportError(UserError):
  """A result that cannot be written or read. The message is one line that names the file and the field."""


def load_results(workdir: str | os.PathLike) -> dict[str, Any]:
  """Return the content of a workdir's report.json; {} if there is none yet.

  Raises:
    ReportError: if the file is not a JSON object.
  """
  path = pathlib.Path(workdir) / JSON_NAME
  if not path.exists():
    return {}
  try:
    results = json_files.read(path, _REMEDY)
  except json_files.JsonError as error:
    raise ReportError(str(error)) from error
  for section, values in results.items():
    if not isinstance(values, dict):
      raise ReportError(f'{path}: section {section!r:.60} is a {type(values).__name__} instead of an object; {_REMEDY}')
  for stage, seconds in results.get('timing', {}).items():
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
      raise ReportError(f'{path}: timing.{stage:.60} is {seconds!r:.60} instead of a number; {_REMEDY}')
  return results


def check(workdir: pathlib.Path) -> None:
  """Check, before the first stage runs, that what the report will read can be read.

  Raises:
    ReportError: report.json is damaged.
    UserError: a log of an earlier run is damaged.
  """
  load_results(workdir)
  _metrics_by_stage(workdir)
  rft_report.read_runs(workdir)
  rft_report.read_samples(workdir)


def update_results(workdir: str | os.PathLike, section: str, values: Mapping[str, Any]) -> dict[str, Any]:
  """Set `values` in a section of report.json, keep the other keys of the section, and return all results.

  In `timing`, `total` becomes the sum over the stages unless `values` has it.

  Raises:
    ReportError: if the file cannot be read or a value cannot be written; the file is then left unchanged.
  """
  results = load_results(workdir)
  merged = {**results.get(section, {}), **values}
  if section == 'timing' and 'total' not in values:
    merged['total'] = float(sum(seconds for stage, seconds in merged.items() if stage != 'total'))
  results[section] = merged
  return _write_json(pathlib.Path(workdir), results)


def write_report(workdir: str | os.PathLike, results: Mapping[str, Any]) -> None:
  """Write report.json, report.md, report.html and figures/*.png of a workdir; curves are read from */metrics.jsonl.

  Parts that are missing in `results` are left out of the tables and listed as missing.

  Raises:
    ReportError: if a value is not finite or not JSON, naming it; nothing has been written then.
    UserError: if a line of metrics is broken, naming it.
  """
  workdir = pathlib.Path(workdir)
  plain = _write_json(workdir, results)
  try:
    _write_pages(workdir, plain)
  except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
    if isinstance(error, UserError):
      raise
    # The stages write what the pages can show, so a file was changed or damaged since.
    reason = f'{type(error).__name__}: {json_files.shorten(error)}'
    raise ReportError(f'{workdir / JSON_NAME}: has values that a report cannot show ({reason}); {_REMEDY}') from error


def _write_pages(workdir: pathlib.Path, plain: dict[str, Any]) -> None:
  """Draw the figures, and write report.md and report.html."""
  figures = _draw(workdir, plain)
  rft_runs, rft = rft_report.read_runs(workdir), plain.get('rft', {})
  figures |= rft_report.draw(workdir, rft, rft_runs)
  if (workdir / scaling_report.FIGURE).is_file():
    figures['scaling'] = scaling_report.FIGURE
  tuning = rft_report.section(rft, figures, rft_report.read_samples(workdir), rft_runs)
  tuning += scaling_report.section(plain.get('scaling', {}), figures)
  tuning += surveyed.section({f'sweep, {split}': found for split, found in plain.get('sweep', {}).get('examples', {}).items()})
  text = _markdown(plain, figures, tuning)
  paths.write_atomically(workdir / MARKDOWN_NAME, text)
  paths.write_atomically(workdir / HTML_NAME, html.page(text, workdir, list(figures.values())))


def environment() -> dict[str, Any]:
  """Return versions and hardware of this process, without host name, user name or paths."""
  import flax
  import jax

  devices = jax.devices()
  out = {
    'python': platform.python_version(),
    'jax': jax.__version__,
    'flax': flax.__version__,
    'numpy': np.__version__,
    'platform': f'{platform.system()} {platform.machine()}',
    'backend': jax.default_backend(),
    'devices': f'{len(devices)} x {devices[0].device_kind}',
    'cpu_count': os.cpu_count() or 1,
  }
  revision = _git_revision()
  return {**out, 'git_revision': revision} if revision else out


def _git_revision() -> str | None:
  """Return the commit of the checkout that tracks this file; None if none does (an installed package may be inside another one)."""
  here = pathlib.Path(__file__).resolve()

  def git(*args: str) -> str | None:
    try:
      done = subprocess.run(['git', '-C', str(here.parent), *args], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
      return None
    return done.stdout.strip() if done.returncode == 0 else None

  if git('ls-files', '--error-unmatch', here.name) is None:
    return None
  return git('describe', '--always', '--dirty', '--abbrev=40', '--exclude=*')


def _write_json(workdir: pathlib.Path, results: Mapping[str, Any]) -> dict[str, Any]:
  plain = _plain(results, '')
  content = json.dumps(plain, indent=2, sort_keys=True, allow_nan=False) + '\n'
  paths.write_atomically(workdir / JSON_NAME, content)
  return plain


def _plain(value: Any, where: str) -> Any:
  """Return the same value in JSON types; numpy scalars become Python scalars, so a float stays a float."""
  if isinstance(value, Mapping):
    for key in value:
      if not isinstance(key, str):
        raise ReportError(f'{JSON_NAME}: {where or "the top level"} has the key {key!r}; keys must be strings')
    return {key: _plain(item, f'{where}.{key}' if where else key) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_plain(item, f'{where}[{i}]') for i, item in enumerate(value)]
  if isinstance(value, np.generic):
    value = value.item()
  if isinstance(value, float) and not math.isfinite(value):
    raise ReportError(f'{JSON_NAME}: {where} is {value}; a report has finite numbers only; leave the key out if it was not measured')
  if value is None or isinstance(value, (bool, int, float, str)):
    return value
  raise ReportError(f'{JSON_NAME}: {where} is a {type(value).__name__}; give numbers, strings, lists and mappings')


def _metrics_by_stage(workdir: str | os.PathLike) -> dict[str, list[dict[str, Any]]]:
  """Return the records of every */metrics.jsonl of a workdir but those of PPO, in the order in which the stages run."""
  folders = [path.parent for path in sorted(pathlib.Path(workdir).glob(f'*/{FILE}')) if path.parent.name != rft_report.FOLDER]
  read = {folder.name: read_metrics(folder) for folder in folders}
  return {stage: read[stage] for stage in markdown.ordered(read, sections.TRAINING) if read[stage]}


def _draw(workdir: pathlib.Path, results: Mapping[str, Any]) -> dict[str, str]:
  """Draw the figures of training and accuracy that have data; return name of a figure -> link relative to the workdir."""
  evaluate, finetune = results.get('evaluate', {}), results.get('finetune', {})
  metrics = _metrics_by_stage(workdir)
  by_split = {s: evaluate.get('by_split', {})[s] for s in markdown.ordered(evaluate.get('by_split', {}), sections.SPLITS)}
  arms = {a: finetune.get('arms', {})[a] for a in markdown.ordered(finetune.get('arms', {}), sections.ARMS)}
  drawn = {}
  if metrics:
    drawn['loss'] = plots.loss_curves(metrics)
  if by_split:
    drawn['accuracy'] = plots.accuracy_bars(by_split, evaluate.get('baselines', {}))
  if arms:
    drawn['arms'] = plots.arm_bars(arms, finetune.get('baselines', {}))
  drawn |= evaluation.draw(results.get('evaluation', {}))
  if found := findings.find(results):
    drawn[findings.FIGURE] = findings.figure(found)
  return plots.save_all(drawn, workdir)


def _markdown(results: Mapping[str, Any], figures: Mapping[str, str], tuning: list[str]) -> str:
  # The overview and the limitations are about reward models; a workdir that only scored, converted or tuned a policy has none.
  studied = any(results.get(stage) for stage in sections.STAGES) or not (
    tuning or any(results.get(tool) for tool in (*sections.TOOLS, 'evaluation', 'policies'))
  )
  parts = [
    '# polar_jax run report',
    *findings.section(findings.find(results), figures),
    *([sections.overview(results)] if studied else []),
    *sections.policies(results, figures),
    *sections.preferences(results, figures),
    *sections.training(results, figures),
    *evaluation.section(results.get('evaluation', {}), figures),
    *policies.section(results.get('policies', {})),
    *tuning,
    *sections.tools(results),
    *sections.time_and_environment(results),
    *(sections.limitations(results) if studied else []),
  ]
  return '\n\n'.join(parts) + '\n'
