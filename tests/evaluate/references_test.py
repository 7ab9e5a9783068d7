"""Variants of references."""

from __future__ import annotations

import json

import numpy as np
import pytest

from polar_jax.evaluate import references, sets
from polar_jax.evaluate.benchmarks import rm_bench
from polar_jax.evaluate.sets import Comparison, EvaluationSet, Item
from polar_jax.types import UserError


def item(i: int, candidates=('a', 'bb'), comparisons=None, **fields) -> Item:
  return Item(str(i), fields.pop('prompt', f'p{i}'), tuple(candidates), comparisons or sets.pair(), **fields)


def refs(items, variant, **given):
  (view,) = references.views(items, variant, **given).values()
  assert view.own == [None] * len(items)
  return view.references


def test_variants_of_references():
  items = [item(i, reference=f'r{i}', category='ab'[i % 2], comparisons=sets.pair(1)) for i in range(8)]
  assert refs(items, 'true') == [f'r{i}' for i in range(8)]
  assert refs(items, 'empty') == refs(items, 'none') == [''] * 8
  assert refs(items, 'twin') == ['bb'] * 8
  shuffled = refs(items, 'shuffled')
  assert all(r != f'r{i}' and int(r[1:]) % 2 == i % 2 for i, r in enumerate(shuffled))
  assert shuffled == refs(items, 'shuffled') != refs(items, 'shuffled', seed=1)
  with pytest.raises(UserError, match=r"'true' needs references.*use none, empty or twin"):
    refs([item(0)], 'true')
  with pytest.raises(UserError, match='all items have the same prompt'):
    refs([item(i, prompt='p', reference='r') for i in range(3)], 'shuffled')


def test_degraded_references_keep_nested_shares_of_the_words():
  words = [f'w{k}' for k in range(40)]
  items = [item(i, reference=' '.join(words)) for i in range(3)]
  found = references.views(items, 'degraded')
  kept = [[r.split() for r in found[f'degraded_{share}'].references] for share in (75, 50, 25)]
  for i in range(3):
    three = [set(of[i]) for of in kept]
    assert [len(s) for s in three] == [30, 20, 10] and three[2] < three[1] < three[0]
    assert all(of[i] == sorted(of[i], key=words.index) for of in kept)  # in their order
  assert kept[0][0] != kept[0][1]
  assert references.views(items, 'degraded') == found != references.views(items, 'degraded', seed=1)


def test_right_and_wrong_answers_are_taken_out_of_the_candidates():
  flags = (True, False, True, False, True)
  full = item(0, 'abcde', sets.all_pairs(flags), correct=flags, answers=('1', None, '1', '2', '1'), reference='g')
  few = item(1, 'abc', sets.all_pairs((True, False, False)), correct=(True, False, False))
  found = references.hold_out(EvaluationSet('s', [full, few], skipped=(('x', 'y'),)))
  assert found.skipped == (('x', 'y'), ('1', 'has fewer than two right answers, so that none can be a reference'))
  (one,) = found.items
  held = one.facts[references.REFERENCES]
  left = [c for c in 'abcde' if c not in held.values()]
  assert held['right'] in 'ace' and held['wrong'] in 'bd' and list(one.candidates) == left
  assert one.correct == tuple(c in 'ace' for c in left) and one.answers == tuple({'b': None, 'd': '2'}.get(c, '1') for c in left)
  assert {(left[c.better[0]], left[c.worse[0]]) for c in one.comparisons} == {
    (a, b) for a in left for b in left if a in 'ace' and b in 'bd'
  }
  assert refs([one], 'right') == [held['right']] and refs([one], 'wrong') == [held['wrong']]
  chosen = {
    references.hold_out(EvaluationSet('s', [full] * 9), seed).items[k].facts[references.REFERENCES]['right']
    for seed in (0, 1)
    for k in range(9)
  }
  assert chosen == set('ace')
  for pairs in (EvaluationSet('s', [item(0)]), EvaluationSet('s', [full, item(0)])):  # not all of them say which answers are right
    assert references.hold_out(pairs) is pairs
  with pytest.raises(UserError, match='s: no item has two right and two wrong answers'):
    references.hold_out(EvaluationSet('s', [few]))
  with pytest.raises(UserError, match="'right' needs rows with several right and several wrong answers"):
    references.views([full], 'right')


def test_style_references_leave_out_their_own_answer():
  facts = {references.STYLES: rm_bench.STYLES}
  grid = tuple(Comparison((i,), (3 + j,)) for i in range(3) for j in range(3))
  items = [item(n, [f'{kind}{s}{n}' for kind in 'rw' for s in range(3)], grid, facts=facts) for n in range(4)]
  found = references.views(items, 'style')
  assert list(found) == ['style_concise', 'style_detailed', 'style_markdown']
  rng = np.random.default_rng(0)
  rewards = {style: [rng.normal(size=6) for _ in items] for style in rm_bench.STYLES}
  result = rm_bench.style_references(items, rewards)
  moved = []
  for k, style in enumerate(rm_bench.STYLES):
    view = found[f'style_{style}']
    assert view.references == [f'r{k}{n}' for n in range(4)]
    compared = references.without_own(items, view)
    assert all(len(i.comparisons) == 6 and all(c.better != (k,) for c in i.comparisons) for i in compared)
    for i in range(3):
      expected = [100 * np.mean([r[i] > r[3 + j] for r in rewards[style]]) for j in range(3)]
      assert result['matrix'][k][i] == ([None] * 3 if i == k else pytest.approx(expected))
  for i in range(3):
    a, b = (k for k in range(3) if k != i)
    moved += [abs(x - y) for x, y in zip(result['matrix'][a][i], result['matrix'][b][i], strict=True)]
  assert result['movement'] == pytest.approx(np.mean(moved)) and result['movement'] > 0
  with pytest.raises(UserError, match="'style' needs answers in several styles"):
    references.views([item(0)], 'style')


def test_references_of_a_file(tmp_path):
  sets_ = [EvaluationSet('s', [item(3), item(5)])]
  file = tmp_path / 'r.jsonl'
  file.write_text(
    '{"id": 3, "reference": "x"}\n{"id": "5", "reference": [{"role": "assistant", "content": "y"}]}\n{"id": 9, "reference": ""}'
  )
  given = references.read_file(file, sets_)
  assert refs(sets_[0].items, 'file', given=given) == ['x', [{'role': 'assistant', 'content': 'y'}]]
  with pytest.raises(UserError, match=r"'file' has no reference for 1 of 3 items, the first of them '4'"):
    references.views([item(3), item(4), item(5)], 'file', given)
  mixed = EvaluationSet('s', [item(3), item(4)], skipped=(('x', 'y'),))
  kept = references.having(mixed, given)
  assert [i.id for i in kept.items] == ['3'] and kept.skipped == (('x', 'y'), ('4', 'has no reference in evaluate.reference_file'))
  assert references.having(EvaluationSet('s', [item(4)]), given).items[0].id == '4'
  for rows, message in (
    ([{'id': 3}], "row 1: field 'reference' is missing"),
    ([{'id': None, 'reference': 'x'}], 'row 1: id must be a string or an integer'),
    ([{'id': 3, 'reference': 'x'}, {'id': '3', 'reference': 'y'}], "row 2: the id '3' occurs twice"),
    ([{'id': 8, 'reference': 'x'}], 'none of its 1 ids is of an item of s'),
  ):
    file.write_text('\n'.join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=message):
      references.read_file(file, sets_)


def test_messages_are_the_same_prompt_whatever_the_order_of_their_keys():
  prompts = [[{'role': 'user', 'content': 'p'}], [{'content': 'p', 'role': 'user'}]]
  with pytest.raises(UserError, match='all items have the same prompt'):
    refs([item(i, prompt=prompt, reference='r') for i, prompt in enumerate(prompts)], 'shuffled')


def test_all_items_must_have_what_a_variant_needs():
  held, styled = {references.REFERENCES: {'right': 'a', 'wrong': 'b'}}, {references.STYLES: ('x',)}
  for variant, facts in (('right', held), ('wrong', held), ('style', styled)):
    assert references.lacking([item(0, facts=facts)] * 2, variant) is None
    assert references.lacking([item(0, facts=facts), item(1)], variant).startswith('needs ')


def test_an_item_alone_in_its_category_gets_the_reference_of_another_one():
  items = [item(i, reference=f'r{i}', category='ab'[i == 2]) for i in range(3)]
  assert refs(items, 'shuffled')[2] in ('r0', 'r1') and refs(items, 'shuffled')[:2] == ['r1', 'r0']


@pytest.mark.parametrize(('kept', 'count'), [(75, 150), (50, 100), (25, 50)])
def test_shares_are_of_a_hundred_percent(kept, count):
  assert len(references._degraded('w ' * 200, kept, (0, 0)).split()) == count
