"""The synthesize stage for data of real language models in files (`polar_jax.synthesis.files`): reads, splits, checks and writes them."""

from __future__ import annotations

import collections
import dataclasses
import gzip
import json
import pathlib
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import polar_jax
from polar_jax.config import ConfigError, SynthesizeConfig
from polar_jax.data import tfds
from polar_jax.evaluate.near import NearDuplicates
from polar_jax.evaluate.words import words_of
from polar_jax.runtime import json_files, paths
from polar_jax.synthesis import files as files_lib
from polar_jax.synthesis import filters, inputs
from polar_jax.synthesis.files import Files, Splits
from polar_jax.synthesis.plan import UNSEEN
from polar_jax.types import Triplet, UserError

CARD, HELD_OUT = 'files.json', 'held_out'  # the folder is read by stage evaluate
_FORMAT = 1  # to be raised when the same files and settings give other data
_SIZES = ('train_examples', 'evaluation_examples', 'preference_examples', 'preference_evaluation_examples')
_DRAWING = ('pairs_per_prompt', 'negatives', 'triplet_words', 'train_policies', 'correctness_pairs', 'best_of')
_SETTINGS = (*_DRAWING, 'validation_share', 'unseen_share', 'held_out_policies', 'exclude_near', *_SIZES)
_TRIPLETS = 'Triplets of answers of language models: reference and chosen are of one policy, rejected is of another.'
_PREFERENCES = 'Ranked answers of language models, with a reference.'


def synthesize(config: SynthesizeConfig, seed: int, workdir: pathlib.Path, log: Callable[[str], None]) -> dict[str, Any]:
  """Write workdir/data: triplets and preferences (TFDS data sets), held_out/NAME.jsonl.gz, and files.json, which says what they are.

  Complete data of the same files and settings are left as they are.

  Args:
    config: names the files.
    seed: of all draws.
    workdir: of the run.
    log: receives lines about progress.

  Returns:
    The section `synthesize` of the report: `rows` of each split, and `seconds`.

  Raises:
    UserError: a file or a row cannot be used, or nothing can be made of them.
  """
  started, folder = time.perf_counter(), workdir / 'data'
  given, exclude = _paths(config.files), _paths(config.exclude)
  if not given:
    raise ConfigError('synthesize.files is not set; name files of triplets, answers or preferences (docs/real.md)')
  settings = {name: getattr(config, name) for name in _SETTINGS} | {'seed': seed, 'format': _FORMAT, 'version': polar_jax.__version__}
  # A file is known by its content, and by the names that a set is called after, wherever it is.
  digests = lambda files: [[path.parent.name, path.name, inputs.digest_of(path)] for path in files]
  settings |= {'files': digests(given), 'exclude': digests(exclude)}
  if (known := _complete(folder, settings)) is not None:
    log(f'synthesize: reusing the complete data in {folder} (same files and settings)')
    return known
  rows = files_lib.read(given)
  splits = Splits(config, seed, rows)
  (folder / CARD).unlink(missing_ok=True)
  held_out = _write_held_out(folder / HELD_OUT, files_lib.held_out_rows(rows, splits, config.evaluation_examples, config.best_of, seed))
  found = _drop_contaminated(config, rows, splits, exclude, log)
  made = {'triplets': files_lib.triplets(rows, splits, config, seed), 'preferences': files_lib.preferences(rows, splits, config, seed)}
  if not any(made.values()):
    raise UserError('synthesize.files: no training example can be made: no prompt has two answers of one policy and one of another')
  written = {name: _write(folder, name, examples, seed) for name, examples in made.items() if examples}
  counts = {f'{name}/{split}': count for name, part in written.items() for split, count in part.rows.items()}
  kept = {name: _lines(path) for name, path in held_out.items()}
  section = {'rows': counts, 'held_out': kept, 'seconds': {'all': time.perf_counter() - started}}
  card = _card(rows, splits, made, found)
  paths.write_atomically(folder / CARD, json_files.dumps({'settings': settings, **card, 'section': section}, indent=2) + '\n')
  log(f'synthesize: {", ".join(f"{name} {count:,}" for name, count in counts.items())}; see {folder / CARD}')
  for reason, count in sorted(splits.left_out.items()):
    log(f'synthesize: left out: {count:,} {reason}')
  log(f'synthesize: held out: {", ".join(f"{name} {count:,}" for name, count in kept.items())} rows in {folder / HELD_OUT}')
  return section


def _paths(text: str | None) -> list[pathlib.Path]:
  return [pathlib.Path(paths.path_of(name.strip())) for name in (text or '').split(',') if name.strip()]


def _complete(folder: pathlib.Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
  """Return the section about the data that are there; None if there are none, of other settings, or damaged."""
  try:
    card = json_files.read(folder / CARD, '')
  except json_files.JsonError:
    return None
  if card.get('settings') != json.loads(json.dumps(settings)) or not isinstance(card.get('section'), dict):
    return None
  section = card['section']
  try:
    for name in {name.split('/')[0] for name in section['rows']}:
      tfds.verify(folder / name)
    complete = all(_lines(folder / HELD_OUT / f'{name}.jsonl.gz') == count for name, count in section['held_out'].items())
  except (UserError, OSError, EOFError):
    return None
  return section if complete else None


def _lines(path: pathlib.Path) -> int:
  with gzip.open(path) as file:
    return sum(1 for _ in file)


def _write_held_out(folder: pathlib.Path, by_set: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, pathlib.Path]:
  """Write the rows for evaluation. Returns the file of each set."""
  shutil.rmtree(folder, ignore_errors=True)
  folder.mkdir(parents=True)
  out = {}
  for name, rows in by_set.items():
    text = ''.join(json.dumps(row, sort_keys=True) + '\n' for row in rows)
    out[name] = folder / f'{name}.jsonl.gz'
    paths.write_atomically(out[name], gzip.compress(text.encode(), mtime=0))
  return out


def _drop_contaminated(
  config: SynthesizeConfig, rows: Files, splits: Splits, exclude: Sequence[pathlib.Path], log: Callable[[str], None]
) -> list[dict[str, str]]:
  """Leave out training prompts that occur in files of evaluation, or are near duplicates of held-out ones. Returns them with the place.

  Held-out prompts of the same files are not searched for 13-grams: prompts of one task often begin with the same sentence.
  """
  prompts = {files_lib.key(row.prompt): row.prompt for row in rows.all()}
  held_out = {name: prompt for name, prompt in prompts.items() if splits.of(prompt) == UNSEEN}
  prompts = {name: prompt for name, prompt in prompts.items() if name not in held_out}
  found = dict.fromkeys(_near(prompts, held_out, config.exclude_near), 'a held-out prompt')
  if exclude:
    names = list(prompts)
    found |= {names[i]: where for i, where in filters.contaminated(list(prompts.values()), exclude, config.exclude_near).items()}
  splits.dropped.update(found)
  if found:
    log(f'synthesize: {len(found):,} of {len(prompts):,} prompts left out: in files of evaluation, or nearly equal to held-out ones')
  return [{'prompt': name, 'found_in': where} for name, where in found.items()]


def _near(prompts: Mapping[str, str], held_out: Mapping[str, str], threshold: float | None) -> list[str]:
  """Return the keys of prompts that are near duplicates of a held-out one."""
  if threshold is None:
    return []
  table = NearDuplicates(threshold, filters.NEAR_CONTAMINATION)
  for i, prompt in enumerate(held_out.values()):
    table.add(i, words_of(prompt))
  return [name for name, prompt in prompts.items() if table.find(words_of(prompt))]


def _write(folder: pathlib.Path, name: str, splits: Mapping[str, Sequence[Triplet]], seed: int) -> tfds.Written:
  shutil.rmtree(folder / name, ignore_errors=True)
  order = [split for split in ('train', 'validation', 'test', 'unseen_prompts', 'unseen_policies') if splits.get(split)]
  description = _TRIPLETS if name == 'triplets' else _PREFERENCES
  return tfds.write(folder / name, name, {split: splits[split] for split in order}, description, {'seed': seed})


def _card(rows: Files, splits: Splits, made: Mapping[str, Mapping[str, Sequence[Triplet]]], found: list[dict[str, str]]) -> dict[str, Any]:
  """Return what files.json says of the data: prompts and policies by split, examples by set, and what was left out."""
  prompts = {files_lib.key(row.prompt): row.prompt for row in rows.all()}
  by_split = collections.Counter(splits.of(prompt) or 'contaminated' for prompt in prompts.values())
  return {
    'rows_read': {field.name: len(getattr(rows, field.name)) for field in dataclasses.fields(rows)},
    'prompts': dict(sorted(by_split.items())),
    'policies': {'all': len(files_lib.policies(rows)), 'held_out': sorted(splits.held_out)},
    'examples': {f'{name}/{split}': files_lib.counts(part) for name, of in made.items() for split, part in of.items()},
    'left_out': dict(sorted(splits.left_out.items())),
    'contaminated': found,
  }
