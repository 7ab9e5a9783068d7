from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from polar_jax import config as config_lib
from polar_jax.data import tfds as triplet_dataset
from polar_jax.evaluate import baselines
from polar_jax.miniature import corpora, pool, preferences, triplets, vocabulary
from polar_jax.miniature import world as world_lib
from polar_jax.types import UserError


def test_synthesize_stores_the_examples_made(small_run, world):
  workdir, result = small_run
  opened = triplet_dataset.open_triplets(workdir / 'data' / 'triplets')
  assert {f'triplets/{s}': len(examples) for s, examples in opened.items()} == {
    k: v for k, v in result.rows.items() if k.startswith('trip')
  }
  for split, examples in opened.items():
    made = triplets.make_triplets(world, split, len(examples))  # a reloaded pool makes identical examples
    assert triplet_dataset.fingerprint(made) == triplet_dataset.fingerprint(examples) == result.fingerprints[f'triplets/{split}']


def test_synthesize_records_provenance(small_run, world):
  workdir = small_run[0]
  held_out = {p.name for p in world.pool if p.params.held_out}
  corpus = {p.name: p.params.corpus for p in world.pool}
  for name, wrapper in (('triplets', 'pretrain'), ('preferences', 'sft')):
    for split, examples in triplet_dataset.open_triplets(workdir / 'data' / name).items():
      for example in examples:
        names = [example.metadata[f'{role}_policy'] for role in triplets.ROLES]
        assert all((n in held_out) == (split == 'unseen_policies') for n in names) and example.wrapper == wrapper
        if name == 'triplets':
          assert names[0] == names[1] != names[2] and example.category == corpus[names[0]]
        else:
          assert len(set(names)) == 3 and example.category in preferences.CATEGORIES
          assert example.metadata['kl_near'] <= example.metadata['kl_far']
        for field in ('prompt', *triplets.ROLES):
          ids = example.metadata[f'{field}_ids']
          assert ids.dtype == np.int32 and ''.join(world.pieces[ids]) == getattr(example, field) and len(ids) >= 4


def test_make_triplets_example_is_a_function_of_seed_split_and_index(world):
  few, many = triplets.make_triplets(world, 'validation', 5), triplets.make_triplets(world, 'validation', 33)
  one = dataclasses.replace(world, config=dataclasses.replace(world.config, workers=1))
  digest = triplet_dataset.fingerprint(few)
  assert digest == triplet_dataset.fingerprint(many[:5]) == triplet_dataset.fingerprint(triplets.make_triplets(one, 'validation', 5))
  other = dataclasses.replace(world, seed=4)
  assert digest != triplet_dataset.fingerprint(triplets.make_triplets(other, 'validation', 5))


def test_several_negatives_are_of_different_policies_and_change_nothing_else(world):
  more = dataclasses.replace(world, config=dataclasses.replace(world.config, negatives=5))
  plain, lists = (triplets.make_triplets(w, 'train', 60) for w in (world, more))
  for one, many in zip(plain, lists, strict=True):
    assert many.candidates[:2] == (one.chosen, one.rejected) and many.ranks == (0, 1, 1, 1, 1, 1)
    assert (many.prompt, many.reference, many.category) == (one.prompt, one.reference, one.category)
    names = [many.metadata['chosen_policy'], *many.metadata['rejected_policies']]
    assert names[1] == one.metadata['rejected_policy'] and len(set(names)) == len(names) == 6
    assert not {p.name for p in world.pool if p.params.held_out} & set(names)
  assert triplet_dataset.fingerprint(lists[:9]) == triplet_dataset.fingerprint(triplets.make_triplets(more, 'train', 9))
  assert [e.rejected for e in triplets.make_triplets(more, 'validation', 9)] == [
    e.rejected for e in triplets.make_triplets(world, 'validation', 9)
  ]
  with pytest.raises(UserError, match=r'synthesize\.negatives is 11, but only 10 policies can be rejected; lower it'):
    triplets.make_triplets(dataclasses.replace(world, config=dataclasses.replace(world.config, negatives=11)), 'train', 3)


def test_further_places_are_uniform_over_those_that_are_left():
  rng, n = np.random.default_rng(0), 5
  taken = rng.integers(0, n, 60_000)
  places = triplets._other_places(taken, rng.random((len(taken), 3)), n)
  rows = np.concatenate([taken[:, None], places], axis=1)
  assert rows.min() == 0 and rows.max() == n - 1 and all(len(set(row)) == 4 for row in rows[:500].tolist())
  counts = np.bincount(np.ravel_multi_index(tuple(rows.T), (n,) * 4), minlength=n**4)
  assert (counts > 0).sum() == 5 * 4 * 3 * 2 and np.abs(counts[counts > 0] / 500 - 1).max() < 0.25


def test_make_triplets_reference_and_chosen_are_independent_samples(world):
  examples = triplets.make_triplets(world, 'train', 60)
  assert np.mean([e.reference == e.chosen for e in examples]) < 0.1


def test_prefix_sources_take_the_text_of_their_split(world):
  source = {s: {n: v.tobytes() for n, v in p.streams.items()} for s, p in world.prefixes.items()}
  assert source['unseen_prompts'] == source['unseen_policies'] != source['validation'] != source['train']
  uniforms = np.random.default_rng(0).random((300, 3))
  for split, prefixes in world.prefixes.items():
    drawn = prefixes.draw(uniforms)
    assert {len(p) for p in drawn} == set(range(4, 13)), split
    assert all(vocabulary.EOS_ID not in p for p in drawn)


def test_prefix_sources_validation_is_every_fifth_document(small_config):
  stream = vocabulary.token_stream([np.full(12, 10 + i, np.int32) for i in range(10)])
  sources = triplets.prefix_sources({'a': stream}, {'a': stream}, small_config)
  documents = {split: set(source.streams['a']) - {vocabulary.EOS_ID} for split, source in sources.items()}
  assert documents['validation'] == {14, 19} and documents['train'] == set(range(10, 20)) - {14, 19}


def test_choose_policies_near_and_far(world):
  rng = np.random.default_rng(0)
  kl = rng.random((16, 16)) * 5
  np.fill_diagonal(kl, 0)
  members = world.members('train')
  chosen = preferences.choose_policies(kl, members, rng.random((500, 3)))
  assert set(chosen.ravel()) <= set(members)
  for target, near, far in chosen:
    ranked = sorted((m for m in members if m != target), key=lambda m: kl[target, m])
    assert len({target, near, far}) == 3 and near in ranked[:1] and far in ranked[2:]
  with pytest.raises(UserError, match='need three policies'):
    preferences.choose_policies(kl, members[:2], rng.random((5, 3)))


def test_bayes_optimal_discriminator_beats_chance(world):
  examples = triplets.make_triplets(world, 'validation', 150)
  prefixes = [e.metadata['prompt_ids'] for e in examples]
  members = [world.pool[i] for i in world.members('validation')]
  logs = {role: pool.pool_logprobs(members, prefixes, [e.metadata[f'{role}_ids'] for e in examples]) for role in triplets.ROLES}
  margin = baselines.bayes_scores(logs['reference'], logs['chosen']) - baselines.bayes_scores(logs['reference'], logs['rejected'])
  assert (margin > 0).mean() > 0.9
  stranger = np.roll(logs['reference'], 1, axis=1)  # the reference of another example carries no information
  shuffled = baselines.bayes_scores(stranger, logs['chosen']) - baselines.bayes_scores(stranger, logs['rejected'])
  assert 0.35 < (shuffled > 0).mean() < 0.65


@pytest.mark.long
def test_synthesize_reuses_complete_data_and_rebuilds_incomplete(small_run, small_config, synthesize, tmp_path):
  workdir, result = small_run
  copy = tmp_path / 'run'
  shutil.copytree(workdir, copy)
  marker = copy / 'data' / 'synthesis.json'
  # Earlier versions also stored paths.
  marker.write_text(json.dumps(json.loads(marker.read_text()) | {'folder': 'gone', 'tokenizer': 'tokenizer.json', 'reused': False}))
  again, lines = synthesize(dataclasses.replace(small_config, workers=1), copy)
  assert again == result and len(lines) == 1 and 'reusing' in lines[0]
  marker.unlink()
  shutil.rmtree(copy / 'data' / 'preferences')
  rebuilt, lines = synthesize(small_config, copy)
  assert rebuilt.fingerprints == result.fingerprints and 'incomplete' in lines[0]


def test_config_fingerprint_is_that_of_earlier_versions():
  """Computed under the names that the options had first, so that no upgrade rebuilds the data."""
  settings = {'world': 'ngram', 'vocab_size': 1024, 'policies': 256, 'unseen_policies': 48, 'max_order': 4, 'smallest_window': 0.15}
  settings |= {'prefix_min_tokens': 4, 'prefix_max_tokens': 12, 'max_tokens': 32, 'temperature': 1.0, 'top_p': 1.0, 'top_k': None}
  settings |= {'documents': 0, 'document_tokens': 256, 'train_rows': 60_000, 'evaluation_rows': 2_000, 'preference_rows': 8_000}
  settings |= {'preference_evaluation_rows': 2_000, 'largest': 12, 'two_steps': 0.25}
  digest = hashlib.sha256(json.dumps([1, settings, 7], sort_keys=True).encode())
  digest.update(hashlib.sha256(b'text').digest())
  assert world_lib.config_fingerprint(config_lib.SynthesizeConfig(), 7, [corpora.Corpus('a', ('text',))]) == digest.hexdigest()


def test_negatives_count_in_the_fingerprint_where_there_are_several():
  config = config_lib.SynthesizeConfig()
  found = [world_lib.config_fingerprint(dataclasses.replace(config, negatives=n), 0, []) for n in (1, 2, 3)]
  assert found[0] == world_lib.config_fingerprint(config, 0, []) and len(set(found)) == 3


def test_load_pool_without_data(tmp_path):
  with pytest.raises(UserError, match='data: no complete data of the miniature; run its synthesize stage'):
    world_lib.load_pool(tmp_path)


def test_load_pool_imports_neither_jax_nor_tensorflow(small_run):
  code = (
    'import sys, pathlib; from polar_jax.miniature import world; from polar_jax.data import tfds as t\n'
    'w = pathlib.Path(sys.argv[1]); world.load_pool(w); t.open_triplets(w / "data" / "triplets")["train"][0]\n'
    'bad = {"jax", "tensorflow", "torch"} & set(sys.modules); sys.exit(f"imported {bad}" if bad else 0)'
  )
  done = subprocess.run([sys.executable, '-c', code, str(small_run[0])], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
