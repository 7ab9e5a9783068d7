"""Runs of a config, each in a process of its own."""

from __future__ import annotations

import pathlib
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

_CONFIGS = pathlib.Path(__file__).resolve().parents[1] / 'configs'


def run_config(config: str, workdir: pathlib.Path, options: Mapping[str, Any]) -> None:
  """Run a file of configs/ in a workdir.

  Args:
    config: name of the file.
    workdir: of the run.
    options: dotted names of settings and their values.

  Raises:
    SystemExit: it failed; the message has the end of what it said.
  """
  given = [f'--config.{name}={value}' for name, value in options.items()]
  command = [sys.executable, '-m', 'polar_jax.main', f'--config={_CONFIGS / config}', f'--workdir={workdir}', *given]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  if done.returncode:
    raise SystemExit(f'{" ".join(command)}\nended with status {done.returncode}: {done.stderr.strip()[-500:]}')
