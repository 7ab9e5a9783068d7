"""The command line: `python -m polar_jax.main --config=configs/tiny.py [--config.pretrain.steps=50] [--workdir=runs/x]`."""

from __future__ import annotations

import pathlib
import re
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from polar_jax.config import ConfigError, parse
from polar_jax.planning import environment
from polar_jax.runtime import malloc
from polar_jax.types import UserError

_CONFIG = config_flags.DEFINE_config_file('config', None, 'Config file, for example configs/tiny.py.', lock_config=True)
_WORKDIR = flags.DEFINE_string('workdir', None, 'Where the run is written and resumed from; default: runs/<name of the config>.')


def _parse_flags(argv: Sequence[str]) -> list[str]:
  """Like absl's, but a bad command line or config file is one line, not a traceback."""
  try:
    rest = flags.FLAGS(list(argv))
    if not flags.FLAGS['config'].present:
      _fail('--config=FILE is required, for example --config=configs/tiny.py')
    getattr(_CONFIG.value, 'keys', None)  # config_flags keeps a file that cannot be read to itself until its config is used
  except Exception as error:
    message = _explain(error, argv)
    if message is None:
      raise
    _fail(message)
  if not isinstance(_CONFIG.value, ConfigDict):
    _fail(f'{_config_file()}: get_config() must return what default_config() made, not {type(_CONFIG.value).__name__}')
  if len(rest) > 1:
    _fail(f'unexpected argument {rest[1]!r}; settings are given as --config.section.name=value')
  return rest


def _explain(error: Exception, argv: Sequence[str]) -> str | None:
  """One line for what absl, config_flags or the config file itself raised; None when it is not the user's to mend."""
  cause: BaseException | None = error
  while cause is not None:  # what the config file raised lies below what the flag libraries made of it
    frames = [f for f in traceback.walk_tb(cause.__traceback__) if f[0].f_globals.get('__name__') == 'config_config']
    if frames and not isinstance(cause, SyntaxError):
      frame, line = frames[-1]
      return f'{frame.f_code.co_filename}, line {line}: {_one_line(cause)}'
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


def _unknown_setting(argv: Sequence[str]) -> str | None:
  """The message of `parse` for the first setting on the command line that does not exist."""
  for name in re.findall(r'^-{1,2}(?:no)?config\.([^=\s]+)', '\n'.join(argv), re.MULTILINE):
    setting: dict[str, Any] | None = None
    for part in reversed(name.split('.')):
      setting = {part: setting}
    try:
      parse(ConfigDict(setting))
    except ConfigError as error:
      if not str(error).endswith('not None'):  # None is what this function itself gave it
        return ' '.join(str(error).split())
  return None


def _config_file() -> str:
  return config_flags.get_config_filename(flags.FLAGS['config'])


def _fail(message: str) -> None:
  print(f'polar_jax: {message}', file=sys.stderr)
  sys.exit(2)


def _show_warning(message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
  """Ours are written for the user, in one line; those of libraries keep their place in the code."""
  ours = issubclass(category, UserWarning) and pathlib.Path(filename).is_relative_to(pathlib.Path(__file__).parent)
  text = f'polar_jax: warning: {message}\n' if ours else warnings.formatwarning(message, category, filename, lineno, line)
  print(text, end='', file=file or sys.stderr, flush=True)


def main(_: Sequence[str]) -> int:
  """Runs a stage. Exit status: 0 done or saved after SIGTERM, 1 stopped by an error that a message explains, 2 bad settings."""
  try:
    config = parse(_CONFIG.value)
  except ConfigError as error:
    _fail(str(error))
  workdir = pathlib.Path(_WORKDIR.value or f'runs/{pathlib.Path(_config_file()).stem}')
  if '://' in (_WORKDIR.value or ''):
    _fail(f'--workdir={_WORKDIR.value}: logs grow line by line, which no bucket allows: name a local folder, this as checkpointing.folder')
  logging.set_verbosity(logging.ERROR)  # Orbax narrates every save at INFO
  warnings.showwarning = _show_warning

  if config.stage == 'plan':
    environment.prepare()
  if malloc.runs_on_cpu():
    malloc.keep_freed_memory()
  # JAX is loaded below, and its backend started in `run`; a bad setting has been reported before that.
  from polar_jax import runner
  from polar_jax.runtime import distributed

  if config.compile_cache:
    runner.keep_compiled(config.compile_cache)

  try:
    cluster = distributed.start(config.distributed)
  except UserError as error:
    _fail(str(error))
  return runner.run(config, workdir, cluster)


def console() -> None:
  """Entry point of the `polar_jax` command."""
  app.run(main, flags_parser=_parse_flags)


if __name__ == '__main__':
  console()
