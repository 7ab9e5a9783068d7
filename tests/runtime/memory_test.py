"""Memory that a process can still allocate, as Linux describes it."""

from __future__ import annotations

import pathlib
import types

import pytest

from polar_jax.runtime import memory

MIB = 1 << 20


def write(root: pathlib.Path, files: dict[str, str]) -> pathlib.Path:
  for name, content in files.items():
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(content)
  return root


SYSTEM = {'meminfo': 'MemTotal: 9000000 kB\nMemFree: 1 kB\nMemAvailable: 8192 kB\n'}


@pytest.mark.parametrize(
  ('own', 'groups', 'expected'),
  [
    ('', {}, 8 * MIB),
    ('0::/\n', {'memory.max': str(5 * MIB), 'memory.current': str(2 * MIB), 'memory.stat': f'anon 1\ninactive_file {MIB}\n'}, 4 * MIB),
    ('0::/a/b\n', {'a/b/memory.max': 'max\n', 'a/b/memory.current': '0', 'a/memory.max': str(3 * MIB), 'a/memory.current': '0'}, 3 * MIB),
    ('0::/a\n', {'a/memory.max': str(MIB), 'a/memory.current': str(2 * MIB)}, 0),
    ('4:memory:/x\n3:cpu:/y\n', {'memory/x/memory.limit_in_bytes': '99', 'memory/x/memory.usage_in_bytes': '9'}, 90),
    ('4:memory:/x\n', {'memory/x/memory.limit_in_bytes': str((1 << 63) - 4096), 'memory/x/memory.usage_in_bytes': '9'}, 8 * MIB),
    ('4:memory:/of/the/host\n', {'memory/memory.limit_in_bytes': '70', 'memory/memory.usage_in_bytes': '9'}, 61),
  ],
)
def test_the_least_of_the_system_and_of_all_control_groups(tmp_path, own, groups, expected):
  proc, cgroups = write(tmp_path / 'proc', SYSTEM | {'self/cgroup': own}), write(tmp_path / 'cgroup', groups)
  assert memory.available_on_host(proc, cgroups) == expected


def test_a_system_that_does_not_say(tmp_path):
  assert memory.available_on_host(tmp_path, tmp_path) is None


def test_devices_say_for_themselves(monkeypatch):
  device = lambda stats, platform='gpu': types.SimpleNamespace(platform=platform, memory_stats=lambda: stats)
  assert memory.available(device({'bytes_limit': 100, 'bytes_in_use': 30})) == 70
  assert memory.available(device(None)) is None
  monkeypatch.setattr(memory, 'available_on_host', lambda: 5)
  assert memory.available(device(None, 'cpu')) == 5
