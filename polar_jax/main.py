"""The command line: `python -m polar_jax --config=configs/tiny.py [--config.pretrain.steps=50] [--workdir=runs/x]`."""

from __future__ import annotations

import functools
import pathlib
import re
import sys
import traceback
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from polar_jax.config import ConfigError, parse
from polar_jax.config.parsing import check_name, may_be_none
from polar_jax.config.reference import help_text
from polar_jax.config.renamed import present_names
from polar_jax.config.stages import check_overrides
from polar_jax.planning import environment
from polar_jax.runtime import malloc, text_files
from polar_jax.types import UserError, one_line

_CONFIG = config_flags.DEFINE_config_file('config', None, 'Config file, for example configs/tiny.py.', lock_config=True)
_WORKDIR = flags.DEFINE_string('workdir', None, 'Where the run is written and resumed from; default: runs/<name of the config file>.')
_HELP = ('--help', '-help', '-h', '-?')
_SETTING = re.compile(r'--?config\.([^=\s]+)(?:=(.*))?', re.DOTALL)
_cleared: dict[str, None] = {}  # options that the command line sets to None


def _parse_flags(argv: Sequence[str]) -> list[str]:
  """Parse flags as absl does, but print one line instead of a traceback for a bad command line or config file."""
  _print_help(argv[1:])
  argv = _take_none(argv)
  try:
    rest = flags.FLAGS(argv)
    if not flags.FLAGS['config'].present:
      _fail('--config=FILE is required, for example --config=configs/tiny.py; --help lists all settings')
    getattr(_CONFIG.value, 'keys', None)  # config_flags defers the error of an unreadable file until its config is used
  except Exception as error:
    message = _explain(error, argv)
    if message is None:
      raise
    _fail(message)
  if not isinstance(_CONFIG.value, ConfigDict):
    _fail(f'{_config_file()}: get_config() must return a config made by default_config(), not {type(_CONFIG.value).__name__}')
  if len(rest) > 1:
    _fail(f'unexpected argument {rest[1]!r}; settings are given as --config.section.name=value')
  return rest


def _take_none(argv: Sequence[str]) -> list[str]:
  """Note the options that are set to None, and return the other arguments.

  absl's parsers of numbers refuse the word, and take it for a text where the option is one.
  """
  arguments = list(argv)
  for i in reversed(range(1, len(arguments))):  # a name and its value may be two arguments
    if arguments[i] == 'None' and _SETTING.fullmatch(arguments[i - 1]) and '=' not in arguments[i - 1]:
      arguments[i - 1 : i + 1] = [f'{arguments[i - 1]}=None']
  last = {found[1]: found[2] for argument in arguments if (found := _SETTING.fullmatch(argument))}
  _cleared.clear()
  _cleared.update(dict.fromkeys(name for name, value in last.items() if value == 'None' and may_be_none(name)))
  is_none = lambda found: found is not None and found[2] == 'None' and may_be_none(found[1])
  return [argument for argument in arguments if not is_none(_SETTING.fullmatch(argument))]


def _clear(config: ConfigDict, names: Iterable[str]) -> None:
  """Set options to None, whatever type their values have."""
  for name in names:
    *sections, last = name.split('.')
    section = functools.reduce(getattr, sections, config)
    with section.ignore_type():
      section[last] = None


def _print_help(arguments: Sequence[str]) -> None:
  """Print the reference of stages and options and exit, if the command line contains --help.

  Args:
    arguments: The command line. Words that directly follow --help select stages, sections or options.
  """
  first = next((i for i, argument in enumerate(arguments) if argument in _HELP), None)
  if first is None:
    return
  names = []
  for word in arguments[first + 1 :]:
    if word.startswith('-') and not word.startswith('--config.'):
      break
    names.append(word)
  try:
    text = help_text(names)
  except ConfigError as error:
    _fail(str(error))
  try:
    print(text, end='', flush=True)
  except BrokenPipeError:  # the reader, such as `head`, has seen enough
    sys.stderr.close()
  sys.exit(0)


def _explain(error: Exception, argv: Sequence[str]) -> str | None:
  """Return one line for an error of absl, config_flags or the config file itself; None if the user did not cause it."""
  if isinstance(error, (SyntaxError, ValueError)) and not isinstance(error, flags.Error):
    for path in re.findall(r'^-{1,2}config=(.+)$', '\n'.join(argv), re.MULTILINE):
      try:
        text_files.read_text(pathlib.Path(path.partition(':')[0]))
      except text_files.TextError as unreadable:
        return str(unreadable)
      except OSError:
        pass
  cause: BaseException | None = error
  while cause is not None:  # the flag libraries wrap what the config file raised
    frames = [f for f in traceback.walk_tb(cause.__traceback__) if f[0].f_globals.get('__name__') == 'config_config']
    if frames and not isinstance(cause, SyntaxError):
      frame, line = frames[-1]
      return f'{frame.f_code.co_filename}, line {line}: {_former_name(cause) or _one_line(cause)}'
    cause = cause.__cause__ or cause.__context__
  if isinstance(error, (AttributeError, KeyError, TypeError)):
    return _unknown_setting(argv) or _one_line(error).replace("module 'config_config'", 'the config file')
  if isinstance(error, SyntaxError):
    return f'{error.filename}, line {error.lineno}: {error.msg}'
  if isinstance(error, OSError):
    return f'--config: {str(error).splitlines()[-1].strip()}'
  return ' '.join(str(error).split()) if isinstance(error, flags.Error) else None


def _one_line(error: BaseException) -> str:
  return f'{type(error).__name__}: {" ".join(str(error).split())}'


def _former_name(error: BaseException) -> str | None:
  """Return the message for a config file that reads a setting by its former name, such as `config.train`; None for other errors."""
  name: Any = None
  if isinstance(error, AttributeError) and isinstance(error.obj, ConfigDict):
    name = error.name
  elif isinstance(error, KeyError) and error.args:
    name = str(error.args[0]).strip('\'"')
  present = present_names(str(name))
  return f'unknown setting {name}; it is called {" or ".join(present)} now' if present else None


def _unknown_setting(argv: Sequence[str]) -> str | None:
  """Return the message for the first setting on the command line that does not exist, None if all exist."""
  for name in re.findall(r'^-{1,2}(?:no)?config\.([^=\s]+)', '\n'.join(argv), re.MULTILINE):
    try:
      check_name(name)
    except ConfigError as error:
      return str(error)
  return None


def _config_file() -> str:
  return config_flags.get_config_filename(flags.FLAGS['config'])


def _fail(message: str) -> None:
  print(f'polar_jax: {one_line(message)}', file=sys.stderr)
  sys.exit(2)


def _show_warning(message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
  """Print warnings of polar_jax, which are written for users, as one line, and those of libraries with their place in the code."""
  ours = issubclass(category, UserWarning) and pathlib.Path(filename).is_relative_to(pathlib.Path(__file__).parent)
  text = f'polar_jax: warning: {message}\n' if ours else warnings.formatwarning(message, category, filename, lineno, line)
  print(text, end='', file=file or sys.stderr, flush=True)


def main(_: Sequence[str]) -> int:
  """Run the stages of the config.

  Returns:
    The exit status: 0 if done, or saved after SIGTERM; 1 after an error that a message explains; 2 for bad settings.
  """
  try:
    _clear(_CONFIG.value, _cleared)
    config = parse(_CONFIG.value)
    check_overrides(config, config_flags.get_override_values(flags.FLAGS['config']) | _cleared)
  except ConfigError as error:
    _fail(str(error))
  workdir = pathlib.Path(_WORKDIR.value or f'runs/{pathlib.Path(_config_file()).stem}')
  if '://' in (_WORKDIR.value or ''):
    _fail(
      f'--workdir={_WORKDIR.value}: logs grow line by line, which buckets do not support; '
      'name a local folder, and set checkpointing.folder to the bucket'
    )
  warnings.showwarning = _show_warning

  if config.stage == 'plan':
    environment.prepare()
  logging.set_verbosity(logging.ERROR)  # TFDS and Orbax log every file they touch
  on_cpu = malloc.runs_on_cpu()
  if on_cpu:
    malloc.keep_freed_memory()
  # JAX is imported from here on, and its backend started in `run`; bad settings have been reported before.
  from polar_jax import runner
  from polar_jax.runtime import distributed

  if config.compile_cache:
    runner.keep_compiled(config.compile_cache)
  if on_cpu and config.mesh.cpu_devices and config.stage != 'plan':
    runner.divide_cpu(config.mesh.cpu_devices)

  try:
    cluster = distributed.start(config.distributed)
  except UserError as error:
    _fail(str(error))
  return runner.run(config, workdir, cluster)


def console() -> None:
  """Run the `polar_jax` command."""
  app.run(main, flags_parser=_parse_flags)


if __name__ == '__main__':
  console()
