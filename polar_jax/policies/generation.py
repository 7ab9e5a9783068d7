"""Responses to the prompts of benchmarks: what a request asks for, and the text that it gets."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from polar_jax import sharding
from polar_jax.config import ModelConfig, RolloutConfig
from polar_jax.data.tokenizer import Tokenizer
from polar_jax.policies.encoding import cut_at_stop
from polar_jax.ppo.rollout import RolloutEngine
from polar_jax.types import UserError

MAX_NEW = 256  # tokens of a response, where a request does not say
_SLOTS = 64  # responses decoded at a time
_CACHE_BYTES = 8 << 30  # most memory of keys and values on one data-parallel device
_SHORTEST = 512  # tokens; prompts up to this length are decoded together

# Names of the most tokens of a response, the first of which counts.
_LIMITS = ('max_gen_toks', 'max_new_tokens', 'max_tokens', 'max_completion_tokens')
# Settings that decoding does not have, with the values that mean that they are off.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
  'num_beams': (1,),
  'num_return_sequences': (1,),
  'repetition_penalty': (1, None),
  'frequency_penalty': (0, None),
  'presence_penalty': (0, None),
  'min_p': (0, None),
  'typical_p': (1, None),
  'use_cache': (True,),
}


class Settings(NamedTuple):
  """What a request asks for."""

  until: tuple[str, ...] = ()  # the response ends before the first of these strings
  max_new: int = MAX_NEW  # tokens
  temperature: float = 0.0  # 0: greedy
  top_p: float = 1.0
  top_k: int | None = None


def settings_of(given: Mapping[str, Any], max_new: int = MAX_NEW) -> Settings:
  """Read the generation settings of a request, as tasks of lm-eval write them.

  Args:
    given: `until`, one of the names of the most tokens, `do_sample`, `temperature`, `top_p` and `top_k`. Without `do_sample` a temperature
      above 0 samples; with `do_sample` the temperature is 1 unless it is given.
    max_new: most tokens of a response, where the request does not say.

  Raises:
    UserError: a setting is not supported or has a bad value; the message names it.
  """
  left = dict(given)
  until = left.pop('until', None) or []
  until = [until] if isinstance(until, str) else until
  if not isinstance(until, (list, tuple)) or not all(isinstance(stop, str) for stop in until):
    raise UserError(f'until is {until!r:.80}; it must be a string or a list of strings')
  limits = [value for name in _LIMITS if (value := left.pop(name, None)) is not None]
  do_sample, temperature = left.pop('do_sample', None), left.pop('temperature', None)
  top_p, top_k = left.pop('top_p', None), left.pop('top_k', None)
  for name, value in left.items():
    if value not in _NEUTRAL.get(name, ()):
      raise UserError(f'{name}={value!r:.40} is not supported; known: until, {", ".join(_LIMITS)}, do_sample, temperature, top_p, top_k')
  try:
    most = int(limits[0]) if limits else max_new
    warmth = 0.0 if do_sample is False else float(temperature) if temperature is not None else float(bool(do_sample))
    nucleus, few = (1.0 if top_p is None else float(top_p)), (None if top_k is None or int(top_k) <= 0 else int(top_k))
  except (TypeError, ValueError) as error:
    raise UserError(f'generation settings {dict(given)!r:.160}: {error}') from error
  if most < 1 or warmth < 0 or not 0 < nucleus <= 1:
    raise UserError(f'generation settings {dict(given)!r:.160}: tokens must be at least 1, temperature at least 0, top_p in (0, 1]')
  return Settings(tuple(until), most, warmth, nucleus if warmth else 1.0, few if warmth else None)


class Response(NamedTuple):
  """A response to a prompt."""

  text: str
  tokens: int  # that were sampled
  ended: bool  # by the model or a stop string; False: the limit of its length was reached


class Ending:
  """Knows where responses end.

  Args:
    tokenizer: of the model.
    stop_ids: tokens that end every response.
    settings: of each response.
  """

  def __init__(self, tokenizer: Tokenizer, stop_ids: Sequence[int], settings: Sequence[Settings]):
    self._tokenizer, self._settings = tokenizer, settings
    # A control token does not appear in the decoded text, so where one is a stop string, its id is looked for.
    known = {stop: tokenizer.special_id(stop) for stop in {stop for one in settings for stop in one.until}}
    self._ids = [{*stop_ids, *(i for stop in one.until if (i := known[stop]) is not None)} for one in settings]

  def text(self, index: int, ids: Sequence[int]) -> tuple[str, bool]:
    """Return the text of a response up to its end, and whether the end was reached."""
    kept = next((n for n, i in enumerate(ids) if i in self._ids[index]), len(ids))
    text = self._tokenizer.decode(list(ids[:kept]), skip_special=True)
    shown = cut_at_stop(text, self._settings[index].until)
    return shown, kept < len(ids) or len(shown) < len(text)


def generate(
  params: dict[str, Any],
  model: ModelConfig,
  mesh: Mesh,
  tokenizer: Tokenizer,
  stop_ids: Sequence[int],
  prompts: Sequence[Sequence[int]],
  settings: Sequence[Settings],
  *,
  seed: int = 0,
  slots: int | None = None,
  progress: Callable[[int], None] = lambda done: None,
) -> list[Response]:
  """Return the responses to prompts, in order.

  Prompts with the same sampling and of similar length are decoded together, the longest first. Capacities are powers of two, so that few
  shapes are compiled.

  Args:
    params: of a `LanguageModel`, on the mesh.
    model: its shape, and how it is computed.
    mesh: of the parameters.
    tokenizer: of the model.
    stop_ids: tokens that end a response.
    prompts: token ids, at least one for each.
    settings: of each prompt.
    seed: of sampling. Equal prompts get different samples.
    slots: most responses decoded at a time; None: 64, or fewer if their keys and values would take more than 8 GiB.
    progress: receives the number of responses that are done.
  """
  out: dict[int, Response] = {}
  for number, members in enumerate(_together(prompts, settings, slots or _SLOTS)):
    one = settings[members[0]]
    longest, most = max(len(prompts[i]) for i in members), max(settings[i].max_new for i in members)
    config = RolloutConfig(
      max_prompt=_power(longest),
      max_new=_power(most),
      temperature=one.temperature,
      top_p=one.top_p,
      top_k=one.top_k,
      max_concurrent=_concurrent(model, sharding.batch_shards(mesh), len(members), _power(longest) + _power(most), slots),
    )
    ending = Ending(tokenizer, stop_ids, [settings[i] for i in members])
    ended = lambda index, ids, ending=ending: ending.text(index, ids.tolist())[1]
    engine = RolloutEngine(model, mesh, config, stop_ids)
    asked = any(settings[i].until for i in members)
    limits = [settings[i].max_new for i in members]
    # By default accelerators multiply float32 matrices in TF32 or bfloat16.
    with jax.default_matmul_precision('highest') if model.compute_dtype == 'float32' else contextlib.nullcontext():
      rollouts = engine.generate(params, [prompts[i] for i in members], (seed, number), limits, ended if asked else None)
    for r, i in enumerate(members):
      length = int(rollouts.length_R[r])
      text, has_ended = ending.text(r, rollouts.tokens_RT[r, :length].tolist())
      out[i] = Response(text, length, has_ended)
    progress(len(out))
  return [out[i] for i in range(len(prompts))]


def _power(count: int) -> int:
  return 1 << (max(count, 1) - 1).bit_length()


def _together(prompts: Sequence[Sequence[int]], settings: Sequence[Settings], slots: int) -> list[list[int]]:
  """Return the prompts that are decoded together: by sampling, and by length as far as there are enough of them to fill the slots."""
  groups: dict[tuple[Any, ...], dict[int, list[int]]] = {}
  for i in sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i)):
    by_length = groups.setdefault(settings[i][2:], {})
    by_length.setdefault(max(_SHORTEST, _power(len(prompts[i]))), []).append(i)
  out = []
  for by_length in groups.values():
    few: list[int] = []
    for _, members in sorted(by_length.items()):  # the shortest first: a few prompts are decoded with the next longer ones
      few = members + few
      if len(few) >= slots:
        out.append(few)
        few = []
    if few:
      out.append(few)
  return out


def _concurrent(model: ModelConfig, shards: int, count: int, capacity: int, slots: int | None) -> int:
  """Return how many responses are decoded at a time."""
  if slots is not None:
    return sharding.round_up(min(slots, _power(count)), shards)
  size = np.dtype('float32').itemsize if model.compute_dtype == 'float32' else 2
  each = 2 * model.num_layers * model.num_kv_heads * model.head_dim * capacity * size
  return sharding.round_up(min(_SLOTS, _power(count), max(1, _CACHE_BYTES // each) * shards), shards)
