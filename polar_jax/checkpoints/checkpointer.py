"""Orbax checkpoints: one atomic step holds parameters, optimizer state, iterator state and the settings of the run."""

from __future__ import annotations

import functools
import logging
import math
import os
import pathlib
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from polar_jax.checkpoints import checksums
from polar_jax.checkpoints import settings as settings_lib
from polar_jax.config import CheckpointingConfig, ConfigError
from polar_jax.runtime import paths
from polar_jax.types import UserError


def _not_from_orbax(record: logging.LogRecord) -> bool:
  """Drop what Orbax logs below errors: it narrates every save, and warns of reading a folder read-only, which is intended here."""
  return record.levelno >= logging.ERROR or f'{os.sep}orbax{os.sep}' not in record.pathname


logging.getLogger('absl').addFilter(_not_from_orbax)

FOLDER = 'checkpoints'


# Version of the stored state and its JSON. Bumped on incompatible changes, so that an older workdir is rejected with a clear message.
_LAYOUT = {'checkpoint_layout': 2}

# Key of the checksums among the JSON values of a step. Older checkpoints have none.
_CHECKSUMS = 'checksums'

# Seconds before a checkpoint that could not be read is read again. Network file systems recover from most errors within seconds.
_PAUSES = (0.5, 3.0)


class _ChangedError(Exception):
  """What was read differs from its checksum."""


class _Read(NamedTuple):
  """What was read of a step: the result, and its arrays with the checksums that they must have."""

  result: Any
  arrays: Any = ()
  sums: Mapping[str, int] = {}


class Checkpointer:
  """The checkpoints of one run, local or in a bucket. Keeps the newest `keep` and the `keep_best` best by validation."""

  def __init__(self, folder: pathlib.Path, config: CheckpointingConfig, best_metric: str, best_is_lower: bool):
    """Open the checkpoints of a run, and remove what a killed process left half written.

    Args:
      folder: the run's folder; checkpoints go to its subfolder `FOLDER`.
      config: how many checkpoints to keep, and whether to save asynchronously.
      best_metric: name of the metric that ranks checkpoints.
      best_is_lower: whether a lower value of it is better.
    """
    policies = ocp.checkpoint_managers.preservation_policy
    preserved = [policies.LatestN(config.keep)]

    def goodness(metrics: dict[str, float]) -> float:
      value = metrics.get(best_metric)  # a step that was not validated is never the best
      return -math.inf if value is None else -value if best_is_lower else value

    if config.keep_best:
      # Orbax sorts in ascending order and keeps the last n.
      preserved.append(policies.BestN(get_metric_fn=goodness, n=config.keep_best, keep_checkpoints_without_metrics=False))
    options = ocp.CheckpointManagerOptions(
      # Orbax writes metrics to disk, where a resumed run finds them, only with a best_fn. What is kept is up to the policy.
      best_fn=goodness,
      preservation_policy=policies.AnyPreservationPolicy(preserved),
      enable_async_checkpointing=config.asynchronous,
      # Orbax numbers background directory creation per process, so two concurrent runs would wait for each other's directories.
      async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
      # A process killed while saving leaves a temporary folder; the next start removes it.
      cleanup_tmp_directories=True,
    )
    self._manager = ocp.CheckpointManager(paths.absolute(folder) / FOLDER, options=options)

  @property
  def latest(self) -> int | None:
    """The newest complete step."""
    return self._manager.latest_step()

  @property
  def steps(self) -> list[int]:
    """All complete steps."""
    return list(self._manager.all_steps())

  def save(
    self,
    step: int,
    state: Any,
    iterator_state: dict[str, Any],
    fingerprint: dict[str, Any],
    metrics: dict[str, float],
    *,
    again: bool = False,
  ) -> None:
    """Start saving a step, and return once the state may be overwritten. A step that is already saved is skipped.

    Args:
      step: number of completed training steps.
      state: a TrainState, or another named tuple with a field `params`.
      iterator_state: JSON values to restore with the state.
      fingerprint: settings that must not change while the run is resumed.
      metrics: decide which checkpoint is the best; empty if the step was not validated.
      again: replace the step if it is saved, unless it is the only one, which a kill must not cost.
    """
    if again and step == self._manager.latest_step() and len(self.steps) > 1:
      self._manager.delete(step)
    if step == self._manager.latest_step():
      return
    arrays, settings = state._asdict(), fingerprint | _LAYOUT
    args = ocp.args.Composite(
      state=ocp.args.StandardSave(arrays),
      data=ocp.args.JsonSave(_with_checksums(iterator_state, arrays, settings)),
      config=ocp.args.JsonSave(settings),
    )
    self._manager.save(step, args=args, metrics=metrics)

  def restore(self, abstract: Any, fingerprint: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return (state, iterator state) of the newest readable step, sharded as `abstract` specifies.

    Newer steps that a full disk or a lost file system left torn, or whose arrays differ from their checksums, are moved out of the
    checkpoint folder to `torn_<step>_<time>`, with a warning. Before that, each is read again after a pause, several times.

    Raises:
      ConfigError: the checkpoint was made with other settings (the message names the first that differ), or none can be read.
    """
    torn: dict[int, str] = {}
    for step in sorted(self._manager.all_steps(), reverse=True):
      read, reason = _read_repeatedly(functools.partial(self._restore, step, abstract, fingerprint))
      if read is not None:
        self._set_aside(torn, step)
        return read.result
      torn[step] = reason
    reasons = '; '.join(f'step {step}: {reason}' for step, reason in torn.items())
    raise ConfigError(
      f'no checkpoint in {self._manager.directory} can be read ({reasons}): restore one from a backup, or use another --workdir'
    )

  def _set_aside(self, torn: dict[int, str], good: int) -> None:
    """Move the `torn` steps ({step: reason}) out of the checkpoint folder; `good` is the step that is read instead."""
    if not torn:
      return
    folder = self._manager.directory
    if jax.process_index() == 0:
      for step, reason in torn.items():
        aside = folder.parent / f'torn_{step}_{time.time_ns()}'
        (folder / str(step)).rename(aside)
        warnings.warn(f'the checkpoint of step {step} is torn ({reason}): moved to {aside}; resuming from step {good}', stacklevel=3)
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices('torn checkpoints are set aside')
    self._manager.reload()

  def _restore(self, step: int, abstract: Any, fingerprint: dict[str, Any]) -> _Read:
    settings, data, sums = _read_values(self._manager, step)
    different = settings_lib.differences(settings, fingerprint | _LAYOUT)
    if different:
      raise ConfigError(
        f'the checkpoint of step {step} in this workdir was made with other settings ({"; ".join(different[:4])}): use another --workdir, '
        'and another checkpointing.folder if that is set'
      )
    args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract._asdict()))
    arrays = self._manager.restore(step, args=args)['state']
    return _Read((type(abstract)(**arrays), data), arrays, sums)

  def wait(self) -> None:
    """Return once all saved steps are complete on disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Wait for pending saves and release Orbax's threads."""
    self._manager.close()


def exists(folder: pathlib.Path) -> bool:
  """Return whether a run has a complete checkpoint."""
  root = folder / FOLDER
  # Buckets have no rename: a step being written already has its final name, and a marker shows that it is complete.
  return root.is_dir() and any(step.name.isdigit() and ocp.utils.is_checkpoint_finalized(step) for step in root.iterdir())


def _with_checksums(values: dict[str, Any], arrays: Any, settings: dict[str, Any]) -> dict[str, Any]:
  """Return the JSON values of a step with the checksums of everything that is saved."""
  return values | {_CHECKSUMS: {'arrays': checksums.of_arrays(arrays), 'json': checksums.of_json([values, settings])}}


def _read_values(manager: ocp.CheckpointManager, step: int) -> tuple[dict[str, Any], dict[str, Any], Mapping[str, int]]:
  """Return (settings, JSON values, checksums of arrays) of a step.

  Raises:
    _ChangedError: settings or values differ from their checksum.
  """
  read = manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore(), data=ocp.args.JsonRestore()))
  settings, values = read['config'], dict(read['data'])
  sums = values.pop(_CHECKSUMS, None)
  if sums is None:
    return settings, values, {}
  if sums['json'] != checksums.of_json([values, settings]):
    raise _ChangedError('its settings, or the state of its data, differ from their checksum')
  return settings, values, sums['arrays']


def _read_repeatedly(read: Callable[[], _Read]) -> tuple[_Read | None, str]:
  """Read until no host has an error and all arrays have their checksums, a few times at most, with pauses.

  Returns:
    (what was read, or None on every host; the reason).
  """
  reason = ''
  for pause in (0.0, *_PAUSES):
    time.sleep(pause)
    stored, reason = None, 'another host could not read it'
    try:
      stored = read()
    except (UserError, MemoryError, jax.errors.JaxRuntimeError):  # the files are not to blame
      raise
    except Exception as error:  # Orbax, TensorStore and JSON each raise their own errors on a damaged file
      reason = f'{type(error).__name__}: {" ".join(str(error).split())[:160]}'
    if jax.process_count() > 1 and not multihost_utils.process_allgather(np.array(stored is not None)).all():
      stored = None
    if stored is None:
      continue
    changed = checksums.changed(stored.arrays, stored.sums)
    if not changed:
      return stored, ''
    reason = f'the array {changed[0]} differs from its checksum' + (f', and {len(changed) - 1} more' if len(changed) > 1 else '')
    del stored  # before the next attempt needs the memory
  return None, reason


def _concurrent_gb(params: dict[str, Any]) -> float:
  """Return the gigabytes of copies Orbax may hold in flight: 1 GB, or the largest array, which it always takes whole."""
  return max([1e9, *(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))]) / 1e9


def save_params(folder: pathlib.Path, params: dict[str, Any], settings: dict[str, Any]) -> None:
  """Write parameters alone, as step 0 of a run. `settings`: like the fingerprint of a run."""
  handlers = {
    'state': ocp.PyTreeCheckpointHandler(save_concurrent_gb=_concurrent_gb(params)),
    'data': ocp.JsonCheckpointHandler(),
    'config': ocp.JsonCheckpointHandler(),
  }
  values = _with_checksums({}, {'params': params}, settings)
  with ocp.CheckpointManager(paths.absolute(folder) / FOLDER, item_handlers=handlers) as manager:
    args = ocp.args.Composite(
      state=ocp.args.PyTreeSave({'params': params}), data=ocp.args.JsonSave(values), config=ocp.args.JsonSave(settings)
    )
    manager.save(0, args=args)


def _read_newest(folder: pathlib.Path, read: Callable[[ocp.CheckpointManager, int], _Read], concurrent_gb: float | None = None) -> Any:
  """Return the result of `read`, called with a manager of another run's checkpoints and its newest step.

  Args:
    folder: the run's folder.
    read: reads the step; called again if it fails, or if arrays differ from their checksums.
    concurrent_gb: see `_concurrent_gb`; None: no limit.

  Raises:
    ConfigError: the run has no checkpoint, or its newest one cannot be read.
  """
  root = paths.absolute(folder) / FOLDER
  missing = ConfigError(f'no checkpoint to start from in {folder}: run the stage that writes it first')
  if not root.exists():
    raise missing
  handlers = {
    'state': ocp.PyTreeCheckpointHandler(restore_concurrent_gb=concurrent_gb),
    'config': ocp.JsonCheckpointHandler(),
    'data': ocp.JsonCheckpointHandler(),
  }
  options = ocp.CheckpointManagerOptions(read_only=True, save_interval_steps=0)
  steps: list[int] = []

  def attempt() -> _Read:
    with ocp.CheckpointManager(root, options=options, item_handlers=handlers) as manager:
      steps[:] = sorted(manager.all_steps())
      if not steps:
        raise missing
      return read(manager, steps[-1])

  stored, reason = _read_repeatedly(attempt)
  if stored is None:
    newest = root / str(steps[-1]) if steps else root
    advice = f', or remove this folder to use step {steps[-2]}' if len(steps) > 1 else ''
    raise ConfigError(f'{newest}: this checkpoint cannot be read ({reason}); restore it from a backup{advice}')
  return stored.result


def load_settings(folder: pathlib.Path) -> dict[str, Any]:
  """Return the settings (fingerprint) stored in the newest checkpoint of a run, under their current names.

  Raises:
    ConfigError: the run has no checkpoint that can be read.
  """
  return _read_newest(folder, lambda manager, step: _Read(settings_lib.translate(_read_values(manager, step)[0])))


def load_params(folder: pathlib.Path, abstract_params: dict[str, Any], *, as_stored: bool = False) -> dict[str, Any]:
  """Return the parameters of the newest checkpoint of another run that `abstract_params` names, sharded as it specifies.

  Args:
    folder: the run's folder.
    abstract_params: all parameters, or a subtree such as the decoder alone.
    as_stored: keep the dtypes of the checkpoint instead of those of `abstract_params`.

  Raises:
    ConfigError: the run has no checkpoint that can be read, its parameters have other names or shapes, or differ from their checksums.
  """

  def read(manager: ocp.CheckpointManager, step: int) -> _Read:
    stored = manager.item_metadata(step)['state']['params']
    _check_same_shapes(stored, abstract_params, folder)
    sums = _read_values(manager, step)[2]
    # In the stored dtypes, to which the checksums belong.
    with_stored_dtype = lambda wanted, have: jax.ShapeDtypeStruct(wanted.shape, have.dtype, sharding=wanted.sharding)
    target = {'params': jax.tree.map(with_stored_dtype, abstract_params, {name: stored[name] for name in abstract_params})}
    args = ocp.args.PyTreeRestore(target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), partial_restore=True)
    arrays = manager.restore(step, args=ocp.args.Composite(state=args))['state']
    return _Read(arrays['params'], arrays, sums)

  params = _read_newest(folder, read, _concurrent_gb(abstract_params))
  if as_stored:
    return params
  leaves, tree = jax.tree.flatten(params)
  del params  # so that each array is released once it is cast
  for i, wanted in enumerate(jax.tree.leaves(abstract_params)):
    leaves[i] = leaves[i].astype(wanted.dtype)
  return jax.tree.unflatten(tree, leaves)


def _check_same_shapes(stored: Any, wanted: Any, folder: pathlib.Path) -> None:
  def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {jax.tree_util.keystr(path, simple=True, separator='.'): tuple(x.shape) for path, x in jax.tree_util.tree_leaves_with_path(tree)}

  have = shapes(stored)
  for name, shape in shapes(wanted).items():
    if have.get(name) != shape:
      raise ConfigError(
        f'{folder} cannot be started from: {name} is {have.get(name, "missing")} in the checkpoint and {shape} in this model'
      )
