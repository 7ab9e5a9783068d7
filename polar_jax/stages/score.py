"""The score stage: a file of rows in, the same file with a reward in each row out."""

from __future__ import annotations

import dataclasses
import itertools
import os
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from polar_jax import api
from polar_jax.checkpoints.checkpointer import FOLDER
from polar_jax.checkpoints.pretrained import Pretrained, open_pretrained
from polar_jax.checkpoints.run_folder import ASSETS
from polar_jax.config import Config, ConfigError
from polar_jax.data.examples import describe_skipped
from polar_jax.data.template import Template
from polar_jax.runtime import paths
from polar_jax.runtime.clock import Clock
from polar_jax.runtime.progress import Progress
from polar_jax.scoring import files as row_files
from polar_jax.scoring.exact import ExactScorer, RowError
from polar_jax.stages.context import Context
from polar_jax.types import UserError


def score(context: Context) -> dict[str, Any]:
  """Scores the rows of `input` with the reward model `checkpoint` and writes them to `output`, `score.window` rows at a time.

  The whole input is checked before anything is scored. The same command continues a stopped run.

  Raises:
    ConfigError: a setting is missing or cannot be used.
    UserError: a row or a file cannot be used.
  """
  config = context.config
  checkpoint, source, target = _paths(config)
  opened = open_pretrained(checkpoint)
  if opened.head != 'reward':
    kind = {'lm': 'a language model', 'value': 'a value model'}[opened.head]
    raise ConfigError(f'checkpoint {checkpoint}: is {kind}; only a reward model gives rewards')
  tokenizer = opened.tokenizer() if config.tokenizer.kind == 'checkpoint' else context.tokenizer()
  template = Template(opened.template(config.template), tokenizer)
  skipped: list[tuple[int, str]] = []
  read = lambda found: row_files.read_rows(source, config.data.on_bad_example, found, use_reference=template.config.use_reference)
  total = sum(1 for _ in read(skipped))
  if skipped:
    context.log(describe_skipped(source, skipped, total))

  output = row_files.RewardFile(target, _settings(context, opened, template, source, target))
  try:
    kept = int(multihost_utils.broadcast_one_to_all(np.int32(output.kept)))
    if output.changed:
      context.log(f'score: drops the rows of a stopped run, which was made with another {", ".join(output.changed)}')
    if kept:
      context.log(f'score: continues after {kept} rows of a stopped run')
    model = api.load(opened, mesh=context.mesh, compute=config.model, template=config.template, tokenizer=tokenizer)
    started = time.perf_counter()
    remaining = itertools.islice(read([]), kept, None)
    tokens = _score_windows(model.exact_scorer, remaining, output, source, config.score.window, _Progress(total, kept, context.log))
    seconds = time.perf_counter() - started
    output.finish()
  finally:
    output.close()
  context.log(f'score: {total} rows in {target}, mean reward {output.mean:.4f}, standard deviation {output.std:.4f}')
  facts = {'rows': total, 'skipped': len(skipped), 'resumed_rows': kept, 'tokens': tokens, 'seconds': seconds}
  return {'score': {**facts, 'rows_per_second': (total - kept) / seconds, 'mean': output.mean, 'std': output.std}}


def _paths(config: Config) -> tuple[pathlib.Path, pathlib.Path, pathlib.Path]:
  """(checkpoint, input, output)."""
  wanted = {
    'checkpoint': 'the folder or file of a reward model',
    'input': 'a file of rows with prompt, reference and output (.jsonl, .jsonl.gz or .parquet)',
    'output': 'the file to be written (.jsonl or .jsonl.gz)',
  }
  for name, meaning in wanted.items():
    if not getattr(config, name):
      raise ConfigError(f'{name}: name {meaning}, with --config.{name}=PATH')
  checkpoint, source, target = (paths.path_of(getattr(config, name)) for name in wanted)
  row_files.check_output(target, source)
  return checkpoint, source, target


def _settings(context: Context, opened: Pretrained, template: Template, source: pathlib.Path, target: pathlib.Path) -> dict[str, Any]:
  """All that decides which rows are written, and each bit of their rewards."""
  config, mesh = context.config, context.mesh
  model = opened.compute_like(config.model)
  parts = [opened.path / FOLDER, opened.path / ASSETS] if opened.kind == 'run' else [opened.path]
  own = {'trained': context.data / 'tokenizer.json', 'file': pathlib.Path(config.tokenizer.path or '')}.get(config.tokenizer.kind)
  return {
    'input': _files(source, target),
    'checkpoint': [_files(part, target) for part in parts],
    'tokenizer': [config.tokenizer.kind, _files(own, target) if own else None],
    'template': dataclasses.asdict(template.config),
    'model': dataclasses.asdict(model),
    'devices': [mesh.devices.flat[0].device_kind, dict(mesh.shape), os.cpu_count()],
    'jax': jax.__version__,
  }


def _files(path: pathlib.Path, target: pathlib.Path) -> list[tuple[str, int, int]]:
  """Name, size and time of change of a file, or of the files in a folder, but for those that this stage writes."""
  inside = paths.files_below(path) if path.is_dir() else [path] if path.is_file() else []
  found = [file for file in inside if not file.name.startswith(target.name)]
  return [(str(paths.absolute(file)), *paths.size_and_time(file)) for file in found]


def _score_windows(
  scorer: ExactScorer,
  remaining: Iterator[row_files.Row],
  output: row_files.RewardFile,
  source: pathlib.Path,
  window: int,
  progress: _Progress,
) -> int:
  """Scores and writes all that remains; returns the number of tokens."""
  tokens = 0
  while members := list(itertools.islice(remaining, window)):
    try:
      sequences = scorer.encode([row.group for row in members])
      rewards = scorer.score_sequences(sequences)
    except RowError as error:
      raise UserError(f'{source}, example {members[error.index].number}: {error.reason}') from error
    output.write(members, rewards)
    tokens += sum(map(len, sequences))
    progress.add(len(members))
  progress.close()
  return tokens


class _Progress(Progress):
  """A bar in a terminal, at most twenty lines elsewhere."""

  def __init__(self, total: int, done: int, log: Callable[[str], None]):
    super().__init__('score', total, done, unit='row', show_line=log)
    self._done, self._first, self._clock = done, done, Clock()

  def add(self, rows: int) -> None:
    before, self._done = self._done, self._done + rows
    rate = (self._done - self._first) / self._clock.elapsed
    is_next_twentieth = before * 20 // self._total < self._done * 20 // self._total
    self.show(self._done, {}, rate=f'{rate:,.1f} rows/s', line=is_next_twentieth)
