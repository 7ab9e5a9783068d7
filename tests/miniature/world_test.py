from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys

import numpy as np
import pytest

from polar_jax.data import text as text_lib
from polar_jax.data import tfds as triplet_dataset
from polar_jax.evaluate import baselines
from polar_jax.miniature import corpora, pool, preferences, triplets, vocabulary
from polar_jax.miniature import world as engine


@pytest.fixture(scope='module')
def world(small_run, small_config):
  workdir, result, _ = small_run
  text = text_lib.load_streams(workdir / 'data' / result.text)
  vocab = vocabulary.Vocabulary(workdir / 'data' / result.tokenizer)
  unseen = vocabulary.part_streams(vocab, corpora.load_corpora(), 'unseen')
  return triplets.World(
    engine.load_pool(workdir), triplets.prefix_sources(text['validation'], unseen, small_config), vocab.pieces, small_config, 3
  )


def test_rows_on_disk_are_the_rows_made(small_run, world):
  workdir, result, _ = small_run
  opened = triplet_dataset.open_triplets(workdir / 'data' / 'triplets')
  assert {f'triplets/{s}': len(rows) for s, rows in opened.items()} == {k: v for k, v in result.rows.items() if k.startswith('trip')}
  for split, rows in opened.items():
    made = triplets.make_triplets(world, split, len(rows))  # a reloaded pool makes the very same rows
    assert triplet_dataset.fingerprint(made) == triplet_dataset.fingerprint(rows) == result.fingerprints[f'triplets/{split}']


def test_provenance_of_rows(small_run, world):
  workdir = small_run[0]
  held_out = {p.name for p in world.pool if p.params.held_out}
  corpus = {p.name: p.params.corpus for p in world.pool}
  for name, wrapper in (('triplets', 'pretrain'), ('preferences', 'sft')):
    for split, rows in triplet_dataset.open_triplets(workdir / 'data' / name).items():
      for row in rows:
        names = [row.metadata[f'{role}_policy'] for role in triplets.ROLES]
        assert all((n in held_out) == (split == 'unseen_policies') for n in names) and row.wrapper == wrapper
        if name == 'triplets':
          assert names[0] == names[1] != names[2] and row.category == corpus[names[0]]
        else:
          assert len(set(names)) == 3 and row.category in preferences.CATEGORIES
          assert row.metadata['kl_near'] <= row.metadata['kl_far']
        for field in ('prompt', *triplets.ROLES):
          ids = row.metadata[f'{field}_ids']
          assert ids.dtype == np.int32 and ''.join(world.pieces[ids]) == getattr(row, field) and len(ids) >= 4


def test_row_i_is_a_function_of_seed_split_and_i(world):
  few, many = triplets.make_triplets(world, 'validation', 5), triplets.make_triplets(world, 'validation', 33)
  one = dataclasses.replace(world, config=dataclasses.replace(world.config, workers=1))
  digest = triplet_dataset.fingerprint(few)
  assert digest == triplet_dataset.fingerprint(many[:5]) == triplet_dataset.fingerprint(triplets.make_triplets(one, 'validation', 5))
  other = dataclasses.replace(world, seed=4)
  assert digest != triplet_dataset.fingerprint(triplets.make_triplets(other, 'validation', 5))


def test_reference_and_chosen_are_independent_samples(world):
  rows = triplets.make_triplets(world, 'train', 60)
  assert np.mean([r.reference == r.chosen for r in rows]) < 0.1


def test_prefixes_come_from_the_right_text(small_run, world):
  source = {s: {n: v.tobytes() for n, v in p.streams.items()} for s, p in world.prefixes.items()}
  assert source['unseen_prompts'] == source['unseen_policies'] != source['validation'] != source['train']
  uniforms = np.random.default_rng(0).random((300, 3))
  for split, prefixes in world.prefixes.items():
    drawn = prefixes.draw(uniforms)
    assert {len(p) for p in drawn} == set(range(4, 13)), split
    assert all(vocabulary.EOS_ID not in p for p in drawn)


def test_near_and_far(world):
  rng = np.random.default_rng(0)
  kl = rng.random((16, 16)) * 5
  np.fill_diagonal(kl, 0)
  members = world.members('train')
  chosen = preferences.choose_policies(kl, members, rng.random((500, 3)))
  assert set(chosen.ravel()) <= set(members)
  for target, near, far in chosen:
    ranked = sorted((m for m in members if m != target), key=lambda m: kl[target, m])
    assert len({target, near, far}) == 3 and near in ranked[:1] and far in ranked[2:]
  with pytest.raises(ValueError, match='three policies'):
    preferences.choose_policies(kl, members[:2], rng.random((5, 3)))


def test_the_ideal_discriminator_beats_chance(world):
  rows = triplets.make_triplets(world, 'validation', 150)
  prefixes = [r.metadata['prompt_ids'] for r in rows]
  members = [world.pool[i] for i in world.members('validation')]
  logs = {role: pool.pool_logprobs(members, prefixes, [r.metadata[f'{role}_ids'] for r in rows]) for role in triplets.ROLES}
  margin = baselines.bayes_scores(logs['reference'], logs['chosen']) - baselines.bayes_scores(logs['reference'], logs['rejected'])
  assert (margin > 0).mean() > 0.9
  stranger = np.roll(logs['reference'], 1, axis=1)  # another row's reference tells nothing
  shuffled = baselines.bayes_scores(stranger, logs['chosen']) - baselines.bayes_scores(stranger, logs['rejected'])
  assert 0.35 < (shuffled > 0).mean() < 0.65


def test_complete_data_are_reused_and_half_written_rebuilt(small_run, small_config, tmp_path):
  workdir, result, _ = small_run
  copy = tmp_path / 'run'
  shutil.copytree(workdir, copy)
  lines: list[str] = []
  again = engine.synthesize(dataclasses.replace(small_config, workers=1), 3, copy, lines.append)
  assert again.reused and again.fingerprints == result.fingerprints and 'reusing' in lines[0]
  (copy / 'data' / 'synthesis.json').unlink()
  shutil.rmtree(copy / 'data' / 'preferences')
  lines.clear()
  rebuilt = engine.synthesize(small_config, 3, copy, lines.append)
  assert not rebuilt.reused and rebuilt.fingerprints == result.fingerprints and 'incomplete' in lines[0]


def test_an_empty_workdir_is_named(tmp_path):
  with pytest.raises(FileNotFoundError, match='run the stage synthesize'):
    engine.load_pool(tmp_path)


def test_neither_jax_nor_tensorflow_is_imported(small_run):
  code = (
    'import sys, pathlib; from polar_jax.synthesis import engine; from polar_jax.data import triplet_dataset as t\n'
    'w = pathlib.Path(sys.argv[1]); engine.load_pool(w); t.open_triplets(w / "data" / "triplets")["train"][0]\n'
    'bad = {"jax", "tensorflow", "torch"} & set(sys.modules); sys.exit(f"imported {bad}" if bad else 0)'
  )
  done = subprocess.run([sys.executable, '-c', code, str(small_run[0])], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
