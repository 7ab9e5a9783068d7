"""The data card of triplets that were sampled from a pool of policies: card.json for programs, card.md and its figures for people.

Equal data give equal cards, to the byte: a card holds no time and nothing of the machine but the versions of what it was made with.
"""

from __future__ import annotations

import importlib.metadata
import pathlib
import platform
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import polar_jax
from polar_jax.data import tfds
from polar_jax.report import markdown, plots
from polar_jax.runtime import json_files, paths
from polar_jax.synthesis import card_plots
from polar_jax.synthesis.tally import ROLES, PolicyCount, Tally

JSON, MARKDOWN = 'card.json', 'card.md'
_PACKAGES = ('jax', 'numpy', 'tensorflow-datasets', 'array-record')
_LONGEST = 300  # characters of a reason


def make(
  tally: Tally,
  policies: Mapping[str, PolicyCount],
  written: tfds.Written | None,
  *,
  seed: int,
  command: Sequence[str],
  prompts: Mapping[str, Mapping[str, int]],
  missing: Sequence[str] = (),
  description: str = '',
) -> dict[str, Any]:
  """Return a card.

  Args:
    tally: of all triplets.
    policies: name -> counts, of the whole pool. Policies of triplets that are not in it get the kind 'unknown'.
    written: the data set; None if none was written yet.
    seed: of the run.
    command: words of a command that makes the data again.
    prompts: file -> split -> prompts of it.
    missing: what the data lack of what the settings ask for, one line each; the card is complete if nothing does and the data are written.
    description: one paragraph.
  """
  counted = tally.to_json()
  names = {*policies, *(name for counter in tally.roles.values() for name in counter)}
  by_policy = {}
  for name in sorted(names):
    roles = {role: tally.roles[role][name] for role in ROLES}
    by_policy[name] = {**policies.get(name, PolicyCount('unknown')).to_json(), 'triplets': roles['reference'], 'roles': roles}
  totals = {key: sum(values[key] for values in by_policy.values()) for key in ('requests', 'tokens', 'prompt_tokens')}
  return {
    'description': description,
    'complete': written is not None and not missing,
    'missing': list(missing),
    **{key: counted[key] for key in ('rows', 'lengths', 'scripts', 'difficulty', 'dropped')},
    'policies': by_policy,
    **totals,
    'prompts': {file: dict(splits) for file, splits in prompts.items()},
    'seed': seed,
    'command': shlex.join(command),
    'versions': versions(),
    'fingerprint': '' if written is None else written.fingerprint,
    'fingerprints': {} if written is None else dict(written.fingerprints),
    'checksums': {} if written is None else dict(written.checksums),
  }


def versions() -> dict[str, str]:
  """Return the versions of Python, of this package and of those that the data pass through."""
  found = {name: importlib.metadata.version(name) for name in _PACKAGES}
  return {'python': platform.python_version(), 'polar_jax': polar_jax.__version__, **found}


def write(folder: pathlib.Path, card: Mapping[str, Any]) -> None:
  """Write figures/policies.png, figures/lengths.png, card.md and then card.json to a folder, each atomically.

  Args:
    folder: where to.
    card: see `make`.
  """
  figures = {}
  if card['policies']:
    figures['policies'] = card_plots.policies(card['policies'])
  if any(values['count'] for values in card['lengths'].values()):
    figures['lengths'] = card_plots.lengths(card['lengths'])
  links = plots.save_all(figures, folder)
  paths.write_atomically(folder / MARKDOWN, to_markdown(card, links))
  paths.write_atomically(folder / JSON, json_files.dumps(card, indent=1, sort_keys=True) + '\n')


def to_markdown(card: Mapping[str, Any], figures: Mapping[str, str]) -> str:
  """Return card.md: what is wrong with the data first, then what they are, then how to make and check them.

  Args:
    card: see `make`.
    figures: name -> link of the figures that were drawn.
  """
  parts = ['# Data card', *([markdown.escape(card['description'])] if card['description'] else []), _summary(card)]
  parts += [*_quarantined(card), *_missing(card), *_rows(card), *_policies(card), *markdown.figure(figures, 'policies', _POLICIES_CAPTION)]
  parts += [*_texts(card), *markdown.figure(figures, 'lengths', 'Lengths of the texts of triplets; dashed lines are means')]
  parts += [*_counts('Dropped samples', 'reason', 'samples', card['dropped']), *_prompts(card), *_reproduction(card)]
  return '\n\n'.join(parts) + '\n'


_POLICIES_CAPTION = 'Triplets of each policy by its role in them'


def _summary(card: Mapping[str, Any]) -> str:
  total, policies = sum(card['rows'].values()), card['policies']
  held_out = sum(values['held_out'] for values in policies.values())
  pool = f'{len(policies):,} policies' + (f', {held_out:,} of them held out' if held_out else '')
  state = 'The data are complete.' if card['complete'] else '**The data are not complete.**'
  return f'{total:,} triplets of {pool}, from {card["requests"]:,} requests and {card["tokens"]:,} sampled tokens. {state}'


def _quarantined(card: Mapping[str, Any]) -> list[str]:
  found = {name: values for name, values in card['policies'].items() if values['quarantined'] is not None}
  if not found:
    return []
  lines = [
    f'**{markdown.escape(name)}**: {markdown.shorten(values["quarantined"], _LONGEST)} ({values["samples"]:,} samples were kept)'
    for name, values in sorted(found.items())
  ]
  return ['## Quarantined policies', 'They can no longer be sampled. Triplets use what they gave before.', markdown.bullets(lines)]


def _missing(card: Mapping[str, Any]) -> list[str]:
  if card['complete']:
    return []
  lines = [markdown.shorten(line, _LONGEST) for line in card['missing']] + (
    [] if card['fingerprint'] else ['The data set is not written yet.']
  )
  return ['## What is missing', markdown.bullets(lines)]


def _rows(card: Mapping[str, Any]) -> list[str]:
  if not card['rows']:
    return []
  body = [[markdown.escape(split), f'{count:,}', _digest(card['fingerprints'].get(split, ''))] for split, count in card['rows'].items()]
  return ['## Triplets', markdown.table(['split', 'triplets', 'fingerprint'], body)]


def _digest(digest: str) -> str:
  return f'`{digest[:16]}`' if digest else '-'


def _policies(card: Mapping[str, Any]) -> list[str]:
  numbers = {
    'triplets': 'as reference',
    'samples': 'samples',
    'dropped': 'dropped',
    'failed': 'failed',
    'requests': 'requests',
    'tokens': 'tokens',
  }
  words = [key for key in ('family', 'size', 'date') if any(values[key] for values in card['policies'].values())]
  body = []
  for name, values in sorted(card['policies'].items()):
    marks = [mark for mark, holds in (('held out', values['held_out']), ('quarantined', values['quarantined'] is not None)) if holds]
    line = [markdown.escape(name), markdown.escape(values['kind']), *(markdown.text(values[key] or '-') for key in words)]
    mean = values['lengths']['mean']
    body.append([*line, *(f'{values[key]:,}' for key in numbers), '-' if mean is None else f'{mean:,.0f}', ', '.join(marks) or ' '])
  if not body:
    return []
  text = (
    'Of the triplets of a policy, those are counted in which it is the reference. A sample was dropped if the rules for texts left nothing '
    'of it; a request failed if there was no answer to it.'
  )
  return ['## Policies', text, markdown.table(['policy', 'kind', *words, *numbers.values(), 'mean length', ''], body)]


def _texts(card: Mapping[str, Any]) -> list[str]:
  body = [
    [name, f'{values["count"]:,}', f'{values["mean"]:,.1f}', f'{values["max"]:,}']
    for name, values in card['lengths'].items()
    if values['count']
  ]
  if not body:
    return []
  parts = ['## Texts', 'Lengths are in characters.', markdown.table(['text', 'number', 'mean', 'longest'], body)]
  parts += _counts('Scripts of prompts', 'script', 'triplets', card['scripts'], '###')
  return parts + _counts('Difficulty', 'difficulty', 'triplets', card['difficulty'], '###')


def _counts(title: str, key: str, unit: str, counts: Mapping[str, int], level: str = '##') -> list[str]:
  """Return a table of counts with their shares, by falling count."""
  total = sum(counts.values())
  ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
  body = [[markdown.shorten(name, _LONGEST), f'{count:,}', f'{100 * count / total:.1f}%'] for name, count in ordered if count]
  return [f'{level} {title}', markdown.table([key, unit, 'share'], body)] if body else []


def _prompts(card: Mapping[str, Any]) -> list[str]:
  body = [
    [markdown.escape(file), markdown.escape(split), f'{n:,}'] for file, splits in card['prompts'].items() for split, n in splits.items()
  ]
  return ['## Prompts', markdown.table(['file', 'split', 'prompts'], body)] if body else []


def _reproduction(card: Mapping[str, Any]) -> list[str]:
  command = ''.join(c if c.isprintable() else ' ' for c in card['command'])
  # An indented block: text of a user cannot end it, whatever it holds.
  parts = ['## How to make and check the data', f'Seed {card["seed"]}.', f'    {command}']
  if card['fingerprint']:
    parts.append(
      f'The SHA-256 of all triplets is `{card["fingerprint"]}`; that of each file is in {JSON} and next to the '
      'files. Models on other hardware, or in other versions, may give other samples.'
    )
  used = ', '.join(f'{markdown.escape(name)} {markdown.escape(version)}' for name, version in card['versions'].items())
  return [*parts, f'Made with {used}.']
