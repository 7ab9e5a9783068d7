"""Tests of checking, printing and writing a certificate. (convert_test.py tests its content.)"""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

from polar_jax import sharding
from polar_jax.checkpoints.certificate import FILE, Certificate, fixed_rows_scores
from polar_jax.config import MeshConfig, ModelConfig
from polar_jax.model.reward_model import RewardModel
from polar_jax.types import UserError

GOOD = Certificate(
  source='there',
  output='here',
  family='llama',
  head='lm',
  parameters=1234567,
  dtypes=('bfloat16', 'float32'),
  exact=True,
  tensors={'a': ('0' * 64, '0' * 64), 'long.name': ('12' * 32, '12' * 32)},
  scores=([1.0, -2.5], [1.0, -2.5]),
)


def changed(**changes):
  return dataclasses.replace(GOOD, **changes)


@pytest.mark.parametrize(
  ('certificate', 'message'),
  [
    (
      changed(tensors={**GOOD.tensors, 'b': ('1' * 64, '2' * 64), 'c': ('1', '3')}),
      r"^here: tensor 'b' reads back differently from there \(2 tensors differ\)",
    ),
    (changed(scores=([1.0, -2.5], [1.0, -2.25])), r'^here: scores differ by 0.25 from those of there; output discarded$'),
    (changed(scores=([1.0, -2.5], [1.0, np.nan])), r'^here: scores differ by nan'),
    (changed(scores=([1.0, np.inf], [1.0, np.inf]), exact=False), r'^here: scores differ by nan'),
  ],
)
@pytest.mark.filterwarnings('ignore:invalid value')
def test_check_refuses_differences(certificate, message):
  with pytest.raises(UserError, match=message):
    certificate.check()


def test_check_accepts_equal():
  GOOD.check()
  cast = changed(scores=([1.0, -2.5], [1.0, -2.25]), exact=False)
  cast.check()
  assert (GOOD.max_difference, cast.max_difference) == (0, 0.25)


def test_lines_and_write(tmp_path):
  assert GOOD.lines() == [
    'certificate: tensor, SHA-256 (first 16 digits)',
    '  a          0000000000000000',
    '  long.name  1212121212121212',
    'lm model of family llama, 1,234,567 parameters, stored as bfloat16, float32',
    '2 of 2 tensors read back bit-identical',
    '2 fixed rows scored before and after: max |difference| 0',
  ]
  odd = changed(tensors={'a': ('0' * 64, '1' * 64)}, exact=False).lines()
  assert odd[1] == '  a  0000000000000000  read back as 1111111111111111'
  assert odd[3] == '0 of 1 tensors read back bit-identical after the cast to that dtype'
  GOOD.write(tmp_path)
  kept = json.loads((tmp_path / FILE).read_text())
  assert kept == json.loads(json.dumps(dataclasses.asdict(GOOD))) | {'max_difference': 0.0}


def test_fixed_rows_scores_are_independent_of_devices_and_settings(random_params):
  model = ModelConfig(vocab_size=50, num_layers=1, d_model=16, d_ff=16, num_heads=2, num_kv_heads=1, head_dim=8)
  params = random_params(RewardModel, model)
  scores = []
  for devices, dtype in ((1, 'float32'), (3, 'float32'), (1, 'bfloat16')):
    mesh = sharding.make_mesh(MeshConfig(data=devices, fsdp=1), jax.devices()[:devices])
    scores.append(fixed_rows_scores(params, dataclasses.replace(model, compute_dtype=dtype), 'reward', mesh))
  assert len(scores[0]) == 8 and np.ptp(scores[0]) > 0.5
  np.testing.assert_allclose(scores[1], scores[0], atol=1e-5)
  assert scores[2] == scores[0]
