"""A vLLM server for slow tests, from an environment of its own: POLAR_VLLM names its `vllm` command."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import jax
import pytest

from polar_jax.api_models import RewardModel
from polar_jax.config import ModelConfig, TemplateConfig

COMMAND = os.environ.get('POLAR_VLLM')

needs_vllm = pytest.mark.skipif(not COMMAND, reason='POLAR_VLLM does not name the vllm command of an environment with vLLM')

# Without AVX-512 float32 is the fastest; prompts read in chunks break seeds on a CPU (docs/pools.md).
_CPU = ['--dtype', 'float32', '--enforce-eager', '--no-enable-chunked-prefill', '--max-num-batched-tokens', '32768']


_REWARD_MODEL = ModelConfig(family='internlm2', num_layers=2, d_model=128, d_ff=256, num_heads=2, num_kv_heads=1, head_dim=64)


def internlm2_reward_model(data_folder: pathlib.Path) -> RewardModel:
  """Return a reward model of random weights that vLLM can serve, with rewards on both sides of 0."""
  model = RewardModel.init(_REWARD_MODEL, data_folder / 'tokenizers/internlm2/tokenizer.model', seed=3)
  # The separator must be one token, as in POLAR's own tokenizer, which adds one: vLLM splits the whole text, the template its parts.
  model.template_config = TemplateConfig(separator='[UNUSED_TOKEN_131]')
  model.params['v_head'] = jax.tree.map(lambda a: 0.5 * jax.random.normal(jax.random.key(1), a.shape, a.dtype), model.params['v_head'])
  return model


@contextlib.contextmanager
def vllm_server(model: pathlib.Path, log: pathlib.Path, *arguments: str, timeout: float = 900) -> Iterator[str]:
  """Yield the address of a server of the model, once it is ready. All its processes are ended afterwards."""
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  command = [str(COMMAND), 'serve', str(model), '--host', '127.0.0.1', '--port', str(port), *_CPU, *arguments]
  environment = {'VLLM_CPU_KVCACHE_SPACE': '2', 'VLLM_CPU_OMP_THREADS_BIND': 'nobind', 'HF_HUB_OFFLINE': '1', 'VLLM_NO_USAGE_STATS': '1'}
  with log.open('w') as output:
    process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | environment, start_new_session=True)
  address = f'http://127.0.0.1:{port}'
  try:
    deadline = time.monotonic() + timeout
    while not _is_ready(address):
      assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-5_000:]
      time.sleep(1)
    yield address
  finally:
    with contextlib.suppress(ProcessLookupError):
      os.killpg(process.pid, signal.SIGKILL)  # its workers too, which outlive it
    process.wait()


def _is_ready(address: str) -> bool:
  try:
    with urllib.request.urlopen(f'{address}/health', timeout=5) as reply:
      return reply.status == 200
  except (OSError, urllib.error.URLError):
    return False
