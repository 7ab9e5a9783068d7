"""Log-likelihoods of many continuations: sorted by length, packed into rows, with contexts computed once for all their continuations."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from polar_jax import sharding
from polar_jax.config import ModelConfig
from polar_jax.data import layout
from polar_jax.model import heads
from polar_jax.model.language_model import LanguageModel
from polar_jax.policies.encoding import Pair
from polar_jax.runtime import preemption
from polar_jax.scoring.scorer import ladder_length
from polar_jax.types import PolicyBatch, Rollouts

TOKENS = 16_384  # of a batch on each data-parallel device
# The continuations of one context fill rows of at least this many tokens, if there are enough of them, before the context is repeated.
_SHARED_ROW = 2_048
_WINDOW = 512  # contexts that are packed at a time
_LOGITS = 1 << 25  # most logits in memory at once, in elements
_FEW = 8  # rows with few scored tokens have room for one in so many
_IN_FLIGHT = 1  # batches that wait for the device while it computes another


class Likelihoods(NamedTuple):
  """Of every pair, in order."""

  logprob: np.ndarray  # float64, in nats
  greedy: np.ndarray  # bool: every scored token is the most likely one, the first of equals


class TargetBatch(NamedTuple):
  """Rows of contexts with their continuations, and the tokens to predict in them."""

  rows: PolicyBatch  # what the model reads
  index_BQ: Any  # int32: where each target is predicted
  target_BQ: Any  # int32
  rollout_BQ: Any  # int32: which continuation the target belongs to; -1: padding


class Chunk(NamedTuple):
  """Continuations that become batches of one shape."""

  members: list[int]
  row_length: int
  rows: int


def plan(pairs: Sequence[Pair], tokens: int, shards: int, max_rows: int | None = None) -> list[Chunk]:
  """Return the chunks in which pairs are computed, those with the longest rows first.

  Row lengths are of the ladder of `ladder_length`, and the numbers of rows powers of two times `shards`, so that few shapes are compiled.

  Args:
    pairs: what to score.
    tokens: of a batch, if one row is not longer than that.
    shards: the rows of a batch are a multiple of it.
    max_rows: most rows of a batch, rounded up to that multiple; None: as many as `tokens` allow.
  """
  groups: dict[tuple[int, ...], list[int]] = {}
  for i, pair in enumerate(pairs):
    groups.setdefault(pair.context, []).append(i)
  ladder: dict[int, list[list[int]]] = {}
  for context, members in groups.items():
    longest = max(len(pairs[i].scored) for i in members)
    total = len(context) - 1 + sum(len(pairs[i].scored) for i in members)
    length = ladder_length(max(len(context) - 1 + longest, min(total, _SHARED_ROW)))
    ladder.setdefault(length, []).append(members)
  out = []
  for length, same in sorted(ladder.items(), reverse=True):
    most = max(1, tokens // length // shards) if max_rows is None else -(-max_rows // shards)
    for low in range(0, len(same), _WINDOW):
      few = same[low : low + _WINDOW]
      needed = sum(-(-(len(pairs[m[0]].context) - 1 + sum(len(pairs[i].scored) for i in m)) // length) for m in few)
      rows = min(1 << (most.bit_length() - 1), 1 << (max(1, -(-needed // shards)) - 1).bit_length()) * shards
      out.append(Chunk([i for members in few for i in members], length, rows))
  return out


def batches(pairs: Sequence[Pair], chunk: Chunk) -> list[TargetBatch]:
  """Pack the pairs of a chunk."""
  members = [pairs[i] for i in chunk.members]
  length_R = np.array([len(pair.scored) for pair in members], np.int32)
  tokens_RT = np.zeros((len(members), int(length_R.max())), np.int32)
  for r, pair in enumerate(members):
    tokens_RT[r, : len(pair.scored)] = pair.scored
  unused = np.zeros(0)
  rollouts = Rollouts([pair.context for pair in members], tokens_RT, length_R, unused, unused)
  packed = layout.policy_batches(rollouts, range(len(members)), chunk.row_length, chunk.rows)
  return [_targets(batch, np.array(chunk.members, np.int32)) for batch in packed]


def _targets(batch: PolicyBatch, which: np.ndarray) -> TargetBatch:
  """Pick the tokens that predict a target: all tokens of the rows, or room for one in `_FEW` if that is enough."""
  is_target_BT = batch.rollout_BT >= 0
  length = is_target_BT.shape[1]
  size = length // _FEW if is_target_BT.sum(axis=1).max() <= length // _FEW else length
  index_BQ = np.argsort(~is_target_BT, axis=1, kind='stable')[:, :size].astype(np.int32)
  pick = lambda values_BT: np.take_along_axis(values_BT, index_BQ, axis=1)
  rollout_BQ = pick(batch.rollout_BT)
  return TargetBatch(batch, index_BQ, pick(batch.target_BT), np.where(rollout_BQ >= 0, which[rollout_BQ], np.int32(-1)))


def target_logprobs(model: LanguageModel, batch: TargetBatch, shared: bool) -> tuple[jax.Array, jax.Array]:
  """Return the log-probability of each target (float32), and whether it is the most likely token, both (B, Q).

  Args:
    model: the policy.
    batch: what to compute.
    shared: whether continuations share contexts; reading these takes time, so it is left out where nothing is shared.
  """
  rows = batch.rows
  intervals = rows.intervals if shared else rows.intervals[:1]
  hidden_BQD = model.decoder(rows.tokens_BT, rows.positions_BT, intervals, batch.index_BQ)

  def piece(hidden_BqD: jax.Array, target_Bq: jax.Array) -> tuple[jax.Array, jax.Array]:
    logits_BqV = model.logits(hidden_BqD)
    chosen_Bq = jnp.take_along_axis(logits_BqV, target_Bq[..., None], axis=-1)[..., 0]
    return chosen_Bq - jax.nn.logsumexp(logits_BqV, axis=-1), jnp.argmax(logits_BqV, axis=-1) == target_Bq

  count, size = batch.target_BQ.shape
  vocabulary = model.decoder.config.known_vocab_size
  pieces = next(n for n in range(1, size + 1) if size % n == 0 and (count * (size // n) * vocabulary <= _LOGITS or n == size))
  if pieces == 1:
    return piece(hidden_BQD, batch.target_BQ)
  divide = lambda x: x.reshape(count, pieces, size // pieces, *x.shape[2:]).swapaxes(0, 1)
  results = jax.lax.map(lambda xs: piece(*xs), (divide(hidden_BQD), divide(batch.target_BQ)))
  logprob_BQ, greedy_BQ = (x.swapaxes(0, 1).reshape(count, size) for x in results)
  return logprob_BQ, greedy_BQ


def log_likelihoods(
  params: dict[str, Any],
  model: ModelConfig,
  mesh: Mesh,
  pairs: Sequence[Pair],
  *,
  tokens: int = TOKENS,
  max_rows: int | None = None,
  progress: Callable[[int], None] = lambda done: None,
) -> Likelihoods:
  """Return the log-likelihood of the scored tokens of every pair, and whether greedy decoding would give them.

  Equal pairs are computed once: in another row the last bits could differ, and equal choices would not tie.

  Args:
    params: of a `LanguageModel`, on the mesh.
    model: its shape, and how it is computed.
    mesh: of the parameters.
    pairs: what to score.
    tokens: most tokens of a batch on each data-parallel device.
    max_rows: most rows of a batch; None: as `tokens` allow.
    progress: receives the number of pairs that are done.
  """
  first: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}
  twin = np.array([first.setdefault(pair[:2], len(first)) for pair in pairs], int)
  distinct = [Pair(*ids) for ids in first]
  logprob, greedy = np.zeros(len(distinct)), np.ones(len(distinct), bool)

  def collect(batch: TargetBatch, results: Any) -> None:
    logprob_BQ, greedy_BQ = jax.device_get(results)
    real_BQ = batch.rollout_BQ >= 0
    np.add.at(logprob, batch.rollout_BQ[real_BQ], logprob_BQ[real_BQ].astype(np.float64))
    np.logical_and.at(greedy, batch.rollout_BQ[real_BQ], greedy_BQ[real_BQ])

  shards, forward = sharding.batch_shards(mesh), _build(model, mesh)
  done, running = 0, list[tuple[TargetBatch, Any]]()
  with jax.set_mesh(mesh):
    for chunk in plan(distinct, tokens * shards, shards, max_rows):
      for batch in batches(distinct, chunk):
        preemption.check()
        shared = bool((batch.rows.prefix_end_BT > batch.rows.prefix_start_BT).any())
        placed = sharding.put_global(batch, mesh)
        running.append((batch, forward(params, placed, shared)))
        if len(running) > _IN_FLIGHT:
          collect(*running.pop(0))
      done += len(chunk.members)
      progress(min(len(pairs), round(done * len(pairs) / len(distinct))))
    for item in running:
      collect(*item)
  return Likelihoods(logprob[twin], greedy[twin])


@functools.lru_cache(maxsize=4)
def _build(model: ModelConfig, mesh: Mesh) -> Any:
  """Return the jitted (params, batch, shared) -> `target_logprobs`, replicated on all devices."""
  abstract = heads.abstract_model(model, 'lm')
  graphdef, _ = nnx.split(abstract)

  def forward(params: dict[str, Any], batch: TargetBatch, shared: bool) -> tuple[jax.Array, jax.Array]:
    # By default accelerators multiply float32 matrices in TF32 or bfloat16.
    exact = jax.default_matmul_precision('highest') if model.compute_dtype == 'float32' else contextlib.nullcontext()
    with exact:
      return target_logprobs(nnx.merge(graphdef, params), batch, shared)

  return jax.jit(
    forward,
    static_argnums=2,
    in_shardings=(jax.tree.map(lambda a: a.sharding, sharding.abstract_params(abstract, mesh)), sharding.batch_sharding(mesh)),
    out_shardings=NamedSharding(mesh, PartitionSpec()),
  )
