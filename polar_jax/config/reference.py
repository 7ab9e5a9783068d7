"""The reference of all options, as text of --help and as docs/options.md. Both are read off the dataclasses."""

from __future__ import annotations

import dataclasses
import textwrap
import typing
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from polar_jax.config.base import ConfigError, OptionInfo, info
from polar_jax.config.parsing import plain_type
from polar_jax.config.root import Config
from polar_jax.config.stages import ALL_HELP, EVERY_STAGE_READS, STAGE_TABLE, STAGES

_WIDTH = 110
_USAGE = """\
usage: python -m polar_jax --config=FILE [--config.SECTION.NAME=VALUE ...] [--workdir=FOLDER]
       python -m polar_jax --help [STAGE, SECTION or SECTION.NAME ...]

  --config=FILE      Config file, for example configs/tiny.py.
  --workdir=FOLDER   Where the run is written, and from where the same command resumes it. Default: runs/<name of the config file>.
  --help             This text, or the part of it on the given stages, sections and options.
  --helpfull         The flags of absl, such as --verbosity.
"""
_MARKDOWN = """\
# Options

Every option of polar_jax. A config file sets them as `config.section.name = value`, the command line as `--config.section.name=value`;
`python -m polar_jax --help` prints this reference in a terminal. This file is generated: `python -m polar_jax.config > docs/options.md`.

## Stages

`--config.stage` is one of these, or several separated by commas. A setting on the command line that no requested stage reads is refused.
Every stage reads {common}; `plan` also reads what the planned stage reads.

{stages}
"""


class Option(NamedTuple):
  """An option as the reference shows it."""

  name: str  # within its section
  type: str
  default: Any
  info: OptionInfo


class Section(NamedTuple):
  """A section with its own options; those of the sections in it follow in sections of their own."""

  name: str  # dotted; '' for the options that are in no section
  help: str
  options: list[Option]


def sections() -> list[Section]:
  """Return all sections in the order of `Config`."""
  return list(_sections(Config(), '', 'Options of the whole run.'))


def _sections(section: Any, name: str, help: str) -> Iterator[Section]:
  hints = typing.get_type_hints(type(section))
  options, inner = [], list[tuple[Any, str, str]]()
  for f in dataclasses.fields(section):
    value, about = getattr(section, f.name), info(f.metadata)
    if dataclasses.is_dataclass(value):
      inner.append((value, f'{name}.{f.name}'.lstrip('.'), about.help))
    else:
      options.append(Option(f.name, _type_name(hints[f.name]), value, about))
  yield Section(name, help, options)
  for part in inner:
    yield from _sections(*part)


def _type_name(hint: Any) -> str:
  if typing.get_origin(hint) is tuple:
    return f'tuple of {typing.get_args(hint)[0].__name__}'
  kind, optional = plain_type(hint)
  return f'{kind.__name__} or None' if optional else kind.__name__


def help_text(names: Sequence[str] = ()) -> str:
  """Return the text of --help.

  Args:
    names: Stages, sections and dotted options to show; none for everything.

  Raises:
    ConfigError: A name is none of them.
  """
  if not names:
    stages = '\n'.join(['stages (--config.stage=NAME, or several separated by commas):', '', *_stage_lines(STAGES)])
    parts = [_USAGE, stages, *map(_section_text, sections())]
    return '\n'.join(part.rstrip() + '\n' for part in parts)
  return '\n'.join(part.rstrip() + '\n' for name in names for part in _selected(name))


def _selected(name: str) -> list[str]:
  name = name.removeprefix('--').removeprefix('config.')
  parts = []
  if name in STAGES:
    lines = _stage_lines([name])
    if name in STAGE_TABLE:
      also = ', and what the planned stage reads' if name == 'plan' else ''
      lines += _wrapped(f'reads: {", ".join((*STAGE_TABLE[name].reads, *EVERY_STAGE_READS))}{also}', 15)
    parts.append('\n'.join(lines))
  for section in sections():
    if name and (section.name == name or section.name.startswith(f'{name}.')):
      parts.append(_section_text(section))
    chosen = [option for option in section.options if f'{section.name}.{option.name}'.lstrip('.') == name]
    if chosen:
      parts.append(_section_text(section._replace(options=chosen)))
  if not parts:
    known = [section.name for section in sections() if section.name]
    raise ConfigError(f'--help {name}: no such stage, section or option; stages: {", ".join(STAGES)}; sections: {", ".join(known)}')
  return parts


def _stage_lines(names: Sequence[str]) -> list[str]:
  helps = [(name, STAGE_TABLE[name].help if name in STAGE_TABLE else ALL_HELP) for name in names]
  return [
    line for name, help in helps for line in textwrap.wrap(f'  {name:<13}{help}', _WIDTH, subsequent_indent=' ' * 15, drop_whitespace=True)
  ]


def _wrapped(text: str, indent: int) -> list[str]:
  return textwrap.wrap(text, _WIDTH, initial_indent=' ' * indent, subsequent_indent=' ' * indent, break_on_hyphens=False)


def _section_text(section: Section) -> str:
  lines = textwrap.wrap(f'{section.name}: {section.help}' if section.name else section.help, _WIDTH)
  for option in section.options:
    facts = [option.type, f'default {option.default!r}', _allowed(option.info)]
    name = f'{section.name}.{option.name}'.lstrip('.')
    lines += ['', f'  --config.{name}', *_wrapped('; '.join(fact for fact in facts if fact), 6), *_wrapped(option.info.help, 6)]
  return '\n'.join(lines)


def _allowed(about: OptionInfo) -> str:
  return f'one of: {about.allowed()}' if about.choices else about.allowed()


def markdown() -> str:
  """Return docs/options.md."""
  stages = ['| stage | what it does | reads |', '|---|---|---|', f'| `all` | {ALL_HELP} | |']
  stages += [f'| `{name}` | {stage.help} | {_code(stage.reads)} |' for name, stage in STAGE_TABLE.items()]
  parts = [_MARKDOWN.format(common=_code(EVERY_STAGE_READS), stages='\n'.join(stages))]
  for section in sections():
    rows = [
      _row(f'`{option.name}`', option.type, f'`{option.default!r}`', option.info.allowed(), option.info.help) for option in section.options
    ]
    title = f'`{section.name}`' if section.name else 'Options without a section'
    parts.append(
      '\n'.join(
        [f'## {title}', '', section.help, '', '| option | type | default | allowed | meaning |', '|---|---|---|---|---|', *rows, '']
      )
    )
  return '\n'.join(parts)


def _row(*cells: str) -> str:
  return f'| {" | ".join(cell.replace("|", chr(92) + "|") for cell in cells)} |'


def _code(names: Sequence[str]) -> str:
  return ', '.join(f'`{name}`' for name in names)
