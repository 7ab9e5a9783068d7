"""The description of the interface is true: schemathesis makes thousands of requests of it, good and bad, and judges every answer.

Schemathesis needs other versions of common packages than ours, hence an environment of its own:

  python -m venv .venv-schemathesis && .venv-schemathesis/bin/pip install 'schemathesis>=4.32,<5'
  POLAR_SCHEMATHESIS=.venv-schemathesis/bin/schemathesis python -m pytest -n 0 -m slow tests/serve/schemathesis_test.py
"""

from __future__ import annotations

import os
import pathlib
import subprocess

import pytest

CONFIG = pathlib.Path(__file__).with_name('schemathesis.toml')


@pytest.mark.slow
@pytest.mark.needs('uvicorn')
@pytest.mark.parametrize('dialect', ['vllm', 'lmdeploy'])
def test_the_description_is_true(serve, tmp_path, dialect):
  program = os.environ.get('POLAR_SCHEMATHESIS')
  if not program:
    pytest.skip('POLAR_SCHEMATHESIS does not name the program (see the first lines of this file)')
  # A sequence of any text that schemathesis generates has to fit.
  with serve(max_length=2_048, pooling_dialect=dialect) as running:
    url = f'http://{running.client.host}:{running.client.port}/openapi.json'
    command = [program, '--config-file', str(CONFIG), 'run', url, '--max-examples', '60', '--no-color']
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5_000:]
    assert running.client.post('/score', {'prompt': 'p', 'reference': 'r', 'outputs': ['a']}).status == 200
    assert running.server.metrics.late_compilations == 0
