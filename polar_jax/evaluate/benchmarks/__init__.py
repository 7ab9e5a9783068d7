"""Public benchmarks of reward models: each module reads one in its published files and scores it by its official rule.

A module has `read(folders, on_bad_example)`, which returns evaluation sets. Official scores are in percent.
"""

from __future__ import annotations

import dataclasses
import importlib
import pathlib

from polar_jax.evaluate import hub
from polar_jax.evaluate.sets import EvaluationSet
from polar_jax.types import UserError

# Modules of this package.
BENCHMARKS = ('judgebench', 'rm_bench', 'rmb', 'polar_rmb', 'rewardbench', 'rewardbench_2', 'ppe_correctness', 'rewardmath')
# Benchmarks whose files are those of another one.
_FOLDERS = {'polar_rmb': 'rmb'}
_ON_HUB = f', which may be {hub.NAME} to download them'


def read(name: str, folder: pathlib.Path | None, on_bad_example: str = 'raise') -> list[EvaluationSet]:
  """Read a benchmark.

  Args:
    name: one of `BENCHMARKS`.
    folder: with a folder for each benchmark, named after it; None for the files on the Hugging Face hub.
    on_bad_example: 'raise', or 'skip' to leave bad rows out and list them in `skipped`.

  Raises:
    UserError: the benchmark is unknown, none of its files are there or can be downloaded, or a row cannot be used.
  """
  if name not in BENCHMARKS:
    raise UserError(f'evaluate.benchmarks: {name!r} is not known; known are: {", ".join(BENCHMARKS)}')
  files = _FOLDERS.get(name, name)
  if folder is None:
    found_at = hub.download(files)
    folders, revisions = [*found_at.values()], {repository: copy.name for repository, copy in found_at.items()}
  else:
    folders, revisions = [folder / files], {}
    if not folders[0].is_dir():
      advice = f'put the published files of {files} there, or set evaluate.folder{_ON_HUB if files in hub.REPOSITORIES else ""}'
      raise UserError(f'{folders[0]}: no such folder; {advice}')
  everything = importlib.import_module(f'polar_jax.evaluate.benchmarks.{name}').read(folders, on_bad_example)
  found = [one for one in everything if one.items]
  if not found:
    raise UserError(f'{folders[0]}: has no row that can be used; set data.on_bad_example=raise to see why')
  lost = tuple(row for one in everything if not one.items for row in one.skipped)  # of sets that consist of bad rows
  found[0] = dataclasses.replace(found[0], skipped=(*found[0].skipped, *lost))
  return [dataclasses.replace(one, revisions=revisions) for one in found]
