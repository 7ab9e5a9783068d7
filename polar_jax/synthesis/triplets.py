"""The last step of a run: samples are cleaned and paired, and the triplets are written with their card, unless they are there already."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import polar_jax
from polar_jax.config import PoolConfig
from polar_jax.data import tfds
from polar_jax.data.records import Fields
from polar_jax.runtime import preemption
from polar_jax.synthesis import card, cleanup, inputs, pairing
from polar_jax.synthesis.plan import UNSEEN
from polar_jax.synthesis.pool import PolicySpec
from polar_jax.synthesis.store import Store
from polar_jax.synthesis.tally import Lengths, PolicyCount, Tally
from polar_jax.types import UserError

TRIPLETS = 'triplets'
_INCOMPLETE, _OLD = f'incomplete.{TRIPLETS}', f'old.{TRIPLETS}'
_FACT = 'triplets'  # of the store: what was written last
_FORMAT = 1  # to be raised when the same samples and settings give other triplets, or another card
_AT_ONCE = 256  # prompts that are paired together
_LEFT_OUT = ('held_out', 'equal', 'too_few')  # counts of a pairing for the card
_DESCRIPTION = 'Triplets of a pool of language models: reference and chosen are two samples of one policy, rejected is one of another.'


class _Source:
  """Makes the triplets of one split after the other, with counts of them and of what is left out."""

  def __init__(self, config: PoolConfig, seed: int, store: Store, specs: Sequence[PolicySpec]):
    self._store = store
    self._policy_of = {member: spec.name for spec in specs for member in spec.settings.get(inputs.MEMBERS, [spec.name])}
    self._merged = {spec.name for spec in specs if spec.settings.get('merge')}
    facts = {spec.name: pairing.PolicyFacts(spec.weight, spec.family, spec.size, spec.date, spec.held_out, spec.near_to) for spec in specs}
    self._pairer = pairing.Pairer(facts, pairing.PairingRules(config.pairs_per_prompt, config.near_share, seed, config.negatives))
    self.tally = Tally()
    self.kept: dict[str, Lengths] = {spec.name: Lengths() for spec in specs}
    self.dropped: collections.Counter[str] = collections.Counter()  # by policy: samples of which the clean-up left nothing

  def of_split(self, split: str) -> Iterator[Fields]:
    """Yield what is stored of the triplets of a split."""
    stored = UNSEEN if split == pairing.UNSEEN_POLICIES else split
    new = split != pairing.UNSEEN_POLICIES  # its samples are those of unseen_prompts
    for low in range(0, self._store.num_prompts(), _AT_ONCE):
      preemption.check()
      prompts = {prompt.index: prompt for prompt in self._store.prompts(low, low + _AT_ONCE)}
      for number, candidates in self._candidates(low, stored, new).items():
        prompt = prompts[number]
        made = self._pairer.pair(prompt, candidates)
        if new:
          self.tally.dropped.update({reason: made.counts[reason] for reason in _LEFT_OUT if made.counts[reason]})
        if triples := made.triples.get(split):
          self.tally.update(split, prompt.text, triples, [self._pairer.difficulty(a.policy, b.policy) for a, _, b, *_ in triples])
          yield from self._pairer.fields(prompt, triples)

  def _candidates(self, low: int, split: str, count: bool) -> dict[int, list[pairing.Candidate]]:
    """Return the cleaned samples by prompt."""
    rows = [row for row in self._store.samples(low, low + _AT_ONCE, split) if row.policy in self._policy_of]
    out: dict[int, list[pairing.Candidate]] = {}
    numbers: collections.Counter[tuple[int, str]] = collections.Counter()
    cleaned = cleanup.clean([row.text for row in rows], [row.ended for row in rows])
    for (prompt, name, sample, _, _), text in zip(rows, cleaned, strict=True):
      policy, is_empty = self._policy_of[name], not text or text.isspace()
      if policy in self._merged:  # each of its names has a sample 0
        sample = numbers[prompt, policy]
        numbers[prompt, policy] += 1
      if not is_empty:
        out.setdefault(prompt, []).append(pairing.Candidate(policy, sample, text))
      if count and is_empty:
        self.dropped[policy] += 1
        self.tally.dropped['empty'] += 1
      elif count:
        self.kept[policy].add(len(text))
    return out


def write(
  config: PoolConfig,
  seed: int,
  folder: pathlib.Path,
  store: Store,
  specs: Sequence[PolicySpec],
  quarantined: Mapping[str, str],
  log: Callable[[str], None],
) -> dict[str, Any]:
  """Write the triplets and their card, and return the section of the report.

  Triplets that are there already, complete, undamaged, and made of the same samples with the same settings, are left as they are. Others
  are replaced when the new ones are complete.

  Raises:
    UserError: no triplet can be made.
  """
  made_of = _digest(config, seed, store, specs)
  if not quarantined and (section := _find(folder, store, made_of, log)) is not None:
    return section
  source = _Source(config, seed, store, specs)
  splits = {}
  for split in pairing.SPLITS if any(spec.held_out for spec in specs) else pairing.PROMPT_SPLITS:
    triplets = source.of_split(split)
    if (first := next(triplets, None)) is not None:  # a split without triplets has been read to its end, so that its samples count
      splits[split] = itertools.chain([first], triplets)
  if not splits:
    raise UserError(_nothing(quarantined))
  shutil.rmtree(folder / _INCOMPLETE, ignore_errors=True)
  try:
    written = tfds.write(folder / _INCOMPLETE, TRIPLETS, splits, _DESCRIPTION, {'seed': seed})
    (folder / card.JSON).unlink(missing_ok=True)  # a card is that of the triplets next to it
    _replace(folder)
  finally:
    shutil.rmtree(folder / _INCOMPLETE, ignore_errors=True)
  card.write(folder, _card(config, seed, store, specs, quarantined, source, written))
  rows = {f'{TRIPLETS}/{split}': count for split, count in written.rows.items()}
  section = {'rows': rows, 'fingerprints': {f'{TRIPLETS}/{split}': value for split, value in written.fingerprints.items()}}
  log(f'synthesize: triplets: {_listed(rows)}; see {folder / card.MARKDOWN}')
  if quarantined:
    log(f'synthesize: NOT COMPLETE: {", ".join(quarantined)} did not answer; repeat the command when they do')
  else:
    store.set_fact(_FACT, {'made_of': made_of, 'checksums': written.checksums, 'section': section})
  return section


def _digest(config: PoolConfig, seed: int, store: Store, specs: Sequence[PolicySpec]) -> str:
  """Return SHA-256 (hex) of all that the triplets and their card depend on. No sample is read: those of a finished unit never change."""
  facts = [dataclasses.asdict(spec) for spec in specs]
  values = [_FORMAT, polar_jax.__version__, card.versions(), seed, dataclasses.asdict(config), facts, store.state(without=[_FACT])]
  return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _find(folder: pathlib.Path, store: Store, made_of: str, log: Callable[[str], None]) -> dict[str, Any] | None:
  """Return the section of the report about the triplets that are there, None if there are none, or others, or damaged ones."""
  known = store.fact(_FACT)
  if known is None or known['made_of'] != made_of or not all((folder / name).exists() for name in (card.JSON, card.MARKDOWN)):
    return None
  try:
    checksums = tfds.verify(folder / TRIPLETS)
  except UserError as error:
    log(f'synthesize: triplets are written again: {error}')
    return None
  if checksums != known['checksums']:
    return None
  section = known['section']
  log(f'synthesize: triplets: {_listed(section["rows"])}; they were there, of the same samples and settings; see {folder / card.MARKDOWN}')
  return section


def _listed(rows: Mapping[str, int]) -> str:
  return ', '.join(f'{name.removeprefix(TRIPLETS + "/")} {count:,}' for name, count in rows.items())


def _replace(folder: pathlib.Path) -> None:
  """Put the triplets that are complete in the place of those that are there."""
  shutil.rmtree(folder / _OLD, ignore_errors=True)
  with contextlib.suppress(FileNotFoundError):
    os.rename(folder / TRIPLETS, folder / _OLD)
  os.rename(folder / _INCOMPLETE, folder / TRIPLETS)
  shutil.rmtree(folder / _OLD, ignore_errors=True)


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
  source: _Source,
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
