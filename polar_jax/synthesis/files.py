"""Data of real language models in files: triplets and preferences for training, and held-out rows, split by prompt and by policy.

A row of a file is one of

  triplet      prompt, policy_a, a1, a2, policy_b, b1: two runs of one policy and one of another; optional: grade, neg, category
  answer       prompt, policy, response; optional: correct (true or false)
  preference   prompt, reference, chosen, rejected; optional: category

Triplets for training are drawn anew from all answers to a prompt, not taken from the rows: a policy of which there is only one run is
always the rejected one there, so that a model could learn whom to reject without reading the reference. Rows whose prompt is held out are
for evaluation as they are. A prompt has one split in all files: its text decides, not its id.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import itertools
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from polar_jax.config import SynthesizeConfig
from polar_jax.data import readers
from polar_jax.evaluate import own_files
from polar_jax.evaluate.words import words_of
from polar_jax.synthesis import pairing
from polar_jax.synthesis import prompts as prompts_lib
from polar_jax.synthesis.plan import UNSEEN
from polar_jax.synthesis.samples import INSTRUCTION, PoolPrompt
from polar_jax.types import Triplet, UserError

TRIPLET, ANSWER, PREFERENCE = 'triplet', 'answer', 'preference'
_FIELDS = {
  TRIPLET: ('prompt', 'policy_a', 'a1', 'a2', 'policy_b', 'b1'),
  ANSWER: ('prompt', 'policy', 'response'),
  PREFERENCE: ('prompt', 'reference', 'chosen', 'rejected'),
}
_NAMES = ('policy_a', 'policy_b', 'policy')
_RANKED = ('reference', 'chosen', 'rejected')
_RANKED_POLICIES = ('chosen_policy', 'rejected_policy')  # of preferences, where their policies are known
_Drawn = TypeVar('_Drawn')


class Row(NamedTuple):
  """A row of a file, with its texts checked."""

  of: str  # the set: its file's name
  number: int
  prompt: str
  values: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Files:
  """All rows of the given files, by what they are.

  Attributes:
    triplets, answers, preferences: rows in the order of their files.
  """

  triplets: Sequence[Row]
  answers: Sequence[Row]
  preferences: Sequence[Row]

  def all(self) -> Iterator[Row]:
    """Yield every row."""
    yield from itertools.chain(self.triplets, self.answers, self.preferences)


def read(files: Sequence[pathlib.Path]) -> Files:
  """Read files of any of the three forms.

  Raises:
    UserError: a file cannot be read, or a row cannot be used.
  """
  rows: dict[str, list[Row]] = {TRIPLET: [], ANSWER: [], PREFERENCE: []}
  for path, name in zip(files, own_files.set_names(files), strict=True):
    for number, raw in readers.reader_of(path)(path):
      values = prompts_lib.parse_row(path, number, raw)
      kind = next((kind for kind, fields in _FIELDS.items() if all(field in values for field in fields)), None)
      if kind is None:
        known = '; nor '.join(f'{name} ({", ".join(fields)})' for name, fields in _FIELDS.items())
        raise UserError(f'{path}, row {number}: is neither {known}; found: {", ".join(map(str, values))[:120]}')
      rows[kind].append(Row(name, number, *_checked(path, number, values, _FIELDS[kind])))
  return Files(rows[TRIPLET], rows[ANSWER], rows[PREFERENCE])


def _checked(path: pathlib.Path, number: int, values: dict[str, Any], fields: Sequence[str]) -> tuple[str, dict[str, Any]]:
  for field in fields:
    if field in _NAMES:
      if not isinstance(values[field], str) or not values[field] or not values[field].isprintable():
        raise UserError(f'{path}, row {number}: {field} is {values[field]!r:.60}; it must be a name of printable characters')
    else:
      values[field] = prompts_lib.text_of(path, number, values, field)
  if not isinstance(values.get('correct', False), bool):
    raise UserError(f'{path}, row {number}: correct is {values["correct"]!r:.60}; it must be true or false')
  if not isinstance(values.get('category') or '', str):
    raise UserError(f'{path}, row {number}: category is {values["category"]!r:.60}; it must be a string')
  if not values['prompt'].strip():
    raise UserError(f'{path}, row {number}: field prompt is empty; remove the row')
  return values['prompt'], values


class Splits:
  """The split of every prompt, the policies that are held out, and counts of what is left out.

  Args:
    config: shares of the splits.
    seed: of the choice of policies.
    files: all rows.
  """

  def __init__(self, config: SynthesizeConfig, seed: int, files: Files):
    self._split_of = prompts_lib.split_of(config.validation_share, config.unseen_share)
    self.held_out = _held_out(files, config.held_out_policies, seed)
    self.dropped: set[str] = set()  # keys of training prompts that occur in held-out data
    self.left_out: collections.Counter[str] = collections.Counter()  # rows that no split has, by reason

  def of(self, prompt: str) -> str | None:
    """Return 'train', 'validation' or 'unseen_prompts', which is that of every file; None for a prompt that was dropped."""
    name = key(prompt)
    return None if name in self.dropped else self._split_of(name)


def key(prompt: str) -> str:
  """Return what prompts that differ in case, punctuation and white space alone have in common."""
  return hashlib.sha256((' '.join(words_of(prompt)) or prompt).encode('utf-8', 'surrogatepass')).hexdigest()[:16]


def _held_out(files: Files, share: float, seed: int) -> set[str]:
  """Return the policies that no training row may have: of each set, a share of those with several runs, and of the others."""
  several, others = _policies_by_set(files)
  known = set().union(*several.values()) if several else set()
  place = functools.partial(_place, seed, 'held out')
  out: set[str] = set()
  for groups in (several.values(), [names - known for names in others.values()]):
    for names in groups:
      out.update(sorted(names, key=place)[: int(share * len(names))])
  return out


def _policies_by_set(files: Files) -> tuple[dict[str, set[str]], dict[str, set[str]]]:
  """Return, by set, the policies with several runs for a prompt, and those of the other answers, who may be the same."""
  several: dict[str, set[str]] = {}
  others: dict[str, set[str]] = {}
  for row in files.triplets:
    several.setdefault(row.of, set()).add(row.values['policy_a'])
    others.setdefault(row.of, set()).add(row.values['policy_b'])
  for row in files.answers:
    others.setdefault(row.of, set()).add(row.values['policy'])
  return several, others


def _place(seed: int, purpose: str, name: str) -> bytes:
  """Return what puts policies in an order that depends on nothing but the seed, the purpose and their names."""
  return hashlib.sha256(f'{seed}\0{purpose}\0{name}'.encode('utf-8', 'surrogatepass')).digest()


def _training_policies(files: Files, splits: Splits, most: int | None, seed: int) -> dict[str, set[str]]:
  """Return, by set, the policies whose answers training triplets have: at most so many, those with several runs first.

  The policies of a smaller number are among those of a larger one.
  """
  several, others = _policies_by_set(files)
  out = {}
  for of, names in others.items():  # a set of triplets has both
    first = several.get(of, set())
    order = sorted((name not in first, _place(seed, 'training', name), name) for name in (names | first) - splits.held_out)
    out[of] = {name for *_, name in order[:most]}
  return out


def held_out_rows(files: Files, splits: Splits, limit: int, best_of: int, seed: int) -> dict[str, list[dict[str, Any]]]:
  """Return the rows for evaluation by set, as stage evaluate reads them: those whose prompt is held out, at most `limit` of a set.

  The category of a triplet is its grade and kind of negative. Triplets with a policy that is held out are a set of their own, whose
  categories say which. Answers that are marked right or wrong become rows of best-of-n, at most `best_of` for a prompt: their reference is
  that of a preference with the same prompt, and prompts without one are left out. So are rows of which two texts are equal: a reference
  that is also a candidate gives the answer away.
  """
  out: dict[str, list[dict[str, Any]]] = {}
  for row in files.triplets:
    if splits.of(row.prompt) == UNSEEN:
      if _has_equal(row, ('a1', 'a2', 'b1')):
        splits.left_out['held-out triplets with equal texts'] += 1
      else:
        _add_triplet(out, row, splits.held_out)
  for row in files.preferences:
    if splits.of(row.prompt) == UNSEEN and not _has_equal(row, _RANKED):
      kept = {name: value for name, value in row.values.items() if name not in ('id', 'wrapper')}
      out.setdefault(row.of, []).append(kept | {'id': str(row.number)})
  out = {name: _draw(rows, limit, name, seed) for name, rows in out.items()}
  references = {key(row.prompt): row.values['reference'] for row in files.preferences}
  marked: dict[tuple[str, str], list[Row]] = {}
  for row in files.answers:
    reference = references.get(key(row.prompt))
    if splits.of(row.prompt) == UNSEEN and 'correct' in row.values and reference is not None:
      marked.setdefault((row.of, key(row.prompt)), []).append(row)
    elif splits.of(row.prompt) == UNSEEN and 'correct' in row.values:
      splits.left_out['held-out answers without a reference'] += 1
  for (of, name), rows in sorted(_draw(list(marked.items()), limit, 'answers', seed)):
    shared = {'prompt_id': name, 'prompt': rows[0].prompt, 'reference': references[name]}
    for row in _draw(rows, best_of, name, seed):
      out.setdefault(of, []).append(shared | {field: row.values[field] for field in ('policy', 'response', 'correct')})
  return out


def _has_equal(row: Row, fields: Sequence[str]) -> bool:
  return len({row.values[field] for field in fields}) < len(fields)


def _add_triplet(out: dict[str, list[dict[str, Any]]], row: Row, held_out: set[str]) -> None:
  values = row.values
  new = [name for name in ('policy_a', 'policy_b') if values[name] in held_out]
  parts = [f'grade {values["grade"]}'] if values.get('grade') else []
  category = ', '.join([*parts, str(values['neg'])] if values.get('neg') else parts) or str(values.get('category') or '')
  if new:
    category = {'policy_a': 'reference', 'policy_b': 'rejected'}[new[0]] if len(new) == 1 else 'both'
  texts = {'prompt': row.prompt, 'reference': values['a1'], 'chosen': values['a2'], 'rejected': values['b1']}
  policies = {'policy_a': values['policy_a'], 'policy_b': values['policy_b']}
  out.setdefault(row.of + (own_files.UNSEEN_POLICIES if new else ''), []).append(
    {'id': str(row.number), **texts, 'category': category, **policies}
  )


def _draw(rows: list[_Drawn], limit: int, name: str, seed: int) -> list[_Drawn]:
  """Return at most `limit` rows, in their order."""
  if len(rows) <= limit:
    return rows
  rng = np.random.default_rng([seed, *name.encode()])
  return [rows[i] for i in sorted(rng.choice(len(rows), limit, replace=False).tolist())]


def triplets(files: Files, splits: Splits, config: SynthesizeConfig, seed: int) -> dict[str, list[Triplet]]:
  """Return the triplets that are drawn from all different answers to a prompt in one set, by split.

  The splits are those of a pool: train, validation, unseen_prompts and unseen_policies. Their category is the set.
  """
  facts = {name: pairing.PolicyFacts(1.0, held_out=name in splits.held_out) for name in policies(files)}
  pairer = pairing.Pairer(facts, pairing.PairingRules(config.pairs_per_prompt, 0.0, seed, config.negatives))
  read = _training_policies(files, splits, config.train_policies, seed)
  out: dict[str, list[Triplet]] = {}
  for (of, name), (prompt, samples) in _answers(files).items():
    split = splits.of(prompt)
    if split is None:
      continue
    if split == 'train':
      samples = {policy: texts for policy, texts in samples.items() if policy in read[of]}
      if config.triplet_words is not None:
        samples = {policy: _beginnings(texts, config.triplet_words) for policy, texts in samples.items()}
    candidates = [pairing.Candidate(policy, i, text) for policy, texts in samples.items() for i, text in enumerate(texts)]
    made = pairer.pair(PoolPrompt(f'{of}/{name}', prompt, INSTRUCTION, of, 0, split), candidates)
    for of_split, triples in made.triples.items():
      out.setdefault(of_split, []).extend(pairing.example(prompt, triple, 'sft', of) for triple in triples)
  return {split: _shuffled(rows, split, seed)[: _limit(config, split)] for split, rows in out.items()}


def _beginnings(texts: Sequence[str], words: int) -> list[str]:
  """Return the different beginnings of texts, of so many words at most."""
  pattern = re.compile(rf'\s*(?:\S+\s+){{0,{words - 1}}}\S+')
  return list(dict.fromkeys(found[0] for text in texts if (found := pattern.match(text))))


def _limit(config: SynthesizeConfig, split: str) -> int:
  return config.train_examples if split == 'train' else config.evaluation_examples


def policies(files: Files) -> list[str]:
  """Return the names of all policies."""
  names = [row.values['policy'] for row in files.answers]
  return sorted({*names, *(row.values[field] for row in files.triplets for field in ('policy_a', 'policy_b'))})


def _answers(files: Files) -> dict[tuple[str, str], tuple[str, dict[str, list[str]]]]:
  """Return the different answers by (set, key of the prompt): the prompt, and answers by policy."""
  out: dict[tuple[str, str], tuple[str, dict[str, list[str]]]] = {}
  for row in itertools.chain(files.triplets, files.answers):
    _, samples = out.setdefault((row.of, key(row.prompt)), (row.prompt, {}))
    values = row.values
    if 'a1' in values:
      found = [(values['policy_a'], values['a1']), (values['policy_a'], values['a2']), (values['policy_b'], values['b1'])]
    else:
      found = [(values['policy'], values['response'])]
    for policy, text in found:
      if text.strip() and text not in (texts := samples.setdefault(policy, [])):
        texts.append(text)
  return out


def preferences(files: Files, splits: Splits, config: SynthesizeConfig, seed: int) -> dict[str, list[Triplet]]:
  """Return the ranked examples by split: train, validation and test.

  They are the rows of preferences, and of each prompt with answers that are marked and a reference in these rows up to `correctness_pairs`
  pairs of a right answer and a wrong one. The category is the set, and that of the row. Outside of `test`, no answer is by a policy that is
  held out, as far as rows name policies.
  """
  out: dict[str, list[Triplet]] = {}
  for of, prompt, texts, category in itertools.chain(_ranked_rows(files, splits), _marked(files, splits, config.correctness_pairs, seed)):
    name = 'test' if splits.of(prompt) == UNSEEN else str(splits.of(prompt))
    out.setdefault(name, []).append(Triplet(prompt, *texts, 'sft', '/'.join([of, category] if category else [of])))
  limits = {'train': config.preference_examples}
  return {
    split: _shuffled(rows, split, seed)[: limits.get(split, config.preference_evaluation_examples)] for split, rows in sorted(out.items())
  }


def _ranked_rows(files: Files, splits: Splits) -> Iterator[tuple[str, str, tuple[str, str, str], str]]:
  for row in files.preferences:
    values, split = row.values, splits.of(row.prompt)
    if _has_equal(row, _RANKED):
      splits.left_out['preferences with equal texts'] += 1
      continue
    if split not in (None, UNSEEN) and splits.held_out.intersection(str(values.get(name)) for name in _RANKED_POLICIES):
      splits.left_out['training preferences of a policy that is held out'] += 1
      continue
    if split is None:
      continue
    yield row.of, row.prompt, (values['reference'], values['chosen'], values['rejected']), str(values.get('category') or '')


def _marked(files: Files, splits: Splits, most: int, seed: int) -> Iterator[tuple[str, str, tuple[str, str, str], str]]:
  references = {key(row.prompt): row.values['reference'] for row in files.preferences}
  groups: dict[tuple[str, str], list[Row]] = {}
  for row in files.answers:
    split = splits.of(row.prompt)
    may_be_read = split == UNSEEN or (split is not None and row.values['policy'] not in splits.held_out)
    if 'correct' in row.values and key(row.prompt) in references and may_be_read:
      groups.setdefault((row.of, key(row.prompt)), []).append(row)
  for (of, name), rows in groups.items():
    right, wrong = ([row.values['response'] for row in rows if row.values['correct'] is side] for side in (True, False))
    pairs = [(a, b) for a in dict.fromkeys(right) for b in dict.fromkeys(wrong) if a.strip() and b.strip()]
    pairs = [pair for pair in pairs if len({references[name], *pair}) == 3]
    rng = np.random.default_rng([seed, *name.encode()])
    for i in rng.permutation(len(pairs))[:most]:
      yield of, rows[0].prompt, (references[name], *pairs[i]), ''


def _shuffled(rows: list[Triplet], split: str, seed: int) -> list[Triplet]:
  order = np.random.default_rng([seed, *split.encode()]).permutation(len(rows))
  return [rows[i] for i in order]


def counts(rows: Iterable[Triplet]) -> dict[str, int]:
  """Return the number of examples by set."""
  return dict(sorted(collections.Counter(row.category.split('/')[0] for row in rows).items()))
