"""Mutants of a small file, and what its tests make of them."""

from __future__ import annotations

import importlib
import pathlib
import sys

import pytest

BENCHMARKS = pathlib.Path(__file__).parents[2] / 'benchmarks'


@pytest.fixture(scope='module')
def mutations():
  sys.path.insert(0, str(BENCHMARKS))
  try:
    module = importlib.import_module('mutations')
    module._FORKS.set_forkserver_preload(['pytest', 'hypothesis'])  # JAX, which these tests do not use, takes seconds to import
    yield module
  finally:
    sys.path.remove(str(BENCHMARKS))


@pytest.mark.parametrize(
  ('line', 'changes'),
  [
    ('x = a < b', {'x = a <= b'}),
    ('x = a == b', {'x = a != b'}),
    ('x = (a + b) * c', {'x = (a - b) * c', 'x = (a + b) / c'}),
    ('x = a and b', {'x = ((a) or (b))'}),
    ('x = -a', {'x = (a)'}),
    ('x = a if c else b', {'x = b if c else a'}),
    ('x = f(3, 0.5, True)', {'x = f(4, 0.5, True)', 'x = f(3, 1.0, True)', 'x = f(3, 0.5, False)'}),
    ('x = f(a, b)', {'x = f(b, a)'}),
    ("x = 'é' in y", {"x = 'é' not in y"}),
    ('x = np.minimum(a, b)', {'x = np.maximum(a, b)'}),
    ('x = zip(a, b, strict=True)', set()),
    ('x = jnp.exp(a)', {'x = (a)'}),
    ('show(x)', {'pass'}),
    ("context.log('n', 1 + x)", set()),
    ('print(a < b)', set()),
    ('x += y', {'pass'}),
    ('raise ValueError(1 + x)', set()),
    ("x: Literal[1] = f'{a + b}'", set()),
    ("'text' + x", set()),
    ('assert a < b', set()),
  ],
)
def test_mutants_of_a_line(mutations, line, changes):
  found = mutations.mutants_of('p.py', f'first = None\n{line}\n')
  assert {m.became for m in found} == changes
  assert all((m.path, m.line, m.was) == ('p.py', 2, line) for m in found)


def test_mutants_of_an_if_are_one_line_each(mutations):
  source = 'def f(a):\n  """Return 1 + 1."""\n  if a:\n    return (\n      a,\n      a)\n'
  assert {(m.line, m.became.strip()) for m in mutations.mutants_of('p.py', source)} == {(3, 'if True:'), (3, 'if False:')}


def test_equivalent_mutants_are_read_from_blocks_of_four_lines(mutations):
  text = '# comment\n\np.py\n  x = 1\n  x = 2\n  The reason.\nq.py\n  y\n  z\n  Another.\n'
  assert mutations.read_equivalents(text) == {('p.py', 'x = 1', 'x = 2'), ('q.py', 'y', 'z')}
  with pytest.raises(ValueError, match='must be a path, the line, the changed line and the reason'):
    mutations.read_equivalents('p.py\n  x = 1\n  x = 2\n')


def test_equivalent_mutants_exist(mutations):
  """A line that changed must leave the list, or its new mutants would be taken for others."""
  listed = mutations.read_equivalents(mutations.EQUIVALENT.read_text('utf-8'))
  for path in {path for path, _, _ in listed}:
    found = {(path, m.was.strip(), m.became.strip()) for m in mutations.mutants_of(path, (mutations.ROOT / path).read_text('utf-8'))}
    assert {entry for entry in listed if entry[0] == path} <= found


def test_areas_name_files_that_exist(mutations):
  for code, tests in mutations.AREAS.values():
    assert all((mutations.ROOT / path).exists() for path in (*code, *tests))
  found = mutations.tests_of('polar_jax/ppo/rewards/rules.py', 'ppo')
  assert found[0] == 'tests/ppo/rewards/rules_test.py' and 'tests/ppo/step_oracle_test.py' in found


def test_only_tests_that_run_a_statement_are_selected(mutations, tmp_path):
  root, folder = tmp_path / 'project', tmp_path / 'copies'
  (root / 'polar_jax').mkdir(parents=True)
  (root / 'polar_jax/__init__.py').touch()
  folder.mkdir()
  source = '''"""Doc."""
from __future__ import annotations
LIMIT = 1
def f(x):
  """Doc."""
  if x > 3:
    return [y for y in
            (x + 1,)]
  try:
    return g(x)
  except ValueError:
    return None
def g(x):
  if x:
    return x * LIMIT
  raise ValueError
'''
  (root / 'polar_jax/code.py').write_text(source)
  (root / 'tests').mkdir()
  for name, argument, value in (('big', 5, [6]), ('small', 2, 2), ('zero', 0, None)):
    (root / f'tests/{name}_test.py').write_text(f'from polar_jax.code import f\ndef test_f():\n  assert f({argument}) == {value}\n')
  (root / 'tests/other_test.py').write_text('def test_g():\n  from polar_jax.code import f\n')
  tests = [f'tests/{name}_test.py' for name in ('zero', 'small', 'big', 'other')]
  place = mutations.Workplace(folder, root, 60.0)
  place.measure(tests, ['polar_jax/code.py'])
  at = lambda line: {pathlib.Path(test).name[:-8] for test in place.tests_at('polar_jax/code.py', line, source, tests)}
  assert at(3) == {'big', 'small', 'zero', 'other'}  # when the module is imported
  assert at(6) == {'big', 'small', 'zero'}
  assert at(8) == {'big'}  # the second line of a statement
  assert at(10) == {'small', 'zero'} and at(15) == {'small'} and at(16) == at(12) == {'zero'}
  place._seconds = dict(zip(tests, (3.0, 1.0, 2.0, 4.0), strict=True))
  assert place.tests_at('polar_jax/code.py', 6, source, tests) == [tests[1], tests[2], tests[0]]
  result = place.run(mutations.Mutant('polar_jax/code.py', 15, '', '    return x * 2 * LIMIT'), tests)
  assert result.status == 'killed' and result.by == 'tests/small_test.py::test_f'
  result = place.run(mutations.Mutant('polar_jax/code.py', 8, '', '            (x + 2,)]'), tests[:2])  # none of these runs it
  assert result.status == 'survived' and result.seconds == 0
  (root / 'tests/zero_test.py').write_text('def test_f():\n  assert False\n')
  with pytest.raises(SystemExit, match='without any mutant the tests fail'):
    mutations.Workplace(tmp_path, root, 60.0).measure(tests, ['polar_jax/code.py'])


def test_a_mutant_is_killed_survives_or_takes_too_long(mutations, tmp_path):
  root, folder = tmp_path / 'project', tmp_path / 'copies'
  (root / 'polar_jax').mkdir(parents=True)
  folder.mkdir()
  source = 'import time\n\n\ndef f(x):\n  time.sleep(0)\n  return x < 3\n'
  (root / 'polar_jax/code.py').write_text(source)
  (root / 'tests').mkdir()
  (root / 'tests/code_test.py').write_text('from polar_jax.code import f\ndef test_f():\n  assert f(2) and not f(4)\n')
  place, tests = mutations.Workplace(folder, root, 60.0), ['tests/code_test.py']
  found = {m.became.strip(): m for m in mutations.mutants_of('polar_jax/code.py', source)}
  assert place.run(found['return x <= 3'], tests).status == 'survived'  # no test is at the limit
  killed = mutations.Mutant('polar_jax/code.py', 6, '  return x < 3', '  return x > 3')
  assert place.run(killed, tests).status == 'killed'
  place.limit = 1.0
  slow = mutations.Mutant('polar_jax/code.py', 5, '  time.sleep(0)', '  time.sleep(60)')
  assert place.run(slow, tests).status == 'timeout'
  assert (folder / 'copy1/polar_jax/code.py').read_text() == source


@pytest.mark.skipif(not pathlib.Path('/proc/self/cwd').exists(), reason='needs the list of processes of Linux')
def test_what_a_mutant_leaves_running_is_ended(mutations, tmp_path):
  root, folder = tmp_path / 'project', tmp_path / 'copies'
  (root / 'polar_jax').mkdir(parents=True)
  (root / 'tests').mkdir()
  folder.mkdir()
  (root / 'polar_jax/code.py').write_text('x = 1\n')
  sleep = "subprocess.Popen(['sleep', '60'], start_new_session=True)"
  (root / 'tests/code_test.py').write_text(f"import subprocess\ndef test():\n  open('pid', 'w').write(str({sleep}.pid))\n")
  place = mutations.Workplace(folder, root, 60.0)
  assert place.run(mutations.Mutant('polar_jax/code.py', 1, 'x = 1', 'x = 2'), ['tests/code_test.py']).status == 'survived'
  process = pathlib.Path('/proc', (folder / 'copy1/pid').read_text())
  assert not process.exists() or ' Z ' in (process / 'stat').read_text()
