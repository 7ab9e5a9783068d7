"""Progress in a terminal and elsewhere."""

from __future__ import annotations

import io
import sys

import jax

from polar_jax.runtime.progress import Progress


class Terminal(io.StringIO):
  def isatty(self):
    return True


def test_plain_lines_without_a_terminal():
  lines = []
  progress = Progress('score', 9, 2, unit='example', show_line=lines.append)
  progress.show(5, {'reward': 0.25, 'length': 7.125}, rate='3.0 examples/s')
  progress.show(6, {}, line=False)
  progress.show(9, {}, rate='4.0 examples/s')
  progress.close()
  assert lines == ['score  example 5/9  reward 0.2500  length 7.1  3.0 examples/s', 'score  example 9/9  4.0 examples/s']


def test_a_bar_in_a_terminal(monkeypatch):
  monkeypatch.setattr(sys, 'stderr', terminal := Terminal())  # not in a fixture, after which pytest replaces it again
  lines = []
  progress = Progress('score', 9, 2, unit='example', show_line=lines.append)
  progress.show(5, {'reward': 0.25}, rate='3.0 examples/s')
  progress.show(9, {'reward': 0.5}, line=False)
  progress.close()
  bar = terminal.getvalue()
  assert 'score' in bar and '9/9' in bar and 'reward=0.500' in bar and lines == []


def test_other_processes_are_silent(monkeypatch):
  monkeypatch.setattr(sys, 'stderr', terminal := Terminal())
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  lines = []
  progress = Progress('score', 9, 2, unit='example', show_line=lines.append)
  progress.show(9, {'reward': 0.5})
  progress.close()
  assert terminal.getvalue() == '' and lines == []
