"""Tests of the last net: what it explains, what it leaves alone, and that every line is short."""

from __future__ import annotations

import csv
import json
import pathlib
import zlib

import pyarrow as pa
import pytest

from polar_jax import runner
from polar_jax.config import Config, ConvertConfig
from polar_jax.runtime import failures
from polar_jax.types import MAX_MESSAGE, UserError, one_line


def raised(function, *arguments) -> Exception:
  try:
    function(*arguments)
  except Exception as error:
    return error
  raise AssertionError('nothing was raised')


def nested() -> None:
  nested()


@pytest.mark.parametrize(
  ('function', 'expected'),
  [
    (lambda: pathlib.Path('/no/such/file').stat(), '/no/such/file: No such file or directory; check the path'),
    (lambda: pathlib.Path('/').read_text(), '/: Is a directory; name a file'),
    (lambda: (_ for _ in ()).throw(OSError(28, 'No space left on device', '/disk/a')), '/disk/a: No space left on device; free disk space'),
    (lambda: (_ for _ in ()).throw(OSError(5, 'Input/output error')), 'Input/output error; check the disk or the network'),
    (lambda: b'\xff'.decode(), "is not UTF-8 ('utf-8' codec can't decode byte 0xff"),
    (nested, 'is nested too deeply (maximum recursion depth exceeded'),
    (lambda: (_ for _ in ()).throw(MemoryError()), 'the host ran out of memory (MemoryError); use smaller batches'),
    (lambda: float(10**400), 'OverflowError: int too large to convert to float; check the file'),
    (lambda: zlib.decompress(b'x'), 'error: Error -5 while decompressing data'),
    (lambda: next(csv.reader(['a\0b' * 70_000])), 'Error: field larger than field limit'),
    (lambda: pa.ipc.open_file(b'xx'), 'ArrowInvalid: '),
    (lambda: json.loads('{'), 'JSONDecodeError: Expecting property name'),
  ],
)
def test_errors_of_files_and_libraries_are_explained(function, expected):
  line = failures.explain(raised(function))
  assert line is not None and line.startswith(expected) and len(line) <= MAX_MESSAGE and '; ' in line


@pytest.mark.parametrize('error', [KeyError('a'), TypeError('b'), ValueError('c'), AssertionError(), RuntimeError('d')])
def test_mistakes_of_the_code_keep_their_traceback(error):
  assert failures.explain(raised(lambda: (_ for _ in ()).throw(error))) is None


def test_lines_are_short_and_keep_the_advice():
  assert one_line('a\n b') == 'a b'
  line = one_line('start ' + 'x' * 5_000 + '; do this')
  assert len(line) <= MAX_MESSAGE and line.startswith('start x') and line.endswith('x; do this') and ' ... ' in line
  line = failures.explain(OSError(2, 'No such file or directory', '/' + 'y' * 4_000))
  assert len(line) <= MAX_MESSAGE and line.endswith('yyy: No such file or directory; check the path')


def test_a_run_ends_in_one_line_and_keeps_the_traceback(tmp_path, monkeypatch, capsys):
  config = Config(stage='convert', checkpoint=str(tmp_path / 'model'), output=str(tmp_path / 'out'), convert=ConvertConfig())
  (tmp_path / 'model').mkdir()

  def fail(path):
    raise pa.ArrowInvalid('bad\nbytes')

  monkeypatch.setattr('polar_jax.stages.convert.open_pretrained', fail)
  assert runner.run(config, tmp_path / 'run') == 1
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith('polar_jax: ArrowInvalid: bad bytes; check the file: it is damaged, incomplete or of another format (traceback: ')
  assert line.endswith('/run/error.txt)')
  assert 'Traceback (most recent call last)' in (tmp_path / 'run/error.txt').read_text()


def test_messages_for_the_user_are_short_lines_whatever_they_quote():
  message = str(UserError('a.jsonl: category is ' + 'x' * 5_000 + '\n; shorten it'))
  assert len(message) <= MAX_MESSAGE and '\n' not in message and message.startswith('a.jsonl: ') and message.endswith('; shorten it')
