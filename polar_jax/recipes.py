"""What config files share: the published sizes (docs/recipes.md says where each figure comes from) and the miniatures."""

import ml_collections

from polar_jax.config import default_config
from polar_jax.model.presets import PRESETS

# A pre-training row holds a prompt twice (1,024 tokens at most each time) and three trajectories of at most 4,096, plus
# separators: 14,341 tokens. The rest is room for text that re-tokenises a little longer, up to a multiple of 128.
PRETRAIN_ROW = 14_464
# The paper's 3.6T tokens are 100k steps of 4,343 triplets of two sequences: 8,300 tokens a triplet. A row that shares the prefix holds
# fewer by this factor.
SHARED = 1.6
PRETRAIN_TRIPLET = 5_200
# A fine-tuning row is two sequences of at most 16,384 tokens that share all but their candidates: 16,384 + 4,096, and room.
FINETUNE_ROW = 20_608
# A row of reinforcement fine-tuning: two prompts and answers of the greatest lengths (1,024 + 1,024), and more of shorter ones.
RFT_ROW = 4_096


def base(preset: str) -> ml_collections.ConfigDict:
  """Model, tokenizer and template of POLAR, bfloat16 compute with float32 master weights, parameters over all devices."""
  config = default_config()
  config.model.update(PRESETS[preset])
  config.model.compute_dtype = 'bfloat16'
  config.model.remat = 'full'
  config.tokenizer.kind = 'checkpoint'  # that of the checkpoint to start from
  config.template.reward_token_id = 92_527  # [UNUSED_TOKEN_130]
  config.mesh.fsdp = -1
  config.checkpointing.every_steps = 500
  return config


def pretraining(preset: str, *, start_from: str, learning_rate: float, batch_size: int) -> ml_collections.ConfigDict:
  """One epoch of contrastive pre-training from a language model (section D.1.2 of the paper)."""
  config = base(preset)
  config.stage = 'pretrain'
  config.data.triplets = 'data/polar_triplets'
  config.data.row_length = PRETRAIN_ROW
  config.pretrain.start_from = start_from
  config.pretrain.learning_rate = learning_rate
  config.pretrain.batch_size = batch_size
  config.plan.triplet_tokens = PRETRAIN_TRIPLET
  return config


def finetuning(preset: str, *, start_from: str, learning_rate: float) -> ml_collections.ConfigDict:
  """One epoch over ranked data, batch 320 (section D.2 of the paper; schedule and optimizer of the official configs)."""
  config = base(preset)
  config.stage = 'finetune'
  config.data.preferences = 'data/preferences'
  config.data.row_length = FINETUNE_ROW
  config.finetune.start_from = start_from
  config.finetune.learning_rate = learning_rate
  config.finetune.batch_size = 320
  config.plan.step = 'finetune'
  return config


def reinforcement(preset: str, *, policy: str, prompts: str, tensor: int, rows: int, slots: int = 512) -> ml_collections.ConfigDict:
  """One epoch of PPO with POLAR-7B as the reward (section E.3 of the paper; where it is silent, the official scripts).

  `RftConfig`'s defaults are those settings: here stands what depends on the model and on the machine.

  Args:
    preset: of the policy; the reward model's shape comes from its checkpoint.
    tensor: devices that key/value heads, feed-forward and vocabulary are divided over; all others divide the model's width.
    rows: of a micro-batch, of `RFT_ROW` tokens each.
    slots: answers decoded at a time.
  """
  config = base(preset)
  config.stage = 'rft'
  config.data.prompts = prompts
  config.rft.policy = policy
  config.rft.reward.checkpoint = 'checkpoints/polar_7b'
  config.rft.row_length = RFT_ROW
  config.rft.micro_batch_rows = rows
  config.rft.rollout.max_concurrent = slots
  config.rft.shuffled_every = 10
  config.mesh.tensor = tensor
  config.checkpointing.every_steps = 50
  config.plan.step = 'rft'
  return config


def miniature(preset: str, *, train_examples: int, preference_examples: int) -> ml_collections.ConfigDict:
  """The whole story on the tiny world, in one workdir: every stage, and the two ablations of fine-tuning."""
  config = default_config()
  config.stage = 'all'
  config.ablations = True
  config.synthesize.train_examples = train_examples
  config.synthesize.preference_examples = preference_examples
  config.model.update(PRESETS[preset])
  config.data.row_length = 640  # 32 triplets of about 92 tokens fit five rows
  config.pretrain_lm.batch_size = 16
  config.pretrain_lm.learning_rate = 1e-2
  config.pretrain.batch_size = 32
  config.pretrain.learning_rate = 2e-3
  config.finetune.batch_size = 32
  config.finetune.learning_rate = 5e-4
  for run in (config.pretrain_lm, config.pretrain, config.finetune):
    run.log_every = 100
  _tune_towards_a_policy(config)
  # The machinery of a scaling law in a few minutes: a law takes the sizes and tokens of configs/sweep.py.
  config.sweep.update(
    {'sizes': ('12x1', '16x2', '32x2'), 'tokens': (450_000,), 'learning_rates': (2e-3,), 'width_exponent': 0.5, 'workers': 2}
  )
  return config


def _tune_towards_a_policy(config: ml_collections.ConfigDict) -> None:
  """The miniature's study of reinforcement fine-tuning: short runs, so large learning rates."""
  r = config.rft
  config.study.seeds = 3
  config.study.start_steps = 60
  r.steps = 30
  r.prompts_per_step = 64
  r.num_generations = 2
  r.mini_batch_size = 64
  r.recompute_logprobs = False  # those noted while sampling are the same in float32
  r.micro_batch_rows = 7  # a minibatch needs six or seven
  r.row_length = 384
  r.shuffled_every = 10
  r.log_every = 10
  r.evaluate_prompts = 128
  r.actor.update({'learning_rate': 2e-3, 'warmup_ratio': 0.1, 'b2': 0.95, 'weight_decay': 0.0})
  r.critic.update({'learning_rate': 3e-3, 'b2': 0.95, 'weight_decay': 0.0})
  # The pool's policies never end early. Left to itself PPO finds that the reward model prefers silence to a stranger's text.
  r.rollout.update({'max_prompt': 16, 'max_new': 32, 'min_new': 28, 'max_concurrent': 128})
  r.reward.update({'checkpoint': 'pretrain', 'wrapper': 'pretrain'})


def word_problems(preset: str, *, checkpoint: str) -> ml_collections.ConfigDict:
  """A small instruction model on arithmetic that a rule can check; groups of answers take the place of a critic."""
  config = default_config()
  config.stage = 'all'
  config.ablations = True  # also with the rule as the only reward
  config.synthesize.world = 'arithmetic'
  config.synthesize.train_examples = 2_000
  config.synthesize.evaluation_examples = 200
  config.synthesize.preference_examples = 800
  config.synthesize.preference_evaluation_examples = 200
  config.model.update(PRESETS[preset])
  config.tokenizer.kind = 'checkpoint'
  # Special tokens of its vocabulary that plain text never holds.
  config.template.separator = '<file_sep>'
  config.template.reward_token = '<repo_name>'
  config.finetune.start_from = checkpoint
  config.finetune.batch_size = 8
  config.finetune.steps = 80
  config.finetune.learning_rate = 3e-5
  config.finetune.evaluate_examples = 120
  config.rft.policy = checkpoint
  config.rft.advantage = 'rloo'
  config.rft.steps = 40
  config.rft.prompts_per_step = 12
  config.rft.num_generations = 8
  config.rft.micro_batch_rows = 4
  config.rft.row_length = 384  # a prompt with its eight answers, or two
  config.rft.recompute_logprobs = False  # one update a step: those noted while sampling are the policy's
  config.rft.track_kl = False  # a third of a step's time on a CPU
  config.rft.evaluate_prompts = 200
  config.rft.evaluate_every = 20
  config.rft.shuffled_every = 5
  config.rft.actor.learning_rate = 4e-5
  config.rft.actor.warmup_ratio = 0.05
  config.rft.rollout.max_prompt = 96
  config.rft.rollout.max_new = 32
  config.rft.rollout.max_concurrent = 48
  config.rft.rollout.temperature = 0.8
  config.rft.reward.rule = 'last_number'
  config.rft.reward.rows_per_batch = 8
  config.checkpointing.every_steps = 10
  config.checkpointing.keep = 1
  return config
