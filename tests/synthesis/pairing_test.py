"""Triplets of one prompt: which can be drawn, against a list of all; how they are drawn, by counting."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import math
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polar_jax.data import records
from polar_jax.synthesis import pairing
from polar_jax.synthesis.pairing import Candidate, PairingRules, PolicyFacts
from polar_jax.synthesis.samples import PoolPrompt
from polar_jax.types import Triplet

MAKE = {name: PolicyFacts(1.0) for name in 'abcdef'}


def prompt(split='train', kind='prefix', name='p0'):
  return PoolPrompt(name, 'Once upon', kind, 'file', 0, split)


def samples(policies='abcdef', count=2):
  return [Candidate(policy, i, f'{policy}{i}') for policy in policies for i in range(count)]


class Drawn(NamedTuple):
  triplets: dict[str, list[Triplet]]
  counts: dict[str, int]


def draw(pairer, asked, candidates):
  """Return what is drawn, as a reader gets it. The bytes that are stored are those of the general encoding."""
  made, triplets = pairer.pair(asked, candidates), {}
  for split, triples in made.triples.items():
    triplets[split] = []
    for fields in pairer.fields(asked, triples):
      *texts, metadata = (part.decode() for part in fields[0])
      triplets[split].append(Triplet(*texts, json.loads(metadata)))
      assert records.fields_of(triplets[split][-1]) == fields
  return Drawn(triplets, made.counts)


def pair(asked, candidates, facts, rules):
  return draw(pairing.Pairer(facts, rules), asked, candidates)


def key(triplet):
  m = triplet.metadata
  return m['reference_policy'], m['reference_sample'], m['chosen_sample'], m['rejected_policy'], m['rejected_sample']


def all_triples(candidates, facts, held_out):
  """Return all (reference, chosen, rejected) that may be drawn of policies that are (not) held out, as texts."""
  usable = [c for c in candidates if c.text.strip() and facts[c.policy].held_out == held_out]
  return {
    (a.text, b.text, c.text)
    for a, b, c in itertools.product(usable, repeat=3)
    if a.policy == b.policy != c.policy and a.sample != b.sample and len({a.text, b.text, c.text}) == 3
  }


@st.composite
def pools(draw):
  facts = {
    name: PolicyFacts(
      draw(st.sampled_from([0.1, 1.0, 30.0])),
      draw(st.sampled_from(['', 'x', 'y'])),
      draw(st.sampled_from([None, 1e9, 7e9])),
      draw(st.sampled_from([None, '2024', '2024-05', '2025-01-31'])),
      draw(st.booleans()),
      tuple(draw(st.lists(st.sampled_from('abcdz'), max_size=2))),
    )
    for name in 'abcde'
  }
  texts = st.sampled_from(['', ' \n', 'u', 'v', 'w', 'x', 'y', 'z', 'yes', 'no'])
  candidates = [Candidate(name, i, draw(texts)) for name in 'abcde' for i in draw(st.sets(st.integers(0, 9), max_size=3))]
  rules = PairingRules(draw(st.sampled_from([1, 2, 5, 1000])), draw(st.sampled_from([0.0, 0.5, 1.0])), draw(st.integers(0, 3)))
  return facts, candidates, rules, draw(st.sampled_from(pairing.PROMPT_SPLITS)), draw(st.randoms())


@settings(deadline=None, max_examples=80)
@given(pools())
def test_against_a_list_of_all_triples(pool):
  facts, candidates, rules, split, random = pool
  asked = prompt(split)
  result = pair(asked, candidates, facts, rules)
  shuffled = list(candidates)
  random.shuffle(shuffled)
  assert pair(asked, shuffled, dict(reversed(facts.items())), rules) == result

  splits = {split: False} | ({'unseen_policies': True} if split == 'unseen_prompts' else {})
  texts = {(c.policy, c.sample): c.text for c in candidates}
  assert set(result.triplets) <= set(splits)
  for name, held_out in splits.items():
    drawn, possible = result.triplets.get(name, []), all_triples(candidates, facts, held_out)
    found = {(t.reference, t.chosen, t.rejected) for t in drawn}
    assert len(found) == len(drawn) == min(len(possible), rules.pairs_per_prompt) and found <= possible
    for t in drawn:
      m = t.metadata
      assert m['reference_policy'] == m['chosen_policy'] != m['rejected_policy'] and m['reference_sample'] != m['chosen_sample']
      assert [texts[m[f'{role}_policy'], m[f'{role}_sample']] for role in ('reference', 'chosen', 'rejected')] == [
        t.reference,
        t.chosen,
        t.rejected,
      ]
      assert {facts[m[f'{role}_policy']].held_out for role in ('reference', 'rejected')} == {held_out}
      assert t.category == (facts[m['reference_policy']].family or m['reference_policy']) and m['prompt_id'] == asked.id

  usable = [[c for c in candidates if c.text.strip() and facts[c.policy].held_out == held_out] for held_out in splits.values()]
  assert result.counts == {
    'candidates': len(candidates),
    'empty': sum(not c.text.strip() for c in candidates),
    'held_out': 0 if len(splits) == 2 else sum(bool(c.text.strip()) and facts[c.policy].held_out for c in candidates),
    'equal': sum(a.text == b.text for part in usable for a, b in itertools.combinations(part, 2)),
    'too_few': sum(
      name not in result.triplets and (not held_out or sum(f.held_out for f in facts.values()) > 1) for name, held_out in splits.items()
    ),
  }


def test_a_triplet_has_all_fields():
  facts = {'a': PolicyFacts(1.0, 'llama', near_to=('b',)), 'b': PolicyFacts(1.0)}
  candidates = [Candidate('a', 3, 'one'), Candidate('a', 5, 'two'), Candidate('b', 0, 'three')]
  both = [pair(prompt(kind=kind), candidates, facts, PairingRules(9)).triplets for kind in ('prefix', 'instruction')]
  expected = Triplet('Once upon', 'one', 'two', 'three', 'pretrain', 'llama')
  (found,) = (t for t in both[0]['train'] if t.reference == 'one')
  assert dataclasses.replace(found, metadata={}) == expected
  assert found.metadata == {
    'reference_policy': 'a',
    'chosen_policy': 'a',
    'rejected_policy': 'b',
    'prompt_id': 'p0',
    'reference_sample': 3,
    'chosen_sample': 5,
    'rejected_sample': 0,
    'difficulty': 'near_to',
  }
  assert len(both[0]['train']) == 2 and {t.wrapper for t in both[1]['train']} == {'sft'}


def test_names_are_stored_as_json_and_families_as_text():
  name, family = 'a "quoted" \\ é 🦜', 'Ünï "x"'
  facts = {name: PolicyFacts(1.0, family), 'b': PolicyFacts(1.0)}
  candidates = [Candidate(name, 0, 'één\n'), Candidate(name, 1, '二'), Candidate('b', 0, '\x00"')]
  (found, _) = pair(prompt(name='id "1" é'), candidates, facts, PairingRules(9)).triplets['train']
  assert found.metadata['reference_policy'] == name and found.category == family and found.metadata['prompt_id'] == 'id "1" é'
  with pytest.raises(ValueError, match='policy a: its family is not valid Unicode'):
    pairing.Pairer({'a': PolicyFacts(1.0, 'x\ud800')}, PairingRules(1))


def test_draws_depend_on_seed_and_prompt_alone():
  rules = PairingRules(4, 0.5, 1)
  pairer = pairing.Pairer(MAKE, rules)
  draws = [[key(t) for t in draw(pairer, prompt(name=f'p{i}'), samples()).triplets['train']] for i in range(20)]
  again = [[key(t) for t in pair(prompt(name=f'p{i}'), samples(), MAKE, rules).triplets['train']] for i in reversed(range(20))]
  assert again[::-1] == draws and len(set(map(tuple, draws))) == 20
  assert [key(t) for t in pair(prompt(), samples(), MAKE, PairingRules(4, 0.5, 2)).triplets['train']] != draws[0]
  # Fixed, so that the same data can be made again.
  assert draws[0] == [('e', 1, 0, 'b', 0), ('d', 1, 0, 'b', 0), ('f', 1, 0, 'a', 1), ('b', 1, 0, 'a', 0)]


@pytest.mark.parametrize('near_share', [0.0, 1.0])
def test_pairs_are_spread_over_policies(near_share):
  facts = {name: PolicyFacts(100.0 if name == 'a' else 1.0) for name in 'abcdef'}
  for wanted in range(1, 31):
    drawn = pair(prompt(), samples(), facts, PairingRules(wanted, near_share)).triplets['train']
    made = collections.Counter(t.metadata['reference_policy'] for t in drawn)
    assert sum(made.values()) == wanted and max(made.values()) - min(made[name] for name in facts) <= 1
    assert all(key(a)[0] != key(b)[0] for a, b in itertools.combinations(drawn[:6], 2))
  # A policy with one sample is only ever rejected; the others go on when one has given all that it can.
  few = [*samples('ab', 3), Candidate('c', 0, 'c0')]
  drawn = pair(prompt(), few, facts, PairingRules(1000, near_share)).triplets['train']
  assert collections.Counter(key(t)[0] for t in drawn) == {'a': 6 * 4, 'b': 6 * 4}


def test_policies_are_drawn_by_weight():
  facts = {name: PolicyFacts(weight) for name, weight in zip('abcd', (1.0, 2.0, 3.0, 6.0), strict=True)}
  pairer = pairing.Pairer(facts, PairingRules(1))
  drawn = [draw(pairer, prompt(name=str(i)), samples('abcd')).triplets['train'][0] for i in range(4000)]
  made, lost = (collections.Counter(t.metadata[f'{role}_policy'] for t in drawn) for role in ('chosen', 'rejected'))
  for name, fact in facts.items():
    share = fact.weight / 12
    rejected = share * sum(f.weight / 12 / (1 - f.weight / 12) for other, f in facts.items() if other != name)
    deviation = 4 * math.sqrt(0.25 / 4000)
    assert abs(made[name] / 4000 - share) < deviation and abs(lost[name] / 4000 - rejected) < deviation * 1.2
  numbers = collections.Counter((key(t)[1], key(t)[2], key(t)[4]) for t in drawn)
  assert len(numbers) == 4 and min(numbers.values()) > 850


def rejected_of(policy, facts, near_share, policies, prompts=700):
  """Return how often each policy is rejected in the first triplet of `policy`."""
  pairer = pairing.Pairer(facts, PairingRules(len(policies), near_share))
  found = collections.Counter()
  for i in range(prompts):
    triplets = draw(pairer, prompt(name=str(i)), samples(policies)).triplets['train']
    found.update(t.metadata['rejected_policy'] for t in triplets if t.metadata['reference_policy'] == policy)
  return {name: count / prompts for name, count in found.items()}


def test_near_policies_are_preferred():
  facts = {
    'a': PolicyFacts(1.0, 'x', 8e9, '2024-06', near_to=('b',)),
    'b': PolicyFacts(1.0, 'y'),
    'c': PolicyFacts(1.0, 'y', near_to=('a', 'unknown')),
    'd': PolicyFacts(1.0, 'x', 16e9),
    'e': PolicyFacts(1.0, 'x', 1e9, '2024-06'),  # the date of a, but 8 / 1 is a larger ratio than 16 / 8
    'f': PolicyFacts(1.0, 'x'),
    'g': PolicyFacts(1.0, '', 8e9, '2023-01'),
    'h': PolicyFacts(1.0, 'z', 8e9, '2024-09-30'),
    'i': PolicyFacts(9.0, 'z', 8e9),
  }
  near = lambda policies: rejected_of('a', facts, 1.0, policies)
  roughly = lambda **shares: pytest.approx(shares, abs=0.08)
  assert near('abcdefghi') == roughly(b=0.5, c=0.5)  # in either direction
  assert near('adefghi') == roughly(d=0.5, e=0.25, f=0.25)  # nearest in size, those of unknown size last
  assert near('aghi') == roughly(h=0.5, g=0.25, i=0.25)  # nearest in date
  assert near('ai') == {'i': 1.0}
  difficulties = {name: pairing.Pairer(facts, PairingRules(1)).difficulty('a', name) for name in 'bcdefghi'}
  assert difficulties == {**dict.fromkeys('bc', 'near_to'), **dict.fromkeys('def', 'family'), **dict.fromkeys('ghi', 'other')}
  assert pairing.Pairer(facts, PairingRules(1)).difficulty('b', 'a') == 'near_to'
  assert pairing.Pairer(MAKE, PairingRules(1)).difficulty('b', 'a') == 'other'  # without a family
  # Half of the pairs are drawn by weight: i has 9 of the 16 parts that a leaves.
  shares = rejected_of('a', facts, 0.5, 'abcdefghi')
  assert shares['i'] == pytest.approx(0.5 * 9 / 16, abs=0.07) and shares['b'] == pytest.approx(0.25 + 0.5 / 16, abs=0.07)


def test_held_out_policies_meet_each_other_on_unseen_prompts_only():
  facts = {name: PolicyFacts(1.0, held_out=name in 'ef') for name in 'abcdef'}
  rules = PairingRules(1000, 0.5)
  for split in ('train', 'validation'):
    result = pair(prompt(split), samples(), facts, rules)
    assert set(result.triplets) == {split} and result.counts['held_out'] == 4 and result.counts['too_few'] == 0
    assert {key(t)[i] for t in result.triplets[split] for i in (0, 3)} == set('abcd')
  triplets = pair(prompt('unseen_prompts'), samples(), facts, rules).triplets
  assert {name: {key(t)[i] for t in part for i in (0, 3)} for name, part in triplets.items()} == {
    'unseen_prompts': set('abcd'),
    'unseen_policies': set('ef'),
  }
  assert pair(prompt('unseen_prompts'), samples('ae'), facts, rules).counts['too_few'] == 2
  only_one = {name: PolicyFacts(1.0, held_out=name == 'f') for name in 'abcdef'}
  assert pair(prompt('unseen_prompts'), samples(), only_one, rules).counts['too_few'] == 0


def test_what_cannot_be_used_is_refused():
  with pytest.raises(ValueError, match='two samples 1 of policy a'):
    pair(prompt(), [*samples(), Candidate('a', 1, 'other')], MAKE, PairingRules(1))
  with pytest.raises(ValueError, match='no facts of policy z'):
    pair(prompt(), samples('az'), MAKE, PairingRules(1))
  for bad in (prompt('unseen_policies'), prompt(kind='chat')):
    with pytest.raises(ValueError, match='unknown kind or split'):
      pair(bad, samples(), MAKE, PairingRules(1))
  for weight in (0.0, -1.0, math.nan, math.inf):
    with pytest.raises(ValueError, match='policy a: its weight must be positive'):
      pairing.Pairer({'a': PolicyFacts(weight)}, PairingRules(1))
  for date in ('', 'May 2024', '2024-13', '2024-05-01T00:00'):
    with pytest.raises(ValueError, match='policy a: its date must be'):
      pairing.Pairer({'a': PolicyFacts(1.0, date=date)}, PairingRules(1))
  for bad in ((0, 0.0), (1, 1.1), (1, -0.1)):
    with pytest.raises(ValueError, match='must be positive'):
      PairingRules(*bad)


def test_several_rejected_samples_make_a_ranked_list_of_as_many_policies():
  facts = MAKE | {'e': PolicyFacts(1.0, held_out=True)}
  pairer = pairing.Pairer(facts, PairingRules(4, seed=1, negatives=3))
  asked = prompt()
  triples = pairer.pair(asked, samples()).triples['train']
  assert len(triples) == 4
  for (reference, chosen, *rejected), fields in zip(triples, pairer.fields(asked, triples), strict=True):
    others = [sample.policy for sample in rejected]
    assert len(others) == len(set(others)) == 3 and not {reference.policy, 'e'} & set(others)
    texts, metadata = [part.decode() for part in fields[0][:-1]], json.loads(fields[0][-1])
    assert texts == [asked.text, reference.text, chosen.text, rejected[-1].text, 'pretrain', reference.policy]
    assert metadata['ranked_list'] == {'others': [sample.text for sample in rejected[:-1]], 'ranks': [0, 1, 1, 1]}
    assert metadata['rejected_policies'] == others and records.candidates_of(fields) == 4


def test_the_first_rejected_sample_does_not_depend_on_how_many_there_are():
  one, several = (pairing.Pairer(MAKE, PairingRules(1, seed=5, negatives=n)) for n in (1, 4))
  for i in range(20):
    asked = prompt(name=f'p{i}')
    (alone,), (first,) = (pairer.pair(asked, samples()).triples['train'] for pairer in (one, several))
    assert alone == first[:3] and len(first) == 6


def test_there_are_fewer_rejected_samples_where_there_are_not_as_many_policies_or_texts():
  pairer = pairing.Pairer(MAKE, PairingRules(2, seed=0, negatives=9))
  assert {len(triple) for triple in pairer.pair(prompt(), samples('abc')).triples['train']} == {4}
  twins = [*samples('ab'), Candidate('c', 0, 'b0'), Candidate('c', 1, 'b0')]
  texts = [[sample.text for sample in triple[1:]] for triple in pairer.pair(prompt(), twins).triples['train']]
  assert all(len(set(row)) == len(row) for row in texts)


@pytest.mark.parametrize('split', ['validation', 'unseen_prompts'])
def test_splits_for_evaluation_have_triplets_whatever_the_number_of_rejected_samples(split):
  pairer = pairing.Pairer(MAKE, PairingRules(4, seed=1, negatives=3))
  assert {len(triple) for triple in pairer.pair(prompt(split), samples()).triples[split]} == {3}
