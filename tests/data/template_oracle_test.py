"""The template against the official rule, implemented step by step from its description with the libraries' own tokenizers.

In one respect ours is stricter: texts lose the template's own two tokens even where the tokenizer does not count them as special.
"""

from __future__ import annotations

import json
import random
import re
import warnings

import pytest
import sentencepiece
from optional import transformers

from polar_jax.config import TemplateConfig
from polar_jax.data.template import Template
from polar_jax.data.tokenizer import ByteTokenizer, open_tokenizer
from polar_jax.types import Triplet

WORDS = [
  *[
    'the',
    'fox',
    'jumps',
    'Over',
    '2026',
    '3.14',
    'naïve',
    'e\u0301té',
    '日本語',
    '中文。',
    '🦊',
    '👩\u200d👧',
    '▁',
    'ﷺ',
    '...',
    '===',
    "It's",
  ],
  *['def', 'f(x):', '"quoted"', '\t', '\r\n', '\n', '\n\n', '\n\n\n', ' ', '  '],
]


class Bytes:
  """One token per byte; the five special strings are one token each, and dropped in decoding."""

  bos, specials = (257,), ('<pad>', '<s>', '</s>', '<|reward|>', '[UNUSED_TOKEN_130]')

  def encode(self, text):
    out = []
    while text:
      special = next((s for s in self.specials if text.startswith(s)), None)
      out += list(text[0].encode()) if special is None else [256 + self.specials.index(special)]
      text = text[len(special or text[0]) :]
    return out

  def decode(self, ids):
    return bytes(i for i in ids if i < 256).decode('utf-8', 'replace')


class InternLM2:
  """Control pieces and added tokens split a text, are one token each, and are dropped in decoding."""

  bos = (1,)

  def __init__(self, path, added):
    self.model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    self.ids = {'<unk>': 0, '<s>': 1, '</s>': 2, **added}

  def encode(self, text):
    pattern = '(' + '|'.join(map(re.escape, self.ids)) + ')'
    parts = [part for part in re.split(pattern, text) if part]
    return [i for part in parts for i in ([self.ids[part]] if part in self.ids else self.model.encode(part))]

  def decode(self, ids):
    return self.model.decode([i for i in ids if i not in self.ids.values()])


class Qwen:
  bos = ()

  def __init__(self, folder):
    self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)

  def encode(self, text):
    return self.tokenizer(text)['input_ids']

  def decode(self, ids):
    return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def joined(value):
  if isinstance(value, str):
    return value
  return '\n'.join(message['content'] for message in value)


def official(tokenizer, rule, limits, prompt, reference, candidates, wrapper, separator, reward):
  """Return the sequences of the candidates in one call of the official trainer or client, and what it truncated.

  Args:
    rule: 'trainer' or 'client'.
    limits: max_length, max_response_length.
    reward: the string of the reward token, and its id.
  """
  own = [reward[1], *(ids if len(ids := tokenizer.encode(separator)) == 1 else [])]
  decode = lambda ids: tokenizer.decode([i for i in ids if i not in own])
  max_length, max_response_length = limits
  # 1. Encode separately, each with its BOS, which counts.
  prompt_ids = [*tokenizer.bos, *tokenizer.encode(joined(prompt))]
  reference_ids = [*tokenizer.bos, *tokenizer.encode(joined(reference))]
  candidate_ids = [[*tokenizer.bos, *tokenizer.encode(joined(candidate))] for candidate in candidates]
  # 2. Room for separator, reward token and two newlines.
  budget = max_length - 4
  # 3. Candidates keep their head.
  cut = {'answer': any(len(ids) > max_response_length for ids in [reference_ids, *candidate_ids])}
  reference_ids = reference_ids[:max_response_length]
  candidate_ids = [ids[:max_response_length] for ids in candidate_ids]
  # 4. The prompt, twice in each sequence, keeps its tail; the trainer truncates it alike for all of them.
  rooms = [(budget - len(reference_ids) - len(ids)) // 2 for ids in candidate_ids]
  if rule == 'trainer':
    rooms = [min(rooms) for _ in rooms]
  rooms = [max(room, 0) for room in rooms]
  cut['prompt'] = any(len(prompt_ids) > room for room in rooms)
  cut['whole prompt'] = 0 in rooms
  # 5. Decode without special tokens, assemble, and tokenize again after one BOS.
  out = []
  for ids, room in zip(candidate_ids, rooms, strict=True):
    prompt_text = decode(prompt_ids[len(prompt_ids) - room :] if room < len(prompt_ids) else prompt_ids)
    parts = []
    for answer in (decode(reference_ids), decode(ids)):
      newline = wrapper == 'sft' and not (rule == 'trainer' and answer == '')
      parts.append(prompt_text + ('\n' if newline else '') + answer)
    text = separator.join(parts)
    if rule == 'trainer':
      out.append([*tokenizer.bos, *tokenizer.encode(text), reward[1]])
    else:
      out.append([*tokenizer.bos, *tokenizer.encode(text + reward[0])])
  return out, cut


def random_value(rng, specials):
  """Draw a text or messages of some turns; one in nine is empty, one in three contains special strings."""

  def text(length):
    words = WORDS + (specials * 2 if rng.random() < 0.35 else [])
    return rng.choice(['', ' ', ' ']).join(rng.choices(words, k=rng.choice([0, 1, 2, length, length, length, length, length, 2 * length])))

  length = rng.choice([4, 12, 40])
  if rng.random() < 0.6:
    return text(length)
  roles = [{'role': 'system'}, {'role': 'user'}, {'role': 'assistant'}, {}]
  return [{**rng.choice(roles), 'content': text(length // 2)} for _ in range(rng.randint(1, 4))]


def check(tokenizer, oracle, rows, seed, specials, separator='<|reward|>', reward=('[UNUSED_TOKEN_130]', 92527)):
  rng = random.Random(seed)
  cuts = {'answer': 0, 'prompt': 0, 'whole prompt': 0}
  templates = {}
  for row in range(rows):
    rule, wrapper = rng.choice(['trainer', 'client']), rng.choice(['sft', 'pretrain'])
    limits = rng.choice([20, 40, 60, 100, 200, 16_384]), rng.choice([4, 10, 25, 60, 4_096])
    if (rule, *limits) not in templates:
      config = TemplateConfig(max_length=limits[0], max_response_length=limits[1], rule=rule, separator=separator, reward_token=reward[0])
      templates[rule, *limits] = Template(config, tokenizer)
    template = templates[rule, *limits]
    prompt, reference, *candidates = (random_value(rng, specials) for _ in range(rng.randint(4, 6)))
    expected, cut = official(oracle, rule, limits, prompt, reference, candidates[:2], wrapper, separator, reward)
    got = template.encode(Triplet(prompt, reference, candidates[0], candidates[1], wrapper))
    assert list(got) == expected, (row, rule, limits, wrapper, prompt, reference, candidates)
    expected, _ = official(oracle, rule, limits, prompt, reference, candidates, wrapper, separator, reward)
    assert template.encode_candidates(prompt, reference, candidates, wrapper) == expected, (row, rule, limits, wrapper, prompt, reference)
    for name in cuts:
      cuts[name] += cut[name]
  # All kinds occur: truncated in either place, and not at all.
  assert all(rows / 8 < count < rows * 7 / 8 for count in cuts.values()), cuts


def test_bytes():
  check(ByteTokenizer(), Bytes(), 350, 0, list(Bytes.specials), reward=('[UNUSED_TOKEN_130]', 260))


INTERNLM2_SPECIALS = ['<s>', '</s>', '<unk>', '[UNUSED_TOKEN_130]', '[UNUSED_TOKEN_7]', '<|reward|>', '<|im_start|>', '<pad>']


@pytest.mark.data
@pytest.mark.parametrize('separator_id', [92528, 92544, None])
def test_internlm2(data_folder, tmp_path, separator_id):
  path = tmp_path / 'tokenizer.model'
  path.write_bytes((data_folder / 'tokenizers/internlm2/tokenizer.model').read_bytes())
  added = {} if separator_id is None else {'<|reward|>': separator_id, '<|im_start|>': 92543}
  decoder = {str(i): {'content': token, 'special': True} for token, i in added.items()}
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps({'added_tokens_decoder': decoder}))
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # in one of the three the separator is text on purpose
    check(open_tokenizer(tmp_path), InternLM2(path, added), 130, 1 + (separator_id or 0), INTERNLM2_SPECIALS)


@pytest.mark.long
@pytest.mark.needs('transformers')
@pytest.mark.data
def test_qwen(data_folder):
  folder = data_folder / 'tokenizers/qwen3'
  specials = ['<|im_start|>', '<|im_end|>', '<think>', '</tool_call>', '<|endoftext|>', '<|repo_name|>', '<|file_sep|>', '<s>']
  check(open_tokenizer(folder), Qwen(folder), 260, 2, specials, separator='<|repo_name|>', reward=('<|file_sep|>', 151664))
