"""What surveys of examples found (`polar_jax.data.survey`), in report.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polar_jax.report import markdown

_MEANING = {
  'same_text': 'have the same text as chosen and rejected, which **counts as a tie**',
  'same_tokens': 'are the same tokens to the model, mostly because truncation cut what differs, which **counts as a tie**',
  'cut_responses': 'have a reference or candidate whose end is cut off',
  'cut_prompts': 'have a prompt whose beginning is cut off',
  'left_out': 'are left out, because their prompt is longer than rft.rollout.max_prompt',
}


def section(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
  """Return a paragraph that counts the examples which a model cannot learn or judge, or sees only in part (`polar_jax.data.survey`)."""
  lines = []
  for name, counts in found.items():
    for kind, meaning in _MEANING.items():
      if counts.get(kind):
        numbers = counts.get('numbers', {}).get(kind, [])
        listed = ', '.join(map(str, numbers)) + (', ...' if len(numbers) < counts[kind] else '')
        lines.append(f'{markdown.escape(name)}: {counts[kind]:,} of {counts["examples"]:,} examples {meaning} (number {listed}).')
  return [markdown.bullets(lines)] if lines else []
