"""Options of reinforcement fine-tuning."""

from __future__ import annotations

import dataclasses

from polar_jax.config.base import option, section
from polar_jax.config.training import LoraConfig, OptimizerConfig


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
  """How the policy responds to prompts."""

  max_prompt: int = option(1_024, 'Longest prompt, in tokens; longer ones are left out, counted and reported.', min=1)
  max_new: int = option(1_024, 'Longest response, in tokens, including its stop token.', min=1)
  min_new: int = option(1, 'Shortest response, in tokens: no stop token is sampled before.', min=1)
  temperature: float = option(1.0, 'Sampling temperature; 0: greedy.', min=0)
  top_p: float = option(1.0, 'Nucleus sampling: share of the probability mass to sample from.', exclusive_min=0, max=1)
  top_k: int | None = option(None, 'Sample from this many likeliest tokens. None: from all.', min=1)
  stop: str | None = option(
    None, "Tokens that end a response, separated by spaces. None: the tokenizer's EOS and the end of a turn of its chat template."
  )
  max_concurrent: int = option(64, 'Responses decoded at a time; a finished one makes room for the next prompt.', min=1)
  chat: str = option('auto', "auto: apply the policy's chat template, if its checkpoint has one; none: do not.", choices=('auto', 'none'))


@dataclasses.dataclass(frozen=True)
class RewardConfig:
  """The reward of a response: a weighted sum of a score and a rule, then normalized, clipped and shaped.

  The defaults are the paper's recipe: the raw score of the reward model.
  """

  source: str = option(
    'model',
    'Where scores come from: a model in this process, a model on an HTTP server, or `function`.',
    choices=('model', 'http', 'python'),
  )
  function: str | None = option(
    None, "Required by `source` 'python': 'module:name' of f(prompts, completions, **columns) -> list of numbers, as in TRL."
  )
  checkpoint: str = option(
    'finetune', "The reward model: 'pretrain' or 'finetune' (a stage of this workdir), or any checkpoint with a reward head."
  )
  server: str = option('sglang', "Type of the server of `source` 'http'.", choices=('sglang', 'vllm', 'lmdeploy'))
  address: str = option('127.0.0.1:30000', 'Address of the server as host:port.')
  server_model: str | None = option(None, 'Model name in requests to the server. None: the last part of `checkpoint`.')
  unit_interval: bool = option(
    False, "Accept a server whose scores all lie between 0 and 1. False: they are refused, because a server's sigmoid may have made them."
  )
  timeout: float = option(30.0, 'Seconds to wait for a response of the server.', exclusive_min=0)
  patience: float = option(180.0, 'Seconds for which a failing server is retried before the run saves and stops.', min=0)
  wrapper: str = option(
    'sft', 'How prompt and trajectory are joined: by a newline (sft), or directly (pretrain).', choices=('sft', 'pretrain')
  )
  strip_thinking: bool = option(
    True, 'Score only what follows the first `</think>`, as the official code does, also if the prompt has the `<think>`.'
  )
  model_weight: float = option(1.0, 'Weight of the score from `source`; 0: it is not computed.')
  rule_weight: float = option(0.0, 'Weight of the rule; 0: it is only measured.')
  rule: str | None = option(
    None,
    "last_number: 1 if the last number of a response is the reference's, else 0; math-verify judges formulas if installed. None: no rule.",
    choices=('last_number',),
  )
  normalize: str = option(
    'none',
    'Subtract a mean and divide by a standard deviation, over all rewards so far (running) or those of a prompt (group); '
    "or subtract the score of the prompt's reference (reference).",
    choices=('none', 'running', 'group', 'reference'),
  )
  clip: float | None = option(None, 'Largest absolute value of the normalized reward. None: no clipping.', exclusive_min=0)
  missing_eos_penalty: float = option(0.0, 'Subtracted from the reward of a response that is cut at max_new.', min=0)
  length_buffer: int | None = option(
    None, 'Tokens before max_new over which `length_penalty` grows linearly from 0. None: no length penalty.', min=1
  )
  length_penalty: float = option(1.0, 'Subtracted from the reward of a response of max_new tokens.', min=0)
  row_length: int | None = option(None, 'Tokens of a scored row. None: chosen from the template and the longest prompts.', min=8)
  rows_per_batch: int = option(16, 'Rows scored at a time.', min=1)


@dataclasses.dataclass(frozen=True)
class AlarmConfig:
  """Signs of reward hacking, each compared with the mean over the last `window` steps. An alarm that is None is off."""

  action: str = option('warn', 'What an alarm does; stop: save and end the run.', choices=('warn', 'stop'))
  window: int = option(5, 'Steps to average over.', min=1)
  max_kl: float | None = option(None, 'KL divergence from the reference policy, in nats per token.', exclusive_min=0)
  min_entropy: float | None = option(None, 'Entropy of the policy, in nats per token.', min=0)
  max_truncated: float | None = option(None, 'Share of responses that are cut at max_new.', min=0, max=1)
  max_empty: float | None = option(None, 'Share of responses without text.', min=0, max=1)
  min_shuffled_gap: float | None = option(None, 'Raw score minus the score under another reference.')
  max_shuffled_rise: float | None = option(None, 'Rise of the score under other references since the first step.', min=0)
  max_overlap: float | None = option(None, 'Share of the words of a response that occur in its reference.', min=0, max=1)


@dataclasses.dataclass(frozen=True)
class RftConfig:
  """Reinforcement fine-tuning by PPO. The defaults are those of the official scripts (docs/rft.md)."""

  method: str = option('ppo', 'ppo; or sft: imitate the references with the same trainer.', choices=('ppo', 'sft'))
  policy: str = option('pretrain_lm', "The policy to tune: 'pretrain_lm' (a stage of this workdir), or any language-model checkpoint.")
  epochs: int = option(1, 'Passes over the prompts, if `steps` is None.', min=1)
  steps: int | None = option(None, 'Steps of the run. None: `epochs` passes over the prompts.', min=1)
  prompts_per_step: int = option(1_024, 'Prompts per step.', min=1)
  num_generations: int = option(1, 'Responses per prompt.', min=1)
  mini_batch_size: int | None = option(None, 'Responses per optimizer update. None: all of a step.', min=1)
  update_epochs: int = option(1, 'Passes over the responses of a step.', min=1)
  recompute_logprobs: bool = option(
    True, 'Recompute the old log-probabilities after sampling. False: use those noted while sampling, which saves a pass.'
  )
  row_length: int | None = option(
    None, 'Tokens of a packed training row, which holds as many responses as fit. None: max_prompt + max_new, rounded up.', min=8
  )
  micro_batch_rows: int = option(8, 'Rows of a micro-batch; no result depends on it.', min=1)
  advantage: str = option('gae', 'Advantage estimator; grpo and rloo need no critic.', choices=('gae', 'grpo', 'rloo'))
  gamma: float = option(1.0, 'gae: discount factor per token.', min=0, max=1)
  gae_lambda: float = option(1.0, 'gae: bias-variance trade-off, lambda.', min=0, max=1)
  whiten: bool = option(True, 'gae: whiten advantages over the tokens of a step.')
  kl_in: str = option('none', 'Where the KL divergence from the reference policy enters.', choices=('none', 'reward', 'loss'))
  kl_estimator: str = option('k1', 'Estimator of the KL divergence.', choices=('k1', 'k2', 'k3'))
  kl_coef: float = option(0.01, 'Coefficient of the KL divergence.', min=0)
  kl_target: float | None = option(
    None, 'KL divergence that `kl_coef` is steered to, in nats per token. None: `kl_coef` is constant.', exclusive_min=0
  )
  kl_horizon: float = option(10_000.0, 'Responses over which `kl_coef` is steered.', exclusive_min=0)
  track_kl: bool = option(True, 'Measure the KL divergence from the reference policy, a frozen copy of the initial policy.')
  clip: float = option(0.2, 'Clip range of the probability ratio.', exclusive_min=0)
  clip_high: float | None = option(None, 'Upper clip range of the probability ratio. None: `clip`.', exclusive_min=0)
  dual_clip: float | None = option(3.0, 'Bound of the ratio for negative advantages (dual clip). None: no bound.', exclusive_min=1)
  value_clip: float | None = option(0.5, 'Clip range of the change of a value, in units of reward. None: no clipping.', exclusive_min=0)
  loss_mean: str = option(
    'token', 'Average the loss over all tokens of a step, or over responses after their tokens.', choices=('token', 'sequence')
  )
  entropy_coef: float = option(0.0, 'Coefficient of the entropy bonus.', min=0)
  critic_warmup: int = option(0, 'First steps, in which only the critic learns.', min=0)
  shuffled_every: int = option(1, 'Steps between scorings of the responses under other references, of other prompts or policies.', min=1)
  evaluate_every: int | None = option(None, 'Steps between measurements on held-out prompts. None: before and after.', min=1)
  evaluate_prompts: int = option(256, 'Held-out prompts per measurement.', min=1)
  log_every: int = option(1, 'Steps between progress lines; metrics.jsonl has every step.', min=1)
  actor: OptimizerConfig = section(
    OptimizerConfig(learning_rate=1e-6, final_lr_ratio=1.0, b2=0.999, weight_decay=0.01), 'Optimizer of the policy.'
  )
  critic: OptimizerConfig = section(
    OptimizerConfig(learning_rate=1e-5, warmup_ratio=0.0, b2=0.999, weight_decay=0.01), 'Optimizer of the critic.'
  )
  lora: LoraConfig = section(
    LoraConfig(), 'Adapters of the policy and of the critic, which then share their base with the reference policy.'
  )
  rollout: RolloutConfig = section(RolloutConfig())
  reward: RewardConfig = section(RewardConfig())
  alarms: AlarmConfig = section(AlarmConfig())


@dataclasses.dataclass(frozen=True)
class StudyConfig:
  """Repeated runs of rft, and the study that it is in the miniature, where the likelihood of the target policy is known."""

  seeds: int = option(
    1, 'Independent runs, with the seeds `seed`, `seed` + 1, ...; in the miniature each is tuned towards another policy.', min=1
  )
