"""The section of report.md on benchmarks of a policy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polar_jax.report import markdown

_LONGEST = 40  # characters of a name


def section(policies: Mapping[str, Any]) -> list[str]:
  """Return the section, from the section `policies` of report.json, which has the keys of policies.json."""
  found, left_out = policies.get('benchmarks', {}), policies.get('not_run', {})
  if not found:
    return []
  head = ['benchmark', 'metric', 'value', 'standard error', 'documents', 'shots', 'cut requests']
  body = [
    [
      _name(name),
      markdown.escape(one['metric']),
      f'{one["value"]:.4f}' if abs(one['value']) < 100 else f'{one["value"]:.1f}',
      markdown.number(one.get('stderr')),
      f'{one["n"]:,}',
      '-' if one.get('shots') is None else str(one['shots']),
      f'{one["truncated"]:,} of {one["requests"]:,}',
    ]
    for name, one in found.items()
  ]
  out = [
    '## Benchmarks of the policy',
    'Tasks of lm-eval. Requests longer than the model allows were cut on the left.',
    markdown.table(head, body),
  ]
  limit = policies.get('options', {}).get('limit')
  if limit is not None:
    out.append(f'Only the first {limit:,} documents of each task were used, which is enough to try a setting, but not to compare models.')
  if left_out:
    out += ['Not run:', markdown.bullets([f'{_name(name)}: {markdown.escape(reason)}' for name, reason in left_out.items()])]
  return out


def _name(name: str) -> str:
  return markdown.shorten(name, _LONGEST)
