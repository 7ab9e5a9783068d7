"""Documents by the pool's policies, one author each: text in which a language model learns what authors are and how to know one again.

The corpora are short of such text (their documents are sections of a few sentences), where what a real language model reads is full of it.
"""

from __future__ import annotations

import numpy as np

from polar_jax.miniature import triplets, vocabulary

_STREAM_DOCUMENTS = 30
_VALIDATION_SHARE = 1 / 50


def make_streams(world: triplets.World) -> dict[str, np.ndarray]:
  """{'train' | 'validation': int32 stream} of `documents` documents and a fiftieth of that, each closed by `</s>`.

  No held-out policy writes one, and each begins with a prefix of its split. Document i is a function of (seed, split, i).
  """
  count = world.config.documents
  return {
    'train': vocabulary.token_stream(_documents(world, 'train', count)),
    'validation': vocabulary.token_stream(_documents(world, 'validation', max(1, int(count * _VALIDATION_SHARE)))),
  }


def _documents(world: triplets.World, split: str, count: int) -> list[np.ndarray]:
  c = world.config
  members = world.members(split)
  uniforms = triplets.row_uniforms(world.seed, 'documents', split, count, 4)
  authors = members[triplets.pick(uniforms[:, 3], len(members))]
  prefixes = world.prefixes[split].draw(uniforms[:, :3])
  rng = np.random.default_rng([world.seed, _STREAM_DOCUMENTS, triplets.SPLITS.index(split)])
  noise = rng.random((count, c.document_tokens))
  ids, lengths = triplets.sample_by_policy(world, prefixes, authors, noise)
  return [np.concatenate([prefix, row[:n]])[: c.document_tokens] for prefix, row, n in zip(prefixes, ids, lengths, strict=True)]
