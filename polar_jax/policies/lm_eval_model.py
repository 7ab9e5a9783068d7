"""A language model of this project as a model of lm-eval (`pip install -e '.[lm_eval]'`).

  import lm_eval, polar_jax
  from polar_jax.policies.lm_eval_model import Policy
  lm_eval.simple_evaluate(model=Policy(polar_jax.load('DIR')), tasks=['gsm8k'])

`python -m polar_jax.policies run --model polar_jax --model_args path=DIR --tasks gsm8k` is the command `lm_eval` with this model.
"""

from __future__ import annotations

import collections
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model

from polar_jax import api_models
from polar_jax.api_models import LanguageModel
from polar_jax.config import ConfigError
from polar_jax.policies import generation
from polar_jax.policies.batched import BatchedPolicy
from polar_jax.runtime.progress import Progress

NAME = 'polar_jax'
_LINES = 10  # of progress, for each kind of requests


@register_model(NAME)
class Policy(TemplateLM):
  """Answers the requests of lm-eval with a language model of this project.

  In a run of several processes each of them answers all requests, together with the others.

  Attributes:
    truncated: number of requests of each task whose context was cut on the left, because it was longer than the model allows.
    requests: number of requests of each task.
  """

  def __init__(
    self,
    model: LanguageModel | str | pathlib.Path | None = None,
    *,
    path: str | pathlib.Path | None = None,
    tokenizer: str | None = None,
    dtype: str | None = None,
    max_length: int | None = None,
    max_gen_toks: int = generation.MAX_NEW,
    add_bos_token: bool | None = None,
    prefix_token_id: int | None = None,
    batch_size: int | str | None = None,
    max_batch_size: int | None = None,
    device: str | None = None,
    seed: int = 0,
  ):
    """Take a loaded model, or load one.

    Args:
      model: a language model, or its path.
      path: of a run folder, a Hugging Face folder, or a GGUF or llama2.c file, in place of `model`.
      tokenizer: path of a tokenizer; None: the checkpoint's.
      dtype: 'float32' or 'bfloat16', for parameters and computation; None: parameters as stored, computation in float32.
      max_length: tokens that the model reads at a time, responses included; None: as many as it is made for.
      max_gen_toks: most tokens of a response, where a task does not say.
      add_bos_token: put a BOS before every text; None: what the model's own tokenizer does.
      prefix_token_id: id that precedes a text without context; None: the BOS, or else the EOS.
      batch_size: rows of a batch, and responses decoded at a time; None or 'auto': as many as fill the device.
      max_batch_size: the same with `batch_size` 'auto', as a limit.
      device: of torch, which the command of lm-eval always names. Unused: JAX chooses the devices (JAX_PLATFORMS).
      seed: of sampling.

    Raises:
      UserError: the checkpoint cannot be used, or a setting does not fit it.
    """
    super().__init__()
    given = model if model is not None else path
    if given is None or (model is not None and path is not None):
      raise ConfigError('name one language model: --model_args path=DIR, or Policy(model)')
    if not isinstance(given, LanguageModel):
      given = api_models.load(given, head='lm', dtype=dtype, tokenizer=tokenizer)
    elif dtype is not None or tokenizer is not None:
      raise ConfigError('dtype and tokenizer are those of the given model; pass them to load(...)')
    self.max_gen_toks, self.batch_size = max_gen_toks, batch_size or 'auto'
    self.policy = BatchedPolicy(
      given,
      max_length=max_length,
      add_bos=add_bos_token,
      prefix_id=prefix_token_id,
      rows=_rows(batch_size, max_batch_size),
      seed=seed,
    )
    self.truncated: collections.Counter[str] = collections.Counter()
    self.requests: collections.Counter[str] = collections.Counter()

  @property
  def max_length(self) -> int:
    """Tokens that the model reads at a time."""
    return self.policy.max_length

  @property
  def eot_token_id(self) -> int:
    """The token that ends a text."""
    eos = self.policy.tokenizer.eos_id
    return self.policy.model.stop_ids[0] if eos is None else eos

  @property
  def prefix_token_id(self) -> int:
    """The token before a text without context."""
    return self.policy.encoder.prefix_id

  @property
  def tokenizer_name(self) -> str:
    """Name of the tokenizer, which distinguishes the requests that lm-eval keeps in its cache."""
    source = self.policy.model.source
    return 'memory' if source is None else str(source.path).replace('/', '__')

  def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
    """Return the token ids of a text."""
    return self.policy.encoder.encode(string, add_special_tokens)

  def tok_decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
    """Return the text of token ids."""
    return self.policy.tokenizer.decode(list(tokens), skip_special=skip_special_tokens)

  def chat_template(self, chat_template: bool | str = False) -> str | None:
    """Return the source of the model's chat template; None if none is asked for.

    Raises:
      ConfigError: the model has none, or one is asked for by name.
    """
    if not chat_template:
      return None
    if isinstance(chat_template, str):
      raise ConfigError(f'apply_chat_template is {chat_template!r}, but templates have no names here: leave the name out')
    chat = self.policy.model.chat
    if chat is None:
      raise ConfigError('the model has no chat template, so it reads plain text: leave out apply_chat_template')
    return chat.source

  def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
    """Return a conversation as text; without `add_generation_prompt` its last message is to be continued."""
    return self.policy.render(chat_history, add_generation_prompt)

  def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
    """Return (log-likelihood, whether greedy decoding gives it) of each continuation."""
    given = self._given(requests)
    found = self.policy.likelihoods(given, _progress('loglikelihood', len(given), disable_tqdm))
    self._count_truncated(requests, [one.truncated for one in found])
    answers = [(one.logprob, one.greedy) for one in found]
    self._keep('loglikelihood', given, answers)
    return answers

  def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
    """Return the log-likelihood of each text."""
    given = self._given(requests)
    answers = self.policy.rolling([text for (text,) in given])
    self._keep('loglikelihood_rolling', given, answers)
    return answers

  def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
    """Return a response to each prompt."""
    given = self._given(requests)
    found = self.policy.generate(given, self.max_gen_toks, _progress('generate_until', len(given), disable_tqdm))
    self._count_truncated(requests, [one.truncated for one in found])
    answers = [one.text for one in found]
    self._keep('generate_until', given, answers)
    return answers

  def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
    # Abstract in TemplateLM, and called by its `loglikelihood` alone, which is overridden.
    raise NotImplementedError('requests are tokenized by `loglikelihood`')

  def _given(self, requests: Sequence[Instance]) -> list[tuple[Any, ...]]:
    """Return the arguments of requests, and count them."""
    self.requests.update(request.task_name or '' for request in requests)
    return [request.args for request in requests]

  def _count_truncated(self, requests: Sequence[Instance], truncated: Sequence[bool]) -> None:
    self.truncated.update(request.task_name or '' for request, cut in zip(requests, truncated, strict=True) if cut)

  def _keep(self, kind: str, requests: Sequence[tuple[Any, ...]], answers: Sequence[Any]) -> None:
    """Put answers into the cache of lm-eval (`use_cache`), if it is on."""
    for request, answer in zip(requests, answers, strict=True):
      self.cache_hook.add_partial(kind, request, answer)


def _rows(batch_size: int | str | None, max_batch_size: int | None) -> int | None:
  """Return the most rows of a batch, None if they are not limited.

  Raises:
    ConfigError: the size is no number.
  """
  if batch_size is None or str(batch_size).startswith('auto'):
    return max_batch_size
  try:
    return int(batch_size)
  except ValueError as error:
    raise ConfigError(f"batch_size is {batch_size!r}; it must be a number or 'auto'") from error


def _progress(name: str, total: int, quiet: bool) -> Callable[[int], None]:
  """Return a function that shows how many requests are done."""
  if quiet or not total:
    return lambda done: None
  progress, shown = Progress(name, total, 0, unit='request'), 0

  def show(done: int) -> None:
    nonlocal shown
    due = done * _LINES // total > shown
    shown = done * _LINES // total
    progress.show(done, {}, line=due)
    if done >= total:
      progress.close()

  return show
