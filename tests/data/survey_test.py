"""Examples that a model cannot learn from, and texts that are cut off."""

from __future__ import annotations

import dataclasses

import pytest

from polar_jax.config import TemplateConfig
from polar_jax.data.examples import as_triplets, read_triplets
from polar_jax.data.pipeline import TripletSegments
from polar_jax.data.survey import Survey, log_surveys, survey, survey_prompts
from polar_jax.data.template import Template
from polar_jax.data.tokenizer import ByteTokenizer
from polar_jax.types import Prompt, Triplet

SHORT = TemplateConfig(max_length=200, max_response_length=30)
LONG = 'a' * 60


def look(triplets, config=SHORT, tokenizer=None, threads=2):
  segments = TripletSegments(triplets, Template(config, tokenizer or ByteTokenizer()))
  return survey(segments, range(len(triplets)), threads)


class _Inexact(ByteTokenizer):
  """A tokenizer that is never known to be exact, like SentencePiece, and drops accents, as some normalize."""

  def encode(self, text, add_bos=False):
    return super().encode(text.replace('é', 'e'), add_bos)

  def is_exact(self, text):
    return False


TRIPLETS = [
  Triplet('p', 'r', 'good', 'bad'),
  Triplet('p', 'r', 'same', 'same'),
  Triplet('p', 'r', 'one\ntwo', [{'role': 'x', 'content': 'one'}, {'role': 'y', 'content': 'two'}]),
  Triplet('p', 'r', LONG + ' good', LONG + ' bad'),
  Triplet('p', 'r', 'x' + LONG, 'y' + LONG),
  Triplet('p', LONG, 'good', 'bad'),
  Triplet('p' * 99, 'r', 'good', 'bad'),
  Triplet('p', 'r', 'x<|reward|>', 'x'),
]


def test_every_kind_is_counted_by_number():
  found = look(TRIPLETS)
  assert found == Survey(8, [2, 3], [4, 8], [4, 5, 6], [7], (30, 200))
  kinds = [line.split(' examples have ')[1].split(' (number ')[0] for line in found.lines()]
  assert [kind[:20] for kind in kinds] == ['the same text as cho', 'chosen and rejected ', 'a reference or candi', 'a prompt that does n']
  assert 'number 2, 3)' in found.lines()[0] and all(len(line) <= 500 and '\n' not in line for line in found.lines())
  assert found.asdict()['numbers']['cut_responses'] == [4, 5, 6] and found.asdict()['same_tokens'] == 2
  assert found == look(TRIPLETS, threads=0)


def test_the_advice_helps():
  assert 'raise template.max_response_length (30)' in look(TRIPLETS[3:4]).lines()[0]
  raised = look(TRIPLETS[3:4], dataclasses.replace(SHORT, max_response_length=80))
  assert raised.lines() == []
  assert look(TRIPLETS[:1]).lines() == []


def test_texts_that_a_tokenizer_makes_equal():
  found = look([Triplet('p', 'r', 'café', 'cafe'), Triplet('p', 'r', 'good', 'bad')], tokenizer=_Inexact())
  assert (found.same_text, found.same_tokens, found.cut_responses) == ([], [1], [])


def test_without_a_reference_it_is_not_cut_and_prompts_have_more_room():
  hidden = dataclasses.replace(SHORT, use_reference=False)
  assert look(TRIPLETS[5:7], hidden) == Survey(2, [], [], [], [], (30, 200))
  assert look([Triplet('p' * 300, LONG, 'good', 'bad')], hidden).cut_prompts == [1]


def test_many_examples_and_lines_of_a_file(tmp_path):
  found = look(TRIPLETS[:2] * 1_500)
  assert len(found.same_text) == 1_500 and found.same_text[:3] == [2, 4, 6]
  counted = found.asdict()
  assert counted['same_text'] == 1_500 and len(counted['numbers']['same_text']) == 20
  assert len(found.lines()[0]) < 300
  path = tmp_path / 'a.jsonl'
  path.write_text('\n{"prompt": "p", "reference": "r", "chosen": "c", "rejected": "c"}\n')
  assert look(read_triplets(path)).same_text == [2]  # the line
  assert look(as_triplets([{'prompt': 'p', 'reference': 'r', 'chosen': 'c', 'rejected': 'c'}])).same_text == [0]  # the index in a list


def test_prompts_and_references_that_the_reward_model_does_not_see_whole():
  prompts = [Prompt('p', 'r'), Prompt('p', LONG), Prompt('p' * 300, 'r'), Prompt('p', 'r')]
  found = survey_prompts(prompts, Template(SHORT, ByteTokenizer()), left_out=[3])
  assert (found.cut_responses, found.cut_prompts, found.same_text) == ([2], [3], [])
  assert found.asdict() == {
    'examples': 4, 'same_text': 0, 'same_tokens': 0, 'cut_responses': 1, 'cut_prompts': 1, 'left_out': 1,
    'numbers': {'cut_responses': [2], 'cut_prompts': [3], 'left_out': [4]},
  }  # fmt: skip
  assert len(found.lines()) == 2
  assert survey_prompts(prompts, None, []).lines() == []  # a function reads everything


@pytest.mark.data
@pytest.mark.parametrize(('name', 'kind'), [('cut', 'same_tokens'), ('dup', 'same_text')])
def test_the_files_of_which_nothing_can_be_learned(data_folder, name, kind):
  found = look(read_triplets(data_folder / f'cases/rows/{name}_train.jsonl'))
  assert len(getattr(found, kind)) == found.examples == 8


def test_five_numbers_are_listed_and_twenty_are_kept():
  numbers = list(range(3, 25))
  found = Survey(30, numbers[:5], numbers[:6], numbers[:20], numbers[:21], (30, 200))
  assert [line.partition('(number ')[2].partition('): ')[0] for line in found.lines()] == ['3, 4, 5, 6, 7', *['3, 4, 5, 6, 7, ...'] * 3]
  assert [len(kept) for kept in found.asdict()['numbers'].values()] == [5, 6, 20, 20]
  assert found.asdict()['cut_prompts'] == 21 and found.lines()[2].startswith('20 of 30 examples have a reference or candidate longer')
  assert Survey(1, [], [], [], [], (1, 2)).left_out == ()


def test_the_same_text_is_no_other_kind_even_if_it_is_cut():
  assert look([Triplet('p', 'r', LONG, LONG)]) == Survey(1, [1], [], [1], [], (30, 200))


def test_surveys_of_the_splits_of_a_run_are_logged_and_returned():
  segments = lambda triplets: TripletSegments(triplets, Template(SHORT, ByteTokenizer()))
  lines = []
  splits = {'train': (segments(TRIPLETS), range(2)), 'test': (segments(TRIPLETS[:1]), range(1))}  # of the first, what a run reads
  out = log_surveys('rm', splits, 0, lines.append)
  assert list(out) == ['train', 'test'] and out['train'] == look(TRIPLETS[:2]).asdict() and out['test']['examples'] == 1
  assert lines == ['rm: train data: ' + look(TRIPLETS[:2]).lines()[0]]


def test_prompts_of_a_reward_without_a_template_have_no_limits():
  found = survey_prompts([Prompt('p' * 300, LONG)], None, [0])
  assert found == Survey(1, [], [], [], [], (0, 0), [1])
  assert survey_prompts([Prompt('p', 'r')], Template(SHORT, ByteTokenizer()), []).limits == (30, 200)
