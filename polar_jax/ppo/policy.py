"""Inference with a policy: tokenized prompts, sampled responses, and log-probabilities of given responses."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import numpy as np
from jax.sharding import Mesh

from polar_jax import sharding
from polar_jax.checkpoints.pretrained import Pretrained
from polar_jax.config import ConfigError, ModelConfig, RftConfig, RolloutConfig
from polar_jax.data import layout
from polar_jax.data.chat import ChatTemplate
from polar_jax.data.tokenizer import Tokenizer
from polar_jax.ppo import experience, learner, metrics
from polar_jax.ppo.prompts import PolicyPrompts
from polar_jax.ppo.rollout import RolloutEngine
from polar_jax.types import Prompt, Rollouts, Text, UserError

_MAX_CONCURRENT = 64  # responses decoded at a time
_MIN_PROMPT = 64  # tokens; prompts are rounded up to powers of two from here on, so that few lengths are compiled


def check_policy(opened: Pretrained, setting: str) -> Pretrained:
  """Check that a policy can start from a checkpoint, and return it.

  Raises:
    ConfigError: it has no language-model head.
  """
  if opened.head != 'lm':
    raise ConfigError(f'{setting} {opened.path}: has a {opened.head} head; only a language model can be a policy')
  return opened


def assets_of(policy: Pretrained) -> pathlib.Path | None:
  """Return the folder of the policy's tokenizer files; None for a policy on bytes."""
  return policy.assets if policy.assets.is_dir() else None


def generate(
  params: dict,
  model: ModelConfig,
  tokenizer: Tokenizer,
  mesh: Mesh,
  texts: Sequence[Text],
  *,
  chat: ChatTemplate | None,
  stop_ids: Sequence[int],
  rollout: RolloutConfig,
  seed: int,
) -> list[str]:
  """Sample one response to each prompt.

  Args:
    params: of a LanguageModel, on the mesh.
    model: shape of the policy.
    tokenizer: the policy's.
    mesh: devices of the parameters.
    texts: strings, continued unchanged, or lists of messages, rendered by `chat`.
    chat: the policy's chat template, if it has one.
    stop_ids: tokens that end a response.
    rollout: sampling; `max_prompt` and `max_concurrent` are chosen here.
    seed: the same seed gives the same responses.
  """
  if not texts:
    return []
  ids = encode_texts(texts, tokenizer, chat)
  concurrent = min(_MAX_CONCURRENT, 1 << (len(ids) - 1).bit_length())
  longest = max(_MIN_PROMPT, 1 << (max(map(len, ids)) - 1).bit_length())
  config = RolloutConfig(
    max_prompt=longest,
    max_new=rollout.max_new,
    temperature=rollout.temperature,
    top_p=rollout.top_p,
    max_concurrent=sharding.round_up(concurrent, sharding.batch_shards(mesh)),
  )
  rollouts = RolloutEngine(model, mesh, config, stop_ids).generate(params, ids, (seed,))
  return metrics.response_texts(rollouts, tokenizer, stop_ids)


def logprobs(
  params: dict,
  model: ModelConfig,
  tokenizer: Tokenizer,
  mesh: Mesh,
  texts: Sequence[Text],
  responses: Sequence[str],
  chat: ChatTemplate | None,
) -> list[np.ndarray]:
  """Return the log-probabilities (nats, float32) of the tokens of each response, given its prompt, at temperature 1.

  Args:
    params: of a LanguageModel, on the mesh.
    model: shape of the policy.
    tokenizer: the policy's.
    mesh: devices of the parameters.
    texts: prompts, as in `generate`.
    responses: one for each prompt, tokenized on its own.
    chat: the policy's chat template, if it has one.

  Raises:
    UserError: a response has no token, or the numbers of prompts and responses differ.
  """
  if len(texts) != len(responses):
    raise UserError(f'{len(texts)} prompts and {len(responses)} responses; pass one response for each prompt')
  if not texts:
    return []
  prefixes, encoded = encode_texts(texts, tokenizer, chat), tokenizer.encode_batch(list(responses))
  empty = [i for i, ids in enumerate(encoded) if not ids]
  if empty:
    raise UserError(f'response {empty[0]} has no token')
  width = max(map(len, encoded))
  tokens_RT, length_R = np.zeros((len(encoded), width), np.int32), np.array([len(ids) for ids in encoded], np.int32)
  for r, ids in enumerate(encoded):
    tokens_RT[r, : len(ids)] = ids
  rollouts = Rollouts(prefixes, tokens_RT, length_R, np.zeros(tokens_RT.shape, np.float32), np.ones(len(encoded), bool))
  longest = max(len(p) + len(r) for p, r in zip(prefixes, encoded, strict=True))
  config = RftConfig(micro_batch_rows=1)
  length = max(_MIN_PROMPT, 1 << (longest - 1).bit_length())
  batches = layout.policy_batches(rollouts, range(len(encoded)), length, experience.micro_batch_rows(config, mesh))
  actor = learner.build_actor(model, config, 1, mesh)
  logprob_RT, _ = experience.run_forward(actor.forward, params, batches, mesh, rollouts, 2)
  return [row[:n].copy() for row, n in zip(logprob_RT, length_R, strict=True)]


def encode_texts(texts: Sequence[Text], tokenizer: Tokenizer, chat: ChatTemplate | None) -> list[list[int]]:
  """Return the token ids of prompts: strings with a BOS where the tokenizer has one, messages through the chat template.

  Raises:
    UserError: a prompt is empty, or is a list of messages and the model has no chat template.
  """
  ids: list[list[int]] = [[] for _ in texts]
  plain = [i for i, text in enumerate(texts) if isinstance(text, str)]
  messages = [i for i, text in enumerate(texts) if not isinstance(text, str)]
  if messages and chat is None:
    raise UserError(f'prompt {messages[0]} is a list of messages, but the model has no chat template; pass a string')
  for members, template in ((plain, None), (messages, chat)):
    if members:
      encoded = PolicyPrompts([Prompt(texts[i], '') for i in members], tokenizer, template, 1 << 30)
      for i, (_, tokens) in zip(members, encoded, strict=True):
        ids[i] = tokens
  return ids
