"""Every option of polar_jax, its default, and the values it may take.

The dataclasses below are the single statement of an option: `default_config()` turns them into the ConfigDict that config
files and the command line edit, and `parse()` turns the edited ConfigDict back into validated, frozen dataclasses. Below
`parse` nothing in the package ever sees a ConfigDict.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from typing import Any

import ml_collections
from ml_collections import config_dict

from polar_jax.types import UserError

STAGES = ('all', 'synthesize', 'pretrain_lm', 'pretrain', 'finetune', 'evaluate', 'rft', 'sweep', 'fit', 'convert', 'score', 'plan')
FAMILIES = ('internlm2', 'internlm3', 'llama', 'qwen2')
ROPE_SCALINGS = ('none', 'linear', 'dynamic', 'llama3')
REMAT_POLICIES = ('none', 'full', 'dots', 'dots_no_batch')
ATTENTION_BACKENDS = ('auto', 'reference', 'chunked', 'tpu', 'gpu')
DTYPES = ('float32', 'bfloat16')
STORED_DTYPES = ('float32', 'bfloat16', 'float16')

# Options and sections of earlier versions, by dotted name, and what they are called now.
_RENAMED_SECTIONS = {'lm': 'pretrain_lm', 'train': 'pretrain', 'synthesis': 'synthesize'}
_RENAMED_FIELDS = {
  **{f'{section}.accumulation': f'{section}.gradient_accumulation_steps' for section in ('pretrain_lm', 'pretrain', 'finetune')},
  **{f'{section}.evaluate_rows': f'{section}.evaluate_examples' for section in ('pretrain_lm', 'pretrain', 'finetune')},
  'data.evaluation': 'data.validation',
  'data.prompts_evaluation': 'data.prompts_validation',
  'data.on_bad_row': 'data.on_bad_example',
  'synthesize.smallest_window': 'synthesize.min_window',
  'synthesize.train_rows': 'synthesize.train_examples',
  'synthesize.evaluation_rows': 'synthesize.evaluation_examples',
  'synthesize.preference_rows': 'synthesize.preference_examples',
  'synthesize.preference_evaluation_rows': 'synthesize.preference_evaluation_examples',
  'synthesize.largest': 'synthesize.max_number',
  'rft.prompts': 'rft.prompts_per_step',
  'rft.samples': 'rft.num_generations',
  'rft.minibatch': 'rft.mini_batch_size',
  'rft.rows': 'rft.micro_batch_rows',
  'rft.lam': 'rft.gae_lambda',
  'rft.seeds': 'study.seeds',
  'rft.start_steps': 'study.start_steps',
  'rft.rollout.slots': 'rft.rollout.max_concurrent',
  'rft.reward.rows': 'rft.reward.rows_per_batch',
  'evaluate.rows': 'evaluate.rows_per_batch',
}
RENAMED = _RENAMED_SECTIONS | _RENAMED_FIELDS


class ConfigError(UserError):
  """A setting is unknown, of the wrong type, or outside its allowed values. The message is one line for the user."""


def _field(default: Any, *, choices: tuple | None = None, low: float | None = None, high: float | None = None, open_low: bool = False):
  """A dataclass field with the bounds that `parse` enforces (`open_low`: `low` itself is not allowed)."""
  return dataclasses.field(default=default, metadata={'choices': choices, 'low': low, 'high': high, 'open_low': open_low})


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Shape of the decoder shared by the language model and the reward model. The vocabulary comes from the tokenizer.

  Families share one decoder: what they do differently are the flags below. `family` itself only names tensors and files when a
  checkpoint is exchanged with Hugging Face.
  """

  family: str = _field('internlm2', choices=FAMILIES)
  vocab_size: int | None = _field(None, low=1)  # None: the tokenizer's
  num_layers: int = _field(4, low=1)
  d_model: int = _field(128, low=1)
  d_ff: int = _field(384, low=1)
  num_heads: int = _field(4, low=1)
  num_kv_heads: int = _field(2, low=1)
  head_dim: int = _field(32, low=2)
  rope_theta: float = _field(10_000.0, low=0, open_low=True)
  rope_scaling: str = _field('none', choices=ROPE_SCALINGS)  # how rotary embeddings reach beyond the length they were trained at
  rope_factor: float = _field(1.0, low=0, open_low=True)  # of 'linear', 'dynamic' and 'llama3'
  rope_low_freq_factor: float = _field(1.0, low=0, open_low=True)  # of 'llama3'
  rope_high_freq_factor: float = _field(4.0, low=0, open_low=True)  # of 'llama3'
  rope_original_length: int = _field(8_192, low=1)  # of 'llama3': the length it was trained at
  max_position: int = _field(32_768, low=1)  # 'dynamic' scaling acts on longer sequences only
  norm_eps: float = _field(1e-5, low=0, open_low=True)
  init_std: float = _field(0.02, low=0, open_low=True)  # normal, for embeddings and linear layers
  v_head_init: str = _field('zero', choices=('zero', 'normal'))  # zero: the first loss is exactly ln 2, as in XTuner
  qkv_bias: bool = False  # biases of the query, key and value projections (qwen2)
  tie_embeddings: bool = False  # language model head shares the embedding table
  compute_dtype: str = _field('float32', choices=DTYPES)  # activations and matmuls; master weights are always float32
  remat: str = _field('none', choices=REMAT_POLICIES)
  scan_unroll: int = _field(1, low=1)  # layers per iteration of the layer scan; small models on CPU like all of them
  attention: str = _field('auto', choices=ATTENTION_BACKENDS)


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
  """Which tokenizer reads text. `trained`: the small BPE that the synthesize stage writes to the workdir; `checkpoint`: that of
  the checkpoint that is scored or started from."""

  kind: str = _field('trained', choices=('trained', 'byte', 'file', 'checkpoint'))
  path: str | None = None  # kind 'file': a tokenizer.json, a SentencePiece tokenizer.model, or a folder that holds one


@dataclasses.dataclass(frozen=True)
class TemplateConfig:
  """The text template of POLAR (section 4.1 of the paper) and its truncation."""

  max_length: int = _field(16_384, low=16)  # tokens of one (prompt, reference, prompt, candidate) sequence
  max_response_length: int = _field(4_096, low=1)  # tokens of a reference or candidate
  separator: str = '<|reward|>'
  separator_id: int | None = _field(None, low=0)  # None: the tokenizer's id of `separator`
  reward_token: str = '[UNUSED_TOKEN_130]'
  reward_token_id: int | None = _field(None, low=0)  # None: the tokenizer's id of `reward_token`
  rule: str = _field('trainer', choices=('trainer', 'client'))  # where the official trainer and client disagree
  use_reference: bool = True  # False: a classic reward model, `prompt, candidate` (ablation)


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """What the training stages read. None: what the synthesize stage wrote to the workdir."""

  triplets: str | None = None  # TFDS folder, .jsonl, .jsonl.gz or .parquet
  preferences: str | None = None
  validation: str | None = None  # held-out rows, needed when the training rows are a single file; None: the other splits beside them
  prompts: str | None = None  # of rft: TFDS folder, .jsonl, .jsonl.gz or .parquet (the official format, or prompt and reference)
  prompts_validation: str | None = None  # held-out ones, of which rft only measures; None: the split `test` beside them, if there is one
  text: str | None = None  # folder or file of .txt for pretrain_lm
  on_bad_example: str = _field('raise', choices=('raise', 'skip'))
  row_length: int | None = _field(None, low=8)  # tokens of a row, which holds as many triplets as fit; None: chosen from the data
  read_threads: int = _field(2, low=0)
  prefetch: int = _field(4, low=1)  # batches


@dataclasses.dataclass(frozen=True)
class SynthesizeConfig:
  """The policy pool and what is sampled from it; or, in the arithmetic world, word problems."""

  world: str = _field('ngram', choices=('ngram', 'arithmetic'))
  vocab_size: int = _field(1_024, low=300)  # of the BPE trained on the spot
  policies: int = _field(256, low=8)
  unseen_policies: int = _field(48, low=2)  # of `policies`, kept for evaluation only
  max_order: int = _field(4, low=1, high=5)
  min_window: float = _field(0.15, low=0, high=1, open_low=True)  # of a corpus, that a policy learns from; the largest is all of it
  prefix_min_tokens: int = _field(4, low=1)
  prefix_max_tokens: int = _field(12, low=1)
  max_tokens: int = _field(32, low=4)  # of a trajectory
  temperature: float = _field(1.0, low=0, open_low=True)  # multiplies the policy's own
  top_p: float = _field(1.0, low=0, high=1, open_low=True)  # the smaller of this and the policy's own applies
  top_k: int | None = _field(None, low=1)
  documents: int = _field(0, low=0)  # that policies of the pool write for `pretrain_lm` to read beside the corpora
  document_tokens: int = _field(256, low=16)  # of a document, at most
  train_examples: int = _field(60_000, low=1)
  evaluation_examples: int = _field(2_000, low=1)  # each of validation, unseen_prompts, unseen_policies
  preference_examples: int = _field(8_000, low=1)
  preference_evaluation_examples: int = _field(2_000, low=1)  # each of the same splits
  max_number: int = _field(12, low=6)  # number in an arithmetic problem and its answer
  two_steps: float = _field(0.25, low=0, high=1)  # share of arithmetic problems that take two steps
  workers: int = _field(2, low=1)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW, its warm-up and its cosine. A `final_lr_ratio` of 1 keeps the rate constant after the warm-up."""

  learning_rate: float = _field(1e-3, low=0, open_low=True)
  warmup_ratio: float = _field(0.03, low=0, high=1)
  final_lr_ratio: float = _field(0.1, low=0, high=1)  # of learning_rate, at the end of the cosine
  b1: float = _field(0.9, low=0, high=1)
  b2: float = _field(0.95, low=0, high=1)
  eps: float = _field(1e-8, low=0, open_low=True)
  weight_decay: float = _field(0.0, low=0)
  clip_norm: float | None = _field(1.0, low=0, open_low=True)


@dataclasses.dataclass(frozen=True)
class TrainConfig(OptimizerConfig):
  """One training run: `lm` (next token), `train` (contrastive pre-training) and `finetune` each have one."""

  steps: int | None = _field(None, low=1)  # None: one epoch
  batch_size: int = _field(64, low=1)  # rows of the global batch: triplets, or text windows for `lm`
  gradient_accumulation_steps: int = _field(1, low=1)  # micro-batches per step; the result does not depend on it
  sequence_length: int = _field(128, low=8)  # tokens of a text window (`lm` only)
  start_from: str = 'pretrain_lm'  # 'scratch', 'pretrain_lm', 'pretrain' (a stage of this workdir) or the workdir of another run
  log_every: int = _field(10, low=1)  # plain progress lines; metrics.jsonl has every step
  evaluate_every: int | None = _field(None, low=1)  # validation during training; None: only at the end
  evaluate_examples: int = _field(512, low=1)


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
  """How the policy answers prompts."""

  max_prompt: int = _field(1_024, low=1)  # tokens; longer prompts are left out, counted and reported
  max_new: int = _field(1_024, low=1)  # tokens of an answer, its stop token included
  min_new: int = _field(1, low=1)  # tokens before which no stop token is sampled
  temperature: float = _field(1.0, low=0)  # 0: the likeliest token
  top_p: float = _field(1.0, low=0, high=1, open_low=True)
  top_k: int | None = _field(None, low=1)
  stop: str | None = None  # tokens that end an answer, separated by spaces; None: the tokenizer's EOS and what its chat template ends with
  max_concurrent: int = _field(64, low=1)  # answers decoded at a time: a finished one makes room for the next prompt
  chat: str = _field('auto', choices=('auto', 'none'))  # auto: with the policy's chat template, if its folder has one


@dataclasses.dataclass(frozen=True)
class RewardConfig:
  """What an answer earns: a weighted sum of the reward model's score and of a rule, then normalised, clipped and shaped.

  The paper's recipe is the raw score of the model: the defaults.
  """

  source: str = _field('model', choices=('model', 'http', 'python'))  # a model in this process, a server of the official kinds, `function`
  function: str | None = None  # of source 'python': 'module:name' of f(prompts, completions, **columns) -> list of numbers, as in TRL
  checkpoint: str = 'finetune'  # 'pretrain' or 'finetune' (a stage of this workdir), or any checkpoint with a reward head
  server: str = _field('sglang', choices=('sglang', 'vllm', 'lmdeploy'))
  address: str = '127.0.0.1:30000'
  server_model: str | None = None  # name that the request carries; None: the last part of `checkpoint`
  timeout: float = _field(30.0, low=0, open_low=True)  # seconds for one request
  patience: float = _field(180.0, low=0)  # seconds that a failing server is asked again before the run saves and stops
  wrapper: str = _field('sft', choices=('sft', 'pretrain'))
  strip_thinking: bool = True  # score what follows the first </think> (official rule)
  model_weight: float = 1.0  # of what `source` gives
  rule_weight: float = 0.0
  rule: str | None = _field(None, choices=('last_number',))  # 1 if an answer's last number is the reference's; weight 0: measured
  normalize: str = _field('none', choices=('none', 'running', 'group', 'reference'))
  clip: float | None = _field(None, low=0, open_low=True)  # the normalised reward is kept within +- this
  missing_eos_penalty: float = _field(0.0, low=0)  # taken from answers that were cut at max_new
  length_buffer: int | None = _field(None, low=1)  # tokens before max_new over which `length_penalty` grows from 0; None: no length control
  length_penalty: float = _field(1.0, low=0)
  row_length: int | None = _field(None, low=8)  # tokens of a scored row; None: chosen from the template and the rollouts
  rows_per_batch: int = _field(16, low=1)  # of a scored batch


@dataclasses.dataclass(frozen=True)
class AlarmConfig:
  """When a run looks like reward hacking. None: this alarm is off. Each looks at the mean over the last `window` steps."""

  action: str = _field('warn', choices=('warn', 'stop'))  # stop: save, and end the run there
  window: int = _field(5, low=1)  # steps
  max_kl: float | None = _field(None, low=0, open_low=True)  # nats per token, to the start
  min_entropy: float | None = _field(None, low=0)  # nats per token
  max_truncated: float | None = _field(None, low=0, high=1)  # share of answers cut at max_new
  max_empty: float | None = _field(None, low=0, high=1)  # share of answers without text
  min_shuffled_gap: float | None = None  # raw score minus that under another prompt's reference
  max_overlap: float | None = _field(None, low=0, high=1)  # share of an answer's words that stand in its reference


@dataclasses.dataclass(frozen=True)
class RftConfig:
  """Reinforcement fine-tuning by PPO. Defaults are the official scripts' (docs/rft.md)."""

  method: str = _field('ppo', choices=('ppo', 'sft'))  # sft: the references themselves are the answers, and imitated
  policy: str = 'pretrain_lm'  # 'pretrain_lm' (a stage of this workdir), or any checkpoint with a language-model head
  epochs: int = _field(1, low=1)  # over the prompts, when `steps` is None
  steps: int | None = _field(None, low=1)
  prompts_per_step: int = _field(1_024, low=1)  # of a step
  num_generations: int = _field(1, low=1)  # answers to each prompt
  mini_batch_size: int | None = _field(None, low=1)  # answers of an update; None: all of a step
  update_epochs: int = _field(1, low=1)  # passes over the answers of a step
  recompute_logprobs: bool = True  # False: those noted while sampling are the old ones, which spares a pass
  row_length: int | None = _field(None, low=8)  # tokens of a training row, which holds as many answers as fit; None: max_prompt + max_new
  micro_batch_rows: int = _field(8, low=1)  # of a micro-batch; no result depends on it
  advantage: str = _field('gae', choices=('gae', 'grpo', 'rloo'))
  gamma: float = _field(1.0, low=0, high=1)
  gae_lambda: float = _field(1.0, low=0, high=1)
  whiten: bool = True  # advantages of `gae`, over the tokens of a step
  kl_in: str = _field('none', choices=('none', 'reward', 'loss'))
  kl_estimator: str = _field('k1', choices=('k1', 'k2', 'k3'))
  kl_coef: float = _field(0.01, low=0)
  kl_target: float | None = _field(None, low=0, open_low=True)  # nats per token that kl_coef is steered to; None: kl_coef stays
  kl_horizon: float = _field(10_000.0, low=0, open_low=True)  # answers over which it is steered
  track_kl: bool = True  # measure the KL to the start, which a frozen copy of it is kept for
  clip: float = _field(0.2, low=0, open_low=True)
  clip_high: float | None = _field(None, low=0, open_low=True)  # upper side of the clip; None: `clip`
  dual_clip: float | None = _field(3.0, low=1, open_low=True)
  value_clip: float | None = _field(0.5, low=0, open_low=True)
  loss_mean: str = _field('token', choices=('token', 'sequence'))
  entropy_coef: float = _field(0.0, low=0)
  critic_warmup: int = _field(0, low=0)  # first steps in which only the critic learns
  shuffled_every: int = _field(1, low=1)  # steps between scorings under shuffled references
  evaluate_every: int | None = _field(None, low=1)  # steps between measurements on held-out prompts; None: before and after
  evaluate_prompts: int = _field(256, low=1)
  log_every: int = _field(1, low=1)  # plain progress lines; metrics.jsonl has every step
  actor: OptimizerConfig = OptimizerConfig(learning_rate=1e-6, final_lr_ratio=1.0, b2=0.999, weight_decay=0.01)
  critic: OptimizerConfig = OptimizerConfig(learning_rate=1e-5, warmup_ratio=0.0, b2=0.999, weight_decay=0.01)
  rollout: RolloutConfig = RolloutConfig()
  reward: RewardConfig = RewardConfig()
  alarms: AlarmConfig = AlarmConfig()


@dataclasses.dataclass(frozen=True)
class StudyConfig:
  """The study of PPO in the miniature, where the target policy's likelihood is known."""

  seeds: int = _field(1, low=1)  # independent runs
  start_steps: int = _field(100, low=1)  # training steps of the language model that each run starts from


@dataclasses.dataclass(frozen=True)
class CheckpointingConfig:
  every_steps: int = _field(200, low=1)
  keep: int = _field(2, low=1)  # newest checkpoints
  keep_best: int = _field(1, low=0)  # by validation accuracy (loss for `lm`), beside the newest
  asynchronous: bool = True
  folder: str | None = None  # where the runs keep checkpoints, tokenizer and logs instead of the workdir: gs://bucket/name, s3://...


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
  steps: int = _field(0, low=0)  # to capture with JAX's profiler, in each run of a stage; 0: none
  skip: int = _field(5, low=1)  # steps of a start that come before: the first compiles


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Devices along each axis; exactly one may be -1, which takes what the others leave."""

  data: int = _field(1, low=-1)
  fsdp: int = _field(-1, low=-1)
  tensor: int = _field(1, low=-1)
  context: int = _field(1, low=-1)


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
  rows_per_batch: int = _field(16, low=1)  # of a scored batch; a row holds several groups of candidates
  bootstrap: int = _field(2_000, low=100)  # resamples for the 95% intervals


@dataclasses.dataclass(frozen=True)
class SweepConfig:
  """A grid of pre-training runs: every size with every number of tokens, learning rate and batch size.

  What the grid leaves open is that of the sections `model`, `lm` and `train`.
  """

  sizes: tuple[str, ...] = _field(('32x2', '64x3', '128x4'))  # d_model x num_layers; heads and feed-forward in proportion to `model`
  tokens: tuple[int, ...] = _field((1_000_000, 2_000_000), low=1)  # of the triplets that a run trains on
  learning_rates: tuple[float, ...] = _field((1e-3,), low=0, open_low=True)  # peaks, at the width of `model`
  batches: tuple[int, ...] = _field((32,), low=1)  # triplets of a step
  seeds: tuple[int, ...] = _field((0,), low=0)  # added to `seed`: other initial parameters, language model and order of triplets
  tokens_exponent: float = _field(0.0, low=0)  # tokens are multiplied by (parameters of the size / of `model`) to this power
  width_exponent: float = 0.0  # a rate is multiplied by (width of `model` / width of the size) to this power
  backend: str = _field('inline', choices=('inline', 'processes', 'ray'))
  workers: int = _field(1, low=1)  # runs at a time: in threads of this process (on one device), or processes with a share of the cores each
  ray_address: str | None = None  # of a Ray cluster that sees the workdir; None: one on this machine
  cpus: float = _field(1.0, low=0)  # of a run on Ray
  gpus: float = _field(0.0, low=0)  # of a run on Ray
  jobs_only: bool = False  # write the runs as commands for a cluster's queue, and train none


@dataclasses.dataclass(frozen=True)
class FitConfig:
  """Scaling laws from the rows of a sweep."""

  input: str | None = None  # CSV with the columns parameters, tokens, flops, loss, and learning_rate and batch; None: that of the sweep
  flops: float | None = _field(None, low=0, open_low=True)  # a budget to be advised on
  topology: str = 'v5p:4x4x4'  # where it would be spent: chip and number
  mfu: float = _field(0.4, low=0, high=1, open_low=True)  # share of the peak that training reaches there
  lm_tokens: float | None = _field(None, low=0, open_low=True)  # seen by the language model to start from: for the paper's learning rate


@dataclasses.dataclass(frozen=True)
class PlanConfig:
  """What the plan stage compiles, and for which chips."""

  topology: str = 'v5p:4x4x4'  # chip and slice
  step: str = _field('pretrain', choices=('pretrain_lm', 'pretrain', 'finetune', 'rft'))
  triplet_tokens: int | None = _field(None, low=2)  # of a triplet in the mean, prefixes shared; None: every triplet fills a row
  tokens: float | None = _field(None, low=0, open_low=True)  # of the whole run, prefixes shared; None: those of its steps, where set
  reward: str = 'polar_7b'  # preset of the reward model that PPO asks


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
  """The processes of a run on several hosts. None: what SLURM, the TPU slice or JAX's environment variables say."""

  coordinator: str | None = None  # host:port of process 0
  processes: int | None = _field(None, low=1)
  process: int | None = _field(None, low=0)  # this one
  timeout: int = _field(300, low=1)  # seconds to wait for the others at the start
  heartbeat: int = _field(100, low=1)  # seconds of silence after which a process counts as lost
  beat: float = _field(10.0, low=0, open_low=True)  # seconds between what each process writes of where it is
  stall: float = _field(900.0, low=0, open_low=True)  # seconds without a step after which it is reported who lags behind


@dataclasses.dataclass(frozen=True)
class ConvertConfig:
  """Exchange of checkpoints with Hugging Face. The direction follows from what `checkpoint` is."""

  dtype: str | None = _field(None, choices=STORED_DTYPES)  # of the tensors written; None: as they are stored
  shard_gib: float = _field(4.0, low=0, open_low=True)  # most of a safetensors file


@dataclasses.dataclass(frozen=True)
class ScoreConfig:
  """How the score stage works through its rows; no reward depends on it."""

  window: int = _field(1_024, low=1)  # rows read, scored and written at a time


@dataclasses.dataclass(frozen=True)
class Config:
  """A whole run. `checkpoint`, `input` and `output` belong to the stages that convert and score."""

  stage: str = 'all'  # of STAGES, or several of them in order, separated by commas
  seed: int = _field(0, low=0, high=2**31 - 1)
  checkpoint: str | None = None
  input: str | None = None
  output: str | None = None
  model: ModelConfig = ModelConfig()
  tokenizer: TokenizerConfig = TokenizerConfig()
  template: TemplateConfig = TemplateConfig()
  data: DataConfig = DataConfig()
  synthesize: SynthesizeConfig = SynthesizeConfig()
  pretrain_lm: TrainConfig = TrainConfig(start_from='scratch')
  pretrain: TrainConfig = TrainConfig()
  finetune: TrainConfig = TrainConfig(start_from='pretrain')
  rft: RftConfig = RftConfig()
  study: StudyConfig = StudyConfig()
  ablations: bool = False  # also fine-tune without pre-training, and without the reference (Table 7 of the paper)
  checkpointing: CheckpointingConfig = CheckpointingConfig()
  mesh: MeshConfig = MeshConfig()
  compile_cache: str | None = None  # folder of compiled programs for later starts; None: JAX_COMPILATION_CACHE_DIR, if set
  profile: ProfileConfig = ProfileConfig()
  distributed: DistributedConfig = DistributedConfig()
  evaluate: EvaluateConfig = EvaluateConfig()
  sweep: SweepConfig = SweepConfig()
  fit: FitConfig = FitConfig()
  plan: PlanConfig = PlanConfig()
  convert: ConvertConfig = ConvertConfig()
  score: ScoreConfig = ScoreConfig()


def _plain_type(hint: Any) -> tuple[type, bool]:
  """(type, may it be None) of an annotation such as `int` or `int | None`."""
  args = [a for a in typing.get_args(hint) if a is not types.NoneType]
  return (args[0], True) if isinstance(hint, types.UnionType) else (hint, False)


def current_name(name: str) -> str:
  """Return what an option or section of an earlier version is called now; a name that did not change is returned as it is.

  Args:
    name: dotted, for instance 'train.accumulation'.
  """
  section, dot, field = name.partition('.')
  name = RENAMED.get(section, section) + dot + field
  return RENAMED.get(name, name)


def default_config() -> ml_collections.ConfigDict:
  """The defaults of every option, unlocked, for a config file to edit and return."""

  def build(section: Any) -> ml_collections.ConfigDict:
    out = ml_collections.ConfigDict()
    hints = typing.get_type_hints(type(section))
    for f in dataclasses.fields(section):
      value = getattr(section, f.name)
      if dataclasses.is_dataclass(value):
        out[f.name] = build(value)
      else:
        kind, optional = _plain_type(hints[f.name])
        out[f.name] = config_dict.placeholder(kind) if optional and value is None else value
    return out

  return build(Config())


def parse(raw: ml_collections.ConfigDict) -> Config:
  """Turns an edited ConfigDict into a frozen `Config`.

  Raises:
    ConfigError: naming the option, what was given and what is allowed.
  """
  config = _parse_section(raw, Config(), '')
  _check_together(config)
  return config


def _parse_section(raw: Any, default: Any, prefix: str) -> Any:
  cls = type(default)  # what `raw` leaves out keeps the value of `default`: sections of one type differ in their defaults
  names = {f.name for f in dataclasses.fields(cls)}
  for key in raw:
    if key not in names:
      raise ConfigError(f'unknown setting {prefix}{key}; {prefix[:-1] or "the config"} has: {", ".join(sorted(names))}')
  hints = typing.get_type_hints(cls)
  values = {}
  for f in dataclasses.fields(cls):
    if f.name not in raw:
      continue
    hint, value, name = hints[f.name], raw[f.name], f'{prefix}{f.name}'
    if dataclasses.is_dataclass(hint):
      if not hasattr(value, 'keys'):
        raise ConfigError(f'{name} is a section with settings of its own, not {value!r}')
      values[f.name] = _parse_section(value, getattr(default, f.name), f'{name}.')
    else:
      values[f.name] = _check_value(name, value, hint, f.metadata)
  return dataclasses.replace(default, **values)


def _check_value(name: str, value: Any, hint: Any, bounds: Any) -> Any:
  if typing.get_origin(hint) is tuple:
    return _check_tuple(name, value, hint, bounds)
  kind, optional = _plain_type(hint)
  if value is None:
    if optional:
      return None
    raise ConfigError(f'{name} must be a {kind.__name__}, not None')
  if kind is float and isinstance(value, int) and not isinstance(value, bool):
    value = float(value)
  if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
    raise ConfigError(f'{name} must be a {kind.__name__}{" or None" if optional else ""}, not {value!r}')
  choices, low, high = bounds.get('choices'), bounds.get('low'), bounds.get('high')
  if choices and value not in choices:
    raise ConfigError(f'{name} is {value!r}; it must be one of: {", ".join(map(str, choices))}')
  if isinstance(value, (int, float)):
    if not math.isfinite(value):
      raise ConfigError(f'{name} is {value!r}; it must be finite')
    if low is not None and (value < low or (bounds.get('open_low') and value == low)):
      raise ConfigError(f'{name} is {value!r}; it must be {">" if bounds.get("open_low") else ">="} {low}')
    if high is not None and value > high:
      raise ConfigError(f'{name} is {value!r}; it must be <= {high}')
  return value


def _check_tuple(name: str, value: Any, hint: Any, bounds: Any) -> tuple:
  kind = typing.get_args(hint)[0]
  if not isinstance(value, (tuple, list)) or not value:
    raise ConfigError(f'{name} must be a tuple of {kind.__name__}, such as {name}="(1, 2)" on the command line, not {value!r}')
  checked = tuple(_check_value(f'{name}[{i}]', item, kind, bounds) for i, item in enumerate(value))
  if len(set(checked)) < len(checked):
    raise ConfigError(f'{name} is {value!r}; its values must differ')
  return checked


def _check_together(c: Config) -> None:
  """Rules that involve more than one setting, or parts of one."""
  m, s = c.model, c.synthesize
  for name in c.stage.split(','):
    if name not in STAGES or (name in ('all', 'plan') and c.stage != name):
      raise ConfigError(f'stage is {c.stage!r}; it must be one of: {", ".join(STAGES)}; or some but "all" and "plan", separated by commas')
  if m.num_heads % m.num_kv_heads:
    raise ConfigError(f'model.num_heads ({m.num_heads}) must be a multiple of model.num_kv_heads ({m.num_kv_heads})')
  if m.head_dim % 2:
    raise ConfigError(f'model.head_dim is {m.head_dim}; rotary embeddings need it even')
  if m.rope_low_freq_factor >= m.rope_high_freq_factor:
    raise ConfigError(
      f'model.rope_low_freq_factor ({m.rope_low_freq_factor}) must be less than model.rope_high_freq_factor ({m.rope_high_freq_factor})'
    )
  if c.tokenizer.kind == 'file' and c.tokenizer.path is None:
    raise ConfigError("tokenizer.path must name a tokenizer.json or tokenizer.model when tokenizer.kind is 'file'")
  if s.prefix_min_tokens > s.prefix_max_tokens:
    raise ConfigError(f'synthesize.prefix_min_tokens ({s.prefix_min_tokens}) exceeds synthesize.prefix_max_tokens ({s.prefix_max_tokens})')
  if s.unseen_policies > s.policies - 2:
    raise ConfigError(f'synthesize.unseen_policies ({s.unseen_policies}) must leave two of synthesize.policies ({s.policies}) to train on')
  sizes = dataclasses.astuple(c.mesh)
  if 0 in sizes or sizes.count(-1) > 1:
    raise ConfigError(f'mesh {sizes} (data, fsdp, tensor, context): sizes are positive, and at most one is -1')
  r = c.rft
  responses = r.prompts_per_step * r.num_generations
  if r.mini_batch_size is not None and r.mini_batch_size > responses:
    raise ConfigError(
      f'rft.mini_batch_size ({r.mini_batch_size}) exceeds the {responses} responses of a step (rft.prompts_per_step x rft.num_generations)'
    )
  if r.num_generations == 1 and (r.advantage != 'gae' or r.reward.normalize == 'group'):
    raise ConfigError(
      "rft.num_generations is 1: rft.advantage 'grpo' and 'rloo' and rft.reward.normalize 'group' compare responses to one prompt"
    )
  if r.row_length is not None and r.row_length < r.rollout.max_prompt + r.rollout.max_new:
    raise ConfigError(f'rft.row_length ({r.row_length}) is less than rft.rollout.max_prompt + max_new: a prompt with its answer must fit')
  if r.kl_in == 'loss' and r.kl_estimator == 'k1':
    raise ConfigError("rft.kl_in is 'loss' and rft.kl_estimator 'k1': its gradient is 0 in the mean; take 'k2' or 'k3'")
  if r.kl_target is not None and r.kl_horizon <= 0.2 * responses:
    raise ConfigError(f'rft.kl_horizon ({r.kl_horizon:g}) must exceed a fifth of the {responses} responses of a step')
  if r.reward.source == 'python' and r.reward.function is None:
    raise ConfigError("rft.reward.source is 'python' and rft.reward.function names no function; set it to 'module:name'")
  if r.reward.source != 'python' and r.reward.function is not None:
    raise ConfigError(f"rft.reward.function is set, but rft.reward.source is {r.reward.source!r}; set rft.reward.source to 'python'")
  if r.reward.rule_weight and r.reward.rule is None:
    raise ConfigError('rft.reward.rule_weight is set, and no rule is: set rft.reward.rule')
  if not r.reward.model_weight and not r.reward.rule_weight:
    raise ConfigError('rft.reward.model_weight and rule_weight are both 0: nothing is rewarded')
  if r.rollout.min_new > r.rollout.max_new:
    raise ConfigError(f'rft.rollout.min_new ({r.rollout.min_new}) exceeds rft.rollout.max_new ({r.rollout.max_new})')
