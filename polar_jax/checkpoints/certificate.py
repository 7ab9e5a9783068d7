"""The certificate of a conversion: number of parameters, checksum of every tensor, and scores of fixed rows before and after.

Fixed rows are random token ids, which test the model, and texts, which test tokenizer and template too.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from polar_jax import sharding
from polar_jax.config import ModelConfig, TemplateConfig
from polar_jax.data.conversation_template import open_template
from polar_jax.data.special_tokens import TokenizerError
from polar_jax.data.tokenizer import Tokenizer
from polar_jax.model.layer_inputs import LayerInputs
from polar_jax.model.layers import rms_norm, scale_embeddings
from polar_jax.model.reward_model import read_head
from polar_jax.model.transformer import Block
from polar_jax.types import UserError

FILE = 'certificate.json'
TextIds = list[list[int] | None]  # token ids of each fixed text; None where the tokenizer refuses it

# Shape of the token rows that are scored; they are the same for every model with the same vocabulary.
_ROWS, _LENGTH = 8, 32

# (prompt, reference, candidate)
_TEXTS = (
  ('What is 2+2?', 'Four.', 'It is 4.'),
  ('Hi', 'Hello', ''),
  ('Translate: "naïve façade"', 'eine naive Fassade …', '素朴な外観 🦊'),
  ('def f(x):\n  return x + 12345\n\n', '\tpass  # none', "it's   spaced\r\nout"),
)


@dataclasses.dataclass(frozen=True)
class Certificate:
  """Facts about a conversion.

  Attributes:
    source: path of the checkpoint that was read.
    output: path of the checkpoint that was written.
    family: model family.
    head: 'reward', 'lm' or 'value'.
    parameters: number of parameters.
    dtypes: dtypes that the output is stored in.
    exact: nothing was cast, so the scores must be bit-identical as well.
    tensors: SHA-256 of every stored tensor's bytes in the dtype it is written in, (read from the source, read back).
    scores: scores of the fixed rows, (before, after).
    text_ids: token ids of the fixed texts, (before, after); None for a text that the tokenizer refuses.
    text_scores: scores of the fixed texts, (before, after).
    texts_skipped: why no texts were scored; '' if they were.
  """

  source: str
  output: str
  family: str
  head: str
  parameters: int
  dtypes: tuple[str, ...]
  exact: bool
  tensors: dict[str, tuple[str, str]]
  scores: tuple[list[float], list[float]]
  text_ids: tuple[TextIds, TextIds] = ([], [])
  text_scores: tuple[list[float], list[float]] = ([], [])
  texts_skipped: str = ''

  @property
  def max_difference(self) -> float:
    """Largest absolute difference of two scores."""
    before, after = (np.array([*ids, *texts]) for ids, texts in zip(self.scores, self.text_scores, strict=True))
    return float(np.max(np.abs(before - after)))

  def check(self) -> None:
    """Check that the output is what was read.

    Raises:
      UserError: a tensor, the tokens of a text or the scores differ; the message names the tensor or text.
    """
    changed = [name for name, (before, after) in self.tensors.items() if before != after]
    if changed:
      raise UserError(
        f'{self.output}: tensor {changed[0]!r} reads back differently from {self.source} ({len(changed)} tensors differ); output discarded'
      )
    for text, before, after in zip(_TEXTS, *self.text_ids, strict=False):
      if before != after:
        raise UserError(
          f'{self.output}: the text {text!r} becomes the tokens {str(after)[:80]}, in {self.source} {str(before)[:80]}; output discarded'
        )
    if not np.isfinite(self.max_difference) or (self.exact and self.max_difference != 0):
      raise UserError(f'{self.output}: scores differ by {self.max_difference:.3g} from those of {self.source}; output discarded')

  def lines(self) -> list[str]:
    """Return the certificate as lines for the terminal."""
    equal = sum(before == after for before, after in self.tensors.values())
    width = max(map(len, self.tensors), default=0)
    texts = [f'{len(self.text_scores[0])} texts with the same tokens before and after, scored as well'] if self.text_scores[0] else []
    texts += [f'no texts were compared: {self.texts_skipped}'] if self.texts_skipped else []
    table = [f'  {name:<{width}}  {a[:16]}{"" if a == b else f"  read back as {b[:16]}"}' for name, (a, b) in self.tensors.items()]
    return [
      'certificate: tensor, SHA-256 (first 16 digits)',
      *table,
      f'{self.head} model of family {self.family}, {self.parameters:,} parameters, stored as {", ".join(self.dtypes)}',
      f'{equal} of {len(self.tensors)} tensors read back bit-identical' + ('' if self.exact else ' after the cast to that dtype'),
      f'{len(self.scores[0])} fixed rows scored before and after: max |difference| {self.max_difference:.3g}',
      *texts,
    ]

  def write(self, folder: pathlib.Path) -> None:
    """Write the certificate to `folder` as JSON."""
    facts = dataclasses.asdict(self) | {'max_difference': self.max_difference}
    (folder / FILE).write_text(json.dumps(facts, indent=2) + '\n')


def fixed_texts(tokenizer: Tokenizer, template: TemplateConfig, head: str, model: ModelConfig) -> TextIds:
  """Return the token ids of the fixed texts: through the reward model's template, or those of (prompt, reference) for other models.

  Args:
    tokenizer: of the checkpoint.
    template: of the checkpoint.
    head: 'reward', 'lm' or 'value'.
    model: its vocabulary bounds the ids.

  Raises:
    UserError: tokenizer and template do not go together.
  """
  opened = open_template(template, tokenizer) if head == 'reward' else None
  out: TextIds = []
  for prompt, reference, candidate in _TEXTS:
    try:
      if opened is None:
        ids = tokenizer.encode(f'{prompt}\n{reference}', add_bos=True)
      else:
        (ids,) = opened.encode_candidates(prompt, reference, [candidate])
    except TokenizerError:  # of a tokenizer that was trained on other text
      ids = []
    out.append(ids if ids and max(ids) < model.known_vocab_size else None)
  return out


def fixed_rows_scores(
  params: dict[str, Any], model: ModelConfig, head: str, mesh: Mesh, texts: Sequence[Sequence[int] | None] = ()
) -> list[float]:
  """Score fixed rows of token ids in float32: the reward or value at the last token, or the mean log-likelihood.

  Layers are applied one by one, so that only one at a time is in float32 next to the stored weights.

  Args:
    params: parameters in any dtype.
    model: shape of the model.
    head: 'reward', 'lm' or 'value'.
    mesh: devices that hold `params`.
    texts: further rows, of any lengths; None is left out.

  Returns:
    One number per row.
  """
  shards = sharding.batch_shards(mesh)
  rng = np.random.default_rng(0)
  random_tokens = rng.integers(0, model.known_vocab_size, (_ROWS, _LENGTH), np.int32)
  random_last = rng.integers(1, _LENGTH, _ROWS, np.int32)
  rows = [*random_tokens, *(np.array(ids, np.int32) for ids in texts if ids is not None)]
  last = np.array([*random_last, *(len(row) - 1 for row in rows[_ROWS:])], np.int32)
  padded = np.zeros((len(rows), sharding.round_up(max(map(len, rows)), _LENGTH)), np.int32)
  for row, tokens in zip(padded, rows, strict=True):
    row[: len(tokens)] = tokens
  batch = sharding.round_up(len(rows), shards)  # more devices score some rows twice
  tokens_BT, last_B = np.resize(padded, (batch, padded.shape[1])), np.resize(last, batch)
  decoder = params['decoder']
  vocabulary_VD = params.get('lm_head', decoder['embedding'])
  with jax.set_mesh(mesh), jax.default_matmul_precision('highest'):
    embed, apply_layer, read = _programs(dataclasses.replace(model, compute_dtype='float32'), head, mesh)
    x_BTD = embed(decoder['embedding'], tokens_BT)
    for layer in range(model.num_layers):
      x_BTD = apply_layer({name: weights[layer] for name, weights in decoder['layers'].items()}, x_BTD, layer)
    scored_B = read(decoder['norm'], vocabulary_VD if head == 'lm' else params['v_head'], x_BTD, tokens_BT, last_B)
  return np.asarray(scored_B, np.float64)[: len(rows)].tolist()


@functools.cache
def _programs(model: ModelConfig, head: str, mesh: Mesh) -> tuple[Callable[..., jax.Array], ...]:
  """Return (embed, apply_layer, read), compiled once: separate compilations before and after might add in another order."""
  graphdef = nnx.split(nnx.eval_shape(lambda: Block(model, rngs=nnx.Rngs(params=0))))[0]

  def positions(tokens_BT: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)

  def embed(table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
    return scale_embeddings(jnp.take(table_VD, tokens_BT, axis=0).astype(jnp.float32), model)

  def apply_layer(weights: dict[str, jax.Array], x_BTD: jax.Array, layer: jax.Array) -> jax.Array:
    position_BT = positions(x_BTD[..., 0])
    inputs = LayerInputs(position_BT, [(jnp.zeros_like(position_BT), position_BT + 1)], model)
    return nnx.merge(graphdef, weights)(x_BTD, inputs.of(jnp.asarray(inputs.kind_L)[layer]))

  def read(norm_D: jax.Array, head_weights: jax.Array, x_BTD: jax.Array, tokens_BT: jax.Array, last_B: jax.Array) -> jax.Array:
    x_BTD = rms_norm(x_BTD, norm_D, model.norm_eps, model.zero_centered_norms)
    if head != 'lm':
      return jnp.take_along_axis(read_head(x_BTD, head_weights), last_B[:, None], axis=1)[:, 0]
    logits_BTV = jnp.einsum('BTD,VD->BTV', x_BTD, head_weights.astype(jnp.float32))
    next_BT1 = jnp.roll(tokens_BT, -1, axis=1)[..., None]
    log_likelihood_BT = jnp.take_along_axis(jax.nn.log_softmax(logits_BTV), next_BT1, axis=-1)[..., 0]
    return jnp.sum(jnp.where(positions(tokens_BT) < last_B[:, None], log_likelihood_BT, 0.0), axis=1) / jnp.maximum(last_B, 1)

  return jax.jit(embed), jax.jit(apply_layer), jax.jit(read, out_shardings=NamedSharding(mesh, PartitionSpec()))
