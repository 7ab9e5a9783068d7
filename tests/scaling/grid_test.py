"""The cells of a sweep, and the models and settings of its jobs."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from polar_jax.config import Config, ConfigError, ModelConfig, SweepConfig, TrainConfig
from polar_jax.scaling import grid
from polar_jax.scaling.grid import Cell, Job


def test_cells_are_all_combinations_ordered_by_size():
  sweep = SweepConfig(sizes=('16x1', '8x1'), tokens=(600, 300), learning_rates=(1e-3, 2e-3), batches=(4, 8))
  cells = grid.cells_of(dataclasses.replace(Config(), sweep=sweep, model=ModelConfig(head_dim=8)))
  assert len(cells) == len({cell.name for cell in cells}) == 2 * 2 * 2 * 2
  assert [cell.size for cell in cells] == ['8x1'] * 8 + ['16x1'] * 8
  assert cells[0] == Cell('8x1', 300, 1e-3, 4) and cells[-1] == Cell('16x1', 600, 2e-3, 8)


def test_tokens_scale_with_a_power_of_the_parameters():
  model = ModelConfig(num_layers=2, d_model=16, d_ff=32, num_heads=2, num_kv_heads=2, head_dim=8, vocab_size=50)
  config = Config(model=model, sweep=SweepConfig(sizes=('16x2', '32x2'), tokens=(1_000_000,), tokens_exponent=0.5))
  # Embedding, four attention matrices and three feed-forward matrices in each of two layers, five norms, the head.
  count = lambda width: 50 * width + 2 * (4 * width**2 + 3 * width * 2 * width) + 5 * width + width
  cells = grid.cells_of(config)
  assert [cell.tokens for cell in cells] == [1_000_000, round(1e6 * np.sqrt(count(32) / count(16)), -4)]
  assert grid.job_named(config, cells[1].name).cell == cells[1]


def test_job_named_refuses_unknown_names():
  with pytest.raises(ConfigError, match="no run 'nothing'"):
    grid.job_named(Config(model=ModelConfig(head_dim=8)), 'nothing')


def test_model_of_keeps_the_proportions_of_the_model():
  base = ModelConfig(num_layers=3, d_model=64, d_ff=192, num_heads=4, num_kv_heads=2, head_dim=16, init_std=0.12, scan_unroll=3)
  config = Config(model=base)
  assert grid.model_of(config, '64x3') == base
  wide = grid.model_of(config, '128x5')
  assert (wide.num_layers, wide.d_ff, wide.num_heads, wide.num_kv_heads, wide.scan_unroll) == (5, 384, 8, 4, 5)
  assert wide.init_std == pytest.approx(0.12 / np.sqrt(2))
  narrow = grid.model_of(config, '8x1')  # narrower than a head
  assert (narrow.head_dim, narrow.num_heads, narrow.num_kv_heads) == (8, 1, 1)
  between = grid.model_of(config, '40x3')  # not a multiple of the head dimension
  assert (between.head_dim, between.num_heads, between.num_kv_heads) == (10, 4, 2)
  odd = grid.model_of(Config(model=dataclasses.replace(base, head_dim=15)), '64x3')  # the largest smaller even one
  assert (odd.head_dim, odd.num_heads) == (8, 8)


@pytest.mark.parametrize('size', ['64', 'ax3', '64x0', '7x1', '41x2', '0x1', '64x3x2'])
def test_model_of_refuses_invalid_sizes(size):
  with pytest.raises(ConfigError, match=r'sweep\.sizes'):
    grid.model_of(Config(model=ModelConfig(head_dim=16)), size)


def test_config_of_scales_learning_rates_with_the_width():
  model = ModelConfig(num_layers=1, d_model=64, d_ff=64, num_heads=8, num_kv_heads=8, head_dim=8)
  config = Config(seed=3, model=model, pretrain_lm=TrainConfig(learning_rate=4e-3), sweep=SweepConfig(width_exponent=0.5))
  cell = Cell('16x1', 300, 3e-3, 4, seed=2)
  run = grid.config_of(config, Job('16x1', cell))
  # A quarter of the width: rates are multiplied by 4^0.5.
  assert run.pretrain.learning_rate == pytest.approx(6e-3) and run.pretrain_lm.learning_rate == pytest.approx(8e-3)
  assert (run.stage, run.seed, run.pretrain.batch_size, run.model.d_model) == ('pretrain', 5, 4, 16)
  language_model = grid.config_of(config, Job('256x1', None, 1))
  assert language_model.pretrain_lm.learning_rate == pytest.approx(2e-3)
  assert (language_model.stage, language_model.seed) == ('pretrain_lm', 4) and language_model.pretrain == config.pretrain


def test_cost_is_parameters_without_embedding_times_tokens():
  model = ModelConfig(num_layers=2, d_model=16, d_ff=32, num_heads=2, num_kv_heads=2, head_dim=8, vocab_size=50)
  without_embedding = lambda width: 2 * (4 * width**2 + 3 * width * 2 * width) + 5 * width + width
  for width, tokens in ((16, 100), (32, 700)):
    job = Job(f'{width}x2', Cell(f'{width}x2', tokens, 1e-3, 4))
    assert grid.cost(Config(model=model), job) == without_embedding(width) * tokens


def test_names_and_folders_of_jobs(tmp_path):
  cell = Cell('8x1', 300, 1e-3, 4, seed=2)
  assert cell.name == '8x1_tokens300_lr0.001_batch4_seed2' and dataclasses.replace(cell, seed=0).name == '8x1_tokens300_lr0.001_batch4'
  run, lm = Job('8x1', cell, lm_seed=5), Job('8x1', None, lm_seed=5)
  assert (run.seed, run.name, run.run_name) == (2, cell.name, f'sweep/{cell.name}')
  assert (lm.seed, lm.name, lm.folder(tmp_path)) == (5, '8x1_lm_seed5', tmp_path / 'sweep/8x1_lm_seed5')


@pytest.mark.parametrize(('unroll', 'size', 'expected'), [(1, '64x5', 1), (2, '64x5', 2), (3, '64x5', 5), (3, '128x3', 3), (4, '64x2', 2)])
def test_layers_that_are_all_unrolled_stay_so_at_another_depth(unroll, size, expected):
  base = ModelConfig(num_layers=3, d_model=64, d_ff=192, num_heads=6, num_kv_heads=2, head_dim=16, scan_unroll=unroll)
  assert grid.model_of(Config(model=base), size).scan_unroll == expected


def test_the_feed_forward_width_is_rounded_and_at_least_one():
  base = ModelConfig(num_layers=3, d_model=64, d_ff=150, num_heads=4, num_kv_heads=2, head_dim=16)
  assert [grid.model_of(Config(model=base), size).d_ff for size in ('40x3', '24x3')] == [94, 56]  # of 93.75 and 56.25
  assert grid.model_of(Config(model=dataclasses.replace(base, d_ff=2)), '8x1').d_ff == 1
