"""The section of the report on benchmarks of a policy."""

from __future__ import annotations

from polar_jax.report import policies

ONE = {'metric': 'acc,none', 'value': 0.25, 'stderr': None, 'n': 1_200, 'shots': None, 'truncated': 3, 'requests': 4_800}


def test_the_section_has_values_cuts_and_what_was_not_run():
  found = {
    'benchmarks': {'own_task': ONE, 'text': {**ONE, 'value': 12_345.67, 'stderr': 0.5, 'shots': 5}},
    'not_run': {'gone': 'no <data>'},
  }
  text = '\n\n'.join(policies.section(found))
  assert '| own_task | acc,none | 0.2500 | - | 1,200 | - | 3 of 4,800 |' in text
  assert '| text | acc,none | 12345.7 | 0.500 | 1,200 | 5 |' in text
  assert '- gone: no &lt;data&gt;' in text and 'Only the first' not in text
  assert 'Only the first 7 documents' in '\n\n'.join(policies.section({**found, 'options': {'limit': 7}}))
  assert policies.section({}) == []
