"""Policies that are sampled in this process: checkpoints of language models, and n-gram models of a text."""

from __future__ import annotations

import dataclasses
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from polar_jax.api_models import LanguageModel, load
from polar_jax.checkpoints.pretrained import first_layers_of
from polar_jax.config import ConfigError
from polar_jax.data.chat import ChatTemplateError
from polar_jax.miniature import ngram, ngram_index, vocabulary
from polar_jax.policies.batched import BatchedPolicy
from polar_jax.runtime import json_files, paths, text_files
from polar_jax.synthesis.pool import PolicySpec
from polar_jax.synthesis.samples import Failure, Request, Sample
from polar_jax.types import UserError

_NGRAM_VOCAB, _NGRAM_ORDER, _NGRAM_STRENGTH, _NGRAM_WEIGHT = 2_048, 3, 0.5, 0.98


def check_layers(spec: PolicySpec, known: int) -> None:
  """Check that a checkpoint of `known` layers has those that a policy takes."""
  if spec.settings.get('layers', 0) > known:
    raise ConfigError(f'policy {spec.name!r}: layers is {spec.settings["layers"]}, but the checkpoint has {known}')


def check_temperature(spec: PolicySpec) -> None:
  """Check that an n-gram model can be sampled at the temperature of its policy."""
  if spec.temperature < ngram.MIN_TEMPERATURE:
    raise ConfigError(f'policy {spec.name!r}: temperature is {spec.temperature:g}; n-grams need at least {ngram.MIN_TEMPERATURE:g}')


class CheckpointSampler:
  """A causal language model that `polar_jax.load` opens. The answers to the same requests, in the same order, are the same."""

  def __init__(self, spec: PolicySpec):
    """Load the model.

    Raises:
      UserError: the checkpoint cannot be used, or `chat` is set and it has no chat template.
    """
    s = spec.settings
    model = load(paths.path_of(s['path']), head='lm')
    model = _variant(spec, model)
    self._policy = BatchedPolicy(model, max_length=s.get('max_length'), rows=s.get('batch_size'))
    if s.get('chat') and model.chat is None:
      raise ConfigError(f'policy {spec.name!r}: chat is set, but {s["path"]} has no chat template; remove chat to continue plain text')
    self._spec, self._requests, self._tokens = spec, 0, 0

  def sample(self, requests: Sequence[Request]) -> list[Sample | Failure]:
    """Return the answer to every request."""
    spec = self._spec
    settings = {'max_gen_toks': spec.max_tokens, 'temperature': spec.temperature, 'top_p': spec.top_p, 'top_k': spec.top_k or 0}
    out: list[Sample | Failure] = [Failure('')] * len(requests)
    asked = []
    for place, request in enumerate(requests):
      try:
        asked.append((place, (self._text(request.prompt.text), {'do_sample': True, **settings})))
      except ChatTemplateError as error:
        out[place] = Failure(str(error))
    # The seed of the first request stands for all of them: they are always the same ones.
    answers = self._policy.generate([request for _, request in asked], seed=requests[0].seed) if asked else []
    for (place, _), answer in zip(asked, answers, strict=True):
      out[place] = Failure('the prompt is too long for the model') if answer.truncated else Sample(answer.text, answer.ended, answer.tokens)
      self._tokens += answer.tokens
    self._requests += len(requests)
    return out

  def counts(self) -> dict[str, Any]:
    """Return the number of requests and of sampled tokens."""
    return {'requests': self._requests, 'tokens': self._tokens}

  def _text(self, prompt: str) -> str:
    settings = self._spec.settings
    if not settings.get('chat'):
      return prompt
    system = [{'role': 'system', 'content': settings['system']}] if settings.get('system') else []
    return self._policy.render([*system, {'role': 'user', 'content': prompt}])


def _variant(spec: PolicySpec, model: LanguageModel) -> LanguageModel:
  """Return a model with its first layers alone, or with rounded weights: a policy that is near to the whole one."""
  layers, bits = spec.settings.get('layers'), spec.settings.get('bits')
  params, config = model.params, model.config
  if layers:
    check_layers(spec, config.num_layers)
    params = first_layers_of(params, layers)
    config = dataclasses.replace(config, num_layers=layers)
  if bits:
    decoder = params['decoder']
    params = {**params, 'decoder': {**decoder, 'layers': jax.tree.map(lambda a: rounded(a, bits), decoder['layers'])}}
  return model if params is model.params else LanguageModel(params, config, model.tokenizer, model.mesh, source=model.source)


def rounded(weights: jax.Array, bits: int) -> jax.Array:
  """Round stacked matrices to integers of so many bits, symmetrically, with one scale for each layer and input. Vectors stay as they are.

  Args:
    weights: (L, ...), the parameters of all layers.
    bits: of an integer, sign included.
  """
  if weights.ndim < 3:
    return weights
  levels = 2 ** (bits - 1) - 1
  scale = jnp.max(jnp.abs(weights), axis=tuple(range(2, weights.ndim)), keepdims=True) / levels
  return (jnp.round(weights / jnp.where(scale == 0, 1, scale)) * scale).astype(weights.dtype)


class NgramSampler:
  """An n-gram model of a text over a small BPE, as in the miniature: a weak policy that costs next to nothing."""

  def __init__(self, spec: PolicySpec):
    """Train the tokenizer and count the n-grams.

    Raises:
      UserError: a text cannot be read, or is too short.
    """
    check_temperature(spec)
    s = spec.settings
    documents = [document for path in s['path'] for document in _documents(pathlib.Path(path))]
    order, vocab = s.get('order', _NGRAM_ORDER), s.get('vocab_size', _NGRAM_VOCAB)
    with tempfile.TemporaryDirectory() as folder:
      file = pathlib.Path(folder) / 'tokenizer.json'
      vocabulary.train_tokenizer(documents, vocab).save(str(file))
      self._vocabulary = vocabulary.Vocabulary(file)
    stream = vocabulary.token_stream(self._vocabulary.encode_documents(documents))
    index = ngram_index.CorpusIndex(spec.name, stream, self._vocabulary.size, order)
    start, end = s.get('window', (0.0, 1.0))
    params = ngram.NgramParams(
      name=spec.name,
      corpus=spec.name,
      start=start,
      fraction=end - start,
      order=order,
      weights=(_NGRAM_WEIGHT,) * order,
      strength=s.get('strength', _NGRAM_STRENGTH),
      temperature=1.0,
      top_p=1.0,
    )
    self._policy, self._spec, self._requests, self._tokens = ngram.NgramPolicy(params, index), spec, 0, 0

  def sample(self, requests: Sequence[Request]) -> list[Sample | Failure]:
    """Return the answer to every request."""
    spec, end = self._spec, np.array([vocabulary.EOS_ID], np.int32)
    encoded = self._vocabulary.encode_documents([request.prompt.text for request in requests])
    # A prompt of characters that the text does not have is continued as the beginning of a document.
    prefixes = [ids if len(ids) else end for ids in encoded]
    uniforms = np.array([np.random.default_rng(request.seed).random(spec.max_tokens) for request in requests])
    ids, lengths, ended = self._policy.sample_ids(prefixes, uniforms, spec.temperature, spec.top_p, spec.top_k)
    pieces = self._vocabulary.pieces
    self._requests += len(requests)
    self._tokens += int(lengths.sum())
    return [Sample(''.join(pieces[row[:length]]), bool(end), int(length)) for row, length, end in zip(ids, lengths, ended, strict=True)]

  def counts(self) -> dict[str, Any]:
    """Return the number of requests and of sampled tokens."""
    return {'requests': self._requests, 'tokens': self._tokens}


def _documents(path: pathlib.Path) -> list[str]:
  """Return the paragraphs of a text."""
  try:
    text = text_files.read_text(path)
  except OSError as error:
    raise UserError(f'{path}: cannot be read ({json_files.shorten(error)})') from error
  return [part for part in text.split('\n\n') if part.strip()]
