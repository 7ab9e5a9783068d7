"""Counts of triplets, and the card and figures that are made of them."""

from __future__ import annotations

import collections
import itertools
import json
import re
import types
import unicodedata

import numpy as np
import pytest

from polar_jax.data import tfds
from polar_jax.synthesis import card as cards
from polar_jax.synthesis import card_plots, tally
from polar_jax.synthesis.pairing import Candidate
from polar_jax.types import Triplet

HAN = '\u4f60\u597d'


WRITTEN = types.SimpleNamespace(
  fingerprint='ab' * 32, fingerprints={'train': 'cd' * 32}, checksums={'triplets-train.array_record-00000-of-00001': 'ef' * 32}
)


def make_triplets(n):
  rng = np.random.default_rng(0)
  out = []
  for i in range(n):
    texts = ['x' * int(length) for length in rng.integers(0, 3000, 4)]
    texts[0] = (HAN, '', '12 ', 'abc ')[i % 4] + texts[0] * (i % 4 == 3)
    names = {'reference_policy': f'a{i % 3}', 'chosen_policy': f'a{i % 3}', 'rejected_policy': f'a{i % 5}'}
    out.append((Triplet(*texts, metadata={**names, 'difficulty': str(i % 2)}), 'train' if i % 7 else 'validation'))
  return out


def count(found, triplet, split):
  metadata = triplet.metadata
  triple = tuple(Candidate(metadata[f'{role}_policy'], 0, getattr(triplet, role)) for role in tally.ROLES)
  found.update(split, triplet.prompt, [triple], [metadata['difficulty']])


def counted(triplets):
  out = tally.Tally()
  for triplet, split in triplets:
    count(out, triplet, split)
  return out


def make_card(policies=None, written=WRITTEN, triplets=50, missing=(), dropped=None, **changes):
  found = counted(make_triplets(triplets))
  found.dropped.update(dropped or {})
  policies = {f'a{i}': tally.PolicyCount('server', requests=10 + i, tokens=100) for i in range(5)} if policies is None else policies
  prompts = {'documents.jsonl': {'train': 900, 'validation': 50}}
  made = cards.make(found, policies, written, seed=3, command=['python', '-m', 'x', 'a b'], prompts=prompts, missing=missing)
  return {**made, **changes}


def test_lengths_are_counted_by_their_binary_digits():
  lengths = [0, 1, 2, 3, 4, 7, 8, 1000, 1023, 1024, 2**40]
  found = tally.Lengths()
  assert found.to_json() == {'count': 0, 'mean': None, 'max': 0, 'histogram': {}}
  for length in lengths:
    found.add(length)
  histogram = {'0': 1, '1': 1, '2': 2, '4': 2, '8': 1, '512': 2, '1024': 1, str(2**40): 1}
  assert found.to_json() == {'count': 11, 'mean': sum(lengths) / 11, 'max': 2**40, 'histogram': histogram}


def test_a_tally_counts_what_a_list_holds():
  triplets = make_triplets(300)
  found = counted(triplets)
  assert found.rows == collections.Counter(split for _, split in triplets)
  for role in tally.ROLES:
    assert found.roles[role] == collections.Counter(t.metadata[f'{role}_policy'] for t, _ in triplets)
  for name in tally.TEXTS:
    lengths = [len(getattr(t, name)) for t, _ in triplets]
    got = found.to_json()['lengths'][name]
    assert (got['count'], got['mean'], got['max']) == (300, sum(lengths) / 300, max(lengths))
    assert got['histogram'] == {str(k): v for k, v in collections.Counter(1 << n.bit_length() >> 1 for n in lengths).items()}
  assert found.difficulty == {'0': 150, '1': 150} and found.scripts == {'Han': 75, 'other': 150, 'Latin': 75}


def test_the_triplets_of_a_prompt_are_counted_together():
  one, several = tally.Tally(), tally.Tally()
  triples = [tuple(Candidate(name, 0, 'x' * (10 * i + j)) for j, name in enumerate('aab')) for i in range(5)]
  several.update('train', 'Why?', triples, ['near_to'] * 2 + ['other'] * 3)
  for i, triple in enumerate(triples):
    one.update('train', 'Why?', [triple], ['near_to' if i < 2 else 'other'])
  assert one.to_json() == several.to_json() and one.roles == several.roles and several.rows == {'train': 5}


@pytest.mark.parametrize(
  ('text', 'script'),
  [
    ('', 'other'),
    ('12 + 3 = ?', 'other'),
    ('\N{GRINNING FACE}\U0010ffff\ud800', 'other'),
    ('What is \u4f60\u597d?', 'Latin'),
    (f'{HAN} ok.', 'Latin'),  # two of each: the first of the table
    (f'{HAN * 3} ok.', 'Han'),
    ('Stra\u00dfe \u00e9\u00e8', 'Latin'),
    ('\u041f\u0440\u0438\u0432\u0435\u0442', 'Cyrillic'),
    ('\u3053\u3093\u306b\u3061\u306f\u4e16\u754c', 'Kana'),
    ('\uc548\ub155', 'Hangul'),
    ('\u0645\u0631\u062d\u0628\u0627 123', 'Arabic'),
    ('\U00020000', 'Han'),
    ('1' * 200 + 'abc', 'other'),
    ('1' * 199 + 'abc', 'Latin'),
    ('\u4f60' * 200 + 'a' * 900, 'Han'),
  ],
)
def test_the_script_is_that_of_most_letters(text, script):
  assert tally.script_of(text) == script


def test_ranges_of_scripts_hold_their_letters_alone():
  words = {'Han': {'CJK', 'IDEOGRAPHIC'}, 'Kana': {'HIRAGANA', 'KATAKANA', 'HALFWIDTH', 'KATAKANA-HIRAGANA'}}
  ranges = [(first, last, script) for script, found in tally.SCRIPTS.items() for first, last in found]
  for first, last, script in ranges:
    allowed = words.get(script, {script.upper()}) | ({'FULLWIDTH', 'FEMININE'} if script == 'Latin' else set())
    allowed |= {'COPTIC'} if script == 'Greek' else set()
    letters = [chr(c) for c in range(first, last + 1) if unicodedata.category(chr(c)) in ('Lu', 'Ll', 'Lo')]
    assert letters and {unicodedata.name(c).split()[0] for c in letters} <= allowed, (script, hex(first))
  for a, b in itertools.pairwise(sorted(ranges)):
    assert a[1] < b[0], (a, b)


def test_the_keys_of_a_card():
  made = make_card(dropped={'short': 3})
  assert (
    made['rows'] == {'train': 42, 'validation': 8} and made['requests'] == 60 and made['tokens'] == 500 and made['dropped'] == {'short': 3}
  )
  assert list(made['policies']) == ['a0', 'a1', 'a2', 'a3', 'a4']
  assert made['policies']['a1']['kind'] == 'server' and made['policies']['a1']['triplets'] == 17
  assert made['policies']['a3']['roles'] == {'reference': 0, 'chosen': 0, 'rejected': 10}
  assert made['complete'] is True and made['fingerprint'] == WRITTEN.fingerprint and made['fingerprints'] == WRITTEN.fingerprints
  assert made['checksums'] == WRITTEN.checksums and made['seed'] == 3 and made['command'] == "python -m x 'a b'"
  assert {'python', 'jax', 'polar_jax'} <= made['versions'].keys()
  assert made['prompts'] == {'documents.jsonl': {'train': 900, 'validation': 50}}


def test_a_card_is_complete_if_nothing_is_missing_and_the_data_are_written():
  assert not make_card(missing=['x'])['complete'] and not make_card(written=None)['complete']
  assert make_card(written=None)['fingerprint'] == '' and make_card(missing=['x'])['fingerprint'] == WRITTEN.fingerprint


def test_a_policy_of_triplets_that_the_pool_lacks_is_unknown():
  made = make_card(policies={'b': tally.PolicyCount('server')})
  assert made['policies']['a1']['kind'] == 'unknown' and made['policies']['b']['roles'] == dict.fromkeys(tally.ROLES, 0)


def test_equal_data_give_equal_cards(tmp_path):
  triplets, out = make_triplets(60), []
  for i, order in enumerate((triplets, triplets[::-1])):
    found = counted(order)
    found.dropped.update(dict([('x', 1), ('y', 2)][:: 1 - 2 * i]))
    policies = {name: tally.PolicyCount('server') for name in ('a0', 'a1', 'a2', 'a3', 'a4')[:: 1 - 2 * i]}
    cards.write(tmp_path / str(i), cards.make(found, policies, WRITTEN, seed=1, command=['x'], prompts={}))
    out.append({str(f.relative_to(tmp_path / str(i))): f.read_bytes() for f in (tmp_path / str(i)).rglob('*') if f.is_file()})
  assert out[0] == out[1] and set(out[0]) == {'card.json', 'card.md', 'figures/policies.png', 'figures/lengths.png'}


def test_card_json_is_strict_and_read_back(tmp_path):
  policies = {'a0': tally.PolicyCount('server', quarantined='down\ud800')}
  made = make_card(policies=policies, extra=float('nan'))
  cards.write(tmp_path, made)

  def refuse(constant):
    raise AssertionError(constant)

  assert json.loads((tmp_path / 'card.json').read_text(), parse_constant=refuse) == {**made, 'extra': None}


def test_a_card_of_nothing_is_written_without_figures(tmp_path):
  made = cards.make(tally.Tally(), {}, None, seed=0, command=['x'], prompts={}, missing=['all'])
  cards.write(tmp_path, made)
  text = (tmp_path / 'card.md').read_text()
  assert not (tmp_path / 'figures').exists() and '![' not in text and '- all\n- The data set is not written yet.' in text


def test_a_card_describes_a_data_set_that_was_written(tmp_path):
  found = tally.Tally()

  def passing():
    for triplet, _ in make_triplets(20):
      count(found, triplet, 'train')
      yield triplet

  written = tfds.write(tmp_path, 'triplets', {'train': passing()}, '', {})
  made = cards.make(found, {}, written, seed=0, command=['x'], prompts={})
  assert made['rows'] == written.rows and made['checksums'] == tfds.verify(tmp_path)
  assert made['fingerprints'] == {'train': tfds.fingerprint(tfds.open_triplets(tmp_path)['train'])}


def section(text, title):
  """Return the lines of a section of a Markdown text."""
  return text.split(f'## {title}\n')[1].split('\n## ')[0].strip().splitlines()


def cells(lines):
  return [[cell.strip() for cell in line.strip('|').split('|')] for line in lines if line.startswith('|')]


def test_markdown_names_what_is_wrong_first():
  policies = {
    'good': tally.PolicyCount('server'),
    'b|d': tally.PolicyCount('server', samples=1234, quarantined='503 <b>\nwhy', held_out=True),
  }
  text = cards.to_markdown(make_card(policies=policies, missing=['unseen_prompts: 0 of 2,000 triplets']), {})
  titles = re.findall('^## (.*)', text, re.MULTILINE)
  assert titles[:4] == ['Quarantined policies', 'What is missing', 'Triplets', 'Policies']
  assert section(text, 'Quarantined policies')[-1] == '- **b|d**: 503 &lt;b&gt; \u23ce why (1,234 samples were kept)'
  assert section(text, 'What is missing') == ['- unseen_prompts: 0 of 2,000 triplets']
  assert '**The data are not complete.**' in text and '1 of them held out' in text
  complete = cards.to_markdown(make_card(), {})
  assert 'Quarantined' not in complete and 'missing' not in complete and 'The data are complete.' in complete


def test_markdown_holds_the_numbers():
  lengths = tally.Lengths()
  lengths.add(10)
  lengths.add(21)
  policies = {'a0': tally.PolicyCount('server', 1, 2, 3, 4, 5, 6, family='f_', size=135_000_000, held_out=True, lengths=lengths)}
  text = cards.to_markdown(make_card(policies=policies, dropped={'short': 3, 'same': 9}), {'policies': 'figures/policies.png'})
  head, _, first, second, *_ = cells(section(text, 'Policies'))
  counts = ['as reference', 'samples', 'dropped', 'failed', 'requests', 'tokens']
  assert head == ['policy', 'kind', 'family', 'size', *counts, 'mean length', '']
  assert first == ['a0', 'server', 'f\\_', '135,000,000', '17', '1', '2', '3', '4', '5', '16', 'held out']
  assert second[:4] == ['a1', 'unknown', '-', '-'] and second[-2] == '-'
  assert cells(section(text, 'Triplets'))[2:] == [['train', '42', '`cdcdcdcdcdcdcdcd`'], ['validation', '8', '-']]
  assert cells(section(text, 'Dropped samples'))[2:] == [['same', '9', '75.0%'], ['short', '3', '25.0%']]
  assert cells(section(text, 'Prompts'))[2:] == [['documents.jsonl', 'train', '900'], ['documents.jsonl', 'validation', '50']]
  assert "    python -m x 'a b'" in text and WRITTEN.fingerprint in text and '](figures/policies.png)' in text
  texts = cells(section(text, 'Texts'))
  assert texts[3][:2] == ['reference', '50'] and ['other', '25', '50.0%'] in texts


def labels_of(ax):
  return [tick.get_text() for tick in ax.get_yticklabels()]


def roles(*counts, **more):
  return {'roles': dict(zip(tally.ROLES, counts, strict=True)), **more}


def test_bars_of_policies_hold_one_part_for_each_role():
  counts = {'few': roles(1, 1, 2), 'most$x$': roles(30, 30, 40, held_out=True), 'none': roles(0, 0, 0, quarantined='x', held_out=True)}
  figure = card_plots.policies(counts)
  (ax,) = figure.axes
  assert labels_of(ax) == ['most$x$ (held out)', 'few', 'none (held out, quarantined)']
  assert not any(tick.get_parse_math() for tick in ax.get_yticklabels())
  parts = {bars.get_label(): [(bar.get_x(), bar.get_width()) for bar in bars] for bars in ax.containers}
  assert parts == {'reference': [(0, 30), (0, 1), (0, 0)], 'chosen': [(30, 30), (1, 1), (0, 0)], 'rejected': [(60, 40), (2, 2), (0, 0)]}
  low, high = ax.get_ylim()
  assert low > high  # the first bar is on top
  assert [text.get_text() for text in figure.legends[0].get_texts()] == ['reference', 'chosen', 'rejected']
  with pytest.raises(ValueError, match='no policy'):
    card_plots.policies({})


@pytest.mark.parametrize(('number', 'columns'), [(48, 1), (49, 2), (97, 3), (150, 3)])
def test_many_policies_are_drawn_in_columns_and_all_of_them(number, columns):
  counts = {f'policy-{i:03}': roles(i, i, i) for i in range(number)}
  figure = card_plots.policies(counts)
  assert len(figure.axes) == columns
  assert [label for ax in figure.axes for label in labels_of(ax)] == sorted(counts, reverse=True)
  assert len({ax.get_xlim() for ax in figure.axes}) == len({ax.get_ylim() for ax in figure.axes}) == 1


def test_long_names_keep_both_ends():
  (label,) = labels_of(card_plots.policies({'organization/model\n' + 'x' * 50 + '@step1000': roles(1, 1, 1)}).axes[0])
  assert label.startswith('organization/m') and label.endswith('@step1000') and len(label) == card_plots._LONGEST_NAME


def test_lengths_are_shares_of_their_text():
  found = {name: tally.Lengths() for name in ('prompt', 'reference', 'empty')}
  for length in (0, 3, 3, 100):
    found['prompt'].add(length)
  found['reference'].add(5000)
  first, second = card_plots.lengths({name: lengths.to_json() for name, lengths in found.items()}).axes
  assert (first.get_title(), second.get_title()) == ('prompt (mean 26)', 'reference (mean 5,000)')
  bars = {bar.get_x() + bar.get_width() / 2: bar.get_height() for bar in first.patches}
  assert bars == {0.5: 25.0, 2.5: 50.0, 7.5: 25.0}  # of 0, of 2 and 3, and of 64 to 127
  assert [bar.get_height() for bar in second.patches] == [100.0]
  (mean,) = first.lines
  assert mean.get_xdata()[0] == pytest.approx(1 + np.log2(26.5))
  ticks = dict(zip(first.get_xticks(), [tick.get_text() for tick in first.get_xticklabels()], strict=True))
  assert ticks[0] == '0' and ticks[3] == '4' and ticks[12] == '2k'
  with pytest.raises(ValueError, match='no text'):
    card_plots.lengths({'prompt': tally.Lengths().to_json()})
