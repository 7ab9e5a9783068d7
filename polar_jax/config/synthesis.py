"""Options of the synthesis of data: of pools of language models, and of the worlds that need none."""

from __future__ import annotations

import dataclasses

from polar_jax.config.base import option

# Options of the world `files`, and those of pools that other worlds read.
OF_FILES = ('files', 'triplet_words', 'train_policies', 'correctness_pairs', 'held_out_policies', 'best_of')
READ_OF_POOLS = {
  'files': ('pairs_per_prompt', 'negatives', 'validation_share', 'unseen_share', 'exclude', 'exclude_near'),
  'ngram': ('negatives',),
}


@dataclasses.dataclass(frozen=True)
class PoolConfig:
  """Triplets of a pool of language models: servers, checkpoints and recorded answers."""

  pool: str | None = option(None, 'File that describes a pool of policies (.json, .yaml or .py). None: the data of `world`.')
  prompts: str | None = option(
    None,
    'Prompts of the pool, files separated by commas: instructions, or documents whose beginnings are continued. None: those of recorded '
    'answers.',
  )
  prompt_weights: str | None = option(
    None, 'Share of each file of `prompts` in `max_prompts`, numbers separated by commas. None: all rows of every file.'
  )
  max_prompts: int | None = option(None, 'Most prompts. None: all.', min=1)
  samples_per_prompt: int = option(2, 'Samples of each policy that answers a prompt.', min=2)
  policies_per_prompt: int = option(4, 'Policies that answer a prompt, drawn by their weights; all if there are fewer.', min=2)
  pairs_per_prompt: int = option(4, 'Most triplets of a prompt; its samples are used several times.', min=1)
  negatives: int = option(1, 'Rejected answers of a training example, each of another policy; more than 1: ranked lists.', min=1)
  near_share: float = option(
    0.0, 'Share of triplets whose rejected policy is the nearest one there is; the others are drawn.', min=0, max=1
  )
  prefix_max_words: int = option(256, 'Longest beginning of a document that is a prompt, in words; lengths are uniform from 1.', min=1)
  validation_share: float = option(0.02, 'Share of prompts for the split `validation`.', min=0, max=1)
  unseen_share: float = option(
    0.05, 'Share of prompts for the splits `unseen_prompts` and, with the policies that are held out, `unseen_policies`.', min=0, max=1
  )
  near_duplicates: float = option(
    0.8,
    'Leave out prompts that share at least this part of the 5-grams of words with an earlier one, by MinHash (extra contamination). '
    '0: only equal ones.',
    min=0,
    max=1,
  )
  exclude: str | None = option(
    None,
    'Evaluation files, separated by commas: prompts that are in them, or share 13 words in a row with them, are left out. None: no file.',
  )
  exclude_near: float | None = option(
    None,
    'With `exclude`: also leave out prompts that share at least this part of the 5-grams of words with a text there, by MinHash (extra '
    'contamination). None: no.',
    exclusive_min=0,
    max=1,
  )
  unit_prompts: int = option(64, 'Prompts of a unit of work, which is done whole or again.', min=1)
  max_in_flight: int = option(64, 'Most requests at a time to one address.', min=1)
  timeout: float = option(600.0, 'Seconds until a request to a server is given up and repeated.', exclusive_min=0)
  patience: float = option(120.0, 'Seconds for which a request that fails is repeated before its policy is given up.', min=0)
  backend: str = option(
    'inline',
    'Where policies without a server are sampled: in this process, in several local ones, or by actors of a Ray cluster.',
    choices=('inline', 'processes', 'ray'),
  )
  processes: int = option(2, 'Processes of the backend processes.', min=1)
  ray_address: str | None = option(None, 'Address of the Ray cluster. None: RAY_ADDRESS if set, else one on this machine.')
  cpus: float = option(1, 'CPUs that each actor of the backend ray reserves.', min=0)
  gpus: float = option(0, 'GPUs that each actor of the backend ray reserves.', min=0)
  check: bool = option(False, 'Only show what each policy answers to three prompts.')


@dataclasses.dataclass(frozen=True)
class SynthesizeConfig(PoolConfig):
  """Synthesis of data: triplets of a pool of language models, samples of n-gram policies, or arithmetic word problems."""

  world: str = option(
    'ngram',
    'ngram: triplets of n-gram policies; arithmetic: word problems; pool: triplets of `pool`; files: triplets and preferences of `files`.',
    choices=('ngram', 'arithmetic', 'pool', 'files'),
  )
  files: str | None = option(
    None,
    'World files: files of triplets with their policies, of answers, and of preferences, separated by commas (docs/real.md). None: none.',
  )
  triplet_words: int | None = option(
    None, 'World files: words of an answer that triplets for training keep, its first ones. None: whole answers.', min=1
  )
  train_policies: int | None = option(
    None,
    'World files: policies of each file whose answers are in training triplets, those with several answers to a prompt first. None: all '
    'that are not held out.',
    min=2,
  )
  correctness_pairs: int = option(
    4, 'World files: most preferences of a right over a wrong answer that the marked answers to a prompt give. 0: none.', min=0
  )
  held_out_policies: float = option(0.2, 'World files: share of the policies of each file that no training example has.', min=0, max=0.9)
  best_of: int = option(8, 'World files: most answers to a prompt in held-out rows of best-of-n.', min=2)
  vocab_size: int = option(1_024, 'Vocabulary size of the BPE tokenizer that is trained.', min=300)
  policies: int = option(256, 'Number of policies in the pool.', min=8)
  unseen_policies: int = option(48, 'Number of `policies` that are kept for evaluation.', min=2)
  max_order: int = option(4, 'Highest order of the n-grams that a policy models (1: unigrams).', min=1, max=5)
  min_window: float = option(
    0.15, 'Smallest share of a corpus that a policy learns from; the largest is the whole corpus.', exclusive_min=0, max=1
  )
  prefix_min_tokens: int = option(4, 'Shortest prompt, in tokens.', min=1)
  prefix_max_tokens: int = option(12, 'Longest prompt, in tokens.', min=1)
  max_tokens: int = option(32, 'Longest trajectory, in tokens.', min=4)
  temperature: float = option(1.0, "Sampling temperature, multiplied with the policy's own.", exclusive_min=0)
  top_p: float = option(1.0, "Nucleus sampling; the smaller of this and the policy's own applies.", exclusive_min=0, max=1)
  top_k: int | None = option(None, 'Sample from this many likeliest tokens. None: from all.', min=1)
  documents: int = option(0, 'Documents that policies of the pool write for pretrain_lm to read in addition to the corpora.', min=0)
  document_tokens: int = option(256, 'Longest document, in tokens.', min=16)
  train_examples: int = option(60_000, 'Training triplets, or word problems.', min=1)
  evaluation_examples: int = option(2_000, 'Triplets, or word problems, in each of the other splits.', min=1)
  preference_examples: int = option(8_000, 'Ranked training examples.', min=1)
  preference_evaluation_examples: int = option(2_000, 'Ranked examples in each of the other splits.', min=1)
  max_number: int = option(12, 'Word problems: largest number in a problem and its answer.', min=6)
  two_steps: float = option(0.25, 'Word problems: share of problems that take two steps.', min=0, max=1)
  workers: int = option(2, 'Threads that sample and score the policies; no result depends on it.', min=1)
