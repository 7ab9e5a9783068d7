"""A pool of 28 policies for one machine without a GPU, for --config.synthesize.pool=configs/pool_small.py. See docs/pools.md.

Its models and texts are named by environment variables, and a policy whose variable is not set is left out:

  POOL_TEXTS    text files, separated by commas: n-grams of several orders, windows and temperatures
  POOL_STORIES  a small language model such as stories260K: with fewer layers, rounded weights, at several temperatures
  POOL_LM       a larger one such as SmolLM2-135M, sampled in this process
  POOL_SERVER   address of a server of the larger one, and POOL_MODEL its name there: base and chat, with several system prompts

Near twins (`near_to`) are the same model at another temperature, with rounded weights, or on the same window of a text. A third of the
families is held out, for the split of unseen policies.
"""

from __future__ import annotations

import os


def get_pool():
  texts = [text for text in os.environ.get('POOL_TEXTS', '').split(',') if text]
  policies = []
  for number, text in enumerate(texts):
    policies += _ngrams(f'ngram{number}', text)
  if stories := os.environ.get('POOL_STORIES'):
    policies += _variants('stories', stories, layers=4, weight=1.0, max_tokens=48)
  if lm := os.environ.get('POOL_LM'):
    policies += _variants('lm', lm, layers=27, weight=0.3, max_tokens=32)
  if server := os.environ.get('POOL_SERVER'):
    policies += _served('served', {'kind': 'openai', 'base_url': server.split(','), 'model': os.environ['POOL_MODEL']})
  return {'policies': policies, 'defaults': {'top_p': 0.95, 'max_tokens': 48}}


def _ngrams(family, text):
  base = {'kind': 'ngram', 'path': text, 'family': family}
  out = []
  for order in (1, 2, 3):
    for window, held_out in (([0.0, 0.5], False), ([0.5, 1.0], order == 2)):
      name = f'{family}-order{order}-{"first" if window[0] == 0 else "second"}'
      out.append({**base, 'name': name, 'order': order, 'window': window, 'held_out': held_out})
  twin = {**out[4], 'name': f'{family}-order3-warm', 'temperature': 1.3, 'near_to': out[4]['name']}
  return [*out, twin]


def _variants(family, path, *, layers, weight, max_tokens):
  base = {'kind': 'checkpoint', 'path': path, 'family': family, 'weight': weight, 'max_tokens': max_tokens}
  return [
    {**base, 'name': family},
    {**base, 'name': f'{family}-warm', 'temperature': 1.3, 'near_to': family},
    {**base, 'name': f'{family}-4bit', 'bits': 4, 'near_to': family},
    {**base, 'name': f'{family}-fewer-layers', 'layers': layers, 'held_out': True},
    {**base, 'name': f'{family}-3bit', 'bits': 3, 'held_out': True},
  ]


def _served(family, base):
  base = {**base, 'family': family, 'weight': 0.4, 'max_tokens': 32, 'prompts': 'any'}
  return [
    {**base, 'name': f'{family}-text', 'chat': False},
    {**base, 'name': f'{family}-text-cool', 'chat': False, 'temperature': 0.7, 'near_to': f'{family}-text'},
    {**base, 'name': f'{family}-chat', 'chat': True, 'held_out': True},
    {**base, 'name': f'{family}-pirate', 'system': 'You are a pirate. Continue the text as a pirate would.'},
    {**base, 'name': f'{family}-child', 'system': 'You are five years old. Continue the text in short words.', 'held_out': True},
  ]
