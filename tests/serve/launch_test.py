"""The files that start a server on machines of others: a unit of systemd and a manifest of Kubernetes."""

from __future__ import annotations

import configparser
import pathlib
import runpy
import shlex
import shutil
import subprocess

import pytest
import yaml

from polar_jax.config import ServeConfig
from polar_jax.config.parsing import parse
from polar_jax.serve import client

LAUNCH = pathlib.Path(__file__).parents[2] / 'launch'
DEFAULTS = ServeConfig()


def unit():
  parser = configparser.ConfigParser(interpolation=None, comment_prefixes='#', delimiters='=')
  parser.optionxform = str
  parser.read_string((LAUNCH / 'polar_reward.service').read_text())
  return parser


def manifests():
  return {one['kind']: one for one in yaml.safe_load_all((LAUNCH / 'reward_server.yaml').read_text())}


def commands():
  (container,) = manifests()['Deployment']['spec']['template']['spec']['containers']
  return {'systemd': shlex.split(unit()['Service']['ExecStart']), 'kubernetes': container['command']}


@pytest.mark.parametrize('where', ['systemd', 'kubernetes'])
def test_the_command_is_understood(where):
  _, *start, file = (command := commands()[where])[:4]
  assert [*start, file] == ['-m', 'polar_jax.main', '--config=configs/serve.py']
  settings = runpy.run_path(str(LAUNCH.parent / file.removeprefix('--config=')))['get_config']()
  options = dict(option.removeprefix('--').split('=', 1) for option in command[4:])
  assert options.pop('workdir').startswith('/')
  settings.update_from_flattened_dict({name.removeprefix('config.'): value for name, value in options.items()})
  config = parse(settings)
  assert config.stage == 'serve' and config.checkpoint.endswith('CHECKPOINT')
  assert (config.serve.host, config.serve.token_env) == ('0.0.0.0', client.TOKEN_ENV)


def test_the_unit_lets_requests_finish_and_restarts():
  service = unit()['Service']
  assert float(service['TimeoutStopSec']) >= DEFAULTS.drain + 10
  assert service['Restart'] == 'always' and service['KillMode'] == 'mixed'
  assert f'token_env={client.TOKEN_ENV}' in service['ExecStart'] and service['EnvironmentFile'] == '/etc/polar_reward.env'
  assert service['StateDirectory'] == 'polar_reward' and '--workdir=/var/lib/polar_reward' in service['ExecStart']


@pytest.mark.skipif(not shutil.which('systemd-analyze'), reason='systemd is not installed')
def test_systemd_finds_no_mistake(tmp_path):
  text = (LAUNCH / 'polar_reward.service').read_text().replace('User=polar', 'User=root')
  file = tmp_path / 'polar_reward.service'
  file.write_text(text.replace('REPOSITORY/.venv/bin/python', '/bin/true').replace('REPOSITORY', '/'))
  result = subprocess.run(['systemd-analyze', 'verify', str(file)], capture_output=True, text=True, check=False)
  assert result.returncode == 0 and not result.stderr, result.stderr


def test_probes_secrets_and_volumes_fit_together():
  made = manifests()
  spec = made['Deployment']['spec']
  pod = spec['template']['spec']
  (container,) = pod['containers']
  assert pod['terminationGracePeriodSeconds'] >= DEFAULTS.drain + 10
  probes = {name: container[f'{name}Probe'] for name in ('startup', 'liveness', 'readiness')}
  assert [probe['httpGet']['path'] for probe in probes.values()] == ['/health', '/health', '/ready']
  (port,) = container['ports']
  assert port['containerPort'] == DEFAULTS.port and all(probe['httpGet']['port'] == port['name'] for probe in probes.values())
  assert {mount['name'] for mount in container['volumeMounts']} == {volume['name'] for volume in pod['volumes']}
  (variable,) = container['env']
  assert variable['name'] == client.TOKEN_ENV and f'--config.serve.token_env={client.TOKEN_ENV}' in container['command']
  labels = spec['template']['metadata']['labels']
  assert spec['selector']['matchLabels'] == labels == made['Service']['spec']['selector']
  assert made['PodDisruptionBudget']['spec']['selector']['matchLabels'] == labels
  (published,) = made['Service']['spec']['ports']
  assert published['targetPort'] == port['name']
