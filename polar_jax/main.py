"""The command line: `python -m polar_jax.main --config=configs/tiny.py [--config.train.steps=50] [--workdir=runs/x]`."""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Sequence

from absl import app, flags, logging
from ml_collections import config_flags

from polar_jax.config import ConfigError, parse

_CONFIG = config_flags.DEFINE_config_file('config', None, 'Config file, for example configs/tiny.py.', lock_config=True)
_WORKDIR = flags.DEFINE_string('workdir', None, 'Where the run is written and resumed from; default: runs/<name of the config>.')


def _parse_flags(argv: Sequence[str]) -> list[str]:
  """Like absl's, but a setting that does not exist or has the wrong type is one line, not a traceback."""
  try:
    rest = flags.FLAGS(list(argv))
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError, FileNotFoundError) as error:
    _fail(' '.join(str(error.args[0] if error.args else error).split()))
  if flags.FLAGS['config'].value is None:
    _fail('--config=FILE is required, for example --config=configs/tiny.py')
  if len(rest) > 1:
    _fail(f'unexpected argument {rest[1]!r}; settings are given as --config.section.name=value')
  return rest


def _fail(message: str) -> None:
  print(f'polar_jax: {message}', file=sys.stderr)
  sys.exit(2)


def main(_: Sequence[str]) -> int:
  """Runs a stage. Exit status: 0 done or saved after SIGTERM, 1 stopped by an error that a message explains, 2 bad settings."""
  try:
    config = parse(_CONFIG.value)
  except ConfigError as error:
    _fail(str(error))
  name = pathlib.Path(flags.FLAGS['config'].config_filename).stem
  workdir = pathlib.Path(_WORKDIR.value or f'runs/{name}')
  logging.set_verbosity(logging.WARNING)  # Orbax narrates every save at INFO

  # JAX starts its backend below; a bad setting has been reported before that.
  from polar_jax import runner

  return runner.run(config, workdir)


def console() -> None:
  """Entry point of the `polar_jax` command."""
  app.run(main, flags_parser=_parse_flags)


if __name__ == '__main__':
  console()
