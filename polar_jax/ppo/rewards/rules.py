"""Rules that judge a response without a model, for prompts whose answer is known."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
import threading
from collections.abc import Callable, Mapping
from typing import Any

from polar_jax.ppo.rewards.last_number import last_number

_WORD = re.compile(r'(?<![\\a-zA-Z])[a-zA-Z]{3,}')  # not a command of LaTeX


class NoAnswerError(ValueError):
  """The answer that a response is compared with has nothing that the rule can read."""


def same_last_number(response: str, answer: str) -> bool:
  """Return whether the last numbers of a response and of an answer are equal as exact values: `0.50` is `1/2`, not `0.5000001`.

  If one of the two ends in something that `last_number` does not read, such as a root or an interval, math-verify compares them where it
  is installed; elsewhere such a response is wrong.

  Raises:
    NoAnswerError: the answer has no number.
  """
  expected, found = last_number(answer), last_number(response)
  if expected is not None and found is not None:
    return found == expected
  math_verify = _math_verify()
  if math_verify is not None:
    return _verify(math_verify, response, answer)
  if expected is None:
    raise NoAnswerError(
      "its answer has no number that the rule last_number reads; formulas need math-verify (pip install 'math-verify>=0.8')"
    )
  return False


@functools.cache
def _math_verify() -> Any:
  """Return the package, or None if it is not installed."""
  return importlib.import_module('math_verify') if importlib.util.find_spec('math_verify') else None


def _verify(math_verify: Any, response: str, answer: str) -> bool:
  """Return the judgment of math-verify. It limits its time by a signal, which only a main thread can receive."""
  seconds = 5 if threading.current_thread() is threading.main_thread() else None
  parse = functools.partial(math_verify.parse, parsing_timeout=seconds)
  # It reads formulas only between dollars; of bare ones it would read a part.
  is_formula = '$' not in answer and not _WORD.search(answer)
  expected = parse(f'${answer}$' if is_formula else answer)
  if not expected:
    raise NoAnswerError('its answer has nothing that the rule last_number or math-verify can read')
  return bool(math_verify.verify(expected, parse(response), timeout_seconds=seconds))


RULES: Mapping[str, Callable[[str, str], bool]] = {'last_number': same_last_number}
