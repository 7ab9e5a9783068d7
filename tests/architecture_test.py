"""The package graph: no cycles, and light entry points stay light. Files and functions stay short."""

from __future__ import annotations

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / 'polar_jax'


def unit_of(module: str) -> str:
  """Return the package below polar_jax that a module is in, or its own name if it is directly in polar_jax."""
  return '.'.join(module.split('.')[:2])


def imports_of(file: pathlib.Path) -> set[str]:
  """Return the modules of polar_jax that a file imports, inside functions too, but not under TYPE_CHECKING."""
  tree = ast.parse(file.read_text())
  skipped = {
    id(n) for i in ast.walk(tree) if isinstance(i, ast.If) and 'TYPE_CHECKING' in ast.dump(i.test) for b in i.body for n in ast.walk(b)
  }
  found = set()
  for node in ast.walk(tree):
    if id(node) in skipped:
      continue
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and node.module:
      for alias in node.names:
        name = f'{node.module}.{alias.name}'
        is_module = (
          PACKAGE.parent.joinpath(*name.split('.')).with_suffix('.py').exists() or (PACKAGE.parent / name.replace('.', '/')).is_dir()
        )
        found.add(name if is_module else node.module)
  return {name for name in found if name.startswith('polar_jax.')}


def package_graph() -> dict[str, set[str]]:
  graph: dict[str, set[str]] = {}
  for file in PACKAGE.rglob('*.py'):
    relative = file.relative_to(PACKAGE.parent).with_suffix('')
    module = '.'.join(relative.parts).removesuffix('.__init__')
    if module == 'polar_jax' or 'remote_code' in module:
      continue
    unit = unit_of(module)
    graph.setdefault(unit, set()).update(unit_of(name) for name in imports_of(file))
    graph[unit].discard(unit)
  return graph


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
  """Return the strongly connected components of more than one node."""
  reachable = {}
  for start in graph:
    seen, todo = set(), [start]
    while todo:
      for name in graph.get(todo.pop(), set()) - seen:
        seen.add(name)
        todo.append(name)
    reachable[start] = seen
  groups = {tuple(sorted(b for b in reachable[a] if a in reachable.get(b, set()))) for a in graph if a in reachable[a]}
  return [list(group) for group in groups if group]


def test_cycles_finds_a_cycle():
  assert cycles({'a': {'b'}, 'b': {'c'}, 'c': {'a'}, 'd': {'a'}}) == [['a', 'b', 'c']]
  assert cycles({'a': {'b'}, 'b': set()}) == []


def test_packages_have_no_cycles():
  graph = package_graph()
  assert len(graph) > 15
  assert cycles(graph) == []


def test_general_code_does_not_import_the_miniature():
  graph = package_graph()
  for unit in ('stages', 'scoring', 'evaluate', 'ppo', 'api', 'train', 'report', 'scaling'):
    assert 'polar_jax.miniature' not in graph[f'polar_jax.{unit}'], unit


def loaded_by(code: str) -> set[str]:
  """Return the modules that are loaded after running code in a fresh interpreter."""
  script = f'{code}\nimport sys\nprint("\\n".join(sys.modules))'
  return set(subprocess.run([sys.executable, '-c', script], check=True, capture_output=True, text=True).stdout.split())


def test_importing_the_package_imports_no_jax():
  modules = loaded_by('import polar_jax; dir(polar_jax)')
  assert not {name for name in modules if name.split('.')[0] in ('jax', 'flax', 'tensorflow_datasets', 'orbax', 'numpy')}


def test_the_api_starts_no_backend_and_loads_no_tfds():
  code = 'import polar_jax; polar_jax.load; polar_jax.train_reward_model; from jax._src import xla_bridge; assert not xla_bridge._backends'
  modules = loaded_by(code)
  assert 'polar_jax.api' in modules and 'tensorflow_datasets' not in modules


@pytest.mark.long
def test_scoring_a_file_loads_neither_tfds_nor_synthesis():
  modules = loaded_by('import polar_jax.stages.score')
  assert not {name for name in modules if name.startswith(('tensorflow_datasets', 'polar_jax.synthesis', 'polar_jax.miniature'))}


def test_no_mock_in_production():
  assert not [file for file in PACKAGE.rglob('*.py') if 'unittest' in file.read_text() or 'mock' in file.read_text()]


def test_files_are_short():
  """Files of at most 600 lines, functions of the package of less than 80."""
  folders = (PACKAGE, *(PACKAGE.parent / name for name in ('tests', 'configs', 'benchmarks', 'examples')))
  texts = {file: file.read_text() for folder in folders for file in folder.rglob('*.py')}
  assert {file.name: n for file, text in texts.items() if (n := len(text.splitlines())) > 600} == {}
  functions = [
    (file.name, node.name, node.end_lineno - node.lineno + 1)
    for file, text in texts.items()
    if PACKAGE in file.parents
    for node in ast.walk(ast.parse(text))
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
  ]
  assert [(file, name, lines) for file, name, lines in functions if lines >= 80] == []
