"""Rewards from a Python function with the signature of TRL's reward functions."""

from __future__ import annotations

import contextlib
import copy
import importlib
import inspect
import operator
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from polar_jax.config import ConfigError
from polar_jax.ppo.rewards.sources import RewardError, check_rewards, score_on_first_process, shorten
from polar_jax.types import Prompt

# Keyword arguments that a function may take in addition to `prompts` and `completions`, and the field of a prompt that each holds.
COLUMNS: Mapping[str, Callable[[Prompt], Any]] = {
  'reference': lambda prompt: copy.deepcopy(prompt.reference),
  'answer': lambda prompt: prompt.answer,
  'category': lambda prompt: prompt.category,
  'metadata': lambda prompt: copy.deepcopy(dict(prompt.metadata)),
}


class RewardFunctionError(RewardError):
  """A reward function raised an exception, or did not return one finite number per completion. The message is one line."""


class PythonReward:
  """Rewards computed by a Python function.

  The function is called as TRL calls its own, `function(prompts=..., completions=..., **columns)`, with lists of equal length, and
  returns one finite number per completion. Where a prompt is a string, so is its completion; where a prompt is a list of messages,
  its completion is `[{'role': 'assistant', 'content': ...}]`. The columns are `reference`, `answer`, `category` and `metadata` of
  each prompt. A function without `**kwargs` gets only those arguments that it names.

  In a run of several processes only the first calls the function, and all of them get its rewards.

  Args:
    function: any callable but a class.
    name: what error messages call it; None: its module and qualified name.

  Raises:
    ConfigError: the function cannot be called with these arguments.
  """

  def __init__(self, function: Callable[..., Any], name: str | None = None):
    self.name = name or _name_of(function)
    if not callable(function) or isinstance(function, type):
      raise ConfigError(f'reward function {self.name} is {_kind(function)}, not a function; pass a function or another callable object')
    self._function, self._arguments = function, _arguments_of(function, self.name)

  def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> np.ndarray:
    """Return rewards (n,), float32.

    Raises:
      RewardFunctionError: the function raised an exception, or its result is not one finite number per completion.
    """
    if len(prompts) != len(responses):
      raise ValueError(f'{len(prompts)} prompts and {len(responses)} completions: there must be one prompt per completion')
    if not responses:
      return np.zeros(0, np.float32)
    failed = RewardFunctionError(f'reward function {self.name} failed on the first process; see its log')
    rewards = score_on_first_process(lambda: self._call(prompts, responses), len(responses), RewardFunctionError, failed)
    return check_rewards(rewards, f'reward function {self.name}', prompts, responses)

  def _call(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> np.ndarray:
    arguments: dict[str, list[Any]] = {
      'prompts': [copy.deepcopy(prompt.prompt) for prompt in prompts],
      'completions': [_completion(prompt, response) for prompt, response in zip(prompts, responses, strict=True)],
    }
    arguments |= {name: [value_of(prompt) for prompt in prompts] for name, value_of in COLUMNS.items()}
    try:
      result = self._function(**{name: arguments[name] for name in self._arguments})
      values = None if isinstance(result, str | bytes | Mapping) or not isinstance(result, Iterable) else list(result)
    except Exception as error:
      logging.error('reward function %s raised an exception\n%s', self.name, traceback.format_exc())
      raise RewardFunctionError(
        f'reward function {self.name} raised {_one_line(error)} ({_origin(error)}); fix it, then repeat the command: the run continues '
        'from its last checkpoint'
      ) from error
    if values is None:
      raise RewardFunctionError(
        f'reward function {self.name} returned {_kind(result)}; it must return a list with one number per completion'
      )
    if len(values) != len(responses):
      first = f'completion {len(values)} has none' if len(values) < len(responses) else f'the last completion is {len(responses) - 1}'
      raise RewardFunctionError(
        f'reward function {self.name} returned {len(values)} rewards for {len(responses)} completions ({first}); it must return one number '
        'per completion, in their order'
      )
    return np.array([self._number(i, value, prompts[i], responses[i]) for i, value in enumerate(values)], np.float32)

  def _number(self, i: int, value: Any, prompt: Prompt, response: str) -> np.float32:
    """Return a reward in float32, or refuse anything but a finite number."""
    reward = np.float32(np.nan)
    if not isinstance(value, str | bytes):
      with contextlib.suppress(TypeError, ValueError, OverflowError), np.errstate(over='ignore'):
        reward = np.float32(float(value) if np.ndim(value) == 0 else np.nan)  # too large for float32: infinite
    if not np.isfinite(reward):
      raise RewardFunctionError(
        f'reward function {self.name} returned {shorten(repr(value))} for completion {i} {shorten(response)} '
        f'(prompt {shorten(prompt.prompt)}); it must return a finite number for every completion'
      )
    return reward


def load_function(path: str) -> Callable[..., Any]:
  """Import the function that `rft.reward.function` names as 'module:name', also from the current directory.

  Raises:
    ConfigError: the module cannot be imported, has no such attribute, or the attribute cannot be called.
  """
  module_name, _, attribute = path.partition(':')
  if not module_name or not attribute:
    raise ConfigError(f"rft.reward.function is {path!r}; set it to 'module:name', for example my_rewards:exact_match")
  setting, folder = f'rft.reward.function={path}', os.getcwd()
  if folder not in sys.path and '' not in sys.path:
    sys.path.insert(0, folder)  # `python -m` adds it by itself, the installed command does not
  importlib.invalidate_caches()
  try:
    module = importlib.import_module(module_name)
  except Exception as error:
    missing = error.name if isinstance(error, ModuleNotFoundError) else None
    if missing is not None and f'{module_name}.'.startswith(f'{missing}.'):
      raise ConfigError(
        f'{setting}: there is no module {missing!r} in {folder} or on the Python path; start the command in the folder that holds it, or '
        'add that folder to PYTHONPATH'
      ) from error
    raise ConfigError(f'{setting}: importing {module_name} raised {_one_line(error)} ({_origin(error)}); fix the module') from error
  try:
    function = operator.attrgetter(attribute)(module)
  except AttributeError as error:
    file = getattr(module, '__file__', None) or 'built in'
    raise ConfigError(f'{setting}: module {module_name} ({file}) has no {attribute!r}; name a function that it defines') from error
  if not callable(function) or isinstance(function, type):
    raise ConfigError(f'{setting}: it is {_kind(function)}, not a function; name a function or another callable object')
  return function


def _arguments_of(function: Callable[..., Any], name: str) -> tuple[str, ...]:
  """Return which arguments a function takes.

  Raises:
    ConfigError: it requires others.
  """
  known = ('prompts', 'completions', *COLUMNS)
  try:
    parameters = inspect.signature(function).parameters.values()
  except (TypeError, ValueError):  # some callables written in C have no signature
    return known
  keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
  variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
  required = [p for p in parameters if p.default is p.empty and p.kind not in variadic]
  unknown = [p.name for p in required if p.name not in known or p.kind not in keyword]
  if unknown:
    raise ConfigError(
      f'reward function {name} requires the argument {unknown[0]!r}; it is called with the keyword arguments {", ".join(known)}: take '
      'those, or give other arguments a default'
    )
  if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
    return known
  named = {p.name for p in parameters if p.kind in keyword}
  return tuple(argument for argument in known if argument in named)


def _completion(prompt: Prompt, response: str) -> str | list[dict[str, str]]:
  return response if isinstance(prompt.prompt, str) else [{'role': 'assistant', 'content': response}]


def _name_of(function: Any) -> str:
  name = getattr(function, '__qualname__', None) or type(function).__qualname__
  return f'{getattr(function, "__module__", None) or type(function).__module__}:{name}'


def _kind(value: Any) -> str:
  """Return the type of a value for messages, with an article."""
  name = 'class' if isinstance(value, type) else type(value).__name__
  return 'None' if value is None else f'{"an" if name[0].lower() in "aeiou" else "a"} {name}'


def _one_line(error: BaseException) -> str:
  return f'{type(error).__name__}: {" ".join(str(error).split())}'.removesuffix(': ')


def _origin(error: BaseException) -> str:
  """Return file and line of the innermost frame that raised an error; for a SyntaxError, of the faulty line."""
  if isinstance(error, SyntaxError) and error.filename:
    return f'{error.filename}, line {error.lineno}'
  frame = traceback.extract_tb(error.__traceback__)[-1]
  return f'{frame.filename}, line {frame.lineno}'
