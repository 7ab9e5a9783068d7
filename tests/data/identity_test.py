"""What a resumed run notices: every example, every field that counts, text, prompts, chat template, tokenizer."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import re

import numpy as np
import pytest

from polar_jax.checkpoints import settings
from polar_jax.data import identity, tfds
from polar_jax.data.chat import ChatTemplate
from polar_jax.data.examples import read_triplets
from polar_jax.data.tokenizer import BOS, EOS, PAD, ByteTokenizer, open_tokenizer
from polar_jax.types import Prompt, Triplet

TRIPLETS = [Triplet(f'p{i}', 'r', f'c{i}', 'd', 'sft', 'easy', {'source': i}) for i in range(40)]
PROMPTS = [Prompt(f'p{i}', 'r', 'a', 'math', {'level': i, 'policy_prompt': f'q{i}'}) for i in range(40)]


def replaced(examples, index, **changes):
  return [dataclasses.replace(e, **changes) if i == index else e for i, e in enumerate(examples)]


def earlier(examples, read):
  """The digest that earlier versions stored: of the first, last and two other examples."""
  size = len(examples)
  texts = [read(examples[i]) for i in sorted({0, size // 3, size // 2, size - 1})]
  return f'{size}:{hashlib.sha256(repr(texts).encode()).hexdigest()[:16]}'


@pytest.mark.parametrize('index', [0, 1, 25, 39])
@pytest.mark.parametrize('field', ['prompt', 'reference', 'chosen', 'rejected', 'wrapper', 'category'])
def test_every_field_of_every_triplet_counts(field, index):
  digest = identity.triplets_digest(TRIPLETS)
  assert identity.triplets_digest(list(TRIPLETS)) == digest and re.fullmatch(r'40:[0-9a-f]{16}:[0-9a-f]{32}', digest)
  assert identity.triplets_digest(replaced(TRIPLETS, index, **{field: 'pretrain'})) != digest


def test_order_and_boundaries_of_texts_count_and_metadata_does_not():
  digest = identity.triplets_digest(TRIPLETS)
  assert identity.triplets_digest(replaced(TRIPLETS, 3, metadata={})) == digest
  assert identity.triplets_digest([*TRIPLETS[:1], TRIPLETS[2], TRIPLETS[1], *TRIPLETS[3:]]) != digest
  assert identity.triplets_digest(replaced(TRIPLETS, 3, prompt='p', reference='3r')) != digest
  assert identity.triplets_digest(replaced(TRIPLETS, 3, prompt=[{'role': 'user', 'content': 'p3'}])) != digest
  assert identity.triplets_digest(replaced(TRIPLETS, 3, prompt='\ud800')) != digest  # half a surrogate is refused elsewhere


def test_more_examples_than_are_read_together(monkeypatch):
  digest = identity.triplets_digest(TRIPLETS)
  monkeypatch.setattr(identity, '_READ_TOGETHER', 7)
  others = {identity.triplets_digest(replaced(TRIPLETS, i, chosen='x')) for i in range(40)}
  assert len(others | {digest}) == 41


def test_columns_of_prompts_count_if_the_reward_is_a_function():
  for field, value in {'prompt': 'x', 'reference': 'x', 'answer': 'x', 'category': 'x'}.items():
    changed = replaced(PROMPTS, 1, **{field: value})
    assert identity.prompts_digest(changed, with_metadata=False) != identity.prompts_digest(PROMPTS, with_metadata=False)
  other_column = replaced(PROMPTS, 1, metadata={**PROMPTS[1].metadata, 'level': -1})
  assert identity.prompts_digest(other_column, with_metadata=False) == identity.prompts_digest(PROMPTS, with_metadata=False)
  assert identity.prompts_digest(other_column, with_metadata=True) != identity.prompts_digest(PROMPTS, with_metadata=True)
  for_policy = replaced(PROMPTS, 1, metadata={**PROMPTS[1].metadata, 'policy_prompt': 'other'})
  assert identity.prompts_digest(for_policy, with_metadata=False) != identity.prompts_digest(PROMPTS, with_metadata=False)


class _Opaque:
  pass


def test_columns_of_any_type_have_the_same_digest_in_the_next_process():
  make = lambda: [Prompt('p', 'r', metadata={'a': np.arange(3), 1: {'t': datetime.date(2024, 1, 2)}, 'o': _Opaque(), 'n': float('nan')})]
  assert identity.prompts_digest(make(), with_metadata=True) == identity.prompts_digest(make(), with_metadata=True)


def test_digests_begin_with_those_of_earlier_versions():
  old = earlier(TRIPLETS, lambda e: (e.prompt, e.reference, e.chosen, e.rejected))
  now = identity.triplets_digest(TRIPLETS)
  assert now.startswith(f'{old}:')
  assert settings.differences({'rows': old}, {'rows': now}) == []
  assert settings.differences({'rows.train': old}, {'rows.train': now}) == []
  other = identity.triplets_digest(replaced(TRIPLETS, 0, chosen='x'))
  assert settings.differences({'rows': old}, {'rows': other}) == [f'the training data (`rows`) was {old!r}, is {other!r}']
  assert settings.differences({'rows': now}, {'rows': identity.triplets_digest(replaced(TRIPLETS, 1, chosen='x'))}) != []
  prompts = earlier(PROMPTS, lambda p: (p.prompt, p.reference, p.answer, p.metadata.get('policy_prompt')))
  assert identity.prompts_digest(PROMPTS, with_metadata=True).startswith(f'{prompts}:')


def test_digests_that_earlier_versions_did_not_store_are_compared_where_both_have_them():
  stored, now = {'data.text': 'a.txt'}, {'data.text': 'a.txt', 'text': '9:ab', 'validation_rows': '3:cd'}
  assert settings.differences(stored, now) == settings.differences(now, stored) == []
  assert settings.differences(now, now | {'validation_rows': '3:ce'}) != []
  assert settings.differences(now, now | {'data.text': 'moved.txt'}) == []  # the same content elsewhere
  assert settings.differences(now, now | {'text': '9:ac'}) == ["the training text (`text`) was '9:ab', is '9:ac'"]
  assert settings.differences(stored, {'data.text': 'b.txt'}) != []


def test_a_stream_of_tokens():
  ids = np.arange(1_000, dtype=np.int32)
  digest = identity.ids_digest(ids)
  assert digest == identity.ids_digest(ids.astype(np.int64)[::1]) and digest.startswith('1000:')
  changed = ids.copy()
  changed[123] += 1
  assert identity.ids_digest(changed) != digest != identity.ids_digest(ids[:-1])


def test_a_tfds_split_is_identified_by_its_shards(tmp_path):
  def write(name, rows):
    tfds.write_triplets(tmp_path / name, 'rows', {'train': rows, 'test': TRIPLETS[:3]}, 'Rows.', {})
    return tfds.open_triplets(tmp_path / name)

  one, same = write('one', TRIPLETS), write('same', TRIPLETS)
  other = write('other', replaced(TRIPLETS, 1, wrapper='pretrain'))
  assert one['train'].shards and all(path.is_file() for path in one['train'].shards)
  assert identity.triplets_digest(one['train']) == identity.triplets_digest(same['train']) != identity.triplets_digest(other['train'])
  assert identity.triplets_digest(one['test']) == identity.triplets_digest(other['test'])


def test_the_chat_template_counts():
  digests = {identity.chat_digest(ChatTemplate(source, tokens)) for source in ('a', 'b') for tokens in ({}, {'bos_token': '<s>'})}
  assert len(digests) == 4 and identity.chat_digest(None) == 'none'


def test_the_files_next_to_a_tokenizer_count(tmp_path):
  import tokenizers

  model = tokenizers.Tokenizer(tokenizers.models.BPE({'a': 0, 'b': 1}, []))
  model.add_special_tokens([PAD, BOS, EOS])
  model.save(str(tmp_path / 'tokenizer.json'))
  digest = lambda: identity.tokenizer_digest(open_tokenizer(tmp_path))
  plain = digest()
  assert re.fullmatch(r'[0-9a-f]{16}:[0-9a-f]{16}', plain)
  assert plain.startswith(hashlib.sha256((tmp_path / 'tokenizer.json').read_bytes()).hexdigest()[:16])  # as earlier versions had it
  seen = {plain}
  for settings_ in ({'bos_token': EOS}, {'bos_token': BOS, 'add_bos_token': False}, {'added_tokens_decoder': {'5': {'content': '<x>'}}}):
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(settings_))
    seen.add(digest())
  assert len(seen) == 4
  assert identity.tokenizer_digest(ByteTokenizer()) == 'byte'


@pytest.mark.data
def test_changed_rows_that_were_not_looked_at(data_folder):
  a, b, c = (identity.triplets_digest(read_triplets(data_folder / f'cases/rows/res_{name}.jsonl')) for name in 'abc')
  assert len({a, b, c}) == 3
  assert a.rsplit(':', 1)[0] == b.rsplit(':', 1)[0] == c.rsplit(':', 1)[0]  # so earlier versions took them for the same


def sha(text, digits=16):
  return hashlib.sha256(text.encode()).hexdigest()[:digits]


def test_digests_are_those_that_runs_have_stored():
  """Of all fields as JSON, 1,024 examples at a time; of nothing; of a chat template."""
  triplets = [Triplet(f'p{i}', 'r', 'c', 'd', 'sft', 'x') for i in range(1_030)]
  fields = [[t.prompt, t.reference, t.chosen, t.rejected, t.wrapper, t.category] for t in triplets]
  content = sha(json.dumps(fields[:1_024]) + json.dumps(fields[1_024:]), 32)
  assert identity.triplets_digest(triplets) == f'{earlier(triplets, lambda e: (e.prompt, e.reference, e.chosen, e.rejected))}:{content}'
  assert identity.triplets_digest([]) == identity.prompts_digest([], with_metadata=True) == f'0:{sha("")}:{sha("")}'
  prompts = [Prompt('p', 'r', 'a', 'x', {'b': 1, 'a': {'d': 2, 'c': 3}})]
  start = f'1:{sha(repr([("p", "r", "a", None)]))}'
  with_metadata = sha('[["p", "r", "a", null, "x", {"a": {"c": 3, "d": 2}, "b": 1}]]', 32)
  assert identity.prompts_digest(prompts, with_metadata=True) == f'{start}:{with_metadata}'
  assert identity.prompts_digest(prompts, with_metadata=False) == f'{start}:{sha(json.dumps([["p", "r", "a", None, "x", None]]), 32)}'
  assert identity.chat_digest(ChatTemplate('a', {'pad_token': 'p', 'bos_token': '<s>'})) == sha(
    '["a", {"bos_token": "<s>", "pad_token": "p"}]'
  )
  assert identity.ids_digest(np.array([1, 2])) == f'2:{hashlib.sha256(np.array([1, 2], np.int32).tobytes()).hexdigest()[:32]}'


def test_the_digest_of_a_tokenizer_is_that_of_its_facts(tmp_path):
  import tokenizers

  model = tokenizers.Tokenizer(tokenizers.models.BPE({'a': 0, 'b': 1}, []))
  model.add_special_tokens([PAD, BOS, EOS])
  model.post_processor = tokenizers.processors.TemplateProcessing(single=f'{BOS} $A', special_tokens=[(BOS, 3)])
  model.save(str(tmp_path / 'tokenizer.json'))
  settings_ = {'eos_token': EOS, 'add_eos_token': True, 'added_tokens_decoder': {'5': {'content': '<x>', 'special': True, 'lstrip': False}}}
  (tmp_path / 'tokenizer_config.json').write_text(json.dumps(settings_ | {'additional_special_tokens': ['<x>', 'b']}))
  facts = [{'eos': EOS}, ['<x>', 'b'], [['<x>', 5, True, {'lstrip': False}]], [3, 4, 2, None, 6], [None, True], [3]]
  file = hashlib.sha256((tmp_path / 'tokenizer.json').read_bytes()).hexdigest()[:16]
  assert identity.tokenizer_digest(open_tokenizer(tmp_path)) == f'{file}:{sha(json.dumps(facts))}'


@dataclasses.dataclass
class _Named:
  name: str
  when: datetime.date


class _WithText:
  def __str__(self):
    return 'as text'


class _WithRepr:
  def __repr__(self):
    return 'as repr'


def test_values_of_any_type_are_plain():
  assert identity._plain({1: (2, [_Opaque()]), 'n': np.arange(2)}) == {'1': ['2', ['_Opaque']], 'n': [0, 1]}
  assert identity._plain(_Named('a', datetime.date(2024, 1, 2))) == {'name': 'a', 'when': '2024-01-02'}
  assert [identity._plain(value) for value in (_Opaque(), _WithText(), _WithRepr())] == ['_Opaque', 'as text', 'as repr']
  assert identity._plain(_Named) == str(_Named) and identity._plain(np.float32(0.5)) == 0.5
