"""Triplets of a pool of language models: from the file of the pool through samples and pairs to the data and their card."""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import pathlib
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from polar_jax.config import PoolConfig
from polar_jax.data import tfds
from polar_jax.runtime import paths, preemption
from polar_jax.runtime.clock import Clock
from polar_jax.runtime.preemption import Preempted, SigtermFlag, StopRequested
from polar_jax.synthesis import card, cleanup, filters, inputs, pairing, workers
from polar_jax.synthesis.addresses import Addresses
from polar_jax.synthesis.engine import Engine
from polar_jax.synthesis.plan import UNSEEN, Plan
from polar_jax.synthesis.pool import PolicySpec, check_names, read_pool
from polar_jax.synthesis.samples import Failure, PoolPrompt, QuarantineError, Sampler
from polar_jax.synthesis.store import Store
from polar_jax.synthesis.tally import Lengths, PolicyCount, Tally
from polar_jax.types import Triplet, UserError

SAMPLES, TRIPLETS = 'samples.sqlite', 'triplets'
_SHOWN, _PROMPTS_SHOWN = 160, 3
_CONTAMINATION = 'contamination'  # why prompts of evaluation files were dropped
_AT_ONCE = 256  # prompts that are paired together
_LEFT_OUT = ('held_out', 'equal', 'too_few')  # counts of a pairing for the card
_DESCRIPTION = 'Triplets of a pool of language models: reference and chosen are two samples of one policy, rejected is one of another.'


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
      section = _write(config, seed, folder, store, specs, quarantined, log)
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
  wanted = [[[file.name, inputs.digest_of(file)] for file in exclude], store.num_prompts()]
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
    found = filters.contaminated([prompt.text for prompt in kept], exclude, None)
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


class _Triplets:
  """Makes the triplets of one split after the other, with counts of what is left out."""

  def __init__(self, config: PoolConfig, seed: int, store: Store, specs: Sequence[PolicySpec]):
    self._store = store
    self._policy_of = {member: spec.name for spec in specs for member in spec.settings.get(inputs.MEMBERS, [spec.name])}
    self._merged = {spec.name for spec in specs if spec.settings.get('merge')}
    facts = {spec.name: pairing.PolicyFacts(spec.weight, spec.family, spec.size, spec.date, spec.held_out, spec.near_to) for spec in specs}
    self._pairer = pairing.Pairer(facts, pairing.PairingRules(config.pairs_per_prompt, config.near_share, seed))
    self.tally = Tally()
    self.kept: dict[str, Lengths] = {spec.name: Lengths() for spec in specs}
    self.dropped: collections.Counter[str] = collections.Counter()  # by policy: samples of which the clean-up left nothing

  def of_split(self, split: str, *, count: bool = True) -> Iterator[Triplet]:
    """Yield the triplets of a split; `count` them and what is left out."""
    stored = UNSEEN if split == pairing.UNSEEN_POLICIES else split
    new = count and split != pairing.UNSEEN_POLICIES  # its samples are those of unseen_prompts
    for low in range(0, self._store.num_prompts(), _AT_ONCE):
      preemption.check()
      prompts = {prompt.index: prompt for prompt in self._store.prompts(low, low + _AT_ONCE)}
      for number, candidates in self._candidates(low, stored, new).items():
        made = self._pairer.pair(prompts[number], candidates)
        if new:
          self.tally.dropped.update({reason: made.counts[reason] for reason in _LEFT_OUT if made.counts[reason]})
        for triplet in made.triplets.get(split, ()):
          if count:
            self.tally.update(triplet, split)
          yield triplet

  def _candidates(self, low: int, split: str, count: bool) -> dict[int, list[pairing.Candidate]]:
    """Return the cleaned samples by prompt."""
    rows = [row for row in self._store.samples(low, low + _AT_ONCE, split) if row.policy in self._policy_of]
    out: dict[int, list[pairing.Candidate]] = {}
    numbers: collections.Counter[tuple[int, str]] = collections.Counter()
    for row, text in zip(rows, cleanup.clean([row.text for row in rows], [row.ended for row in rows]), strict=True):
      policy, is_empty = self._policy_of[row.policy], not text.strip()
      sample = row.sample
      if policy in self._merged:  # each of its names has a sample 0
        sample = numbers[row.prompt, policy]
        numbers[row.prompt, policy] += 1
      if not is_empty:
        out.setdefault(row.prompt, []).append(pairing.Candidate(policy, sample, text))
      if count and is_empty:
        self.dropped[policy] += 1
        self.tally.dropped['empty'] += 1
      elif count:
        self.kept[policy].add(len(text))
    return out


def _write(
  config: PoolConfig,
  seed: int,
  folder: pathlib.Path,
  store: Store,
  specs: Sequence[PolicySpec],
  quarantined: Mapping[str, str],
  log: Callable[[str], None],
) -> dict[str, Any]:
  """Write the triplets and their card, and return the section of the report."""
  source = _Triplets(config, seed, store, specs)
  shutil.rmtree(folder / TRIPLETS, ignore_errors=True)
  (folder / card.JSON).unlink(missing_ok=True)
  possible = pairing.SPLITS if any(spec.held_out for spec in specs) else pairing.PROMPT_SPLITS
  splits = {split: source.of_split(split) for split in possible if next(source.of_split(split, count=False), None) is not None}
  if not splits:
    raise UserError(_nothing(quarantined))
  written = tfds.write(folder / TRIPLETS, TRIPLETS, splits, _DESCRIPTION, {'seed': seed})
  for split in set(pairing.PROMPT_SPLITS) - set(splits):  # their samples count all the same
    collections.deque(source.of_split(split), maxlen=0)
  values = _card(config, seed, store, specs, quarantined, source, written)
  card.write(folder, values)
  rows = ', '.join(f'{split} {count:,}' for split, count in written.rows.items())
  log(f'synthesize: triplets: {rows}; see {folder / card.MARKDOWN}')
  if quarantined:
    log(f'synthesize: NOT COMPLETE: {", ".join(quarantined)} did not answer; repeat the command when they do')
  fingerprints = {f'{TRIPLETS}/{split}': value for split, value in written.fingerprints.items()}
  return {'rows': {f'{TRIPLETS}/{split}': count for split, count in written.rows.items()}, 'fingerprints': fingerprints}


def _nothing(quarantined: Mapping[str, str]) -> str:
  if quarantined:
    name, reason = next(iter(quarantined.items()))
    return f'no triplet could be made: {len(quarantined)} policies did not answer; {name}: {reason}'
  return (
    'no triplet could be made: no prompt has two different samples of one policy and one of another; raise the temperature, or record more '
    'answers'
  )


def _card(
  config: PoolConfig,
  seed: int,
  store: Store,
  specs: Sequence[PolicySpec],
  quarantined: Mapping[str, str],
  source: _Triplets,
  written: tfds.Written,
) -> dict[str, Any]:
  """Return the content of the data card."""
  failures, costs = store.failure_counts(), store.costs()
  policies = {
    spec.name: PolicyCount(
      kind=spec.kind,
      samples=source.kept[spec.name].count,
      dropped=source.dropped[spec.name],
      failed=failures.get(spec.name, 0),
      **{key: costs.get(spec.name, {}).get(key, 0) for key in ('requests', 'tokens', 'prompt_tokens')},
      quarantined=quarantined.get(spec.name),
      family=spec.family,
      size='' if spec.size is None else f'{spec.size:g}B',
      date=spec.date or '',
      held_out=spec.held_out,
      lengths=source.kept[spec.name],
    )
    for spec in specs
  }
  settings = {field.name: getattr(config, field.name) for field in dataclasses.fields(PoolConfig)}
  given = {name: value for name, value in settings.items() if value != getattr(PoolConfig(), name)}
  values = card.make(
    source.tally,
    policies,
    written,
    seed=seed,
    command=[
      *('python', '-m', 'polar_jax.main', '--config=configs/synthesize.py', f'--config.seed={seed}'),
      *(f'--config.synthesize.{name}={value}' for name, value in given.items()),
    ],
    prompts=store.count_prompts_by_file(),
    missing=[f'{name} was given up' for name in quarantined],
    description=_DESCRIPTION,
  )
  more = {
    'prompts_left_out': {**(store.fact('prompt_counts') or {}), **store.count_prompts('dropped')},
    'contaminated': store.fact('contaminated') or [],
    'settings': settings,
    'pool': [{'name': spec.name, **spec.identity(), 'weight': spec.weight, 'near_to': list(spec.near_to)} for spec in specs],
  }
  return values | more
