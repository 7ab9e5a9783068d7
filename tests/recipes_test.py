"""The config files of the published sizes: they have the paper's settings, and they run."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import pathlib
import shutil
import types

import pytest

from polar_jax import runner
from polar_jax.config import parse
from polar_jax.model import flops, heads
from polar_jax.recipes import word_problems
from polar_jax.scaling import grid
from polar_jax.stages import context as context_lib

CONFIGS = pathlib.Path(__file__).parent.parent / 'configs'


def load(name: str):
  spec = importlib.util.spec_from_file_location(f'config_{name}', CONFIGS / f'{name}.py')
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config()


@pytest.mark.parametrize(
  ('name', 'section', 'learning_rate', 'batch_size'),
  [
    ('1_8b', 'pretrain', 1.4e-5, 1940),
    ('7b', 'pretrain', 1.67e-5, 4343),
    ('finetune_1_8b', 'finetune', 1e-5, 320),
    ('finetune_7b', 'finetune', 2e-5, 320),
    ('finetune_7b_lora', 'finetune', 2e-4, 320),
  ],
)
def test_settings_of_the_paper(name, section, learning_rate, batch_size):
  config = parse(load(name))
  run = getattr(config, section)
  assert (run.learning_rate, run.batch_size, run.steps) == (learning_rate, batch_size, None)
  assert (run.b1, run.b2, run.weight_decay, run.clip_norm, run.warmup_ratio, run.final_lr_ratio) == (0.9, 0.95, 0.0, 1.0, 0.03, 0.1)
  assert (config.template.max_length, config.template.max_response_length, config.template.reward_token_id) == (16384, 4096, 92527)


@pytest.mark.parametrize(
  ('name', 'start'),
  [
    ('1_8b', 'internlm2_5_1_8b'),
    ('7b', 'internlm2_5_7b'),
    ('finetune_1_8b', 'polar_1_8b_base'),
    ('finetune_7b', 'polar_7b_base'),
    ('finetune_7b_lora', 'polar_7b_base'),
  ],
)
def test_a_missing_checkpoint_is_one_line(name, start, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  assert runner.run(parse(load(name)), tmp_path / 'run') == 1
  error = capsys.readouterr().err
  assert error == f'polar_jax: checkpoint checkpoints/{start}: no such file or folder\n'


def test_adapters_of_the_7b_model():
  """The learning rate and the micro-batches aside, the run is the paper's fine-tuning; its checkpoints are small."""
  full, adapters = (parse(load(name)) for name in ('finetune_7b', 'finetune_7b_lora'))
  lora = adapters.finetune.lora
  assert dataclasses.replace(full, finetune=adapters.finetune) == adapters and full.finetune.lora.rank is None
  assert (lora.rank, lora.base_dtype, len(lora.targets)) == (16, 'bfloat16', 7)
  trained = heads.num_trained(adapters.model, 'reward', lora)
  widths = 4096 + 4096, 2 * (4096 + 1024), 4096 + 4096, 3 * (4096 + 14336)
  assert trained == 32 * 16 * sum(widths) + 4096 < flops.reward_model_parameters(adapters.model).total / 150


@pytest.mark.slow
def test_7b_runs_on_eight_devices_with_only_size_data_and_mesh_overridden(tmp_path):
  rows = [{'prompt': f'{i}', 'reference': 'ab' * (i % 3), 'chosen': 'abab', 'rejected': 'c' * (i % 5)} for i in range(9_000)]
  (tmp_path / 'examples.jsonl').write_text('\n'.join(map(json.dumps, rows)))
  config = load('7b')
  config.tokenizer.kind = 'byte'
  config.template.reward_token_id = None  # 92527 is a token of the 7B tokenizer
  config.data.triplets = config.data.validation = str(tmp_path / 'examples.jsonl')
  config.data.row_length = 40
  config.pretrain.start_from = 'scratch'
  config.pretrain.evaluate_examples = 64
  config.model.update({'vocab_size': 512, 'num_layers': 2, 'd_model': 16, 'd_ff': 32, 'num_heads': 4, 'num_kv_heads': 2, 'head_dim': 8})
  config.mesh.update({'data': 2, 'fsdp': 2, 'tensor': 2})
  assert runner.run(parse(config), tmp_path / 'run') == 0
  summary = json.loads((tmp_path / 'run' / 'pretrain' / 'summary.json').read_text())
  # 4,343 rows on 4 shards are padded to 4,344; one epoch of 9,000 rows is two steps, and no padding row counts.
  assert (summary['steps'], summary['rows']) == (2, 2 * 4343)
  lines = [json.loads(line) for line in (tmp_path / 'run' / 'pretrain' / 'metrics.jsonl').read_text().splitlines()]
  histogram = lines[0]['reward_histogram']
  assert sum(histogram['chosen']) == sum(histogram['rejected']) == 4343
  assert lines[0]['loss'] == pytest.approx(0.693147, abs=1e-5)  # the head starts at zero


def test_fine_tuning_as_part_of_all_opens_the_tokenizer_of_its_start(tmp_path, monkeypatch):
  """Word problems name no `checkpoint`: the tokenizer is that of the checkpoint that fine-tuning starts from."""
  ran, opened = [], []

  def stage(config, workdir, name):
    def run(context):
      ran.append(name)
      if name == 'finetune':
        context.tokenizer(context.config.finetune.start_from)

    return run

  def open_pretrained(path):
    opened.append(str(path))
    return types.SimpleNamespace(tokenizer=lambda: None)

  monkeypatch.setattr(runner, '_stage', stage)
  monkeypatch.setattr(context_lib, 'open_pretrained', open_pretrained)
  monkeypatch.setattr(shutil, 'disk_usage', lambda _: types.SimpleNamespace(free=1 << 40))
  start = tmp_path / 'model.gguf'
  start.touch()
  config = word_problems('smollm2_135m', checkpoint=str(start))
  assert config.stage == 'all' and runner.run(parse(config), tmp_path) == 0
  assert ran == ['synthesize', 'finetune', 'rft'] and opened == [str(start)]
  start.unlink()
  assert runner.run(parse(config), tmp_path / 'again') == 1 and len(ran) == 3  # said before the first stage


def test_the_sweep_spans_a_factor_of_thirty_in_parameters():
  config = parse(load('sweep'))
  sizes = [
    flops.reward_model_parameters(dataclasses.replace(grid.model_of(config, size), vocab_size=config.synthesize.vocab_size))
    for size in config.sweep.sizes
  ]
  assert len(sizes) >= 5 and sizes == sorted(sizes) and sizes[-1].total > 30 * sizes[0].total


@pytest.mark.parametrize('name', ['tiny', 'small'])
def test_the_largest_size_of_the_miniature_needs_no_language_model_of_its_own(name):
  config = parse(load(name))
  cells = grid.cells_of(config)
  assert grid.model_of(config, cells[-1].size) == config.model and len(cells) == 3
