"""The certificate: a tiny model by every way that is installed, and what is said when a way gives other rewards."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from reward_server import running, tiny_model

from polar_jax.certify import rows, stage, ways
from polar_jax.certify.comparison import compare
from polar_jax.config import CertifyConfig, Config, ConfigError, TokenizerConfig
from polar_jax.stages.context import Context
from polar_jax.types import UserError


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
  folder = tmp_path_factory.mktemp('model') / 'tiny'
  tiny_model().save(folder)
  return folder


def context(checkpoint, workdir, lines, **changes):
  model = tiny_model()
  settings = CertifyConfig(**{'transformers': False} | changes.pop('certify', {}))
  config = Config(stage='certify', checkpoint=str(checkpoint), tokenizer=TokenizerConfig(kind='checkpoint'), certify=settings, **changes)
  workdir.mkdir(exist_ok=True)
  return Context(
    dataclasses.replace(config, model=dataclasses.replace(config.model, attention='reference')), workdir, model.mesh, lines.append
  )


def content(workdir):
  return json.loads((workdir / stage.FILE).read_text())


@pytest.mark.long
@pytest.mark.needs('uvicorn')
def test_every_way_of_a_tiny_model_holds(checkpoint, tmp_path):
  lines = []
  result = stage.certify(context(checkpoint, tmp_path, lines))['certify']
  written = content(tmp_path)
  names = [way['way'] for way in written['ways']]
  assert written['holds'] and result['ways'] == len(names) == len(set(names)) == 4 + 2 * 8
  for kind in ('exact', 'packed'):
    assert {name.split(', ', 2)[2] for name in names if name.startswith(f'our server, {kind}')} == {
      '/score', '/reward', '/classify', '/encode', '/classify (vllm)', '/v1/embeddings', '/get_reward',
      '/pooling (vllm)' if kind == 'exact' else '/pooling (lmdeploy)',
    }  # fmt: skip
  count = sum(len(group.candidates) for group in rows.fixed_rows())
  assert {way['compared'] for way in written['ways']} == {count} and result['rewards'] == count
  assert all(way['same_bits'] for way in written['ways'] if way['exact'])
  assert not all(way['same_bits'] for way in written['ways'])  # packing changes some last bits, or it would not be packing
  assert any('our server, exact, /score' in line and 'same bits' in line for line in lines)


def test_a_way_with_other_rewards_ends_the_stage_after_the_file_is_written(checkpoint, tmp_path, monkeypatch):
  def by_our_server(model, groups, log):
    expected = ways.offline(model, groups)
    yield ways.Way('off by a bit', range(len(groups)), [np.nextafter(r, np.float32(9)) for r in expected], exact=True)
    yield ways.Way('near', range(len(groups)), [np.nextafter(r, np.float32(9)) for r in expected])
    yield ways.Way('squashed', range(len(groups)), [1 / (1 + np.exp(-r)) for r in expected])
    yield ways.Way('other', [0, 2], [expected[0] + 1, expected[2]])

  monkeypatch.setattr(ways, 'by_our_server', by_our_server)
  monkeypatch.setattr(ways, 'in_this_process', lambda model, groups: ())
  lines = []
  with pytest.raises(UserError, match=r'3 of 4 ways give other rewards: off by a bit differs by .*; squashed applies a sigmoid .*; other '):
    stage.certify(context(checkpoint, tmp_path, lines))
  written = content(tmp_path)
  assert not written['holds'] and [way['holds'] for way in written['ways']] == [False, True, False, False]
  assert sum('DOES NOT HOLD' in line for line in lines) == 3


def test_rows_of_a_file_are_grouped_by_prompt_and_reference(tmp_path):
  path = tmp_path / 'rows.jsonl'
  given = [('p', 'r', 'a'), ('q', 'r', 'b'), ('p', 'r', 'c'), ([{'role': 'user', 'content': 'p'}], 'r', 'd'), ('p', 's', 'e')]
  path.write_text('\n'.join(json.dumps({'prompt': p, 'reference': r, 'output': o}) for p, r, o in given))
  assert [list(group.candidates) for group in rows.read_rows(path, 'raise', True)] == [['a', 'c'], ['b'], ['d'], ['e']]
  path.write_text('')
  with pytest.raises(UserError, match=r'rows\.jsonl'):
    rows.read_rows(path, 'raise', True)


@pytest.mark.long
@pytest.mark.needs('uvicorn')
def test_a_running_server_is_compared(checkpoint, tmp_path, monkeypatch):
  """Of the same model, which holds; of another one, which does not; and of none."""
  monkeypatch.setattr(ways, 'by_our_server', lambda *_: ())
  monkeypatch.setattr(ways, 'in_this_process', lambda *_: ())
  with running(tiny_model(), max_length=256) as server:
    address = f'{server.client.host}:{server.client.port}'
    stage.certify(context(checkpoint, tmp_path, [], certify={'polar': address, 'sglang': address}))
    assert [way['way'] for way in content(tmp_path)['ways']] == [f'polar at {address}', f'sglang at {address}']
    assert all(way['same_bits'] for way in content(tmp_path)['ways'])


@pytest.mark.needs('torch', 'transformers')
def test_transformers_is_compared(checkpoint, tmp_path, monkeypatch):
  monkeypatch.setattr(ways, 'by_our_server', lambda *_: ())
  monkeypatch.setattr(ways, 'in_this_process', lambda *_: ())
  stage.certify(context(checkpoint, tmp_path, [], certify={'transformers': True}))
  (way,) = content(tmp_path)['ways']
  assert way['way'] == 'transformers, float32' and 0 < way['max_difference'] < 1e-4


@pytest.mark.parametrize(
  ('change', 'message'),
  [({'checkpoint': None}, 'checkpoint is not set'), ({'checkpoint': '/nowhere'}, '/nowhere: no such file or folder')],
)
def test_a_checkpoint_is_needed(checkpoint, tmp_path, change, message):
  given = context(checkpoint, tmp_path, [])
  with pytest.raises(ConfigError, match=message):
    stage.certify(dataclasses.replace(given, config=dataclasses.replace(given.config, **change)))


def test_compare():
  a, b = [np.array([1, 2, 3], np.float32), np.array([0], np.float32)], [np.array([1, 3.5, 3], np.float32), np.array([0], np.float32)]
  result = compare(a, b, 1e-3)
  assert result[:3] == (4, 1.5, 0.375) and not result.same_bits and (result.flips, result.pairs) == (1, 3) and not result.squashed
  same = compare(a, a, 1e-3)
  assert same == (4, 0.0, 0.0, True, 0, 3, False)
  assert compare(a, [1 / (1 + np.exp(-x)) for x in a], 1e-3).squashed
