from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import fast_compilation
import pytest

from polar_jax import main

ROOT = pathlib.Path(__file__).parent.parent
GOOD = """
from polar_jax.config import default_config

def get_config():
  config = default_config()
  config.tokenizer.kind = 'byte'
  return config
"""
BAD_CONFIGS = {  # content of the config file: part of the message
  'def get_config():\n  return {}["absent"]\n': "bad.py, line 2: KeyError: 'absent'",
  'def get_config():\n  return int("abc")\n': "bad.py, line 2: ValueError: invalid literal for int() with base 10: 'abc'",
  'def get_config():\n  return open("/no/such/file")\n': 'bad.py, line 2: FileNotFoundError',
  'import no_such_module\n': "bad.py, line 1: ModuleNotFoundError: No module named 'no_such_module'",
  'def get_config(:\n': 'bad.py, line 1: invalid syntax',
  'x = 1\n': 'get_config',
  'def get_config():\n  return 3\n': 'bad.py: get_config() must return a config made by default_config(), not int',
  GOOD.replace('tokenizer.kind', 'tokenizer.kindd'): 'unknown setting tokenizer.kindd; tokenizer has: kind, path',
  GOOD.replace('tokenizer.kind', 'data.on_bad_row'): 'unknown setting data.on_bad_row; it is called data.on_bad_example now',
  GOOD.replace('tokenizer.kind', 'train.steps'): 'bad.py, line 6: unknown setting train; it is called pretrain now',
  GOOD.replace('tokenizer.kind', "['lm'].steps").replace('.[', '['): 'bad.py, line 6: unknown setting lm; it is called pretrain_lm now',
  GOOD.replace("config.tokenizer.kind = 'byte'", "config.rft.policy = 'lm'"): "rft.policy is 'lm'; that stage is called 'pretrain_lm' now",
}


@pytest.fixture
def command(tmp_path):
  (tmp_path / 'good.py').write_text(GOOD)

  def run(*arguments, module='polar_jax', **environment):
    env = fast_compilation.environment(**environment)
    line = [sys.executable, '-m', module, *arguments]
    return subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)

  return run


def one_line(result, status=2):
  """Return the message, which must be the only line on stderr."""
  assert 'Traceback' not in result.stderr + result.stdout
  assert result.returncode == status, result.stderr
  (line,) = result.stderr.splitlines()
  return line.removeprefix('polar_jax: ')


@pytest.mark.parametrize(('encoding', 'named'), [('utf-16', 'UTF-16'), ('cp1252', 'WINDOWS-1252')])
def test_a_config_file_in_another_encoding(command, tmp_path, encoding, named):
  (tmp_path / 'bad.py').write_bytes(GOOD.replace("'byte'", "'é' and 'byte'").encode(encoding))
  message = one_line(command('--config=bad.py'))
  assert message.startswith('bad.py: not UTF-8') and f'it seems to be {named}: ' in message


def test_config_is_required(command):
  assert one_line(command()) == '--config=FILE is required, for example --config=configs/tiny.py; --help lists all settings'


@pytest.mark.parametrize(
  ('arguments', 'expected'),
  [
    (['--config=absent.py'], 'absent.py'),
    (['--config=absent.py', '--config.stage=all'], 'absent.py'),
    (['--config=good.py', '--config.pretrain.stepz=5'], 'unknown setting pretrain.stepz; pretrain has: b1'),
    (
      ['--config=good.py', '--config.pretrain.steps=5', '--config.trian.steps=5'],
      'unknown setting trian; the config has: ablation_learning_rate, ablations',
    ),
    (['--config=good.py', '--config.train.steps=5'], 'unknown setting train.steps; it is called pretrain.steps now'),
    (['--config=good.py', '--config.rft.lam=0.9'], 'unknown setting rft.lam; it is called rft.gae_lambda now'),
    (['--config=good.py', '--config.pretrain.start_from=lm'], "pretrain.start_from is 'lm'; that stage is called 'pretrain_lm' now"),
    (
      ['--config=good.py', '--config.stage=finetune', '--config.sweep.workers=5'],
      'sweep.workers is set, but stage finetune does not read section sweep; it reads: finetune, model, ',
    ),
    (['--config=good.py', '--help', 'nonsense'], '--help nonsense: no such stage, section or option; stages: all, '),
    (['--config=good.py', '--config.stage.x=5'], 'unknown setting stage.x; stage is a setting, not a section'),
    (['--config=good.py', '--config.pretrain.steps=abc'], '--config.pretrain.steps=abc'),
    (['--config=good.py', '--config.ablations=maybe'], '--config.ablations=maybe'),
    (['--config=good.py', '--config.stage=foo'], "stage is 'foo'; it must be one of: all, synthesize, pretrain_lm, pretrain, finetune"),
    (['--config=good.py', '--config.pretrain.learning_rate=-1'], 'pretrain.learning_rate is -1.0; it must be > 0'),
    (['--config=good.py', '--config.stage=plan,fit'], "stage is 'plan,fit'"),
    (['--config.pretrain.steps=5', '--config=good.py'], '--config.pretrain.steps=5 in argv before a value for --config'),
    (['--config=good.py', '--stage=all'], "Unknown command line flag 'stage'"),
    (['--config=good.py', 'stage=all'], "unexpected argument 'stage=all'"),
  ],
)
def test_bad_command_line_is_one_line(command, arguments, expected):
  assert expected in one_line(command(*arguments))


@pytest.mark.parametrize(('content', 'expected'), BAD_CONFIGS.items(), ids=range(len(BAD_CONFIGS)))
def test_bad_config_file_is_one_line(command, tmp_path, content, expected):
  (tmp_path / 'bad.py').write_text(content)
  assert expected in one_line(command('--config=bad.py'))


def test_what_a_config_file_sets_can_be_none_on_the_command_line(command, tmp_path):
  lines = ["checkpoint = 'a'", 'finetune.evaluate_every = 7', 'finetune.steps = 9', "data.preferences = 'b'", 'ablations = True']
  (tmp_path / 'set.py').write_text(GOOD.replace('return config', ''.join(f'config.{line}\n  ' for line in lines) + 'return config'))
  given = ['data.preferences=None', 'finetune.evaluate_every=None', 'finetune.clip_norm=None', 'seeds=2']
  order = ['finetune.steps=None', 'finetune.steps=5', 'ablation_learning_rate=0.1', 'ablation_learning_rate=None']  # the last one counts
  options = [*(f'--config.{setting}' for setting in given + order), '--config.checkpointing.folder', 'None']
  message = one_line(command('--config=set.py', '--config.stage=finetune', '--workdir=run', *options), status=1)
  found = json.loads((tmp_path / 'run' / 'config.json').read_text())
  assert (found['checkpoint'], found['ablations'], found['seeds']) == ('a', True, 2)
  assert found['data']['preferences'] is None and 'preferences' in message  # the workdir has none
  assert (found['finetune']['evaluate_every'], found['finetune']['clip_norm'], found['finetune']['steps']) == (None, None, 5)
  assert found['ablation_learning_rate'] is None and found['checkpointing']['folder'] is None


@pytest.mark.parametrize(
  ('setting', 'expected'),
  [
    ('seeds=None', '--config.seeds=None'),  # it has no None
    ('pretrain.stepz=None', 'unknown setting pretrain.stepz; pretrain has: b1'),
    ('sweep.ray_address=None', 'sweep.ray_address is set, but stage fit does not read section sweep'),
  ],
)
def test_none_is_refused_where_it_means_nothing(command, setting, expected):
  assert expected in one_line(command('--config=good.py', '--config.stage=fit', f'--config.{setting}'))


@pytest.mark.long
def test_settings_of_a_config_file_may_belong_to_other_stages(command, tmp_path):
  (tmp_path / 'many.py').write_text(GOOD.replace("config.tokenizer.kind = 'byte'", 'config.finetune.steps = 5'))
  assert one_line(command('--config=many.py', '--config.stage=fit'), status=1).startswith('fit.input: ')


@pytest.mark.parametrize('module', ['polar_jax', 'polar_jax.main'])
def test_help_lists_options_without_a_config(command, module):
  result = command('--help', module=module)
  assert (result.returncode, result.stderr) == (0, '')
  assert '\n  --config.pretrain.steps\n      int or None; default None; >= 1\n' in result.stdout
  narrowed = command('--config=good.py', '--help', 'fit', module=module)
  assert narrowed.returncode == 0 and '--config.fit.flops' in narrowed.stdout and '--config.pretrain.steps' not in narrowed.stdout


def test_help_imports_no_jax(tmp_path):
  program = 'import sys; from polar_jax import main\ntry: main.console()\nexcept SystemExit as e: print(e.code, "jax" in sys.modules)'
  environment = os.environ | {'PYTHONPATH': str(ROOT)}
  line = [sys.executable, '-c', program, '--help']
  result = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True, timeout=60)
  assert result.stdout.splitlines()[-1] == '0 False'


def test_the_modules_and_the_console_script_are_one_command():
  assert "console_scripts': ['polar_jax=polar_jax.main:console']" in (ROOT / 'setup.py').read_text()
  assert 'from polar_jax.main import console' in (ROOT / 'polar_jax' / '__main__.py').read_text()


@pytest.mark.long
def test_missing_data_is_one_line_after_the_banner(command, tmp_path):
  result = command('--config=good.py', '--config.stage=pretrain', '--config.model.compute_dtype=bfloat16', '--workdir=run')
  message = one_line(result, status=1)
  assert message == 'data.triplets: nothing at run/data/triplets; name a data set there, or run the synthesize stage in this workdir first'
  first, devices, precision, stage = result.stdout.splitlines()
  assert first == 'polar_jax: stage pretrain, workdir run'
  assert devices == 'devices: 1 x cpu (cpu), 1 process(es); mesh data=1 fsdp=1 tensor=1 context=1'
  assert precision == 'precision: float32 parameters, bfloat16 compute'
  assert stage == '== pretrain'
  assert (tmp_path / 'run/config.json').exists()


@pytest.mark.long
def test_mesh_that_does_not_fit_is_one_line(command):
  result = command('--config=good.py', '--config.mesh.data=3', XLA_FLAGS='--xla_force_host_platform_device_count=8')
  assert one_line(result, status=1).startswith('mesh (data=3, fsdp=-1, tensor=1, context=1) does not fit 8 devices')


@pytest.mark.long
@pytest.mark.parametrize(
  ('environment', 'devices'),
  [({}, 2), ({'JAX_NUM_CPU_DEVICES': '3'}, 3), ({'XLA_FLAGS': '--xla_force_host_platform_device_count=4'}, 4)],
  ids=['option', 'variable', 'flag'],
)
def test_a_cpu_is_divided_into_devices_as_the_option_says_unless_the_environment_does(command, environment, devices):
  settings = ['--config.stage=pretrain', '--config.mesh.cpu_devices=2', '--config.mesh.data=-1', '--config.mesh.fsdp=1']
  result = command('--config=good.py', *settings, **{'XLA_FLAGS': fast_compilation.FLAGS, **environment})
  assert f'devices: {devices} x cpu (cpu), 1 process(es); mesh data={devices} fsdp=1 tensor=1 context=1' in result.stdout


@pytest.mark.long
def test_workdir_is_named_after_the_config(command, tmp_path):
  result = command('--config=good.py', '--config.stage=pretrain')
  assert result.stdout.startswith('polar_jax: stage pretrain, workdir runs/good\n')
  assert (tmp_path / 'runs/good/config.json').exists()


def test_our_warnings_are_one_plain_line_and_those_of_libraries_are_not(capsys):
  ours = str(ROOT / 'polar_jax' / 'data' / 'template.py')
  main._show_warning(UserWarning('no such token'), UserWarning, ours, 3)
  assert capsys.readouterr().err == 'polar_jax: warning: no such token\n'
  main._show_warning(UserWarning('of a library'), UserWarning, '/lib/site-packages/other.py', 3)
  assert '/lib/site-packages/other.py:3: UserWarning: of a library' in capsys.readouterr().err
