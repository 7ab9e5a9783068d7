"""One small world shared by the tests of this folder, which only read it."""

from __future__ import annotations

import pathlib
from collections.abc import Callable

import pytest

from polar_jax import config as config_lib
from polar_jax.miniature import corpora, triplets, vocabulary
from polar_jax.miniature import world as world_lib

SEED = 3


@pytest.fixture(scope='session')
def library():
  """The corpora of this Python, which take seconds to read."""
  return corpora.load_corpora()


@pytest.fixture(scope='session')
def small_config():
  return config_lib.SynthesizeConfig(
    vocab_size=400, policies=16, unseen_policies=5, train_examples=40, evaluation_examples=12, preference_examples=24,
    preference_evaluation_examples=8, max_tokens=16, documents=400, document_tokens=48,
  )  # fmt: skip


@pytest.fixture(scope='session')
def synthesize(library) -> Callable[..., tuple[world_lib.SynthesisResult, list[str]]]:
  """(config, workdir) -> (result, log lines) of a synthesis that does not read the corpora again."""

  def run(config: config_lib.SynthesizeConfig, workdir: pathlib.Path):
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(corpora, 'load_corpora', lambda: library)
      return world_lib.synthesize(config, SEED, workdir, lines.append), lines

  return run


@pytest.fixture(scope='session')
def small_run(tmp_path_factory, small_config, synthesize):
  """(workdir, result) of a synthesis."""
  workdir = tmp_path_factory.mktemp('synthesis')
  return workdir, synthesize(small_config, workdir)[0]


@pytest.fixture(scope='session')
def world(small_run, small_config, library):
  """The world of `small_run`, with its pool loaded from disk."""
  workdir = small_run[0]
  vocab = vocabulary.Vocabulary(workdir / 'data' / world_lib.TOKENIZER)
  prompts, unseen = (vocabulary.part_streams(vocab, library, part) for part in ('prompts', 'unseen'))
  sources = triplets.prefix_sources(prompts, unseen, small_config)
  return triplets.World(world_lib.load_pool(workdir), sources, vocab.pieces, small_config, SEED)
