"""The evaluate stage on given data: a user's files or public benchmarks, scored by a reward model or from recorded rewards."""

from __future__ import annotations

import dataclasses
import gzip
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from polar_jax import api
from polar_jax.checkpoints.pretrained import open_pretrained
from polar_jax.config import Config, ConfigError
from polar_jax.data.conversation_template import open_template
from polar_jax.evaluate import (
  baselines,
  benchmarks,
  best_of_n,
  contamination,
  hub,
  measures,
  own_files,
  recorded,
  sets,
  statistics,
  text_baselines,
)
from polar_jax.evaluate import references as references_lib
from polar_jax.evaluate.sets import EvaluationSet, Item, Rewards
from polar_jax.runtime import json_files, paths
from polar_jax.scoring.scorer import Scorer
from polar_jax.stages.context import Context
from polar_jax.types import Group, Text

RESULT, SCORES = 'evaluation.json', 'scores.jsonl.gz'
OTHER_SCORES = 'scores_{}.jsonl.gz'  # of the further variants of the references
# (items, their references, whether the model reads references) -> rewards
Reward = Callable[[Sequence[Item], Sequence[Text], bool], Rewards]


def is_requested(config: Config) -> bool:
  """Return whether the config names data to evaluate on, rather than the runs of a workdir.

  Raises:
    ConfigError: it names no data, but has settings that are about such data.
  """
  if config.input or config.evaluate.benchmarks:
    return True
  given = {'output': config.output} | {
    f'evaluate.{name}': getattr(config.evaluate, name) for name in ('folder', 'scores', 'compare', 'training')
  }
  useless = next((name for name, value in given.items() if value), None)
  if useless:
    raise ConfigError(
      f'{useless} is set, but there is no data to evaluate on: name files with input, or benchmarks with evaluate.benchmarks'
    )
  return False


def run(context: Context) -> dict[str, Any]:
  """Evaluate on every set of `input` and `evaluate.benchmarks`; write evaluation.json and the rewards to `output`.

  Returns:
    The section `evaluation` of the report.

  Raises:
    ConfigError: a setting is missing or cannot be used.
    UserError: a file, a row or a recorded reward cannot be used.
  """
  config = context.config
  if not config.output:
    raise ConfigError('output is not set: name a folder for evaluation.json and scores.jsonl.gz with --config.output=DIR')
  folder = paths.path_of(config.output)
  if folder.exists() and not folder.is_dir():
    raise ConfigError(f'output {folder}: is a file; name a folder')
  found = read_sets(config)
  for one in found:
    _announce(context, one)
  second = recorded.Recorded(paths.path_of(config.evaluate.compare)) if config.evaluate.compare else None
  if second:
    second.of(found)  # before anything is scored
  leaked = _leaked(context, found)
  scored: dict[str, tuple[EvaluationSet, dict[str, Rewards]]]
  if config.evaluate.scores:
    held = recorded.Recorded(paths.path_of(config.evaluate.scores)).of(found, config.data.on_bad_example)
    for one in found:
      if one.name not in held:
        context.log(f'{one.name}: left out, because {config.evaluate.scores} has no rewards for it')
    scored = {name: (one, {'recorded': rewards}) for name, (one, rewards) in held.items()}
  else:
    given = {one.name: _references(context, one) for one in found}
    reward = _model(context)
    scored = {
      one.name: (one, {variant: reward(one.items, references, variant != 'none') for variant, references in given[one.name].items()})
      for one in found
    }
  results = {name: _evaluate(context, one, variants) for name, (one, variants) in scored.items()}
  for name, (one, variants) in scored.items():
    if leaked is not None:
      results[name][0]['contamination'] = _without(context, one, next(iter(variants.values())), leaked[name])
  if second:
    _compare(context, second, scored, results)
  if jax.process_index() == 0:
    _write(folder, results)
  context.log(f'evaluate: {len(results)} sets in {folder / RESULT}, rewards in {folder / SCORES}')
  return {'evaluation': {'sets': {name: result for name, (result, _) in results.items()}}}


def read_sets(config: Config) -> list[EvaluationSet]:
  """Return the sets of `input` and `evaluate.benchmarks`.

  Raises:
    ConfigError: two sets have the same name, or a benchmark has no folder.
    UserError: a file or a row cannot be used.
  """
  mode, found = config.data.on_bad_example, list[EvaluationSet]()
  for path in map(paths.path_of, _listed(config.input)):
    found.append(own_files.read(path, path.name.split('.')[0], mode))
  if config.evaluate.benchmarks and not config.evaluate.folder:
    raise ConfigError('evaluate.folder is not set: name the folder that has a folder of published files for each benchmark, or hub')
  for name in _listed(config.evaluate.benchmarks):
    folder = None if config.evaluate.folder == hub.NAME else paths.path_of(config.evaluate.folder or '')
    found += benchmarks.read(name, folder, mode)
  names = [one.name for one in found]
  if twice := next((name for name in names if names.count(name) > 1), None):
    raise ConfigError(f'two sets are named {twice!r}; rename a file, whose name is that of its set')
  return found


def _listed(text: str | None) -> list[str]:
  """Return the different names of a list that is separated by commas."""
  return list(dict.fromkeys(part.strip() for part in (text or '').split(',') if part.strip()))


def _announce(context: Context, one: EvaluationSet) -> None:
  context.log(f'{one.name}: {len(one.items):,} items' + (f'; missing: {", ".join(one.missing)}' if one.missing else ''))
  if one.skipped:
    named = '; '.join(f'{where}: {reason}' for where, reason in one.skipped[:5])
    context.log(f'{one.name}: left out {len(one.skipped)} bad rows ({named}{"; ..." if len(one.skipped) > 5 else ""})')


def _model(context: Context) -> Reward:
  """Return the reward model `checkpoint` as a function of items.

  Raises:
    ConfigError: no checkpoint is named, or it is no reward model.
  """
  config = context.config
  if not config.checkpoint:
    raise ConfigError(
      'checkpoint is not set: name a reward model with --config.checkpoint=DIR, or recorded rewards with --config.evaluate.scores=FILE'
    )
  path = context.checkpoint(config.checkpoint)
  opened = open_pretrained(path)
  if opened.head != 'reward':
    raise ConfigError(f'checkpoint {path}: is not a reward model, but a model with the head {opened.head!r}')
  tokenizer = opened.tokenizer() if config.tokenizer.kind == 'checkpoint' else context.tokenizer()
  model = api.load(opened, mesh=context.mesh, compute=config.model, template=config.template, tokenizer=tokenizer)
  rows, scorers = config.evaluate.rows_per_batch, dict[bool, Scorer]()

  def scorer(use_reference: bool) -> Scorer:
    if use_reference not in scorers:
      settings = dataclasses.replace(model.template_config, use_reference=use_reference and model.template_config.use_reference)
      template = open_template(settings, tokenizer, model.config.known_vocab_size, str(path))
      scorers[use_reference] = Scorer(model.params, model.config, template, context.mesh, rows=rows)
    return scorers[use_reference]

  def reward(items: Sequence[Item], references: Sequence[Text], use_reference: bool) -> Rewards:
    groups = [
      Group(item.prompt, reference, list(item.candidates), str(item.facts.get('wrapper') or 'sft'))
      for item, reference in zip(items, references, strict=True)
    ]
    return [rewards.astype(np.float64) for rewards in scorer(use_reference).score(groups)]

  return reward


def _variants(config: Config) -> list[str]:
  """Return the variants of `evaluate.references`.

  Raises:
    ConfigError: one is unknown, or there is none.
  """
  variants = _listed(config.evaluate.references)
  unknown = [variant for variant in variants if variant not in references_lib.VARIANTS]
  if unknown or not variants:
    what = f'{unknown[0]!r} is unknown' if unknown else 'is empty'
    raise ConfigError(f'evaluate.references: {what}; name some of: {", ".join(references_lib.VARIANTS)}')
  return variants


def _references(context: Context, one: EvaluationSet) -> dict[str, list[Text]]:
  """Return the references of a set by variant; the first variant is the main one.

  Raises:
    ConfigError: a variant is unknown, or there is none.
    UserError: the set does not have what a variant needs.
  """
  variants = _variants(context.config)
  if any(item.reference is None for item in one.items):
    usable = [variant for variant in variants if variant not in ('true', 'shuffled')] or ['empty']
    context.log(f'{one.name}: has no references, so it is scored with: {", ".join(usable)}')
    variants = usable
  return {variant: references_lib.references(one.items, variant, context.config.seed) for variant in variants}


def _evaluate(context: Context, one: EvaluationSet, scored: dict[str, Rewards]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
  """Return the entry of a set in evaluation.json, and its lines of scores.jsonl.gz."""
  resamples = context.config.evaluate.bootstrap
  main, *_ = scored
  result = measures.measure(one.items, scored[main], resamples)
  result |= {'reference': main, 'missing': list(one.missing), 'skipped': len(one.skipped)}
  result |= {'official': None if one.official is None else one.official(one.items, scored[main])}
  result |= {'paper': one.paper(one.items, scored[main], resamples)} if one.paper else {}
  result |= {'revisions': dict(one.revisions)} if one.revisions else {}
  texts = text_baselines.scores(one.items, context.config.seed)
  found = sets.margins(one.items, scored[main])
  clusters = sets.clusters(one.items, found.item)
  by_text = {name: measures.correctness(sets.margins(one.items, values).margin) for name, values in texts.items()}
  result |= {
    'baselines': {name: statistics.accuracy_interval(values, clusters, resamples).asdict() for name, values in by_text.items()},
    'margin_over_best_baseline': baselines.margin_over_best_baseline(measures.correctness(found.margin), by_text, clusters, resamples),
    'references': {variant: _accuracy(one.items, rewards, resamples) for variant, rewards in scored.items()},
  }
  best = best_of_n.curve(one.items, scored[main])
  result |= {} if best is None else {'best_of_n': best}
  context.log(f'{one.name}: accuracy {result["accuracy"]:.4f} [{result["low"]:.4f}, {result["high"]:.4f}], {result["ties"]} ties')
  lines = [
    {'set': one.name, 'id': item.id, 'category': item.category, 'reference': variant, 'rewards': rewards.tolist()}
    for variant, of_items in scored.items()
    for item, rewards in zip(one.items, of_items, strict=True)
  ]
  return result, lines


def _compare(
  context: Context,
  second: recorded.Recorded,
  scored: dict[str, tuple[EvaluationSet, dict[str, Rewards]]],
  results: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]],
) -> None:
  """Add paired tests against the rewards of a second system to the results of the sets that it has scored."""
  others = second.of([one for one, _ in scored.values()], 'raise')
  for name, (one, rewards) in others.items():
    first = sets.margins(one.items, next(iter(scored[name][1].values())))
    margin = sets.margins(one.items, rewards).margin
    clusters = sets.clusters(one.items, first.item)
    compared = measures.compare(first.margin, margin, clusters, context.config.evaluate.bootstrap)
    results[name][0]['compare'] = {'with': second.path.name, 'sets_compared': len(others), **compared}
    context.log(f'{name}: {100 * compared["difference"]:+.1f} points from {second.path.name}, p = {compared["mcnemar"]["p"]:.3g}')


def _leaked(context: Context, found: Sequence[EvaluationSet]) -> dict[str, dict[str, str]] | None:
  """Return, by set, the ids of items whose prompts are in `evaluate.training`, each with the place; None if there is no such file."""
  files = [paths.path_of(text) for text in _listed(context.config.evaluate.training)]
  if not files:
    return None
  out = {}
  for one in found:
    places = contamination.find(one.items, files)
    out[one.name] = {one.items[i].id: place for i, place in places.items()}
    if places:
      named = '; '.join(f'{name}: {place}' for name, place in list(out[one.name].items())[:5])
      context.log(f'{one.name}: {len(places):,} of {len(one.items):,} prompts are in the training files ({named})')
  return out


def _without(context: Context, one: EvaluationSet, rewards: Rewards, leaked: dict[str, str]) -> dict[str, Any]:
  """Return what `contamination` of evaluation.json says: the items that leaked, and the accuracy without them."""
  kept = [(item, scores) for item, scores in zip(one.items, rewards, strict=True) if item.id not in leaked]
  held = {item.id for item in one.items}
  places = {name: place for name, place in leaked.items() if name in held}
  accuracy = _accuracy([item for item, _ in kept], [scores for _, scores in kept], context.config.evaluate.bootstrap) if kept else None
  return {'items': len(places), 'places': places, 'without': accuracy}


def _accuracy(items: Sequence[Item], rewards: Rewards, resamples: int) -> dict[str, Any]:
  found = sets.margins(items, rewards)
  return statistics.accuracy_interval(measures.correctness(found.margin), sets.clusters(items, found.item), resamples).asdict()


def _write(folder: pathlib.Path, results: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]]) -> None:
  """Write the rewards of each variant, and then the results."""
  folder.mkdir(parents=True, exist_ok=True)
  by_file: dict[str, list[str]] = {}
  for result, lines in results.values():
    for line in lines:
      variant = line['reference']
      file = SCORES if variant == result['reference'] else OTHER_SCORES.format(variant)
      by_file.setdefault(file, []).append(json.dumps(line, allow_nan=False) + '\n')
  for file, written in by_file.items():
    paths.write_atomically(folder / file, gzip.compress(''.join(written).encode('utf-8'), mtime=0))
  content = {'sets': {name: result for name, (result, _) in results.items()}}
  paths.write_atomically(folder / RESULT, json_files.dumps(content, indent=2) + '\n')
