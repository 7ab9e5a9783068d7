"""docs/serving.md: its examples run against a server, and it names every route and every limit."""

from __future__ import annotations

import json
import pathlib
import pkgutil
import re
import subprocess

import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[2]
TEXT = (ROOT / 'docs' / 'serving.md').read_text()
ADDRESS = '127.0.0.1:30000'

pytestmark = pytest.mark.needs('uvicorn', 'httpx')


def blocks(language):
  return re.findall(rf'^```{language}\n(.*?)^```', TEXT, re.DOTALL | re.MULTILINE)


def address_of(server):
  return server.server.address.removeprefix('http://')


def test_the_examples_of_curl(exact_server):
  found = [block for block in blocks('bash') if 'curl' in block]
  assert found
  for block in found:
    result = subprocess.run(['bash', '-c', block.replace(ADDRESS, address_of(exact_server))], capture_output=True, text=True, check=True)
    reply = json.loads(result.stdout)
    (shown,) = map(json.loads, blocks('json'))
    assert reply.keys() == shown.keys() and all(isinstance(reply[key], type(shown[key])) for key in shown)
    assert len(reply['rewards']) == len(shown['rewards']) == 2


def test_the_examples_of_python(exact_server, model):
  (block,) = blocks('python')
  scope = {}
  exec(block.replace(ADDRESS, address_of(exact_server)), scope)
  scope['client'].close()
  rows = [{'prompt': 'What is 2 + 2?', 'reference': '4', 'output': '4'}, {'prompt': 'And 3 + 3?', 'reference': '6', 'output': '7'}]
  assert scope['rewards'] == model.score_batch(rows, exact=True).tolist()


def test_every_route_is_documented(exact_server):
  paths = exact_server.client.get('/openapi.json').body['paths']
  assert set(re.findall(r'`(?:GET|POST) (/[^`]*)`', TEXT)) == {*paths, '/'}


def test_the_settings_that_it_names_exist():
  from polar_jax.config import ServeConfig

  named = set(re.findall(r'serve\.(\w+)', TEXT)) - {'RewardClient', 'adapters', 'py'}
  assert named and named <= {*ServeConfig.__dataclass_fields__}


def test_the_table_of_the_client_has_its_defaults():
  import inspect

  from polar_jax.serve import RewardClient

  table = TEXT[TEXT.index('## The client') : TEXT.index('## Trainers')]
  rows = dict(re.findall(r'^\| `(\w+)` \|(.*?)\|', table, re.MULTILINE))
  parameters = dict(inspect.signature(RewardClient).parameters)
  assert rows.keys() == parameters.keys()
  for name, shown in rows.items():
    if shown.strip():
      assert yaml.safe_load(shown.strip("` '")) == parameters[name].default


def test_every_adapter_and_example_is_named():
  for file in (ROOT / 'polar_jax' / 'serve' / 'adapters').glob('*.py'):
    if file.stem not in ('__init__', 'shared', 'openrlhf', 'swift'):  # the last two are used through examples
      assert f'polar_jax.serve.adapters.{file.stem}' in TEXT, file.stem
  listed = (ROOT / 'examples' / 'README.md').read_text()
  for file in (ROOT / 'examples').glob('*.py'):
    assert f'examples/{file.name}' in TEXT and f'[{file.name}]({file.name})' in listed, file.name
  for name in re.findall(r'polar_jax\.serve\.adapters\.[\w.]+', TEXT + listed):
    pkgutil.resolve_name(name)


def test_the_page_is_on_the_site():
  assert '- Reward server: serving.md' in (ROOT / '.mkdocs.yml').read_text()
