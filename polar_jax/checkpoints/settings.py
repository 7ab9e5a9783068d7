"""Settings stored in a checkpoint: translation from earlier versions, and comparison when a run resumes.

A training run stores the fields of its own section without a prefix (`learning_rate`), everything else under its dotted name
(`model.d_model`, `rft.gamma`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from polar_jax.config import LossConfig, OptimizerConfig, current_name

_STAGE_VALUES = {'lm': 'pretrain_lm'}  # stages that were renamed, as values of the two options below
_STAGE_OPTIONS = ('start_from', 'rft.policy')
_OF_THE_STUDY = ('study.', 'rft.start_steps')  # stored by earlier versions; they do not change what a run of rft trains
# Digests that earlier versions did not store, or that a run has only if it has such data: compared only where both have one.
_OPTIONAL = ('text', 'validation_text', 'validation_rows', 'chat')
_EARLIER_DIGEST = re.compile(r'(\d+:)?[0-9a-f]{16}')
_MEANING = {
  'rows': 'the training data (`rows`)',
  'validation_rows': 'the held-out data (`validation_rows`)',
  'text': 'the training text (`text`)',
  'validation_text': 'the held-out text (`validation_text`)',
  'chat': 'the chat template (`chat`)',
  'base.digest': 'the base of the adapters (`base.digest`)',
}


def translate(settings: Mapping[str, Any]) -> dict[str, Any]:
  """Return `settings` with the option names and values of earlier versions replaced by the current ones.

  Earlier versions also stored `use_reference` next to `template.use_reference` (both had to be true), and the options of the study,
  which do not affect a single run.
  """
  translated = {}
  for name, value in settings.items():
    name = current_name(name) if '.' in name else current_name(f'pretrain.{name}').removeprefix('pretrain.')
    is_stage = name in _STAGE_OPTIONS or name.endswith('.start_from')
    translated[name] = _STAGE_VALUES.get(value, value) if is_stage else value
  if 'use_reference' in translated:
    own, of_template = translated.pop('use_reference'), translated.get('template.use_reference', True)
    translated['template.use_reference'] = own and of_template
  return {name: value for name, value in translated.items() if not name.startswith(_OF_THE_STUDY)}


def differences(stored: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
  """Return a description of every setting whose value differs, sorted by name; earlier names are translated first.

  Digests of data (`polar_jax.data.identity`) that earlier versions stored are compared as far as they go.

  Args:
    stored: as read back from JSON.
    current: settings of this run, which may hold tuples.
  """
  before, now = translate(stored), translate(json.loads(json.dumps(current)))
  names = (before.keys() | now.keys()) - {name for name in _OPTIONAL if name not in before or name not in now}
  # The content counts, not its name.
  names -= {'data.text'} if 'text' in names else set()
  names -= {'base.path'} if 'base.digest' in names else set()
  value = lambda settings, name: settings.get(name, _default(name))
  different = [name for name in sorted(names) if not _is_same(value(before, name), value(now, name))]
  return [f'{_MEANING.get(name, name)} was {value(before, name)!r}, is {value(now, name)!r}' for name in different]


def _default(name: str) -> Any:
  """Return the default of an option that earlier versions did not have and therefore did not store; None for any other setting."""
  *sections, option = name.split('.')
  if option in ('optimizer', 'moments'):
    return getattr(OptimizerConfig(), option)
  return getattr(LossConfig(), option, None) if sections[-1:] == ['loss'] else None


def _is_same(before: Any, now: Any) -> bool:
  """Return whether two values are equal, or `before` is the shorter digest that an earlier version stored of the same data."""
  if before == now:
    return True
  is_earlier = isinstance(before, str) and isinstance(now, str) and _EARLIER_DIGEST.fullmatch(before)
  return bool(is_earlier) and now.startswith(f'{before}:')
