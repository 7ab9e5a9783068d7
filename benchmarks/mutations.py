"""Mutants of the code that the tests of its area do not notice.

    python benchmarks/mutations.py --area ppo --sample 40 --workers 2
    python benchmarks/mutations.py --module polar_jax/ppo/learner.py

A mutant is one expression of one line, changed: an operator, a comparison, a constant, a condition, the order of two arguments, a call that
is left out. Each runs in a copy of the project, under the tests of its area in a process of its own; those of its module come first, and
the first failure ends it. A mutant survives if all pass; one that does not end in time counts as killed. Those in equivalent_mutants.txt,
which no test can kill, are left out. Every mutant takes about as long as the tests of its area: seconds to minutes. The last line is a
JSON object.
"""

from __future__ import annotations

import argparse
import ast
import concurrent.futures
import itertools
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import timing

ROOT = pathlib.Path(__file__).resolve().parent.parent
EQUIVALENT = pathlib.Path(__file__).parent / 'equivalent_mutants.txt'
# Area -> the folders or files of its code, and the tests that run after the mirrored ones of the module.
AREAS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
  'losses': (
    ('polar_jax/train/losses.py', 'polar_jax/train/objectives.py', 'polar_jax/ppo/losses.py', 'polar_jax/ppo/advantages.py'),
    ('tests/train/losses_test.py', 'tests/train/step_test.py', 'tests/ppo/losses_test.py', 'tests/ppo/advantages_test.py'),
  ),
  'ppo': (
    ('polar_jax/ppo',),
    (
      'tests/ppo/step_oracle_test.py',
      'tests/ppo/experience_test.py',
      'tests/ppo/trainer_parts_test.py',
      'tests/ppo/learner_test.py',
      'tests/ppo/run_test.py',
      'tests/ppo/rewards',
    ),
  ),
  'train': (('polar_jax/train',), ('tests/train',)),
  'data': (('polar_jax/data',), ('tests/data',)),
  'evaluate': (
    ('polar_jax/evaluate', 'polar_jax/stages/evaluate.py', 'polar_jax/stages/evaluate_sets.py'),
    ('tests/evaluate', 'tests/stages/evaluate_test.py', 'tests/stages/evaluate_sets_test.py', 'tests/report/report_test.py'),
  ),
  'scaling': (('polar_jax/scaling',), ('tests/scaling', 'tests/stages/fit_test.py')),
}
_COPIED = ('polar_jax', 'tests', 'configs', 'benchmarks', 'docs', 'launch', 'notebooks', 'setup.py', 'README.md')

_COMPARISONS = {ast.Lt: '<=', ast.LtE: '<', ast.Gt: '>=', ast.GtE: '>', ast.Eq: '!=', ast.NotEq: '=='}
_COMPARISONS |= {ast.In: 'not in', ast.NotIn: 'in', ast.Is: 'is not', ast.IsNot: 'is'}
_OPERATORS = {ast.Add: '-', ast.Sub: '+', ast.Mult: '/', ast.Div: '*', ast.FloorDiv: '*', ast.Mod: '*', ast.Pow: '*'}
_NAMES = {'min': 'max', 'max': 'min', 'minimum': 'maximum', 'maximum': 'minimum', 'sum': 'mean', 'mean': 'sum', 'any': 'all', 'all': 'any'}
# Calls that are replaced by their argument.
_UNWRAPPED = ('stop_gradient', 'abs', 'square', 'sqrt', 'log', 'exp', 'cumsum', 'sorted', 'reversed', 'round', 'float32')
_UNORDERED = (
  'min',
  'max',
  'minimum',
  'maximum',
  'isinstance',
  'getattr',
  'zip',
)  # arguments that are equivalent or a type error if exchanged
_NAMES |= {'repeat': 'tile', 'argmin': 'argmax', 'argmax': 'argmin', 'floor': 'ceil', 'ceil': 'floor'}


class Mutant(NamedTuple):
  """A change of one line."""

  path: str
  line: int  # from 1
  was: str  # the line
  became: str


class Result(NamedTuple):
  """What the tests made of a mutant: killed, timeout or survived."""

  mutant: Mutant
  status: str
  seconds: float


def mutants_of(path: str, source: str) -> list[Mutant]:
  """Return all mutants of a file."""
  lines, out = source.splitlines(), []
  for node in _code_nodes(ast.parse(source)):
    for target, text in _changes(node, source):
      if target.lineno != target.end_lineno:
        continue
      line = lines[target.lineno - 1]
      # Columns of ast count bytes.
      content = line.encode()
      became = (content[: target.col_offset] + text.encode() + content[target.end_col_offset :]).decode()
      if became != line and _is_valid(lines, target.lineno, became):
        out.append(Mutant(path, target.lineno, line, became))
  return list(dict.fromkeys(out))


def _code_nodes(node: ast.AST) -> Iterator[ast.expr | ast.stmt]:
  """Yield what runs and is not a message: no annotations, docstrings, exceptions, assertions, f-strings or decorators."""
  for name, value in ast.iter_fields(node):
    if name in ('annotation', 'returns', 'decorator_list', 'type_params'):
      continue
    for child in value if isinstance(value, list) else [value]:
      if isinstance(child, ast.keyword) and child.arg == 'strict':  # of zip: an assertion
        continue
      if isinstance(child, ast.Raise | ast.Assert | ast.JoinedStr | ast.Import | ast.ImportFrom) or not isinstance(child, ast.AST):
        continue
      if isinstance(child, ast.expr | ast.stmt):
        yield child
      yield from _code_nodes(child)


def _changes(node: ast.expr | ast.stmt, source: str) -> Iterator[tuple[ast.expr | ast.stmt, str]]:
  """Yield (part of the code, text that replaces it)."""
  text = lambda part: ast.get_source_segment(source, part) or ''
  match node:
    case ast.Compare(left=left, ops=[operator], comparators=[right]):
      yield node, f'{text(left)} {_COMPARISONS[type(operator)]} {text(right)}'
    case ast.BinOp(left=left, op=operator, right=right) if type(operator) in _OPERATORS and not _is_text(left, right):
      yield node, f'{_grouped(left, text)} {_OPERATORS[type(operator)]} {_grouped(right, text)}'
    case ast.BoolOp(op=operator, values=values):
      joined = ' or ' if isinstance(operator, ast.And) else ' and '
      yield node, '(' + joined.join(f'({text(v)})' for v in values) + ')'
    case ast.UnaryOp(op=ast.Not() | ast.USub() | ast.Invert(), operand=operand):
      yield node, f'({text(operand)})'
    case ast.IfExp(test=test, body=body, orelse=orelse):
      yield node, f'{text(orelse)} if {text(test)} else {text(body)}'
    case ast.Constant(value=bool() as value):
      yield node, str(not value)
    case ast.Constant(value=int() as value):
      yield node, str(value + 1)
    case ast.Constant(value=float() as value):
      yield node, repr(value * 2 if value else 1.0)
    case ast.Attribute(attr=name, value=value) if name in _NAMES:
      yield node, f'{text(value)}.{_NAMES[name]}'
    case ast.Name(id=name) if name in _NAMES:
      yield node, _NAMES[name]
    case ast.Call(func=function, args=[argument]) if text(function).rpartition('.')[2] in _UNWRAPPED:
      yield node, f'({text(argument)})'
    case ast.If(test=test):
      yield test, 'True'
      yield test, 'False'
    case ast.Expr(value=ast.Call()) | ast.AugAssign():
      yield node, 'pass'
    case ast.Break():
      yield node, 'pass'
  if isinstance(node, ast.Call) and text(node.func).rpartition('.')[2] not in _UNORDERED:
    plain = [a for a in node.args if not isinstance(a, ast.Starred)]
    for first, second in itertools.pairwise(plain):
      if first.lineno == second.end_lineno and not isinstance(first, ast.Constant | ast.JoinedStr):
        arguments = {id(first): text(second), id(second): text(first)}
        rest = [arguments.get(id(a), text(a)) for a in node.args] + [
          f'{k.arg}={text(k.value)}' if k.arg else f'**{text(k.value)}' for k in node.keywords
        ]
        yield node, f'{text(node.func)}({", ".join(rest)})'


def _grouped(part: ast.expr, text: Any) -> str:
  return f'({text(part)})' if isinstance(part, ast.BinOp | ast.IfExp | ast.BoolOp | ast.Compare) else text(part)


def _is_text(*parts: ast.expr) -> bool:
  return any(
    isinstance(p, ast.JoinedStr | ast.List | ast.Tuple) or (isinstance(p, ast.Constant) and isinstance(p.value, str)) for p in parts
  )


def _is_valid(lines: Sequence[str], number: int, became: str) -> bool:
  try:
    compile('\n'.join([*lines[: number - 1], became, *lines[number:]]), 'mutant', 'exec')
  except (SyntaxError, ValueError):
    return False
  return True


def read_equivalents(text: str) -> set[tuple[str, str, str]]:
  """Return {(path, line, changed line)} of a list: a path at the start of a line, then the two lines and the reason, each indented.

  Raises:
    ValueError: an entry does not have the three lines.
  """
  out, entry = set[tuple[str, str, str]](), list[str]()
  for line in [*(row for row in text.splitlines() if row.strip() and not row.startswith('#')), '']:
    if not line.startswith(' '):
      if entry and len(entry) != 4:
        raise ValueError(f'equivalent mutant {entry}: must be a path, the line, the changed line and the reason')
      if entry:
        out.add((entry[0], entry[1], entry[2]))
      entry = []
    entry.append(line.strip())
  return out


def tests_of(path: str, area: str, root: pathlib.Path = ROOT) -> list[str]:
  """Return the tests for a file: the mirrored ones first."""
  mirrored = pathlib.PurePath('tests', *pathlib.PurePath(path).parts[1:]).with_suffix('')
  own = [str(mirrored.with_name(f'{mirrored.name}_test.py'))]
  return [test for test in dict.fromkeys([*own, *AREAS[area][1]]) if (root / test).exists()]


class Workplace:
  """Copies of the project, one for each worker, whose files are changed and changed back."""

  def __init__(self, folder: pathlib.Path, root: pathlib.Path, limit: float | None):
    self.folder, self.root, self.limit = folder, root, limit
    self._own = threading.local()
    self._count, self._lock = 0, threading.Lock()
    self._baselines: dict[tuple[str, ...], float] = {}

  def run(self, mutant: Mutant, tests: Sequence[str]) -> Result:
    """Run the tests of a mutant."""
    copy = self._copy()
    limit = self.limit or max(60.0, 4 * self.baseline(tests))
    file = copy / mutant.path
    source = file.read_text('utf-8')
    lines = source.splitlines()
    lines[mutant.line - 1] = mutant.became
    file.write_text('\n'.join(lines) + '\n', 'utf-8')
    try:
      code, seconds = _pytest(copy, tests, limit)
    finally:
      file.write_text(source, 'utf-8')
    return Result(mutant, 'timeout' if code is None else 'survived' if code == 0 else 'killed', seconds)

  def baseline(self, tests: Sequence[str]) -> float:
    """Return the seconds of tests without a mutant.

    Raises:
      SystemExit: they fail.
    """
    with self._lock:
      known = self._baselines.get(tuple(tests))
    if known is None:
      code, known = _pytest(self._copy(), tests, 3_600)
      if code != 0:
        raise SystemExit(f'without any mutant the tests fail (status {code}): {" ".join(tests)}')
      with self._lock:
        self._baselines[tuple(tests)] = known
    return known

  def _copy(self) -> pathlib.Path:
    if not hasattr(self._own, 'copy'):
      with self._lock:
        self._count += 1
        self._own.copy = self.folder / f'copy{self._count}'
      self._own.copy.mkdir()
      for name in _COPIED:
        source = self.root / name
        if source.is_dir():
          shutil.copytree(source, self._own.copy / name, ignore=shutil.ignore_patterns('__pycache__'))
        elif source.exists():
          shutil.copy(source, self._own.copy / name)
    return self._own.copy


def _pytest(folder: pathlib.Path, tests: Sequence[str], limit: float) -> tuple[int | None, float]:
  """Return (exit status of pytest, or None if it was ended after `limit` seconds; seconds)."""
  command = [sys.executable, '-m', 'pytest', '-q', '-x', '-n', '0', '-p', 'no:cacheprovider', *tests]
  environment = os.environ | {'PYTHONPATH': str(folder), 'PYTHONDONTWRITEBYTECODE': '1'}
  started = time.perf_counter()
  process = subprocess.Popen(
    command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
  )
  try:
    code: int | None = process.wait(limit)
  except subprocess.TimeoutExpired:
    code = None
  finally:
    if process.poll() is None:  # with all processes that the tests started
      os.killpg(process.pid, signal.SIGKILL)
      process.wait()
  return code, time.perf_counter() - started


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--area', nargs='+', choices=AREAS, default=list(AREAS))
  parser.add_argument('--module', nargs='+', help='only these files, such as polar_jax/ppo/learner.py')
  parser.add_argument('--sample', type=int, help='mutants drawn at random from each area (default: all of them)')
  parser.add_argument('--seed', type=int, default=0, help='of the sample')
  parser.add_argument('--workers', type=int, default=1)
  parser.add_argument('--timeout', type=float, help='seconds per mutant (default: four times the tests alone, at least 60)')
  args = parser.parse_args()
  equivalent = read_equivalents(EQUIVALENT.read_text('utf-8'))
  jobs, left_out = list[tuple[str, Mutant]](), dict[str, int]()
  for area in args.area:
    mutants = _mutants_of_area(area, args.module)
    real = [m for m in mutants if (m.path, m.was.strip(), m.became.strip()) not in equivalent]
    left_out[area] = len(mutants) - len(real)
    jobs += [(area, m) for m in (random.Random(args.seed).sample(real, min(args.sample, len(real))) if args.sample else real)]
  print(f'{len(jobs)} mutants', flush=True)
  results = list[tuple[str, Result]]()
  with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(args.workers) as pool:
    place = Workplace(pathlib.Path(folder), ROOT, args.timeout)
    running = {pool.submit(place.run, mutant, tests_of(mutant.path, area)): area for area, mutant in jobs}
    for done in concurrent.futures.as_completed(running):
      if done.exception() is not None:  # the tests fail without a mutant
        pool.shutdown(cancel_futures=True)
      result = done.result()
      results.append((running[done], result))
      m = result.mutant
      print(
        f'{len(results)}/{len(jobs)} {result.status} {result.seconds:.0f} s {m.path}:{m.line}: {m.was.strip()} -> {m.became.strip()}',
        flush=True,
      )
  _report(args.area, results, left_out)


def _mutants_of_area(area: str, modules: Sequence[str] | None) -> list[Mutant]:
  files = [file for part in AREAS[area][0] for file in ([ROOT / part] if part.endswith('.py') else sorted((ROOT / part).rglob('*.py')))]
  paths = [str(file.relative_to(ROOT)) for file in files]
  return [m for path in paths if not modules or path in modules for m in mutants_of(path, (ROOT / path).read_text('utf-8'))]


def _report(areas: Sequence[str], results: Sequence[tuple[str, Result]], left_out: dict[str, int]) -> None:
  rows, numbers = [], dict[str, Any]()
  for area in areas:
    status = [result.status for own, result in results if own == area]
    survived = status.count('survived')
    share = 1 - survived / len(status) if status else 1.0
    rows.append((area, len(status), status.count('killed'), status.count('timeout'), survived, left_out[area], f'{share:.1%}'))
    numbers[area] = {'mutants': len(status), 'survived': survived, 'killed_share': round(share, 4)}
  print(timing.table(('area', 'mutants', 'killed', 'too slow', 'survived', 'equivalent, left out', 'killed, %'), rows))
  for _, (mutant, status, _) in results:
    if status == 'survived':
      print(f'{mutant.path}:{mutant.line}\n  {mutant.was.strip()}\n  {mutant.became.strip()}')
  timing.report(**numbers)


if __name__ == '__main__':
  main()
