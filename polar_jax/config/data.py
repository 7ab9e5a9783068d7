"""Options of the data: tokenizer, template, data sets, and the data that the synthesize stage writes."""

from __future__ import annotations

import dataclasses

from polar_jax.config.base import option


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
  """Which tokenizer is used."""

  kind: str = option(
    'trained',
    'trained: the small BPE that the synthesize stage writes to the workdir; byte: bytes; file: `path`; '
    'checkpoint: that of the checkpoint that is scored or started from.',
    choices=('trained', 'byte', 'file', 'checkpoint'),
  )
  path: str | None = option(
    None, "Required by `kind` 'file': a tokenizer.json, a SentencePiece tokenizer.model, or a folder with one of them."
  )


@dataclasses.dataclass(frozen=True)
class TemplateConfig:
  """The text template of POLAR and its truncation (section 4.1 of the paper)."""

  max_length: int = option(16_384, 'Longest (prompt, reference, prompt, candidate) sequence, in tokens; prompts are cut to fit.', min=16)
  max_response_length: int = option(4_096, 'Longest reference or candidate, in tokens; longer ones are cut.', min=1)
  separator: str = option('<|reward|>', 'Text between (prompt, reference) and (prompt, candidate).')
  separator_id: int | None = option(None, "Token id of `separator`. None: the tokenizer's.", min=0)
  reward_token: str = option('[UNUSED_TOKEN_130]', 'Token that ends a sequence, at which the reward is read.')
  reward_token_id: int | None = option(None, "Id of `reward_token`. None: the tokenizer's.", min=0)
  rule: str = option('trainer', 'Which one to follow where the official trainer and client disagree.', choices=('trainer', 'client'))
  use_reference: bool = option(True, 'Show the reference to the reward model. False: a classic reward model of (prompt, candidate).')
  chat: str = option(
    'auto',
    'Score (prompt, candidate) through the chat template: always, never, or auto: if a Hugging Face reward model has one, but no '
    'reward_token_id in its config.json.',
    choices=('auto', 'always', 'never'),
  )


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Data sets of the stages. Unset ones are those that the synthesize stage wrote to the workdir."""

  triplets: str | None = option(
    None,
    'Triplets for pretrain: a folder of TFDS or `save_to_disk`, or a .jsonl(.gz) or .parquet file. None: data/triplets in the workdir.',
  )
  preferences: str | None = option(
    None, 'Ranked examples for finetune, in the same formats as `triplets`. None: data/preferences in the workdir.'
  )
  validation: str | None = option(
    None,
    'Held-out examples; needed if the training examples are a single file or saved data set. None: the other splits of the same folder.',
  )
  prompts: str | None = option(
    None,
    'Prompts for rft, in the same formats as `triplets`, with the official columns or prompt and reference. None: those of the workdir.',
  )
  prompts_validation: str | None = option(
    None,
    'Held-out prompts, on which rft only measures. None: the split `validation` of the same data set, or `test` where it has no other.',
  )
  text: str | None = option(None, 'Text for pretrain_lm: a .txt file or a folder of them. None: data/text.npz in the workdir.')
  on_bad_example: str = option('raise', 'Stop at an invalid example, or skip and list all of them.', choices=('raise', 'skip'))
  row_length: int | None = option(
    None, 'Tokens of a packed row, which holds as many triplets as fit. None: chosen from the lengths of the data.', min=8
  )
  compilation_steps: float = option(
    50.0,
    'Cost of compiling a training step, in steps: with a smaller one, batches vary more in their number of rows, and have less padding.',
    min=0,
  )
  read_threads: int = option(2, 'Threads that prepare batches; 0: none, and no prefetching.', min=0)
  prefetch: int = option(4, 'Batches prepared ahead.', min=1)
