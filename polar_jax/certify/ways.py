"""The ways to compute the rewards of the same rows: in this process, by our server, by transformers, and by other servers."""

from __future__ import annotations

import contextlib
import dataclasses
import http.client
import importlib
import importlib.util
import json
import pathlib
import sys
import tempfile
import types
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from polar_jax import checkpoints
from polar_jax.api import RewardModel
from polar_jax.certify.rows import plain
from polar_jax.config import CertifyConfig, RewardConfig, ServeConfig
from polar_jax.ppo.rewards.http import HttpReward
from polar_jax.scoring.scorer import ladder_length
from polar_jax.types import Group, Prompt, UserError

Rewards = list[np.ndarray]  # float32 (candidates,) for each group

_MARGIN = 64  # tokens beyond the longest row, so that a server's ladder of lengths has room for it
_TIMEOUT = 600.0  # seconds for a request to our own server
_SERVER_PACKAGES = ('starlette', 'uvicorn', 'prometheus_client')


class Way(NamedTuple):
  """A way to compute rewards.

  Attributes:
    name: for the table.
    groups: indices of the groups that it can score.
    rewards: of those groups.
    exact: its rewards must have the bits of the score stage.
  """

  name: str
  groups: Sequence[int]
  rewards: Rewards
  exact: bool = False


def offline(model: RewardModel, groups: Sequence[Group]) -> Rewards:
  """Return the rewards of the score stage, which the other ways are compared with."""
  return _split(model.exact_scorer.score(_singles(groups)), groups)


def in_this_process(model: RewardModel, groups: Sequence[Group]) -> Iterator[Way]:
  """Score in other orders, with more padding, and packed: what a reward depends on besides its row."""
  every, singles = range(len(groups)), _singles(groups)
  order = np.random.default_rng(0).permutation(len(singles))
  shuffled = np.zeros(len(singles), np.float32)
  shuffled[order] = model.exact_scorer.score([singles[i] for i in order])
  yield Way('score stage, rows in another order', every, _split(shuffled, groups), exact=True)
  padded = [_in_longer_row(model, ids) for ids in model.exact_scorer.encode(singles)]
  yield Way('score stage, longer rows', every, _split(np.array(padded, np.float32), groups))
  yield Way('packed, all groups at once', every, model.scorer.score(groups, alone=True))
  yield Way('packed, one group at a time', every, [model.scorer.score([group], alone=True)[0] for group in groups])


def _in_longer_row(model: RewardModel, ids: Sequence[int]) -> float:
  """Return the reward of a sequence in the row length after its own."""
  length = ladder_length(ladder_length(len(ids)) + 1)
  return float(np.asarray(model.exact_scorer.dispatch([list(ids)], length))[0])


def by_our_server(model: RewardModel, groups: Sequence[Group], log: Callable[[str], None]) -> Iterator[Way]:
  """Score through every endpoint of our server, exact and packed."""
  missing = [name for name in _SERVER_PACKAGES if importlib.util.find_spec(name) is None]
  if missing:
    log(f"certify: our server is left out, since {missing[0]} is not installed: pip install 'polar_jax[serve]'")
    return
  # Each server gives /pooling in one dialect.
  for exact, dialect in ((True, 'vllm'), (False, 'lmdeploy')):
    kind = 'exact' if exact else 'packed'
    with _serving(model, groups, exact, dialect) as address:
      for path, indices, rewards in _endpoints(address, model, groups, dialect):
        yield Way(f'our server, {kind}, {path}', indices, rewards, exact)


@contextlib.contextmanager
def _serving(model: RewardModel, groups: Sequence[Group], exact: bool, dialect: str) -> Iterator[str]:
  """Yield the address of a server of the model in this process."""
  from polar_jax.serve.server import RewardServer

  longest = max(len(ids) for ids in model.exact_scorer.encode(_singles(groups)))
  config = ServeConfig(port=0, exact=exact, pooling_dialect=dialect, max_length=max(128, longest + _MARGIN), timeout=_TIMEOUT)
  with RewardServer(model, config, 'model', write_log=lambda line: None).in_thread() as address:
    yield address


def _endpoints(address: str, model: RewardModel, groups: Sequence[Group], dialect: str) -> Iterator[tuple[str, Sequence[int], Rewards]]:
  """Yield (path, indices of the groups that it can express, their rewards) for each endpoint."""
  every = range(len(groups))
  send = lambda path, body: _post(address, path, body)
  bodies = [
    {'prompt': group.prompt, 'reference': group.reference, 'outputs': list(group.candidates), 'wrapper': group.wrapper} for group in groups
  ]
  yield '/score', every, [np.array(reply['rewards'], np.float32) for reply in send('/score', bodies)]
  rows = [
    {'prompt': g.prompt, 'reference': g.reference, 'output': candidate, 'wrapper': g.wrapper} for g in groups for candidate in g.candidates
  ]
  yield '/reward', every, _split(np.array(send('/reward', rows), np.float32), groups)
  texts = [text for group in groups for text in _texts(model, group)]
  for path in ('/classify', '/encode'):
    yield path, every, _split([item['embedding'][0] for item in send(path, {'text': texts})], groups)
  value = (lambda item: item['data'][-1][0]) if dialect == 'vllm' else (lambda item: item['data'])
  yield f'/pooling ({dialect})', every, _split([value(item) for item in send('/pooling', {'input': texts})['data']], groups)
  yield '/classify (vllm)', every, _split([item['probs'][-1] for item in send('/classify', {'input': texts})['data']], groups)
  embedded = send('/v1/embeddings', {'input': texts, 'model': 'model'})['data']
  yield '/v1/embeddings', every, _split([item['embedding'][-1] for item in embedded], groups)
  rendered = [i for i in every if groups[i].wrapper == 'sft' and isinstance(groups[i].prompt, str) and groups[i].reference]
  if rendered:
    pairs = [(groups[i], plain(candidate)) for i in rendered for candidate in groups[i].candidates]
    body = {
      'query': [f'{group.prompt}{candidate}' for group, candidate in pairs],
      'prompts': [group.prompt for group, _ in pairs],
      'labels': [group.reference for group, _ in pairs],
    }
    yield '/get_reward', rendered, _split(send('/get_reward', body)['rewards'], [groups[i] for i in rendered])


def _post(address: str, path: str, body: Any) -> Any:
  parts = urllib.parse.urlsplit(address)
  connection = http.client.HTTPConnection(parts.hostname or '', parts.port, timeout=_TIMEOUT)
  with contextlib.closing(connection):
    connection.request('POST', path, json.dumps(body), {'Content-Type': 'application/json'})
    response = connection.getresponse()
    content = json.loads(response.read())
  if response.status != 200:
    raise UserError(f'our server answers {path} with status {response.status}: {content["error"]["message"]}')
  return content


def by_transformers(model: RewardModel, groups: Sequence[Group], log: Callable[[str], None]) -> Iterator[Way]:
  """Export the model, load it with transformers, tokenize the texts with its tokenizer, and score each alone on a CPU in float32."""
  missing = [name for name in ('torch', 'transformers') if importlib.util.find_spec(name) is None]
  if missing:
    log(f"certify: transformers is left out, since {missing[0]} is not installed: pip install 'polar_jax[parity]'")
    return
  with tempfile.TemporaryDirectory() as parent:
    folder = pathlib.Path(parent) / 'exported'
    model.save_pretrained(folder, dtype='float32')
    yield Way('transformers, float32', range(len(groups)), _with_transformers(folder, model, groups))


def _with_transformers(folder: pathlib.Path, model: RewardModel, groups: Sequence[Group]) -> Rewards:
  import torch
  import transformers

  # The class of this family is our own and is imported from this package, so that no code of a folder is run.
  is_ours = model.config.family == 'internlm2'
  loader = _our_internlm2() if is_ours else transformers.AutoModelForSequenceClassification
  loaded = loader.from_pretrained(folder, dtype=torch.float32).eval()
  tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
  out = []
  for group in groups:
    rewards = []
    for text in _texts(model, group):
      with torch.no_grad():
        rewards.append(float(loaded(**tokenizer(text, return_tensors='pt', return_token_type_ids=False)).logits[0, 0]))
    out.append(np.array(rewards, np.float32))
  return out


def _our_internlm2() -> Any:
  """Return our reward model of InternLM2 in torch, imported as transformers does from an exported folder."""
  package = types.ModuleType('polar_jax_exported')
  package.__path__ = [str(pathlib.Path(checkpoints.__file__ or '').parent / 'remote_code')]
  sys.modules[package.__name__] = package
  return importlib.import_module(f'{package.__name__}.modeling_internlm2').InternLM2ForRewardModel


def by_other_servers(model: RewardModel, groups: Sequence[Group], config: CertifyConfig, name: str) -> Iterator[Way]:
  """Score by running servers of the same model.

  Raises:
    UserError: a server cannot be reached, or its replies cannot be used; the message names its address.
  """
  if config.polar:
    from polar_jax.serve.client import RewardClient

    with contextlib.closing(RewardClient(config.polar)) as client:
      scored = [client.score(g.prompt, g.reference, list(g.candidates)) for g in groups if g.wrapper == 'sft']
    yield Way(f'polar at {config.polar}', _of_wrapper(groups, 'sft'), [np.asarray(rewards, np.float32) for rewards in scored])
  for kind in ('vllm', 'sglang', 'lmdeploy'):
    address = getattr(config, kind)
    if not address:
      continue
    settings = RewardConfig(source='http', server=kind, address=address, server_model=config.server_model or name, unit_interval=True)
    found: dict[int, np.ndarray] = {}
    for wrapper in dict.fromkeys(group.wrapper for group in groups):
      members = _of_wrapper(groups, wrapper)
      server = HttpReward(model.template, dataclasses.replace(settings, wrapper=wrapper, strip_thinking=False))
      rows = [(Prompt(groups[i].prompt, groups[i].reference), plain(c)) for i in members for c in groups[i].candidates]
      rewards = _split(server.score([p for p, _ in rows], [r for _, r in rows]), [groups[i] for i in members])
      found |= dict(zip(members, rewards, strict=True))
    yield Way(f'{kind} at {address}', range(len(groups)), [found[i] for i in range(len(groups))])


def _of_wrapper(groups: Sequence[Group], wrapper: str) -> list[int]:
  return [i for i, group in enumerate(groups) if group.wrapper == wrapper]


def _texts(model: RewardModel, group: Group) -> list[str]:
  """Return the finished texts that clients send."""
  return model.template.candidate_texts(group.prompt, group.reference, group.candidates, group.wrapper, alone=True)


def _singles(groups: Sequence[Group]) -> list[Group]:
  return [Group(group.prompt, group.reference, [candidate], group.wrapper) for group in groups for candidate in group.candidates]


def _split(rewards: Sequence[float] | np.ndarray, groups: Sequence[Group]) -> Rewards:
  """Return rewards of all candidates as those of each group."""
  ends = np.cumsum([len(group.candidates) for group in groups])
  return np.split(np.asarray(rewards, np.float32), ends[:-1]) if groups else []
