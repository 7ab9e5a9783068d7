"""Orbax checkpoints: one atomic step holds parameters, optimizer, iterator and the config that made them."""

from __future__ import annotations

import contextlib
import json
import math
import pathlib
import time
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from polar_jax.config import CheckpointingConfig, ConfigError
from polar_jax.runtime import paths

FOLDER = 'checkpoints'


# Of the state and what lies beside it. It counts up when they change, so that an older workdir is refused in words.
_LAYOUT = {'checkpoint_layout': 2}


class Checkpointer:
  """The checkpoints of one run, here or in a bucket. The newest `keep` and the `keep_best` best by validation are kept."""

  def __init__(self, folder: pathlib.Path, config: CheckpointingConfig, best_metric: str, best_is_lower: bool):
    policies = ocp.checkpoint_managers.preservation_policy
    kept = [policies.LatestN(config.keep)]

    def goodness(metrics: dict[str, float]) -> float:
      value = metrics.get(best_metric)  # a step that was not validated is never the best
      return -math.inf if value is None else -value if best_is_lower else value

    if config.keep_best:
      # Ascending order, the last n are kept.
      kept.append(policies.BestN(get_metric_fn=goodness, n=config.keep_best, keep_checkpoints_without_metrics=False))
    options = ocp.CheckpointManagerOptions(
      # Only with a best_fn does Orbax write metrics to disk, where a resumed run finds them. What is kept the policy decides.
      best_fn=goodness,
      preservation_policy=policies.AnyPreservationPolicy(kept),
      enable_async_checkpointing=config.asynchronous,
      # Folders made in the background are waited for under a number that is the process's: two runs at once would take each other's.
      async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
      # A process killed while saving leaves a temporary folder behind; the next start removes it.
      cleanup_tmp_directories=True,
    )
    self._manager = ocp.CheckpointManager(paths.absolute(folder) / FOLDER, options=options)

  @property
  def latest(self) -> int | None:
    """The newest complete step."""
    return self._manager.latest_step()

  def save(self, step: int, state: Any, iterator_state: dict[str, Any], fingerprint: dict[str, Any], metrics: dict[str, float]):
    """Starts saving; returns once the state may be overwritten.

    Args:
      state: a TrainState, or another named tuple of which `params` is what a checkpoint is read for.
      iterator_state: what must come back beside it, as JSON.
      metrics: decide which checkpoint is the best; empty: none.
    """
    args = ocp.args.Composite(
      state=ocp.args.StandardSave(state._asdict()),
      data=ocp.args.JsonSave(iterator_state),
      config=ocp.args.JsonSave(fingerprint | _LAYOUT),
    )
    if step != self._manager.latest_step():
      self._manager.save(step, args=args, metrics=metrics)

  def restore(self, abstract: Any, fingerprint: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """(state, iterator state) of the newest step that can be read, laid out as `abstract` says.

    Newer ones, which a full disk or a lost file system tore, are moved beside the others' folder, as `torn_<step>_<time>`, with a warning.

    Raises:
      ConfigError: when the checkpoint was made with other settings, naming the first that differ; or none can be read.
    """
    torn: dict[int, str] = {}
    for step in sorted(self._manager.all_steps(), reverse=True):
      found, why = self._read(step, abstract, fingerprint)
      if found is not None:
        self._set_aside(torn, step)
        return found
      torn[step] = why
    said = '; '.join(f'step {step}: {why}' for step, why in torn.items())
    raise ConfigError(f'no checkpoint in {self._manager.directory} can be read ({said}): restore one from a copy, or use another --workdir')

  def _read(self, step: int, abstract: Any, fingerprint: dict[str, Any]) -> tuple[tuple[Any, dict[str, Any]] | None, str]:
    """(what `restore` gives, or None on every host if one could not read it; why)."""
    found, why = None, 'another host could not read it'
    try:
      found = self._restore(step, abstract, fingerprint)
    except ConfigError:
      raise
    except Exception as error:  # whatever Orbax, TensorStore and JSON make of what is left of a file
      why = f'{type(error).__name__}: {" ".join(str(error).split())[:160]}'
    if jax.process_count() > 1 and not multihost_utils.process_allgather(np.array(found is not None)).all():
      found = None
    return found, why

  def _set_aside(self, torn: dict[int, str], good: int) -> None:
    if not torn:
      return
    folder = self._manager.directory
    if jax.process_index() == 0:
      for step, why in torn.items():
        aside = folder.parent / f'torn_{step}_{time.time_ns()}'
        (folder / str(step)).rename(aside)
        warnings.warn(f'the checkpoint of step {step} is torn ({why}): it lies in {aside} now, and step {good} is read', stacklevel=3)
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices('torn checkpoints are set aside')
    self._manager.reload()

  def _restore(self, step: int, abstract: Any, fingerprint: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    saved = self._manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore()))['config']
    _check_same_settings(saved, fingerprint | _LAYOUT, step)
    args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract._asdict()), data=ocp.args.JsonRestore())
    restored = self._manager.restore(step, args=args)
    return type(abstract)(**restored['state']), restored['data']

  def wait(self) -> None:
    """Returns once everything saved is complete on disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    self._manager.close()


def _check_same_settings(saved: dict[str, Any], current: dict[str, Any], step: int | None) -> None:
  current = json.loads(json.dumps(current))  # as it would read back
  different = [
    f'{k} was {saved.get(k)!r}, is {current.get(k)!r}' for k in sorted(saved.keys() | current.keys()) if saved.get(k) != current.get(k)
  ]
  if different:
    raise ConfigError(
      f'the checkpoint of step {step} in this workdir was made with other settings ({"; ".join(different[:4])}): use another --workdir, '
      'and another checkpointing.folder if that is set'
    )


def exists(folder: pathlib.Path) -> bool:
  """Whether a run has a complete checkpoint."""
  root = folder / FOLDER
  # A bucket has no renaming: what is being written has its final name already, and says when it is whole.
  return root.is_dir() and any(step.name.isdigit() and ocp.utils.is_checkpoint_finalized(step) for step in root.iterdir())


def _at_once(params: dict[str, Any]) -> float:
  """Gigabytes of copies that Orbax may hold while it writes or reads: a little, or the largest array, which it takes whole."""
  return max([1e9, *(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))]) / 1e9


def save_params(folder: pathlib.Path, params: dict[str, Any], settings: dict[str, Any]) -> None:
  """Writes parameters alone, as step 0 of a run would hold them. `settings`: as a run's fingerprint."""
  handlers = {
    'state': ocp.PyTreeCheckpointHandler(save_concurrent_gb=_at_once(params)),
    'data': ocp.JsonCheckpointHandler(),
    'config': ocp.JsonCheckpointHandler(),
  }
  with ocp.CheckpointManager(paths.absolute(folder) / FOLDER, item_handlers=handlers) as manager:
    args = ocp.args.Composite(state=ocp.args.PyTreeSave({'params': params}), data=ocp.args.JsonSave({}), config=ocp.args.JsonSave(settings))
    manager.save(0, args=args)


@contextlib.contextmanager
def _newest(folder: pathlib.Path, at_once: float | None = None) -> Iterator[tuple[ocp.CheckpointManager, int]]:
  """The checkpoints of another run, to be read, and the newest step.

  Args:
    at_once: see `_at_once`; None: no limit.

  Raises:
    ConfigError: there is none.
  """
  root = paths.absolute(folder) / FOLDER
  missing = ConfigError(f'no checkpoint to start from in {folder}: run the stage that writes it first')
  if not root.exists():
    raise missing
  handlers = {
    'state': ocp.PyTreeCheckpointHandler(restore_concurrent_gb=at_once),
    'config': ocp.JsonCheckpointHandler(),
    'data': ocp.JsonCheckpointHandler(),
  }
  options = ocp.CheckpointManagerOptions(read_only=True, save_interval_steps=0)
  with ocp.CheckpointManager(root, options=options, item_handlers=handlers) as manager:
    step = manager.latest_step()
    if step is None:
      raise missing
    yield manager, step


def load_settings(folder: pathlib.Path) -> dict[str, Any]:
  """What the newest checkpoint of a run was made with: its fingerprint.

  Raises:
    ConfigError: when there is no checkpoint.
  """
  with _newest(folder) as (manager, step):
    return manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore()))['config']


def load_params(folder: pathlib.Path, abstract_params: dict[str, Any], objective: str, *, as_stored: bool = False) -> dict[str, Any]:
  """Parameters of the newest checkpoint of another run, laid out as `abstract_params` says.

  From a run with the same objective all of them; from another (a reward model that starts from a language model) the decoder.

  Args:
    as_stored: in the dtypes of the checkpoint instead of those of `abstract_params`.

  Raises:
    ConfigError: when there is no checkpoint, or its parameters have other names or shapes.
  """
  with _newest(folder, _at_once(abstract_params)) as (manager, step):
    saved = manager.restore(step, args=ocp.args.Composite(config=ocp.args.JsonRestore()))['config']
    if saved['objective'] != objective:
      abstract_params = {'decoder': abstract_params['decoder']}
    stored = manager.item_metadata(step)['state']['params']
    _check_same_shapes(stored, abstract_params, folder)
    if as_stored:
      keep = lambda wanted, have: jax.ShapeDtypeStruct(wanted.shape, have.dtype, sharding=wanted.sharding)
      abstract_params = jax.tree.map(keep, abstract_params, {name: stored[name] for name in abstract_params})
    target = {'params': abstract_params}
    args = ocp.args.PyTreeRestore(target, restore_args=ocp.checkpoint_utils.construct_restore_args(target), partial_restore=True)
    return manager.restore(step, args=ocp.args.Composite(state=args))['state']['params']


def _check_same_shapes(stored: Any, wanted: Any, folder: pathlib.Path) -> None:
  def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {jax.tree_util.keystr(path, simple=True, separator='.'): tuple(x.shape) for path, x in jax.tree_util.tree_leaves_with_path(tree)}

  have = shapes(stored)
  for name, shape in shapes(wanted).items():
    if have.get(name) != shape:
      raise ConfigError(f'{folder} cannot be started from: {name} is {have.get(name, "missing")} there and {shape} in this model')
