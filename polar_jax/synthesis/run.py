"""Triplets of a pool of language models: from the file of the pool through samples and pairs to the data and their card."""

from __future__ import annotations

import functools
import itertools
import pathlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from polar_jax.config import PoolConfig
from polar_jax.runtime import paths
from polar_jax.runtime.clock import Clock
from polar_jax.runtime.preemption import Preempted, SigtermFlag, StopRequested
from polar_jax.synthesis import filters, inputs, triplets, workers
from polar_jax.synthesis.addresses import Addresses
from polar_jax.synthesis.engine import Engine
from polar_jax.synthesis.plan import Plan
from polar_jax.synthesis.pool import PolicySpec, check_names, read_pool
from polar_jax.synthesis.samples import Failure, PoolPrompt, QuarantineError, Sampler
from polar_jax.synthesis.store import Store
from polar_jax.types import UserError

SAMPLES = 'samples.sqlite'
_SHOWN, _PROMPTS_SHOWN = 160, 3
_CONTAMINATION = 'contamination'  # why prompts of evaluation files were dropped


def synthesize(config: PoolConfig, seed: int, workdir: pathlib.Path, log: Callable[[str], None]) -> dict[str, Any]:
  """Make the triplets of a pool in workdir/data, or continue where an earlier call stopped.

  Writes samples.sqlite (what was sampled), triplets/ (a TFDS data set), card.json and card.md (what they are) and figures/.

  Args:
    config: of the pool.
    seed: of every draw and of every request.
    workdir: of the run.
    log: receives lines about progress.

  Returns:
    The section `synthesize` of the report.

  Raises:
    UserError: an input cannot be used, or nothing can be made of the samples.
    Preempted: SIGTERM arrived. What was sampled is kept.
  """
  folder, clock = workdir / 'data', Clock()
  path = pathlib.Path(paths.path_of(str(config.pool)))
  specs = read_pool(path)
  store = Store(folder / SAMPLES, inputs.settings_of(config, seed))
  try:
    with SigtermFlag():
      specs = _prepare(config, seed, path, specs, store, log)
      clock.lap('inputs')
      plan = Plan(
        [spec for spec in specs if spec.kind != inputs.RECORDED],
        store,
        list(store.count_prompts('kind')),
        seed=seed,
        policies=config.policies_per_prompt,
        samples=config.samples_per_prompt,
        shard_size=config.unit_prompts,
      )
      if config.check:
        _show_answers(config, plan, store, specs, log)
        return {}
      quarantined = _sample(config, plan, store, specs, log)
      clock.lap('sampling')
      section = triplets.write(config, seed, folder, store, specs, quarantined, log)
      clock.lap('triplets')
  except StopRequested:
    raise Preempted('synthesize', 'the units that were finished are kept') from None
  finally:
    store.close()
  return {**section, 'seconds': clock.seconds}


def _prepare(
  config: PoolConfig, seed: int, path: pathlib.Path, specs: Sequence[PolicySpec], store: Store, log: Callable[[str], None]
) -> list[PolicySpec]:
  """Read prompts and recorded answers, leave out what must not be there, and return the checked pool."""
  inputs.add_prompts(config, seed, store, log)
  expanded = inputs.add_recorded(config, specs, store, log)
  check_names(path, expanded)
  for spec in expanded:
    if spec.kind != inputs.RECORDED:
      store.add_policy(spec.name, spec.identity())
  _filter(config, store, log)
  inputs.check(expanded, store)
  return expanded


def _filter(config: PoolConfig, store: Store, log: Callable[[str], None]) -> None:
  """Leave out near duplicates, and prompts of evaluation files, once."""
  listed: list[dict[str, str]] = []
  exclude = [pathlib.Path(paths.path_of(name.strip())) for name in (config.exclude or '').split(',') if name.strip()]
  wanted = [[[file.name, inputs.digest_of(file)] for file in exclude], config.exclude_near, store.num_prompts()]
  if store.fact('filtered') == wanted:
    return
  store.keep_prompts(_CONTAMINATION)  # of other files; those of finished units have no samples
  if config.near_duplicates:
    kept = list(store.all_prompts())
    dropped = filters.near_duplicates((prompt.text for prompt in kept), config.near_duplicates)
    store.drop_prompts([kept[i].index for i in dropped], 'near duplicate')
    log(f'synthesize: {len(dropped):,} near duplicates among the prompts left out')
  if exclude:
    kept = list(store.all_prompts())
    found = filters.contaminated([prompt.text for prompt in kept], exclude, config.exclude_near)
    store.drop_prompts([kept[i].index for i in found], _CONTAMINATION)
    listed = [{'prompt': kept[i].id, 'found_in': where} for i, where in found.items()]
    log(f'synthesize: {len(found):,} prompts left out that occur in {", ".join(file.name for file in exclude)}')
  store.set_fact('contaminated', listed)
  store.set_fact('filtered', wanted)


def _sample(config: PoolConfig, plan: Plan, store: Store, specs: Sequence[PolicySpec], log: Callable[[str], None]) -> dict[str, str]:
  """Sample what is missing. Returns the reasons of the policies that were given up."""
  stop = threading.Event()
  engine = Engine(plan, store, log, stop)
  remote = [spec for spec in specs if spec.kind == 'openai']
  local = [spec for spec in specs if spec.kind not in ('openai', inputs.RECORDED)]
  if not remote and not local:
    return {}
  addresses = Addresses(stop) if remote else None
  try:
    servers = {spec.name: _open_server(spec, config, addresses) for spec in remote}
    engine.run(servers, local, functools.partial(workers.run, config))
  finally:
    if addresses is not None:
      addresses.close()
  return engine.quarantined


def _open_server(spec: PolicySpec, config: PoolConfig, addresses: Addresses | None) -> Sampler:
  from polar_jax.synthesis.openai import OpenaiSampler

  assert addresses is not None
  return OpenaiSampler(spec, config, addresses)


def _show_answers(config: PoolConfig, plan: Plan, store: Store, specs: Sequence[PolicySpec], log: Callable[[str], None]) -> None:
  """Log what each policy answers to three prompts that it would be asked.

  Raises:
    UserError: some policies do not answer.
  """
  failed, addresses = {}, Addresses() if any(spec.kind == 'openai' for spec in specs) else None
  for spec in specs:
    if spec.kind == inputs.RECORDED:
      continue
    prompts = list(itertools.islice(_prompts_of(plan, store, spec), _PROMPTS_SHOWN))
    try:
      sampler = _open_server(spec, config, addresses) if spec.kind == 'openai' else workers.open_sampler(spec)
      answers = sampler.sample(plan.requests(spec.name, prompts, samples=1)) if prompts else []
    except (QuarantineError, UserError) as error:
      failed[spec.name] = str(error)
      log(f'check: {spec.name}: FAILED: {error}')
      continue
    for prompt, answer in zip(prompts, answers, strict=True):
      shown = f'FAILED: {answer.reason}' if isinstance(answer, Failure) else f'{_short(answer.text)!r}'
      log(f'check: {spec.name}: {_short(prompt.text)!r} -> {shown}')
  if addresses is not None:
    addresses.close()
  if failed:
    raise UserError(f'{len(failed)} of the policies do not answer: {", ".join(failed)}; see the lines above')


def _prompts_of(plan: Plan, store: Store, spec: PolicySpec) -> Iterator[PoolPrompt]:
  return (prompt for prompt in store.all_prompts() if spec.name in plan.answering(prompt))


def _short(text: str) -> str:
  return text if len(text) <= _SHOWN else f'{text[: _SHOWN // 2]} ... {text[-_SHOWN // 2 :]}'
