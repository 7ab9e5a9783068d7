"""The evaluate stage on given data: a user's files or public benchmarks, scored by a reward model or from recorded rewards."""

from __future__ import annotations

import dataclasses
import gzip
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from polar_jax.config import Config, ConfigError
from polar_jax.data import readers
from polar_jax.evaluate import (
  baselines,
  benchmarks,
  best_of_n,
  contamination,
  hub,
  measures,
  own_files,
  recorded,
  references,
  sets,
  statistics,
  text_baselines,
)
from polar_jax.evaluate.benchmarks import rm_bench
from polar_jax.evaluate.references import View
from polar_jax.evaluate.sets import EvaluationSet, Item, Rewards
from polar_jax.runtime import json_files, paths
from polar_jax.stages import arms as arms_lib
from polar_jax.stages import evaluate_arms
from polar_jax.stages import evaluate_systems as systems
from polar_jax.stages.context import Context

RESULT, SCORES = 'evaluation.json', 'scores.jsonl.gz'
HELD_OUT = 'held_out'  # folder of the rows that the world `files` keeps for evaluation
OTHER_SCORES = 'scores_{}.jsonl.gz'  # of the further views of the references, and of the runs of the arms
RECORDED = 'recorded'


class Scored(NamedTuple):
  """A set with its rewards.

  Attributes:
    one: the set.
    rewards: by the name of the view of the references; the first is the main one.
    views: of the references, by the same names; {} for recorded rewards.
    truncated: what the model read only a part of, with the main references; None for recorded rewards.
  """

  one: EvaluationSet
  rewards: dict[str, Rewards]
  views: dict[str, View]
  truncated: dict[str, Any] | None = None

  @property
  def main(self) -> str:
    """Name of the view that the results are about."""
    return next(iter(self.rewards))


def is_requested(config: Config) -> bool:
  """Return whether the config names sets to evaluate on: files, benchmarks, or the held-out rows of the world `files`.

  Raises:
    ConfigError: it names no data, but has settings that are about such data.
  """
  if config.input or config.evaluate.benchmarks or config.synthesize.world == 'files':
    return True
  given = {'output': config.output} | {
    f'evaluate.{name}': getattr(config.evaluate, name)
    for name in ('folder', 'scores', 'compare', 'training', 'near_duplicates', 'reference_file', 'embedding', 'language_model', 'max_items')
  }
  useless = next((name for name, value in given.items() if value), None)
  if useless:
    raise ConfigError(
      f'{useless} is set, but there is no data to evaluate on: name files with input, or benchmarks with evaluate.benchmarks'
    )
  return False


def run(context: Context) -> dict[str, Any]:
  """Evaluate on every set of `input` and `evaluate.benchmarks`; write evaluation.json and the rewards to `output`.

  In the world `files` the held-out rows of the workdir are sets as well. Without `checkpoint` and `evaluate.scores`, the arms that the
  workdir has trained are evaluated, the first of them in full, and `output` may be left out: it is `evaluation` in the workdir.

  Returns:
    The section `evaluation` of the report.

  Raises:
    ConfigError: a setting is missing or cannot be used.
    UserError: a file, a row or a recorded reward cannot be used.
  """
  config = context.config
  arms = {} if config.checkpoint or config.evaluate.scores else arms_lib.trained_arms(context)
  if not config.output and not arms and config.synthesize.world != 'files':
    raise ConfigError('output is not set: name a folder for evaluation.json and scores.jsonl.gz with --config.output=DIR')
  folder = paths.path_of(config.output) if config.output else context.workdir / 'evaluation'
  if folder.exists() and not folder.is_dir():
    raise ConfigError(f'output {folder}: is a file; name a folder')
  whole = {one.name: one for one in read_sets(config, context.data / HELD_OUT)}
  found = [_part(one, _drawn(one, config.evaluate.max_items)) for one in whole.values()]
  _check_parts(config, [one.name for one in found])
  for one in found:
    _announce(context, one, len(whole[one.name].items))
  repeated = _duplicates(context, found)
  # What cannot be used is found before anything is scored.
  others = systems.others(context, _listed(config.evaluate.compare), found)
  leaked = _leaked(context, found)
  by_model = systems.model_baselines(context)
  checkpoint = context.home(next(iter(arms.values()))[0]) if arms else config.checkpoint
  scored = _recorded(context, found) if config.evaluate.scores else _scored(context, found, checkpoint)
  compared = [part for part in scored if config.evaluate.arm_sets is None or part.one.name in _listed(config.evaluate.arm_sets)]
  tasks = {part.one.name: _task(part, config.evaluate.arm_items) for part in compared} if arms else {}
  of_arms = evaluate_arms.score(context, arms, list(tasks.values())) if arms else []
  results = {}
  for part in scored:
    result = _measure(context, part) | _baselines(context, part, by_model) | _references(context, part)
    if len(part.one.items) < len(whole[part.one.name].items) and config.evaluate.max_items:
      result['drawn_from'] = len(whole[part.one.name].items)
    result['duplicates'] = {'items': len(repeated[part.one.name]), 'of': repeated[part.one.name]}
    if others:
      result['compare'] = _compare(context, part, others)
    if part.one.name in tasks:
      result['arms'] = evaluate_arms.measure(context, tasks[part.one.name].one, of_arms)
    if leaked is not None:
      result['contamination'] = _without(context, part, leaked[part.one.name])
    results[part.one.name] = result
  tests = sum(
    len(result['baselines']) + len(result.get('compare', ())) + max(len(result.get('arms', ())) - 1, 0) for result in results.values()
  )
  content = {'sets': results, 'paired_tests': tests}
  if jax.process_index() == 0:
    _write(folder, content, scored, list(tasks.values()), of_arms)
  context.log(f'evaluate: {len(results)} sets in {folder / RESULT}, rewards in {folder / SCORES}')
  return {'evaluation': content}


def check(config: Config) -> None:
  """Check, before the stages that come before this one run, what can be checked: the settings, the named files, and the benchmarks.

  Raises:
    ConfigError: a setting cannot be used.
    UserError: a file, a row or a package is missing, or cannot be used.
  """
  _variants(config)
  found = [one.name for one in read_sets(config)]
  if config.synthesize.world == 'files':  # these sets are not written yet
    of_files = own_files.set_names([paths.path_of(name) for name in _listed(config.synthesize.files)])
    found += of_files + [name + own_files.UNSEEN_POLICIES for name in of_files]
  _check_parts(config, found)
  if config.evaluate.embedding:
    text_baselines.open_encoder(config.evaluate.embedding)


def _check_parts(config: Config, names: Sequence[str]) -> None:
  """Check the settings that draw items and choose sets, given the names of all sets."""
  recorded_files = [name for name in _listed(config.evaluate.compare) if name.endswith(readers.SUFFIXES)]
  if config.evaluate.max_items and (config.evaluate.scores or recorded_files):
    of = config.evaluate.scores or recorded_files[0]
    raise ConfigError(f'evaluate.max_items is set, but {of} has recorded rewards, which need no drawing; drop evaluate.max_items')
  unknown = [name for name in _listed(config.evaluate.arm_sets) if name not in names]
  if unknown:
    raise ConfigError(f'evaluate.arm_sets: there is no set {unknown[0]!r}; name some of: {", ".join(names)}')


def _task(part: Scored, limit: int | None) -> evaluate_arms.Task:
  """Return what every arm is asked: at most `limit` items of a set, with the main references."""
  kept, references, rewards = _drawn(part.one, limit), part.views[part.main].references, part.rewards[part.main]
  return evaluate_arms.Task(_part(part.one, kept), part.main, [references[i] for i in kept], [rewards[i] for i in kept])


def _drawn(one: EvaluationSet, limit: int | None) -> list[int]:
  """Return the positions of at most `limit` items of a set, drawn at random by its name, in their order."""
  count = len(one.items)
  if limit is None or limit >= count:
    return list(range(count))
  return sorted(np.random.default_rng(list(one.name.encode())).choice(count, limit, replace=False).tolist())


def _part(one: EvaluationSet, kept: Sequence[int]) -> EvaluationSet:
  return dataclasses.replace(one, items=[one.items[i] for i in kept])


def read_sets(config: Config, held_out: pathlib.Path | None = None) -> list[EvaluationSet]:
  """Return the sets of `input` and `evaluate.benchmarks`, and in the world `files` those of the folder of held-out rows.

  Raises:
    ConfigError: two sets have the same name, or a benchmark has no folder.
    UserError: a file or a row cannot be used.
  """
  mode, found = config.data.on_bad_example, list[EvaluationSet]()
  inputs = [paths.path_of(name) for name in _listed(config.input)]
  if config.synthesize.world == 'files' and held_out is not None:
    rows = sorted(held_out.glob('*.jsonl.gz'))
    if not rows and not inputs and not config.evaluate.benchmarks:
      raise ConfigError(f'{held_out}: has no held-out rows; run the stage synthesize in this workdir first, or name files with input')
    inputs += rows
  for path in inputs:
    found += own_files.read(path, path.name.split('.')[0], mode)
  if config.evaluate.benchmarks and not config.evaluate.folder:
    raise ConfigError('evaluate.folder is not set: name the folder that has a folder of published files for each benchmark, or hub')
  for name in _listed(config.evaluate.benchmarks):
    folder = None if config.evaluate.folder == hub.NAME else paths.path_of(config.evaluate.folder or '')
    found += benchmarks.read(name, folder, mode)
  names = [one.name for one in found]
  if twice := next((name for name in names if names.count(name) > 1), None):
    raise ConfigError(f'two sets are named {twice!r}; rename a file, whose name is that of its set')
  variants = _variants(config)
  if 'file' in variants and mode == 'skip':
    given = references.read_file(paths.path_of(config.evaluate.reference_file or ''), found)
    found = [references.having(one, given) for one in found]
  if {'right', 'wrong'} & set(variants):
    found = [references.hold_out(one, config.seed) for one in found]
  return found


def _listed(text: str | None) -> list[str]:
  """Return the different names of a list that is separated by commas."""
  return list(dict.fromkeys(part.strip() for part in (text or '').split(',') if part.strip()))


def _announce(context: Context, one: EvaluationSet, whole: int) -> None:
  drawn = f' of {whole:,}, drawn at random (evaluate.max_items)' if len(one.items) < whole else ''
  context.log(f'{one.name}: {len(one.items):,} items{drawn}' + (f'; missing: {", ".join(one.missing)}' if one.missing else ''))
  if one.skipped:
    named = '; '.join(f'{where}: {reason}' for where, reason in one.skipped[:5])
    context.log(f'{one.name}: left out {len(one.skipped)} bad rows ({named}{"; ..." if len(one.skipped) > 5 else ""})')


def _duplicates(context: Context, found: Sequence[EvaluationSet]) -> dict[str, dict[str, str]]:
  """Return and log the items that are those of an earlier set, or earlier in their own; see `sets.duplicates`."""
  repeated = sets.duplicates(found)
  for name, of_set in repeated.items():
    if of_set:
      named = '; '.join(f'{item} is {other}' for item, other in list(of_set.items())[:5])
      context.log(f'{name}: {len(of_set):,} items have the prompt and candidates of an earlier one ({named})')
  return repeated


def _recorded(context: Context, found: Sequence[EvaluationSet]) -> list[Scored]:
  """Return the sets that have rewards in `evaluate.scores`."""
  config = context.config
  held = recorded.Recorded(paths.path_of(config.evaluate.scores or '')).of(found, config.data.on_bad_example)
  for one in found:
    if one.name not in held:
      context.log(f'{one.name}: left out, because {config.evaluate.scores} has no rewards for it')
  return [Scored(one, {RECORDED: rewards}, {}) for one, rewards in held.values()]


def _scored(context: Context, found: Sequence[EvaluationSet], checkpoint: str | pathlib.Path | None) -> list[Scored]:
  """Return the sets with the rewards of a checkpoint.

  Raises:
    ConfigError: no checkpoint is named, or it is no reward model.
  """
  config = context.config
  given = references.read_file(paths.path_of(config.evaluate.reference_file), found) if config.evaluate.reference_file else {}
  views = {one.name: _views(context, one, given) for one in found}
  if not checkpoint:
    raise ConfigError(
      'checkpoint is not set: name a reward model with --config.checkpoint=DIR, or recorded rewards with --config.evaluate.scores=FILE'
    )
  path = context.checkpoint(checkpoint) if isinstance(checkpoint, str) else checkpoint
  model = systems.RewardSystem(context, 'checkpoint', path)
  out = []
  for one in found:
    of_set = views[one.name]
    main = next(iter(of_set))
    truncated = model.truncated(one.items, of_set[main].references, main != 'none')
    for name in ('responses', 'prompts'):
      if truncated[name]:
        context.log(f'{one.name}: the model reads only a part of the {name} of {truncated[name]:,} of {len(one.items):,} items')
    rewards = {name: model.rewards(one.items, view.references, name != 'none') for name, view in of_set.items()}
    out.append(Scored(one, rewards, of_set, truncated))
  return out


def _variants(config: Config) -> list[str]:
  """Return the variants of `evaluate.references`.

  Raises:
    ConfigError: one is unknown or cannot be the first, or there is none.
  """
  variants = _listed(config.evaluate.references)
  unknown = [variant for variant in variants if variant not in references.VARIANTS]
  if unknown or not variants:
    what = f'{unknown[0]!r} is unknown' if unknown else 'is empty'
    raise ConfigError(f'evaluate.references: {what}; name some of: {", ".join(references.VARIANTS)}')
  if variants[0] in ('style', 'degraded'):
    raise ConfigError(f'evaluate.references: {variants[0]!r} is several references, and cannot be the first; name another one before it')
  if 'file' in variants and not config.evaluate.reference_file:
    raise ConfigError("evaluate.references: 'file' needs references; name a file with --config.evaluate.reference_file=FILE")
  return variants


def _views(context: Context, one: EvaluationSet, given: Mapping[str, Any]) -> dict[str, View]:
  """Return the views of the references of a set; the first is the main one. Variants that it cannot have are left out, and named."""
  out: dict[str, View] = {}
  for variant in _variants(context.config):
    if reason := references.lacking(one.items, variant, given):
      context.log(f'{one.name}: is not scored with the references {variant!r}: {reason}')
    else:
      out |= references.views(one.items, variant, given, context.config.seed)
  if not out or next(iter(out)).startswith(('style', 'degraded')):
    context.log(f'{one.name}: is scored with empty references')
    out = references.views(one.items, 'empty') | out
  return out


def _measure(context: Context, part: Scored) -> dict[str, Any]:
  """Return what evaluation.json says of a set by its rewards alone."""
  one, rewards, resamples = part.one, part.rewards[part.main], context.config.evaluate.bootstrap
  result = measures.measure(one.items, rewards, resamples)
  result |= {'reference': part.main, 'missing': list(one.missing), 'skipped': len(one.skipped), 'truncated': part.truncated}
  result |= {'official': None if one.official is None else one.official(one.items, rewards)}
  result |= {'paper': one.paper(one.items, rewards, resamples)} if one.paper else {}
  result |= {'revisions': dict(one.revisions)} if one.revisions else {}
  best = best_of_n.curve(one.items, rewards, resamples, context.config.seed)
  if best is not None:
    of_main = {key: best[key] for key in ('reward', 'low', 'high')}
    others = {name: values for name, values in part.rewards.items() if name != part.main}
    curves = {name: best_of_n.reward_curve(one.items, values, resamples, context.config.seed) for name, values in others.items()}
    best['references'] = {part.main: of_main, **curves}
    result['best_of_n'] = best
  context.log(f'{one.name}: accuracy {result["accuracy"]:.4f} [{result["low"]:.4f}, {result["high"]:.4f}], {result["ties"]} ties')
  return result


def _baselines(context: Context, part: Scored, by_model: systems.Baselines) -> dict[str, Any]:
  """Return the accuracies of baselines on the same comparisons, each with its paired test against the model."""
  items, resamples = part.one.items, context.config.evaluate.bootstrap
  found = sets.margins(items, part.rewards[part.main])
  clusters = sets.clusters(items, found.item)
  scores = text_baselines.scores(items, context.config.seed)
  if all(item.reference is not None for item in items):
    scores |= {name: list(score(items)) for name, score in by_model.items()}
  elif by_model:
    context.log(f'{part.one.name}: has no references, so that it is left out of {", ".join(by_model)}')
  margins = {name: sets.margins(items, values).margin for name, values in scores.items()}
  correct = {name: measures.correctness(margin) for name, margin in margins.items()}
  entries = {
    name: statistics.accuracy_interval(correct[name], clusters, resamples).asdict()
    | {'paired': measures.compare(found.margin, margin, clusters, resamples)}
    for name, margin in margins.items()
  }
  best = baselines.margin_over_best_baseline(measures.correctness(found.margin), correct, clusters, resamples)
  return {'baselines': entries, 'margin_over_best_baseline': best}


def _references(context: Context, part: Scored) -> dict[str, Any]:
  """Return the accuracy with each reference, as a curve for degraded ones, and the style matrices."""
  items, resamples = part.one.items, context.config.evaluate.bootstrap
  by_name = {}
  for name, rewards in part.rewards.items():
    compared = references.without_own(items, part.views[name]) if part.views else items
    by_name[name] = _accuracy(compared, rewards, resamples)
  out: dict[str, Any] = {'references': by_name}
  kept = {'true': 100, **{f'degraded_{share}': share for share in references.KEPT}, 'empty': 0}
  if any(name.startswith('degraded') for name in by_name):
    out['reference_curve'] = [{'words_kept': share, **by_name[name]} for name, share in kept.items() if name in by_name]
  styles = {name.removeprefix('style_'): rewards for name, rewards in part.rewards.items() if name.startswith('style_')}
  if styles:
    out['reference_styles'] = rm_bench.style_references(items, styles)
  return out


def _compare(context: Context, part: Scored, others: Sequence[systems.Other]) -> dict[str, Any]:
  """Return paired tests against the systems that have rewards for the set."""
  out = {}
  items = part.one.items
  first = sets.margins(items, part.rewards[part.main])
  clusters = sets.clusters(items, first.item)
  for other in others:
    rewards = other.rewards(part.one, part.views[part.main].references if part.views else None, part.main != 'none')
    if rewards is None:
      continue
    margin = sets.margins(items, rewards).margin
    compared = measures.compare(first.margin, margin, clusters, context.config.evaluate.bootstrap)
    interval = statistics.accuracy_interval(measures.correctness(margin), clusters, context.config.evaluate.bootstrap)
    out[other.name] = {**compared, 'other': interval.asdict()}
    context.log(f'{part.one.name}: {100 * compared["difference"]:+.1f} points from {other.name}, p = {compared["mcnemar"]["p"]:.3g}')
  return out


def _leaked(context: Context, found: Sequence[EvaluationSet]) -> dict[str, dict[str, str]] | None:
  """Return, by set, the ids of items whose prompts are in `evaluate.training`, each with the place; None if there is no such file."""
  settings = context.config.evaluate
  files = [paths.path_of(text) for text in _listed(settings.training)]
  if not files:
    if settings.near_duplicates is not None:
      raise ConfigError('evaluate.near_duplicates is set, but there is nothing to search: name files with evaluate.training')
    return None
  out = {}
  for one in found:
    places = contamination.find(one.items, files, settings.near_duplicates)
    out[one.name] = {one.items[i].id: place for i, place in places.items()}
    if places:
      named = '; '.join(f'{name}: {place}' for name, place in list(out[one.name].items())[:5])
      context.log(f'{one.name}: {len(places):,} of {len(one.items):,} prompts are in the training files ({named})')
  return out


def _without(context: Context, part: Scored, leaked: dict[str, str]) -> dict[str, Any]:
  """Return what `contamination` of evaluation.json says: the items that leaked, and the accuracy without them."""
  items, rewards = part.one.items, part.rewards[part.main]
  kept = [(item, scores) for item, scores in zip(items, rewards, strict=True) if item.id not in leaked]
  held = {item.id for item in items}
  places = {name: place for name, place in leaked.items() if name in held}
  accuracy = _accuracy([item for item, _ in kept], [scores for _, scores in kept], context.config.evaluate.bootstrap) if kept else None
  return {'items': len(places), 'places': places, 'without': accuracy}


def _accuracy(items: Sequence[Item], rewards: Rewards, resamples: int) -> dict[str, Any]:
  found = sets.margins(items, rewards)
  return statistics.accuracy_interval(measures.correctness(found.margin), sets.clusters(items, found.item), resamples).asdict()


def _write(
  folder: pathlib.Path,
  content: dict[str, Any],
  scored: Sequence[Scored],
  tasks: Sequence[evaluate_arms.Task],
  arms: Sequence[evaluate_arms.ArmRewards],
) -> None:
  """Write the rewards of each view, those of each run of the arms on their items, and then the results."""
  folder.mkdir(parents=True, exist_ok=True)
  by_file: dict[str, list[str]] = {}

  def add(file: str, one: EvaluationSet, view: str, rewards: Rewards) -> None:
    for item, values in zip(one.items, rewards, strict=True):
      line = {'set': one.name, 'id': item.id, 'category': item.category, 'reference': view, 'rewards': np.asarray(values).tolist()}
      by_file.setdefault(file, []).append(json.dumps(line, allow_nan=False) + '\n')

  for part in scored:
    for name, rewards in part.rewards.items():
      add(SCORES if name == part.main else OTHER_SCORES.format(name), part.one, name, rewards)
  for task in tasks:
    for arm in arms:
      for run, rewards in zip(arm.runs, arm.by_set[task.one.name], strict=True):
        add(OTHER_SCORES.format(run), task.one, task.view, rewards)
  for file, written in by_file.items():
    paths.write_atomically(folder / file, gzip.compress(''.join(written).encode('utf-8'), mtime=0))
  paths.write_atomically(folder / RESULT, json_files.dumps(content, indent=2) + '\n')
