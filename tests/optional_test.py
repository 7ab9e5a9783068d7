"""Tests that need a package are left out if it is missing, and only then."""

from __future__ import annotations

import pathlib
import types

import optional
import pytest


@pytest.fixture
def conftest(request):
  (module,) = [p for p in request.config.pluginmanager.get_plugins() if str(getattr(p, '__file__', '')).endswith('tests/conftest.py')]
  return module


@pytest.fixture
def without_torch(monkeypatch):
  monkeypatch.setattr(optional, 'is_installed', lambda package: package not in ('torch', 'transformers'))


def test_a_missing_package_is_a_reason_with_the_command_that_installs_it(conftest, request, without_torch, monkeypatch):
  monkeypatch.delenv('POLAR_TEST_REQUIRE', raising=False)
  request.node.add_marker(pytest.mark.needs('gguf'))
  assert conftest._reason_to_leave_out(request.config, request.node) is None
  request.node.add_marker(pytest.mark.needs('torch', 'transformers'))
  assert conftest._reason_to_leave_out(request.config, request.node) == "that need torch and transformers (pip install -e '.[parity]')"


def test_a_required_package_must_not_be_missing(conftest, request, without_torch, monkeypatch):
  request.node.add_marker(pytest.mark.needs('torch'))
  monkeypatch.setenv('POLAR_TEST_REQUIRE', 'gguf')
  assert conftest._reason_to_leave_out(request.config, request.node)
  monkeypatch.setenv('POLAR_TEST_REQUIRE', 'gguf torch')
  with pytest.raises(pytest.UsageError, match='needs torch, which POLAR_TEST_REQUIRE requires'):
    conftest._reason_to_leave_out(request.config, request.node)


def test_a_package_without_an_install_command_is_refused(conftest, request):
  request.node.add_marker(pytest.mark.needs('tocrh'))
  with pytest.raises(pytest.UsageError, match=r"needs \['tocrh'\]: add the command"):
    conftest._reason_to_leave_out(request.config, request.node)


def test_a_stand_in_only_lets_files_be_collected(without_torch, monkeypatch):
  from optional import torch

  with pytest.raises(ModuleNotFoundError, match=r"mark the test with @pytest.mark.needs\('torch'\)"):
    torch.zeros(3)
  monkeypatch.setattr(optional._StandIn, 'collecting', True)
  assert torch.nn.Parameter(torch.zeros(3)[1:].T) is torch


def test_only_packages_with_an_install_command_are_optional():
  with pytest.raises(ImportError):
    from optional import jax  # noqa: F401


def test_long_files_come_first_then_those_with_many_tests_and_files_stay_together(conftest):
  files = ['b_test.py', 'a_test.py', 'c_test.py', 'resume_test.py', 'a_test.py', 'c_test.py', 'c_test.py']
  items = [types.SimpleNamespace(path=pathlib.Path('tests', name)) for name in files]
  ordered = [item.path.name for item in conftest._longest_first(items)]
  assert ordered == ['resume_test.py', *['c_test.py'] * 3, *['a_test.py'] * 2, 'b_test.py']
