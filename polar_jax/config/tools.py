"""Options of the stages that evaluate, sweep, fit, convert, score and plan."""

from __future__ import annotations

import dataclasses

from polar_jax.config.base import option
from polar_jax.config.model import STORED_DTYPES


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
  """Evaluation of the reward models of a workdir, of one reward model on given files and benchmarks, or of a policy on benchmarks."""

  rows_per_batch: int = option(16, 'Rows scored at a time; a row holds several groups of candidates.', min=1)
  bootstrap: int = option(2_000, 'Bootstrap resamples of the 95% intervals.', min=100)
  benchmarks: str | None = option(
    None,
    'Public benchmarks to evaluate on, separated by commas: judgebench, rm_bench, rmb, polar_rmb, rewardbench, rewardbench_2, '
    'ppe_correctness, rewardmath. None: no benchmark.',
  )
  folder: str | None = option(
    None,
    'Folder with a folder of published files for each benchmark, or hub: those on the Hugging Face hub. None: no benchmark.',
  )
  scores: str | None = option(
    None, 'Rewards that another system recorded, a .jsonl or .jsonl.gz file of {"id": ..., "rewards": [...]}. None: those of checkpoint.'
  )
  compare: str | None = option(
    None,
    'Second systems for paired tests, separated by commas: reward models, or recorded rewards such as scores.jsonl.gz of another run. '
    'None: no second system.',
  )
  max_items: int | None = option(None, 'Most items of each set that are scored, drawn at random. None: all.', min=2)
  arm_items: int | None = option(
    None, 'Most items of each set that all arms of a workdir score, drawn at random; the first arm scores every item. None: all.', min=2
  )
  arm_sets: str | None = option(
    None, 'Sets that all arms of a workdir score, separated by commas; the first arm scores every set. None: all.'
  )
  training: str | None = option(
    None, 'Training files, separated by commas, in which the prompts are looked for (contamination). None: they are not looked for.'
  )
  near_duplicates: float | None = option(
    None,
    'With evaluate.training: also find prompts that share at least this part of the 5-grams of words of either, by MinHash (extra '
    'contamination). None: only exact matches.',
    exclusive_min=0,
    max=1,
  )
  references: str = option(
    'true',
    'Which references the model reads, separated by commas, the first for the results: true, none, empty, shuffled, twin, degraded, file, '
    'right, wrong, style.',
  )
  reference_file: str | None = option(
    None, 'References of the variant `file`: a file of {"id": ..., "reference": ...}, such as answers of another model. None: no file.'
  )
  embedding: str | None = option(
    None,
    'Sentence embeddings for a baseline: `minilm`, or a folder of sentence-transformers (extra embedding). None: no such baseline.',
  )
  language_model: str | None = option(
    None, 'Language model for a baseline: how much likelier a candidate is after the reference. None: no such baseline.'
  )
  tasks: str | None = option(
    None,
    'Policies: benchmarks to run on the language model `checkpoint`, separated by commas: of configs/benchmarks_20.py, lm-eval, or '
    '`include_path`. None: no benchmark.',
  )
  include_path: str | None = option(None, 'Policies: folder with your own task files of lm-eval (.yaml). None: only those that it has.')
  shots: int | None = option(None, 'Policies: examples in a prompt. None: as many as the benchmark has.', min=0)
  limit: int | None = option(None, 'Policies: use the first documents of each task only, to try a setting. None: all.', min=1)
  chat: str = option('none', "Policies: auto: apply the checkpoint's chat template, if it has one; none: do not.", choices=('auto', 'none'))
  max_length: int | None = option(
    None, 'Policies: tokens that the model reads at a time, responses included. None: as many as it is made for.', min=2
  )
  max_new: int = option(256, 'Policies: longest response, in tokens, where a task does not say.', min=1)
  answer_field: str | None = option(
    None,
    'Policies: field of a document with the answer, by which the rule last_number (with math-verify, if installed) judges too. None: that '
    'of the benchmark.',
  )
  run_code: bool = option(False, 'Policies: run the code of responses on this machine, for the benchmarks that need it. Use a sandbox.')


@dataclasses.dataclass(frozen=True)
class SweepConfig:
  """A grid of pre-training runs: every size with every number of tokens, learning rate, batch size and seed.

  Everything else is that of the sections model, pretrain_lm and pretrain.
  """

  sizes: tuple[str, ...] = option(
    ('32x2', '64x3', '128x4'), 'Models as d_model x num_layers; heads and feed-forward width in proportion to `model`.'
  )
  tokens: tuple[int, ...] = option((1_000_000, 2_000_000), 'Tokens of the triplets that a run trains on.', min=1)
  learning_rates: tuple[float, ...] = option((1e-3,), 'Peak learning rates, at the width of `model`.', exclusive_min=0)
  batches: tuple[int, ...] = option((32,), 'Batch sizes, in triplets.', min=1)
  seeds: tuple[int, ...] = option((0,), 'Added to `seed`: other initial parameters, language models and orders of triplets.', min=0)
  tokens_exponent: float = option(
    0.0, 'Multiply the tokens of a size by (its parameters / those of `model`) to this power; 0: all sizes alike.', min=0
  )
  width_exponent: float = option(
    0.0, 'Multiply the learning rate of a size by (width of `model` / its width) to this power; 0: all sizes alike.'
  )
  backend: str = option(
    'inline',
    'Where runs are executed: in this process, in processes on this machine, or on a Ray cluster.',
    choices=('inline', 'processes', 'ray'),
  )
  workers: int = option(1, 'Runs at a time: threads (inline, on one device), or processes that share the cores.', min=1)
  ray_address: str | None = option(None, 'Address of a Ray cluster whose nodes see the workdir. None: Ray on this machine.')
  cpus: float = option(1.0, 'CPUs per run on Ray.', min=0)
  gpus: float = option(0.0, 'GPUs per run on Ray.', min=0)
  jobs_only: bool = option(False, "Write the runs as commands for a cluster's queue instead of training them.")


@dataclasses.dataclass(frozen=True)
class FitConfig:
  """Scaling laws from the results of a sweep, and advice on a budget."""

  input: str | None = option(
    None, "CSV file with the columns parameters, tokens, flops and loss, optionally learning_rate and batch. None: the sweep's results.csv."
  )
  flops: float | None = option(None, 'Compute budget to advise on, in FLOPs. None: no advice.', exclusive_min=0)
  topology: str = option('v5p:4x4x4', 'Chip and number of chips that the budget is spent on, such as v5p:4x4x4 or h100:8.')
  mfu: float = option(0.4, 'Share of the peak FLOP/s that training reaches there.', exclusive_min=0, max=1)
  lm_tokens: float | None = option(
    None, "Training tokens of the language model to start from. None: no learning rate by the paper's law.", exclusive_min=0
  )


@dataclasses.dataclass(frozen=True)
class PlanConfig:
  """The step that the plan stage compiles, and the chips that it compiles for."""

  topology: str = option('v5p:4x4x4', 'TPU chip and slice.')
  step: str = option('pretrain', 'Stage whose training step is planned.', choices=('pretrain_lm', 'pretrain', 'finetune', 'rft'))
  triplet_tokens: int | None = option(
    None, 'Mean tokens of a triplet, shared prefixes counted once. None: every triplet fills a row.', min=2
  )
  tokens: float | None = option(
    None, 'Tokens of the whole run, shared prefixes counted once. None: those of its steps, if they are set.', exclusive_min=0
  )
  reward: str = option('polar_7b', 'Preset of the reward model of rft.')


@dataclasses.dataclass(frozen=True)
class ConvertConfig:
  """Exchange of checkpoints with other formats. The direction follows from the type of `checkpoint`."""

  dtype: str | None = option(None, 'Type of the written tensors. None: as stored.', choices=STORED_DTYPES)
  adapter: bool = option(False, 'Write adapters alone, as a folder of PEFT, instead of merging them into the weights of their base.')
  shard_gib: float = option(4.0, 'Largest safetensors file, in GiB.', exclusive_min=0)


@dataclasses.dataclass(frozen=True)
class ScoreConfig:
  """How the score stage processes its examples; no reward depends on it."""

  window: int = option(1_024, 'Examples that are read, scored and written at a time.', min=1)
