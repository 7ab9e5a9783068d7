"""Runs the stages of a config in order, once each, in one workdir."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import jax

from polar_jax import sharding
from polar_jax.config import Config, MeshConfig
from polar_jax.miniature import world as engine
from polar_jax.report import report
from polar_jax.runtime import distributed, heartbeat
from polar_jax.runtime.preemption import Preempted
from polar_jax.stages import convert
from polar_jax.stages import evaluate as evaluation
from polar_jax.stages import plan as planning
from polar_jax.stages import rft as reinforcement
from polar_jax.stages import score as scoring
from polar_jax.stages import sweep as sweep_stage
from polar_jax.stages import training as stages
from polar_jax.synthesis import arithmetic
from polar_jax.train.trainer import NonFiniteError
from polar_jax.types import UserError

# Errors whose message is written for the user: shown without a traceback.
_EXPLAINED = (UserError, NonFiniteError)


def run(config: Config, workdir: pathlib.Path, cluster: distributed.Cluster | None = None) -> int:
  """Runs the stages of `config.stage` in `workdir` and returns the exit status: 0 done or saved after SIGTERM, 1 stopped by an error."""
  started = time.perf_counter()
  try:
    # A plan's mesh is of chips that are not here.
    mesh = sharding.make_mesh(MeshConfig() if config.stage == 'plan' else config.mesh)
    _announce(config, workdir, mesh, cluster)
    distributed.agree('at the start', _start_facts(config))
    if 'rft' in _stage_names(config):
      reinforcement.check(config)
    _write_config(config, workdir)
    d = config.distributed
    with heartbeat.beating(workdir, jax.process_index(), jax.process_count(), d.beat, d.stall):
      for name in _stage_names(config):
        heartbeat.at(name)
        # Of `all` too a stage reads its own name: what it starts from may follow from it.
        _timed(stages.Context(dataclasses.replace(config, stage=name), workdir, mesh, _say), name, _STAGES[name])
    _finish(workdir, time.perf_counter() - started)
    return 0
  except Preempted as stop:
    _say(str(stop))
    return 0
  except _EXPLAINED as error:
    print(f'polar_jax: {error}', file=sys.stderr, flush=True)
    if jax.process_count() > 1:
      os._exit(1)  # the orderly end waits for the others, and they for this one
    return 1
  except Exception as error:
    if jax.process_count() == 1:
      raise
    distributed.leave(error)


def keep_compiled(folder: str) -> None:
  """Compiled programs are kept in `folder`, if they took half a second and more; before JAX compiles anything."""
  jax.config.update('jax_compilation_cache_dir', str(pathlib.Path(folder).expanduser().absolute()) if '://' not in folder else folder)
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)


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
  parameters = 'parameters as stored' if config.stage in ('convert', 'score') else 'float32 parameters'
  _say(f'precision: {parameters}, {"float32" if config.stage == "convert" else config.model.compute_dtype} compute')


def _start_facts(config: Config) -> dict[str, Any]:
  """What must be the same on every host: the code, what it runs on, and every setting but which process this is."""
  code, package = hashlib.sha256(), pathlib.Path(__file__).parents[1]
  for path in sorted(package.rglob('*.py')):
    code.update(path.read_bytes())
  facts = {'code of polar_jax': code.hexdigest()[:16], 'devices of a host': jax.local_device_count()}
  facts |= {f'version of {name}': importlib.metadata.version(name) for name in ('jax', 'flax', 'orbax-checkpoint', 'numpy')}
  settings = dataclasses.asdict(dataclasses.replace(config, distributed=dataclasses.replace(config.distributed, process=None)))
  return facts | _flat(settings, 'config.')


def _flat(settings: dict[str, Any], prefix: str) -> dict[str, Any]:
  out: dict[str, Any] = {}
  for name, value in settings.items():
    out |= _flat(value, f'{prefix}{name}.') if isinstance(value, dict) else {prefix + name: value}
  return out


def _write_config(config: Config, workdir: pathlib.Path) -> None:
  if jax.process_index() == 0:
    workdir.mkdir(parents=True, exist_ok=True)
    temporary = workdir / 'config.json.tmp'
    temporary.write_text(json.dumps(dataclasses.asdict(config), indent=2) + '\n')
    os.replace(temporary, workdir / 'config.json')


def _stage_names(config: Config) -> list[str]:
  if config.stage != 'all':
    return config.stage.split(',')
  if config.synthesize.world == 'arithmetic':  # a real language model is the start of everything
    return ['synthesize', 'finetune', 'rft']
  return ['synthesize', 'pretrain_lm', 'pretrain', 'finetune', 'evaluate', 'rft', 'sweep', 'fit']


def _timed(context: stages.Context, name: str, stage: Callable[[stages.Context], dict[str, Any] | None]) -> None:
  """Runs a stage and keeps its results and its time. A stage that was complete already keeps the time it took then."""
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
  _say(f'report: {workdir / "report.md"} ({seconds:.0f} s in all)')


def _synthesize(context: stages.Context) -> dict[str, Any]:
  if context.config.synthesize.world == 'arithmetic':
    return {'synthesize': arithmetic.synthesize(context.config.synthesize, context.config.seed, context.workdir, context.log)}
  result = engine.synthesize(context.config.synthesize, context.config.seed, context.workdir, context.log)
  facts = dataclasses.asdict(result)
  return {'synthesize': {name: facts[name] for name in ('rows', 'rows_per_minute', 'fingerprints', 'seconds')}}


def _finetune(context: stages.Context) -> dict[str, Any]:
  runs = {'finetune': stages.finetune(context)}
  # Word problems have no language model of their own, and no pre-training to leave out.
  if context.config.ablations and context.config.synthesize.world == 'ngram':
    runs |= {'finetune_only': stages.finetune_only(context), 'finetune_no_reference': stages.finetune_no_reference(context)}
  return {'finetune': {'runs': runs}}


def _fit(context: stages.Context) -> dict[str, Any]:
  from polar_jax.stages import fit as stage

  return stage.run(context)


_STAGES: dict[str, Callable[[stages.Context], dict[str, Any] | None]] = {
  'synthesize': _synthesize,
  'pretrain_lm': lambda context: {'pretrain_lm': stages.pretrain_lm(context)},
  'pretrain': lambda context: {'pretrain': stages.pretrain(context)},
  'finetune': _finetune,
  'evaluate': evaluation.evaluate,
  'rft': reinforcement.rft,
  'sweep': sweep_stage.run,
  'fit': _fit,
  'score': scoring.score,
  'convert': convert.convert,
  'plan': planning.run,
}
