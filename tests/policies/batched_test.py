"""Likelihoods and responses in batches against the full forward pass of one sequence at a time."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import polar_jax
from polar_jax import sharding
from polar_jax.config import ConfigError, MeshConfig, ModelConfig
from polar_jax.data.chat import ChatTemplate, ChatTemplateError
from polar_jax.data.tokenizer import ByteTokenizer
from polar_jax.model.language_model import LanguageModel
from polar_jax.policies import likelihood
from polar_jax.policies.batched import BatchedPolicy
from polar_jax.policies.encoding import Pair
from polar_jax.policies.generation import Ending, Settings
from polar_jax.types import UserError

SHAPE = ModelConfig(
  vocab_size=ByteTokenizer.vocab_size,
  num_layers=2,
  d_model=16,
  d_ff=24,
  num_heads=2,
  num_kv_heads=1,
  head_dim=8,
  init_std=0.5,
  max_position=96,
)
TOKENIZER = ByteTokenizer()
WIDTH = 128


def make(devices: int = 1, **axes: int) -> polar_jax.LanguageModel:
  mesh = sharding.make_mesh(MeshConfig(**axes), jax.devices()[:devices])
  return polar_jax.LanguageModel.init(SHAPE, TOKENIZER, mesh=mesh, seed=3)


@pytest.fixture(scope='module')
def model():
  return make()


@pytest.fixture(scope='module')
def logits_of(model):
  """Return a function: the float64 logits after each token of a sequence, by a forward pass of it alone."""
  graphdef, _ = nnx.split(nnx.eval_shape(lambda: LanguageModel(SHAPE, rngs=nnx.Rngs(0))))
  position = jnp.arange(WIDTH, dtype=jnp.int32)[None]
  forward = jax.jit(lambda p, row: nnx.merge(graphdef, p)(row, position, [(jnp.zeros_like(position), position + 1)]))
  params = jax.device_get(model.params)

  def logits(ids) -> np.ndarray:
    row = np.zeros((1, WIDTH), np.int32)
    row[0, : len(ids)] = ids
    return np.asarray(forward(params, row)[0, : len(ids)], np.float64)

  return logits


def slow(logits_of, context, scored) -> tuple[float, bool]:
  """Return the (log-likelihood, whether it is greedy) of one continuation."""
  logits = logits_of([*context, *scored][:-1])[-len(scored) :]
  logprobs = logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True)) - logits.max(1, keepdims=True)
  return float(logprobs[np.arange(len(scored)), scored].sum()), bool((logits.argmax(1) == scored).all())


def greedy(logits_of, prompt, count) -> list[int]:
  out: list[int] = []
  while len(out) < count and TOKENIZER.eos_id not in out:
    out.append(int(logits_of([*prompt, *out])[-1].argmax()))
  return out


@pytest.fixture(scope='module')
def pairs(logits_of) -> list[Pair]:
  """Contexts of many lengths with several continuations each, one of which is greedy."""
  rng, out = np.random.default_rng(1), list[Pair]()
  for length in (1, 1, 5, 9, 40, 41, 90):
    context = rng.integers(97, 123, length).tolist()
    best = greedy(logits_of, context, 4)
    second = int(logits_of(context)[-1].argsort()[-2])
    for scored in (best[:1], best, [*best[:-1], (best[-1] + 1) % 250], [second], best):
      out.append(Pair(tuple(context), tuple(scored)))
  return [out[i] for i in rng.permutation(len(out))]


def check(model, pairs, logits_of, **options):
  found = likelihood.log_likelihoods(model.params, model.config, model.mesh, pairs, **options)
  expected = [slow(logits_of, *pair[:2]) for pair in pairs]
  np.testing.assert_allclose(found.logprob, [p for p, _ in expected], atol=1e-4)
  assert found.greedy.tolist() == [g for _, g in expected]
  assert 0 < found.greedy.sum() < len(pairs)
  for i, pair in enumerate(pairs):
    assert found.logprob[i] == found.logprob[pairs.index(pair)]  # equal choices tie


def test_likelihoods_and_greedy_flags_are_those_of_single_sequences(model, pairs, logits_of):
  done: list[int] = []
  check(model, pairs, logits_of, progress=done.append)
  assert done == sorted(done) and done[-1] == len(pairs)


def test_likelihoods_on_a_mesh_with_logits_in_pieces(pairs, logits_of, monkeypatch):
  monkeypatch.setattr(likelihood, '_LOGITS', 1 << 12)
  likelihood._build.cache_clear()
  check(make(2, data=2, fsdp=1), pairs, logits_of, max_rows=2)
  likelihood._build.cache_clear()


def test_a_plan_has_every_pair_once_in_few_shapes():
  rng = np.random.default_rng(0)
  contexts = [tuple(rng.integers(0, 99, n).tolist()) for n in rng.integers(1, 700, 300)]
  pairs = [Pair(context, tuple(range(int(n)))) for context in contexts for n in rng.integers(1, 30, 4)]
  chunks = likelihood.plan(pairs, tokens=4_096, shards=2)
  assert sorted(i for chunk in chunks for i in chunk.members) == list(range(len(pairs)))
  assert [chunk.row_length for chunk in chunks] == sorted((chunk.row_length for chunk in chunks), reverse=True)
  assert len({chunk[1:] for chunk in chunks}) <= 6
  for chunk in chunks:
    rows = chunk.rows // 2
    assert chunk.rows % 2 == 0 and rows & (rows - 1) == 0 and chunk.rows * chunk.row_length <= 4_096
    found = likelihood.batches(pairs, chunk)
    assert sorted({int(i) for batch in found for i in batch.rollout_BQ[batch.rollout_BQ >= 0]}) == sorted(chunk.members)
    held = sum(int((batch.rows.start_BT < batch.rows.end_BT).sum()) for batch in found)
    assert held < 0.5 * sum(len(pairs[i].context) + len(pairs[i].scored) for i in chunk.members)  # contexts are shared


def test_texts_longer_than_the_model_are_scored_in_windows(model, logits_of):
  policy = BatchedPolicy(model, max_length=20)
  texts = ['', 'abc', 'x' * 19, 'hello world, this is a text that is longer than a window']
  expected = []
  for text in texts:
    ids, total = [TOKENIZER.bos_id, *text.encode()], 0.0
    read = [TOKENIZER.bos_id, *ids]
    for low in range(0, len(ids), 20):
      high = min(low + 20, len(ids))
      start = max(0, high - 20)
      total += slow(logits_of, read[start : low + 1], ids[low:high])[0]
    expected.append(total)
  np.testing.assert_allclose(policy.rolling(texts), expected, atol=1e-4)


def test_contexts_that_are_cut_are_counted(model, logits_of):
  found = BatchedPolicy(model, max_length=10).likelihoods([('a' * 30, 'bc'), ('a', 'bc')])
  assert [one.truncated for one in found] == [True, False]
  assert found[0].logprob == pytest.approx(slow(logits_of, b'a' * 9, [*b'bc'])[0], abs=1e-4)
  assert found[1].logprob == pytest.approx(slow(logits_of, [TOKENIZER.bos_id, 97], [*b'bc'])[0], abs=1e-4)
  with pytest.raises(UserError, match=r'request 1: a continuation has 11 tokens, more than max_length=10'):
    BatchedPolicy(model, max_length=10).likelihoods([('a', 'b'), ('a', 'b' * 11)])


@pytest.fixture(scope='module')
def responses(logits_of):
  """Prompts with their greedy responses of 40 tokens."""
  prompts = ['a', 'hello', 'what is it?', 'x' * 30, 'why']
  return {p: greedy(logits_of, [TOKENIZER.bos_id, *p.encode()], 40) for p in prompts}


def test_responses_are_greedy_and_end_at_limits_and_stop_strings(model, responses):
  text = {p: TOKENIZER.decode([i for i in ids if i != TOKENIZER.eos_id]) for p, ids in responses.items()}
  stop = {p: t[3:5] for p, t in text.items()}
  requests = [(p, {'max_gen_toks': n}) for p in responses for n in (1, 40)]
  requests += [(p, {'max_gen_toks': 40, 'until': [stop[p], 'never']}) for p in responses]
  found = BatchedPolicy(model, rows=4).generate(requests)
  assert not any(one.truncated for one in found)
  for (p, given), one in zip(requests, found, strict=True):
    whole = TOKENIZER.decode(responses[p][: given['max_gen_toks']])
    assert one.text == (whole.partition(stop[p])[0] if 'until' in given else whole), (p, given)
  assert len({len(one.text) for one in found}) > 2


def test_long_prompts_lose_their_beginning_and_are_counted(model, logits_of, responses):
  policy = BatchedPolicy(model, max_length=46, rows=4)
  found = policy.generate([('a', {'max_gen_toks': 40}), ('y' * 90 + 'z' * 6, {'max_gen_toks': 40}), ('z' * 6, {'max_gen_toks': 40})])
  assert [one.truncated for one in found] == [False, True, True]  # the last one loses its BOS
  assert found[0].text == TOKENIZER.decode(responses['a'])
  assert found[1].text == found[2].text == TOKENIZER.decode(greedy(logits_of, b'zzzzzz', 40))
  with pytest.raises(UserError, match='request 0: a response of 46 tokens leaves no room'):
    policy.generate([('a', {'max_gen_toks': 46})])
  with pytest.raises(UserError, match='request 1: num_beams=2 is not supported'):
    policy.generate([('a', {'max_gen_toks': 1}), ('a', {'num_beams': 2})])


def test_a_control_token_can_be_a_stop_string(responses):
  ids = next(ids for ids in responses.values() if len(ids) > 8)
  ending = Ending(TOKENIZER, [TOKENIZER.eos_id], [Settings(('<pad>',))])
  assert ending.text(0, [*ids[:4], TOKENIZER.pad_id, *ids[4:]]) == (TOKENIZER.decode(ids[:4]), True)
  assert ending.text(0, ids[:4]) == (TOKENIZER.decode(ids[:4]), False)


def test_samples_of_equal_prompts_differ_and_depend_on_the_seed(model):
  requests = [('hello', {'do_sample': True, 'max_gen_toks': 12})] * 3 + [('hello', {'max_gen_toks': 12})] * 2
  first, again, other = (BatchedPolicy(model, rows=4, seed=s).generate(requests) for s in (0, 0, 1))
  assert first == again
  assert len({one.text for one in first[:3]}) == 3
  assert first[3:] == other[3:] and first[3] == first[4] and first[:3] != other[:3]


def test_settings_are_checked(model):
  for options, named in (({'max_length': 1}, 'max_length is 1'), ({'rows': 0}, 'batch size is 0')):
    with pytest.raises(ConfigError, match=named):
      BatchedPolicy(model, **options)
  bare = polar_jax.LanguageModel(model.params, model.config, None, model.mesh)
  with pytest.raises(UserError, match='no tokenizer'):
    BatchedPolicy(bare)
  with pytest.raises(ConfigError, match='no chat template'):
    BatchedPolicy(model).render([{'role': 'user', 'content': 'x'}])


def test_a_conversation_can_end_within_its_last_message():
  refuse = "{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
  source = f'{{% for m in messages %}}{refuse}<{{{{ m.role }}}}>{{{{ m.content FILTER }}}}</s>{{% endfor %}}'
  source += '{% if add_generation_prompt %}<assistant>{% endif %}'
  talk = [{'role': 'system', 'content': 'be brief'}, {'role': 'user', 'content': 'q'}, {'role': 'assistant', 'content': 'the answer '}]
  for name, end in (('', ' '), ('| trim', '')):
    model = make()
    model.chat = ChatTemplate(source.replace('FILTER', name))
    policy = BatchedPolicy(model)
    assert policy.render(talk[1:2]) == '<user>q</s><assistant>'
    assert policy.render(talk[:2]) == '<user>q</s><assistant>'  # the template refuses the system
    assert policy.render(talk[1:], add_generation_prompt=False) == f'<user>q</s><assistant>the answer{end}'
    with pytest.raises(ChatTemplateError, match='no system'):
      policy.render(talk[:1])
