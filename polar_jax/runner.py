"""Runs the stages of a config in order, once each, in one workdir."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.metadata
import os
import pathlib
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import jax
from flax import traverse_util

from polar_jax import sharding
from polar_jax.config import Config, MeshConfig, requested_stages
from polar_jax.report import report
from polar_jax.runtime import distributed, failures, heartbeat, json_files, paths, preemption
from polar_jax.runtime.preemption import Preempted
from polar_jax.stages.context import Context
from polar_jax.train.session import NonFiniteError
from polar_jax.types import UserError, one_line

# Each stage is imported when it runs: scoring a file needs neither the miniature nor scipy.
_STAGES = {
  'synthesize': 'polar_jax.synthesis.stage:synthesize',
  'pretrain_lm': 'polar_jax.stages.pretrain_lm:pretrain_lm',
  'pretrain': 'polar_jax.stages.pretrain:pretrain',
  'finetune': 'polar_jax.stages.finetune:finetune',
  'evaluate': 'polar_jax.stages.evaluate:evaluate',
  'rft': 'polar_jax.stages.rft:rft',
  'sweep': 'polar_jax.stages.sweep:run',
  'fit': 'polar_jax.stages.fit:run',
  'score': 'polar_jax.stages.score:score',
  'serve': 'polar_jax.serve.stage:serve',
  'certify': 'polar_jax.certify.stage:certify',
  'convert': 'polar_jax.stages.convert:convert',
  'plan': 'polar_jax.stages.plan:run',
}
# Stages that the miniature replaces, because it knows the distribution of every policy; see `_in_miniature`.
_MINIATURE = {
  'synthesize': 'polar_jax.miniature.world:run',
  'evaluate': 'polar_jax.miniature.evaluation:evaluate',
  'rft': 'polar_jax.miniature.study:rft',
}
# Errors whose message is written for the user; shown without a traceback.
_EXPLAINED = (UserError, NonFiniteError)


def run(config: Config, workdir: pathlib.Path, cluster: distributed.Cluster | None = None) -> int:
  """Run the stages of `config.stage` in `workdir`.

  Args:
    config: of the stages.
    workdir: folder of results, logs and checkpoints.
    cluster: how the processes of a distributed run found each other; None for a single process.

  Returns:
    The exit status: 0 if done or saved after SIGTERM, 1 if stopped by an error.
  """
  started = time.perf_counter()
  try:
    # The mesh of a plan consists of chips that this machine does not have.
    mesh = sharding.make_mesh(MeshConfig() if config.stage == 'plan' else config.mesh)
    _announce(config, workdir, mesh, cluster)
    distributed.agree('at the start', _start_facts(config))
    if 'rft' in requested_stages(config):
      importlib.import_module('polar_jax.stages.rft').check(config)
    _write_config(config, workdir)
    d = config.distributed
    context = Context(config, workdir, mesh, _say)
    with heartbeat.beating(workdir, jax.process_index(), jax.process_count(), d.beat, d.stall):
      heartbeat.at('checks')
      report.check(workdir)
      if len(requested_stages(config)) > 1:
        importlib.import_module('polar_jax.stages.checks').check(context, requested_stages(config))
      for name in requested_stages(config):
        heartbeat.at(name)
        _timed(context, name, _stage(config, workdir, name))
    _finish(workdir, time.perf_counter() - started)
    preemption.leave(0)
    return 0
  except Preempted as stop:
    _say(str(stop))
    preemption.leave(0)
    return 0
  except _EXPLAINED as error:
    return _stopped(str(error))
  except Exception as error:
    message = None if distributed.lost(error) else failures.explain(error)
    if message is not None:
      return _stopped(message + _kept_traceback(error, workdir))
    if jax.process_count() == 1:
      raise
    distributed.leave(error)


def _stopped(message: str) -> int:
  """Print why the run stopped, in one line, and return the exit status."""
  print(f'polar_jax: {one_line(message)}', file=sys.stderr, flush=True)
  if jax.process_count() > 1:
    os._exit(1)  # an orderly exit would wait for the other processes, which wait for this one
  return 1


def _kept_traceback(error: Exception, workdir: pathlib.Path) -> str:
  """Write the traceback of an error to the workdir, and return a remark that says where; '' if that fails too."""
  file = workdir / 'error.txt'
  try:
    file.write_text(''.join(traceback.format_exception(error)), encoding='utf-8', errors='replace')
  except OSError:
    return ''
  return f' (traceback: {file})'


def keep_compiled(folder: str) -> None:
  """Cache programs that take at least half a second to compile in `folder`. Call it before JAX compiles anything."""
  jax.config.update('jax_compilation_cache_dir', str(pathlib.Path(folder).expanduser().absolute()) if '://' not in folder else folder)
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)


def divide_cpu(devices: int) -> None:
  """Divide the cores of this host into devices, unless the environment does already. Call it before JAX starts its backend."""
  if 'JAX_NUM_CPU_DEVICES' not in os.environ and '--xla_force_host_platform_device_count' not in os.environ.get('XLA_FLAGS', ''):
    jax.config.update('jax_num_cpu_devices', devices)


def _say(message: str) -> None:
  if jax.process_index() == 0:
    print(message, flush=True)


def _announce(config: Config, workdir: pathlib.Path, mesh: jax.sharding.Mesh, cluster: distributed.Cluster | None) -> None:
  devices = jax.devices()
  axes = ' '.join(f'{axis}={size}' for axis, size in mesh.shape.items())
  _say(f'polar_jax: stage {config.stage}, workdir {workdir}')
  if cluster:
    _say(f'distributed: {jax.process_count()} processes, found by {cluster.how}')
  _say(f'devices: {len(devices)} x {devices[0].device_kind} ({jax.default_backend()}), {jax.process_count()} process(es); mesh {axes}')
  parameters = 'parameters as stored' if config.stage in ('certify', 'convert', 'score', 'serve') else 'float32 parameters'
  _say(f'precision: {parameters}, {"float32" if config.stage == "convert" else config.model.compute_dtype} compute')


def _start_facts(config: Config) -> dict[str, Any]:
  """Return what must be equal on every host: code, versions, number of devices, and every setting except the process index."""
  code, package = hashlib.sha256(), pathlib.Path(__file__).parent
  for path in sorted(package.rglob('*.py')):
    code.update(path.read_bytes())
  facts = {'code of polar_jax': code.hexdigest()[:16], 'devices of a host': jax.local_device_count()}
  facts |= {f'version of {name}': importlib.metadata.version(name) for name in ('jax', 'flax', 'orbax-checkpoint', 'numpy')}
  settings = dataclasses.asdict(dataclasses.replace(config, distributed=dataclasses.replace(config.distributed, process=None)))
  return facts | traverse_util.flatten_dict({'config': settings}, sep='.')


def _write_config(config: Config, workdir: pathlib.Path) -> None:
  if jax.process_index() == 0:
    paths.write_atomically(workdir / 'config.json', json_files.dumps(dataclasses.asdict(config), indent=2) + '\n')


def _timed(context: Context, name: str, stage: Callable[[Context], dict[str, Any] | None]) -> None:
  """Run a stage and store its results and its time. A stage that was complete already keeps its original time."""
  _say(f'== {name}')
  started = time.perf_counter()
  results = stage(context)
  seconds = time.perf_counter() - started
  if jax.process_index() != 0:
    return
  for section, values in (results or {}).items():
    report.update_results(context.workdir, section, values)
  known = report.load_results(context.workdir).get('timing', {})
  report.update_results(context.workdir, 'timing', {name: max(seconds, known.get(name, 0.0))})
  _say(f'== {name} done in {seconds:.1f} s')


def _finish(workdir: pathlib.Path, seconds: float) -> None:
  if jax.process_index() != 0:
    return
  report.update_results(workdir, 'environment', report.environment())
  report.write_report(workdir, report.load_results(workdir))
  _say(f'report: {workdir / "report.md"} ({seconds:.0f} s in total)')


def _stage(config: Config, workdir: pathlib.Path, name: str) -> Callable[[Context], dict[str, Any] | None]:
  """Return the function of a stage."""
  target = _MINIATURE[name] if name in _MINIATURE and _in_miniature(config, workdir, name) else _STAGES[name]
  module, function = target.split(':')
  return getattr(importlib.import_module(module), function)


def _in_miniature(config: Config, workdir: pathlib.Path, name: str) -> bool:
  """Return whether a stage reads the data of the miniature, whose policies are known exactly."""
  data = config.data
  given = {'evaluate': data.triplets or data.preferences or data.validation, 'rft': data.prompts}.get(name)
  if config.synthesize.world != 'ngram' or given:
    return False
  return name == 'synthesize' or (workdir / 'data' / 'pool.json').exists()
