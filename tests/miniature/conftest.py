"""A small world shared by the tests of this folder; it is read only."""

from __future__ import annotations

import pytest

from polar_jax import config as config_lib
from polar_jax.miniature import corpora
from polar_jax.miniature import world as engine


@pytest.fixture(scope='session')
def library():
  return corpora.load_corpora()


@pytest.fixture(scope='session')
def small_config():
  return config_lib.SynthesizeConfig(
    vocab_size=400, policies=16, unseen_policies=5, train_examples=40, evaluation_examples=12, preference_examples=24,
    preference_evaluation_examples=8, max_tokens=16,
  )  # fmt: skip


@pytest.fixture(scope='session')
def small_run(tmp_path_factory, small_config):
  workdir = tmp_path_factory.mktemp('synthesis')
  lines: list[str] = []
  return workdir, engine.synthesize(small_config, 3, workdir, lines.append), lines
