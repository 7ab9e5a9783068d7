"""A language model that answers the three kinds of requests of benchmarks, many at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from polar_jax.api_models import LanguageModel
from polar_jax.config import ConfigError
from polar_jax.data.chat import ChatTemplateError
from polar_jax.policies import encoding, generation, likelihood
from polar_jax.policies.encoding import Encoder, Pair
from polar_jax.types import UserError

_CONTINUE = 'continue-here-7f3a'  # a text that no template and no message has


class Scored(NamedTuple):
  """The answer to a request for the likelihood of a continuation."""

  logprob: float  # in nats
  greedy: bool  # whether greedy decoding would give the continuation
  truncated: bool  # whether the context was cut


class Generated(NamedTuple):
  """The answer to a request for a response."""

  text: str
  truncated: bool  # whether the prompt was cut
  tokens: int  # that were sampled
  ended: bool  # by the model or a stop string; False: the limit of its length was reached


class BatchedPolicy:
  """A language model with the settings that decide what it reads.

  Args:
    model: the policy.
    max_length: tokens that it reads at a time, responses included; None: as many as the model is made for.
    add_bos: put a BOS before every text; None: what the model's own tokenizer does.
    prefix_id: precedes a text without context; None: the tokenizer's BOS, or else its EOS.
    rows: most rows of a batch of likelihoods, and most responses that are decoded at a time; None: as many as fill the device.
    seed: of sampling.

  Raises:
    UserError: the model has no tokenizer, or a setting does not fit it.
  """

  def __init__(
    self,
    model: LanguageModel,
    *,
    max_length: int | None = None,
    add_bos: bool | None = None,
    prefix_id: int | None = None,
    rows: int | None = None,
    seed: int = 0,
  ):
    if model.tokenizer is None:
      raise UserError('the language model has no tokenizer; pass one to load(..., tokenizer=...)')
    if max_length is not None and max_length < 2:
      raise ConfigError(f'max_length is {max_length}; it must be at least 2')
    if rows is not None and rows < 1:
      raise ConfigError(f'the batch size is {rows}; it must be at least 1')
    self.model, self.tokenizer, self._rows, self._seed = model, model.tokenizer, rows, seed
    self.max_length = max_length or model.config.max_position
    self.encoder = Encoder(model.tokenizer, add_bos=add_bos, prefix_id=prefix_id)

  def likelihoods(self, requests: Sequence[tuple[str, str]], progress: Callable[[int], None] = lambda done: None) -> list[Scored]:
    """Return the log-likelihood of each continuation given its context.

    Args:
      requests: (context, continuation). An empty context is the prefix token.
      progress: receives the number of requests that are done.

    Raises:
      UserError: a continuation has no token, or more than `max_length`; the message names the request.
    """
    pairs = []
    for number, (context, continuation) in enumerate(requests):
      try:
        pairs.append(encoding.cut(*self.encoder.pair(context, continuation), self.max_length))
      except UserError as error:
        raise UserError(f'request {number}: {error}') from error
    found = self._likelihoods(pairs, progress)
    return [Scored(float(p), bool(g), pair.truncated) for p, g, pair in zip(found.logprob, found.greedy, pairs, strict=True)]

  def rolling(self, texts: Sequence[str], progress: Callable[[int], None] = lambda done: None) -> list[float]:
    """Return the log-likelihood of each whole text, in windows of `max_length`; 0 for a text without tokens.

    Args:
      texts: any number of texts.
      progress: receives the number of windows that are done.
    """
    pieces = [encoding.windows(self.encoder.encode(text), self.encoder.prefix_id, self.max_length) for text in texts]
    found = self._likelihoods([pair for piece in pieces for pair in piece], progress).logprob.tolist()
    out, low = [], 0
    for piece in pieces:
      out.append(float(sum(found[low : low + len(piece)])))
      low += len(piece)
    return out

  def generate(
    self,
    requests: Sequence[tuple[str, Mapping[str, Any]]],
    max_new: int = generation.MAX_NEW,
    progress: Callable[[int], None] = lambda done: None,
    seed: int | None = None,
  ) -> list[Generated]:
    """Return a response to each prompt.

    Args:
      requests: (prompt, settings), see `generation.settings_of`. A prompt that leaves no room for the response loses its beginning.
      max_new: most tokens of a response, where the settings do not say.
      progress: receives the number of requests that are done.
      seed: of sampling; None: that of the policy.

    Raises:
      UserError: settings are not supported, or leave no room for a prompt; the message names the request.
    """
    prompts, settings, truncated = list[list[int]](), list[generation.Settings](), list[bool]()
    for number, (prompt, given) in enumerate(requests):
      try:
        one = generation.settings_of(given, max_new)
      except UserError as error:
        raise UserError(f'request {number}: {error}') from error
      room = self.max_length - one.max_new
      if room < 1:
        raise UserError(
          f'request {number}: a response of {one.max_new} tokens leaves no room for a prompt in max_length={self.max_length}; '
          'ask for shorter responses (max_gen_toks)'
        )
      ids = self.encoder.encode(prompt) or [self.encoder.prefix_id]
      prompts.append(ids[-room:])
      settings.append(one)
      truncated.append(len(ids) > room)
    model = self.model
    responses = generation.generate(
      model.params,
      model.config,
      model.mesh,
      self.tokenizer,
      model.stop_ids,
      prompts,
      settings,
      seed=self._seed if seed is None else seed,
      slots=self._rows,
      progress=progress,
    )
    return [Generated(one.text, cut, one.tokens, one.ended) for one, cut in zip(responses, truncated, strict=True)]

  def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
    """Return a conversation as text, through the model's chat template.

    A template that refuses system messages gets the others alone.

    Args:
      messages: with `role` and `content`.
      add_generation_prompt: end with the header of a response; False: end within the last message, to be continued.

    Raises:
      ConfigError: the model has no chat template.
      ChatTemplateError: the template refuses the messages.
    """
    chat = self.model.chat
    if chat is None:
      raise ConfigError('the model has no chat template, so it reads plain text: leave out apply_chat_template')
    given = [dict(message) for message in messages]
    if not add_generation_prompt and given:
      given[-1]['content'] = f'{given[-1]["content"]}{_CONTINUE} '
    try:
      text = chat.render(given, add_generation_prompt)
    except ChatTemplateError:
      others = [message for message in given if message.get('role') != 'system']
      if not others or len(others) == len(given):
        raise
      text = chat.render(others, add_generation_prompt)
    if add_generation_prompt or not given:
      return text
    before, mark, after = text.rpartition(_CONTINUE)
    if not mark:
      raise ChatTemplateError(f'{chat.where}: leaves out a part of the last message, so that it cannot be continued')
    # A template that strips contents would strip this one too, if it ended here.
    return before if after.startswith(' ') else before.rstrip()

  def _likelihoods(self, pairs: Sequence[Pair], progress: Callable[[int], None]) -> likelihood.Likelihoods:
    model = self.model
    return likelihood.log_likelihoods(model.params, model.config, model.mesh, pairs, max_rows=self._rows, progress=progress)
