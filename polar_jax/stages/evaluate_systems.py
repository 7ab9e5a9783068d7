"""What is evaluated, and what it is compared with: reward models, recorded rewards, and baselines that need a model."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from polar_jax import api
from polar_jax.checkpoints.pretrained import Pretrained, open_pretrained
from polar_jax.config import ConfigError
from polar_jax.data import readers
from polar_jax.data.conversation_template import open_template
from polar_jax.data.template import Template, join_messages
from polar_jax.evaluate import recorded, text_baselines
from polar_jax.evaluate.sets import EvaluationSet, Item, Rewards
from polar_jax.policies.batched import BatchedPolicy
from polar_jax.runtime import paths
from polar_jax.scoring.scorer import Scorer
from polar_jax.stages.context import Context
from polar_jax.types import Group, Text, Triplet

_NAMED = 20  # ids of truncated items in evaluation.json


class RewardSystem:
  """A reward model that scores items.

  Args:
    context: of the stage.
    setting: that names the checkpoint, for messages.
    path: of the checkpoint.

  Raises:
    ConfigError: the checkpoint is no reward model.
  """

  def __init__(self, context: Context, setting: str, path: str | pathlib.Path):
    opened = _open(context, setting, path, 'reward')
    config, self._context = context.config, context
    self._tokenizer = opened.tokenizer() if config.tokenizer.kind == 'checkpoint' else context.tokenizer()
    self._model = api.load(opened, mesh=context.mesh, compute=config.model, template=config.template, tokenizer=self._tokenizer)
    self._path, self._scorers = str(path), dict[bool, Scorer]()

  def rewards(self, items: Sequence[Item], references: Sequence[Text], use_reference: bool = True) -> Rewards:
    """Return the rewards of the items' candidates, with or without references in the template."""
    groups = [
      Group(item.prompt, reference, list(item.candidates), str(item.facts.get('wrapper') or 'sft'))
      for item, reference in zip(items, references, strict=True)
    ]
    return [rewards.astype(np.float64) for rewards in self._scorer(use_reference).score(groups)]

  def truncated(self, items: Sequence[Item], references: Sequence[Text], use_reference: bool = True) -> dict[str, Any]:
    """Return how many items the model reads only a part of, and the first ids.

    Args:
      items: of a set.
      references: of each item.
      use_reference: whether the template has references.

    Returns:
      `responses`, items with a truncated reference or candidate; `prompts`, those with a truncated prompt; the limits; `ids` of the first.
    """
    template, limits = self._scorer(use_reference).template, self._model.template_config
    cut: dict[str, list[str]] = {'responses': [], 'prompts': []}
    for item, reference in zip(items, references, strict=True):
      found = _truncated(template, item, reference)
      for name, is_cut in zip(cut, found, strict=True):
        cut[name] += [item.id] if is_cut else []
    lengths = {'max_response_length': limits.max_response_length, 'max_length': limits.max_length}
    return {**{name: len(ids) for name, ids in cut.items()}, **lengths, 'ids': {name: ids[:_NAMED] for name, ids in cut.items() if ids}}

  def _scorer(self, use_reference: bool) -> Scorer:
    if use_reference not in self._scorers:
      model, context = self._model, self._context
      settings = dataclasses.replace(model.template_config, use_reference=use_reference and model.template_config.use_reference)
      template = open_template(settings, self._tokenizer, model.config.known_vocab_size, self._path)
      rows = context.config.evaluate.rows_per_batch
      # The ladder compiles once for many sets and views.
      self._scorers[use_reference] = Scorer(model.params, model.config, template, context.mesh, rows=rows, ladder=True)
    return self._scorers[use_reference]


def _truncated(template: Template, item: Item, reference: Text) -> tuple[bool, bool]:
  """Return whether any response, and whether the prompt, is truncated."""
  responses = prompt = False
  # Two candidates at a time, which is what the template looks at.
  for first in range(0, len(item.candidates), 2):
    a, b = item.candidates[first], item.candidates[min(first + 1, len(item.candidates) - 1)]
    if found := template.truncated(Triplet(item.prompt, reference, a, b)):
      responses, prompt = responses or found.responses, prompt or found.prompt
  return responses, prompt


class Other(NamedTuple):
  """A second system.

  Attributes:
    name: in evaluation.json.
    rewards: of (set, references, whether to read them); None if it has none. Recorded rewards depend on the set alone. References are
      None if the first system was recorded: then they are those of the items.
  """

  name: str
  rewards: Callable[[EvaluationSet, Sequence[Text] | None, bool], Rewards | None]


def others(context: Context, texts: Sequence[str], found: Sequence[EvaluationSet]) -> list[Other]:
  """Return the systems of `evaluate.compare`: files of recorded rewards, and reward models. Files are read and checked now.

  Raises:
    ConfigError: two have the same name, or a checkpoint is no reward model.
    UserError: a file does not fit the sets.
  """
  names = _names([paths.path_of(text) for text in texts])
  out = []
  for name, text in zip(names, texts, strict=True):
    if text.endswith(readers.SUFFIXES):
      held = recorded.Recorded(paths.path_of(text)).of(found)
      by_id = {of: {item.id: rewards for item, rewards in zip(one.items, all_of, strict=True)} for of, (one, all_of) in held.items()}
      out.append(Other(name, lambda one, *_, by_id=by_id: [by_id[one.name][i.id] for i in one.items] if one.name in by_id else None))
    else:
      _open(context, 'evaluate.compare', context.checkpoint(text), 'reward')  # a mistake is found before anything is scored
      out.append(Other(name, _scored_later(context, text)))
  return out


def _scored_later(context: Context, text: str) -> Callable[[EvaluationSet, Sequence[Text] | None, bool], Rewards]:
  systems: list[RewardSystem] = []  # loaded when it is needed

  def rewards(one: EvaluationSet, references: Sequence[Text] | None, use_reference: bool) -> Rewards:
    if not systems:
      systems.append(RewardSystem(context, 'evaluate.compare', context.checkpoint(text)))
    given = [item.reference or '' for item in one.items] if references is None else references
    return systems[0].rewards(one.items, given, use_reference)

  return rewards


def _names(places: Sequence[pathlib.Path]) -> list[str]:
  """Return the last part of each path, or the last two of those that end alike.

  Raises:
    ConfigError: two have the same name even so.
  """
  last = [place.name for place in places]
  names = [name if last.count(name) == 1 else f'{place.parent.name}/{name}' for name, place in zip(last, places, strict=True)]
  if twice := next((name for name in names if names.count(name) > 1), None):
    raise ConfigError(f'evaluate.compare: two systems would be named {twice!r}; rename the folder of one')
  return names


def _open(context: Context, setting: str, path: str | pathlib.Path, head: str) -> Pretrained:
  """Return a checkpoint with the given head.

  Raises:
    ConfigError: it has another head.
  """
  opened = open_pretrained(path)
  if opened.head != head:
    kind = {'reward': 'reward model', 'lm': 'language model'}[head]
    raise ConfigError(f'{setting} {path}: is not a {kind}, but a model with the head {opened.head!r}')
  return opened


Baselines = Mapping[str, Callable[[Sequence[Item]], Rewards]]  # of sets that have references


def model_baselines(context: Context) -> Baselines:
  """Return the baselines that need a model, as far as settings name them: `embedding` and `likelihood_ratio`.

  Raises:
    ConfigError: a model cannot be used.
    UserError: a package is missing.
  """
  settings, out = context.config.evaluate, dict[str, Callable[[Sequence[Item]], Rewards]]()
  if settings.embedding:
    encode = text_baselines.open_encoder(settings.embedding)
    out['embedding'] = lambda items: text_baselines.embedding_similarity(items, encode)
  if settings.language_model:
    path = context.checkpoint(settings.language_model)
    model = api.load(_open(context, 'evaluate.language_model', path, 'lm'), mesh=context.mesh, compute=context.config.model)
    policy = BatchedPolicy(model)
    out['likelihood_ratio'] = lambda items: likelihood_ratio(items, policy, context.log)
  return out


def likelihood_ratio(items: Sequence[Item], policy: BatchedPolicy, log: Callable[[str], None]) -> Rewards:
  """Return how much more likely a language model finds each candidate after it has read the reference, in nats.

  The model reads the prompt, the reference, and the prompt again; without reference only the prompt. Lines separate them. What all
  candidates of an item read is computed once.

  Args:
    items: with references.
    policy: the language model.
    log: receives a line if contexts are too long for the model.

  Raises:
    UserError: a candidate is longer than the model reads.
  """
  texts = [[join_messages(text, 'candidate') for text in item.candidates] for item in items]
  # With the newline before it, a candidate has a token even if it is empty.
  found = policy.likelihoods(
    [(context, f'\n{text}') for item, of in zip(items, texts, strict=True) for text in of for context in _contexts(item)]
  )
  ratios = np.array([with_reference.logprob - without.logprob for with_reference, without in zip(found[::2], found[1::2], strict=True)])
  if cut := sum(one.truncated for one in found):
    log(f'likelihood_ratio: the beginning of {cut:,} of {len(found):,} contexts was cut to the {policy.max_length} tokens of the model')
  return np.split(ratios, np.cumsum([len(of) for of in texts])[:-1])


def _contexts(item: Item) -> tuple[str, str]:
  prompt, reference = join_messages(item.prompt, 'prompt'), join_messages(item.reference or '', 'reference')
  return f'{prompt}\n{reference}\n\n{prompt}', prompt
