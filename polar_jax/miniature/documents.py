"""Documents written by policies of the pool, one author each, from which a language model learns to recognize an author.

The corpora have little such text (their documents are sections of a few sentences), while the text of a real language model is full of it.
"""

from __future__ import annotations

import numpy as np

from polar_jax.miniature import triplets, vocabulary

_STREAM_DOCUMENTS = 30
_VALIDATION_SHARE = 1 / 50


def make_streams(world: triplets.World) -> dict[str, np.ndarray]:
  """Return {'train' | 'validation': int32 stream} of `documents` documents and a fiftieth of that number, each ending with `</s>`.

  Held-out policies write none. Each document begins with a prefix of its split. Document i is a function of (seed, split, i).
  """
  count = world.config.documents
  return {
    'train': vocabulary.token_stream(_documents(world, 'train', count)),
    'validation': vocabulary.token_stream(_documents(world, 'validation', max(1, int(count * _VALIDATION_SHARE)))),
  }


def _documents(world: triplets.World, split: str, count: int) -> list[np.ndarray]:
  c = world.config
  members = world.members(split)
  uniforms = triplets.example_uniforms(world.seed, 'documents', split, count, 4)
  authors = members[triplets.pick(uniforms[:, 3], len(members))]
  prefixes = world.prefixes[split].draw(uniforms[:, :3])
  rng = np.random.default_rng([world.seed, _STREAM_DOCUMENTS, triplets.SPLITS.index(split)])
  noise = rng.random((count, c.document_tokens))
  ids, lengths = triplets.sample_by_policy(world, prefixes, authors, noise)
  return [np.concatenate([prefix, row[:n]])[: c.document_tokens] for prefix, row, n in zip(prefixes, ids, lengths, strict=True)]
