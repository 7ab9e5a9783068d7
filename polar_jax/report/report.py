"""report.json, which other programs read, and report.md with figures, which people read.

report.json holds one section per topic; a run may have any of them. `update_results` adds what one stage found, so that
stages started as separate processes, one after the other, add up. Accuracies are {accuracy, low, high, n}, as fractions.

  evaluate     by_split[SPLIT], baselines[NAME][SPLIT], margin_over_best_baseline[SPLIT] = {baseline, difference, low, high}
  finetune     arms[ARM], by_category[CATEGORY], baselines[NAME]; optionally margin_over_best_baseline; figures of the training
  pretrain_lm, pretrain  loss, steps, tokens, accuracy and whatever else the training reports
  rft          see `polar_jax.report.rft`
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
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from polar_jax.evaluate import baselines as baselines_lib
from polar_jax.report import markdown, plots
from polar_jax.report import rft as rft_report
from polar_jax.report import scaling as scaling_report
from polar_jax.train.metrics import FILE, read_metrics
from polar_jax.types import UserError

JSON_NAME = 'report.json'
MARKDOWN_NAME = 'report.md'
SPLITS = ('validation', 'unseen_prompts', 'unseen_policies')
ARMS = ('pretrained_finetuned', 'finetuned_only', 'finetuned_without_reference', 'pretrained_only')
_TRAINING = ('pretrain_lm', 'pretrain', 'finetune')
_STAGES = ('synthesize', *_TRAINING, 'evaluate')
_TOOLS = ('convert', 'score')
_FEW_ROWS = 300  # below this a 95% interval is wider than about 11 points
_ARM_MEANING = {
  'pretrained_finetuned': 'contrastive pre-training, then fine-tuning on preferences',
  'finetuned_only': 'fine-tuning without contrastive pre-training',
  'finetuned_without_reference': 'fine-tuning alone, the reference hidden: a classic reward model',
  'pretrained_only': 'contrastive pre-training alone',
}


class ReportError(UserError):
  """A result cannot be written or read. The message is one line naming the file and the field."""


def load_results(workdir: str | os.PathLike) -> dict[str, Any]:
  """What report.json of a workdir holds; {} if there is none yet.

  Raises:
    ReportError: if the file is not a JSON object.
  """
  path = pathlib.Path(workdir) / JSON_NAME
  if not path.exists():
    return {}
  try:
    results = json.loads(path.read_text(encoding='utf-8'))
  except ValueError as error:
    raise ReportError(f'{path}: not valid JSON ({error}); delete it and run the stages again') from error
  if not isinstance(results, dict):
    raise ReportError(f'{path}: holds a {type(results).__name__} where an object of sections is expected; delete it and run again')
  return results


def update_results(workdir: str | os.PathLike, section: str, values: Mapping[str, Any]) -> dict[str, Any]:
  """Sets `values` in a section of report.json, keeping the section's other keys, and returns all results.

  In `timing`, `total` becomes the sum over the stages unless `values` states it.

  Raises:
    ReportError: if the file cannot be read or a value cannot be written; the file is then left as it was.
  """
  results = load_results(workdir)
  merged = {**results.get(section, {}), **values}
  if section == 'timing' and 'total' not in values:
    merged['total'] = float(sum(seconds for stage, seconds in merged.items() if stage != 'total'))
  results[section] = merged
  return _write_json(pathlib.Path(workdir), results)


def write_report(workdir: str | os.PathLike, results: Mapping[str, Any]) -> None:
  """Writes report.json, report.md and figures/*.png of a workdir; curves come from its */metrics.jsonl.

  Parts that `results` lacks are left out of the tables and named as missing.

  Raises:
    ReportError: on a value that is not finite or not JSON, or a broken line of metrics, naming it; a bad value is found
      before anything is written.
  """
  workdir = pathlib.Path(workdir)
  plain = _write_json(workdir, results)
  figures = _draw(workdir, plain)
  rft_runs, rft = rft_report.read_runs(workdir), plain.get('rft', {})
  figures |= rft_report.draw(workdir, rft, rft_runs)
  if (workdir / scaling_report.FIGURE).is_file():
    figures['scaling'] = scaling_report.FIGURE
  tuning = rft_report.section(rft, figures, rft_report.read_samples(workdir), rft_runs)
  tuning += scaling_report.section(plain.get('scaling', {}), figures)
  _write_atomically(workdir / MARKDOWN_NAME, _markdown(plain, figures, tuning))


def environment() -> dict[str, Any]:
  """Versions and hardware of this process: no host name, user name or path."""
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
  """Commit of the checkout that holds this file, None outside one (an installed package may lie in somebody else's)."""
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
  workdir.mkdir(parents=True, exist_ok=True)
  _write_atomically(workdir / JSON_NAME, json.dumps(plain, indent=2, sort_keys=True, allow_nan=False) + '\n')
  return plain


def _plain(value: Any, where: str) -> Any:
  """The same value made of JSON's types; numpy scalars become Python's, so a float stays a float."""
  if isinstance(value, Mapping):
    for key in value:
      if not isinstance(key, str):
        raise ReportError(f'{JSON_NAME}: {where or "the top"} has the key {key!r}; keys must be strings')
    return {key: _plain(item, f'{where}.{key}' if where else key) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_plain(item, f'{where}[{i}]') for i, item in enumerate(value)]
  if isinstance(value, np.generic):
    value = value.item()
  if isinstance(value, float) and not math.isfinite(value):
    raise ReportError(f'{JSON_NAME}: {where} is {value}; a report holds finite numbers only, so leave the key out if it was not measured')
  if value is None or isinstance(value, (bool, int, float, str)):
    return value
  raise ReportError(f'{JSON_NAME}: {where} is a {type(value).__name__}; give numbers, strings, lists and mappings')


def _write_atomically(path: pathlib.Path, text: str) -> None:
  """A reader sees the old file or the new one, also when this process dies half-way."""
  handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}.')
  try:
    with os.fdopen(handle, 'w', encoding='utf-8') as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
    os.chmod(temporary, 0o644)  # mkstemp's 0600 would hide the report from other accounts
    os.replace(temporary, path)
  except BaseException:
    pathlib.Path(temporary).unlink(missing_ok=True)
    raise


def _metrics_by_stage(workdir: str | os.PathLike) -> dict[str, list[dict[str, Any]]]:
  """Rows of every */metrics.jsonl of a workdir, in the order in which stages run; PPO has curves of its own."""
  folders = [path.parent for path in sorted(pathlib.Path(workdir).glob(f'*/{FILE}')) if path.parent.name != rft_report.FOLDER]
  read = {folder.name: read_metrics(folder) for folder in folders}
  return {stage: read[stage] for stage in markdown.ordered(read, _TRAINING) if read[stage]}


def _draw(workdir: pathlib.Path, results: Mapping[str, Any]) -> dict[str, str]:
  """Draws what can be drawn; name of a figure -> its relative link."""
  evaluate, finetune = results.get('evaluate', {}), results.get('finetune', {})
  metrics = _metrics_by_stage(workdir)
  links = {name: f'figures/{name}.png' for name in ('loss', 'accuracy', 'arms')}
  drawn = {}
  if metrics:
    plots.loss_curves(metrics, workdir / links['loss'])
    drawn['loss'] = links['loss']
  by_split = {s: evaluate.get('by_split', {})[s] for s in markdown.ordered(evaluate.get('by_split', {}), SPLITS)}
  if by_split:
    plots.accuracy_bars(by_split, evaluate.get('baselines', {}), workdir / links['accuracy'])
    drawn['accuracy'] = links['accuracy']
  arms = {a: finetune.get('arms', {})[a] for a in markdown.ordered(finetune.get('arms', {}), ARMS)}
  if arms:
    plots.arm_bars(arms, finetune.get('baselines', {}), workdir / links['arms'])
    drawn['arms'] = links['arms']
  return drawn


def _markdown(results: Mapping[str, Any], figures: Mapping[str, str], tuning: Sequence[str]) -> str:
  # A workdir in which a file was scored, a checkpoint converted or a policy tuned, and no reward model was learned, has nothing to warn of.
  studied = any(results.get(stage) for stage in _STAGES) or not (tuning or any(results.get(tool) for tool in _TOOLS))
  parts = ['# Report of a polar_jax run', *([_what_was_run(results)] if studied else [])]
  for section in (_policies(results, figures), _preferences(results, figures), _training(results, figures), tuning, _tools(results)):
    parts += section
  if results.get('timing'):
    seconds = results['timing']
    stages = [
      *(s for s in markdown.ordered(seconds, (*_STAGES, 'rft', 'sweep', 'fit', *_TOOLS)) if s != 'total'),
      *(['total'] if 'total' in seconds else []),
    ]
    parts += ['## Time', markdown.table(['stage', 'seconds'], [[s, f'{seconds[s]:.1f}'] for s in stages])]
  if results.get('environment'):
    parts += ['## Environment', markdown.table(['', ''], [[k, markdown.text(v)] for k, v in sorted(results['environment'].items())])]
  if studied:
    parts += ['## Caveats', _caveats(results)]
  return '\n\n'.join(parts) + '\n'


def _what_was_run(results: Mapping[str, Any]) -> str:
  expected = {
    'language-model pre-training': results.get('pretrain_lm'),
    'contrastive pre-training': results.get('pretrain'),
    'discrimination of policies': results.get('evaluate', {}).get('by_split'),
    'rules and ceiling on the same triplets': results.get('evaluate', {}).get('baselines'),
    'fine-tuning on preferences': results.get('finetune', {}).get('arms'),
    'times': results.get('timing'),
    'environment': results.get('environment'),
  }
  present = [name for name, value in expected.items() if value]
  missing = [name for name, value in expected.items() if not value]
  lines = [f'Results here: {", ".join(present) or "none"}.']
  if missing:
    lines.append(f'Missing, because it was not run or not recorded: {", ".join(missing)}.')
  lines.append(
    'Accuracy is the share of rows where the chosen trajectory scores above the rejected one; a tie counts half, '
    'chance is 50%. Brackets hold 95% intervals. All numbers are also in `report.json`, as fractions.'
  )
  return '\n'.join(lines)


def _policies(results: Mapping[str, Any], figures: Mapping[str, str]) -> list[str]:
  evaluate = results.get('evaluate', {})
  by_split, baselines = evaluate.get('by_split', {}), evaluate.get('baselines', {})
  splits = markdown.ordered({**by_split, **{s: 0 for b in baselines.values() for s in b}}, SPLITS)
  if not splits:
    return []
  rows = [['**pre-trained model**', *(_accuracy(by_split.get(s)) for s in splits)]] if by_split else []
  rows += [[_baseline_name(name), *(_accuracy(baselines[name].get(s)) for s in splits)] for name in _baseline_order(baselines)]
  first = [by_split] if by_split else list(baselines.values())
  counts = {s: next((source[s]['n'] for source in first if s in source), None) for s in splits}
  out = [
    '## Telling policies apart',
    'Chosen and reference are two samples of one policy, rejected is a sample of another. Accuracy in %.',
    markdown.table(['', *(f'{s} (n = {counts[s]})' if counts[s] is not None else s for s in splits)], rows),
  ]
  out += markdown.figure(figures, 'accuracy', 'Accuracy by split, with 95% intervals')
  margins = evaluate.get('margin_over_best_baseline', {})
  sentences = []
  for split in splits:
    if split in margins:
      sentences.append(f'- {split}: {_verdict("the model", margins[split])}')
    elif split in by_split:
      sentences.append(f'- {split}: no paired comparison with the rules was recorded.')
  return [*out, '\n'.join(sentences)] if sentences else out


def _preferences(results: Mapping[str, Any], figures: Mapping[str, str]) -> list[str]:
  finetune = results.get('finetune', {})
  arms, rules, categories = (finetune.get(key, {}) for key in ('arms', 'baselines', 'by_category'))
  out = []
  if arms or rules:
    rows = [[f'**{a}**', _ARM_MEANING.get(a, ''), _accuracy(arms[a]), str(arms[a]['n'])] for a in markdown.ordered(arms, ARMS)]
    rows += [[_baseline_name(name), '', _accuracy(rules[name]), str(rules[name]['n'])] for name in _baseline_order(rules)]
    out += ['## Preferences', 'Accuracy in % on held-out preference rows.', markdown.table(['', 'meaning', 'accuracy', 'n'], rows)]
    out += markdown.figure(figures, 'arms', 'Preference accuracy by arm, with 95% intervals')
    main = arms.get(ARMS[0])
    comparable = {name: v for name, v in rules.items() if name not in baselines_lib.NOT_HEURISTICS}
    if 'margin_over_best_baseline' in finetune:
      out.append(f'On preferences, {_verdict("the fine-tuned model", finetune["margin_over_best_baseline"])}')
    elif main and comparable:
      out.append(_unpaired_verdict(main, comparable))
  if categories:
    rows = [[name, _accuracy(v), str(v['n'])] for name, v in sorted(categories.items())]
    out += ['### By category', markdown.table(['category', 'accuracy', 'n'], rows)]
    few = [name for name, v in sorted(categories.items()) if v['n'] < _FEW_ROWS]
    if few:
      out.append(f'Fewer than {_FEW_ROWS} rows, so little can be said of one category alone: {", ".join(few)}.')
  return out


def _training(results: Mapping[str, Any], figures: Mapping[str, str]) -> list[str]:
  runs = {s: results.get(s, {}) for s in _TRAINING} | results.get('finetune', {}).get('runs', {})
  scalars = {s: {k: v for k, v in run.items() if not isinstance(v, (dict, list))} for s, run in runs.items()}
  rules = sorted({str(run.pop('mfu_rule')) for run in scalars.values() if 'mfu_rule' in run})
  stages = [s for s in scalars if scalars[s]]
  if not stages and 'loss' not in figures:
    return []
  out = ['## Training']
  if stages:
    keys = markdown.ordered({k: 0 for s in stages for k in scalars[s]}, ('steps', 'tokens', 'loss', 'accuracy'))
    rows = [[key, *(markdown.text(scalars[s][key]) if key in scalars[s] else '-' for s in stages)] for key in keys]
    out.append(markdown.table(['', *stages], rows))
  out += [f'Rule of `mfu`: {rule}.' for rule in rules]
  return out + markdown.figure(figures, 'loss', 'Loss and accuracy during training; the dashed lines are chance')


def _tools(results: Mapping[str, Any]) -> list[str]:
  """What the stages did that learn nothing."""
  out = []
  for tool in _TOOLS:
    if results.get(tool):
      out += [f'## Stage {tool}', markdown.table(['', ''], [[key, markdown.text(value)] for key, value in results[tool].items()])]
  return out


def _caveats(results: Mapping[str, Any]) -> str:
  evaluate, finetune = results.get('evaluate', {}), results.get('finetune', {})
  lines = [
    'Intervals are percentile bootstrap intervals over evaluation rows; rows that share a policy or a prompt are resampled together where '
    'the evaluation was given such groups. They do not cover the choice of seed: one training run stands behind each number.',
    'When every row of a set is right, or every row wrong, the interval has no width; that is no certainty.',
  ]
  counts = [v['n'] for part in (evaluate.get('by_split', {}), finetune.get('arms', {})) for v in part.values()]
  if counts:
    rows = str(counts[0]) if len(set(counts)) == 1 else f'{min(counts)} to {max(counts)}'
    lines.insert(0, f'Each accuracy of a model rests on {rows} rows.')
  if evaluate.get('baselines') or finetune.get('baselines'):
    lines.append(
      'The best rule is picked with hindsight on the rows it is compared on, which on average understates the margin of the model.'
    )
  if any('bayes' in part.get('baselines', {}) for part in (evaluate, finetune)):
    lines.append('The Bayes ceiling knows the exact likelihood of every text under every policy of the pool; no learner has that.')
  lines.append(
    'Rows made by the synthesize stage come from small n-gram policies: such numbers check the method, and say nothing about '
    'large language models.'
  )
  return '\n'.join(f'- {line}' for line in lines)


def _verdict(who: str, margin: Mapping[str, Any]) -> str:
  """One exact sentence about a paired margin."""
  points, low, high = (100 * margin[key] for key in ('difference', 'low', 'high'))
  rule, interval = f'the best rule (`{margin["baseline"]}`)', f'(95% interval {low:+.1f} to {high:+.1f})'
  if margin['low'] > 0:
    return f'{who} beats {rule} by {points:.1f} points {interval}.'
  if margin['difference'] > 0:
    return f'{who} is not shown to beat {rule}: it is {points:.1f} points ahead, and the interval includes 0 {interval}.'
  behind = 'level with it' if margin['difference'] == 0 else f'{-points:.1f} points behind'
  return f'{who} does NOT beat {rule}: it is {behind} {interval}.'


def _unpaired_verdict(main: Mapping[str, Any], rules: Mapping[str, Mapping[str, Any]]) -> str:
  best = max(sorted(rules), key=lambda name: rules[name]['accuracy'])
  points = 100 * (main['accuracy'] - rules[best]['accuracy'])
  start = f'On preferences, the fine-tuned model ({100 * main["accuracy"]:.1f}%)'
  rule = f'the best rule (`{best}`, {100 * rules[best]["accuracy"]:.1f}%)'
  if points > 0:
    return f'{start} is {points:.1f} points above {rule}; no paired interval of this difference was recorded.'
  return f'{start} does NOT beat {rule}.'


def _baseline_order(baselines: Mapping[str, Any]) -> list[str]:
  """Rules by name, then the coin, then the ceiling."""
  return sorted(baselines, key=lambda name: (name == 'bayes', name == 'random', name))


def _baseline_name(name: str) -> str:
  return {'bayes': 'Bayes ceiling', 'random': 'coin (`random`)'}.get(name, f'rule `{name}`')


def _accuracy(value: Mapping[str, Any] | None) -> str:
  return '-' if value is None else f'{100 * value["accuracy"]:.1f} [{100 * value["low"]:.1f}, {100 * value["high"]:.1f}]'
