"""The score stage: adds a reward to every example of a file."""

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
from polar_jax.checkpoints.adapted import Adapted
from polar_jax.checkpoints.checkpointer import FOLDER
from polar_jax.checkpoints.pretrained import Pretrained
from polar_jax.checkpoints.run_folder import ASSETS
from polar_jax.config import Config, ConfigError
from polar_jax.data.examples import describe_skipped
from polar_jax.data.template import Template
from polar_jax.runtime import paths
from polar_jax.runtime.clock import Clock
from polar_jax.runtime.progress import Progress
from polar_jax.scoring import files
from polar_jax.scoring.exact import ExactScorer, ExampleError
from polar_jax.stages.context import Context
from polar_jax.types import UserError


def score(context: Context) -> dict[str, Any]:
  """Score the examples of `input` with the reward model `checkpoint` and write them to `output`, `score.window` examples at a time.

  The whole input is checked before anything is scored. The same command continues a stopped run.

  Returns:
    The section `score` of the report.

  Raises:
    ConfigError: a setting is missing or cannot be used.
    UserError: an example or a file cannot be used.
  """
  config = context.config
  source, target = _paths(config)
  opened, tokenizer, template = context.reward_model('score')
  skipped: list[tuple[int, str]] = []
  read = lambda bad: files.read_examples(source, config.data.on_bad_example, bad, use_reference=template.config.use_reference)
  total = sum(1 for _ in read(skipped))
  if skipped:
    context.log(describe_skipped(source, skipped, total))

  output = files.RewardFile(target, _settings(context, opened, template, source, target), read([]))
  try:
    kept = int(multihost_utils.broadcast_one_to_all(np.int32(output.kept)))
    if output.changed:
      context.log(f'score: discarding the partial output of a stopped run: changed since: {", ".join(output.changed)}')
    if output.damaged:
      context.log(f'score: the partial output of a stopped run is damaged after {kept} examples; the rest is scored again')
    if kept:
      context.log(f'score: continuing after {kept} examples of a stopped run')
    model = api.load(opened, mesh=context.mesh, compute=config.model, template=config.template, tokenizer=tokenizer)
    started = time.perf_counter()
    remaining = itertools.islice(read([]), kept, None)
    tokens = _score_windows(model.exact_scorer, remaining, output, source, config.score.window, _Progress(total, kept, context.log))
    seconds = time.perf_counter() - started
    output.finish()
  finally:
    output.close()
  context.log(f'score: {total} examples in {target}, mean reward {output.mean:.4f}, standard deviation {output.std:.4f}')
  facts = {'rows': total, 'skipped': len(skipped), 'resumed_rows': kept, 'tokens': tokens, 'seconds': seconds}
  return {'score': {**facts, 'rows_per_second': (total - kept) / seconds, 'mean': output.mean, 'std': output.std}}


def _paths(config: Config) -> tuple[pathlib.Path, pathlib.Path]:
  """Return the paths (input, output) of the config."""
  wanted = {
    'checkpoint': 'the folder or file of a reward model',
    'input': 'examples with prompt, reference and output (.jsonl, .jsonl.gz, .parquet, or a folder of `save_to_disk`)',
    'output': 'the file to write (.jsonl or .jsonl.gz)',
  }
  for name, meaning in wanted.items():
    if not getattr(config, name):
      raise ConfigError(f'{name} is not set: name {meaning} with --config.{name}=PATH')
  source, target = paths.path_of(config.input or ''), paths.path_of(config.output or '')
  files.check_output(target, source)
  return source, target


def _settings(context: Context, opened: Pretrained, template: Template, source: pathlib.Path, target: pathlib.Path) -> dict[str, Any]:
  """Return everything that determines which examples are written, and every bit of their rewards."""
  config, mesh = context.config, context.mesh
  model = opened.compute_like(config.model)
  own = {'trained': context.data / 'tokenizer.json', 'file': pathlib.Path(config.tokenizer.path or '')}.get(config.tokenizer.kind)
  return {
    'input': _files(source, target),
    'checkpoint': [_files(part, target) for part in _parts(opened)],
    'tokenizer': [config.tokenizer.kind, _files(own, target) if own else None],
    'template': dataclasses.asdict(template.config),
    'model': dataclasses.asdict(model),
    'devices': [mesh.devices.flat[0].device_kind, dict(mesh.shape), os.cpu_count()],
    'jax': jax.__version__,
  }


def _parts(opened: Pretrained) -> list[pathlib.Path]:
  """Return the files and folders that a checkpoint consists of; with adapters, also those of their base."""
  own = [opened.path / FOLDER, opened.path / ASSETS] if opened.kind == 'run' else [opened.path]
  return own + (_parts(opened.base) if isinstance(opened, Adapted) else [])


def _files(path: pathlib.Path, target: pathlib.Path) -> list[tuple[str, int, int]]:
  """Return name, size and modification time of a file, or of the files in a folder, except for those that this stage writes."""
  inside = paths.files_below(path) if path.is_dir() else [path] if path.is_file() else []
  return [(str(paths.absolute(file)), *paths.size_and_time(file)) for file in inside if not file.name.startswith(target.name)]


def _score_windows(
  scorer: ExactScorer,
  remaining: Iterator[files.Example],
  output: files.RewardFile,
  source: pathlib.Path,
  window: int,
  progress: _Progress,
) -> int:
  """Score and write the remaining examples, and return their number of tokens.

  Args:
    scorer: of the reward model.
    remaining: the examples after those of a stopped run.
    output: the file to append to.
    source: the input, for messages.
    window: examples scored and written at a time.
    progress: is advanced by every window.
  """
  tokens = 0
  while members := list(itertools.islice(remaining, window)):
    try:
      sequences = scorer.encode([example.group for example in members])
      rewards = scorer.score_sequences(sequences)
    except ExampleError as error:
      raise UserError(f'{source}, example {members[error.index].number}: {error.reason}') from error
    output.write(members, rewards)
    tokens += sum(map(len, sequences))
    progress.add(len(members))
  progress.close()
  return tokens


class _Progress(Progress):
  """A progress bar in a terminal; elsewhere at most twenty lines."""

  def __init__(self, total: int, done: int, log: Callable[[str], None]):
    super().__init__('score', total, done, unit='example', show_line=log)
    self._done, self._first, self._clock = done, done, Clock()

  def add(self, count: int) -> None:
    """Advance by `count` examples."""
    before, self._done = self._done, self._done + count
    rate = (self._done - self._first) / self._clock.elapsed
    is_next_twentieth = before * 20 // self._total < self._done * 20 // self._total
    self.show(self._done, {}, rate=f'{rate:,.1f} examples/s', line=is_next_twentieth)
