"""Mutants of the code that the tests of its area do not notice.

    python benchmarks/mutations.py --area ppo --sample 40 --workers 2
    python benchmarks/mutations.py --module polar_jax/ppo/learner.py

A mutant is one expression of one line, changed: an operator, a comparison, a constant, a condition, the order of two arguments, a call that
is left out. Each runs in a copy of the project, in a process of its own, under those files of tests of its area that run its statement:
the quickest come first, whole runs last, and the first failure ends it. Which files run which statements, and how long they take, is
found before by running the tests of the area once, with a mark before every statement. A mutant survives if all pass, also if none runs
its statement; one that does not end in time counts as killed. Messages for people and those mutants in equivalent_mutants.txt, which no
test can kill, are left out. The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import ast
import compileall
import concurrent.futures
import contextlib
import functools
import itertools
import multiprocessing
import os
import pathlib
import py_compile
import random
import shutil
import signal
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import mutation_process
import timing

ROOT = pathlib.Path(__file__).resolve().parent.parent
EQUIVALENT = pathlib.Path(__file__).parent / 'equivalent_mutants.txt'
# Area -> the folders or files of its code, and the tests that run after the mirrored ones of the module.
AREAS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
  'losses': (
    ('polar_jax/train/losses.py', 'polar_jax/train/objectives.py', 'polar_jax/ppo/losses.py', 'polar_jax/ppo/advantages.py'),
    ('tests/train/losses_test.py', 'tests/train/objectives_test.py', 'tests/ppo/losses_test.py', 'tests/ppo/advantages_test.py'),
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
    (
      'tests/evaluate',
      'tests/stages/evaluate_test.py',
      'tests/stages/evaluate_sets_parts_test.py',
      'tests/stages/evaluate_sets_test.py',
      'tests/report/report_test.py',
    ),
  ),
  'scaling': (('polar_jax/scaling',), ('tests/scaling', 'tests/stages/fit_test.py')),
}
# Whole runs, which take minutes. They try only the mutants of the module that they mirror which all other tests missed.
_SLOW = ('ppo/trainer_test.py', 'train/trainer_test.py', 'train/step_test.py', 'train/exactness_test.py', 'train/start_from_test.py')
_COPIED = ('polar_jax', 'tests', 'configs', 'benchmarks', 'docs', 'launch', 'notebooks', 'setup.py', 'README.md', '.pytest.ini')

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
_FORKS = multiprocessing.get_context('forkserver')
_FORKS.set_forkserver_preload([*mutation_process.IMPORTED_BEFORE])

# Calls that tell people something.
_MESSAGES = ('.log', '.print', '.logging.info', '.logging.warning', '.logging.error', '.warnings.warn')


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
  by: str = ''  # the test that killed it


def mutants_of(path: str, source: str) -> list[Mutant]:
  """Return all mutants of a file."""
  lines, out = source.splitlines(), []
  encoded = [line.encode() for line in lines]  # columns of ast count bytes
  text = functools.partial(_text_of, encoded)
  for statement in ast.parse(source).body:
    own = lines[statement.lineno - 1 : statement.end_lineno]  # compiled again for each mutant, instead of the whole file
    for node in _code_nodes(ast.Module([statement], [])):
      for target, other in _changes(node, text):
        if target.lineno != target.end_lineno:
          continue
        line, content = lines[target.lineno - 1], encoded[target.lineno - 1]
        became = (content[: target.col_offset] + other.encode() + content[target.end_col_offset :]).decode()
        if became != line and _is_valid(own, target.lineno - statement.lineno + 1, became):
          out.append(Mutant(path, target.lineno, line, became))
  return list(dict.fromkeys(out))


def _code_nodes(node: ast.AST) -> Iterator[ast.expr | ast.stmt]:
  """Yield what runs and is not a message: no annotations, docstrings, exceptions, assertions, f-strings, decorators or log lines."""
  for name, value in ast.iter_fields(node):
    if name in ('annotation', 'returns', 'decorator_list', 'type_params'):
      continue
    for child in value if isinstance(value, list) else [value]:
      if isinstance(child, ast.keyword) and child.arg == 'strict':  # of zip: an assertion
        continue
      if isinstance(child, ast.Raise | ast.Assert | ast.JoinedStr | ast.Import | ast.ImportFrom) or not isinstance(child, ast.AST):
        continue
      if isinstance(child, ast.Expr) and isinstance(child.value, ast.Call) and f'.{ast.unparse(child.value.func)}'.endswith(_MESSAGES):
        continue
      if isinstance(child, ast.expr | ast.stmt):
        yield child
      yield from _code_nodes(child)


def _text_of(lines: Sequence[bytes], part: ast.expr | ast.stmt) -> str:
  """Return the source of a part: as `ast.get_source_segment`, which splits the whole file each time."""
  own = list(lines[part.lineno - 1 : part.end_lineno])
  own[-1] = own[-1][: part.end_col_offset]
  own[0] = own[0][part.col_offset :]
  return b'\n'.join(own).decode()


def _changes(node: ast.expr | ast.stmt, text: Callable[[Any], str]) -> Iterator[tuple[ast.expr | ast.stmt, str]]:
  """Yield (part of the code, text that replaces it); `text` returns the source of a part."""
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
    with warnings.catch_warnings(action='ignore', category=SyntaxWarning):
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
  """Return the files of tests for a file: the mirrored ones first."""
  mirrored = pathlib.PurePath('tests', *pathlib.PurePath(path).parts[1:]).with_suffix('')
  own = str(mirrored.with_name(f'{mirrored.name}_test.py'))
  # pytest drops a file that is named next to its folder, and with it the order.
  files = [file for part in (own, *AREAS[area][1]) for file in ([part] if part.endswith('.py') else _test_files(root, part))]
  return [file for file in dict.fromkeys(files) if (root / file).exists() and (file == own or not file.endswith(_SLOW))]


def _test_files(root: pathlib.Path, folder: str) -> list[str]:
  return [str(file.relative_to(root)) for file in sorted((root / folder).rglob('*_test.py'))]


# Written into a copy of the project, and imported by its modules. Children of tests inherit which test it is.
_MARKS = """
import os
_file = open(os.environ.get('MUTATIONS_MARKS', os.devnull), 'a', buffering=1)
_test, _seen = os.environ.get('MUTATIONS_TEST', ''), set()
def start(test):
  global _test
  os.environ['MUTATIONS_TEST'] = _test = test
  _seen.clear()
def mark(path, line):
  if (path, line) not in _seen:
    _seen.add((path, line))
    _file.write(f'{_test}\\t{path}\\t{line}\\n')
"""
_PLUGIN = """
import sys, time
from polar_jax import _marks
_started = 0.0
def pytest_runtest_logstart(nodeid, location):
  global _started
  if nodeid.partition('::')[0] != _marks._test:
    _marks.start(nodeid.partition('::')[0])
    _forget()
  _started = time.perf_counter()
def _forget():  # what another file of tests has traced or built, which would not run again
  if 'jax' in sys.modules:
    sys.modules['jax'].clear_caches()
  for module in [module for name, module in sys.modules.items() if name.startswith('polar_jax')]:
    for value in vars(module).values():
      if not isinstance(value, type) and callable(getattr(value, 'cache_clear', None)):
        value.cache_clear()
def pytest_runtest_logfinish(nodeid, location):
  _marks._file.write(f"{nodeid}\\t\\t{time.perf_counter() - _started}\\n")
"""
# For the mutants: tests of more than two seconds come last in their file.
_ORDER = """
import os
def pytest_collection_modifyitems(items):
  late = set(os.environ['MUTATIONS_LATE'].split('\\n'))
  files = list(dict.fromkeys(item.path for item in items))
  items.sort(key=lambda item: (files.index(item.path), item.nodeid in late))
"""


def marked(path: str, source: str) -> str:
  """Return the source of a file with a call `mark(path, line)` before every statement of its functions."""
  tree = ast.parse(source)
  for function in [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]:
    for node in [node for node in ast.walk(function) if isinstance(node, ast.stmt | ast.ExceptHandler | ast.match_case)]:
      for name in ('body', 'orelse', 'finalbody'):
        statements = getattr(node, name, [])
        if not isinstance(node, ast.ClassDef) and statements and not any(map(_is_mark, statements)):
          doc = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node) is not None
          new = [part for s in statements[doc:] for part in (*ast.parse(f'_mark({path!r}, {s.lineno})').body, s)]
          setattr(node, name, [*statements[:doc], *new])
  first = next((i for i, node in enumerate(tree.body) if not (_is_future(node) or (i == 0 and _is_doc(node)))), len(tree.body))
  tree.body[first:first] = ast.parse('from polar_jax._marks import mark as _mark').body
  return ast.unparse(tree)


def _is_doc(node: ast.stmt) -> bool:
  return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _is_future(node: ast.stmt) -> bool:
  return isinstance(node, ast.ImportFrom) and node.module == '__future__'


def _is_mark(node: ast.stmt) -> bool:
  return isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and getattr(node.value.func, 'id', '') == '_mark'


def _statement_of(tree: ast.AST, line: int) -> int | None:
  """Return the first line of the innermost statement at `line` that is part of a function; None outside of functions."""
  found = None
  for function in [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]:
    inside = [s for s in ast.walk(function) if isinstance(s, ast.stmt) and s is not function and not isinstance(s, ast.ClassDef)]
    # The defaults of a function inside of a function are part of the statement that defines it.
    found = max([s.lineno for s in inside if s.lineno <= line <= (s.end_lineno or line)] + ([found] if found else []), default=None)
  return found


class Workplace:
  """Copies of the project, one for each worker, whose files are changed and changed back."""

  def __init__(self, folder: pathlib.Path, root: pathlib.Path, limit: float | None):
    self.folder, self.root, self.limit = folder, root, limit
    self._own = threading.local()
    self._count, self._lock = 0, threading.Lock()
    self._seconds: dict[str, float] = {}  # by file of tests
    self._late: list[str] = []  # tests that take long
    self._tests_at: dict[tuple[str, int], set[str]] = {}

  def measure(self, tests: Sequence[str], paths: Sequence[str]) -> None:
    """Run tests without a mutant: how long each file takes, and which statements of the files `paths` it runs.

    Raises:
      SystemExit: they fail.
    """
    copy = self._new_copy('marked')
    for path in paths:
      (copy / path).write_text(marked(path, (copy / path).read_text('utf-8')), 'utf-8')
    (copy / 'polar_jax/_marks.py').write_text(_MARKS)
    (copy / 'mutations_plugin.py').write_text(_PLUGIN)
    marks = self.folder / 'marks'
    quick = [test for test in tests if not test.endswith(_SLOW)]
    code, _ = self._pytest(copy, ['-p', 'mutations_plugin', *quick], 7_200, {'MUTATIONS_MARKS': str(marks)})
    if code != 0:
      raise SystemExit(f'without any mutant the tests fail (status {code}): {" ".join(tests)}')
    for row in marks.read_text('utf-8').splitlines():
      test, path, number = row.split('\t')
      if path:
        self._tests_at.setdefault((path, int(number)), set()).add(test)
      else:
        file = test.partition('::')[0]
        self._seconds[file] = self._seconds.get(file, 0.0) + float(number)
        self._late += [test] if float(number) > 2.0 else []

  def tests_at(self, path: str, line: int, source: str, tests: Sequence[str]) -> list[str]:
    """Return which measured tests run a line of a file, quickest first, and then the slow ones."""
    statement = _statement_of(ast.parse(source), line)
    runs = self._seconds.keys() if statement is None else self._tests_at.get((path, statement), set())
    quick = sorted((test for test in tests if test in runs and test in self._seconds), key=lambda test: self._seconds[test])
    return [*quick, *(test for test in tests if test.endswith(_SLOW))]

  def run(self, mutant: Mutant, tests: Sequence[str]) -> Result:
    """Run the tests of a mutant; if they are measured, those that run its statement."""
    copy = self._copy()
    file = copy / mutant.path
    source = file.read_text('utf-8')
    if self._seconds:
      tests = self.tests_at(mutant.path, mutant.line, source, tests)
    if not tests:
      return Result(mutant, 'survived', 0.0)
    limit = self.limit or max(90.0, 30 + 4 * sum(self._seconds.get(test, 150.0) for test in tests))
    lines = source.splitlines()
    lines[mutant.line - 1] = mutant.became
    file.write_text('\n'.join(lines) + '\n', 'utf-8')
    try:
      (copy / 'mutations_order.py').write_text(_ORDER)
      code, seconds = self._pytest(copy, ['-p', 'mutations_order', *tests], limit, {'MUTATIONS_LATE': '\n'.join(self._late)})
    finally:
      file.write_text(source, 'utf-8')
    output = (self.folder / f'{copy.name}.txt').read_text('utf-8', errors='replace').splitlines()
    by = next((line.partition(' ')[2].partition(' - ')[0] for line in output if line.startswith(('FAILED', 'ERROR'))), '')
    return Result(mutant, 'timeout' if code is None else 'survived' if code == 0 else 'killed', seconds, by)

  def _copy(self) -> pathlib.Path:
    if not hasattr(self._own, 'copy'):
      with self._lock:
        self._count += 1
        name = f'copy{self._count}'
      self._own.copy = self._new_copy(name)
    return self._own.copy

  def _new_copy(self, name: str) -> pathlib.Path:
    copy = self.folder / name
    copy.mkdir()
    for part in _COPIED:
      source = self.root / part
      if source.is_dir():
        shutil.copytree(source, copy / part, ignore=shutil.ignore_patterns('__pycache__'))
      elif source.exists():
        shutil.copy(source, copy / part)
    # Compiled once. By hash, because a mutant may have the length of the original and be written in the same second.
    compileall.compile_dir(copy / 'polar_jax', quiet=1, invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH)
    return copy

  def _pytest(
    self, copy: pathlib.Path, arguments: Sequence[str], limit: float, environment: Mapping[str, str] | None = None
  ) -> tuple[int | None, float]:
    """Return (exit status of pytest, or None if it was ended after `limit` seconds; seconds)."""
    own = {'PYTHONPATH': str(copy), 'PYTHONDONTWRITEBYTECODE': '1', **(environment or {})}
    # The copies do not lie next to the data.
    data = {'POLAR_TEST_DATA': os.environ.get('POLAR_TEST_DATA', str((self.root / '../shared/data').resolve()))}
    started = time.perf_counter()
    output = self.folder / f'{copy.name}.txt'
    process = _FORKS.Process(target=mutation_process.run_tests, args=(copy, list(arguments), data | own, output))
    process.start()
    process.join(limit)
    code = process.exitcode
    if code is None:  # with all processes that the tests started
      os.killpg(process.pid, signal.SIGKILL)
      process.join()
    _end_processes_in(copy)
    return code, time.perf_counter() - started


def _end_processes_in(folder: pathlib.Path) -> None:
  """End what tests left running in a session of its own, such as a worker that a mutant keeps busy for ever."""
  for link in pathlib.Path('/proc').glob('[0-9]*/cwd'):
    with contextlib.suppress(OSError):  # of other users, or ended meanwhile
      if folder.resolve() in (own := pathlib.Path(os.readlink(link)), *own.parents):
        os.kill(int(link.parent.name), signal.SIGKILL)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--area', nargs='+', choices=AREAS, default=list(AREAS))
  parser.add_argument('--module', nargs='+', help='only these files, such as polar_jax/ppo/learner.py')
  parser.add_argument('--sample', type=int, help='mutants drawn at random from each area (default: all of them)')
  parser.add_argument('--seed', type=int, default=0, help='of the sample')
  parser.add_argument('--workers', type=int, default=1)
  parser.add_argument('--timeout', type=float, help='seconds per mutant (default: four times the tests alone and 30, at least 90)')
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
    _configure_jax(pathlib.Path(folder))
    place = Workplace(pathlib.Path(folder), ROOT, args.timeout)
    tests = dict.fromkeys(test for area, mutant in jobs for test in tests_of(mutant.path, area))
    place.measure(list(tests), sorted({mutant.path for _, mutant in jobs}))
    running = {pool.submit(place.run, mutant, tests_of(mutant.path, area)): area for area, mutant in jobs}
    for done in concurrent.futures.as_completed(running):
      result = done.result()
      results.append((running[done], result))
      m = result.mutant
      print(
        f'{len(results)}/{len(jobs)} {result.status} {result.seconds:.0f} s {m.path}:{m.line}: {m.was.strip()} -> {m.became.strip()}'
        + (f'  [{result.by}]' if result.by else ''),
        flush=True,
      )
  _report(args.area, results, left_out)


def _configure_jax(folder: pathlib.Path) -> None:
  """Set what tests/conftest.py sets before JAX is imported. What was compiled without a mutant is the same with most of them."""
  os.environ |= {'JAX_PLATFORMS': 'cpu', 'JAX_TRACEBACK_IN_LOCATIONS_LIMIT': '0', 'JAX_COMPILATION_CACHE_DIR': str(folder / 'compiled')}
  os.environ |= {'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.1', 'JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES': '0'}


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
  for _, (mutant, status, *_) in results:
    if status == 'survived':
      print(f'{mutant.path}:{mutant.line}\n  {mutant.was.strip()}\n  {mutant.became.strip()}')
  timing.report(**numbers)


if __name__ == '__main__':
  main()
