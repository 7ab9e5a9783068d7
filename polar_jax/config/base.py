"""The error of a bad setting, and the declaration of an option: its default, its help text and the values that it may take."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from polar_jax.types import UserError


class ConfigError(UserError):
  """A setting is unknown, has the wrong type or is outside its allowed values. The message is one line for the user."""


@dataclasses.dataclass(frozen=True)
class OptionInfo:
  """The declaration of an option, apart from its name, type and default.

  Attributes:
    help: One line: what the option does, in which unit, and what None means.
    choices: The allowed values; None if any value of the option's type is allowed.
    min: The smallest allowed value.
    exclusive_min: A bound that a value must exceed.
    max: The largest allowed value.
  """

  help: str
  choices: tuple[str, ...] | None = None
  min: float | None = None
  exclusive_min: float | None = None
  max: float | None = None

  def allowed(self) -> str:
    """Return the choices or bounds for people to read, an empty string if there are none."""
    if self.choices:
      return ', '.join(self.choices)
    bounds = (('>=', self.min), ('>', self.exclusive_min), ('<=', self.max))
    return ', '.join(f'{sign} {bound}' for sign, bound in bounds if bound is not None)


_INFO = 'option'


def option(
  default: Any,
  help: str,
  *,
  choices: tuple[str, ...] | None = None,
  min: float | None = None,
  exclusive_min: float | None = None,
  max: float | None = None,
) -> Any:
  """Declare an option: a dataclass field with a help text and the bounds that `parse` enforces.

  Args:
    default: The default value.
    help: One sentence on what the option does.
    choices: The allowed values. None: any.
    min: Smallest allowed value. None: no bound.
    exclusive_min: Bound that the value must exceed. None: no bound.
    max: Largest allowed value. None: no bound.
  """
  return dataclasses.field(default=default, metadata={_INFO: OptionInfo(help, choices, min, exclusive_min, max)})


def section(default: Any, help: str | None = None) -> Any:
  """Declare a section: a dataclass field whose default is a dataclass.

  Args:
    default: The section with its defaults.
    help: What the section is for, if the class serves several sections; None takes the first paragraph of the class's docstring.
  """
  text = help or ' '.join((type(default).__doc__ or '').split('\n\n')[0].split())
  return dataclasses.field(default=default, metadata={_INFO: OptionInfo(text)})


def info(metadata: Mapping[str, Any]) -> OptionInfo:
  """Return what `option` or `section` declared in the metadata of a dataclass field."""
  return metadata[_INFO]
