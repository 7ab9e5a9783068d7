"""Texts of benchmark requests as token ids, and what is left of them within the length of a model.

These are the conventions of lm-eval for causal language models. Everything that makes its numbers differ between programs is here: the BOS,
the boundary between a context and its continuation, the cut at the left of what is too long, and the windows of a long text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from polar_jax.config import ConfigError
from polar_jax.data.tokenizer import Tokenizer
from polar_jax.types import UserError

_SHOWN = 60  # characters of a text in a message


class Pair(NamedTuple):
  """Token ids whose tail is scored.

  Attributes:
    context: at least one id.
    scored: at least one id, each of which the ids before it predict.
    truncated: whether ids at the left are left out.
  """

  context: tuple[int, ...]
  scored: tuple[int, ...]
  truncated: bool = False


class Encoder:
  """Turns the texts of requests into token ids.

  Attributes:
    tokenizer: of the model.
    prefix_id: predicts the first token of a text that nothing precedes: the BOS, or else the EOS.
  """

  def __init__(self, tokenizer: Tokenizer, *, add_bos: bool | None = None, prefix_id: int | None = None):
    """Check the settings.

    Args:
      tokenizer: of the model.
      add_bos: put a BOS before every text; None: what the model's own tokenizer does.
      prefix_id: see `prefix_id`; None: the tokenizer's BOS, or else its EOS.

    Raises:
      ConfigError: the tokenizer lacks the token.
    """
    self.tokenizer = tokenizer
    own = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    chosen = own if prefix_id is None else prefix_id
    if chosen is None:
      raise ConfigError('the tokenizer has neither a BOS nor an EOS to put before a text without context; set prefix_token_id')
    if not 0 <= chosen < tokenizer.vocab_size:
      raise ConfigError(f'prefix_token_id is {chosen}; it must be an id of the tokenizer, less than {tokenizer.vocab_size}')
    if add_bos and tokenizer.bos_id is None:
      raise ConfigError('add_bos_token is set, but the tokenizer has no BOS; leave it out')
    self.prefix_id = chosen
    self._prefix = tokenizer.prefix_ids if add_bos is None else (tokenizer.bos_id,) if add_bos else ()
    self._written = tokenizer.decode([chosen], skip_special=False)

  def encode(self, text: str, add_special: bool | None = None) -> list[int]:
    """Return the token ids of a text.

    Args:
      text: may begin with the string of the prefix token, as the output of many chat templates does; then it gets no second one.
      add_special: put the BOS before it; None: if the settings say so, and the text does not begin with it.
    """
    if add_special is None:
      add_special = not (self._written and text.startswith(self._written))
    ids = self.tokenizer.encode(text)
    return [*self._prefix, *ids] if add_special else ids

  def pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Return the token ids of a context and of its continuation.

    Spaces at the end of the context count as the beginning of the continuation, because most tokenizers join a space with the word after
    it. Both texts are tokenized as one, and the continuation is what exceeds the tokens of the context alone.

    Raises:
      UserError: the continuation has no token of its own.
    """
    if not context:
      ids = self.encode(continuation, add_special=False)
      known, scored = ([self.prefix_id], ids) if ids[:1] != [self.prefix_id] else (ids[:1], ids[1:])
    else:
      bare = context.rstrip()
      known = self.encode(bare)
      scored = self.encode(context + continuation)[len(known) :]
      known = known or [self.prefix_id]
    if not scored:
      raise UserError(
        f'the continuation {continuation[:_SHOWN]!r} of {context[-_SHOWN:]!r} has no token of its own, so that it has no likelihood; '
        'change the text of the task'
      )
    return known, scored


def cut(context: Sequence[int], scored: Sequence[int], max_length: int) -> Pair:
  """Return a context and its continuation without what is left of the `max_length` tokens that predict.

  Raises:
    UserError: the continuation alone is longer.
  """
  if len(scored) > max_length:
    raise UserError(f'a continuation has {len(scored)} tokens, more than max_length={max_length}; raise it, if the model allows more')
  room = max_length + 1 - len(scored)  # the last token is only ever predicted
  return Pair(tuple(context[-room:]), tuple(scored), len(context) > room)


def windows(ids: Sequence[int], prefix_id: int, max_length: int) -> list[Pair]:
  """Divide a text into pieces that are each predicted with at most `max_length` tokens. Every token is scored once.

  The first piece has the prefix token as its context. Each other one has the token before it, and the last one as many more as there is
  room for.

  Args:
    ids: of the text; none give no piece.
    prefix_id: precedes the text.
    max_length: tokens that the model reads at a time.
  """
  out = []
  for low in range(0, len(ids), max_length):
    high = min(low + max_length, len(ids))
    start = high - max_length - 1
    out.append(Pair(tuple(ids[start:low]) if low else (prefix_id,), tuple(ids[low:high])))
  return out


def cut_at_stop(text: str, stops: Sequence[str]) -> str:
  """Return a text up to the first of some strings; an empty string is none."""
  found = [at for stop in stops if stop and (at := text.find(stop)) >= 0]
  return text[: min(found)] if found else text
